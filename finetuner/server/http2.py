"""Frames of HTTP/2 (RFC 9113), as few of them as the guard before gRPC reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
HEAD_BYTES = 9
DATA, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 8, 9
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
CANCEL = 8
# how much may be sent, on a connection and on each stream, before its receiver says anything
FIRST_WINDOW = 65_535
_INITIAL_WINDOW_SIZE = 4
# a frame that is no DATA is kept until it is whole. gRPC announces that it takes 4 MiB, and more
# where much comes; but of headers 16 KiB, and all others are smaller still
_MAX_WHOLE_BYTES = 1 << 16


class Frame(NamedTuple):
    """One that passed.

    Attributes:
        kind: number of it.
        flags: of the kind.
        stream: 0 for the connection.
        payload: of SETTINGS and of WINDOW_UPDATE, empty for all others.
    """

    kind: int
    flags: int
    stream: int
    payload: bytes


class PassingFrames:
    """Follows the frames of a peer that keeps to the rules, without keeping what is in them.

    Attributes:
        is_between: whether another frame may stand here.
    """

    def __init__(self) -> None:
        self.is_between = True
        self._left = 0  # bytes of the frame that is under way
        self._head = b''
        self._payload: bytearray | None = None
        self._is_in_headers = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes; yields the frames that begin in them, or end if their payload counts."""
        position = 0
        while position < len(data):
            if self._left:
                step = min(self._left, len(data) - position)
                if self._payload is not None:
                    self._payload += data[position : position + step]
                self._left -= step
                position += step
            else:
                missing = HEAD_BYTES - len(self._head)
                self._head += data[position : position + missing]
                position += missing
                if len(self._head) < HEAD_BYTES:
                    break
                self._left, kind, _, _ = read_head(self._head)
                self._payload = bytearray() if kind in (SETTINGS, WINDOW_UPDATE) else None
                if self._payload is None:
                    yield self._frame(b'')
            if not self._left:
                if self._payload is not None:
                    yield self._frame(bytes(self._payload))
                self._head, self._payload = b'', None
        self.is_between = not (self._left or self._head or self._is_in_headers)

    def _frame(self, payload: bytes) -> Frame:
        _, kind, flags, stream = read_head(self._head)
        if kind in (HEADERS, CONTINUATION):
            self._is_in_headers = not flags & END_HEADERS
        return Frame(kind, flags, stream, payload)


class OwnFrames:
    """Frames of a client, which may keep to no rules: whole ones, and DATA as it comes.

    Attributes:
        buffer: what is here and has not been taken.
        end: of the last frame that `whole` yielded.
        is_too_large: whether a frame has begun that is not kept until it is whole.
        is_in_headers: whether the frames of a header are not all here yet.
        late: seconds that a frame which must be kept, or a header, has been under way for, since
            the first `look` that saw it.
    """

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.end = 0
        self.is_too_large = False
        self.is_in_headers = False
        self.late = 0.0
        self._was_under_way = False

    def add(self, data: bytes) -> None:
        """Take what came."""
        self.buffer += data

    def take(self, num_bytes: int) -> None:
        """Let go of what has been handed on."""
        del self.buffer[:num_bytes]

    def look(self, seconds: float) -> None:
        """Count time.

        Of DATA nothing is kept for long, and its message has times of its own.

        Args:
            seconds: since it was last looked at.
        """
        is_data = len(self.buffer) >= HEAD_BYTES and self.buffer[3] == DATA
        is_under_way = self.is_in_headers or (bool(self.buffer) and not is_data)
        self.late = self.late + seconds if is_under_way and self._was_under_way else 0.0
        self._was_under_way = is_under_way

    def whole(self, least: int) -> Iterator[tuple[int, int, int, int, int]]:
        """The whole frames: where they begin, length, kind, flags and stream.

        Args:
            least: bytes of a frame of DATA that is not whole which are made a frame of their own.
        """
        position = self.end = 0
        while len(self.buffer) - position >= HEAD_BYTES:
            start = position + HEAD_BYTES
            length, kind, flags, stream = read_head(self.buffer[position:start])
            if len(self.buffer) - start < length:
                if kind != DATA:
                    self.is_too_large = length > _MAX_WHOLE_BYTES
                    return
                length, flags = self._split(position, least), flags & ~(END_STREAM | PADDED)
                if not length:
                    return
            if kind in (HEADERS, CONTINUATION):
                self.is_in_headers = not flags & END_HEADERS
            if not self.is_in_headers:
                self._was_under_way = False
            yield position, length, kind, flags, stream
            position = self.end = start + length

    def _split(self, position: int, least: int) -> int:
        """Make a frame of DATA of what is there of one; returns its length, 0 for none.

        Padding stays with the rest, so that the two take from the windows what the one would have.
        """
        start = position + HEAD_BYTES
        length, kind, flags, stream = read_head(self.buffer[position:start])
        padding = bytes(self.buffer[start : start + 1]) if flags & PADDED else b''
        there = len(self.buffer) - start - len(padding)
        if padding:
            there = min(there, length - 1 - padding[0])
        if there < least:
            return 0
        end = start + len(padding) + there
        self.buffer[end:end] = write_head(length - there, kind, flags, stream) + padding
        plain = flags & ~(END_STREAM | PADDED)
        self.buffer[position : start + len(padding)] = write_head(there, kind, plain, stream)
        return there


def read_window(settings: bytes) -> int | None:
    """What SETTINGS say that may be sent on a stream at first; None if they say nothing of it."""
    found = None
    for start in range(0, len(settings) - 5, 6):
        if int.from_bytes(settings[start : start + 2], 'big') == _INITIAL_WINDOW_SIZE:
            found = int.from_bytes(settings[start + 2 : start + 6], 'big')
    return found


def read_head(raw: bytes | bytearray) -> tuple[int, int, int, int]:
    """Length, kind, flags and stream of a frame.

    Args:
        raw: its first `HEAD_BYTES`.
    """
    length = raw[0] << 16 | raw[1] << 8 | raw[2]
    stream = int.from_bytes(raw[5:9], 'big') & 0x7FFFFFFF
    return length, raw[3], raw[4], stream


def write_head(length: int, kind: int, flags: int, stream: int) -> bytes:
    """What `read_head` reads."""
    return length.to_bytes(3, 'big') + bytes((kind, flags)) + stream.to_bytes(4, 'big')


def write_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A whole frame."""
    return write_head(len(payload), kind, flags, stream) + payload


def write_refusal(stream: int, has_begun: bool, status: int, text: str) -> bytes:
    """An error of gRPC, in header fields that leave HPACK's tables alone.

    No reset follows, though the client need not send more: it may be about to write, and gRPC's
    own clients take the write that a reset ends for the reason why the call did.

    Args:
        stream: whose call is refused.
        has_begun: whether its answer has.
        status: number of the error.
        text: for the client.
    """
    fields = b'' if has_begun else b'\x88' + _literal('content-type', 'application/grpc')
    fields += _literal('grpc-status', str(status))
    fields += _literal('grpc-message', quote(text, safe=' '))
    return write_frame(HEADERS, END_STREAM | END_HEADERS, stream, fields)


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
