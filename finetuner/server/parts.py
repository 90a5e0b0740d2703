"""Requests that came to an Executor in one call, answered each by itself.

The gateway joins them, and cuts the answer: `finetuner.server.coalescing`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from docarray import DocumentArray
from jina import Executor

from finetuner.excepts import FinetunerError
from finetuner.server.refusals import log_refusal

# the endpoint of an Executor that takes requests in parts; clients cannot reach it
ENDPOINT = '/_encode_parts'
# what is asked of each part
PART_OF = '/encode'
TIMEOUT_PARAMETER = '__timeout'
PARTS_PARAMETER = '__parts'
# a part that takes longer than the first one did, times this and at least so long, is asked for
# again by itself
_PATIENCE = 4.0
_PATIENCE_SECONDS = 1.0
# Documents, and what is told of them
_Answered = tuple[DocumentArray, dict[str, Any]]


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
    of_all = {name: value for name, value in parameters.items() if name != PARTS_PARAMETER}
    begin, asked = 0, []
    for count, seconds in parameters[PARTS_PARAMETER]:
        part = docs[begin : begin + int(count)]
        begin += int(count)
        its_own = {**of_all, TIMEOUT_PARAMETER: seconds}
        asked.append(_answer_part(executor, part, its_own, tracing_context))
    seconds = min(seconds for _, seconds in parameters[PARTS_PARAMETER])
    answered = await _within_reason(asked, seconds)
    docs.clear()
    told = []
    for each in answered:
        if each is None:
            told.append({'count': 0, 'again': True})
            continue
        docs.extend(each[0])
        told.append({'count': len(each[0]), **each[1]})
    return {PARTS_PARAMETER: told}


async def _within_reason(
    asked: list[Coroutine[Any, Any, _Answered]], seconds: float
) -> list[_Answered | None]:
    """What comes of all parts; None for those that would keep the others waiting.

    Args:
        asked: the parts.
        seconds: after which the first client has gone.

    Raises:
        Exception: one broke as no request should: each is asked for again by itself, where Jina sees
            it break.
    """
    began = time.monotonic()
    tasks = [asyncio.ensure_future(each) for each in asked]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        passed = time.monotonic() - began
        patience = min(max(_PATIENCE_SECONDS, _PATIENCE * passed), max(0.0, seconds - passed))
        await asyncio.wait(tasks, timeout=patience)
        return [task.result() if task.done() else None for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer_part(
    executor: Executor, docs: DocumentArray, parameters: dict[str, Any], tracing_context: Any
) -> _Answered:
    try:
        returned = await executor.__acall__(
            PART_OF,
            docs=docs,
            parameters=parameters,
            docs_matrix=[docs],
            docs_map={},
            tracing_context=tracing_context,
        )
    except FinetunerError as error:
        log_refusal(executor.runtime_args, error)
        return DocumentArray(), {
            'error': type(error).__name__,
            'arguments': [str(argument) for argument in error.args],
            'executor': type(executor).__name__,
        }
    if isinstance(returned, DocumentArray):
        return returned, {}
    return docs, {} if returned is None else {'result': returned}
