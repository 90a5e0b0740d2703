"""Calls over gRPC without the token: refused before anything of them is read."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest
from jina.types.request.data import DataRequest

from finetuner.server.calls import Call
from finetuner.server.grpc_door import GrpcDoor, TokenInterceptor
from finetuner.server.limits import ByteBudget, Slots
from finetuner.server.security import TokenCheck
from tests.integration.hostile_clients import DATA, Http2, frame, grpc_head

UNARY, STREAM = '/jina.JinaSingleDataRequestRPC/process_single_data', '/jina.JinaRPC/Call'


class Methods(grpc.GenericRpcHandler):
    """One that takes a message and one that takes many; none gets any."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def one(_, __):
            raise AssertionError

        async def many(_, __):
            raise AssertionError
            yield

        if details.method == UNARY:
            return grpc.unary_unary_rpc_method_handler(one)
        return grpc.stream_stream_rpc_method_handler(many)


def against_server(ask: Callable[[int], Awaitable]) -> object:
    async def run() -> object:
        server = grpc.aio.server(
            interceptors=[TokenInterceptor(TokenCheck('secret'))],
            options=[('grpc.max_receive_message_length', 128 << 20)],
        )
        server.add_generic_rpc_handlers((Methods(),))
        port = server.add_insecure_port('127.0.0.1:0')
        await server.start()
        try:
            return await ask(port)
        finally:
            await server.stop(0)

    return asyncio.run(asyncio.wait_for(run(), 60))


class Slow:
    """A dispatcher whose answers nobody waits for."""

    def __init__(self) -> None:
        self.slots = Slots(100)

    async def answer(self, request: DataRequest, call: Call) -> DataRequest:
        with self.slots.taken_for(call):
            await asyncio.sleep(8)
        return request


class Streams(grpc.GenericRpcHandler):
    """Streams of messages, read and written as Jina's servers do."""

    def __init__(self, door: GrpcDoor, read: Callable[[bytes], DataRequest] = DataRequest) -> None:
        self._door = door
        self._read = read

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(self._door.stream, self._read, written)


def written(answer: DataRequest) -> bytes:
    return answer.SerializeToString() if answer.buffer is None else answer.buffer


@contextlib.asynccontextmanager
async def channel_to(streams: Streams) -> AsyncIterator[grpc.aio.Channel]:
    """Of a client of a server with these streams."""
    server = grpc.aio.server(options=[('grpc.max_receive_message_length', 128 << 20)])
    server.add_generic_rpc_handlers((streams,))
    port = server.add_insecure_port('127.0.0.1:0')
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
            yield channel
    finally:
        await server.stop(0)


class Written:
    """A journal of statuses."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    def finish(self, call: Call) -> None:
        self.statuses.append(call.status)


def test_answers_come_in_the_order_of_the_requests_whoever_asks():
    class LastFirst(Slow):
        async def answer(self, request: DataRequest, call: Call) -> DataRequest:
            await asyncio.sleep(request.buffer[0] / 50)
            return request

    door = GrpcDoor(LastFirst(), Written(), ByteBudget(100))

    async def run() -> list[int]:
        async with channel_to(Streams(door)) as channel:
            asked = [bytes([number]) for number in (9, 5, 7, 1, 0)]
            return [answer[0] async for answer in channel.stream_stream(STREAM)(iter(asked))]

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [9, 5, 7, 1, 0]


@pytest.mark.parametrize('in_order', ['true', 'false'])
def test_requests_of_a_stream_end_with_it(in_order):
    dispatcher, journal = Slow(), Written()
    door = GrpcDoor(dispatcher, journal, ByteBudget(100))

    async def run() -> None:
        async with channel_to(Streams(door)) as channel:
            metadata = (('__results_in_order__', in_order),)
            call = channel.stream_stream(STREAM)(metadata=metadata)
            for _ in range(5):
                await call.write(b'')
            while dispatcher.slots.in_flight < 5:
                await asyncio.sleep(0.01)
            call.cancel()
            assert await dispatcher.slots.empty(3)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert journal.statuses == [499] * 5


@pytest.mark.parametrize('path', [UNARY, STREAM])
def test_a_stranger_is_refused_before_its_message_is_there(path):
    def begin(port: int) -> bytes:
        with Http2(port) as client:
            client.socket.sendall(grpc_head(1, path=path))
            announced = b'\0' + (40 << 20).to_bytes(4, 'big')
            client.socket.sendall(frame(DATA, 0, 1, announced + bytes(1000)))
            return client.answer(5)

    answer = against_server(lambda port: asyncio.to_thread(begin, port))
    assert b'grpc-status\x0216' in answer


@pytest.mark.parametrize('size', [0, 1000, 60_000])
def test_strangers_are_told_that_a_token_is_missing(size):
    async def ask(port: int) -> Counter:
        told: Counter = Counter()
        for _ in range(10):
            async with grpc.aio.insecure_channel(f'127.0.0.1:{port}') as channel:
                with pytest.raises(grpc.RpcError) as refused:
                    await channel.unary_unary(UNARY)(bytes(size))
                told[refused.value.code()] += 1

                async def messages():
                    for _ in range(5):
                        yield bytes(size)

                with pytest.raises(grpc.RpcError) as refused:
                    async for _ in channel.stream_stream(STREAM)(messages()):
                        pass
                told[refused.value.code()] += 1
        return told

    assert against_server(ask) == {grpc.StatusCode.UNAUTHENTICATED: 20}


def test_a_stream_holds_few_large_messages_at_a_time():
    most = 0

    class Counting(Slow):
        held = 0

        async def answer(self, request: DataRequest, call: Call) -> DataRequest:
            nonlocal most
            Counting.held += len(request.buffer)
            most = max(most, Counting.held)
            await asyncio.sleep(0.01)
            Counting.held -= len(request.buffer)
            return DataRequest(b'ok')

    door = GrpcDoor(Counting(), Written(), ByteBudget(1 << 30))

    async def run() -> int:
        async with channel_to(Streams(door)) as channel:
            # small ones, some of 20 MB, and one that is more than all may be
            asked = [bytes(100)] * 5 + [bytes(20 << 20)] * 8 + [bytes(70 << 20)] + [b'x'] * 3
            return len([answer async for answer in channel.stream_stream(STREAM)(iter(asked))])

    assert asyncio.run(asyncio.wait_for(run(), 60)) == 17
    assert 60 << 20 < most <= 70 << 20


def test_messages_are_counted_from_when_they_are_here_until_they_are_answered():
    budget, journal = ByteBudget(300), Written()
    answering: list[asyncio.Event] = []

    class Waiting(Slow):
        async def answer(self, request: DataRequest, call: Call) -> DataRequest:
            answering.append(asyncio.Event())
            await answering[-1].wait()
            return DataRequest(b'ok')

    door = GrpcDoor(Waiting(), journal, budget)

    async def held(num_bytes: int) -> None:
        while budget.held != num_bytes:
            await asyncio.sleep(0.01)

    async def run() -> None:
        async with channel_to(Streams(door)) as channel:
            metadata = (('__prefetch__', '1'),)
            first = channel.stream_stream(STREAM)(metadata=metadata)
            for _ in range(3):
                await first.write(bytes(100))
            await held(200)  # one is answered, one waits for its turn, one is with gRPC
            second = channel.stream_stream(STREAM)(metadata=metadata)
            await second.write(bytes(101))
            # an answer of its own in the stream, which goes on
            refused = DataRequest(await second.read())
            assert refused.status.exception.name == 'TooManyRequestsError'
            await second.write(bytes(100))
            await held(300)
            while len(answering) < 2:
                await asyncio.sleep(0.01)
            answering[1].set()
            assert await second.read() == b'ok'
            await held(200)
            first.cancel()
            await held(0)
            assert journal.statuses == [429, 200, 499]

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_message_is_let_go_of_with_its_answer_though_no_other_comes():
    kept: list[DataRequest] = []

    class Quick(Slow):
        async def answer(self, request: DataRequest, call: Call) -> DataRequest:
            assert request.buffer == bytes(1000)
            return DataRequest(b'ok')

    door = GrpcDoor(Quick(), Written(), ByteBudget(10_000))

    def read(raw: bytes) -> DataRequest:
        kept.append(DataRequest(raw))  # as gRPC does
        return kept[-1]

    async def run() -> None:
        async with channel_to(Streams(door, read)) as channel:
            call = channel.stream_stream(STREAM)()
            await call.write(bytes(1000))
            assert await call.read() == b'ok'
            assert [each.buffer for each in kept] == [b'']
            call.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))
