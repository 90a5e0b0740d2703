"""What means harm and does none, sent to a real server; the last test prints the table of it.

`python -m pytest tests/integration/test_hostile_server.py -s` shows it; see `test_hostile.py`. It is
kept in `build/hostile-server.txt`.
"""

import asyncio
import base64
import os
import pickle
import time
from collections import Counter

import grpc
import httpx
import pytest
from docarray import DocumentArray
from jina.proto import jina_pb2
from jina.types.request.data import DataRequest

from finetuner.data.sources import open_documents
from finetuner.data.stored.storing import load_documents
from finetuner.excepts import DataError, FinetunerError
from finetuner.images import load_picture
from finetuner.models.vision import read_state_dict
from tests.integration.hostile_clients import (
    DATA,
    HEADERS,
    Http2,
    call_without_end,
    connect,
    family,
    frame,
    grpc_head,
    memory,
    post_without_end,
)
from tests.integration.hostile_messages import (
    Payload,
    broken_json,
    broken_messages,
    pickle_documents,
    pickle_files,
    raw_requests,
)
from tests.integration.hostile_table import (
    GOOD,
    MEGABYTE,
    NO_WARNINGS,
    Table,
    among_healthy,
    batches,
    check_neighbours,
    healthy_vectors,
    write_artifact,
)
from tests.integration.serving import REPOSITORY, serve

TABLE = Table()
pytestmark = NO_WARNINGS
FLOW = (REPOSITORY / 'flows' / 'encode.yml').read_text()
# 100000 tries all that were asked for; fewer show the same growth
NUM_PARAMETERS = int(os.environ.get('HOSTILE_PARAMETERS', '5000'))
METHOD = '/jina.JinaSingleDataRequestRPC/process_single_data'


@pytest.fixture(scope='module')
def artifact(tmp_path_factory):
    return write_artifact(tmp_path_factory.mktemp('hostile'))


@pytest.fixture(scope='module')
def server(artifact, tmp_path_factory):
    flow = FLOW.replace('artifact: efficientnet-lite0', f'artifact: {artifact}')
    assert str(artifact) in flow
    with serve(flow, tmp_path_factory.mktemp('hostile-server'), FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture
def living(server):
    """The server's processes; the same are there afterwards, and answer."""
    before = {one.pid for one in family(server.process.pid)}
    yield server
    assert {one.pid for one in family(server.process.pid)} >= before, 'a process of the server died'
    answer = server.post('/encode', {'data': [{'blob': base64.b64encode(GOOD[0].blob).decode()}]})
    assert answer.status_code == 200, answer.text


def unary(channel):
    """What sends a request as it is; Jina's own stub takes only what it can read."""
    proto = jina_pb2.DataRequestProto
    return channel.unary_unary(
        METHOD, request_serializer=proto.SerializeToString, response_deserializer=proto.FromString
    )


def test_pictures_through_a_server(living):
    client = living.client()

    def encode(docs):
        return client.post('/encode', docs, request_size=-1)

    expected = healthy_vectors(encode)
    counts = Counter()
    for batch in batches(1500):
        docs, places = among_healthy(batch)
        answer = encode(docs)
        assert answer[:, 'id'] == docs[:, 'id']
        check_neighbours(answer, places, expected)
        for doc in answer:
            assert (doc.embedding is None) == ('finetuner_error' in doc.tags)
        counts.update(doc.embedding is None for doc in answer)
        counts[False] -= len(places)
    TABLE.add(
        'pictures, to a server',
        1500,
        counts[True],
        counts[False],
        'lives, neighbours within 1e-5',
    )


# pickles


def test_pickles(living, tmp_path):
    traces = tmp_path / 'traces'
    traces.mkdir()
    counts = Counter()

    def attempt(action):
        counts['tried'] += 1
        try:
            action()
            counts['survived'] += 1
        except (FinetunerError, grpc.RpcError):
            counts['refused'] += 1

    channel = grpc.insecure_channel(f'127.0.0.1:{living.grpc_port}')
    call = unary(channel)

    def send(request):
        answer = call(request, timeout=60)
        counts['answered'] += 1
        if answer.header.status.code == jina_pb2.StatusProto.ERROR:
            raise DataError(answer.header.status.description)
        if any('finetuner_error' in doc.tags.fields for doc in answer.data.docs.docs):
            raise DataError('marked')

    def read(path):
        if path.name.startswith('weights'):
            return read_state_dict(str(path), 'x')
        if path.suffix == '.docs':
            load_documents(path)
        return [doc.tags for doc in open_documents(path)]

    for way in range(3):
        payload = Payload(traces / str(way), way)
        for name, content in pickle_files(payload):
            path = tmp_path / name
            path.write_bytes(content)
            attempt(lambda path=path: read(path))
        for doc in pickle_documents(payload):
            attempt(lambda doc=doc: load_picture(doc.blob or doc.uri, 16))
            request = DataRequest()
            request.header.exec_endpoint = '/encode'
            request.data.docs = DocumentArray([doc])
            attempt(lambda request=request: send(request.proto))
        for raw in raw_requests(payload):
            attempt(lambda raw=raw: send(raw))
    channel.close()
    assert list(traces.iterdir()) == [], 'a pickle was executed'
    assert counts['tried'] >= 100
    assert counts['answered'] == 3 * (6 + 6 + 4), 'all reached the server'
    # and they would have been: a trap that never snaps proves nothing
    pickle.loads(pickle.dumps(Payload(traces / 'snaps', 2))).close()
    assert (traces / 'snaps').exists()
    TABLE.add(
        'pickles',
        counts['tried'],
        counts['refused'],
        counts['survived'],
        'none executed, server lives',
    )


# messages without end


class Gauge:
    """How much more memory a server takes than at first, looked at now and then."""

    def __init__(self, server, most):
        self.process = server.process.pid
        self.most = most
        self.first = memory(self.process)
        self.peak = 0
        self._next = 0.0

    def look(self):
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.05
            self.peak = max(self.peak, memory(self.process) - self.first)
        return self.peak <= self.most


def test_messages_of_2_gigabytes(living):
    # what a limit of 128 MB lets in of each, and what reading that takes
    gauge = Gauge(living, 600 * MEGABYTE)
    for chunked in (False, True):
        answer = post_without_end(living.http_port, 2 << 30, gauge.look, chunked)
        assert gauge.look(), f'memory grew by {gauge.peak >> 20} MB'
        assert not answer or b' 413 ' in answer.split(b'\r\n')[0]
    sent, ended = call_without_end(living.grpc_port, 2 << 30, gauge.look)
    assert gauge.look(), f'memory grew by {gauge.peak >> 20} MB'
    assert ended
    assert sent < 1 << 30
    TABLE.add('messages of 2 GB, HTTP and gRPC', 3, 3, 0, f'memory grew by {gauge.peak >> 20} MB')


# parameters


def parameters_of(number):
    kind = number % 5
    if kind == 0:
        return {'artifact': f'{number:024x}'}
    if kind == 1:
        return {'artifact': f'no-model-{number}'}
    if kind == 2:
        return {'batch_size': 1 + number}
    if kind == 3:
        return {f'unknown_{number}': number}
    return {'on_error': f'other-{number}'}


async def send_parameters(port, numbers, at_once=64):
    """Post as many requests, each with parameters that no other has."""
    counts = Counter()
    async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
        call = unary(channel)
        waiting = iter(numbers)

        async def work():
            for number in waiting:
                request = jina_pb2.DataRequestProto()
                request.header.exec_endpoint = '/encode'
                request.header.request_id = str(number)
                request.data.docs.docs.add(id='a', blob=GOOD[0].blob)
                request.parameters.update(parameters_of(number))
                answer = await call(request, timeout=120)
                is_error = answer.header.status.code == jina_pb2.StatusProto.ERROR
                counts['refused' if is_error else 'survived'] += 1

        await asyncio.gather(*(work() for _ in range(at_once)))
    return counts


def test_parameters_without_number(living):
    # what is made once, such as threads and caches of a limited size, is made by then
    asyncio.run(send_parameters(living.grpc_port, range(500)))
    before = memory(living.process.pid)
    numbers = range(500, 500 + NUM_PARAMETERS)
    counts = asyncio.run(send_parameters(living.grpc_port, numbers))
    grown = memory(living.process.pid) - before
    assert counts.total() == NUM_PARAMETERS
    assert grown < 64 * MEGABYTE, f'memory grew by {grown >> 20} MB'
    TABLE.add('different parameters', counts.total(), counts['refused'], counts['survived'],
         f'memory grew by {max(grown, 0) >> 20} MB')  # fmt: skip


# slow clients

NUM_SLOW = 300
NUM_STILL = 50
SLOW_SECONDS = 60


def slow_clients(port, number):
    """Connections that have sent a part of a request, each another."""
    request = (
        f'POST /encode HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n'
        'Content-Length: 1000\r\n\r\n{"data": [{"blob": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
    ).encode()
    clients = []
    for i in range(number):
        one = connect(port)
        one.sendall(request[: 1 + i * (len(request) - 1) // number])
        clients.append(one)
    return clients


def still_messages(port, number):
    """Calls over gRPC that have sent a part of their message, each another."""
    clients = []
    for i in range(number):
        one = Http2(port)
        there = bytes(1 + i * 1000)
        one.socket.sendall(grpc_head(1))
        for start in range(0, len(there), 16_000):
            piece = there[start : start + 16_000]
            head = b'' if start else b'\0' + (100 * MEGABYTE).to_bytes(4, 'big')
            one.socket.sendall(frame(DATA, 0, 1, head + piece))
        clients.append(one)
    return clients


def still_open(messages):
    """Those whose calls have not ended, and how the others did."""
    left, answers = [], []
    for one in messages:
        found = b''.join(payload for kind, _, payload in one.frames(0) if kind == HEADERS)
        if not one.ended:
            left.append(one)
            continue
        answers.append(found)
        one.socket.close()
    return left, answers


def drip(clients):
    """One more byte of each; those that are still open."""
    left = []
    for one in clients:
        try:
            one.setblocking(False)
            try:
                if not one.recv(4096):
                    one.close()
                    continue
            except BlockingIOError:
                pass
            one.send(b'a')
            left.append(one)
        except OSError:
            one.close()
    return left


def healthy_answers(server, number):
    body = {'data': [{'blob': base64.b64encode(GOOD[0].blob).decode()}]}
    for _ in range(number):
        assert server.post('/encode', body).status_code == 200
    assert len(server.client().post('/encode', GOOD)) == len(GOOD)


def test_slow_clients_hold_up_nobody_and_are_ended(living):
    clients = slow_clients(living.http_port, NUM_SLOW)
    messages, answers = still_messages(living.grpc_port, NUM_STILL), []
    until = time.monotonic() + SLOW_SECONDS
    try:
        for _ in range(5):
            clients = drip(clients)
            healthy_answers(living, 2)
        while (clients or messages) and time.monotonic() < until:
            clients = drip(clients)
            messages, ended = still_open(messages)
            answers += ended
            time.sleep(0.5)
        assert not clients, f'{len(clients)} are still there after {SLOW_SECONDS} s'
        assert not messages, f'{len(messages)} are still there after {SLOW_SECONDS} s'
        assert all(b'too slowly' in answer.replace(b'%20', b' ') for answer in answers)
    finally:
        for one in clients:
            one.close()
        for one in messages:
            one.socket.close()
    TABLE.add(
        'connections that send byte by byte', NUM_SLOW, NUM_SLOW, 0, 'ended, others are answered'
    )
    TABLE.add('messages over gRPC that stand still', NUM_STILL, NUM_STILL, 0, 'ended as well')


# broken messages


def test_broken_protobuf(living):
    counts = Counter()
    # the bytes as they are, for what no library would serialise
    channel = grpc.insecure_channel(f'127.0.0.1:{living.grpc_port}')
    call = channel.unary_unary(METHOD)
    for message in broken_messages():
        counts['tried'] += 1
        try:
            answer = jina_pb2.DataRequestProto.FromString(call(message, timeout=60))
            is_error = answer.header.status.code == jina_pb2.StatusProto.ERROR
            marked = any('finetuner_error' in doc.tags.fields for doc in answer.data.docs.docs)
            counts['refused' if is_error or marked else 'survived'] += 1
            description = answer.header.status.description
            assert 'Traceback' not in description
            assert str(REPOSITORY) not in description
        except grpc.RpcError as error:
            silent = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            counts['silent' if silent else 'refused'] += 1
    channel.close()
    assert not counts['silent'], 'everything is answered'
    # compressed, it says, and is not; of no known compression; longer than what comes
    for flag, length, encoding in (
        (1, 5, 'gzip'),
        (1, 5, 'identity'),
        (7, 5, 'x'),
        (0, 1 << 31, 'x'),
    ):
        counts['tried'] += 1
        with Http2(living.grpc_port) as client:
            client.socket.sendall(grpc_head(1, ('grpc-encoding', encoding)))
            payload = bytes([flag]) + length.to_bytes(4, 'big') + b'hello'
            client.socket.sendall(frame(DATA, 1, 1, payload))
            assert client.answer(), 'it is answered'
        counts['refused'] += 1
    TABLE.add(
        'protobuf that is broken', counts['tried'], counts['refused'], counts['survived'], 'lives'
    )


def test_broken_json(living):
    counts = Counter()
    with httpx.Client(timeout=60) as client:
        for body in broken_json():
            raw = body if isinstance(body, bytes) else body.encode()
            answer = client.post(
                f'{living.url}/encode', content=raw, headers={'Content-Type': 'application/json'}
            )
            counts['tried'] += 1
            told = f'{raw[:100]!r}: {answer.status_code} {answer.text[:300]}'
            assert answer.status_code in (200, 400, 413, 422), told
            assert 'Traceback' not in answer.text, told
            refused = answer.status_code != 200 or 'finetuner_error' in answer.text
            counts['refused' if refused else 'survived'] += 1
    TABLE.add(
        'JSON that is broken', counts['tried'], counts['refused'], counts['survived'], 'lives'
    )


def test_the_table(capsys):
    TABLE.show('hostile-server', capsys)
