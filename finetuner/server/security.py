"""Who may ask: bearer tokens, what they allow, and the addresses a server may bind without one."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from finetuner.excepts import ConfigError

if TYPE_CHECKING:
    from finetuner.storage.tokens import Identity, TokenStore

TOKEN_VARIABLE = 'FINETUNER_TOKEN'
DENIED = (
    'this server wants a token: send it as `Authorization: Bearer <token>` '
    '(HTTP header, or `authorization` in the gRPC metadata)'
)
FORBIDDEN = "this token's scope is {scope!r}, and this needs {needed!r}: ask for another token"
_PREFIX = 'Bearer '
# a server without tokens need not ask at each request whether there is one by now
_OPEN_SECONDS = 1.0

# who asks; set where a request comes in, read wherever it is worked on
current_identity: ContextVar[Identity | None] = ContextVar('current_identity', default=None)


class TokenCheck:
    """Finds out who a request comes from, by its `Authorization`.

    FINETUNER_TOKEN belongs to the machine's own user; all others are in the database. Where there
    is neither, everybody is the machine's own user.
    """

    def __init__(self, token: str | None, store: TokenStore | None = None) -> None:
        """Keep what there is to compare with.

        Args:
            token: of the machine's own user, None or empty for none.
            store: tokens of users; asked at every request, so that a token ends at once.
        """
        self._expected = f'{_PREFIX}{token}'.encode() if token else None
        self._store = store
        self._has_tokens = False
        self._open_until = -_OPEN_SECONDS

    @classmethod
    def from_environment(cls) -> TokenCheck:
        """Take FINETUNER_TOKEN and the tokens in the database.

        Raises:
            ConfigError: the database cannot be opened.
        """
        from finetuner.config import Settings
        from finetuner.storage.database import open_database
        from finetuner.storage.tokens import TokenStore

        settings = Settings.from_environment()
        return cls(os.environ.get(TOKEN_VARIABLE), TokenStore(open_database(settings.database_url)))

    @property
    def required(self) -> bool:
        """Whether requests need a token at all."""
        if self._expected is not None:
            return True
        if not self._has_tokens and self._store is not None:
            self._has_tokens = self._store.any()
        return self._has_tokens

    async def identify_soon(self, authorization: str | bytes | None) -> Identity | None:
        """`identify` for an event loop: what asks the database does so in a thread.

        Where no token is needed that is asked again after a second; where one is, each time.
        """
        from finetuner.storage.tokens import Identity

        if self._expected is not None:
            given = authorization or b''
            if isinstance(given, str):
                given = given.encode('utf-8', 'surrogateescape')
            if hmac.compare_digest(given, self._expected):
                return Identity('', 'admin')
        elif not self._has_tokens and time.monotonic() < self._open_until:
            return Identity('', 'admin')
        identity = await asyncio.to_thread(self.identify, authorization)
        if self._expected is None and not self._has_tokens:
            self._open_until = time.monotonic() + _OPEN_SECONDS
        return identity

    async def required_soon(self) -> bool:
        """`required` for an event loop."""
        if self._expected is not None or self._has_tokens:
            return True
        if time.monotonic() < self._open_until:
            return False
        return await asyncio.to_thread(lambda: self.required)

    def identify(self, authorization: str | bytes | None) -> Identity | None:
        """Who a request with this `Authorization` comes from; None for nobody who is known."""
        from finetuner.storage.tokens import Identity

        given = authorization or b''
        if isinstance(given, str):
            given = given.encode('utf-8', 'surrogateescape')
        if self._expected is not None and hmac.compare_digest(given, self._expected):
            return Identity('', 'admin')
        if not self.required:
            return Identity('', 'admin')
        text = given.decode('ascii', 'replace')
        if self._store is None or not text.startswith(_PREFIX):
            return None
        return self._store.identify(text.removeprefix(_PREFIX))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == 'localhost':
        return True
    try:
        return ipaddress.ip_address(host.strip('[]')).is_loopback
    except ValueError:
        return False


def is_foreign(origin: str | None, host: str | None) -> bool:
    """Whether a browser sends a request for a page of another server.

    Args:
        origin: header of that name; programs that are no browsers send none.
        host: header of that name.
    """
    return origin is not None and urlsplit(origin).netloc.lower() != (host or '').lower()


def is_rebound(host: str | None) -> bool:
    """Whether a `Host` header names something else than this machine.

    A page on the internet can have its own name lead to 127.0.0.1, and then is no stranger to the
    browser. A server that lets everybody in is on this machine alone, and so is known by its names.
    """
    name = urlsplit(f'//{host}').hostname if host else None
    return name is not None and not is_loopback(name)


def refuse_open_server(host: str, token: TokenCheck) -> None:
    """Stop a server that others could reach and anybody could use.

    Args:
        host: address it is about to bind.
        token: the check its requests will go through.

    Raises:
        ConfigError: the address is not loopback and there is no token.
    """
    if is_loopback(host) or token.required:
        return
    raise ConfigError(
        f'the server would bind {host} without a token, open to everybody who reaches it: '
        f'set {TOKEN_VARIABLE} in its environment, make a token with `finetuner token create`, or '
        'bind it to this machine alone with `host: 127.0.0.1` in the Flow'
    )
