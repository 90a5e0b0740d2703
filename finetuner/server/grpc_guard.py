"""Keeps messages that are too large from gRPC, which looks at their size when it has them in memory.

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
from typing import cast
from urllib.parse import quote

_PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
_HEAD_BYTES = 9
_DATA, _HEADERS, _RST_STREAM, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 8, 9
_END_STREAM, _END_HEADERS, _PADDED = 1, 4, 8
_CANCEL = 8
_MESSAGE_HEAD_BYTES = 5
_READ_BYTES = 1 << 16
# DATA goes on in pieces; of other frames gRPC takes none that is as large, and one is kept here
_MAX_WHOLE_BYTES = 1 << 20
# gRPC announces streams up to `grpc.max_concurrent_streams` of the gateway, which are fewer
_MAX_STREAMS = 4_000
# of refused ones so many are remembered: what still comes of others gRPC throws away itself
_MAX_REFUSED = 1_000


class GrpcGuard:
    """Listens where the gRPC server would, and hands on to where it does.

    Args:
        max_bytes: of a message.
        refusal: text for the client whose message is larger.
    """

    def __init__(self, max_bytes: int, refusal: str) -> None:
        self._max_bytes = max_bytes
        self._refusal = refusal
        self._server: asyncio.Server | None = None
        self._clients: set[_ClientSide] = set()

    async def start(self, host: str, port: int, path: str) -> None:
        """Listen.

        Args:
            host: to bind.
            port: to bind.
            path: of the Unix socket of the gRPC server.
        """
        loop = asyncio.get_running_loop()

        def build() -> asyncio.Protocol:
            return _ClientSide(path, self._max_bytes, self._refusal, self._clients)

        self._server = await loop.create_server(build, host, port)

    async def refuse_new(self) -> None:
        """Take no new connections; those there are stay."""
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Let go of all connections, once what is written to them has left."""
        await self.refuse_new()
        for client in list(self._clients):
            client.close()


class _Side(asyncio.Protocol):
    """One of the two ends of a connection."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are not of asyncio's classes
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            with contextlib.suppress(RuntimeError):  # it is closing
                self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            with contextlib.suppress(RuntimeError):
                self.other.transport.resume_reading()

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class _ServerSide(_Side):
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
            missing = _HEAD_BYTES - len(self._head)
            self._head += data[position : position + missing]
            position += missing
            if len(self._head) == _HEAD_BYTES:
                length, kind, flags, stream = _read_head(self._head)
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
        if kind in (_HEADERS, _CONTINUATION):
            self._is_in_headers = not flags & _END_HEADERS
        if kind == _HEADERS:
            self._client.note_answer(stream)
        if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            self._client.forget(stream)


@dataclass(slots=True)
class _Stream:
    """One that a client opened.

    Attributes:
        left: bytes that are missing of its message.
        head: what is there of the next message's head.
        has_answer: whether the server has begun to answer.
    """

    left: int = 0
    head: bytes = b''
    has_answer: bool = False


class _ClientSide(_Side):
    """What comes from a client: frames, of which those of too large messages stop here."""

    def __init__(self, path: str, max_bytes: int, refusal: str, clients: set[_ClientSide]) -> None:
        super().__init__()
        self._path = path
        self._max_bytes = max_bytes
        self._refusal = refusal
        self._clients = clients
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
        self._clients.add(self)
        if self.transport is not None:
            self.transport.pause_reading()
        self._connecting = asyncio.ensure_future(self._connect())

    def connection_lost(self, error: Exception | None) -> None:
        self._clients.discard(self)
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
            if len(self._buffer) < len(_PREFACE):
                return
            self._has_preface = True
            self._pass_on(len(_PREFACE))
        passed = 0
        for start, length, kind, flags, stream in self._frames():
            end = start + _HEAD_BYTES + length
            if kind != _DATA:
                if kind == _HEADERS:
                    self._open(stream)
                elif kind == _RST_STREAM:
                    self.forget(stream)
                continue
            if stream not in self._refused and self._is_fine(start, length, flags, stream):
                continue
            # what was fine before goes on; this frame does not
            self._server.write(bytes(self._buffer[passed:start]))
            passed = end
            self._drop(length, flags, stream)
        if self._end_of_frames > passed:
            self._server.write(bytes(self._buffer[passed : self._end_of_frames]))
        del self._buffer[: self._end_of_frames]

    def _frames(self) -> Iterator[tuple[int, int, int, int, int]]:
        """The whole frames in the buffer; DATA that is long is made into several."""
        position = self._end_of_frames = 0
        while len(self._buffer) - position >= _HEAD_BYTES:
            start = position + _HEAD_BYTES
            length, kind, flags, stream = _read_head(self._buffer[position:start])
            there = len(self._buffer) - start
            if there < length:
                if kind != _DATA or flags & _PADDED:
                    if length > _MAX_WHOLE_BYTES:
                        self.close()
                    return
                if there < _READ_BYTES:
                    return
                self._buffer[position:start] = _head(there, kind, flags & ~_END_STREAM, stream)
                self._buffer += _head(length - there, kind, flags, stream)
                length, flags = there, flags & ~_END_STREAM
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

    def _is_fine(self, start: int, length: int, flags: int, stream: int) -> bool:
        """Follow the messages of a stream; false where one is too large."""
        known = self._streams.get(stream)
        if known is None:  # gRPC throws away what comes of streams that it does not know
            return True
        position, end = start + _HEAD_BYTES, start + _HEAD_BYTES + length
        if flags & _PADDED and length:
            end -= self._buffer[position]
            position += 1
        while position < end:
            if known.left:
                step = min(known.left, end - position)
                known.left -= step
                position += step
                continue
            missing = _MESSAGE_HEAD_BYTES - len(known.head)
            known.head += bytes(self._buffer[position : min(position + missing, end)])
            position += missing
            if len(known.head) == _MESSAGE_HEAD_BYTES:
                known.left = int.from_bytes(known.head[1:], 'big')
                known.head = b''
                if known.left > self._max_bytes:
                    return False
        return True

    def _drop(self, length: int, flags: int, stream: int) -> None:
        """Give back the window that a frame took, and answer its call if it is the first."""
        if length:
            self._server.insert(_frame(_WINDOW_UPDATE, 0, 0, length.to_bytes(4, 'big')))
        if stream not in self._refused:
            refused = self._streams.pop(stream)
            self._refused[stream] = None
            if len(self._refused) > _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._server.write(_frame(_RST_STREAM, 0, stream, _CANCEL.to_bytes(4, 'big')))
            self._server.insert(_refusal(stream, refused.has_answer, self._refusal))
        if flags & _END_STREAM:
            self._refused.pop(stream, None)

    def note_answer(self, stream: int) -> None:
        """The server has begun to answer."""
        if stream in self._streams:
            self._streams[stream].has_answer = True

    def forget(self, stream: int) -> None:
        """The client or the server ended a stream."""
        self._streams.pop(stream, None)
        self._refused.pop(stream, None)

    def _pass_on(self, num_bytes: int) -> None:
        self._server.write(bytes(self._buffer[:num_bytes]))
        del self._buffer[:num_bytes]


def _read_head(head: bytes | bytearray) -> tuple[int, int, int, int]:
    length = head[0] << 16 | head[1] << 8 | head[2]
    stream = int.from_bytes(head[5:9], 'big') & 0x7FFFFFFF
    return length, head[3], head[4], stream


def _head(length: int, kind: int, flags: int, stream: int) -> bytes:
    return length.to_bytes(3, 'big') + bytes((kind, flags)) + stream.to_bytes(4, 'big')


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _head(len(payload), kind, flags, stream) + payload


def _refusal(stream: int, has_begun: bool, text: str) -> bytes:
    """RESOURCE_EXHAUSTED, in header fields that leave HPACK's tables alone, and a reset."""
    fields = b'' if has_begun else b'\x88' + _literal('content-type', 'application/grpc')
    fields += _literal('grpc-status', '8') + _literal('grpc-message', quote(text, safe=' '))
    return _frame(_HEADERS, _END_STREAM | _END_HEADERS, stream, fields) + _frame(
        _RST_STREAM, 0, stream, bytes(4)
    )


def _literal(name: str, value: str) -> bytes:
    return b'\x00' + _text(name) + _text(value)


def _text(text: str) -> bytes:
    raw = text.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest, length = len(raw) - 127, b'\x7f'
    while rest >= 128:
        length += bytes((rest & 0x7F | 0x80,))
        rest >>= 7
    return length + bytes((rest,)) + raw
