"""Read the bytes behind a path or URI, where a policy allows it.

A server that opened whatever address it is sent would read its own files and its neighbours'
pages to strangers. So the policy is asked about the real address: links and `..` resolved,
percent-encoding undone, host and port as the fetching library sees them, and again after each
redirect. `finetuner.fetching` connects to the address that was checked, and to no other.
"""

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from finetuner.excepts import ConfigError, PictureError

PICTURE_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')

_MEGABYTE = 1024 * 1024
_SCHEME = re.compile(r'(?:(file|https?|data):|([a-z][a-z0-9+.-]+)://)', re.IGNORECASE)


@dataclass(frozen=True)
class PicturePolicy:
    """What may be opened as a picture.

    Attributes:
        uri_allow: `None`: any local file and any http(s) address (a library on its user's own
            machine). `()`: no URI at all (a server's default). Otherwise folders, files or
            http(s) addresses, and all that lies below them; links are followed before the check,
            and each redirect is checked again. `data:` URIs carry their content and are always
            allowed. A public name is not followed to an address of a private network, whatever
            name service says, unless a network that the address is in stands here too, such as
            `10.0.0.0/8`; see `finetuner.fetching`.
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
        from finetuner.fetching import fetch

        return fetch(text, policy)
    if scheme in ('', 'file'):
        return _read_file(text, policy)
    raise PictureError(
        f'{shown_uri(text)} has the scheme {scheme!r}: a uri is a path, or has one of file, http, '
        'https, data'
    )


def _is_address(place: str) -> bool:
    """Whether an entry of `uri_allow` is an http(s) address or a network, and no folder."""
    if place.lower().startswith(('http:', 'https:')):
        return True
    try:
        ip_network(place, strict=False)
    except ValueError:
        return False
    return True


def shown_uri(uri: str) -> str:
    """How errors show a uri."""
    return repr(uri if len(uri) <= 200 else f'{uri[:200]}...')


def not_allowed(uri: str, policy: PicturePolicy) -> PictureError:
    """Error that says that the policy allows no such uri."""
    if policy.uri_allow:
        return PictureError(f'uri {shown_uri(uri)} is not below any place named in uri_allow')
    return PictureError(
        f'uri {shown_uri(uri)} is not opened here: send the picture itself as blob, or have its '
        'place named in uri_allow'
    )


def too_many_bytes(what: str, policy: PicturePolicy) -> PictureError:
    """Error that says what is larger than the policy allows."""
    return PictureError(f'{what} is larger than {policy.max_bytes:,} bytes, the most allowed')


def _read_data_uri(uri: str, policy: PicturePolicy) -> bytes:
    header, comma, payload = uri.partition(',')
    if not comma:
        raise PictureError(f'data uri {shown_uri(uri)} has no comma before its content')
    # Percent-encoding takes 3 characters a byte, base64 4 for 3 bytes: never decode far more
    # than could be kept.
    if len(payload) > 4 * policy.max_bytes:
        raise too_many_bytes('data uri', policy)
    try:
        content = unquote_to_bytes(payload)
        if header.lower().endswith(';base64'):
            content = base64.b64decode(content, validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise PictureError(f'data uri {shown_uri(uri)} is not valid base64: {error}') from error
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
            raise PictureError(f'{shown_uri(uri)} is not a valid uri: {error}') from error
        if parts.netloc.lower() not in ('', 'localhost'):
            raise PictureError(f'{shown_uri(uri)} names the host {parts.netloc!r}: files are local')
        path = unquote(parts.path)
    if '\0' in path:
        raise PictureError(f'path {shown_uri(path)} holds a zero byte')
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise PictureError(f'path {shown_uri(path)} is no UTF-8, as paths are') from error
    return os.path.expanduser(path)


def _read_file(uri: str, policy: PicturePolicy) -> bytes:
    path = _local_path(uri)
    no_link = 0
    if policy.uri_allow is not None:
        # Links are followed before the check, and the path that was checked has none at its end.
        path, no_link = os.path.realpath(path), getattr(os, 'O_NOFOLLOW', 0)
        folders = [place for place in policy.uri_allow if not _is_address(place)]
        if not any(
            Path(path).is_relative_to(os.path.realpath(_local_path(folder))) for folder in folders
        ):
            raise not_allowed(uri, policy)
    # Not blocking, so that a named pipe is refused instead of waited for.
    flags = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | no_link
    try:
        with open(os.open(path, flags | getattr(os, 'O_CLOEXEC', 0)), 'rb') as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PictureError(f'{shown_uri(uri)} is not a regular file')
            if status.st_size > policy.max_bytes:
                raise too_many_bytes(f'file {shown_uri(uri)}', policy)
            # no more than it has: a buffer is made for all that is asked for
            content = file.read(status.st_size + 1)
    except FileNotFoundError as error:
        raise PictureError(f'there is no file {shown_uri(uri)}') from error
    except OSError as error:
        reason = 'it is a folder' if os.path.isdir(path) else error.strerror or str(error)
        raise PictureError(f'file {shown_uri(uri)} cannot be opened: {reason}') from error
    if not content:
        raise PictureError(f'file {shown_uri(uri)} is empty (0 bytes)')
    if len(content) > policy.max_bytes:
        raise too_many_bytes(f'file {shown_uri(uri)}', policy)
    return content
