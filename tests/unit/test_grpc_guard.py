"""The guard before gRPC: hands on what is fine byte by byte, and nothing of what is too large."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import uvloop

from finetuner.server.grpc_guard import GrpcGuard, _ClientSide
from finetuner.server.limits import ByteBudget, Limits

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
DATA, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 8, 9


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


class Bytes(Limits):
    """Of so few bytes that a test can send them all."""

    too_large = 'too large, 100%'


def limits_of(max_bytes: int, patience: float = 20) -> Limits:
    return Bytes(
        max_request_mb=max_bytes / (1 << 20), slow_client_seconds=patience, request_seconds=3
    )


def message(num_bytes: int) -> bytes:
    return b'\x00' + num_bytes.to_bytes(4, 'big')


def frames_in(data: bytes) -> list[tuple[int, int, bytes]]:
    return [(kind, stream, payload) for kind, _, stream, payload in frames_with_flags(data)]


def frames_with_flags(data: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    position = 0
    while position < len(data):
        head, start = data[position : position + 9], position + 9
        position = start + int.from_bytes(head[:3], 'big')
        found.append((head[3], head[4], int.from_bytes(head[5:], 'big'), data[start:position]))
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
        guard = GrpcGuard(limits_of(100), ByteBudget(1000))
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
    assert RST_STREAM not in [kind for kind, _, _ in received]


@pytest.mark.parametrize(('kind', 'flags'), [(HEADERS, 4), (77, 0)])
def test_frames_that_must_be_kept_whole_take_little_memory(tmp_path, kind, flags):
    huge = (0xFFFFFF).to_bytes(3, 'big') + bytes((kind, flags)) + (1).to_bytes(4, 'big')
    behind, got = through_guard(tmp_path, PREFACE + huge + bytes(1000))
    assert (behind, got) == (PREFACE, b'')


def test_data_goes_on_before_its_frame_has_ended(tmp_path):
    size = 0xFFFFFF
    body = message(size - 5) + random.Random(0).randbytes(size - 5)
    head = size.to_bytes(3, 'big') + bytes((DATA, 1)) + (1).to_bytes(4, 'big')
    opened = PREFACE + frame(HEADERS, 1, b'abc', 4)

    async def run() -> tuple[int, bytes]:
        async with connected(tmp_path, size) as (guard, (_, writer), (behind, _)):
            writer.write(opened + head + body[: size // 2])
            passed = await behind.readexactly(len(opened) + size // 2 - (1 << 17))
            kept = len(client_of(guard)._frames.buffer)
            writer.write(body[size // 2 :])
            writer.write_eof()
            passed += await behind.read()
        return kept, passed

    kept, passed = asyncio.run(asyncio.wait_for(run(), 30))
    assert kept < 1 << 19
    *pieces, last = frames_with_flags(passed[len(opened) :])
    assert {(kind, flags, stream) for kind, flags, stream, _ in pieces} == {(DATA, 0, 1)}
    assert last[:3] == (DATA, 1, 1)
    assert b''.join(payload for *_, payload in [*pieces, last]) == body


def test_a_message_that_is_too_large_is_found_in_the_middle_of_a_large_frame(tmp_path):
    first = (message(100) + bytes(100)) * 5000
    sent = PREFACE + frame(HEADERS, 1, b'abc', 4)
    fine = frame(HEADERS, 3, b'abc', 4) + frame(DATA, 3, message(2) + b'ok', 1)
    large = frame(DATA, 1, first + message(101) + bytes(300_000), 1)
    behind, got = through_guard(tmp_path, sent + large + fine, frame(SETTINGS, 0))
    passed = frames_in(behind[len(PREFACE) :])
    assert first.startswith(b''.join(part for kind, on, part in passed if (kind, on) == (DATA, 1)))
    assert (RST_STREAM, 1, (8).to_bytes(4, 'big')) in passed
    assert passed[-2:] == frames_in(fine)
    assert list(refused(got)) == [1]


def test_nothing_is_remembered_of_streams_that_were_never_opened_or_have_ended(tmp_path):
    data = frame(DATA, 1, message(3) + b'ab')
    never = b''.join(frame(DATA, stream, b'\x00') for stream in range(1, 10_001, 2))
    # the server ends the first, the client the second; the others are refused
    ended = frame(HEADERS, 1) + data + frame(HEADERS, 3) + frame(RST_STREAM, 3, bytes(4))
    refused = b''.join(
        frame(HEADERS, stream) + frame(DATA, stream, message(101)) for stream in range(5, 8005, 2)
    )

    async def run() -> tuple[bool, _ClientSide]:
        async with connected(tmp_path, 100) as (guard, (_, writer), (behind, answer)):
            sent = PREFACE + frame(SETTINGS, 0) + never + ended
            writer.write(sent)
            passed = await behind.readexactly(len(sent))
            answer.write(
                frame(SETTINGS, 0) + frame(HEADERS, 1, flags=4) + frame(HEADERS, 1, flags=5)
            )
            writer.write(refused)
            while client_of(guard)._last_stream < 8003 or 1 in client_of(guard)._streams:
                await asyncio.sleep(0.01)
            client = client_of(guard)
        return passed == sent, client

    passed, client = asyncio.run(asyncio.wait_for(run(), 30))
    assert passed
    assert client._streams == {}
    assert len(client._refused) == 1000


def test_a_connection_that_opens_streams_without_end_is_closed(tmp_path):
    streams = b''.join(frame(HEADERS, stream, b'abc', 4) for stream in range(1, 20_001, 2))

    async def run() -> bytes:
        async with connected(tmp_path, 100) as (_, (reader, writer), _):
            writer.write(PREFACE + streams)
            try:
                got = await reader.read()
            except ConnectionResetError:
                got = b''
        return got

    assert asyncio.run(asyncio.wait_for(run(), 30)) == b''


def refused(data: bytes) -> dict[int, bytes]:
    """The answers of the guard's own by stream."""
    return {stream: payload for kind, stream, payload in frames_in(data) if kind == HEADERS}


async def read_for(reader: asyncio.StreamReader, seconds: float) -> bytes:
    got, until = b'', asyncio.get_running_loop().time() + seconds
    while (left := until - asyncio.get_running_loop().time()) > 0:
        try:
            got += await asyncio.wait_for(reader.read(1 << 16), left)
        except asyncio.TimeoutError:
            break
    return got


def test_unfinished_messages_share_a_budget_that_comes_back(tmp_path):
    async def run() -> None:
        async with connected(tmp_path, 100, budget=250) as (guard, (reader, writer), (_, answer)):
            opened = b''.join(frame(HEADERS, stream, b'abc', 4) for stream in range(1, 13, 2))
            writer.write(PREFACE + frame(SETTINGS, 0) + opened)
            answer.write(frame(SETTINGS, 0))
            # three of 90 bytes are too many; the third is refused, the fourth is small enough
            for stream, size in ((1, 90), (3, 90), (5, 90), (7, 60)):
                writer.write(frame(DATA, stream, message(100) + bytes(size)))
            got = await read_for(reader, 0.3)
            assert list(refused(got)) == [5]
            assert b'grpc-status\x018' in refused(got)[5]
            assert b'max_total_mb' in refused(got)[5]
            assert guard.budget.held == 240
            # one becomes whole, one is reset by the client, one by the server
            writer.write(frame(DATA, 1, bytes(10), 1) + frame(RST_STREAM, 3, bytes(4)))
            answer.write(frame(RST_STREAM, 7, bytes(4)))
            await read_for(reader, 0.2)
            assert guard.budget.held == 0
            writer.write(frame(DATA, 9, message(100) + bytes(99)))
            await read_for(reader, 0.2)
            assert guard.budget.held == 99
            writer.close()
            await asyncio.sleep(0.2)
            assert guard.budget.held == 0

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_message_that_stands_still_is_refused(tmp_path):
    async def run() -> None:
        ends = connected(tmp_path, 100_000, budget=200_000, patience=0.6)
        async with ends as (guard, (reader, writer), (_, answer)):
            opened = b''.join(frame(HEADERS, stream, b'abc', 4) for stream in range(1, 9, 2))
            writer.write(PREFACE + frame(SETTINGS, 0) + opened)
            answer.write(frame(SETTINGS, 0))
            writer.write(frame(DATA, 1, message(100_000) + bytes(50_000)))
            # nothing came of the first of these messages, and all of the second
            writer.write(frame(DATA, 3, message(0) + message(1) + b'a' + message(1000) + bytes(10)))
            writer.write(frame(DATA, 5, message(100_000)))
            got = b''
            for _ in range(24):
                writer.write(frame(DATA, 5, bytes(200)))  # slow, but steady
                got += await read_for(reader, 0.1)
            assert list(refused(got)) == [3, 1]
            assert b'grpc-status\x014' in refused(got)[1]
            assert guard.budget.held == 24 * 200
            got = await read_for(reader, 3)
            assert list(refused(got)) == [5]
            assert guard.budget.held == 0

    asyncio.run(asyncio.wait_for(run(), 30))


def window(stream: int, num_bytes: int) -> bytes:
    return frame(WINDOW_UPDATE, stream, num_bytes.to_bytes(4, 'big'))


@pytest.mark.parametrize(('on_stream', 'on_connection'), [(1000, 65_535), (200_000, 0)])
def test_a_message_that_the_server_leaves_where_it_is_may_stand_still(
    tmp_path, on_stream, on_connection
):
    async def run() -> None:
        async with connected(tmp_path, 100_000, patience=0.6) as (_, (reader, writer), (_, answer)):
            settings = (3).to_bytes(2, 'big') + (9).to_bytes(4, 'big')
            settings += (4).to_bytes(2, 'big') + on_stream.to_bytes(4, 'big')
            answer.write(frame(SETTINGS, 0, settings))
            writer.write(PREFACE + frame(SETTINGS, 0) + frame(HEADERS, 1, b'abc', 4))
            await read_for(reader, 0.2)
            size = min(on_stream, 65_535)
            writer.write(frame(DATA, 1, message(100_000) + bytes(size - 5)))
            assert refused(await read_for(reader, 2.5)) == {}
            answer.write(window(0 if not on_connection else 1, 400))
            got = await read_for(reader, 2)
            assert list(refused(got)) == [1]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_connection_that_ends_in_the_middle_of_a_frame_is_closed(tmp_path):
    unfinished = (60_000).to_bytes(3, 'big') + bytes((HEADERS, 4)) + (1).to_bytes(4, 'big')
    for number, sent in enumerate(
        (
            PREFACE + unfinished + bytes(59_000),
            PREFACE + unfinished[:4],
            PREFACE + frame(HEADERS, 1, b'abc') + frame(CONTINUATION, 1, b'abc'),
            PREFACE[:9],
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()

        async def run(folder: Path = folder, sent: bytes = sent) -> None:
            async with connected(folder, 100, patience=0.6) as (guard, (reader, writer), _):
                writer.write(sent)
                await asyncio.sleep(0.3)
                assert len(guard.clients) == 1
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.wait_for(reader.read(), 3) == b''
                assert not guard.clients

        asyncio.run(asyncio.wait_for(run(), 30))


def test_what_is_there_of_a_long_frame_goes_on_where_the_rest_waits(tmp_path):
    async def run() -> None:
        ends = connected(tmp_path, 100_000, patience=0.6)
        async with ends as (guard, (reader, writer), (behind, answer)):
            answer.write(frame(SETTINGS, 0))
            head = (40_005).to_bytes(3, 'big') + bytes((DATA, 0)) + (1).to_bytes(4, 'big')
            writer.write(PREFACE + frame(HEADERS, 1, b'abc', 4) + head + message(40_000))
            for number in range(20):
                writer.write(bytes(2000))
                assert refused(await read_for(reader, 0.1)) == {}
                assert number != 12 or guard.budget.held > 10_000
            # counted while it came, and no reason to close the connection
            passed = frames_in((await behind.read(1 << 17))[len(PREFACE) :])
            assert sum(len(payload) for kind, _, payload in passed if kind == DATA) > 30_000
            await read_for(reader, 0.6)
            assert guard.budget.held == 0
            assert len(guard.clients) == 1

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize('seed', range(4))
def test_a_long_frame_with_padding_takes_as_much_of_the_windows_in_pieces(tmp_path, seed):
    size = 300_000
    body = message(size) + random.Random(seed).randbytes(size)
    padded = b'\xc8' + body + bytes(200)
    opened = PREFACE + frame(HEADERS, 1, b'abc', 4)

    async def run() -> bytes:
        async with connected(tmp_path, size) as (_, (_, writer), (behind, _)):
            whole = opened + frame(DATA, 1, padded, 8 | 1)
            for start in range(0, len(whole), 70_000 + seed):
                writer.write(whole[start : start + 70_000 + seed])
                await asyncio.sleep(0.02)
            writer.write_eof()
            return await behind.read()

    passed = asyncio.run(asyncio.wait_for(run(), 30))
    *pieces, last = frames_with_flags(passed[len(opened) :])
    assert pieces
    assert {flags for _, flags, _, _ in pieces} == {0}
    assert last[1] == 8 | 1
    assert b''.join(payload for *_, payload in pieces) + last[3][1:-200] == body
    assert sum(len(payload) for *_, payload in [*pieces, last]) == len(padded)


def test_no_reset_stands_between_the_frames_of_a_header(tmp_path):
    async def run() -> list[tuple[int, int]]:
        ends = connected(tmp_path, 1000, patience=1.2)
        async with ends as (_, (reader, writer), (behind, answer)):
            answer.write(frame(SETTINGS, 0))
            writer.write(PREFACE + frame(HEADERS, 1, b'abc', 4) + frame(DATA, 1, message(100)))
            await read_for(reader, 0.8)
            writer.write(frame(HEADERS, 3, b'abc'))
            await read_for(reader, 0.9)  # in which the first message is found slow
            writer.write(frame(CONTINUATION, 3, b'def', 4))
            assert list(refused(await read_for(reader, 1))) == [1]
            passed = await behind.read(1 << 16)
            return [(kind, stream) for kind, stream, _ in frames_in(passed[len(PREFACE) :])]

    kinds = asyncio.run(asyncio.wait_for(run(), 30))
    assert kinds == [(HEADERS, 1), (DATA, 1), (HEADERS, 3), (CONTINUATION, 3), (RST_STREAM, 1)]


class _Echo(grpc.GenericRpcHandler):
    """Streams of messages, each of which is an answer."""

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def echo(messages, _):
            async for each in messages:
                yield each[:1]

        return grpc.stream_stream_rpc_method_handler(echo)


def test_clients_of_grpc_are_told_why_a_stream_is_refused_in_the_middle(tmp_path):
    async def messages():
        for _ in range(3):
            yield bytes(6 << 20)

    async def run() -> Counter:
        path = f'{tmp_path}/socket'
        # refused streams are over for the client as well: it has more calls than may be at once
        server = grpc.aio.server(options=[('grpc.max_concurrent_streams', 2)])
        server.add_generic_rpc_handlers((_Echo(),))
        server.add_insecure_port(f'unix:{path}')
        await server.start()
        guard = GrpcGuard(Limits(max_request_mb=20), ByteBudget(1 << 20))
        await guard.start('127.0.0.1', 0, path)
        port = guard._server.sockets[0].getsockname()[1]
        told: Counter = Counter()
        async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
            for _ in range(12):
                with pytest.raises(grpc.RpcError) as caught:
                    async for _ in channel.stream_stream('/a/b')(messages(), timeout=10):
                        pass
                told[caught.value.code()] += 1
            assert [each async for each in channel.stream_stream('/a/b')(iter([b'abc']))] == [b'a']
        await server.stop(0)
        await guard.close()
        return told

    told = asyncio.run(asyncio.wait_for(run(), 60))
    assert told == {grpc.StatusCode.RESOURCE_EXHAUSTED: 12}


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connected(
    folder: Path, max_bytes: int, budget: int = 0, patience: float = 20
) -> AsyncIterator[tuple[GrpcGuard, Ends, Ends]]:
    """A guard, the client's end of a connection through it, and the server's."""
    served: asyncio.Future[Ends] = asyncio.get_running_loop().create_future()
    path = str(folder / 'socket')
    # kept: a server that nobody holds may be gone before anything comes
    server = await asyncio.start_unix_server(lambda *ends: served.set_result(ends), path)
    guard = GrpcGuard(limits_of(max_bytes, patience), ByteBudget(budget or max_bytes))
    await guard.start('127.0.0.1', 0, path)
    port = guard._server.sockets[0].getsockname()[1]
    ends = await asyncio.open_connection('127.0.0.1', port)
    yield guard, ends, await served
    await guard.close()
    server.close()


def client_of(guard: GrpcGuard) -> _ClientSide:
    (client,) = guard.clients
    return client
