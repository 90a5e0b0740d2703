"""Small requests that come together, sent to an Executor in one call: the gateway's end of it.

A call costs a millisecond of CPU on either side, a small picture ten: where many clients ask for one
embedding each, a tenth of the machine would go to calls. While some are on their way, small requests
wait for each other for a few milliseconds and travel as parts of one, their Documents joined and the
answer's cut as bytes. Each part is answered by itself, in the Executor's own endpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value
from jina.proto import jina_pb2
from jina.types.request.data import DataRequest

from finetuner.excepts import TooLargeError
from finetuner.server.parts import ENDPOINT, PART_OF, PARTS_PARAMETER, TIMEOUT_PARAMETER
from finetuner.server.wire import Documents, array_of, data_of, find_documents, split_documents

ID_PARAMETER = '__request_id'
_RESULTS = '__results__'
# of one call
MOST_DOCUMENTS = 16
# of a request; larger ones have little to gain
MOST_OF_ONE = 8
_MOST_BYTES_OF_ONE = 256 << 10
_MOST_BYTES_BUILT = 2 * _MOST_BYTES_OF_ONE
# calls on their way, below which a request goes at once and alone
_FREE_CALLS = 2
_WAIT_SECONDS = 0.005
# finds the Documents of a request; None where they are too large to go with others
FindSmall = Callable[[], Documents | None]


def is_small(documents: Documents) -> bool:
    """Whether a request is one to be sent together with others.

    One with an address is none: its neighbours would wait for somebody's server.
    """
    return (
        0 < documents.count <= MOST_OF_ONE
        and documents.are_plain
        and documents.num_bytes <= _MOST_BYTES_OF_ONE
    )


def small_documents_of(request: DataRequest) -> Documents | None:
    """The Documents of a request that was built here; None where they go alone.

    Args:
        request: with its Documents, at most `MOST_OF_ONE`.
    """
    if request.proto.ByteSize() > _MOST_BYTES_BUILT:
        return None
    try:
        found = find_documents(request.SerializeToString(), MOST_OF_ONE)
    except TooLargeError:  # of tags, which only messages over gRPC are refused for
        return None
    return found if is_small(found) else None


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
    """Parts that have the same parameters, and wait to be sent.

    Attributes:
        parameters: of them all; those that belong to one request alone are left out.
    """

    parameters: Struct
    parts: list[_Part] = field(default_factory=list)
    num_documents: int = 0
    timer: asyncio.TimerHandle | None = None


class Coalescer:
    """Sends requests to one Executor, small ones together where many come.

    Args:
        send: has the Executor answer a request, at an endpoint.
        observe: hears how many requests go in each call.
        count_replicas: of the Executor, each of which has calls of its own.
    """

    def __init__(
        self,
        send: Callable[[DataRequest, str], Awaitable[DataRequest]],
        observe: Callable[[int], None],
        count_replicas: Callable[[], int] = lambda: 1,
    ) -> None:
        self._send = send
        self._observe = observe
        self._count_replicas = count_replicas
        self._num_calls = 0
        # by their parameters, oldest first
        self._groups: dict[bytes, _Group] = {}
        self._tasks: set[asyncio.Task] = set()

    async def answer(
        self, request: DataRequest, find_small: FindSmall, until: float
    ) -> DataRequest:
        """Answer a small request.

        Args:
            request: with the parameters of the gateway in it.
            find_small: finds its Documents; asked only where it may have to wait for others.
            until: when nobody wants the answer any more, on the clock `time.monotonic`.
        """
        documents = None if self._has_free_call else find_small()
        if documents is None:
            return await self._call(request, PART_OF, 1)
        part = _Part(request, documents, until, asyncio.get_running_loop().create_future())
        self._add(part)
        return await part.answer

    @property
    def _has_free_call(self) -> bool:
        return self._num_calls < _FREE_CALLS * max(1, self._count_replicas())

    async def _call(self, request: DataRequest, endpoint: str, num_requests: int) -> DataRequest:
        self._num_calls += 1
        self._observe(num_requests)
        try:
            return await self._send(request, endpoint)
        finally:
            self._num_calls -= 1
            if self._groups and self._has_free_call:
                self._start(next(iter(self._groups)))

    def _add(self, part: _Part) -> None:
        parameters = _parameters_of_all(part.request)
        key = parameters.SerializeToString(deterministic=True)
        group = self._groups.get(key)
        if group and group.num_documents + part.documents.count > MOST_DOCUMENTS:
            self._start(key)
            group = None
        if group is None:
            group = self._groups[key] = _Group(parameters)
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
        if len(parts) == 1:
            self._run(self._answer_alone(parts[0]), parts)
        elif parts:
            self._run(self._answer_all(parts, group.parameters), parts)

    def _run(self, answering: Coroutine[Any, Any, None], parts: list[_Part]) -> None:
        """Have parts answered for as long as somebody waits for one of them."""
        task = asyncio.ensure_future(answering)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def cancel_if_all_are_gone(_: Any) -> None:
            if all(part.answer.cancelled() for part in parts):
                task.cancel()

        for part in parts:
            part.answer.add_done_callback(cancel_if_all_are_gone)

    async def _answer_all(self, parts: list[_Part], parameters: Struct) -> None:
        with _told(parts):
            whole = await self._call(_join(parts, parameters), ENDPOINT, len(parts))
            answers = _cut(whole, parts)
            for part, answer in zip(parts, answers, strict=True):
                if part.answer.done():
                    continue
                if answer is None:
                    self._run(self._answer_alone(part), [part])
                else:
                    part.answer.set_result(answer)

    async def _answer_alone(self, part: _Part) -> None:
        with _told([part]):
            left = max(0.0, part.until - time.monotonic())
            part.request.proto_wo_data.parameters[TIMEOUT_PARAMETER] = left
            answer = await self._call(part.request, PART_OF, 1)
            if not part.answer.done():
                part.answer.set_result(answer)


@contextmanager
def _told(parts: list[_Part]) -> Iterator[None]:
    """Whatever goes wrong, whoever waits is told; nobody waits for ever."""
    try:
        yield
    except BaseException as error:
        for part in parts:
            if part.answer.done():
                continue
            if isinstance(error, Exception):
                part.answer.set_exception(error)
            else:
                part.answer.cancel()
        if not isinstance(error, Exception):
            raise


def _parameters_of_all(request: DataRequest) -> Struct:
    """The parameters but those that belong to one request alone."""
    kept = Struct()
    kept.CopyFrom(request.proto_wo_data.parameters)
    for name in (TIMEOUT_PARAMETER, ID_PARAMETER):
        kept.fields.pop(name, None)
    return kept


def _join(parts: list[_Part], parameters: Struct) -> DataRequest:
    now = time.monotonic()
    message = jina_pb2.DataRequestProtoWoData()
    message.header.request_id = parts[0].request.header.request_id
    message.header.exec_endpoint = ENDPOINT
    message.parameters.CopyFrom(parameters)
    told = message.parameters.fields[PARTS_PARAMETER].list_value
    for part in parts:
        told.append([part.documents.count, max(0.0, part.until - now)])
    arrays = (array for part in parts for array in part.documents.arrays)
    return DataRequest(message.SerializeToString() + data_of(arrays))


def _cut(answer: DataRequest, parts: list[_Part]) -> list[DataRequest | None]:
    """The answer to each part; None for those that have to be asked for again, each by itself."""
    raw = answer.buffer if answer.buffer is not None else answer.SerializeToString()
    whole = answer.proto_wo_data
    by_executor = whole.parameters.fields[_RESULTS].struct_value.fields
    # what one request did wrong must not be told the others; where several answered, as shards
    # may that are all asked, there is no telling whose Documents these are
    if whole.header.status.code == jina_pb2.StatusProto.ERROR or len(by_executor) != 1:
        return [None] * len(parts)
    ((executor, told),) = by_executor.items()
    results = told.struct_value.fields[PARTS_PARAMETER].list_value.values
    counts = [int(result.struct_value['count']) for result in results]
    docs = split_documents(raw, sum(counts))
    if len(counts) != len(parts) or len(docs) != sum(counts):
        return [None] * len(parts)
    answers: list[DataRequest | None] = []
    begin = 0
    for part, count, result in zip(parts, counts, results, strict=True):
        mine = docs[begin : begin + count]
        begin += count
        is_missing = 'again' in result.struct_value.fields
        answers.append(
            None if is_missing else _answer_of(part, executor, whole.routes, result, mine)
        )
    return answers


def _answer_of(
    part: _Part, executor: str, routes: Any, result: Value, docs: list[memoryview]
) -> DataRequest:
    fields = result.struct_value.fields
    message = jina_pb2.DataRequestProtoWoData()
    asked = part.request.proto_wo_data
    message.header.CopyFrom(asked.header)
    message.routes.MergeFrom(asked.routes)
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
