"""Computing columns of many rows: in processes, one of which alone writes what they compute."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from finetuner.columns.computing import Computed, Keys, compute_row
from finetuner.columns.declaring import Declaration
from finetuner.columns.files import File
from finetuner.columns.store import ColumnStore
from finetuner.console import console
from finetuner.excepts import ConfigError, DataError
from finetuner.storage.files import FileStore

_PAGE = 500
_ROWS_A_TASK = 50
_TASKS_AHEAD = 4
_MOST_WORKERS = 256


@dataclass
class _Task:
    """Rows to compute, each with its keys, the columns that are missing, and values that are there."""

    rows: list[dict[str, Any]]
    keys: list[dict[str, bytes]]
    wanted: list[list[str]]
    known: list[dict[str, Any]]


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
    planning = _Planning(store, names, retry)
    with _bar(names, len(ids), progress) as advance:
        pages = (ids[start : start + _PAGE] for start in range(0, len(ids), _PAGE))
        tasks = (task for page in pages for task in planning.tasks(page, advance))
        for task, results in _run(store, tasks, _num_workers(workers)):
            values = [value for computed in results for value in computed.values]
            failures = [each.failure for each in results if each.failure is not None]
            store.keep(values, failures)
            advance(len(task.rows))
    return planning.num_failed(ids)


class _Planning:
    """Finds out what is missing."""

    def __init__(self, store: ColumnStore, names: Sequence[str], retry: bool) -> None:
        self._store = store
        self._declaration = store.declaration
        self._names = [name for name in store.declaration.derived if name in names]
        self._keys_of = Keys(store.declaration, names)
        self._retry = retry
        self._begun: set[bytes] = set()

    def tasks(self, page: Sequence[int], advance: Callable[[int], None]) -> Iterator[_Task]:
        """What is to be computed for some rows."""
        rows = self._store.rows(page)
        keys = {row_id: self._keys_of.of(row) for row_id, row in rows.items()}
        order = self._keys_of.order
        there = {
            name: self._store.known_keys(name, list({each[name] for each in keys.values()}))
            for name in order
        }
        failed = self._failed(keys)
        chosen: list[tuple[int, list[str]]] = []
        for row_id, mine in keys.items():
            wanted = self._missing(mine, there)
            if not wanted or any(mine[name] in failed for name in wanted):
                continue
            last = mine[wanted[-1]]
            if last not in self._begun:
                self._begun.add(last)
                chosen.append((row_id, wanted))
        advance(len(page) - len(chosen))
        known = self._known(chosen, keys, there)
        for start in range(0, len(chosen), _ROWS_A_TASK):
            some = chosen[start : start + _ROWS_A_TASK]
            yield _Task(
                [rows[row_id] for row_id, _ in some],
                [keys[row_id] for row_id, _ in some],
                [wanted for _, wanted in some],
                [known[row_id] for row_id, _ in some],
            )

    def _missing(self, mine: Mapping[str, bytes], there: Mapping[str, set[bytes]]) -> list[str]:
        """Columns to compute for a row: those that are asked for, and what they need."""
        found: set[str] = set()
        waiting = [name for name in self._names if mine[name] not in there[name]]
        while waiting:
            name = waiting.pop()
            found.add(name)
            waiting += [
                each
                for each in self._declaration.derived[name].inputs
                if each in there and each not in found and mine[each] not in there[each]
            ]
        return [name for name in self._keys_of.order if name in found]

    def _known(
        self,
        chosen: Sequence[tuple[int, list[str]]],
        keys: Mapping[int, Mapping[str, bytes]],
        there: Mapping[str, set[bytes]],
    ) -> dict[int, dict[str, Any]]:
        """Values that are there of columns that others are computed from."""
        needed: dict[str, dict[int, bytes]] = {}
        for row_id, wanted in chosen:
            for name in wanted:
                for each in self._declaration.derived[name].inputs:
                    if each in there and each not in wanted:
                        needed.setdefault(each, {})[row_id] = keys[row_id][each]
        known: dict[int, dict[str, Any]] = {row_id: {} for row_id, _ in chosen}
        for name, by_row in needed.items():
            values = self._store.values(name, list(set(by_row.values())))
            for row_id, key in by_row.items():
                known[row_id][name] = values[key]
        return known

    def _failed(self, keys: Mapping[int, Mapping[str, bytes]]) -> set[bytes]:
        if not self._store.has_failures():
            return set()
        failed: set[bytes] = set()
        for name in self._keys_of.order:
            mine = [each[name] for each in keys.values()]
            if self._retry:
                self._store.forgive(name, mine)
            else:
                failed |= self._store.failures(name, mine).keys()
        return failed

    def num_failed(self, ids: Sequence[int]) -> int:
        """How many rows have an error now."""
        self._retry = False
        num_failed = 0
        for start in range(0, len(ids) if self._store.has_failures() else 0, _PAGE):
            rows = self._store.rows(ids[start : start + _PAGE])
            keys = {row_id: self._keys_of.of(row) for row_id, row in rows.items()}
            failed = self._failed(keys)
            num_failed += sum(not failed.isdisjoint(each.values()) for each in keys.values())
        return num_failed


def _run(
    store: ColumnStore, tasks: Iterator[_Task], num_workers: int
) -> Iterator[tuple[_Task, list[Computed]]]:
    """Compute tasks, some of them at a time."""
    if num_workers == 0:
        for task in tasks:
            yield task, _compute(task, store.declaration, store.files)
        return
    context = multiprocessing.get_context('fork' if _forks() else 'spawn')
    given = _Given(store.declaration, store.files)
    waiting: deque[tuple[_Task, Future[list[Computed]]]] = deque()
    with ProcessPoolExecutor(num_workers, context, _begin, (given,)) as pool:
        try:
            for task in tasks:
                waiting.append((task, pool.submit(_compute_there, task)))
                if len(waiting) > _TASKS_AHEAD * num_workers:
                    task, future = waiting.popleft()
                    yield task, future.result()
            while waiting:
                task, future = waiting.popleft()
                yield task, future.result()
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


def _begin(given: _Given) -> None:
    global _here
    _here = given


def _compute_there(task: _Task) -> list[Computed]:
    if _here is None:
        raise RuntimeError('this process was given nothing to compute')
    results = _compute(task, _here.declaration, _here.files)
    for computed in results:
        # its text is kept; not every error can travel
        computed.error = None
    return results


def _compute(task: _Task, declaration: Declaration, files: FileStore) -> list[Computed]:
    def put(name: str, file: File | None) -> tuple[str, str, int] | None:
        return None if file is None else file.put(files, name)

    results = []
    for row, keys, wanted, known in zip(task.rows, task.keys, task.wanted, task.known, strict=True):
        for kept in (row, known):
            for name, value in kept.items():
                if isinstance(value, File):
                    kept[name] = value.attached(files)
        results.append(compute_row(declaration, row, keys, wanted, known, put))
    return results


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
