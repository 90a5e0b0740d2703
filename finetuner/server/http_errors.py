"""Errors as HTTP answers: as this server's endpoints tell them, and as OpenAI's do."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from finetuner.excepts import FinetunerError, TooManyRequestsError
from finetuner.server.errors import http_status

OPENAI = '/v1/'
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
    if path.startswith(OPENAI):
        return openai_error(message, status)
    return JSONResponse({'error': name, 'message': message}, status_code=status)


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


def answer_of(error: FinetunerError, path: str = '') -> JSONResponse:
    """An error that was raised on purpose."""
    name = type(error).__name__
    answer = error_answer(name, str(error), http_status(name) or 500, path)
    if isinstance(error, TooManyRequestsError):
        set_retry_after(answer, error.retry_after)
    return answer


def set_retry_after(answer: Any, seconds: float | None) -> None:
    """Say when to ask again; the header takes whole seconds."""
    if seconds is not None:
        answer.headers['retry-after'] = str(max(1, math.ceil(seconds)))
