"""Requests to endpoints over HTTP: JSON in, JSON out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import orjson
from docarray import DocumentArray
from fastapi import Request, Response
from google.protobuf.json_format import MessageToDict
from jina.proto import jina_pb2
from jina.types.request.data import DataRequest
from starlette.requests import ClientDisconnect

from finetuner.excepts import ConfigError, TooLargeError
from finetuner.server.calls import Call
from finetuner.server.dispatch import TIMED
from finetuner.server.errors import http_status
from finetuner.server.http_door import Door, call_of
from finetuner.server.http_errors import error_answer, set_retry_after
from finetuner.server.json_documents import read_body, write_documents
from finetuner.server.limits import Limits

# less than this is read and written sooner than a thread is found for it
_SMALL_BYTES = 64 << 10
# brackets and commas of a body: each may make an object of Python's, of up to 64 bytes and more
_MAX_VALUES = 10_000_000


async def answer_call(request: Request, door: Door) -> Response:
    """Answer a POST to an endpoint, or to Jina's `/post`, which names one in its body.

    Args:
        request: not read yet.
        door: of the gateway.

    Raises:
        FinetunerError: the request cannot be read or taken.
    """
    path = request.url.path
    check_content_type(request)
    with call_of(request, door) as call:
        raw = await request.body()
        # parsing and base64 of megabytes must not hold up the other requests of this process
        docs, parameters, endpoint, target = await in_thread(len(raw), _read, raw, door.limits)
        del raw
        if path != '/post':
            endpoint = path
        elif not endpoint:
            raise ConfigError('`exec_endpoint` is missing: name the endpoint, such as "/encode"')
        elif not endpoint.startswith('/'):
            endpoint = f'/{endpoint}'
        answer = await send(door, call, request, endpoint, docs, parameters, target)
        status = answer.header.status
        if status.code == jina_pb2.StatusProto.ERROR:
            name = status.exception.name
            refusal = error_answer(name, status.description, http_status(name) or 500)
            set_retry_after(refusal, call.retry_after)
            return refusal
        return await in_thread(answer.nbytes, _write_answer, answer)


def check_content_type(request: Request) -> None:
    """Refuse what is not JSON.

    Raises:
        ConfigError: it is not.
    """
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'application/json':
        # also what keeps a page of another origin from posting without asking the browser
        raise ConfigError(
            f'the content type is {kind or "missing"!r}: send `Content-Type: application/json` '
            "(curl: -H 'Content-Type: application/json')"
        )


def check_values(raw: bytes) -> None:
    """Refuse JSON that would take many times its size in memory.

    Raises:
        TooLargeError: it would.
    """
    if len(raw) > _MAX_VALUES:
        count = sum(raw.count(mark) for mark in (b'{', b'[', b','))
        if count > _MAX_VALUES:
            raise TooLargeError(
                f'the body holds more than {_MAX_VALUES:,} values: send tensors as `blob`, or fewer '
                'Documents at a time'
            )


async def in_thread(num_bytes: int, function: Any, *arguments: Any) -> Any:
    """Call a function; in a thread where it has much to do."""
    if num_bytes < _SMALL_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


async def send(
    door: Door,
    call: Call,
    asked: Request,
    endpoint: str,
    docs: DocumentArray,
    parameters: dict[str, Any],
    target: str | None = None,
) -> DataRequest:
    """Have the Executors answer.

    Args:
        door: of the gateway.
        call: the request belongs to.
        asked: the request over HTTP, read.
        endpoint: such as `/encode`.
        docs: to send.
        parameters: for the endpoint.
        target: regular expression for names of Executors.

    Raises:
        ClientDisconnect: nobody waits for the answer any more, and nothing but it was wanted.
    """
    request = DataRequest()
    request.header.exec_endpoint = endpoint
    if target:
        request.header.target_executor = target
    request.parameters = parameters
    request.data.docs = docs
    call.num_documents = len(docs)
    answering = door.dispatcher.answer(request, call)
    if endpoint not in TIMED:  # what others change is to be whole
        return await answering
    return await _unless_gone(asked, answering)


async def _unless_gone(asked: Request, answering: Coroutine[Any, Any, DataRequest]) -> DataRequest:
    """Await an answer for as long as its client does."""

    async def leave() -> None:
        while (await asked.receive())['type'] != 'http.disconnect':
            pass

    tasks = asyncio.create_task(answering), asyncio.create_task(leave())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _read(
    raw: bytes, limits: Limits
) -> tuple[DocumentArray, dict[str, Any], str | None, str | None]:
    check_values(raw)
    return read_body(raw, limits)


def _write_answer(answer: DataRequest) -> Response:
    written = MessageToDict(
        answer.proto_wo_data, preserving_proto_field_name=True, use_integers_for_enums=True
    )
    written['data'] = write_documents(answer.data.docs)
    return Response(dump(written), media_type='application/json')


def dump(value: Any) -> bytes:
    """JSON of values and arrays, in which what is not a number is null."""
    return orjson.dumps(value, default=_array_as_list, option=orjson.OPT_SERIALIZE_NUMPY)


def _array_as_list(value: Any) -> Any:
    """Arrays that orjson does not know: not contiguous, or of half precision."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError
