"""Computing columns of many rows: in processes, one of which alone writes what they compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from finetuner.columns.computing import Planner, Results, Task, attached, compute
from finetuner.columns.declaring import Declaration
from finetuner.columns.store import ColumnStore
from finetuner.columns.workers import run_in_processes
from finetuner.console import console
from finetuner.cores import num_cores
from finetuner.excepts import ConfigError
from finetuner.storage.files import FileStore

_PAGE = 2000
_MOST_WORKERS = 256
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
    num_workers = num_cores() if workers is None else workers
    planner = Planner(store, names)
    if retry:
        store.forgive(ids, planner.versions)
    pace = _Pace()
    with store.writing(), _bar(names, len(ids), progress) as advance:
        tasks = _tasks(store, planner, ids, pace, advance)
        # closed at once, with its processes, whatever goes wrong here
        with closing(_run(store, tasks, num_workers, pace)) as done:
            for results, num_rows in done:
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
        failed: dict[int, frozenset[str]] = {}
        for failure in store.failures(page, planner.versions):
            failed[failure.row] = failed.get(failure.row, frozenset()) | {failure.column}
        num_planned = 0
        for task in planner.tasks(page, lambda: pace.num_rows, failed):
            num_planned += len(task.rows)
            yield task
        advance(len(page) - num_planned)


def _run(
    store: ColumnStore, tasks: Iterator[Task], num_workers: int, pace: _Pace
) -> Generator[tuple[Results, int], None, None]:
    """Compute tasks, some of them at a time."""
    if num_workers == 0:
        for task in tasks:
            begun = time.monotonic()
            results = compute(task, store.declaration, store.files)
            pace.learn(len(task.rows), time.monotonic() - begun)
            yield results, len(task.rows)
        return
    computing = _Computing(store.declaration, store.files)
    with closing(
        run_in_processes(tasks, computing, num_workers, lambda task: len(task.rows))
    ) as done:
        for results, num_rows, seconds in done:
            pace.learn(num_rows, seconds)
            yield results, num_rows


class _Computing:
    """Computes tasks in another process; functions of a notebook travel there, too."""

    def __init__(self, declaration: Declaration, files: FileStore) -> None:
        self._declaration = declaration
        self._files = files

    def __call__(self, task: Task) -> Results:
        task = attached(task, self._files)
        results = compute(task, self._declaration, self._files)
        # their texts are kept; not every error can travel
        results.errors = []
        return results

    def __reduce__(self) -> Any:
        import cloudpickle

        return _computing, (cloudpickle.dumps((self._declaration, self._files)),)


def _computing(data: bytes) -> _Computing:
    import cloudpickle

    return _Computing(*cloudpickle.loads(data))


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
