"""Read the bytes behind a path or URI, where a policy allows it.

A server that opened whatever address it is sent would read its own files and its neighbours'
pages to strangers. So the policy is asked about the real address: links and `..` resolved,
percent-encoding undone, host and port as the fetching library sees them, and again after each
redirect.
"""

import base64
import binascii
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from finetuner.excepts import ConfigError, PictureError

if TYPE_CHECKING:
    import httpx

PICTURE_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')

_MEGABYTE = 1024 * 1024
_MAX_REDIRECTS = 5
_FETCH_SECONDS = 30.0
_SCHEME = re.compile(r'(?:(file|https?|data):|([a-z][a-z0-9+.-]+)://)', re.IGNORECASE)


@dataclass(frozen=True)
class PicturePolicy:
    """What may be opened as a picture.

    Attributes:
        uri_allow: `None`: any local file and any http(s) address (a library on its user's own
            machine). `()`: no URI at all (a server's default). Otherwise folders, files or
            http(s) addresses, and all that lies below them; links are followed before the check,
            and each redirect is checked again. `data:` URIs carry their content and are always
            allowed.
        max_pixels: most pixels of a picture as it lies in its file.
        max_bytes: most bytes of an encoded picture.
        formats: allowed formats, by Pillow's names.
    """

    uri_allow: tuple[str, ...] | None = None
    max_pixels: int = 64_000_000
    max_bytes: int = 64 * _MEGABYTE
    formats: tuple[str, ...] = PICTURE_FORMATS

    def __post_init__(self) -> None:
        if self.uri_allow is None:
            return
        if isinstance(self.uri_allow, str) or not all(
            isinstance(prefix, str) and prefix.strip() for prefix in self.uri_allow
        ):
            raise ConfigError(
                f'uri_allow={self.uri_allow!r} is not a list of folders or addresses, such as '
                "['/data/pictures', 'https://pictures.example.org/catalogue']"
            )
        object.__setattr__(self, 'uri_allow', tuple(self.uri_allow))


DEFAULT_POLICY = PicturePolicy()


def read_uri(uri: str | os.PathLike, policy: PicturePolicy = DEFAULT_POLICY) -> bytes:
    """Read the bytes behind a path or URI that the policy allows.

    Args:
        uri: path, or URI with the scheme `file`, `http`, `https` or `data`.
        policy: what may be opened.

    Returns:
        The bytes as they are; whether they are a picture is not looked at.

    Raises:
        PictureError: not allowed, not there, not a regular file, or larger than allowed.
    """
    text = os.fspath(uri)
    if not isinstance(text, str):
        raise PictureError(f'path {text!r} is bytes: give it as str')
    match = _SCHEME.match(text) if isinstance(uri, str) else None
    scheme = (match.group(1) or match.group(2)).lower() if match else ''
    if scheme == 'data':
        return _read_data_uri(text, policy)
    if scheme in ('http', 'https'):
        return _fetch(text, policy)
    if scheme in ('', 'file'):
        return _read_file(text, policy)
    raise PictureError(
        f'{_shown(text)} has the scheme {scheme!r}: a uri is a path, or has one of file, http, '
        'https, data'
    )


def _shown(uri: str) -> str:
    return repr(uri if len(uri) <= 200 else f'{uri[:200]}...')


def _not_allowed(uri: str, policy: PicturePolicy) -> PictureError:
    if policy.uri_allow:
        return PictureError(f'uri {_shown(uri)} is not below any place named in uri_allow')
    return PictureError(
        f'uri {_shown(uri)} is not opened here: send the picture itself as blob, or have its '
        'place named in uri_allow'
    )


def too_many_bytes(what: str, policy: PicturePolicy) -> PictureError:
    """Error that says what is larger than the policy allows."""
    return PictureError(f'{what} is larger than {policy.max_bytes:,} bytes, the most allowed')


def _read_data_uri(uri: str, policy: PicturePolicy) -> bytes:
    header, comma, payload = uri.partition(',')
    if not comma:
        raise PictureError(f'data uri {_shown(uri)} has no comma before its content')
    # Percent-encoding takes 3 characters a byte, base64 4 for 3 bytes: never decode far more
    # than could be kept.
    if len(payload) > 4 * policy.max_bytes:
        raise too_many_bytes('data uri', policy)
    try:
        content = unquote_to_bytes(payload)
        if header.lower().endswith(';base64'):
            content = base64.b64decode(content, validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise PictureError(f'data uri {_shown(uri)} is not valid base64: {error}') from error
    if len(content) > policy.max_bytes:
        raise too_many_bytes('data uri', policy)
    return content


def _local_path(uri: str) -> str:
    """Path of a path or file URI, as it stands."""
    path = uri
    if uri[:5].lower() == 'file:':
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise PictureError(f'{_shown(uri)} is not a valid uri: {error}') from error
        if parts.netloc.lower() not in ('', 'localhost'):
            raise PictureError(f'{_shown(uri)} names the host {parts.netloc!r}: files are local')
        path = unquote(parts.path)
    if '\0' in path:
        raise PictureError(f'path {_shown(path)} holds a zero byte')
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise PictureError(f'path {_shown(path)} is no UTF-8, as paths are') from error
    return os.path.expanduser(path)


def _read_file(uri: str, policy: PicturePolicy) -> bytes:
    path = _local_path(uri)
    no_link = 0
    if policy.uri_allow is not None:
        # Links are followed before the check, and the path that was checked has none at its end.
        path, no_link = os.path.realpath(path), getattr(os, 'O_NOFOLLOW', 0)
        folders = [p for p in policy.uri_allow if not p.lower().startswith(('http:', 'https:'))]
        if not any(
            Path(path).is_relative_to(os.path.realpath(_local_path(folder))) for folder in folders
        ):
            raise _not_allowed(uri, policy)
    # Not blocking, so that a named pipe is refused instead of waited for.
    flags = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | no_link
    try:
        with open(os.open(path, flags | getattr(os, 'O_CLOEXEC', 0)), 'rb') as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PictureError(f'{_shown(uri)} is not a regular file')
            if status.st_size > policy.max_bytes:
                raise too_many_bytes(f'file {_shown(uri)}', policy)
            # no more than it has: a buffer is made for all that is asked for
            content = file.read(status.st_size + 1)
    except FileNotFoundError as error:
        raise PictureError(f'there is no file {_shown(uri)}') from error
    except OSError as error:
        reason = 'it is a folder' if os.path.isdir(path) else error.strerror or str(error)
        raise PictureError(f'file {_shown(uri)} cannot be opened: {reason}') from error
    if not content:
        raise PictureError(f'file {_shown(uri)} is empty (0 bytes)')
    if len(content) > policy.max_bytes:
        raise too_many_bytes(f'file {_shown(uri)}', policy)
    return content


def _allowed_url(uri: str, policy: PicturePolicy) -> 'httpx.URL':
    """Parse with the parser that will fetch, so that check and request see the same address."""
    import httpx

    def parse(address: str) -> tuple['httpx.URL', tuple, str]:
        try:
            url = httpx.URL(address)
        except (httpx.InvalidURL, ValueError) as error:
            raise PictureError(f'{_shown(address)} is not a valid uri: {error}') from error
        path, decoded = url.path, unquote(url.path)
        while decoded != path:
            path, decoded = decoded, unquote(decoded)
        port = url.port or {'http': 80, 'https': 443}.get(url.scheme)
        return url, (url.scheme, url.host.lower(), port), path.rstrip('/')

    url, origin, path = parse(uri)
    if url.scheme not in ('http', 'https') or not url.host or url.userinfo:
        raise PictureError(f'{_shown(uri)} is not a plain http(s) address')
    if policy.uri_allow is None:
        return url
    if '\\' in path or not {'.', '..'}.isdisjoint(path.split('/')):
        raise _not_allowed(uri, policy)
    for prefix in policy.uri_allow:
        if prefix.lower().startswith(('http:', 'https:')):
            _, allowed_origin, allowed_path = parse(prefix)
            if origin == allowed_origin and f'{path}/'.startswith(f'{allowed_path}/'):
                return url
    raise _not_allowed(uri, policy)


def _fetch(uri: str, policy: PicturePolicy) -> bytes:
    import httpx

    url = _allowed_url(uri, policy)
    deadline = time.monotonic() + _FETCH_SECONDS
    try:
        with httpx.Client(timeout=10.0, headers={'Accept-Encoding': 'identity'}) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                with client.stream('GET', url) as response:
                    if response.has_redirect_location:
                        target = str(response.url.join(response.headers['Location']))
                        url = _allowed_url(target, policy)
                        continue
                    if response.status_code != 200:
                        raise PictureError(f'{_shown(uri)} answers {response.status_code}')
                    return _read_response(response, uri, policy, deadline)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        # the last for hosts that no name service would take, such as `a..b`
        reason = str(error) or type(error).__name__
        raise PictureError(f'{_shown(uri)} cannot be fetched: {reason}') from error
    raise PictureError(f'{_shown(uri)} redirects more than {_MAX_REDIRECTS} times')


def _read_response(
    response: 'httpx.Response', uri: str, policy: PicturePolicy, deadline: float
) -> bytes:
    if response.headers.get('Content-Encoding', 'identity') != 'identity':
        raise PictureError(f'{_shown(uri)} answers compressed, which was not asked for')
    content = bytearray()
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > policy.max_bytes:
            raise too_many_bytes(f'content of {_shown(uri)}', policy)
        if time.monotonic() > deadline:
            raise PictureError(f'{_shown(uri)} took longer than {_FETCH_SECONDS:.0f} seconds')
    return bytes(content)
