"""Files are brought in before what names them is committed: meanwhile nothing may prune them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuner.excepts import ConflictError


@contextmanager
def writing(sql_file: Path) -> Iterator[None]:
    """While a process writes; any number may. Who is killed writes no more."""
    with _lock_file(sql_file).open('ab') as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def pruning(sql_file: Path) -> Iterator[None]:
    """While nobody writes.

    Raises:
        ConflictError: somebody does.
    """
    with _lock_file(sql_file).open('ab') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(
                f'{sql_file}: rows are being added or computed: prune when that is done'
            ) from error
        yield


def _lock_file(sql_file: Path) -> Path:
    return sql_file.with_name(f'.{sql_file.name}.lock')
