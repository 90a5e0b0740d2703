"""What means harm and does none, on real processes; the last test prints the table of it.

`python -m pytest tests/integration/test_hostile.py -s` shows it: what was tried, how often, how much of
it was refused, and how much was harmless and taken. It is kept in `build/hostile.txt`.
"""

import asyncio
import base64
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from docarray import Document, DocumentArray
from jina.proto import jina_pb2
from jina.types.request.data import DataRequest

from finetuner import fetching
from finetuner.artifact import load_artifact, save_artifact, save_model
from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.data.sources import open_documents
from finetuner.data.stored.storing import load_documents
from finetuner.excepts import ArtifactError, DataError, FinetunerError, PictureError
from finetuner.images import load_picture
from finetuner.inference import build_engine, load_engine
from finetuner.models.vision import read_state_dict
from finetuner.server.page_uploads import store_upload
from finetuner.uris import PicturePolicy, read_uri
from tests.conftest import make_picture_docs
from tests.integration.hostile_clients import (
    DATA,
    Http2,
    call_without_end,
    connect,
    family,
    frame,
    grpc_head,
    memory,
    post_without_end,
)
from tests.integration.hostile_files import (
    PICTURE_ARTIFACTS,
    TEXT_ARTIFACTS,
    hostile_graphs,
    hostile_zips,
    rehash,
    with_graph,
)
from tests.integration.hostile_pictures import hostile
from tests.integration.hostile_uris import addresses, inline, redirects
from tests.integration.serving import REPOSITORY, serve
from tests.unit.tiny_artifacts import make_model, make_spec, pictures
from tests.unit.tiny_encoder import write_tiny_encoder

# what was tried, how often, refused, survived, and how the process is
TABLE: list[tuple[str, int, int, int, str]] = []
MEGABYTE = 1 << 20
# what Pillow says of damaged notes, and numpy of embeddings that are none
pytestmark = pytest.mark.filterwarnings(
    'ignore::UserWarning', 'ignore:invalid value:RuntimeWarning'
)
FLOW = (REPOSITORY / 'flows' / 'encode.yml').read_text()
# 100000 tries all that were asked for; fewer show the same growth
NUM_PARAMETERS = int(os.environ.get('HOSTILE_PARAMETERS', '5000'))


@pytest.fixture(scope='module')
def artifact(tmp_path_factory):
    directory = tmp_path_factory.mktemp('hostile') / 'pictures'
    save_artifact(directory, make_model(), make_spec(), onnx_inputs=pictures())
    return directory


@pytest.fixture(scope='module')
def text_artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hostile-texts')
    save_model(
        build_engine(str(write_tiny_encoder(folder / 'encoder')), device='cpu'), folder / 'a'
    )
    return folder / 'a'


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


GOOD = make_picture_docs(5, 2, size=24)
METHOD = '/jina.JinaSingleDataRequestRPC/process_single_data'


def unary(channel):
    """What sends a request as it is; Jina's own stub takes only what it can read."""
    proto = jina_pb2.DataRequestProto
    return channel.unary_unary(
        METHOD, request_serializer=proto.SerializeToString, response_deserializer=proto.FromString
    )


def among_healthy(batch):
    """Hostile pictures with healthy ones between them, and where these are."""
    docs, places = DocumentArray(), []
    for number, data in enumerate(batch):
        docs.append(Document(blob=data))
        if number % 5 == 4:
            places.append(len(docs))
            docs.append(Document(blob=GOOD[len(places) % len(GOOD)].blob))
    return docs, places


def batches(count, size=50):
    batch = []
    for data in hostile(7, count, bombs=False):
        batch.append(data)
        if len(batch) == size:
            yield batch
            batch = []


def healthy_vectors(encode):
    docs = DocumentArray([Document(blob=doc.blob) for doc in GOOD])
    return encode(docs).embeddings


def check_neighbours(docs, places, expected):
    for number, place in enumerate(places, 1):
        found = docs[place].embedding
        np.testing.assert_allclose(found, expected[number % len(GOOD)], atol=1e-5)


# pictures


def test_pictures_through_the_reader():
    mills = [
        subprocess.Popen(
            [sys.executable, '-m', 'tests.integration.hostile_pictures', str(seed), '5000'],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for seed in (0, 1)
    ]
    try:
        found = [json.loads(mill.communicate(timeout=600)[0] or '{}') for mill in mills]
    finally:
        for mill in mills:
            mill.kill()
    assert [mill.returncode for mill in mills] == [0, 0], 'a decoder took its process with it'
    assert [one['others'] for one in found] == [[], []]
    tried, refused, survived = (
        sum(one[key] for one in found) for key in ('tried', 'refused', 'survived')
    )
    peak = max(one['peak'] for one in found)
    assert (tried, refused + survived) == (10_000, 10_000)
    assert peak < 2 << 30
    TABLE.append(('pictures, read', tried, refused, survived, f'2 processes, peak {peak >> 20} MB'))


def test_pictures_through_an_engine(artifact):
    engine = load_engine(artifact, is_onnx=True, device='cpu')

    def encode(docs):
        assert all(isinstance(e, PictureError) for _, e in engine.encode_documents(docs))
        return docs

    expected = healthy_vectors(encode)
    counts = Counter()
    for batch in batches(1500):
        docs, places = among_healthy(batch)
        encode(docs)
        check_neighbours(docs, places, expected)
        counts.update(doc.embedding is None for doc in docs)
        counts[False] -= len(places)
    assert counts.total() == 1500
    TABLE.append(
        ('pictures, embedded', 1500, counts[True], counts[False], 'neighbours within 1e-5')
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
    TABLE.append(
        (
            'pictures, to a server',
            1500,
            counts[True],
            counts[False],
            'lives, neighbours within 1e-5',
        )
    )


# addresses


class _Site(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        path, _, query = self.path.partition('?')
        if path == '/open/to':
            self.send_response(302)
            self.send_header('Location', query)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            if path == '/open/huge':
                for _ in range(1000):
                    self.wfile.write(bytes(MEGABYTE))
            elif path == '/open/slow':
                for _ in range(1000):
                    self.wfile.write(b'x')
                    time.sleep(0.05)
            else:
                self.wfile.write(b'a picture')

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def site():
    server = ThreadingHTTPServer(('127.0.0.1', 0), _Site)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_addresses(monkeypatch):
    loopback = socket.getaddrinfo
    turns = []

    def getaddrinfo(host, port, *args, **kwargs):
        """Names that lead here: always, and every second time."""
        name = str(host)
        if not name.endswith('.example'):
            return loopback(host, port, *args, **kwargs)
        turns.append(name)
        address = '127.0.0.1'
        if name == 'rebinding.example' and len(turns) % 2:
            address = '127.0.0.99'
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (address, port))]

    connections = []
    real_connect = socket.socket.connect

    def counted(self, address):
        connections.append(address)
        return real_connect(self, address)

    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)
    monkeypatch.setattr(socket.socket, 'connect', counted)
    monkeypatch.setattr(fetching, 'FETCH_SECONDS', 0.5)
    refused = 0
    with site() as allowed, site() as secret:
        root = f'http://127.0.0.1:{allowed.server_port}'
        names = ('public.example', 'rebinding.example', 'secret.example')
        policy = PicturePolicy(
            uri_allow=(
                f'{root}/open',
                *(f'http://{name}:{secret.server_port}/' for name in names),
                *(f'http://{name}/' for name in names),
            ),
            max_bytes=100_000,
        )
        none = PicturePolicy(uri_allow=(), max_bytes=100_000)
        given = addresses(secret.server_port, allowed.server_port)
        given += [f'http://{name}:{secret.server_port}/{i}' for name in names for i in range(4)]
        tried = len(given)
        for uri in given:
            for one in (policy, none):
                with pytest.raises(PictureError):
                    read_uri(uri, one)
            refused += 1
        assert connections == [], 'nothing was asked'
        assert len(turns) >= 12, 'names were looked up, and what came of it was refused'
        sent_on = redirects(secret.server_port, allowed.server_port)
        sent_on += [f'{root}/open/huge', f'{root}/open/slow']
        taken = 0
        for uri in [*sent_on, *inline(policy.max_bytes)]:
            tried += 1
            try:
                read_uri(uri, policy)
                taken += 1
                assert uri.startswith('data:'), uri
            except PictureError:
                refused += 1
        assert read_uri(f'{root}/open/a.png', policy) == b'a picture'
        assert secret.asked == []
        assert all(path.startswith('/open') for path in allowed.asked)
        assert {address[:2] for address in connections} == {('127.0.0.1', allowed.server_port)}
    assert tried >= 200
    TABLE.append(('addresses', tried, refused, taken, 'no connection but to the one place allowed'))


# zips


def everything_in(folder):
    return set(folder.rglob('*'))


def test_zips(tmp_path, monkeypatch):
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(temporary))
    home = tmp_path / 'home'
    home.mkdir()
    client = LocalClient(
        Settings(home, f'sqlite:///{home / "finetuner.db"}', str(home / 'artifacts'))
    )
    outside = {path.name for place in ('/tmp', '/') for path in Path(place).iterdir()}
    counts = Counter()
    try:
        client.push_data(DocumentArray([Document(text='of before')]), 'before')
        kept = {path for path in everything_in(home) if path.suffix != '.db-wal'}
        for number, (name, data) in enumerate(hostile_zips().items()):
            path = tmp_path / 'given.zip'
            path.write_bytes(data)
            with pytest.raises(ArtifactError):
                load_artifact(path)
            try:
                store_upload(client, f'data {number}', 'given.zip', io.BytesIO(data), True)
                counts['survived'] += 1
                # one whose pictures are all inside may be data
                assert 'harmless' in name, name
            except DataError:
                counts['refused'] += 1
            assert list(temporary.iterdir()) == [], name
            assert [path.name for path in home.iterdir() if path.name.startswith('.push')] == []
            assert not list(tmp_path.rglob('*evil*')), name
        del kept
    finally:
        client.close()
    assert {path.name for place in ('/tmp', '/') for path in Path(place).iterdir()} - outside <= {
        name for name in os.listdir('/tmp') if 'evil' not in name
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ['given.zip', 'home', 'temporary']
    assert counts.total() == 50
    TABLE.append(
        (
            'zips, as artifact and as data',
            50,
            counts['refused'],
            counts['survived'],
            'nothing outside, nothing left',
        )
    )


# graphs


def test_graphs(artifact, tmp_path, monkeypatch):
    opened = []
    import onnxruntime

    monkeypatch.setattr(onnxruntime, 'InferenceSession', lambda *a, **k: opened.append(a))
    directory = shutil.copytree(artifact, tmp_path / 'copy')
    graphs = hostile_graphs()
    for name, graph in graphs.items():
        with_graph(directory, graph)
        with pytest.raises(ArtifactError, match=r'model.onnx is refused'):
            load_engine(directory, is_onnx=True, device='cpu')
        assert opened == [], name
    assert len(graphs) == 30
    TABLE.append(('ONNX graphs, hashes right', 30, 30, 0, 'ONNX Runtime opened none'))


# artifacts


def test_artifacts(artifact, text_artifact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = Counter()
    for original, cases, content in (
        (artifact, PICTURE_ARTIFACTS, {'blob': GOOD[0].blob}),
        (text_artifact, TEXT_ARTIFACTS, {'text': 'a red shoe'}),
    ):
        for name, (before, after) in cases.items():
            directory = tmp_path / 'given' / 'artifact'
            shutil.rmtree(directory.parent, ignore_errors=True)
            shutil.copytree(original, directory)
            for change in (before, rehash, after):
                if change is not None:
                    change(directory)
            try:
                engine = load_engine(directory, is_onnx=False, device='cpu')
                docs = DocumentArray([Document(**content)])
                assert engine.encode_documents(docs) == []
                counts['survived'] += 1
                assert any(word in name for word in ('harmless', 'known', 'own')), name
            except ArtifactError:
                counts['refused'] += 1
    assert not list(tmp_path.rglob('EXECUTED'))
    assert counts.total() >= 20
    TABLE.append(
        (
            'artifacts, booby-trapped',
            counts.total(),
            counts['refused'],
            counts['survived'],
            'nothing executed',
        )
    )


# pickles


class Payload:
    """What, unpickled, writes a file."""

    def __init__(self, trace: Path, way: int) -> None:
        self.trace = trace
        self.way = way

    def __reduce__(self):
        code = f'open({str(self.trace)!r}, "w").write("x")'
        return ((exec, (code,)), (eval, (code,)), (open, (str(self.trace), 'w')))[self.way]


def compressed(data, way):
    return gzip.compress(data) if way else data


def pickle_files(payload):
    """Files of many names with a pickle in them, in all the shapes that docarray writes."""
    plain = pickle.dumps(payload, protocol=payload.way + 2)
    stream = b'\x00' + (1).to_bytes(8, 'big') + len(plain).to_bytes(4, 'big') + plain
    stream_1 = b'\x01' + stream[1:]
    array = io.BytesIO()
    np.save(array, np.array([payload], dtype=object), allow_pickle=True)
    torch_like = io.BytesIO()
    import torch

    torch.save({'w': payload}, torch_like)
    for ending in ('.docs', '.csv', '.parquet', '.jsonl', '.db'):
        for content in (plain, stream, stream_1, gzip.compress(plain)):
            yield f'data{ending}', content
    yield 'data.docs', array.getvalue()
    for ending in ('.safetensors', '.pt', '.bin'):
        for content in (plain, torch_like.getvalue()):
            yield f'weights{ending}', content


def pickle_documents(payload):
    plain = pickle.dumps(payload)
    array = io.BytesIO()
    np.save(array, np.array([payload], dtype=object), allow_pickle=True)
    for content in (plain, gzip.compress(plain), array.getvalue()):
        yield Document(blob=content)
        yield Document(
            uri=f'data:application/octet-stream;base64,{base64.b64encode(content).decode()}'
        )


def raw_requests(payload):
    """Requests of gRPC that carry pickles where Jina or numpy might take them for one."""
    for protocol in ('pickle', 'pickle-array'):
        for way in (None, 'gzip', 'lz4'):
            request = jina_pb2.DataRequestProto()
            request.header.exec_endpoint = '/encode'
            docs = DocumentArray([Document(text='x', tags={'a': 1})])
            with contextlib.suppress(ImportError):
                docs.to_bytes(protocol=protocol, compress=way)
            request.data.docs_bytes = compressed(pickle.dumps(payload), way)
            yield request
    for dtype in ('O', 'object', '|O8', 'V8'):
        request = jina_pb2.DataRequestProto()
        request.header.exec_endpoint = '/encode'
        doc = request.data.docs.docs.add(id='a')
        doc.tensor.dense.buffer = pickle.dumps(payload)
        doc.tensor.dense.dtype = dtype
        doc.tensor.dense.shape.extend([1])
        doc.tensor.cls_name = 'numpy'
        yield request


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
    TABLE.append(
        (
            'pickles',
            counts['tried'],
            counts['refused'],
            counts['survived'],
            'none executed, server lives',
        )
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
    TABLE.append(
        ('messages of 2 GB, HTTP and gRPC', 3, 3, 0, f'memory grew by {gauge.peak >> 20} MB')
    )


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
    TABLE.append(
        ('different parameters', counts.total(), counts['refused'], counts['survived'],
         f'memory grew by {max(grown, 0) >> 20} MB')
    )  # fmt: skip


# slow clients

NUM_SLOW = 300
SLOW_SECONDS = 45


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


def test_slow_clients_hold_up_nobody(living):
    clients = slow_clients(living.http_port, NUM_SLOW)
    for _ in range(5):
        clients = drip(clients)
        healthy_answers(living, 2)
    for one in clients:
        one.close()
    TABLE.append(
        ('connections that send byte by byte', NUM_SLOW, 0, NUM_SLOW, 'others are answered')
    )


def test_slow_clients_are_ended(living):
    clients = slow_clients(living.http_port, NUM_SLOW)
    until = time.monotonic() + SLOW_SECONDS
    try:
        while clients and time.monotonic() < until:
            clients = drip(clients)
            time.sleep(0.5)
        assert not clients, f'{len(clients)} are still there after {SLOW_SECONDS} s'
    finally:
        for one in clients:
            one.close()
    TABLE.append(
        ('connections that send byte by byte', NUM_SLOW, NUM_SLOW, 0, 'ended, others are answered')
    )


# broken messages


def deep_document(levels):
    """Chunks in chunks, built from the inside: no library nests them so deep."""
    inner = b'\x0a\x01a'
    for _ in range(levels):
        size, length = len(inner), b''
        while True:
            size, low = size >> 7, size & 0x7F
            length += bytes([low | (0x80 if size else 0)])
            if not size:
                break
        inner = b'\x62' + length + inner
    return inner


def broken_messages():
    rng = random.Random(3)
    request = jina_pb2.DataRequestProto()
    request.header.exec_endpoint = '/encode'
    request.data.docs.docs.add(id='a', blob=GOOD[0].blob)
    whole = request.SerializeToString()
    for _ in range(60):
        yield rng.randbytes(rng.randrange(1, 500))
    for _ in range(60):
        yield whole[: rng.randrange(len(whole))]
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(3):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        yield bytes(changed)
    for levels in (50, 90, 150, 1_000, 10_000):
        nested = jina_pb2.DataRequestProto()
        nested.header.exec_endpoint = '/encode'
        document = deep_document(levels)
        data = jina_pb2.DataRequestProto.DataContentProto.DESCRIPTOR.fields_by_name['docs'].number
        array = _field(1, document)
        body = _field(data, array)
        number = jina_pb2.DataRequestProto.DESCRIPTOR.fields_by_name['data'].number
        yield nested.SerializeToString() + _field(number, body)
    tags = jina_pb2.DataRequestProto()
    tags.CopyFrom(request)
    tags.data.docs.docs[0].tags.update({f'tag {i}': float('nan') for i in range(50_000)})
    yield tags.SerializeToString()
    many = jina_pb2.DataRequestProto()
    many.CopyFrom(request)
    many.parameters.update({f'parameter {i}': i for i in range(50_000)})
    yield many.SerializeToString()
    huge = jina_pb2.DataRequestProto()
    huge.CopyFrom(request)
    tensor = huge.data.docs.docs[0].tensor
    tensor.dense.shape.extend([1 << 20, 1 << 20])
    tensor.dense.dtype, tensor.cls_name = '<f8', 'numpy'
    yield huge.SerializeToString()


def _field(number, payload):
    size, length = len(payload), b''
    while True:
        size, low = size >> 7, size & 0x7F
        length += bytes([low | (0x80 if size else 0)])
        if not size:
            break
    return bytes([number << 3 | 2]) + length + payload


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
    TABLE.append(
        ('protobuf that is broken', counts['tried'], counts['refused'], counts['survived'], 'lives')
    )


def broken_json():
    good = base64.b64encode(GOOD[0].blob).decode()
    doc = f'{{"blob": "{good}"}}'
    deep = '[' * 100_000
    yield from (
        '', '{', '[]', '3', 'null', '"text"', deep, '{"data": ' + deep, '{"data":' * 50_000, '{"data": 3}',
        '{"data": [3]}', '{"data": [[]]}', '{"data": [null]}', '{"data": {"docs": 3}}', '{"data": "x"}',
        '{"parameters": 3}', '{"parameters": []}', '{"exec_endpoint": 3}', '{"unknown": 1}',
        f'{{"data": [{doc}], "data": [{doc}]}}', f'{{"data": [{doc}], "parameters": {{"batch_size": 1e400}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": NaN}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": Infinity}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": {"9" * 4000}}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": {"9" * 100_000}}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": -0.5}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": {{"a": 1}}}}}}',
        '{"data": [{"tags": {"a": NaN}, "text": "x"}]}', '{"data": [{"tags": 3}]}',
        '{"data": [{"tags": ' + '{"a":' * 500 + '1' + '}' * 500 + '}]}',
        '{"data": [{"chunks": ' + '[{"chunks": ' * 300 + '[]' + '}]' * 300 + '}]}',
        '{"data": [{"tensor": ' + '[' * 200 + '1' + ']' * 200 + '}]}',
        '{"data": [{"tensor": [1, [2]]}]}', '{"data": [{"tensor": ["x"]}]}',
        '{"data": [{"tensor": [NaN, Infinity, 1e999]}]}', '{"data": [{"tensor": [' + '9' * 400 + ']}]}',
        '{"data": [{"blob": "=%"}]}', '{"data": [{"blob": 3}]}', '{"data": [{"blob": "_-"}]}',
        '{"data": [{"text": "\\ud800"}]}', '{"data": [{"id": "\\u0000"}]}', '{"data": [{"weight": 1e999}]}',
        '{"data": [{"offset": 99999999999999999999999}]}', '{"data": [{"__class__": "x"}]}',
        '{"data": [{"embedding": [[[]]]}]}', '{"data": [{"mime_type": "' + 'x' * 100_000 + '"}]}',
    )  # fmt: skip
    yield from (
        b'\xff\xfe{}',
        b'{"data": "\xff"}',
        b'\xef\xbb\xbf{}',
        b'\0',
        '{"data": []}'.encode('utf-32'),
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
    TABLE.append(
        ('JSON that is broken', counts['tried'], counts['refused'], counts['survived'], 'lives')
    )


def test_the_table(capsys):
    width = max(len(row[0]) for row in TABLE)
    rows = [('what', 'tried', 'refused', 'survived', 'and'), *TABLE]
    table = '\n'.join(
        f'{what:<{width}}  {tried:>6}  {refused:>7}  {survived:>8}  {process}'
        for what, tried, refused, survived, process in rows
    )
    with capsys.disabled():
        print(f'\n{table}')
    kept = REPOSITORY / 'build' / 'hostile.txt'
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(f'{table}\n', encoding='utf-8')
    assert all(tried == refused + survived for _, tried, refused, survived, _ in TABLE)
