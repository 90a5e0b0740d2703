"""What a client is told when something fails: a name, a message and an HTTP status, never a stack."""

from __future__ import annotations

from finetuner import excepts

# the nearest class in an error's ancestry decides
_STATUS_OF = {
    excepts.NotFoundError: 404,
    excepts.ConflictError: 409,
    excepts.RunPreparingError: 409,
    excepts.RunInProgressError: 409,
    excepts.RunFailedError: 409,
    excepts.ForbiddenError: 403,
    excepts.TooLargeError: 413,
    excepts.TooManyRequestsError: 429,
    excepts.DeadlineError: 504,
    excepts.ServerError: 502,
    excepts.TrainingError: 500,
    excepts.FinetunerError: 422,
}


def http_status(name: str) -> int | None:
    """HTTP status of an error class, which arrives from an Executor only as a name.

    Args:
        name: class name such as `'DataError'`.

    Returns:
        The status, or None when the error was not raised on purpose: its message may hold
        anything, so nobody outside may read it.
    """
    error_class = getattr(excepts, name, None)
    if not isinstance(error_class, type) or not issubclass(error_class, excepts.FinetunerError):
        return None
    return next(_STATUS_OF[base] for base in error_class.__mro__ if base in _STATUS_OF)


def message_of_unexpected(request_id: str) -> str:
    """What stands in for the message of an error nobody foresaw."""
    return f'the server failed; its log says why, under request {request_id}'
