"""What the gateway takes at most: of bytes, Documents, requests at once, and time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from finetuner.config import whole_number
from finetuner.excepts import ConfigError, TooLargeError, TooManyRequestsError
from finetuner.server.calls import Call

# gRPC counts message sizes in an int of 32 bits
_MOST_MB = 2047.0
_WHOLE = ('max_documents', 'max_requests')
_RETRY_SECONDS = 1.0
# as Apache's mod_reqtimeout
_BYTES_A_SECOND = 500
# what is there must not be held by a trickle: it would have come in so many seconds
_MOST_SECONDS = 900
# but this is enough for whatever goes to the disk
_ENOUGH_A_SECOND = 1 << 16
TOO_MUCH_AT_ONCE = (
    'the requests that are here take as much memory as they may together (`max_total_mb` of the '
    'gateway)'
)


@dataclass(frozen=True)
class Limits:
    """Options of the gateway, `uses_with` in a Flow's YAML.

    Attributes:
        max_request_mb: size of one request; a larger one is refused before it is read.
        max_total_mb: size of all requests that are here at the same time, over all clients; one
            that does not fit is refused for the time being. At least one of `max_request_mb` fits.
        max_documents: of one request, those within others not counted.
        max_requests: answered at the same time, over all clients.
        request_seconds: until a request for embeddings or for a search is given up.
        slow_client_seconds: in which the head of an HTTP request must be here; and in each of such
            times so much of its body, or of a message over gRPC, as `least_bytes` says.
        drain_seconds: from the signal to end until new requests are refused; readiness is false
            at once, and whoever spreads requests over servers needs time to see it.
        drain_limit_seconds: from then on, for the requests that still run.
    """

    max_request_mb: float = 128
    max_total_mb: float = 1024
    max_documents: int = 10_000
    max_requests: int = 1_000
    request_seconds: float = 300
    slow_client_seconds: float = 20
    drain_seconds: float = 0.2
    drain_limit_seconds: float = 30

    def __post_init__(self) -> None:
        """Refuse what is no number, or out of range.

        Raises:
            ConfigError: see above.
        """
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            least = 0.0 if name == 'drain_seconds' else math.ulp(0.0)
            most = _MOST_MB if name == 'max_request_mb' else math.inf
            kind = 'whole number' if name in _WHOLE else 'number'
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f'{name} is {value!r}: it takes a {kind}')
            if not (least <= value <= most) or value == math.inf:
                allowed = f'from 0 to {most:g}' if most < math.inf else 'of 0 or more'
                above = '' if least == 0 else ', 0 itself not allowed'
                raise ConfigError(f'{name} is {value!r}: it takes a {kind} {allowed}{above}')
            if name in _WHOLE:
                try:
                    object.__setattr__(self, name, whole_number(value))
                except ValueError as error:
                    raise ConfigError(f'{name} is {value!r}: it takes a {kind}') from error

    @property
    def max_request_bytes(self) -> int:
        """`max_request_mb` in bytes."""
        return int(self.max_request_mb * (1 << 20))

    @property
    def max_total_bytes(self) -> int:
        """`max_total_mb` in bytes."""
        return max(self.max_request_bytes, int(self.max_total_mb * (1 << 20)))

    @property
    def too_large(self) -> str:
        """What a client is told whose request has too many bytes."""
        return (
            f'the request is larger than the {self.max_request_mb:g} MiB that this server takes: '
            'send fewer Documents at a time (`max_request_mb` of the gateway)'
        )

    def check_bytes(self, num_bytes: int) -> None:
        """Refuse a request that is too large.

        Raises:
            TooLargeError: it is.
        """
        if num_bytes > self.max_request_bytes:
            raise TooLargeError(self.too_large)

    def check_documents(self, num_documents: int) -> None:
        """Refuse a request of too many Documents.

        Raises:
            TooLargeError: it has.
        """
        if num_documents > self.max_documents:
            raise TooLargeError(
                f'the request has {num_documents:,} Documents, and this server takes '
                f'{self.max_documents:,} at a time: send it in parts '
                '(`request_size` of jina.Client; `max_documents` of the gateway)'
            )

    def until(self, seconds: float | None) -> float:
        """When a request must have been answered, on the clock `time.monotonic`.

        Args:
            seconds: that its client waits, None if it said nothing.
        """
        allowed = self.request_seconds if seconds is None else min(seconds, self.request_seconds)
        return time.monotonic() + allowed


def least_bytes(num_bytes: int, seconds: float) -> float:
    """How much must have come for a client not to be too slow.

    Args:
        num_bytes: that are here of what it sends.
        seconds: since it was last looked at.
    """
    return seconds * max(_BYTES_A_SECOND, min(_ENOUGH_A_SECOND, num_bytes / _MOST_SECONDS))


class ByteBudget:
    """Memory for requests that are here at the same time, over all clients.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes that are taken."""
        return self._held

    def take(self, num_bytes: int) -> bool:
        """Hold bytes; false, and nothing held, where there are not as many."""
        if self._held + num_bytes > self._most:
            return False
        self._held += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """Let go of bytes that were taken."""
        self._held -= num_bytes

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Hold bytes for a while.

        Raises:
            TooManyRequestsError: there are not as many.
        """
        self.take_or_refuse(num_bytes)
        try:
            yield
        finally:
            self.give_back(num_bytes)

    def take_or_refuse(self, num_bytes: int) -> None:
        """Hold bytes.

        Raises:
            TooManyRequestsError: there are not as many.
        """
        if not self.take(num_bytes):
            raise TooManyRequestsError(TOO_MUCH_AT_ONCE, _RETRY_SECONDS)


class Slots:
    """Places for requests that are being answered; there is no queue before them.

    Args:
        limit: how many.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._empty = asyncio.Event()
        self._empty.set()
        self.in_flight = 0
        self.is_closed = False

    @contextmanager
    def taken_for(self, call: Call) -> Iterator[None]:
        """Hold a place, unless the call has one already.

        Raises:
            TooManyRequestsError: all are taken, or the server is about to end.
        """
        if call.has_slot:
            yield
            return
        if self.is_closed and call.protocol == 'http':  # gRPC itself lets no new calls in
            raise TooManyRequestsError('this server is about to end', _RETRY_SECONDS)
        if self.in_flight >= self._limit:
            raise TooManyRequestsError(
                f'the server answers {self._limit:,} requests already, as many as it may at once '
                '(`max_requests` of the gateway)',
                _RETRY_SECONDS,
            )
        self.in_flight += 1
        self._empty.clear()
        call.has_slot = True
        try:
            yield
        finally:
            call.has_slot = False
            self.in_flight -= 1
            if not self.in_flight:
                self._empty.set()

    async def empty(self, seconds: float) -> bool:
        """Wait until nothing is being answered, at most so long; whether that is so."""
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True
