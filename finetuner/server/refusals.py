"""What an Executor logs of a request that it refuses: a line, where Jina prints pages of stack.

A client's mistake is no failure of the server, the client is told of it, and who can make many must not
have the server draw a stack for each.
"""

from __future__ import annotations

import logging
from typing import Any

from finetuner.excepts import FinetunerError
from finetuner.server.errors import http_status

_MOST_CHARACTERS = 300


class _Refusals(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        # what is wrong with the server itself keeps its stack
        if isinstance(error, FinetunerError) and (http_status(type(error).__name__) or 500) < 500:
            # Jina logs it while it is handled: the stack leads to our own check
            text = repr(str(error)[:_MOST_CHARACTERS])  # one line, with nothing a terminal obeys
            record.msg, record.args = f'refused: {type(error).__name__}: %s', (text,)
            record.exc_info = record.exc_text = None
            record.levelno, record.levelname = logging.WARNING, 'WARNING'
        return True


def log_refusals_briefly(runtime_args: Any) -> None:
    """Have the log of the process that an Executor runs in say less of refused requests.

    Args:
        runtime_args: what Jina handed the Executor; its `name` is that of Jina's logger.
    """
    logger = _logger_of(runtime_args)
    if logger is not None and not any(isinstance(each, _Refusals) for each in logger.filters):
        logger.addFilter(_Refusals())


def log_refusal(runtime_args: Any, error: FinetunerError) -> None:
    """Log one that Jina does not see, as it would.

    Args:
        runtime_args: see `log_refusals_briefly`.
        error: that is being handled.
    """
    logger = _logger_of(runtime_args)
    if logger is not None:
        logger.error('%r', error, exc_info=error)


def _logger_of(runtime_args: Any) -> logging.Logger | None:
    name = getattr(runtime_args, 'name', None)
    return logging.getLogger(name) if name else None
