"""Fetch what lies behind an http(s) address, where a policy allows it.

A name says nothing of where it leads: whoever owns it can have it lead to this machine, or to the
addresses that hand a cloud's machines their secrets, and to another place each time it is asked. So
where a policy restricts addresses, a name is resolved once, what comes of it is checked, and the
connection goes to what was checked; proxies of the environment, which would resolve it again, are
left out. Everything is done within one deadline, however slowly the other side talks.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.parse import unquote

import httpx

from finetuner.excepts import PictureError
from finetuner.uris import PicturePolicy, not_allowed, shown_uri, too_many_bytes

_MAX_REDIRECTS = 5
_MAX_LETTERS = 8_192
# percent-encoding of percent-encoding; each round goes through all letters
_MAX_ENCODINGS = 5
FETCH_SECONDS = 30.0
_SECONDS_OF_SILENCE = 10.0
# names that no public name service gives: whoever allows one means a machine nearby
_NEARBY = ('.local', '.internal', '.intranet', '.lan', '.home', '.corp', '.private', '.home.arpa')
_NAT64 = ip_network('64:ff9b::/96')


def fetch(uri: str, policy: PicturePolicy) -> bytes:
    """Fetch the bytes behind an http(s) address that the policy allows, redirects followed.

    Args:
        uri: the address.
        policy: what may be fetched.

    Raises:
        PictureError: not allowed, not there, larger than allowed, or too slow.
    """
    url = _allowed_url(uri, policy)
    deadline = _Deadline(FETCH_SECONDS)
    try:
        with (
            deadline,
            httpx.Client(
                timeout=_SECONDS_OF_SILENCE,
                headers={'Accept-Encoding': 'identity'},
                # a connection made for one name is never used for another
                limits=httpx.Limits(max_keepalive_connections=0),
                trust_env=policy.uri_allow is None,
            ) as client,
        ):
            for _ in range(_MAX_REDIRECTS + 1):
                with _answer(client, url, policy, deadline) as response:
                    if response.has_redirect_location:
                        # not `response.url`, whose host may be an address in place of its name
                        target = str(url.join(response.headers['Location']))
                        url = _allowed_url(target, policy)
                        continue
                    if response.status_code != 200:
                        raise PictureError(f'{shown_uri(uri)} answers {response.status_code}')
                    content = _read_response(response, uri, policy)
                    # one whose length was not announced ends where the connection does
                    deadline.check()
                    return content
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OSError) as error:
        if deadline.is_over:
            raise PictureError(
                f'{shown_uri(uri)} took longer than {FETCH_SECONDS:g} seconds'
            ) from error
        # UnicodeError for hosts that no name service would take, such as `a..b`
        reason = str(error) or type(error).__name__
        raise PictureError(f'{shown_uri(uri)} cannot be fetched: {reason}') from error
    raise PictureError(f'{shown_uri(uri)} redirects more than {_MAX_REDIRECTS} times')


class _Deadline:
    """Ends the connections of a fetch when its time is over.

    The timeouts of httpx are for one read each: a server that sends a byte now and then, of its
    headers too, would hold a thread for hours.
    """

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.is_over = False

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for one in self._sockets:
                one.close()
            self._sockets.clear()

    def check(self) -> None:
        """Raise when the time is over."""
        if self.is_over:
            raise TimeoutError

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Note the connections that httpx opens; an extension of requests."""
        if event == 'connection.connect_tcp.complete':
            with self._lock:
                # a handle of our own: TLS takes the one that is there away
                self._sockets.append(info['return_value'].get_extra_info('socket').dup())
            self.check()

    def _end(self) -> None:
        with self._lock:
            self.is_over = True
            for one in self._sockets:
                with contextlib.suppress(OSError):  # it has ended by itself
                    one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _answer(
    client: httpx.Client, url: httpx.URL, policy: PicturePolicy, deadline: _Deadline
) -> Iterator[httpx.Response]:
    """The answer of the first of a name's addresses that can be reached."""
    extensions: dict[str, Any] = {'trace': deadline.trace}
    if policy.uri_allow is None:
        with client.stream('GET', url, extensions=extensions) as response:
            yield response
        return
    # certificates are still those of the name
    extensions['sni_hostname'] = url.host
    headers = {'Host': url.netloc.decode('ascii')}
    refusal: Exception = OSError(f'name service knows no address of {url.host!r}')
    for address in _checked_addresses(url, policy):
        deadline.check()
        request = client.build_request(
            'GET', url.copy_with(host=str(address)), headers=headers, extensions=extensions
        )
        try:
            response = client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            refusal = error
            continue
        with contextlib.closing(response):
            yield response
        return
    raise refusal


def _checked_addresses(url: httpx.URL, policy: PicturePolicy) -> list[IPv4Address | IPv6Address]:
    """Where a name leads, all of it allowed.

    Raises:
        PictureError: it leads to an address that its name does not say.
    """
    with contextlib.suppress(ValueError):
        # no name: the policy names this very address
        return [ip_address(url.host)]
    port = url.port or (443 if url.scheme == 'https' else 80)
    # as httpx sends it: names in other scripts by their ASCII form
    found = socket.getaddrinfo(url.raw_host.decode('ascii'), port, type=socket.SOCK_STREAM)
    addresses = [ip_address(str(entry[4][0])) for entry in found]
    for address in addresses:
        if not _may_lead_to(url.host, address, policy):
            raise PictureError(
                f'host {url.host!r} of a uri leads to {address}, an address of a private network or '
                f'a reserved one: nothing is fetched from there unless uri_allow names the network '
                f"too, such as '{address}/32'"
            )
    return list(dict.fromkeys(addresses))


def _may_lead_to(host: str, address: IPv4Address | IPv6Address, policy: PicturePolicy) -> bool:
    for place in policy.uri_allow or ():
        with contextlib.suppress(ValueError):
            if address in ip_network(place, strict=False):
                return True
    name = f'.{host.rstrip(".").lower()}'
    if name.endswith('.localhost'):
        return address.is_loopback
    real = _unwrapped(address)
    if real.is_multicast or real.is_link_local or real.is_unspecified:
        return False
    is_nearby = name.count('.') == 1 or name.endswith(_NEARBY)
    return real.is_global or (is_nearby and real.is_private)


def _unwrapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address stands for, where it does."""
    if isinstance(address, IPv6Address):
        for wrapped in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())[1:]):
            if wrapped is not None:
                return wrapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _allowed_url(uri: str, policy: PicturePolicy) -> httpx.URL:
    """Parse with the parser that will fetch, so that check and request see the same address."""
    places = [place for place in policy.uri_allow or () if _is_address(place)]
    if policy.uri_allow is not None and not places:
        # what is opened nowhere is not worth the time it takes to parse
        raise not_allowed(uri, policy)
    if len(uri) > _MAX_LETTERS:
        raise PictureError(
            f'{shown_uri(uri)} has {len(uri):,} letters, more than the {_MAX_LETTERS:,} allowed of an '
            'address: shorten it, or send the picture itself as blob'
        )
    url = _parsed(uri)
    if url.scheme not in ('http', 'https') or not url.host or url.userinfo:
        raise PictureError(f'{shown_uri(uri)} is not a plain http(s) address')
    if policy.uri_allow is None:
        return url
    path = _decoded_path(url)
    if path is None or '\\' in path or not {'.', '..'}.isdisjoint(path.split('/')):
        raise not_allowed(uri, policy)
    for place in places:
        allowed = _parsed(place)
        allowed_path = _decoded_path(allowed)
        if allowed_path is None or _origin(url) != _origin(allowed):
            continue
        if f'{path}/'.startswith(f'{allowed_path}/'):
            return url
    raise not_allowed(uri, policy)


def _is_address(place: str) -> bool:
    return place.lower().startswith(('http:', 'https:'))


def _parsed(address: str) -> httpx.URL:
    try:
        return httpx.URL(address)
    except (httpx.InvalidURL, ValueError) as error:
        raise PictureError(f'{shown_uri(address)} is not a valid uri: {error}') from error


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    port = url.port or {'http': 80, 'https': 443}.get(url.scheme)
    return url.scheme, url.host.lower(), port


def _decoded_path(url: httpx.URL) -> str | None:
    """The path with nothing encoded in it; None where that does not come to an end."""
    path = url.path
    for _ in range(_MAX_ENCODINGS):
        decoded = unquote(path)
        if decoded == path:
            return path.rstrip('/')
        path = decoded
    return None


def _read_response(response: httpx.Response, uri: str, policy: PicturePolicy) -> bytes:
    if response.headers.get('Content-Encoding', 'identity') != 'identity':
        raise PictureError(f'{shown_uri(uri)} answers compressed, which was not asked for')
    content = bytearray()
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > policy.max_bytes:
            raise too_many_bytes(f'content of {shown_uri(uri)}', policy)
    return bytes(content)
