"""The gRPC side of the gateway: who may come in, and requests one by one or in a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from jina.excepts import InternalNetworkError
from jina.types.request.data import DataRequest, Response

from finetuner.excepts import TooManyRequestsError
from finetuner.server.calls import GONE, ID_HEADER, Call, request_id_of
from finetuner.server.dispatch import Dispatcher, refuse
from finetuner.server.journal import Journal
from finetuner.server.limits import ByteBudget
from finetuner.server.security import DENIED, TokenCheck, current_identity

_OPEN_METHODS = ('/grpc.health.v1.Health/', '/jina.JinaGatewayDryRunRPC/')
_MOST_AHEAD = 1_000
# of messages of one stream that wait for their answers; a larger one waits alone
_MOST_BYTES_AHEAD = 64 << 20
# in which the messages of a stream are sent if they are small
_REFUSAL_SECONDS = 0.1
_UNREACHABLE = 'an Executor is not reachable'
_LATE = 'an Executor did not answer in time'


class GrpcDoor:
    """Takes the place of Jina's handlers of requests; those of health and of discovery stay.

    Args:
        dispatcher: that answers.
        journal: that writes it down.
        budget: for the messages that are here, from when they are whole until they are answered.
    """

    def __init__(self, dispatcher: Dispatcher, journal: Journal, budget: ByteBudget) -> None:
        self._dispatcher = dispatcher
        self._journal = journal
        self._budget = budget

    def stand_in(self, handler: Any) -> None:
        """Take over the methods of Jina's request handler, which its servers are built from.

        Args:
            handler: a `GatewayRequestHandler`.
        """
        handler.process_single_data = self.process_single_data
        handler.stream = handler.Call = self.stream
        handler.stream_doc = self.stream_doc

    async def process_single_data(self, request: DataRequest, context: Any = None) -> DataRequest:
        """Answer one request."""
        rpc = _Rpc(context)
        size = len(request.buffer or b'')
        try:
            with self._budget.taken(size):
                answer = await self._answer(request, rpc)
        except TooManyRequestsError as error:
            answer = await self._answer(DataRequest(), rpc, error)
        except InternalNetworkError as error:
            await context.abort(*_network_error(error))
        rpc.end()
        return answer

    async def stream(
        self, messages: AsyncIterator[DataRequest], context: Any = None, *_: Any, **__: Any
    ) -> AsyncIterator[DataRequest]:
        """Answer requests side by side, in their order.

        Jina answers in order only clients that ask for it; who does not (`results_in_order`) takes
        for granted that the first embedding is that of the first Document, and small requests
        overtake others in an Executor that batches over all of them.
        """
        rpc = _Rpc(context)
        answered: asyncio.Queue[asyncio.Task | None] = asyncio.Queue()
        ahead = asyncio.Semaphore(rpc.num_ahead)
        running: set[asyncio.Task] = set()
        reading = asyncio.create_task(self._read(messages, rpc, answered, ahead, running))
        # also where the client goes away in the middle of a message
        reading.add_done_callback(lambda _: answered.put_nowait(None))
        try:
            while (task := await answered.get()) is not None:
                try:
                    answer = await task
                except InternalNetworkError as error:
                    code, details = _network_error(error)
                    context.set_code(code)
                    context.set_details(details)
                    answer = Response()
                ahead.release()
                yield answer
            rpc.end()
            await reading
        finally:
            # whoever goes away is not answered, and holds no places among those who are
            unfinished = [reading, *running]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def stream_doc(self, _: Any, context: Any) -> AsyncIterator[None]:
        """Refuse: Jina would hand the Document on with nobody's name on it."""
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, 'this server streams no single Documents: use post()'
        )
        yield  # a generator is what gRPC expects here

    async def _read(
        self,
        messages: AsyncIterator[DataRequest],
        rpc: _Rpc,
        answered: asyncio.Queue[asyncio.Task | None],
        ahead: asyncio.Semaphore,
        running: set[asyncio.Task],
    ) -> None:
        sizes: dict[asyncio.Task, int] = {}
        async for message in messages:
            request, refusal = _taken_from(message), None
            size = len(request.buffer or b'')
            try:
                self._budget.take_or_refuse(size)
            except TooManyRequestsError as error:
                request, size, refusal = DataRequest(), 0, error
            try:
                while sizes and sum(sizes.values()) + size > _MOST_BYTES_AHEAD:
                    await asyncio.wait(sizes, return_when=asyncio.FIRST_COMPLETED)
                await ahead.acquire()
            except asyncio.CancelledError:
                self._budget.give_back(size)
                raise
            task = asyncio.create_task(self._answer(request, rpc, refusal))
            del request  # only the task is to hold what the budget counts for it
            sizes[task] = size
            running.add(task)
            # not in the task itself: one that is cancelled early never runs
            task.add_done_callback(lambda task: self._budget.give_back(sizes.pop(task)))
            task.add_done_callback(running.discard)
            answered.put_nowait(task)
        if running:
            await asyncio.wait(running)

    async def _answer(
        self, request: DataRequest, rpc: _Rpc, refusal: TooManyRequestsError | None = None
    ) -> DataRequest:
        call = rpc.next_call()
        identity = current_identity.get()
        call.user = identity.user if identity is not None else ''
        try:
            if refusal is not None:
                return refuse(request, refusal, call)
            return await self._dispatcher.answer(request, call)
        except InternalNetworkError as error:
            call.status = 504 if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED else 503
            raise
        except asyncio.CancelledError:
            call.status = GONE
            raise
        finally:
            rpc.note(call)
            self._journal.finish(call)


def _taken_from(message: DataRequest) -> DataRequest:
    """What a message brought, which gRPC keeps until the next one comes, however long that takes."""
    if not message.buffer:
        return message
    request = DataRequest(message.buffer)
    message.buffer = b''
    return request


class _Rpc:
    """What the metadata of a call says, and what its trailing metadata will say."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata() or ())
        self._context = context
        self._id = request_id_of(metadata.get(ID_HEADER))
        self._count = 0
        self._retry_after: float | None = None
        wanted = metadata.get('__prefetch__', '')
        ahead = int(wanted) if wanted.isdecimal() and len(wanted) < 10 else _MOST_AHEAD
        self.num_ahead = min(max(ahead, 1), _MOST_AHEAD)

    def next_call(self) -> Call:
        """The next request; the first has the id of the whole."""
        self._count += 1
        request_id = self._id if self._count == 1 else f'{self._id}.{self._count}'
        return Call('grpc', request_id, self._context.time_remaining())

    def note(self, call: Call) -> None:
        """Remember when a request that was refused may come again."""
        if call.retry_after is not None:
            self._retry_after = max(call.retry_after, self._retry_after or 0.0)

    def end(self) -> None:
        """Tell the id, and when to come again."""
        trailing = [(ID_HEADER, self._id)]
        if self._retry_after is not None:
            trailing.append(('retry-after', f'{self._retry_after:g}'))
        self._context.set_trailing_metadata(tuple(trailing))


def _network_error(error: InternalNetworkError) -> tuple[grpc.StatusCode, str]:
    """What a client may know of it: no address of an Executor."""
    waited = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    return error.code(), _LATE if waited else _UNREACHABLE


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Turns away gRPC calls without the token; health stays open.

    Args:
        token: the check.
    """

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
        identity = await self._token.identify_soon(given)
        if identity is None:
            return _refusing(handler)
        current_identity.set(identity)
        return handler


def _refusing(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """One that reads no message: gRPC would have all of a single one in memory before it calls."""

    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, DENIED)

    async def refuse_stream(_: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        # a client that is still sending when it is refused may see an internal error instead
        await asyncio.sleep(_REFUSAL_SECONDS)
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, DENIED)
        yield  # a generator is what gRPC expects here

    # on the wire a single message is a stream of one
    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse_stream)
    return grpc.stream_unary_rpc_method_handler(refuse)
