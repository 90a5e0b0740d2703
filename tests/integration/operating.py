"""A Flow with an Executor that does nothing, slowly, for the tests of the gateway itself."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import grpc
from docarray import Document, DocumentArray
from jina.proto import jina_pb2_grpc
from jina.types.request.data import DataRequest

from tests.integration.serving import REPOSITORY, Server


def flow(options: dict[str, Any] | None = None, more: str = '') -> str:
    """The YAML; options are those of the gateway, `more` stands in the Flow's `with`."""
    return f"""
jtype: Flow
with:
  host: 127.0.0.1
  retries: 0
  grpc_server_options:
    grpc.http2.max_ping_strikes: 0
{more}
gateway:
  uses: finetuner.server.gateway.Gateway
  protocol: [grpc, http]
  port: [0, 0]
  uses_with: {json.dumps(options or {})}
executors:
  - name: busy
    uses: Busy
    py_modules: {REPOSITORY}/tests/integration/busy.py
"""


def texts(count: int) -> DocumentArray:
    return DocumentArray([Document(text=f'text {i}') for i in range(count)])


def data_request(endpoint: str = '/encode', count: int = 1, **parameters: Any) -> DataRequest:
    request = DataRequest()
    request.header.exec_endpoint = endpoint
    request.parameters = parameters
    request.data.docs = texts(count)
    return request


def unary(server: Server, send: Callable[[Any], Any]) -> Any:
    """Call with a stub of the server's unary method."""

    async def run() -> Any:
        async with grpc.aio.insecure_channel(f'127.0.0.1:{server.grpc_port}') as channel:
            return await send(jina_pb2_grpc.JinaSingleDataRequestRPCStub(channel))

    return asyncio.run(run())


def raw_unary(server: Server, message: bytes, **options: Any) -> bytes:
    """Send bytes as they are."""

    async def run() -> bytes:
        address = f'127.0.0.1:{server.grpc_port}'
        unlimited = [('grpc.max_send_message_length', -1)]
        async with grpc.aio.insecure_channel(address, options=unlimited) as channel:
            call = channel.unary_unary('/jina.JinaSingleDataRequestRPC/process_single_data')
            return await call(message, **options)

    return asyncio.run(run())
