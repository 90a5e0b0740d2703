"""Names lead where the policy lets them, whatever name service says; slow answers end in time."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetuner import fetching
from finetuner.excepts import PictureError
from finetuner.uris import PicturePolicy, read_uri

CONTENT = b'as good as a picture'


class _Site(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers['Host'], self.path))
        if self.path.startswith('/to/'):
            self.send_response(302)
            self.send_header('Location', self.path.removeprefix('/to/'))
            self.end_headers()
            return
        if self.path == '/slow-headers':
            self._drip(b'HTTP/1.1 200 OK\r\n' + b'X: ' + b'x' * 1000)
            return
        if self.path == '/hints':
            self._drip(b'HTTP/1.1 100 Continue\r\n\r\n' * 50, 25)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == '/slow-body':
            self._drip(CONTENT * 10)
        else:
            self.wfile.write(CONTENT)

    def _drip(self, data, step=1):
        try:
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                time.sleep(0.05)
        except OSError:
            pass  # the other side has gone

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = ThreadingHTTPServer(('127.0.0.1', 0), _Site)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def names(monkeypatch):
    """What name service answers: by name the addresses, one list each time it is asked."""
    known, loopback = {}, socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in known:
            return loopback(host, port, *args, **kwargs)
        answers = known[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        kind = socket.SOCK_STREAM
        return [
            (socket.AF_INET6 if ':' in a else socket.AF_INET, kind, 6, '', (a, port)) for a in found
        ]

    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)
    return known


def policy_of(*places):
    return PicturePolicy(uri_allow=places)


@pytest.mark.parametrize(
    'address',
    ['127.0.0.1', '10.0.0.7', '169.254.169.254', '100.64.0.1', '0.0.0.0', '224.0.0.1', '::1',
     '::ffff:127.0.0.1', 'fe80::1', 'fd00:ec2::254', '64:ff9b::7f00:1', '2002:7f00:1::', '::'],
)  # fmt: skip
def test_a_public_name_leads_to_no_private_address(address, site, names):
    names['pictures.example'] = [[address]]
    root = f'http://pictures.example:{site.server_port}'
    with pytest.raises(PictureError, match=r'leads to .* unless uri_allow names the network'):
        read_uri(f'{root}/a.png', policy_of(root))
    # not even beside one that is public
    names['pictures.example'] = [['93.184.215.14', address]]
    with pytest.raises(PictureError, match='leads to'):
        read_uri(f'{root}/a.png', policy_of(root))
    assert site.asked == []


def test_it_does_where_its_network_is_named(site, names):
    names['pictures.example'] = [['127.0.0.1']]
    root = f'http://pictures.example:{site.server_port}'
    for network in ('127.0.0.0/8', '127.0.0.1'):
        assert read_uri(f'{root}/a.png', policy_of(root, network)) == CONTENT
    assert site.asked == [(f'pictures.example:{site.server_port}', '/a.png')] * 2
    with pytest.raises(PictureError, match='leads to'):
        read_uri(f'{root}/a.png', policy_of(root, '10.0.0.0/8'))


def test_what_was_checked_is_what_is_asked(site, names):
    """A name that leads elsewhere when it is asked again is not asked again."""
    names['pictures.example'] = [['127.0.0.1'], ['127.0.0.99']]
    root = f'http://pictures.example:{site.server_port}'
    assert read_uri(f'{root}/a.png', policy_of(root, '127.0.0.1')) == CONTENT
    assert len(names['pictures.example']) == 1


def test_names_nearby_lead_nearby(site, names):
    for host in ('minio', 'pictures.lan', 'pictures.internal'):
        names[host] = [['127.0.0.1']]
        root = f'http://{host}:{site.server_port}'
        assert read_uri(f'{root}/a.png', policy_of(root)) == CONTENT
        names[host] = [['169.254.169.254']]
        with pytest.raises(PictureError, match='leads to'):
            read_uri(f'{root}/a.png', policy_of(root))
    root = f'http://localhost:{site.server_port}'
    assert read_uri(f'{root}/a.png', policy_of(root)) == CONTENT
    names['localhost'] = [['10.0.0.1']]
    with pytest.raises(PictureError, match='leads to'):
        read_uri(f'{root}/a.png', policy_of(root))


def test_the_next_address_is_taken_where_one_does_not_answer(site, names):
    names['two.lan'] = [['127.0.0.2', '127.0.0.1']]
    root = f'http://two.lan:{site.server_port}'
    assert read_uri(f'{root}/a.png', policy_of(root)) == CONTENT
    names['two.lan'] = [['127.0.0.2']]
    with pytest.raises(PictureError, match='cannot be fetched'):
        read_uri(f'{root}/a.png', policy_of(root))


def test_redirects_stay_with_the_name(site, names):
    names['a.lan'] = [['127.0.0.1']]
    root = f'http://a.lan:{site.server_port}'
    assert read_uri(f'{root}/to//b.png', policy_of(root)) == CONTENT
    assert {host for host, _ in site.asked} == {f'a.lan:{site.server_port}'}


def test_a_proxy_of_the_environment_is_not_asked(site, names, monkeypatch):
    names['a.lan'] = [['127.0.0.1']]
    monkeypatch.setenv('HTTP_PROXY', 'http://127.0.0.1:1')
    root = f'http://a.lan:{site.server_port}'
    assert read_uri(f'{root}/a.png', policy_of(root)) == CONTENT
    with pytest.raises(PictureError, match='cannot be fetched'):
        read_uri(f'{root}/a.png')


@pytest.mark.parametrize('path', ['/slow-headers', '/slow-body', '/hints'])
@pytest.mark.parametrize('restricted', [True, False])
def test_slow_answers_end_in_time(path, restricted, site, monkeypatch):
    monkeypatch.setattr(fetching, 'FETCH_SECONDS', 0.3)
    root = f'http://127.0.0.1:{site.server_port}'
    policy = policy_of(root) if restricted else PicturePolicy()
    with pytest.raises(PictureError, match=r'took longer than 0\.3 seconds'):
        read_uri(f'{root}{path}', policy)
