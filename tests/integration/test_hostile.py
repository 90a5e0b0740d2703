"""What means harm and does none, read in this process; the last test prints the table of it.

`python -m pytest tests/integration/test_hostile.py -s` shows it: what was tried, how often, how much of
it was refused, and how much was harmless and taken. It is kept in `build/hostile.txt`. What is sent to
a server is in `test_hostile_server.py`.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from docarray import Document, DocumentArray

from finetuner import fetching
from finetuner.artifact import load_artifact, save_model
from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.excepts import ArtifactError, DataError, PictureError
from finetuner.inference import build_engine, load_engine
from finetuner.server.page_uploads import store_upload
from finetuner.uris import PicturePolicy, read_uri
from tests.integration.hostile_files import (
    PICTURE_ARTIFACTS,
    TEXT_ARTIFACTS,
    hostile_graphs,
    hostile_zips,
    rehash,
    with_graph,
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
from tests.integration.hostile_uris import addresses, inline, redirects
from tests.integration.serving import REPOSITORY
from tests.unit.tiny_encoder import write_tiny_encoder

TABLE = Table()
pytestmark = NO_WARNINGS


@pytest.fixture(scope='module')
def artifact(tmp_path_factory):
    return write_artifact(tmp_path_factory.mktemp('hostile'))


@pytest.fixture(scope='module')
def text_artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hostile-texts')
    save_model(
        build_engine(str(write_tiny_encoder(folder / 'encoder')), device='cpu'), folder / 'a'
    )
    return folder / 'a'


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
    TABLE.add('pictures, read', tried, refused, survived, f'2 processes, peak {peak >> 20} MB')


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
    TABLE.add('pictures, embedded', 1500, counts[True], counts[False], 'neighbours within 1e-5')


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
    TABLE.add('addresses', tried, refused, taken, 'no connection but to the one place allowed')


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
    TABLE.add(
        'zips, as artifact and as data',
        50,
        counts['refused'],
        counts['survived'],
        'nothing outside, nothing left',
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
    assert len(graphs) == 35
    TABLE.add('ONNX graphs, hashes right', 35, 35, 0, 'ONNX Runtime opened none')


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
    TABLE.add(
        'artifacts, booby-trapped',
        counts.total(),
        counts['refused'],
        counts['survived'],
        'nothing executed',
    )


def test_the_table(capsys):
    TABLE.show('hostile', capsys)
