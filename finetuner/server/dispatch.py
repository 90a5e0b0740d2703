"""The one way of a request from the gateway to the Executors and back, whichever door it came by."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Coroutine
from typing import Any

from docarray import DocumentArray
from google.protobuf.message import DecodeError
from jina.logging.logger import JinaLogger
from jina.proto import jina_pb2
from jina.serve.executors import __default_endpoint__ as DEFAULT
from jina.types.request.data import DataRequest

from finetuner.excepts import (
    ConfigError,
    DeadlineError,
    FinetunerError,
    ForbiddenError,
    NotFoundError,
    TooManyRequestsError,
    unknown_name,
)
from finetuner.server.calls import Call
from finetuner.server.coalescing import (
    ID_PARAMETER,
    MOST_OF_ONE,
    Coalescer,
    FindSmall,
    is_small,
    small_documents_of,
)
from finetuner.server.errors import http_status, message_of_unexpected
from finetuner.server.identity import PARAMETER, IdentitySeal
from finetuner.server.limits import Limits, Slots
from finetuner.server.parts import ENDPOINT, PART_OF, TIMEOUT_PARAMETER
from finetuner.server.security import DENIED, FORBIDDEN, current_identity
from finetuner.server.telemetry import GatewayMetrics
from finetuner.server.tracing import stage_span
from finetuner.server.wire import Documents, find_documents
from finetuner.storage.tokens import Identity, Scope

_OURS = (PARAMETER, TIMEOUT_PARAMETER, ID_PARAMETER)
_JINAS_OWN = '_jina'
# of Jina and of ours: what the gateway alone asks Executors
_HIDDEN = (_JINAS_OWN, '/_')
# endpoints that change nothing; of others nothing is known
_READING = (
    '/encode', '/search', '/rank', '/info', '/index_info', '/ready',
    '/runs', '/status', '/logs', '/metrics', '/examples', '/artifact',
)  # fmt: skip
# /fit may wait for hours; these end when nobody waits for them any more
TIMED = ('/encode', '/search', '/rank')
# the Executor gives up by itself, and says better why
_GRACE_SECONDS = 0.5
# less than this is counted sooner than a thread is found for it
_SMALL_BYTES = 1 << 20
_NOT_FINITE = (
    'a tag or a parameter of the request is NaN or infinite: such numbers cannot be sent; mend or '
    'remove the Documents that hold one'
)


class Dispatcher:
    """Checks a request, has an Executor answer it, and leaves of errors what a client may read.

    Args:
        streamer: Jina's gateway streamer.
        seal: for the identity of who asks.
        limits: of requests.
        slots: for requests being answered.
        tracer: None where tracing is off.
        logger: for what clients may not read.
        metrics: of the gateway.
    """

    def __init__(
        self,
        streamer: Any,
        seal: IdentitySeal,
        limits: Limits,
        slots: Slots,
        tracer: Any,
        logger: JinaLogger,
        metrics: GatewayMetrics,
    ) -> None:
        self._streamer = streamer
        self._limits = limits
        self._slots = slots
        self._tracer = tracer
        self._logger = logger
        self._metrics = metrics
        self._seal = functools.lru_cache(maxsize=1024)(seal.seal)
        self._known: list[str] = []
        self._sole_nodes: dict[str, Any] = {}
        self._coalescers: dict[str, Coalescer] = {}

    async def answer(self, request: DataRequest, call: Call) -> DataRequest:
        """Answer a request, with an error in its header where that is the answer.

        Args:
            request: as it came; one over gRPC has not been opened yet.
            call: what is known of it, and is added to.

        Raises:
            InternalNetworkError: no Executor could be reached.
        """
        try:
            find_small = await self._count_documents(request, call)
            return await self._answer(request, call, find_small)
        except DecodeError:
            error: FinetunerError = ConfigError('the message is no DataRequest of Jina')
            return refuse(DataRequest(), error, call)
        except FinetunerError as caught:
            return refuse(request, caught, call)

    async def endpoints(self, target_executor: str = '') -> list[str]:
        """Endpoints of the Executors whose names a pattern matches, in order of the alphabet.

        Args:
            target_executor: regular expression; empty for all.
        """
        if not target_executor and self._known:
            return self._known
        graph = self._streamer.topology_graph
        await graph._get_all_endpoints(self._streamer._connection_pool)
        try:
            pattern = re.compile(target_executor)
        except (re.error, OverflowError, RecursionError):  # a{99999999999}, a thousand brackets
            return []
        found = {
            endpoint
            for node in executors_of(self._streamer)
            if pattern.match(node.name)
            for endpoint in node.endpoints or ()
            if not endpoint.startswith(_HIDDEN)
        }
        if not target_executor:
            self._known = sorted(found)
        return sorted(found)

    async def _count_documents(self, request: DataRequest, call: Call) -> FindSmall | None:
        """Count the Documents of a request; returns what finds them if it may go with others."""
        if request.buffer is None:
            may_be_small = call.num_documents <= MOST_OF_ONE
            return functools.partial(small_documents_of, request) if may_be_small else None
        documents = await self._find(request.buffer)
        call.num_documents = documents.count
        # of a large request they would keep the bytes in memory
        return (lambda: documents) if is_small(documents) else None

    async def _find(self, raw: bytes) -> Documents:
        most = self._limits.max_documents
        if len(raw) < _SMALL_BYTES:
            return find_documents(raw, most)
        # a million fields must not hold up the other requests of this process
        return await asyncio.to_thread(find_documents, raw, most)

    async def _answer(
        self, request: DataRequest, call: Call, find_small: FindSmall | None
    ) -> DataRequest:
        header = request.header
        endpoint, target = header.exec_endpoint, header.target_executor
        identity = current_identity.get()
        if not endpoint.startswith(_JINAS_OWN):
            # Jina passes Documents through where no Executor knows the endpoint
            known = await self.endpoints(target)
            is_known = endpoint in known or DEFAULT in known
            if not is_known or endpoint.startswith(_HIDDEN):
                raise NotFoundError(unknown_name('endpoint', endpoint, known))
            _check_scope(identity, endpoint)
            call.endpoint = endpoint if endpoint in known else DEFAULT
        self._limits.check_documents(call.num_documents)
        with self._slots.taken_for(call):
            until = self._limits.until(call.seconds) if endpoint in TIMED else None
            self._set_parameters(request, call, identity, until)
            attributes = {
                'request_id': call.request_id,
                'endpoint': endpoint,
                'protocol': call.protocol,
                'num_documents': call.num_documents,
            }
            with stage_span(self._tracer, call.parent, f'gateway {endpoint}', attributes) as span:
                sending = self._send(request, endpoint, target, find_small, until)
                answer = await (sending if until is None else _within(sending, until))
                if answer.header.status.code == jina_pb2.StatusProto.ERROR:
                    answer = self._strip(answer, endpoint, call)
                else:
                    fields = answer.proto_wo_data.parameters.fields
                    for name in _OURS:
                        # what is echoed back would let a reader of logs pass for this user
                        fields.pop(name, None)
                if span is not None:
                    span.set_attribute('status', call.status)
        return answer

    def _set_parameters(
        self,
        request: DataRequest,
        call: Call,
        identity: Identity | None,
        until: float | None,
    ) -> None:
        parameters = request.proto_wo_data.parameters
        _drop_reserved(parameters)
        if identity is not None:
            parameters[PARAMETER] = self._seal(identity)
            parameters[ID_PARAMETER] = call.request_id
        if until is not None:
            parameters[TIMEOUT_PARAMETER] = max(0.0, until - time.monotonic())

    async def _send(
        self,
        request: DataRequest,
        endpoint: str,
        target: str,
        find_small: FindSmall | None,
        until: float | None,
    ) -> DataRequest:
        node = None if target else self._sole_node(endpoint)
        if node is None:
            future, _ = self._streamer._streamer._request_handler(
                request=request, return_type=DocumentArray
            )
            return await future
        # spans of Jina's belong to one request each
        if find_small is None or until is None or self._tracer is not None:
            return await self._ask(node, request, endpoint)
        if endpoint != PART_OF or ENDPOINT not in node.endpoints:
            return await self._ask(node, request, endpoint)
        coalescer = self._coalescers.get(node.name)
        if coalescer is None:
            coalescer = Coalescer(
                functools.partial(self._ask, node),
                self._metrics.called,
                functools.partial(_count_replicas, self._streamer, node),
            )
            self._coalescers[node.name] = coalescer
        return await coalescer.answer(request, find_small, until)

    async def _ask(self, node: Any, request: DataRequest, endpoint: str) -> DataRequest:
        # Jina copies the whole graph for each request, to ask each Executor in turn; where one
        # alone knows the endpoint that changes nothing but the time
        result = await self._streamer._connection_pool.send_requests_once(
            requests=[request],
            deployment=node.name,
            metadata=dict(node._metadata or {}),
            head=True,
            endpoint=endpoint,
            timeout=node._timeout_send,
            retries=node._retries,
        )
        if isinstance(result, BaseException):
            raise result
        return result[0]

    def _sole_node(self, endpoint: str) -> Any:
        """The node of the only Executor that knows an endpoint, in a Flow without branches."""
        if endpoint in self._sole_nodes:
            return self._sole_nodes[endpoint]
        graph = self._streamer.topology_graph
        nodes = executors_of(self._streamer)
        if endpoint.startswith(_JINAS_OWN) or any(node.endpoints is None for node in nodes):
            return None
        is_chain = len(graph.origin_nodes) == 1 and all(
            len(node.outgoing_nodes) <= 1 and not node.floating for node in graph.all_nodes
        )
        able = [node for node in nodes if endpoint in node.endpoints or DEFAULT in node.endpoints]
        sole = able[0] if is_chain and len(able) == 1 and not graph.has_filter_conditions else None
        if endpoint in self._known:  # any other name is a client's, and there is no end of them
            self._sole_nodes[endpoint] = sole
        return sole

    def _strip(self, answer: DataRequest, endpoint: str, call: Call) -> DataRequest:
        """Leave of an Executor's error what a client may read."""
        exception = answer.header.status.exception
        arguments = list(exception.args)
        if exception.name == 'ValueError' and 'Fail to serialize' in ''.join(arguments):
            # protobuf's refusal to hand an Executor such a number, before our code sees the request
            return _failure(answer, 'DataError', _NOT_FINITE, call)
        if http_status(exception.name) is None:
            self._logger.error(
                f'request {call.request_id} to {endpoint} failed in {exception.executor}: '
                f'{exception.name}({", ".join(arguments)})'
            )
            message = message_of_unexpected(call.request_id)
            return _failure(answer, 'InternalError', message, call)
        message = arguments[0] if arguments else exception.name
        if exception.name == TooManyRequestsError.__name__:
            return _failure(answer, exception.name, message, call, _seconds(arguments[1:]))
        return _failure(answer, exception.name, message, call)


def _count_replicas(streamer: Any, node: Any) -> int:
    connections = streamer._connection_pool._connections
    replicas = connections.get_replicas(node.name, head=True, increase_access_count=False)
    return len(replicas.get_all_connections()) if replicas else 1


async def _within(sending: Coroutine[Any, Any, DataRequest], until: float) -> DataRequest:
    try:
        return await asyncio.wait_for(sending, until - time.monotonic() + _GRACE_SECONDS)
    except asyncio.TimeoutError as error:
        raise DeadlineError(
            'the answer was not there in time: send fewer Documents at a time, or allow more '
            '(`request_seconds` of the gateway; deadline or X-Request-Timeout of the request)'
        ) from error


def executors_of(streamer: Any) -> list[Any]:
    """The nodes of a Flow's graph that are Executors; Jina's last node is the gateway again."""
    addresses = streamer._executor_addresses
    return [node for node in streamer.topology_graph.all_nodes if node.name in addresses]


def _check_scope(identity: Identity | None, endpoint: str) -> None:
    if identity is None:
        raise ForbiddenError(DENIED)
    needed: Scope = 'read' if endpoint in _READING else 'write'
    if not identity.may(needed):
        raise ForbiddenError(FORBIDDEN.format(scope=identity.scope, needed=needed))


def _drop_reserved(parameters: Any) -> None:
    """Take out what only the gateway may say, also where Jina lets clients nest parameters.

    Jina unpacks `<executor>__<name>` and `{<executor>: {<name>: ...}}` over all others, and so over
    the identity.
    """
    fields = parameters.fields
    for name in list(fields):
        if name.startswith('__') or '____' in name:
            del fields[name]
        elif fields[name].WhichOneof('kind') == 'struct_value':
            nested = fields[name].struct_value.fields
            for inner in [inner for inner in nested if inner.startswith('__')]:
                del nested[inner]


def _seconds(arguments: list[str]) -> float:
    try:
        return max(0.0, float(arguments[0]))
    except (IndexError, ValueError):
        return 1.0


def refuse(request: DataRequest, error: FinetunerError, call: Call) -> DataRequest:
    """An answer that tells of an error, which is noted in the call.

    Args:
        request: that is not answered.
        error: why.
        call: of the request.
    """
    retry_after = error.retry_after if isinstance(error, TooManyRequestsError) else None
    return _failure(request, type(error).__name__, str(error), call, retry_after)


def _failure(
    request: DataRequest, name: str, message: str, call: Call, retry_after: float | None = None
) -> DataRequest:
    """An answer with an error: a new one, which need not carry megabytes back."""
    call.status = http_status(name) or 500
    call.retry_after = retry_after
    answer = DataRequest()
    if request.is_decompressed:
        header = request.header
        answer.header.request_id = header.request_id
        answer.header.exec_endpoint = header.exec_endpoint
    if retry_after is not None:
        message = f'{message}; ask again in {retry_after:g} s'
    status = answer.header.status
    status.code = jina_pb2.StatusProto.ERROR
    status.description = message
    status.exception.name = name
    return answer
