"""Processes that compute the columns of rows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

from finetuner.excepts import DataError
from finetuner.process_pool import ProcessPool


def run_in_processes(
    tasks: Iterator[Any],
    compute: Callable[[Any], Any],
    num_workers: int,
    size_of: Callable[[Any], int],
) -> Generator[tuple[Any, int, float], None, None]:
    """Compute tasks in processes, which are gone when this ends.

    Args:
        tasks: each is asked for when a process is free to take it.
        compute: computes a task, in the process.
        num_workers: how many processes.
        size_of: what the caller wants to know of a task when it is done.

    Close it (`contextlib.closing`), for its processes to be gone whatever goes wrong meanwhile.

    Yields:
        What came of a task, its size, and the seconds that it took; in the order in which they are done.

    Raises:
        DataError: a process was killed, or ended by itself.
        RuntimeError: `compute` raised an error.
    """
    pool = ProcessPool(compute, num_workers, name='column', remember=size_of)
    with closing(pool.run(tasks)) as finished:
        for done in finished:
            if done.death:
                raise DataError(
                    f'a process that computes {done.death}, perhaps for memory: what was computed '
                    'before is kept; go on with fewer workers'
                )
            if done.error:
                raise RuntimeError(f'a process that computes failed:\n{done.error}')
            yield done.result, done.task, done.seconds
