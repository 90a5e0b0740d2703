"""Computing columns of many rows: in processes, one of which alone writes what they compute."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any

from finetuner.columns.computing import Planner, Results, Task, attached, compute
from finetuner.columns.declaring import Declaration
from finetuner.columns.files import put_all
from finetuner.columns.store import ColumnStore
from finetuner.console import console
from finetuner.excepts import ConfigError, DataError
from finetuner.storage.files import FileStore

_PAGE = 2000
_MOST_WORKERS = 256
_TASKS_AHEAD = 3
# of a task: few enough that a killed process loses little, and that the bar moves
_TASK_SECONDS = 0.1
_FIRST_ROWS = 4


def materialize(
    store: ColumnStore,
    ids: Sequence[int],
    names: Sequence[str],
    workers: int | None,
    retry: bool,
    progress: bool,
) -> int:
    """Compute derived columns of rows and keep their values; see `Rows.materialize`."""
    if workers is not None and (
        isinstance(workers, bool)
        or not isinstance(workers, int)
        or not 0 <= workers <= _MOST_WORKERS
    ):
        raise ConfigError(
            f'workers={workers!r}: it is a number of processes, 0 to {_MOST_WORKERS}, or None for one a '
            'core'
        )
    planner = Planner(store, names)
    if retry:
        store.forgive(ids, planner.versions)
    pace = _Pace()
    with store.writing(), _bar(names, len(ids), progress) as advance:
        tasks = _tasks(store, planner, ids, pace, advance)
        for results, num_rows in _run(store, tasks, _num_workers(workers), pace):
            store.keep(planner.keys, results.values, results.failures)
            advance(num_rows)
    versions = store.versions(planner.keys)
    return len({failure.row for failure in store.failures(ids, versions)})


class _Pace:
    """How many rows a task may have, as long as its seconds."""

    def __init__(self) -> None:
        self.num_rows = _FIRST_ROWS

    def learn(self, num_rows: int, seconds: float) -> None:
        """A task took so long."""
        wanted = int(num_rows * _TASK_SECONDS / max(seconds, 1e-9))
        # the first of a process is slower than those after it
        self.num_rows = max(1, min(wanted, 4 * max(num_rows, self.num_rows), _PAGE))


def _tasks(
    store: ColumnStore,
    planner: Planner,
    ids: Sequence[int],
    pace: _Pace,
    advance: Callable[[int], None],
) -> Iterator[Task]:
    """What is to be computed; what failed before is passed over."""
    for start in range(0, len(ids), _PAGE):
        page = ids[start : start + _PAGE]
        failed = {failure.row for failure in store.failures(page, planner.versions)}
        left = [row for row in page if row not in failed] if failed else page
        num_planned = 0
        for task in planner.tasks(left, lambda: pace.num_rows):
            num_planned += len(task.rows)
            yield task
        advance(len(page) - num_planned)


def _run(
    store: ColumnStore, tasks: Iterator[Task], num_workers: int, pace: _Pace
) -> Iterator[tuple[Results, int]]:
    """Compute tasks, some of them at a time."""
    if num_workers == 0:
        for task in tasks:
            begun = time.monotonic()
            results = compute(task, store.declaration, store.put)
            pace.learn(len(task.rows), time.monotonic() - begun)
            yield results, len(task.rows)
        return
    first = next(tasks, None)
    if first is None:
        # nothing to do is no reason to start processes
        return
    context = multiprocessing.get_context('fork' if _forks() else 'spawn')
    given = _Given(store.declaration, store.files)
    waiting: deque[tuple[int, Future[tuple[Results, float]]]] = deque()
    with ProcessPoolExecutor(num_workers, context, _begin, (given, os.getpid())) as pool:

        def finished() -> tuple[Results, int]:
            num_rows, future = waiting.popleft()
            results, seconds = future.result()
            pace.learn(num_rows, seconds)
            return results, num_rows

        try:
            for task in itertools.chain([first], tasks):
                waiting.append((len(task.rows), pool.submit(_compute_there, task)))
                if len(waiting) >= _TASKS_AHEAD * num_workers:
                    yield finished()
            while waiting:
                yield finished()
        except BrokenProcessPool as error:
            raise DataError(
                'a process that computed was killed, perhaps for memory: what was computed before is '
                'kept; go on with fewer workers'
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()


class _Given:
    """What a process that computes is given; functions of a notebook travel too."""

    def __init__(self, declaration: Declaration, files: FileStore) -> None:
        self.declaration = declaration
        self.files = files

    def __reduce__(self) -> Any:
        import cloudpickle

        return _given, (cloudpickle.dumps((self.declaration, self.files)),)


def _given(data: bytes) -> _Given:
    import cloudpickle

    return _Given(*cloudpickle.loads(data))


_here: _Given | None = None


def _begin(given: _Given, parent: int) -> None:
    global _here
    _here = given
    threading.Thread(target=_end_with, args=(parent,), name='end', daemon=True).start()


def _end_with(parent: int) -> None:
    """End when the process does that started this one: one that is killed tells nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _compute_there(task: Task) -> tuple[Results, float]:
    if _here is None:
        raise RuntimeError('this process was given nothing to compute')
    files = _here.files

    begun = time.monotonic()
    results = compute(attached(task, files), _here.declaration, partial(put_all, files))
    # their texts are kept; not every error can travel
    results.errors = []
    return results, time.monotonic() - begun


def _num_workers(workers: int | None) -> int:
    if workers is not None:
        return workers
    affinity = getattr(os, 'sched_getaffinity', None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _forks() -> bool:
    """Whether processes are forked, as torch's loaders are: on Linux."""
    return os.uname().sysname == 'Linux' if hasattr(os, 'uname') else False


@contextmanager
def _bar(names: Sequence[str], total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal; nothing where there is none."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(', '.join(names)), BarColumn(), MofNCompleteColumn())
    hidden = not shown or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as progress:
        bar = progress.add_task('', total=total)
        yield lambda num_rows: progress.update(bar, advance=num_rows)
