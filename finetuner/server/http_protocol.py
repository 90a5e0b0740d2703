"""Time limits for HTTP clients that send slowly, or stop in the middle."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from finetuner.server.limits import least_bytes

_TOO_SLOW = (
    b'HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: text/plain\r\n'
    b'content-length: 27\r\n\r\nthe request came too slowly'
)


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that ends connections whose clients are too slow.

    Attributes:
        patience: seconds for the head of a request; and in which of its body must come what
            `least_bytes` says.
    """

    patience: float
    _timer: asyncio.TimerHandle | None = None
    _num_bytes = 0
    _num_bytes_then = 0

    def connection_made(self, transport: Any) -> None:
        """Expect a request."""
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and see what is owed still."""
        if self._timer is None:
            self._begin()
        self._num_bytes += len(data)
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle and self.conn.their_state is h11.SEND_BODY:
            self._begin()  # the body has a time of its own
        elif not self._is_waiting():
            self._end()

    def on_response_complete(self) -> None:
        """Begin with what waited behind the request that is answered, if something did."""
        cycle = self.cycle
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self.cycle is not cycle:
            # uvicorn's timer is for connections without a request: it would break this one
            self._unset_keepalive_if_required()
        if self._timer is None and self._is_waiting():
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._end()
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        """Whether the client owes the rest of a request."""
        state = self.conn.their_state
        return state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def _begin(self) -> None:
        self._end()
        self._num_bytes = self._num_bytes_then = 0
        self._timer = self.loop.call_later(self.patience, self._look)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        came = self._num_bytes - self._num_bytes_then
        is_slow = came < least_bytes(self._num_bytes, self.patience)
        # where reading has paused it is we who are slow
        if self.conn.their_state is h11.SEND_BODY and (self.flow.read_paused or not is_slow):
            self._num_bytes_then = self._num_bytes
            self._timer = self.loop.call_later(self.patience, self._look)
        elif not self.transport.is_closing():
            if (
                self.cycle is None
                or self.cycle.response_complete
                or (not self.cycle.response_started)
            ):
                self.transport.write(_TOO_SLOW)
            self.transport.close()


def protocol_with_patience(seconds: float) -> type[H11Protocol]:
    """A protocol for uvicorn, which itself bounds only the time between requests.

    Args:
        seconds: see `PatientProtocol.patience`.
    """
    return type('Protocol', (PatientProtocol,), {'patience': seconds})
