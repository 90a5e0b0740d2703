"""The gateway under limits, under attack, observed, and on its way to its end."""

import asyncio
import contextlib
import json
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from docarray import Document, DocumentArray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jina.excepts import BadServer
from jina.proto import jina_pb2, jina_pb2_grpc
from jina.types.request.data import DataRequest, SingleDocumentRequest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.hostile_clients import DATA, SETTINGS, Http2, frame, grpc_head
from tests.integration.operating import data_request, flow, raw_unary, texts, unary
from tests.integration.serving import Server, serve

TOKEN = 'a token of the tests'
TIGHT = {
    'max_request_mb': 1,
    'max_total_mb': 2,
    'max_documents': 5,
    'max_requests': 3,
    'request_seconds': 1.5,
    'slow_client_seconds': 1.5,
}


@pytest.fixture(scope='module')
def tight(tmp_path_factory):
    with serve(flow(TIGHT), tmp_path_factory.mktemp('tight'), FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp('watched')
    variables = {
        'FINETUNER_TOKEN': TOKEN,
        'FINETUNER_LOG_FORMAT': 'json',
        'BUSY_UNREADY_FILE': str(folder / 'unready'),
    }
    with serve(flow({'runs': False}), folder, **variables) as running:
        yield running


def encode(server: Server, count: int = 1, headers: dict | None = None, **parameters):
    body = {'data': [{'text': 'a'}] * count, 'parameters': parameters}
    return server.post('/encode', body, headers=headers)


def gateway_of(server: Server) -> psutil.Process:
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for connection in process.net_connections():
            if connection.status == 'LISTEN' and connection.laddr.port == server.http_port:
                return process
    raise AssertionError('no gateway')


# ---- sizes


def test_a_body_announced_as_too_large_is_refused_before_it_comes(tight):
    head = b'POST /encode HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'
    with socket.create_connection(('127.0.0.1', tight.http_port), timeout=20) as out:
        out.sendall(head + b'Content-Length: 2147483648\r\n\r\n')
        assert out.recv(4096).startswith(b'HTTP/1.1 413')


def test_a_body_that_grows_too_large_is_refused_on_its_way(tight):
    def pieces():
        yield b'{"data": [{"text": "'
        for _ in range(64):
            yield b'a' * 65536

    kind = {'content-type': 'application/json'}
    try:
        answer = httpx.post(f'{tight.url}/encode', content=pieces(), headers=kind, timeout=30)
    except (httpx.WriteError, httpx.ReadError):
        return  # the connection was closed on what was still being sent
    assert answer.status_code == 413
    assert answer.json()['error'] == 'TooLargeError'


def test_a_large_message_over_grpc_is_refused_without_memory(tight):
    gateway = gateway_of(tight)
    raw_unary(tight, data_request().proto.SerializeToString())
    before = gateway.memory_info().rss
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        raw_unary(tight, bytes(512 << 20))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert gateway.memory_info().rss - before < 64 << 20


def test_refused_messages_leave_the_connection_and_its_neighbours_alone(tight):
    async def run() -> list:
        address = f'127.0.0.1:{tight.grpc_port}'
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary('/jina.JinaSingleDataRequestRPC/process_single_data')
            good = data_request().proto.SerializeToString()
            results = []
            for _ in range(8):
                sent = [call(bytes(20 << 20)), call(good), call(bytes((1 << 20) + 1))]
                results += await asyncio.gather(*sent, return_exceptions=True)
            return results

    results = asyncio.run(run())
    for refused in (*results[0::3], *results[2::3]):
        assert isinstance(refused, grpc.aio.AioRpcError)
        assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert '1 MiB' in refused.details()
    for answer in results[1::3]:
        assert DataRequest(answer).docs.embeddings.shape == (1, 3)


def test_a_connection_has_a_bounded_number_of_calls(tight):
    with Http2(tight.grpc_port) as client:
        settings = b''.join(payload for kind, _, payload in client.frames(1) if kind == SETTINGS)
    pairs = [struct.unpack_from('>HI', settings, at) for at in range(0, len(settings), 6)]
    assert (3, 1000) in pairs  # SETTINGS_MAX_CONCURRENT_STREAMS


def test_a_small_message_that_unpacks_to_a_large_one_is_refused(tight):
    gateway = gateway_of(tight)
    before = gateway.memory_info().rss
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        raw_unary(tight, bytes(512 << 20), compression=grpc.Compression.Gzip)
    assert caught.value.code() in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    )
    assert gateway.memory_info().rss - before < 64 << 20


def test_too_many_documents_are_refused(tight):
    answer = encode(tight, 6)
    assert (answer.status_code, answer.json()['error']) == (413, 'TooLargeError')
    assert '6 Documents' in answer.json()['message']
    assert encode(tight, 5).status_code == 200
    with pytest.raises(BadServer, match='6 Documents') as caught:
        tight.client().post('/encode', texts(6))
    assert caught.value.args[0].status.exception.name == 'TooLargeError'
    assert len(tight.client().post('/encode', texts(12), request_size=5)) == 12


@pytest.mark.parametrize('body', [b'[' * 500_000, b'{"data":' * 100_000, b'{"data": [1e999]}'])
def test_bombs_of_json_are_refused(tight, body):
    kind = {'content-type': 'application/json'}
    answer = httpx.post(f'{tight.url}/encode', content=body, headers=kind, timeout=60)
    assert answer.status_code == 422


# ---- time, and how many at once


def test_more_requests_at_once_than_allowed_are_told_when_to_come_again(tight):
    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=tight.url, timeout=30) as client:
            body = {'data': [{'text': 'a'}], 'parameters': {'seconds': 1}}
            return await asyncio.gather(*[client.post('/encode', json=body) for _ in range(8)])

    answers = asyncio.run(run())
    by_status = {status: [a for a in answers if a.status_code == status] for status in (200, 429)}
    assert {a.status_code for a in answers} == {200, 429}
    assert 3 <= len(by_status[200]) < 8
    for refused in by_status[429]:
        assert refused.json()['error'] == 'TooManyRequestsError'
        assert int(refused.headers['retry-after']) >= 1
    assert encode(tight).status_code == 200  # all places were given back


def test_a_full_queue_of_an_executor_says_when_to_come_again(tight):
    answer = tight.post('/full', {'data': [{'text': 'a'}]})
    assert answer.status_code == 429
    assert answer.headers['retry-after'] == '7'
    assert 'the queue is full; ask again in 7 s' in answer.json()['message']
    with pytest.raises(BadServer, match='ask again in 7 s'):
        tight.client().post('/full', texts(1))

    async def send(stub):
        call = stub.process_single_data(data_request('/full'))
        await call
        return {key: value for key, value in await call.trailing_metadata()}  # noqa: C416

    assert unary(tight, send)['retry-after'] == '7'


def test_a_late_answer_is_an_error(tight):
    answer = encode(tight, seconds=9)
    assert (answer.status_code, answer.json()['error']) == (504, 'DeadlineError')
    with pytest.raises(BadServer, match='not there in time'):
        tight.client().post('/encode', texts(1), parameters={'seconds': 9})
    # other endpoints may take as long as they want
    body = {'data': [{'text': 'a'}], 'parameters': {'seconds': 3}}
    assert tight.post('/wait', body).status_code == 200


def test_the_time_left_reaches_the_executor(tight):
    seen = encode(tight).json()['data'][0]['tags']['seen']
    assert 1 < float(seen['__timeout']) <= 1.5
    seen = encode(tight, headers={'X-Request-Timeout': '0.5'}).json()['data'][0]['tags']['seen']
    assert 0.2 < float(seen['__timeout']) <= 0.5
    # what a client says of itself counts for nothing
    seen = encode(tight, **{'__timeout': 99}).json()['data'][0]['tags']['seen']
    assert float(seen['__timeout']) <= 1.5
    for wrong in ('soon', '0', '-1', 'nan', 'inf'):
        answer = encode(tight, headers={'X-Request-Timeout': wrong})
        assert answer.status_code == 422
        assert 'X-Request-Timeout' in answer.json()['message']

    async def send(stub):
        return await stub.process_single_data(data_request(), timeout=0.8)

    answer = unary(tight, send)
    assert 0.1 < float(answer.docs[0].tags['seen']['__timeout']) <= 0.8


@pytest.mark.parametrize(
    'sent',
    [
        b'',
        b'POST /encode HTTP/1.1\r\nHost: 127',
        b'POST /encode HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'
        b'Content-Length: 100000\r\n\r\n{',
    ],
)
def test_clients_that_stop_in_the_middle_are_let_go(tight, sent):
    with socket.create_connection(('127.0.0.1', tight.http_port), timeout=30) as out:
        out.sendall(sent)
        received = b''
        while piece := out.recv(4096):
            received += piece
    assert received.startswith(b'HTTP/1.1 408') if sent else True


def test_clients_that_trickle_are_let_go(tight):
    head = b'POST /encode HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'

    def trickle(out: socket.socket) -> None:
        for _ in range(300):
            out.sendall(b' ')
            time.sleep(0.1)

    with socket.create_connection(('127.0.0.1', tight.http_port), timeout=30) as out:
        out.sendall(head + b'Content-Length: 100000\r\n\r\n')
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            trickle(out)


def test_a_slow_but_steady_client_is_served(tight):
    def pieces():
        body = json.dumps({'data': [{'text': 'a' * 6000}]}).encode()
        for start in range(0, len(body), 500):
            time.sleep(0.25)
            yield body[start : start + 500]

    kind = {'content-type': 'application/json'}
    answer = httpx.post(f'{tight.url}/encode', content=pieces(), headers=kind, timeout=60)
    assert answer.status_code == 200


def test_requests_share_what_memory_there_is(tight):
    head = b'POST /encode HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'
    most = 1 << 20

    def send(out: socket.socket) -> None:
        out.sendall(head + b'Content-Length: %d\r\n\r\n' % most + b' ' * (most - 1000))

    with contextlib.ExitStack() as stack:
        outs = [
            stack.enter_context(socket.create_connection(('127.0.0.1', tight.http_port), 10))
            for _ in range(3)
        ]
        for out in outs:
            send(out)
        ready, _, _ = select.select(outs, [], [], 1)
        (refused,) = ready
        answer = refused.recv(4096)
        assert answer.startswith(b'HTTP/1.1 429')
        assert b'retry-after' in answer.lower()
    # those that stand still are let go, and what they held is there again
    assert encode(tight).status_code == 200
    large = [Document(text='a' * 900_000)]
    for _ in range(4):
        assert tight.client().post('/encode', DocumentArray(large))[0].text


def test_a_message_over_grpc_that_stands_still_is_refused(tight):
    with Http2(tight.grpc_port) as client:
        begun = time.monotonic()
        client.socket.sendall(grpc_head(1))
        client.socket.sendall(frame(DATA, 0, 1, b'\0' + struct.pack('>I', 1 << 19) + bytes(9000)))
        answer = client.answer(10)
    assert b'the message came too slowly' in answer.replace(b'%20', b' ')
    assert 1 < time.monotonic() - begun < 6


# ---- what is no request


class Payload:
    def __reduce__(self):
        return os.mkdir, ('executed-by-a-pickle',)


def test_pickled_documents_are_not_opened(tight, tmp_path):
    request = DataRequest()
    request.header.exec_endpoint = '/encode'
    request.data.docs_bytes = pickle.dumps(Payload())
    answer = DataRequest(raw_unary(tight, request.proto.SerializeToString()))
    assert answer.status.exception.name == 'DataError'
    assert 'docs_bytes' in answer.status.description
    assert not os.path.exists('executed-by-a-pickle')


@pytest.mark.parametrize('message', [b'\xff' * 50, b'\x22\x7f', b'\x0a\x05hello', b'\x23' * 9])
def test_what_is_no_protobuf_is_an_error_of_the_client(tight, message):
    answer = DataRequest(raw_unary(tight, message))
    assert answer.status.code == jina_pb2.StatusProto.ERROR
    assert answer.status.exception.name in ('ConfigError', 'NotFoundError')


def test_single_documents_cannot_slip_past_the_gateway(tight):
    async def run():
        async with grpc.aio.insecure_channel(f'127.0.0.1:{tight.grpc_port}') as channel:
            stub = jina_pb2_grpc.JinaSingleDocumentRequestRPCStub(channel)
            request = SingleDocumentRequest()
            request.header.exec_endpoint = '/encode'
            return [answer async for answer in stub.stream_doc(request)]

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(run())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    'parameters',
    [
        {'__identity': None},
        {'busy': {'__identity': None}},
        {'busy____identity': None},
        {'busy__busy': {'__identity': None}},
    ],
)
def test_nobody_takes_their_name_off_a_request(tight, parameters):
    own = encode(tight).json()['data'][0]['tags']['seen']['__identity']
    seen = encode(tight, **parameters).json()['data'][0]['tags']['seen']
    assert seen['__identity'] == own
    answer = tight.client().post('/encode', texts(1), parameters=parameters)
    assert answer[0].tags['seen']['__identity'] == own


def test_streams_come_back_whole_and_in_order(tight):
    docs = texts(9)
    for options in (
        {},
        {'prefetch': 4},
        {'results_in_order': True},
        {'results_in_order': True, 'prefetch': 1},
    ):
        answer = tight.client().post('/encode', docs, request_size=3, **options)
        assert answer[:, 'text'] == docs[:, 'text']
    assert tight.client().post('/encode', DocumentArray()) == DocumentArray()


# ---- health


def health(server: Server, service: str = '') -> int:
    async def run():
        async with grpc.aio.insecure_channel(f'127.0.0.1:{server.grpc_port}') as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return await stub.Check(health_pb2.HealthCheckRequest(service=service))

    return asyncio.run(run()).status


def test_health_follows_the_executors_and_needs_no_token(watched):
    flag = watched.log.parent / 'unready'
    assert httpx.get(f'{watched.url}/health/live').json() == {'live': True}
    assert httpx.get(f'{watched.url}/health/ready').json() == {'ready': True, 'not_ready': {}}
    assert health(watched) == health_pb2.HealthCheckResponse.SERVING
    assert health(watched, 'jina.JinaRPC') == health_pb2.HealthCheckResponse.SERVING
    flag.touch()
    try:
        time.sleep(1.1)  # an answer is kept for a second
        answer = httpx.get(f'{watched.url}/health/ready')
        assert answer.status_code == 503
        assert answer.json() == {'ready': False, 'not_ready': {'busy': 'the model loads'}}
        assert health(watched) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert health(watched, 'jina.JinaRPC') == health_pb2.HealthCheckResponse.NOT_SERVING
        assert httpx.get(f'{watched.url}/health/live').status_code == 200
    finally:
        flag.unlink()
    time.sleep(1.1)
    assert httpx.get(f'{watched.url}/health/ready').status_code == 200


def test_an_executor_that_is_gone_is_told_of(tmp_path):
    # Jina waits so long for what is gone before it ends the rest
    with serve(flow(more='  timeout_ctrl: 5'), tmp_path, FINETUNER_TOKEN='') as server:
        assert httpx.get(f'{server.url}/health/ready').status_code == 200
        gateway = gateway_of(server).pid
        for child in psutil.Process(server.process.pid).children():
            if child.pid != gateway and 'finetuner' in ' '.join(child.cmdline()):
                child.kill()
        time.sleep(1.1)
        answer = httpx.get(f'{server.url}/health/ready', timeout=30)
        assert answer.status_code == 503
        assert answer.json()['not_ready'] == {'busy': 'is not reachable'}
        assert httpx.get(f'{server.url}/health/live').status_code == 200
        answer = encode(server)
        assert (answer.status_code, answer.json()['error']) == (503, 'Unavailable')
        with pytest.raises(ConnectionError, match='an Executor is not reachable'):
            server.client().post('/encode', texts(1))


# ---- what can be seen from outside


def allowed() -> dict[str, str]:
    return {'Authorization': f'Bearer {TOKEN}'}


def measured(server: Server) -> dict[tuple, float]:
    answer = httpx.get(f'{server.url}/metrics', headers=allowed())
    assert answer.status_code == 200
    assert answer.headers['content-type'].startswith('text/plain')
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_tell_of_gateway_and_executor(watched):
    assert httpx.get(f'{watched.url}/metrics').status_code == 401
    before = measured(watched)
    encode(watched, 2, headers=allowed())
    encode(watched, 3, headers=allowed())
    metadata = (('authorization', f'Bearer {TOKEN}'),)
    watched.client().post('/encode', texts(4), metadata=metadata)
    watched.post('/full', {'data': [{'text': 'a'}]}, headers=allowed())
    for name in ('/one', '/two', '/three'):
        watched.post(name, {'data': []}, headers=allowed())
        httpx.get(f'{watched.url}{name}', headers=allowed())
    after = measured(watched)

    def grown(name: str, **labels: str) -> float:
        key = (name, *sorted(labels.items()))
        return after.get(key, 0.0) - before.get(key, 0.0)

    http = {'endpoint': '/encode', 'protocol': 'http'}
    over_grpc = {'endpoint': '/encode', 'protocol': 'grpc'}
    assert grown('finetuner_requests_total', **http, status='200') == 2
    assert grown('finetuner_requests_total', **over_grpc, status='200') == 1
    assert grown('finetuner_documents_total', **http) == 5
    assert grown('finetuner_documents_total', **over_grpc) == 4
    assert grown('finetuner_request_seconds_count', **http) == 2
    full = {'endpoint': '/full', 'protocol': 'http', 'status': '429'}
    assert grown('finetuner_requests_total', **full) == 1
    other = {'endpoint': 'other', 'protocol': 'http', 'status': '404'}
    assert grown('finetuner_requests_total', **other) == 6
    assert after[('finetuner_requests_in_flight',)] == 0
    # of the Executor, another process
    assert grown('finetuner_batch_documents_count', model='first') == 3
    assert grown('finetuner_batch_documents_sum', model='first') == 9
    assert grown('finetuner_read_documents_total', result='failed') == 3
    assert grown('finetuner_models_asked_total', cache='hit') == 3
    assert grown('finetuner_refused_total', reason='queue') == 1
    assert after[('finetuner_model_bytes',)] == 1000
    assert after[('finetuner_queue_documents',)] == 0


def access_lines(server: Server) -> list[dict]:
    lines = [line for line in server.log.read_text().splitlines() if line.startswith('{"time"')]
    return [json.loads(line) for line in lines]


def test_each_request_has_an_id_and_a_line(watched):
    headers = {**allowed(), 'X-Request-Id': 'mine-1'}
    answer = encode(watched, 2, headers=headers)
    assert answer.headers['x-request-id'] == 'mine-1'
    assert answer.json()['data'][0]['tags']['seen']['__request_id'] == 'mine-1'
    made = encode(watched, headers={**allowed(), 'X-Request-Id': 'not sane\t!'})
    assert len(made.headers['x-request-id']) == 32
    denied = encode(watched, headers={'X-Request-Id': 'mine-2'})
    assert (denied.status_code, denied.headers['x-request-id']) == (401, 'mine-2')

    async def send(stub):
        metadata = (('authorization', f'Bearer {TOKEN}'), ('x-request-id', 'mine-3'))
        call = stub.process_single_data(data_request(count=3), metadata=metadata)
        answer = await call
        assert answer.docs[0].tags['seen']['__request_id'] == 'mine-3'
        assert '__identity' not in answer.parameters
        return {key: value for key, value in await call.trailing_metadata()}  # noqa: C416

    assert unary(watched, send)['x-request-id'] == 'mine-3'
    lines = {line['request_id']: line for line in access_lines(watched)}
    line = lines['mine-1']
    assert set(line) == {
        'time', 'level', 'request_id', 'protocol', 'endpoint', 'status', 'documents',
        'milliseconds', 'user',
    }  # fmt: skip
    assert (line['protocol'], line['endpoint'], line['status']) == ('http', '/encode', 200)
    assert (line['documents'], line['level'], line['user']) == (2, 'info', '')
    assert line['milliseconds'] > 0
    assert lines['mine-2']['status'] == 401
    assert (lines['mine-3']['protocol'], lines['mine-3']['documents']) == ('grpc', 3)
    assert TOKEN not in watched.log.read_text()
    assert not [line for line in access_lines(watched) if line['endpoint'] == '/health']


def test_clients_that_go_away_are_no_errors_and_hold_no_place(watched):
    body = json.dumps({'data': [{'text': 'a'}], 'parameters': {'seconds': 60}}).encode()
    head = (
        f'POST /encode HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n'
        f'Content-Type: application/json\r\nContent-Length: {len(body)}\r\n'
    )
    log_before = watched.log.read_text()
    for name, sent in (('half', body[:20]), ('whole', body)):
        with socket.create_connection(('127.0.0.1', watched.http_port), timeout=20) as out:
            out.sendall(f'{head}X-Request-Id: left-{name}\r\n\r\n'.encode() + sent)
            time.sleep(0.5)
    until = time.monotonic() + 20
    found: dict[str, int] = {}
    while len(found) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        lines = access_lines(watched)
        found = {
            line['request_id']: line['status']
            for line in lines
            if line['request_id'].startswith('left-')
        }
    assert found == {'left-half': 499, 'left-whole': 499}
    assert measured(watched)[('finetuner_requests_in_flight',)] == 0
    logged = watched.log.read_text()[len(log_before) :]
    assert 'Traceback' not in logged
    assert ' failed: ' not in logged


# ---- the end


def test_no_request_that_was_let_in_fails_when_the_server_ends(tmp_path):
    check_drain(tmp_path, lambda server: server.process.send_signal(signal.SIGTERM))


def test_nor_when_a_terminal_sends_ctrl_c_to_all(tmp_path):
    def press(server: Server) -> None:
        own = psutil.Process(server.process.pid)
        group = os.getpgid(own.pid)
        for process in (own, *own.children(recursive=True)):
            if os.getpgid(process.pid) == group:
                process.send_signal(signal.SIGINT)

    check_drain(tmp_path, press)


def check_drain(folder, end) -> None:
    results: dict[str, object] = {}
    with serve(flow({'drain_seconds': 5}), folder, FINETUNER_TOKEN='') as server:

        def over_http() -> None:
            results['http'] = encode(server, 2, seconds=9).status_code

        def over_grpc() -> None:
            docs = server.client().post('/encode', texts(2), parameters={'seconds': 9})
            results['grpc'] = len(docs)

        threads = [threading.Thread(target=over_http), threading.Thread(target=over_grpc)]
        family = psutil.Process(server.process.pid).children(recursive=True)
        for thread in threads:
            thread.start()
        time.sleep(2)
        end(server)
        time.sleep(0.5)
        answer = httpx.get(f'{server.url}/health/ready')
        assert answer.status_code == 503
        assert answer.json()['not_ready'] == {'gateway': 'the server is about to end'}
        assert health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert encode(server).status_code == 200  # drain_seconds are not over
        for thread in threads:
            thread.join(60)
        assert results == {'http': 200, 'grpc': 2}
        assert server.process.wait(60) == 0
        assert not [process for process in family if process.is_running()]
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)


def test_the_directory_of_metrics_goes_with_the_server(tmp_path):
    # a short path: a Unix socket is to be in it as well
    scratch = Path(tempfile.mkdtemp(prefix='metrics-'))
    with serve(flow(), tmp_path, FINETUNER_TOKEN='', TMPDIR=str(scratch)):
        (directory,) = scratch.glob('finetuner-metrics-*')
        assert directory.stat().st_mode & 0o077 == 0
        assert list(directory.glob('*.db'))
    assert not list(scratch.glob('finetuner-*'))
    shutil.rmtree(scratch)


@pytest.mark.parametrize(
    ('option', 'words'),
    [({'max_documens': 3}, "did you mean 'max_documents'"), ({'max_requests': 0}, 'max_requests')],
)
def test_a_wrong_option_stops_the_start(tmp_path, option, words):
    with pytest.raises(AssertionError) as caught, serve(flow(option), tmp_path):
        pass
    assert words in ' '.join(str(caught.value).split())
