"""Only what the policy names is read, whichever way its address is written."""

import base64
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetuner.excepts import ConfigError, PictureError
from finetuner.uris import PicturePolicy, read_uri

CONTENT = b'as good as a picture'


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ('open', 'open-not', 'secret'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.png').write_bytes(CONTENT)
    (tmp_path / 'open' / 'link.png').symlink_to(tmp_path / 'secret' / 'a.png')
    (tmp_path / 'open' / 'up').symlink_to(tmp_path / 'secret')
    (tmp_path / 'alias').symlink_to(tmp_path / 'open')
    return tmp_path


class _Site(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path, _, query = self.path.partition('?')
        if path.startswith('/open/to/'):
            self.send_response(302)
            self.send_header('Location', query)
            self.end_headers()
        elif path.endswith('/none'):
            self.send_error(404)
        else:
            body = CONTENT * 1000 if path.endswith('/large') else CONTENT
            self.send_response(200)
            if path.endswith('/gzip'):
                self.send_header('Content-Encoding', 'gzip')
            if not path.endswith('/large'):  # whose length is only known once it is read
                self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type('Site', (_Site,), {'asked': asked})
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}', asked
    server.shutdown()
    server.server_close()


def test_a_library_reads_any_local_file_however_it_is_named(folders, monkeypatch):
    path = folders / 'open' / 'a.png'
    monkeypatch.chdir(folders)
    monkeypatch.setenv('HOME', str(folders))
    for uri in (
        path,
        str(path),
        path.as_uri(),
        f'FILE://{path}',
        f'file:{path}',
        f'file://localhost{path}',
        f'file://{folders}/open/%61.png',
        'open/a.png',
        '~/open/a.png',
        str(folders / 'open' / 'link.png'),
    ):
        assert read_uri(uri) == CONTENT


def test_a_path_may_look_like_a_percent_code_or_hold_a_colon(tmp_path):
    for name in ('100%41.png', 'a:b.png', 'data.png', 'http.png'):
        (tmp_path / name).write_bytes(CONTENT)
        assert read_uri(str(tmp_path / name)) == CONTENT


@pytest.mark.parametrize(
    'prefix', ['{}/open', '{}/open/', 'file://{}/open', '{}/alias', '{}/x/../open']
)
def test_below_an_allowed_folder(folders, prefix):
    policy = PicturePolicy(uri_allow=(prefix.format(folders),))
    for good in (
        '{}/open/a.png',
        'file://{}/open/a.png',
        '{}/secret/../open/a.png',
        '{}/alias/a.png',
    ):
        assert read_uri(good.format(folders), policy) == CONTENT
    for bad in (
        '{}/secret/a.png',
        '{}/open-not/a.png',
        '{}/open/../secret/a.png',
        'file://{}/open/../secret/a.png',
        'file://{}/open/%2e%2e/secret/a.png',
        'file://{}/open/..%2fsecret/a.png',
        'FILE:{}/secret/a.png',
        '{}/open/link.png',
        'file://{}/open/link.png',
        '{}/open/up/a.png',
        '{}/open/up/../secret/a.png',
        '/proc/self/root{}/secret/a.png',
        '{}',
        '/etc/passwd',
        '/there/is/none',
    ):
        with pytest.raises(PictureError, match='not below any place named in uri_allow'):
            read_uri(bad.format(folders), policy)


def test_one_file_may_be_allowed(folders):
    policy = PicturePolicy(uri_allow=(str(folders / 'open' / 'a.png'),))
    assert read_uri(folders / 'open' / 'a.png', policy) == CONTENT
    with pytest.raises(PictureError, match='uri_allow'):
        read_uri(folders / 'secret' / 'a.png', policy)


def test_an_empty_list_allows_no_uri_but_data(folders, site):
    policy = PicturePolicy(uri_allow=())
    for uri in (folders / 'open' / 'a.png', f'{site[0]}/open/a.png', 'file:///etc/passwd'):
        with pytest.raises(PictureError, match='is not opened here: send the picture itself'):
            read_uri(uri, policy)
    assert site[1] == []
    assert read_uri(f'data:;base64,{base64.b64encode(CONTENT).decode()}', policy) == CONTENT


@pytest.mark.parametrize('given', ['/data', ('',), (' ',), (3,), [None]])
def test_uri_allow_must_be_a_list_of_places(given):
    with pytest.raises(ConfigError, match='is not a list of folders or addresses'):
        PicturePolicy(uri_allow=given)


def test_uri_allow_may_be_a_list():
    assert PicturePolicy(uri_allow=['/data']) == PicturePolicy(uri_allow=('/data',))


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'empty').touch()
    (tmp_path / 'ring').symlink_to(tmp_path / 'ring')
    for name, says in (
        ('pipe', 'not a regular file'),
        ('/dev/zero', 'not a regular file'),
        ('', 'it is a folder'),
        ('empty', r'is empty \(0 bytes\)'),
        ('none', 'there is no file'),
        ('ring', 'cannot be opened'),
        ('empty/none', 'cannot be opened'),
        ('x' * 300, 'cannot be opened'),
        ('a\0b', 'zero byte'),
    ):
        with pytest.raises(PictureError, match=says):
            read_uri(f'{tmp_path}/{name}' if not name.startswith('/') else name)


def test_more_bytes_than_allowed_are_not_read(tmp_path, site):
    (tmp_path / 'sparse').touch()
    os.truncate(tmp_path / 'sparse', 10**12)
    for uri in (
        tmp_path / 'sparse',
        f'{site[0]}/large',
        'data:,' + 'a' * 101,
        'data:,' + 'a' * 999,
    ):
        with pytest.raises(PictureError, match='larger than 100 bytes, the most allowed'):
            read_uri(uri, PicturePolicy(max_bytes=100))


@pytest.mark.parametrize(
    ('uri', 'says'),
    [
        ('data:image/png;base64', 'has no comma'),
        ('data:image/png;base64,a', 'not valid base64'),
        ('data:image/png;base64,_-__', 'not valid base64'),
        ('ftp://host/a.png', "has the scheme 'ftp'"),
        ('s3://bucket/a.png', "has the scheme 's3'"),
        ('file://host/a.png', "names the host 'host'"),
        ('file://[/a.png', 'not a valid uri'),
        ('http://', 'not a plain http'),
        ('http:///a.png', 'not a plain http'),
        ('http://user:word@127.0.0.1/a.png', 'not a plain http'),
        ('http://a b/', 'not a valid uri|cannot be fetched'),
        ('http://127.0.0.1:99999/', 'not a valid uri|cannot be fetched'),
        ('http://127.0.0.1:1/a.png', 'cannot be fetched'),
        ('http://[::1', 'not a valid uri'),
        ('http://127.0.0.1/\n', 'not a valid uri'),
        (b'/a.png', 'is bytes'),
    ],
)
def test_malformed_addresses(uri, says, tmp_path):
    with pytest.raises((PictureError, TypeError), match=says) as caught:
        read_uri(os.fsencode(uri) if isinstance(uri, bytes) else uri)
    assert isinstance(caught.value, PictureError)


def test_data_uris():
    assert read_uri('data:,as%20good%20as%20a%20picture') == CONTENT
    encoded = base64.b64encode(CONTENT).decode()
    assert read_uri(f'DATA:image/png;BASE64,{encoded}') == CONTENT
    assert read_uri(f'data:image/png;base64,{encoded.replace("=", "%3D")}') == CONTENT


def test_http_is_fetched_and_redirects_are_followed(site):
    root, asked = site
    assert read_uri(f'{root}/open/a.png') == CONTENT
    assert read_uri(f'{root.replace("http", "HTTP")}/open/a.png?size=1') == CONTENT
    assert read_uri(f'{root}/open/to/?/secret/a.png') == CONTENT
    assert asked[-2:] == ['/open/to/?/secret/a.png', '/secret/a.png']


def test_http_answers_that_are_no_picture(site):
    root, asked = site
    with pytest.raises(PictureError, match='answers 404'):
        read_uri(f'{root}/none')
    with pytest.raises(PictureError, match='answers compressed'):
        read_uri(f'{root}/gzip')
    with pytest.raises(PictureError, match='not a plain http'):
        read_uri(f'{root}/open/to/?file:///etc/passwd')
    asked.clear()
    with pytest.raises(PictureError, match='redirects more than 5 times'):
        read_uri(f'{root}/open/to/?/open/to/?/open/to/')
    assert len(asked) == 6


def test_only_allowed_addresses_are_asked(site):
    root, asked = site
    port = root.rpartition(':')[2]
    policy = PicturePolicy(uri_allow=(f'{root}/open/', '/nothing/local'))
    assert read_uri(f'{root}/open/a.png', policy) == CONTENT
    assert read_uri(f'{root}/open/to/?{root}/open/a.png', policy) == CONTENT
    assert read_uri(f'{root}/open/%61.png', policy) == CONTENT
    asked.clear()
    for bad in (
        f'{root}/secret/a.png',
        f'{root}/open-not/a.png',
        f'{root}/open/../secret/a.png',
        f'{root}/open/%2e%2e/secret/a.png',
        f'{root}/open/%252e%252e/secret/a.png',
        f'{root}/open/..%2fsecret/a.png',
        f'{root}/open/..\\secret/a.png',
        f'{root}@127.0.0.2/open/a.png',
        f'http://127.0.0.1:{port}.evil.test/open/a.png',
        f'http://127.0.0.1.evil.test:{port}/open/a.png',
        f'http://localhost:{port}/open/a.png',
        f'https://127.0.0.1:{port}/open/a.png',
        'http://127.0.0.1:1/open/a.png',
        f'http://evil.test#@127.0.0.1:{port}/open/a.png',
        f'http://evil.test\\@127.0.0.1:{port}/open/a.png',
    ):
        with pytest.raises(PictureError, match=r'uri_allow|not a plain http|not a valid uri'):
            read_uri(bad, policy)
    assert asked == []
    for target in ('/secret/a.png', f'http://localhost:{port}/open/a.png', '../../secret/a.png'):
        with pytest.raises(PictureError, match='uri_allow'):
            read_uri(f'{root}/open/to/?{target}', policy)
    assert all(path.startswith('/open/to/') for path in asked)


def test_an_address_of_endless_encodings_costs_no_time(site):
    root, asked = site
    policy = PicturePolicy(uri_allow=(f'{root}/open/',))
    encoded = 'a.png'
    for _ in range(3):
        encoded = encoded.replace('%', '%25').replace('a', '%61')
    assert read_uri(f'{root}/open/{encoded}', policy) == CONTENT
    asked.clear()
    for bad, says in (
        (f'{root}/open/%' + '25' * 3_000 + '61.png', 'uri_allow'),
        (f'{root}/open/%' + '25' * 5 + '2e%2e/secret/a.png', 'uri_allow'),
        (f'{root}/open/a.png?' + 'x' * 10_000, '8,192 allowed of an address: shorten it'),
        (f'{root}/open/to/?{root}/open/%' + '25' * 3_000, 'uri_allow'),
    ):
        with pytest.raises(PictureError, match=says):
            read_uri(bad, policy)
    assert all(path.startswith('/open/to/') for path in asked)


def test_where_no_address_is_allowed_none_is_parsed(monkeypatch):
    def parse(address):
        raise AssertionError(f'{address[:20]} is parsed')

    monkeypatch.setattr('finetuner.fetching.httpx.URL', parse)
    for allowed in ((), ('/data',), ('10.0.0.0/8',)):
        with pytest.raises(PictureError, match='uri_allow'):
            read_uri('http://a/%' + '25' * 32_000, PicturePolicy(uri_allow=allowed))


def test_an_allowed_site_allows_no_file_and_the_other_way_round(site, folders):
    root, _ = site
    with pytest.raises(PictureError, match='uri_allow'):
        read_uri(folders / 'open' / 'a.png', PicturePolicy(uri_allow=(root,)))
    with pytest.raises(PictureError, match='uri_allow'):
        read_uri(f'{root}/open/a.png', PicturePolicy(uri_allow=('/',)))
    assert read_uri(f'{root}/open/a.png', PicturePolicy(uri_allow=(root,))) == CONTENT
