"""What an Executor logs of a request that it refuses: a line, where Jina prints pages of stack.

A client's mistake is no failure of the server, the client is told of it, and who can make many must not
have the server draw a stack for each.
"""

from __future__ import annotations

import logging
from typing import Any

from finetuner.excepts import FinetunerError

_MOST_CHARACTERS = 300


class _Refusals(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FinetunerError):
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
    name = getattr(runtime_args, 'name', None)
    if name:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Refusals) for each in logger.filters):
            logger.addFilter(_Refusals())
