"""Who may ask: the bearer token, and the addresses a server may bind without one."""

from __future__ import annotations

import hmac
import ipaddress
import os

from finetuner.excepts import ConfigError

TOKEN_VARIABLE = 'FINETUNER_TOKEN'
DENIED = (
    'this server wants a token: send it as `Authorization: Bearer <token>` '
    '(HTTP header, or `authorization` in the gRPC metadata)'
)


class TokenCheck:
    """Compares the `Authorization` of a request with the server's token, in constant time."""

    def __init__(self, token: str | None) -> None:
        """Keep the token.

        Args:
            token: what requests must carry; None or empty lets everybody in.
        """
        self._expected = f'Bearer {token}'.encode() if token else None

    @classmethod
    def from_environment(cls) -> TokenCheck:
        """Take the token from FINETUNER_TOKEN."""
        return cls(os.environ.get(TOKEN_VARIABLE))

    @property
    def required(self) -> bool:
        """Whether requests need a token at all."""
        return self._expected is not None

    def admits(self, authorization: str | bytes | None) -> bool:
        """Whether a request with this `Authorization` may go on."""
        if self._expected is None:
            return True
        given = authorization or b''
        if isinstance(given, str):
            given = given.encode('utf-8', 'surrogateescape')
        return hmac.compare_digest(given, self._expected)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == 'localhost':
        return True
    try:
        return ipaddress.ip_address(host.strip('[]')).is_loopback
    except ValueError:
        return False


def refuse_open_server(host: str, token: TokenCheck) -> None:
    """Stop a server that others could reach and anybody could use.

    Args:
        host: address it is about to bind.
        token: the check its requests will go through.

    Raises:
        ConfigError: the address is not loopback and no token is set.
    """
    if token.required or is_loopback(host):
        return
    raise ConfigError(
        f'the server would bind {host} without a token, open to everybody who reaches it: '
        f'set {TOKEN_VARIABLE} in its environment, or bind it to this machine alone with '
        '`host: 127.0.0.1` in the Flow'
    )
