"""Releases of collections on a server: the same answers as here, whoever asks and whatever breaks."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

import finetuner
from finetuner.collections import TrainingSet, create_from_archive, search
from finetuner.collections.geometry import Frame
from finetuner.collections.tiles import PlacedImage
from finetuner.excepts import (
    ArtifactError,
    ConfigError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    ServerError,
)
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from finetuner.transport import Transport
from tests.integration.serving import REPOSITORY, serve

FLOW = (REPOSITORY / 'flows' / 'train.yml').read_text()
SIZE = (16, 20)
UTM = 'EPSG:32613'
USERS = {'alice': ('alice', 'write'), 'bob': ('bob', 'write'), 'reader': ('alice', 'read')}


@pytest.fixture(scope='module')
def tokens(tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp('server') / 'home'
    store = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}'))
    made = {name: store.create(*given)[0] for name, given in USERS.items()}
    return {**made, 'home': str(home)}


@pytest.fixture(scope='module')
def server(tokens):
    with serve(FLOW, Path(tokens['home']).parent, FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture
def login(server, tokens, tmp_path, monkeypatch):
    """Logs in as somebody, each on a machine of its own as it were."""

    def as_user(name: str, host: str = server.url) -> None:
        monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / name))
        finetuner.login(host=host, token=tokens[name])

    as_user('alice')
    yield as_user
    for name in ('alice', 'bob'):
        as_user(name)
        for each in search():
            if each._saved.owner == name:
                each.remove()


@pytest.fixture
def ask(server, tokens):
    def request(method: str, path: str, user: str = 'alice', **options) -> httpx.Response:
        headers = {'authorization': f'Bearer {tokens[user]}', **options.pop('headers', {})}
        address = f'{server.url}/api/v1{path}'
        return httpx.request(method, address, headers=headers, timeout=60, **options)

    return request


def image(seed=0, bands=3):
    return np.random.default_rng(seed).integers(0, 200, (bands, *SIZE), np.uint8)


def saved(name='set', count=6, **options):
    made = TrainingSet(name, tile_size=SIZE, classes=['odd'], **options)
    made.feed((image(i), [i % 2]) for i in range(count))
    made.save()
    return made


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(made):
    keys = ('label', 'transform', 'crs')
    return [(each.group, each.read().tobytes(), *(each.data[key] for key in keys)) for each in made]


# ---- the same class


def test_a_release_of_a_server_comes_back_into_a_collection_of_it(login, tmp_path):
    made = TrainingSet('areas', 'segmentation', SIZE, ['roof', 'tree'], partition=[50, 25, 25])
    for seed in range(9):
        frame = Frame(*SIZE, (2.0, 0.0, 500_000.0 + 40 * seed, 0.0, -2.0, 4_000_000.0), UTM)
        mask = np.random.default_rng(seed).integers(0, 3, SIZE)
        made.feed([(PlacedImage(image(seed), frame, ('GE01',)), mask)], ('train', 'ü/..')[seed % 2])
    made.save()
    about = made.release('1.0')
    assert made.releases() == [about]
    assert (about['version'], about['name'], about['collection']) == ('1.0', 'areas', made.id)
    assert 'ticket' not in about
    path = made.download_release('1.0', tmp_path)
    assert path == tmp_path / 'areas-1.0.tar'
    assert (path.stat().st_size, sha256(path)) == (about['size'], about['sha256'])
    again = create_from_archive(path, 'again')
    again.save()
    assert again.document['data']['userId'] == 'alice', 'it is on the server'
    assert contents(again) == contents(made)
    assert (again.count, again.bbox) == (made.count, made.bbox)
    assert again.release('1.0')['content_sha256'] != about['content_sha256'], 'other numbers'


def test_the_answers_are_those_of_a_collection_kept_here(login, tmp_path, monkeypatch):
    def answers(folder):
        folder.mkdir()
        made = saved()
        told = [made.release('1'), made.release('0.9')]
        for ask in (
            lambda: made.release('1'),
            lambda: made.release('../x'),
            lambda: made.release('a' * 300),
            lambda: made.release('ü'),
            lambda: made.release(''),
            lambda: made.release(7),
            lambda: made.download_release('2', folder),
            lambda: made.download_release('../1', folder),
            lambda: made.download_release('1', folder / 'no' / 'where.tar'),
            lambda: TrainingSet('new', tile_size=SIZE).release('1'),
        ):
            with pytest.raises((ConfigError, ConflictError, NotFoundError)) as error:
                ask()
            told.append((type(error.value), str(error.value).replace(str(folder), '')))
        told += made.releases()
        for name in ('1', '0.9'):
            path = made.download_release(name, folder)
            assert sha256(path) == next(x['sha256'] for x in told if x['version'] == name)
        (folder / 'known.tar').write_text('old')
        path = made.download_release('1', str(folder / 'known.tar'))
        assert sha256(path) == told[0]['sha256'], 'what was there is replaced'
        assert sorted(x.name for x in folder.iterdir()) == [
            'known.tar',
            'set-0.9.tar',
            'set-1.tar',
        ]
        made.remove()
        with pytest.raises((ConfigError, NotFoundError)):
            made.release('3')
        own = ('created_at', 'sha256', 'content_sha256', 'collection')
        return [
            {key: value for key, value in each.items() if key not in own}
            if isinstance(each, dict)
            else each
            for each in told
        ]

    there = answers(tmp_path / 'there')
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'here'))
    assert answers(tmp_path / 'here-too') == there


def test_others_take_what_is_published_and_release_nothing(login, tmp_path):
    made = saved()
    about = made.release('1')
    login('bob')
    for attempt in (TrainingSet.from_id, lambda number: TrainingSet.from_name('set')):
        with pytest.raises(NotFoundError):
            attempt(made.id)
    login('alice')
    made = TrainingSet.from_id(made.id)
    made.publish()
    login('bob')
    found = TrainingSet.from_id(made.id)
    assert found.releases() == [about]
    assert sha256(found.download_release('1', tmp_path)) == about['sha256']
    with pytest.raises(ForbiddenError, match='its owner releases it'):
        found.release('2')
    own = create_from_archive(tmp_path / 'set-1.tar')
    own.save()
    assert (own.document['data']['userId'], own.name) == ('bob', 'set')
    login('reader')
    found = TrainingSet.from_id(made.id)
    assert sha256(found.download_release('1', tmp_path)) == about['sha256']
    with pytest.raises(ForbiddenError, match='scope'):
        found.release('2')
    login('alice')
    assert TrainingSet.from_id(made.id).releases() == [about]
    TrainingSet.from_id(made.id).unpublish()
    login('bob')
    for attempt in (found.releases, lambda: found.download_release('1', tmp_path)):
        found._place = TrainingSet.from_id(own.id)._place
        with pytest.raises(NotFoundError):
            attempt()


# ---- plain HTTP


def test_the_routes_of_releases(login, ask):
    made = saved()
    path = f'/data/{made.id}/releases'
    assert ask('GET', path).json() == []
    answer = ask('POST', path, json={'version': '1.0'})
    assert answer.status_code == 201, answer.text
    about = answer.json()
    assert ask('GET', path, 'reader').json() == [about]
    assert ask('GET', f'{path}/1.0', 'reader').json() == about
    whole = ask('GET', f'{path}/1.0/archive', 'reader')
    assert hashlib.sha256(whole.content).hexdigest() == about['sha256']
    headers = whole.headers
    assert headers['etag'] == f'"{about["sha256"]}"'
    assert headers['content-length'] == str(about['size'])
    assert headers['content-type'] == 'application/x-tar'
    assert headers['content-disposition'] == 'attachment; filename="set-1.0.tar"'
    for asked, expected in (
        ('bytes=1000-1099', slice(1000, 1100)),
        ('bytes=9000-', slice(9000, None)),
    ):
        part = ask('GET', f'{path}/1.0/archive', headers={'range': asked})
        assert part.status_code == 206
        assert part.content == whole.content[expected]
    changed = {'range': 'bytes=9000-', 'if-range': '"another"'}
    assert ask('GET', f'{path}/1.0/archive', headers=changed).content == whole.content
    beyond = {'range': f'bytes={about["size"]}-'}
    assert ask('GET', f'{path}/1.0/archive', headers=beyond).status_code == 416
    assert ask('DELETE', path).status_code == 405
    assert ask('DELETE', f'{path}/1.0').status_code == 405
    assert ask('PUT', f'{path}/1.0', json={}).status_code == 405


def test_who_asks_again_with_a_ticket_gets_the_same_release(login, ask):
    made = saved()
    path = f'/data/{made.id}/releases'
    wish = {'version': '1', 'ticket': 'mine'}
    about = ask('POST', path, json=wish).json()
    again = ask('POST', path, json=wish)
    assert (again.status_code, again.json()) == (201, about)
    for other in ({'version': '1'}, {'version': '1', 'ticket': 'yours'}):
        assert ask('POST', path, json=other).status_code == 409
    assert ask('POST', path, json={**wish, 'version': '2'}).json()['version'] == '2'
    twin = saved('twin')
    assert ask('POST', f'/data/{twin.id}/releases', json=wish).json()['collection'] == twin.id


@pytest.mark.parametrize(
    ('method', 'path', 'body', 'status', 'words'),
    [
        ('POST', '/data/{id}/releases', {}, 422, 'version'),
        ('POST', '/data/{id}/releases', {'version': 1}, 422, 'version'),
        ('POST', '/data/{id}/releases', {'version': '1', 'x': 1}, 422, 'x'),
        ('POST', '/data/{id}/releases', {'version': '1', 'ticket': ''}, 422, 'ticket'),
        ('POST', '/data/{id}/releases', {'version': '1', 'ticket': 't' * 65}, 422, 'ticket'),
        ('POST', '/data/{id}/releases', {'version': '../x'}, 422, 'letters, digits and'),
        ('POST', '/data/{id}/releases', {'version': 'v' * 300}, 422, 'at most 100'),
        ('POST', '/data/{id}/releases', {'version': 'ü\u202e'}, 422, 'letters, digits and'),
        ('POST', '/data/{id}/releases', {'version': '1\n'}, 422, 'letters, digits and'),
        ('POST', '/data/{id}/releases', {'version': '.1'}, 422, 'no dot first'),
        ('POST', '/data/{id}/releases', {'version': '1*'}, 422, 'letters, digits and'),
        ('POST', '/data/999999/releases', {'version': '1'}, 404, 'no collection 999999'),
        ('POST', '/data/99999999999999999999/releases', {'version': '1'}, 404, 'no collection'),
        ('GET', '/data/999999/releases', None, 404, 'no collection 999999'),
        ('GET', '/data/999999/releases/1', None, 404, 'no collection 999999'),
        ('GET', '/data/99999999999999999999/releases/1/archive', None, 404, 'no collection'),
        ('GET', '/data/x/releases', None, 404, ''),
        ('GET', '/data/{id}/releases/2', None, 404, "no release '2'; it has: 1"),
        ('GET', '/data/{id}/releases/2/archive', None, 404, "no release '2'; it has: 1"),
        ('GET', '/data/{id}/releases/..%2F..%2Fx/archive', None, 404, ''),
        ('GET', '/data/{id}/releases/%2E%2E/archive', None, 422, 'no dot first'),
        ('GET', '/data/{id}/releases/..%5Cx/archive', None, 422, 'letters, digits and'),
        ('GET', '/data/{id}/releases/%00', None, 422, 'letters, digits and'),
        ('GET', '/data/{id}/releases/%FF%C3%BC/archive', None, 422, 'letters, digits and'),
        ('GET', '/data/{id}/releases/' + 'v' * 300, None, 422, 'at most 100'),
    ],
)
def test_what_is_refused_over_http(login, ask, tokens, method, path, body, status, words):
    made = saved()
    made.release('1')
    before = sorted(Path(tokens['home']).rglob('*.tar'))
    answer = ask(method, path.format(id=made.id), **({} if body is None else {'json': body}))
    assert answer.status_code == status, answer.text
    assert words in answer.text
    assert 'home' not in answer.text
    assert len(answer.text) < 1000
    assert sorted(Path(tokens['home']).rglob('*.tar')) == before


@pytest.mark.parametrize('user', ['bob', 'reader', None])
def test_the_scope_decides(login, ask, server, user):
    made = saved()
    made.release('1')
    path = f'/data/{made.id}/releases'
    if user is None:
        for method, address in (('POST', path), ('GET', path), ('GET', f'{path}/1/archive')):
            answer = httpx.request(method, f'{server.url}/api/v1{address}', json={'version': '2'})
            assert answer.status_code == 401
        return
    can_read = 200 if user == 'reader' else 404
    for address in (path, f'{path}/1', f'{path}/1/archive'):
        assert ask('GET', address, user).status_code == can_read
    expected = 403 if user == 'reader' else 404
    assert ask('POST', path, user, json={'version': '2'}).status_code == expected
    assert ask('POST', path, 'reader', json={'version': '2', 'ticket': 'x'}).status_code == 403


def test_the_routes_are_described(server, tokens):
    headers = {'authorization': f'Bearer {tokens["alice"]}'}
    paths = httpx.get(f'{server.url}/openapi.json', headers=headers).json()['paths']
    made = paths['/api/v1/data/{collection_id}/releases']
    assert set(made) == {'get', 'post'}
    assert set(made['post']['responses']) >= {'201', '202'}
    archive = '/api/v1/data/{collection_id}/releases/{version}/archive'
    assert paths[archive]['get']['description']


# ---- what takes long, and what breaks


def test_a_long_release_keeps_neither_client_nor_server(login, ask, server):
    made = saved(count=1500)
    path = f'/data/{made.id}/releases'
    told = [ask('POST', f'{path}?wait=0', json={'version': f'v{n}'}) for n in range(3)]
    assert {answer.status_code for answer in told} == {202}
    for number, answer in enumerate(told):
        assert answer.headers['location'] == f'/api/v1{path}/v{number}'
        assert answer.json()['version'] == f'v{number}'
        assert answer.json()['status'] == 'BUILDING'
    wishes = [{key: answer.json()[key] for key in ('version', 'ticket')} for answer in told]
    slowest = 0.0
    while len(ask('GET', path).json()) < 3:
        started = time.monotonic()
        assert httpx.get(f'{server.url}/health/live').status_code == 200
        assert ask('GET', f'/data/{made.id}').status_code == 200
        slowest = max(slowest, time.monotonic() - started)
        time.sleep(0.05)
    assert slowest < 5, 'others are answered meanwhile'
    known = {about['version']: about for about in ask('GET', path).json()}
    for wish in wishes:
        answer = ask('POST', path, json=wish)
        assert (answer.status_code, answer.json()) == (201, known[wish['version']])
    assert len({about['content_sha256'] for about in known.values()}) == 1
    for wait in ('-1', '3600', 'nan', 'x'):
        assert ask('POST', f'{path}?wait={wait}', json={'version': '1'}).status_code == 422


def test_a_change_while_it_is_released_is_told(login):
    made = saved(count=400)
    done = threading.Event()

    def change():
        while not done.is_set():
            made[0].update([1])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with pytest.raises(ConflictError, match='changed while it was released'):
            made.release('1')
    finally:
        done.set()
        thread.join()
    assert made.releases() == []
    assert made.release('1')['version'] == '1'


class Line:
    """A line to the server that breaks after so many bytes of answers, some times."""

    def __init__(self, port: int, num_bytes: int, num_breaks: int) -> None:
        self._port = port
        self._num_bytes = num_bytes
        self.num_left = num_breaks
        self.ranges: list[bytes] = []
        self._listener = socket.create_server(('127.0.0.1', 0))
        self.url = f'http://127.0.0.1:{self._listener.getsockname()[1]}'
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            server = socket.create_connection(('127.0.0.1', self._port))
            threading.Thread(target=self._there, args=(client, server), daemon=True).start()
            threading.Thread(target=self._back, args=(server, client), daemon=True).start()

    def _there(self, client: socket.socket, server: socket.socket) -> None:
        while data := self._read(client):
            self.ranges += [
                line for line in data.split(b'\r\n') if line.lower().startswith(b'range')
            ]
            server.sendall(data)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        come = 0
        while data := self._read(server):
            come += len(data)
            if come > self._num_bytes and self.num_left:
                self.num_left -= 1
                break
            client.sendall(data)
        for end in (client, server):
            # to close alone would wait for whoever reads from it
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _read(self, end: socket.socket) -> bytes:
        try:
            return end.recv(1 << 16)
        except OSError:
            return b''


def test_a_download_goes_on_where_the_line_broke(login, server, tmp_path):
    made = saved(count=300)
    about = made.release('1')
    line = Line(server.http_port, 200_000, 3)
    login('alice', line.url)
    there = tmp_path / 'there'
    there.mkdir()
    path = TrainingSet.from_id(made.id).download_release('1', there)
    assert line.num_left == 0
    assert len(line.ranges) >= 2, 'it went on'
    assert sha256(path) == about['sha256']
    assert list(there.iterdir()) == [path]
    line.close()


def test_a_download_that_fails_leaves_nothing(login, server, tokens, tmp_path, monkeypatch):
    made = saved(count=100)
    made.release('1')
    monkeypatch.setattr('finetuner.transport.PATIENCE_SECONDS', 0.5)
    (tmp_path / 'known.tar').write_text('old')
    before = sorted(tmp_path.rglob('*'))
    archive = next(Path(tokens['home']).glob('collections/*/releases/1-*.tar'))
    good = archive.read_bytes()
    archive.write_bytes(good[:5000] + b'x' + good[5001:])
    with pytest.raises(ArtifactError, match='damaged'):
        made.download_release('1', tmp_path / 'known.tar')
    archive.write_bytes(good[:5000])
    with pytest.raises((ArtifactError, ServerError)):
        made.download_release('1', tmp_path / 'known.tar')
    archive.unlink()
    with pytest.raises(NotFoundError):
        made.download_release('1', tmp_path / 'known.tar')
    assert sorted(tmp_path.rglob('*')) == before
    assert (tmp_path / 'known.tar').read_text() == 'old'
    line = Line(server.http_port, 30_000, 10**6)
    archive.write_bytes(good)
    transport = Transport(line.url, tokens['alice'], patience=0.5)
    made._place.releases._server = transport
    with pytest.raises(ServerError, match='does not answer'):
        made.download_release('1', tmp_path / 'known.tar')
    assert sorted(tmp_path.rglob('*')) == before
    line.close()


def test_an_answer_that_was_lost_is_asked_for_again(login, server):
    """The line breaks before any answer to the wish is told, when the release is made."""
    made = saved(count=200)
    line = Line(server.http_port, 0, 0)
    login('alice', line.url)
    there = TrainingSet.from_id(made.id)
    line.num_left = 2
    # the first break is that of `_fresh`, the second that of the wish
    about = there.release('1')
    assert line.num_left == 0
    login('alice')
    assert TrainingSet.from_id(made.id).releases() == [about]
