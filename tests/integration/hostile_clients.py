"""Clients that keep no manners: messages without end, slow ones, broken ones."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator

import psutil

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8


def family(process: int) -> list[psutil.Process]:
    return [psutil.Process(process), *psutil.Process(process).children(recursive=True)]


def memory(process: int) -> int:
    """Bytes that a server and all its processes have in memory."""
    total = 0
    for one in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total


def connect(port: int) -> socket.socket:
    return socket.create_connection(('127.0.0.1', port), timeout=30)


def post_without_end(port: int, total: int, goes_on: Callable[[], bool], chunked: bool) -> bytes:
    """Send a body of so many bytes over HTTP; what comes back, b'' where the connection broke."""
    length = 'Transfer-Encoding: chunked' if chunked else f'Content-Length: {total}'
    head = f'POST /encode HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n'
    piece = b' ' * (1 << 20)
    framed = b'%x\r\n%b\r\n' % (len(piece), piece) if chunked else piece
    with connect(port) as out:
        out.sendall(f'{head}{length}\r\n\r\n'.encode())
        sent = 0
        with contextlib.suppress(OSError):
            while sent < total and goes_on():
                out.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if answer := out.recv(65536):
                        return answer
                    return b''
                out.settimeout(30)
                out.sendall(framed)
                sent += len(piece)
        with contextlib.suppress(OSError):
            if goes_on():
                return out.recv(65536)
    return b''


def frame(kind: int, flags: int, stream: int, payload: bytes = b'') -> bytes:
    return struct.pack('>I', len(payload))[1:] + struct.pack('>BBI', kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header as HPACK writes it when it remembers nothing."""
    assert len(value) < 127
    return b'\0' + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def grpc_head(
    stream: int,
    *more: tuple[str, str],
    end: bool = False,
    path: str = '/jina.JinaSingleDataRequestRPC/process_single_data',
) -> bytes:
    headers = (
        (':method', 'POST'), (':scheme', 'http'), (':authority', 'x'), (':path', path),
        ('content-type', 'application/grpc'), ('te', 'trailers'), *more,
    )  # fmt: skip
    block = b''.join(_literal(*header) for header in headers)
    return frame(HEADERS, 5 if end else 4, stream, block)


class Http2:
    """Just enough of HTTP/2 to send a message that is nowhere whole."""

    def __init__(self, port: int) -> None:
        self.socket = connect(port)
        self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0))
        self._left = b''
        self.window = [65535, 65535]  # of the connection, of the stream
        self.ended = b''

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def frames(self, seconds: float) -> Iterator[tuple[int, int, bytes]]:
        """Frames that have come, or come in so many seconds."""
        self.socket.settimeout(max(seconds, 0.0001))
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while piece := self.socket.recv(65536):
                self._left += piece
                while len(self._left) >= 9:
                    length = int.from_bytes(self._left[:3], 'big')
                    if len(self._left) < 9 + length:
                        break
                    kind, flags = self._left[3], self._left[4]
                    stream = int.from_bytes(self._left[5:9], 'big')
                    payload, self._left = self._left[9 : 9 + length], self._left[9 + length :]
                    self._note(kind, flags, stream, payload)
                    self.socket.settimeout(max(seconds, 0.0001))
                    yield kind, stream, payload
            self.ended = self.ended or b'closed'

    def _note(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW:
            self.window[stream != 0] += int.from_bytes(payload, 'big')
        elif kind == SETTINGS and not flags & 1:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack_from('>HI', payload, at)
                if name == 4:
                    self.window[1] += value - 65535
            self.socket.settimeout(30)
            self.socket.sendall(frame(SETTINGS, 1, 0))
        elif kind == PING and not flags & 1:
            self.socket.settimeout(30)
            self.socket.sendall(frame(PING, 1, 0, payload))
        elif kind in (RESET, GOAWAY) or (kind == HEADERS and flags & 1):
            self.ended = payload or b'ended'

    def answer(self, seconds: float = 30) -> bytes:
        """Whatever comes until the stream ends."""
        found = b''
        until = time.monotonic() + seconds
        while not self.ended and time.monotonic() < until:
            for kind, _, payload in self.frames(0.2):
                found += payload if kind in (HEADERS, DATA, RESET, GOAWAY) else b''
                if self.ended:
                    break
        return found


def call_without_end(port: int, total: int, goes_on: Callable[[], bool]) -> tuple[int, bytes]:
    """Send a gRPC message of so many bytes; how many went out, and how it ended."""
    with Http2(port) as client:
        for _ in client.frames(0.5):
            pass
        client.socket.sendall(grpc_head(1))
        rest, sent = b'\0' + struct.pack('>I', min(total, 0xFFFFFFFF)), 0
        with contextlib.suppress(OSError):
            while sent < total and goes_on() and not client.ended:
                room = min(*client.window, 16384)
                if room <= len(rest):
                    for _ in client.frames(0.05):
                        pass
                    continue
                payload, rest = rest + bytes(room - len(rest)), b''
                client.socket.settimeout(30)
                client.socket.sendall(frame(DATA, 0, 1, payload))
                client.window = [left - len(payload) for left in client.window]
                sent += len(payload)
                for _ in client.frames(0):
                    pass
        return sent, client.ended
