"""Frames of HTTP/2 (RFC 9113), as few of them as the guard before gRPC reads and writes."""

from __future__ import annotations

from urllib.parse import quote

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
HEAD_BYTES = 9
DATA, HEADERS, RST_STREAM, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 8, 9
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
CANCEL = 8


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
    """An error of gRPC, in header fields that leave HPACK's tables alone, and a reset.

    Args:
        stream: whose call is refused.
        has_begun: whether its answer has.
        status: number of the error.
        text: for the client.
    """
    fields = b'' if has_begun else b'\x88' + _literal('content-type', 'application/grpc')
    fields += _literal('grpc-status', str(status))
    fields += _literal('grpc-message', quote(text, safe=' '))
    answer = write_frame(HEADERS, END_STREAM | END_HEADERS, stream, fields)
    return answer + write_frame(RST_STREAM, 0, stream, bytes(4))


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
