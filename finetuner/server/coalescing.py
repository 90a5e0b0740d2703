"""Small requests that come together, sent to an Executor in one call: both ends of it.

A call costs a millisecond of CPU on either side, a small picture ten: where many clients ask for one
embedding each, a tenth of the machine would go to calls. While some are on their way, small requests
wait for each other for a few milliseconds and travel as parts of one, their Documents joined and the
answer's cut as bytes. Each part is answered by itself, in the Executor's own endpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from docarray import DocumentArray
from google.protobuf.struct_pb2 import Struct, Value
from jina import Executor
from jina.proto import jina_pb2
from jina.types.request.data import DataRequest

from finetuner.excepts import FinetunerError
from finetuner.server.wire import Documents, array_of, data_of, split_documents

# the endpoint of an Executor that takes requests in parts; clients cannot reach it
ENDPOINT = '/_encode_parts'
# what is asked of each part
PART_OF = '/encode'
TIMEOUT_PARAMETER = '__timeout'
ID_PARAMETER = '__request_id'
_PARTS_PARAMETER = '__parts'
_RESULTS = '__results__'
# of one call
MOST_DOCUMENTS = 16
# of a request; larger ones have little to gain
MOST_OF_ONE = 8
_MOST_BYTES_OF_ONE = 256 << 10
# calls on their way, below which a request goes at once and alone
_FREE_CALLS = 2
_WAIT_SECONDS = 0.005


def is_small(documents: Documents) -> bool:
    """Whether a request is one to be sent together with others.

    One with an address is none: its neighbours would wait for somebody's server.
    """
    return (
        0 < documents.count <= MOST_OF_ONE
        and documents.are_plain
        and documents.num_bytes <= _MOST_BYTES_OF_ONE
    )


@dataclass(eq=False)
class _Part:
    """A request that waits for others, or for its answer.

    Attributes:
        request: as it is sent alone.
        documents: its own.
        until: when nobody wants the answer any more, on the clock `time.monotonic`.
        answer: what came of it.
    """

    request: DataRequest
    documents: Documents
    until: float
    answer: asyncio.Future[DataRequest]


@dataclass(eq=False)
class _Group:
    """Parts that have the same parameters, and wait to be sent."""

    parts: list[_Part] = field(default_factory=list)
    num_documents: int = 0
    timer: asyncio.TimerHandle | None = None


class Coalescer:
    """Sends requests to one Executor, small ones together where many come.

    Args:
        send: has the Executor answer a request, at an endpoint.
        observe: hears how many requests go in each call.
    """

    def __init__(
        self,
        send: Callable[[DataRequest, str], Awaitable[DataRequest]],
        observe: Callable[[int], None],
    ) -> None:
        self._send = send
        self._observe = observe
        self._num_calls = 0
        # by their parameters, oldest first
        self._groups: dict[bytes, _Group] = {}
        self._tasks: set[asyncio.Task] = set()

    async def answer(self, request: DataRequest, documents: Documents, until: float) -> DataRequest:
        """Answer a small request.

        Args:
            request: with the parameters of the gateway in it.
            documents: its own.
            until: when nobody wants the answer any more, on the clock `time.monotonic`.
        """
        if self._num_calls < _FREE_CALLS:
            return await self._call(request, PART_OF, 1)
        part = _Part(request, documents, until, asyncio.get_running_loop().create_future())
        self._add(part)
        return await part.answer

    async def _call(self, request: DataRequest, endpoint: str, num_requests: int) -> DataRequest:
        self._num_calls += 1
        self._observe(num_requests)
        try:
            return await self._send(request, endpoint)
        finally:
            self._num_calls -= 1
            if self._groups and self._num_calls < _FREE_CALLS:
                self._start(next(iter(self._groups)))

    def _add(self, part: _Part) -> None:
        key = _parameters_of_all(part.request).SerializeToString(deterministic=True)
        group = self._groups.get(key)
        if group and group.num_documents + part.documents.count > MOST_DOCUMENTS:
            self._start(key)
            group = None
        if group is None:
            group = self._groups[key] = _Group()
            loop = asyncio.get_running_loop()
            group.timer = loop.call_later(_WAIT_SECONDS, self._start, key)
        group.parts.append(part)
        group.num_documents += part.documents.count
        if group.num_documents == MOST_DOCUMENTS:
            self._start(key)

    def _start(self, key: bytes) -> None:
        group = self._groups.pop(key)
        if group.timer is not None:
            group.timer.cancel()
        parts = [part for part in group.parts if not part.answer.done()]
        if not parts:
            return
        task = asyncio.ensure_future(self._answer_all(parts))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def cancel_if_all_are_gone(_: Any) -> None:
            if all(part.answer.cancelled() for part in parts):
                task.cancel()

        for part in parts:
            part.answer.add_done_callback(cancel_if_all_are_gone)

    async def _answer_all(self, parts: list[_Part]) -> None:
        if len(parts) == 1:
            await self._answer_alone(parts[0])
            return
        answers = None
        try:
            answers = _cut(await self._call(_join(parts), ENDPOINT, len(parts)), parts)
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            for part in parts:
                if not part.answer.done():
                    part.answer.set_exception(error)
            return
        if answers is None:
            # one that nobody can read must not take the others with it
            await asyncio.gather(*map(self._answer_alone, parts))
            return
        for part, answer in zip(parts, answers, strict=True):
            if not part.answer.done():
                part.answer.set_result(answer)

    async def _answer_alone(self, part: _Part) -> None:
        try:
            answer = await self._call(part.request, PART_OF, 1)
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            if not part.answer.done():
                part.answer.set_exception(error)
        else:
            if not part.answer.done():
                part.answer.set_result(answer)


def _parameters_of_all(request: DataRequest) -> Struct:
    """The parameters but those that belong to one request alone."""
    kept = Struct()
    kept.CopyFrom(request.proto_wo_data.parameters)
    for name in (TIMEOUT_PARAMETER, ID_PARAMETER):
        kept.fields.pop(name, None)
    return kept


def _join(parts: list[_Part]) -> DataRequest:
    now = time.monotonic()
    message = jina_pb2.DataRequestProtoWoData()
    message.header.request_id = parts[0].request.header.request_id
    message.header.exec_endpoint = ENDPOINT
    message.parameters.CopyFrom(_parameters_of_all(parts[0].request))
    told = message.parameters.fields[_PARTS_PARAMETER].list_value
    for part in parts:
        told.append([part.documents.count, max(0.0, part.until - now)])
    arrays = (array for part in parts for array in part.documents.arrays)
    return DataRequest(message.SerializeToString() + data_of(arrays))


def _cut(answer: DataRequest, parts: list[_Part]) -> list[DataRequest] | None:
    """The answer to each part; None where there is one to all of them, which is an error."""
    raw = answer.buffer if answer.buffer is not None else answer.SerializeToString()
    whole = answer.proto_wo_data
    if whole.header.status.code == jina_pb2.StatusProto.ERROR:
        return None
    ((executor, told),) = whole.parameters.fields[_RESULTS].struct_value.fields.items()
    results = told.struct_value.fields[_PARTS_PARAMETER].list_value
    counts = [int(result.struct_value['count']) for result in results.values]
    docs, begin = split_documents(raw, sum(counts)), 0
    answers = []
    for part, count, result in zip(parts, counts, results.values, strict=True):
        answers.append(
            _answer_of(part, executor, whole.routes, result, docs[begin : begin + count])
        )
        begin += count
    return answers


def _answer_of(
    part: _Part, executor: str, routes: Any, result: Value, docs: list[memoryview]
) -> DataRequest:
    fields = result.struct_value.fields
    message = jina_pb2.DataRequestProtoWoData()
    asked = part.request.proto_wo_data
    message.header.CopyFrom(asked.header)
    message.routes.MergeFrom(routes)
    if 'error' in fields:
        status = message.header.status
        status.code = jina_pb2.StatusProto.ERROR
        status.exception.name = fields['error'].string_value
        status.exception.executor = fields['executor'].string_value
        status.exception.args.extend(fields['arguments'].list_value)
        return DataRequest(message.SerializeToString())
    message.parameters.CopyFrom(asked.parameters)
    if 'result' in fields:
        mine = message.parameters.fields[_RESULTS].struct_value
        mine.fields[executor].CopyFrom(fields['result'])
    return DataRequest(message.SerializeToString() + data_of([array_of(docs)]))


async def answer_parts(
    executor: Executor, docs: DocumentArray, parameters: dict[str, Any], tracing_context: Any
) -> dict[str, Any]:
    """Answer each part of a request by itself, at the Executor's end.

    Args:
        executor: whose endpoint is asked for each.
        docs: of all parts, one after the other; what came of them when this returns.
        parameters: of all parts; one tells which Documents belong to which.
        tracing_context: of the span of the request, where Jina traces.

    Returns:
        For each part how many Documents of the answer are its own, and what the endpoint returned
        or raised.
    """
    of_all = {name: value for name, value in parameters.items() if name != _PARTS_PARAMETER}
    begin, asked = 0, []
    for count, seconds in parameters[_PARTS_PARAMETER]:
        part = docs[begin : begin + int(count)]
        begin += int(count)
        its_own = {**of_all, TIMEOUT_PARAMETER: seconds}
        asked.append(_answer_part(executor, part, its_own, tracing_context))
    answered = await asyncio.gather(*asked)
    docs.clear()
    for part, _ in answered:
        docs.extend(part)
    return {_PARTS_PARAMETER: [{'count': len(part), **told} for part, told in answered]}


async def _answer_part(
    executor: Executor, docs: DocumentArray, parameters: dict[str, Any], tracing_context: Any
) -> tuple[DocumentArray, dict[str, Any]]:
    try:
        returned = await executor.__acall__(
            PART_OF,
            docs=docs,
            parameters=parameters,
            docs_matrix=[docs],
            docs_map={},
            tracing_context=tracing_context,
        )
    except Exception as error:  # its client is told, its neighbours are answered
        if not isinstance(error, FinetunerError):
            executor.logger.error(f'{error!r}', exc_info=True)
        return DocumentArray(), {
            'error': type(error).__name__,
            'arguments': [str(argument) for argument in error.args],
            'executor': type(executor).__name__,
        }
    if isinstance(returned, DocumentArray):
        return returned, {}
    return docs, {} if returned is None else {'result': returned}
