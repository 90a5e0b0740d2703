"""Threads that decompress and compress beside the one that asks: zlib lets them run at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from finetuner.cores import num_cores

Item = TypeVar('Item')
Result = TypeVar('Result')

# more than these wait for each other, as Python runs one at a time between its calls of zlib
_MOST_THREADS = 8

_pool: ThreadPoolExecutor | None = None


def num_threads() -> int:
    """How many threads there are: one a core, within bounds."""
    return min(num_cores(), _MOST_THREADS)


def submit(work: Callable[..., Result], *arguments: object) -> Future[Result]:
    """Have something done by the threads of this process."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(num_threads(), 'collections')
    return _pool.submit(work, *arguments)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """Do something with each item, some of them ahead of time.

    Args:
        work: what to do; in other threads.
        items: read by the thread that asks for results.
        ahead: how many results may wait to be taken.

    Yields:
        A result an item, in the order of the items.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _forget() -> None:
    """A forked process has the object, but none of its threads."""
    global _pool
    _pool = None


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget)
