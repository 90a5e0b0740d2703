"""Keeps messages that are too large or too slow from gRPC, which looks at their size when it has them in memory.

gRPC's server reads a message whole before it compares its length with the most it may have. So
connections come in here, where the frames of HTTP/2 are looked at and handed on as they are; only
of a message that announces too many bytes nothing is, and its call is answered instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from typing import NamedTuple

from finetuner.server.http2 import (
    CANCEL,
    DATA,
    END_STREAM,
    FIRST_WINDOW,
    HEAD_BYTES,
    HEADERS,
    PADDED,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    OwnFrames,
    PassingFrames,
    read_window,
    write_frame,
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
                client.look(asyncio.get_running_loop().time())

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
        self._frames = PassingFrames()
        self._has_settings = False  # with which a server must begin
        self._ours: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self._client.write(data)
        for frame in self._frames.feed(data):
            self._has_settings = True
            self._client.note(frame)
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
        if self._ours and self._has_settings and self._frames.is_between:
            self._client.write(b''.join(self._ours))
            self._ours.clear()


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
        looked_at: when it was last seen to grow, on the clock of the event loop; the time in which
            the server took nothing of it is left out.
        held_then: bytes that were there.
        head: what is there of the next message's head.
        has_answer: whether the server has begun to answer.
        window: bytes that the server allowed, less those that came; what it allows each stream at
            first comes on top.
    """

    left: int = 0
    held: int = 0
    looked_at: float = 0.0
    held_then: int = 0
    head: bytes = b''
    has_answer: bool = False
    window: int = 0


class _ClientSide(Side):
    """What comes from a client: frames, of which those of too large messages stop here."""

    def __init__(self, path: str, guard: GrpcGuard) -> None:
        super().__init__()
        self._path = path
        self._guard = guard
        self._server = _ServerSide(self)
        self._connecting: asyncio.Task | None = None
        self._frames = OwnFrames()
        self._has_preface = False
        self._streams: dict[int, _Stream] = {}  # those that the server knows and has not ended
        self._last_stream = 0
        self._refused: dict[int, None] = {}
        self._window = self._first_window = FIRST_WINDOW  # of the connection, of each stream
        self._looked_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._guard.clients.add(self)
        self._looked_at = asyncio.get_running_loop().time()
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
        self._frames.add(data)
        if self.other is not None:
            self._hand_on()
        elif self.transport is not None:
            # uvloop reads on after `connection_made`, whatever was said there
            self.transport.pause_reading()

    def _hand_on(self, least: int = _READ_BYTES) -> None:
        """Hand on what is there; of DATA that is not whole, if there is as much as `least`."""
        frames = self._frames
        if not self._has_preface:
            if len(frames.buffer) < len(PREFACE):
                return
            self._has_preface = True
            self._server.write(bytes(frames.buffer[: len(PREFACE)]))
            frames.take(len(PREFACE))
        passed = 0
        for start, length, kind, flags, stream in frames.whole(least):
            if kind == HEADERS:
                self._open(stream)
            elif kind == RST_STREAM:
                self.forget(stream)
            if kind != DATA:
                continue
            self._window -= length
            fault = None
            if stream not in self._refused:
                fault = self._follow(start, length, flags, stream)
                if fault is None:
                    continue
            # what was fine before goes on; this frame does not
            self._server.write(bytes(frames.buffer[passed:start]))
            passed = start + HEAD_BYTES + length
            self._drop(length, flags, stream, fault)
        if frames.end > passed:
            self._server.write(bytes(frames.buffer[passed : frames.end]))
        frames.take(frames.end)
        if frames.is_too_large:
            self.close()

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
        known.window -= length
        position, end = start + HEAD_BYTES, start + HEAD_BYTES + length
        if flags & PADDED and length:
            end -= self._frames.buffer[position]
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
                continue
            missing = _MESSAGE_HEAD_BYTES - len(known.head)
            known.head += bytes(self._frames.buffer[position : min(position + missing, end)])
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

    def look(self, now: float) -> None:
        """End what stands still.

        Args:
            now: on the clock of the event loop.
        """
        seconds, self._looked_at = now - self._looked_at, now
        if self.other is None:
            return
        if self.is_paused:  # it is we who are slow
            for known in self._streams.values():
                known.looked_at += seconds
            return
        self._hand_on(1)
        self._frames.look(min(seconds, 2 * _LOOK_SECONDS))  # we may have been held up ourselves
        if self.transport is not None and (
            self._frames.late > self._guard.limits.slow_client_seconds
        ):
            self.transport.abort()  # `close` waits for what such a client need not read
        elif not self._frames.is_in_headers:  # where no frame of ours may stand
            self._end_slow(now, seconds)

    def _end_slow(self, now: float, passed: float) -> None:
        """Refuse messages that stand still, but for those that the server leaves where they are."""
        for stream, known in list(self._streams.items()):
            if not known.left:
                continue
            if self._window <= 0 or self._first_window + known.window <= 0:
                known.looked_at += passed
                continue
            seconds = now - known.looked_at
            if seconds < self._guard.limits.slow_client_seconds:
                continue
            if known.held - known.held_then < least_bytes(known.held, seconds):
                self._drop(0, 0, stream, _Fault(_DEADLINE, _TOO_SLOW))
            known.looked_at, known.held_then = now, known.held

    def _drop(self, length: int, flags: int, stream: int, fault: _Fault | None) -> None:
        """Give back the window that a frame took, and answer its call if it is the first."""
        if length:
            self._window += length
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

    def note(self, frame: Frame) -> None:
        """A frame of the server's is on its way to the client."""
        kind, flags, stream, payload = frame
        known = self._streams.get(stream)
        if kind == HEADERS and known is not None:
            known.has_answer = True
        elif kind == SETTINGS:
            window = read_window(payload)
            self._first_window = self._first_window if window is None else window
        elif kind == WINDOW_UPDATE:
            num_bytes = int.from_bytes(payload, 'big')
            if not stream:
                self._window += num_bytes
            elif known is not None:
                known.window += num_bytes
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self.forget(stream)

    def forget(self, stream: int) -> None:
        """The client or the server ended a stream."""
        ended = self._streams.pop(stream, None)
        if ended is not None:
            self._let_go(ended)
        self._refused.pop(stream, None)
