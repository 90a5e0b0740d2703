"""Errors as HTTP answers: as this server's endpoints tell them, and as OpenAI's do."""

from __future__ import annotations

import math
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from finetuner.excepts import FinetunerError, TooManyRequestsError
from finetuner.server.errors import http_status
from finetuner.server.page_views import render

OPENAI = '/v1/'
# what was wrong may be quoted from a request of any size
_MOST_LETTERS = 20_000
_OPENAI_CODES = {
    401: 'invalid_api_key',
    404: 'not_found',
    413: 'request_too_large',
    429: 'rate_limit_exceeded',
    504: 'timeout',
}


def error_answer(name: str, message: str, status: int, path: str = '') -> JSONResponse:
    """An error, in the shape that whoever asks for this path expects.

    Args:
        name: of its class.
        message: for people.
        status: of HTTP.
        path: that was asked for.
    """
    message = sayable(message)
    if path.startswith(OPENAI):
        return openai_error(message, status)
    return JSONResponse({'error': name, 'message': message}, status_code=status)


def sayable(message: str) -> str:
    """A message as an answer can hold it: not without end, and without halves of characters."""
    if len(message) > _MOST_LETTERS:
        message = f'{message[:_MOST_LETTERS]}...'
    return message.encode('utf-8', 'backslashreplace').decode()


def openai_error(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error as OpenAI's API tells it, which knows 400 where this server says 422.

    Args:
        message: for people.
        status: of HTTP.
        param: key of the body that was wrong.
        code: None for the usual one of the status.
    """
    status = 400 if status == 422 else status
    kind = 'invalid_request_error'
    if status >= 500:
        kind = 'server_error'
    elif status == 429:
        kind = 'rate_limit_error'
    told = {
        'message': message,
        'type': kind,
        'param': param,
        'code': code or _OPENAI_CODES.get(status),
    }
    return JSONResponse({'error': told}, status_code=status)


def status_of(error: FinetunerError) -> int:
    """What HTTP calls an error."""
    return http_status(type(error).__name__) or 500


async def error_to(request: Request, error: Exception) -> Response:
    """An error that was raised on purpose, as a page for whoever looks at pages.

    Args:
        request: it is the answer to.
        error: a `FinetunerError`; any other is raised again.
    """
    if not isinstance(error, FinetunerError):
        raise error
    if request.url.path.startswith('/ui') and 'text/html' in request.headers.get('accept', ''):
        status = status_of(error)
        title = {404: 'Not found', 403: 'Not allowed', 409: 'Not now'}.get(status, 'This cannot be')
        message = sayable(str(error))
        return render(request, 'error.html', status_code=status, title=title, message=message)
    return answer_of(error, request.url.path)


def answer_of(error: FinetunerError, path: str = '') -> JSONResponse:
    """An error that was raised on purpose."""
    answer = error_answer(type(error).__name__, str(error), status_of(error), path)
    if isinstance(error, TooManyRequestsError):
        set_retry_after(answer, error.retry_after)
    return answer


def set_retry_after(answer: Any, seconds: float | None) -> None:
    """Say when to ask again; the header takes whole seconds."""
    if seconds is not None:
        answer.headers['retry-after'] = str(max(1, math.ceil(seconds)))
