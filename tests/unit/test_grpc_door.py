"""Calls over gRPC without the token: refused before anything of them is read."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import grpc
import pytest

from finetuner.server.grpc_door import TokenInterceptor
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
