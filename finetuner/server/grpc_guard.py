"""Keeps messages that are too large or too slow from gRPC, which looks at their size when it has them in memory.

gRPC's server reads a message whole before it compares its length with the most it may have. So
connections come in here, where the frames of HTTP/2 are looked at and handed on as they are; only
of a message that announces too many bytes nothing is, and its call is answered instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from finetuner.server.http2 import (
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEAD_BYTES,
    HEADERS,
    PADDED,
    PREFACE,
    RST_STREAM,
    WINDOW_UPDATE,
    read_head,
    write_frame,
    write_head,
    write_refusal,
)
from finetuner.server.limits import TOO_MUCH_AT_ONCE, ByteBudget, Limits, least_bytes
from finetuner.server.relay import Side

_MESSAGE_HEAD_BYTES = 5
_READ_BYTES = 1 << 16
# numbers of gRPC
_DEADLINE, _EXHAUSTED = 4, 8
_TOO_SLOW = 'the message came too slowly'
_LOOK_SECONDS = 0.5
# DATA goes on in pieces; of other frames gRPC takes none that is as large, and one is kept here
_MAX_WHOLE_BYTES = 1 << 20
# gRPC announces streams up to `grpc.max_concurrent_streams` of the gateway, which are fewer
_MAX_STREAMS = 4_000
# of refused ones so many are remembered: what still comes of others gRPC throws away itself
_MAX_REFUSED = 1_000


class GrpcGuard:
    """Listens where the gRPC server would, and hands on to where it does.

    Args:
        limits: of messages.
        budget: for the messages of all clients that are not whole yet.
    """

    def __init__(self, limits: Limits, budget: ByteBudget) -> None:
        self.limits = limits
        self.budget = budget
        self._watching: asyncio.Task | None = None
        self._server: asyncio.Server | None = None
        self.clients: set[_ClientSide] = set()

    async def start(self, host: str, port: int, path: str) -> None:
        """Listen.

        Args:
            host: to bind.
            port: to bind.
            path: of the Unix socket of the gRPC server.
        """
        loop = asyncio.get_running_loop()

        def build() -> asyncio.Protocol:
            return _ClientSide(path, self)

        self._server = await loop.create_server(build, host, port)
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for client in list(self.clients):
                client.end_slow(asyncio.get_running_loop().time())

    async def refuse_new(self) -> None:
        """Take no new connections; those there are stay."""
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Let go of all connections, once what is written to them has left."""
        await self.refuse_new()
        if self._watching is not None:
            self._watching.cancel()
        for client in list(self.clients):
            client.close()


class _ServerSide(Side):
    """What comes from the gRPC server: handed on; between its frames there is room for ours."""

    def __init__(self, client: _ClientSide) -> None:
        super().__init__()
        self.other = client
        self._client = client
        self._left = 0  # bytes of the frame that is under way
        self._head = b''
        self._is_in_headers = False
        self._has_settings = False  # with which a server must begin
        self._ours: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self._client.write(data)
        position = 0
        while position < len(data):
            if self._left:
                step = min(self._left, len(data) - position)
                self._left -= step
                position += step
                continue
            missing = HEAD_BYTES - len(self._head)
            self._head += data[position : position + missing]
            position += missing
            if len(self._head) == HEAD_BYTES:
                length, kind, flags, stream = read_head(self._head)
                self._head = b''
                self._left = length
                self._note(kind, flags, stream)
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        """The server closed: the end of its last answer may be here still.

        Where a frame of the client finds the connection closed, asyncio drops what is unread.
        """
        if error is not None and self.transport is not None:
            with contextlib.suppress(OSError):  # nothing is there, or even the socket is gone
                descriptor = self.transport.get_extra_info('socket').fileno()
                while rest := os.read(descriptor, _READ_BYTES):
                    self.data_received(rest)
        super().connection_lost(error)

    def insert(self, frames: bytes) -> None:
        """Write frames of ours to the client, as soon as they may stand there."""
        self._ours.append(frames)
        self._flush()

    def _flush(self) -> None:
        is_between = self._has_settings and not (self._left or self._head or self._is_in_headers)
        if self._ours and is_between:
            self._client.write(b''.join(self._ours))
            self._ours.clear()

    def _note(self, kind: int, flags: int, stream: int) -> None:
        self._has_settings = True
        if kind in (HEADERS, CONTINUATION):
            self._is_in_headers = not flags & END_HEADERS
        if kind == HEADERS:
            self._client.note_answer(stream)
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self._client.forget(stream)


class _Fault(NamedTuple):
    """Why a call is refused: gRPC's number, and a text for the client."""

    status: int
    text: str


@dataclass(slots=True)
class _Stream:
    """One that a client opened.

    Attributes:
        left: bytes that are missing of its message.
        held: bytes that are there of it.
        is_first: whether it is the first; gRPC may leave later ones until there is time for them.
        looked_at: when it was last seen to grow, on the clock of the event loop.
        held_then: bytes that were there.
        head: what is there of the next message's head.
        has_answer: whether the server has begun to answer.
    """

    left: int = 0
    held: int = 0
    is_first: bool = True
    looked_at: float = 0.0
    held_then: int = 0
    head: bytes = b''
    has_answer: bool = False


class _ClientSide(Side):
    """What comes from a client: frames, of which those of too large messages stop here."""

    def __init__(self, path: str, guard: GrpcGuard) -> None:
        super().__init__()
        self._path = path
        self._guard = guard
        self._server = _ServerSide(self)
        self._connecting: asyncio.Task | None = None
        self._buffer = bytearray()
        self._has_preface = False
        self._streams: dict[int, _Stream] = {}  # those that the server knows and has not ended
        self._last_stream = 0
        self._end_of_frames = 0
        self._refused: dict[int, None] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._guard.clients.add(self)
        if self.transport is not None:
            self.transport.pause_reading()
        self._connecting = asyncio.ensure_future(self._connect())

    def connection_lost(self, error: Exception | None) -> None:
        self._guard.clients.discard(self)
        for stream in self._streams.values():
            self._guard.budget.give_back(stream.held)
        self._streams.clear()
        super().connection_lost(error)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: self._server, self._path)
        except OSError:
            self.close()
            return
        self.other = self._server
        if self.transport is None or self.transport.is_closing():
            self._server.close()
            return
        self.transport.resume_reading()
        self._hand_on()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self.other is not None:
            self._hand_on()
        elif self.transport is not None:
            # uvloop reads on after `connection_made`, whatever was said there
            self.transport.pause_reading()

    def _hand_on(self) -> None:
        if not self._has_preface:
            if len(self._buffer) < len(PREFACE):
                return
            self._has_preface = True
            self._pass_on(len(PREFACE))
        passed = 0
        for start, length, kind, flags, stream in self._frames():
            end = start + HEAD_BYTES + length
            if kind != DATA:
                if kind == HEADERS:
                    self._open(stream)
                elif kind == RST_STREAM:
                    self.forget(stream)
                continue
            fault = None
            if stream not in self._refused:
                fault = self._follow(start, length, flags, stream)
                if fault is None:
                    continue
            # what was fine before goes on; this frame does not
            self._server.write(bytes(self._buffer[passed:start]))
            passed = end
            self._drop(length, flags, stream, fault)
        if self._end_of_frames > passed:
            self._server.write(bytes(self._buffer[passed : self._end_of_frames]))
        del self._buffer[: self._end_of_frames]

    def _frames(self) -> Iterator[tuple[int, int, int, int, int]]:
        """The whole frames in the buffer; DATA that is long is made into several."""
        position = self._end_of_frames = 0
        while len(self._buffer) - position >= HEAD_BYTES:
            start = position + HEAD_BYTES
            length, kind, flags, stream = read_head(self._buffer[position:start])
            there = len(self._buffer) - start
            if there < length:
                if kind != DATA or flags & PADDED:
                    if length > _MAX_WHOLE_BYTES:
                        self.close()
                    return
                if there < _READ_BYTES:
                    return
                self._buffer[position:start] = write_head(there, kind, flags & ~END_STREAM, stream)
                self._buffer += write_head(length - there, kind, flags, stream)
                length, flags = there, flags & ~END_STREAM
            yield position, length, kind, flags, stream
            position = self._end_of_frames = start + length

    def _open(self, stream: int) -> None:
        """Follow a stream, if it is a new one: gRPC ignores all others, and so must we."""
        if stream <= self._last_stream or not stream % 2:
            return
        self._last_stream = stream
        self._streams[stream] = _Stream()
        if len(self._streams) > _MAX_STREAMS:
            self.close()

    def _follow(self, start: int, length: int, flags: int, stream: int) -> _Fault | None:
        """Follow the messages of a stream; returns why one cannot be taken, if so."""
        known = self._streams.get(stream)
        if known is None:  # gRPC throws away what comes of streams that it does not know
            return None
        position, end = start + HEAD_BYTES, start + HEAD_BYTES + length
        if flags & PADDED and length:
            end -= self._buffer[position]
            position += 1
        while position < end:
            if known.left:
                step = min(known.left, end - position)
                if not self._guard.budget.take(step):
                    return _Fault(_EXHAUSTED, TOO_MUCH_AT_ONCE)
                known.left -= step
                known.held += step
                position += step
                if not known.left:  # gRPC has it, and hands it to who counts it again
                    self._let_go(known)
                    known.is_first = False
                continue
            missing = _MESSAGE_HEAD_BYTES - len(known.head)
            known.head += bytes(self._buffer[position : min(position + missing, end)])
            position += missing
            if len(known.head) == _MESSAGE_HEAD_BYTES:
                known.left = int.from_bytes(known.head[1:], 'big')
                known.head = b''
                if known.left > self._guard.limits.max_request_bytes:
                    return _Fault(_EXHAUSTED, self._guard.limits.too_large)
                known.looked_at = asyncio.get_running_loop().time()
        return None

    def _let_go(self, stream: _Stream) -> None:
        self._guard.budget.give_back(stream.held)
        stream.held = stream.held_then = 0

    def end_slow(self, now: float) -> None:
        """Refuse messages that stand still.

        Args:
            now: on the clock of the event loop.
        """
        limits = self._guard.limits
        for stream, known in list(self._streams.items()):
            patience = limits.slow_client_seconds
            if not known.is_first:
                patience += limits.request_seconds
            seconds = now - known.looked_at
            if not known.left or seconds < patience:
                continue
            is_slow = known.held - known.held_then < least_bytes(known.held, seconds)
            if is_slow and not self.is_paused:
                self._drop(0, 0, stream, _Fault(_DEADLINE, _TOO_SLOW))
            known.looked_at, known.held_then = now, known.held

    def _drop(self, length: int, flags: int, stream: int, fault: _Fault | None) -> None:
        """Give back the window that a frame took, and answer its call if it is the first."""
        if length:
            self._server.insert(write_frame(WINDOW_UPDATE, 0, 0, length.to_bytes(4, 'big')))
        if fault is not None:
            refused = self._streams.pop(stream)
            self._let_go(refused)
            self._refused[stream] = None
            if len(self._refused) > _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._server.write(write_frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4, 'big')))
            self._server.insert(write_refusal(stream, refused.has_answer, *fault))
        if flags & END_STREAM:
            self._refused.pop(stream, None)

    def note_answer(self, stream: int) -> None:
        """The server has begun to answer."""
        if stream in self._streams:
            self._streams[stream].has_answer = True

    def forget(self, stream: int) -> None:
        """The client or the server ended a stream."""
        ended = self._streams.pop(stream, None)
        if ended is not None:
            self._let_go(ended)
        self._refused.pop(stream, None)

    def _pass_on(self, num_bytes: int) -> None:
        self._server.write(bytes(self._buffer[:num_bytes]))
        del self._buffer[:num_bytes]
