"""The guard before gRPC: hands on what is fine byte by byte, and nothing of what is too large."""

import asyncio
import random
from pathlib import Path

import pytest
import uvloop

from finetuner.server.grpc_guard import GrpcGuard

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
DATA, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE = 0, 1, 3, 4, 8


@pytest.fixture(autouse=True, params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def kind_of_loop(request):
    """Whoever imports Jina's client gets the other one."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(request.param())
    yield
    asyncio.set_event_loop_policy(before)


def frame(kind: int, stream: int, payload: bytes = b'', flags: int = 0) -> bytes:
    return (
        len(payload).to_bytes(3, 'big') + bytes((kind, flags)) + stream.to_bytes(4, 'big') + payload
    )


def message(num_bytes: int) -> bytes:
    return b'\x00' + num_bytes.to_bytes(4, 'big')


def frames_in(data: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while data:
        length = int.from_bytes(data[:3], 'big')
        found.append((data[3], int.from_bytes(data[5:9], 'big'), data[9 : 9 + length]))
        data = data[9 + length :]
    return found


def through_guard(
    folder: Path, sent: bytes, answered: bytes = b'', seed: int = 0
) -> tuple[bytes, bytes]:
    """What the server behind received, and what the client before it did."""
    chance = random.Random(seed)

    async def trickle(writer: asyncio.StreamWriter, data: bytes) -> None:
        while data:
            size = chance.choice((1, 3, 9, 40, 5000))
            writer.write(data[:size])
            data = data[size:]
            await asyncio.sleep(0)

    async def run() -> tuple[bytes, bytes]:
        received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await trickle(writer, answered)
            received.set_result(await reader.read())
            writer.close()

        path = str(folder / 'socket')
        server = await asyncio.start_unix_server(serve, path)
        guard = GrpcGuard(100, 'too large, 100%')
        await guard.start('127.0.0.1', 0, path)
        port = guard._server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        await trickle(writer, sent)
        await asyncio.sleep(0.3)  # nothing says that no more comes
        got = b''
        while not reader.at_eof():
            try:
                got += await asyncio.wait_for(reader.read(1 << 16), 0.2)
            except (asyncio.TimeoutError, ConnectionResetError):
                break
        writer.close()
        behind = await received
        await guard.close()
        server.close()
        return behind, got

    return asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize('seed', range(8))
def test_what_is_fine_is_handed_on_as_it_is(tmp_path, seed):
    sent = PREFACE + frame(SETTINGS, 0)
    for stream in (1, 3):
        sent += frame(HEADERS, stream, b'abc', 4)
        # messages that begin and end anywhere in frames
        body = (message(100) + bytes(100)) * 3 + message(0)
        for start in range(0, len(body), 37):
            sent += frame(DATA, stream, body[start : start + 37])
        sent += frame(DATA, stream, b'\x02' + message(3) + b'abc' + b'xx', 8 | 1)
    back = frame(SETTINGS, 0) + frame(HEADERS, 1, b'abc', 4) + frame(DATA, 1, bytes(300))
    assert through_guard(tmp_path, sent, back, seed) == (sent, back)


@pytest.mark.parametrize('has_begun', [False, True])
@pytest.mark.parametrize('seed', range(4))
def test_of_a_message_that_is_too_large_nothing_goes_on(tmp_path, seed, has_begun):
    fine = frame(HEADERS, 3, b'abc', 4) + frame(DATA, 3, message(2) + b'ok', 1)
    head = PREFACE + frame(HEADERS, 1, b'abc', 4)
    large = frame(DATA, 1, message(101) + bytes(50)) + frame(DATA, 1, bytes(51), 1)
    back = frame(HEADERS, 1, b'abc', 4) if has_begun else frame(SETTINGS, 0)
    # so that the answer has begun by the time
    behind, got = through_guard(
        tmp_path, head + frame(DATA, 1, message(0)) * 50 + large + fine, back, seed
    )
    kinds = [(kind, stream) for kind, stream, _ in frames_in(behind[len(PREFACE) :])]
    assert kinds == [(HEADERS, 1), *[(DATA, 1)] * 50, (RST_STREAM, 1), (HEADERS, 3), (DATA, 3)]
    received = frames_in(got)
    assert received[0] == frames_in(back)[0]
    returned = [payload for kind, _, payload in received if kind == WINDOW_UPDATE]
    assert sum(int.from_bytes(payload, 'big') for payload in returned) == 55 + 51
    (refusal,) = [payload for kind, _, payload in received[1:] if kind == HEADERS]
    assert b'grpc-status\x018' in refusal
    assert b'too large%2C 100%25' in refusal
    assert (RST_STREAM, 1, bytes(4)) in received


def test_frames_of_any_size_take_no_memory(tmp_path):
    huge = (0xFFFFFF).to_bytes(3, 'big') + bytes((DATA, 0)) + (1).to_bytes(4, 'big')
    behind, got = through_guard(tmp_path, PREFACE + huge + bytes(1000))
    assert (behind, got) == (PREFACE, b'')
