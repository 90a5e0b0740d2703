"""The gateway in front of the Executors: gRPC and HTTP, tokens, and errors without stacks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from docarray import DocumentArray
from jina.proto import jina_pb2
from jina.serve.executors import __default_endpoint__ as DEFAULT
from jina.serve.runtimes.gateway.composite import CompositeGateway
from jina.serve.runtimes.servers.grpc import GRPCServer
from jina.serve.runtimes.servers.http import HTTPServer
from jina.types.request.data import DataRequest

from finetuner.config import Settings
from finetuner.excepts import FinetunerError, ForbiddenError, NotFoundError, unknown_name
from finetuner.server.errors import http_status, message_of_unexpected
from finetuner.server.http import HttpServer
from finetuner.server.identity import PARAMETER, IdentitySeal
from finetuner.server.security import (
    DENIED,
    FORBIDDEN,
    TokenCheck,
    current_identity,
    refuse_open_server,
)
from finetuner.storage.tokens import Scope

_OPEN_METHODS = ('/grpc.health.v1.Health/', '/jina.JinaGatewayDryRunRPC/')
_JINAS_OWN = '_jina'
# endpoints that change nothing; of others nothing is known
_READING = ('/encode', '/runs', '/status', '/logs', '/metrics', '/examples', '/artifact')
_NOT_FINITE = (
    'a tag or a parameter of the request is NaN or infinite: such numbers cannot be sent; mend or '
    'remove the Documents that hold one'
)


class Gateway(CompositeGateway):
    """Jina's composite gateway with our manners.

    In a Flow: `gateway: {uses: finetuner.server.gateway.Gateway, protocol: [grpc, http],
    port: [51000, 51080]}`. Where there are tokens, every request but health needs one.

    Raises:
        ConfigError: the Flow binds an address that others can reach, and no token is set.
    """

    def __init__(self, runs: bool = True, **kwargs: Any) -> None:
        """Let Jina build its servers, then take our places in them.

        Args:
            runs: whether runs can be submitted and watched here: the REST API and the pages.
            kwargs: what Jina hands every gateway.
        """
        super().__init__(**kwargs)
        token = TokenCheck.from_environment()
        refuse_open_server(self.host, token)
        self._seal = IdentitySeal.of_home(Settings.from_environment().home)
        for i, (server, arguments) in enumerate(
            zip(self.servers, self._server_kwargs, strict=True)
        ):
            if isinstance(server, HTTPServer):
                ours = HttpServer(**arguments)
                ours.token = token
                ours.endpoints = self._endpoints
                ours.has_runs = runs
                self.servers[i] = ours
            elif isinstance(server, GRPCServer):
                others = server.grpc_tracing_server_interceptors or []
                server.grpc_tracing_server_interceptors = [_TokenInterceptor(token), *others]
        # the one place that requests of either protocol pass through
        requests = self.streamer._streamer
        requests._request_handler = self._watched(requests._request_handler)

    def _watched(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def handle(request: DataRequest, return_type: Any) -> tuple[asyncio.Future, None]:
            return asyncio.ensure_future(self._answer(send, request, return_type)), None

        return handle

    async def _answer(
        self, send: Callable[..., Any], request: DataRequest, return_type: Any
    ) -> DataRequest:
        header = request.header
        endpoint, request_id = header.exec_endpoint, header.request_id
        if not endpoint.startswith(_JINAS_OWN):
            # Jina passes Documents through where no Executor knows the endpoint
            known = await self._endpoints(header.target_executor)
            if endpoint not in known and DEFAULT not in known:
                return _refuse(request, NotFoundError(unknown_name('endpoint', endpoint, known)))
        identity = current_identity.get()
        if identity is None and not endpoint.startswith(_JINAS_OWN):
            return _refuse(request, ForbiddenError(DENIED))
        if identity is not None:
            needed: Scope = 'read' if endpoint in _READING else 'write'
            if not identity.may(needed) and not endpoint.startswith(_JINAS_OWN):
                message = FORBIDDEN.format(scope=identity.scope, needed=needed)
                return _refuse(request, ForbiddenError(message))
            request.parameters = {**request.parameters, PARAMETER: self._seal.seal(identity)}
        future, _ = send(request=request, return_type=return_type)
        answer = await future
        if identity is not None:
            # what is echoed back would let a reader of logs pass for this user
            answer.parameters = {k: v for k, v in answer.parameters.items() if k != PARAMETER}
        if answer.header.status.code == jina_pb2.StatusProto.ERROR:
            self._strip(answer, endpoint, request_id)
        return answer

    async def _endpoints(self, target_executor: str = '') -> list[str]:
        """Endpoints of the Executors whose names a pattern matches, in order of the alphabet."""
        graph = self.streamer.topology_graph
        await graph._get_all_endpoints(self.streamer._connection_pool)
        try:
            pattern = re.compile(target_executor)
        except re.error:
            return []
        found = {
            endpoint
            for node in graph.all_nodes
            if pattern.match(node.name)
            for endpoint in node.endpoints or ()
            if not endpoint.startswith(_JINAS_OWN)
        }
        return sorted(found)

    def _strip(self, answer: DataRequest, endpoint: str, request_id: str) -> None:
        """Leave of an Executor's error what a client may read."""
        exception = answer.header.status.exception
        arguments = list(exception.args)
        if exception.name == 'ValueError' and 'Fail to serialize' in ''.join(arguments):
            # protobuf's refusal to hand an Executor such a number, before our code sees the request
            _fail(answer, 'DataError', _NOT_FINITE)
        elif http_status(exception.name) is None:
            self.logger.error(
                f'request {request_id} to {endpoint} failed in {exception.executor}: '
                f'{exception.name}({", ".join(arguments)})'
            )
            _fail(answer, 'InternalError', message_of_unexpected(request_id))
        else:
            _fail(answer, exception.name, arguments[0] if arguments else exception.name)


def _refuse(request: DataRequest, error: FinetunerError) -> DataRequest:
    _fail(request, type(error).__name__, str(error))
    return request


def _fail(answer: DataRequest, name: str, message: str) -> None:
    status = answer.header.status
    status.Clear()
    status.code = jina_pb2.StatusProto.ERROR
    status.description = message
    status.exception.name = name
    answer.data.docs = DocumentArray()  # a failure need not carry megabytes back


class _TokenInterceptor(grpc.aio.ServerInterceptor):
    """Turns away gRPC calls without the token; health stays open."""

    def __init__(self, token: TokenCheck) -> None:
        self._token = token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Hand the call on, or put a handler in its place that refuses."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_METHODS):
            return handler
        given = dict(handler_call_details.invocation_metadata or ()).get('authorization')
        identity = await asyncio.to_thread(self._token.identify, given)
        if identity is None:
            return _refusing(handler)
        current_identity.set(identity)
        return handler


def _refusing(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, DENIED)

    async def refuse_stream(
        messages: Any, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[None]:
        # a client that is still sending when it is refused sees an internal error instead
        if hasattr(messages, '__aiter__'):
            async for _ in messages:
                break
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, DENIED)
        yield  # a generator is what gRPC expects here

    coders = {
        'request_deserializer': handler.request_deserializer,
        'response_serializer': handler.response_serializer,
    }
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse_stream, **coders)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream, **coders)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(refuse, **coders)
    return grpc.unary_unary_rpc_method_handler(refuse, **coders)
