"""Derived values: read, or computed once and kept.

A value is kept by its row and by the version of its column. The version's key is a hash of what the
function computes, of its type and declared version, and of the keys of its inputs. So a function that is
edited finds none of its old values, nor do those that depend on it; one that is as it was finds those
that it had then. Rows never change: what any tool changes of a row loses its values.
"""

from __future__ import annotations

import hashlib
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetuner.columns.declaring import Declaration, Derived, where
from finetuner.columns.failures import Failure, new_failure
from finetuner.columns.files import File, put_all
from finetuner.columns.fingerprint import fingerprint
from finetuner.columns.reading import Page
from finetuner.columns.store import ColumnStore
from finetuner.columns.types import SMALL
from finetuner.excepts import DataError
from finetuner.storage.files import FileStore

# rows that are read at once
_ROWS_AHEAD, _SHUFFLED_ROWS_AHEAD = 4096, 262_144


def keys_of(
    declaration: Declaration, field_numbers: Mapping[str, int], names: Iterable[str]
) -> dict[str, bytes]:
    """Keys of the versions of derived columns and of those that they are computed from.

    Args:
        declaration: of the dataset.
        field_numbers: see `ColumnStore`.
        names: of columns.

    Returns:
        32 bytes by name, in order of computing.
    """
    keys: dict[str, bytes] = {}
    for name in declaration.ancestors(names):
        column = declaration.derived[name]
        digest = hashlib.sha256()
        for text in (fingerprint(column.function), column.type.name, column.version):
            digest.update(_framed(text.encode()))
        for each in column.inputs:
            if each in declaration.fields:
                kind = declaration.fields[each].type
                digest.update(_framed(f'{each}=field {field_numbers[each]} {kind.name}'.encode()))
            else:
                digest.update(_framed(f'{each}='.encode() + keys[each]))
        keys[name] = digest.digest()
    return keys


@dataclass
class Task:
    """Rows of which the same columns are computed from the same.

    Attributes:
        names: of derived columns to compute, each after those that it is computed from.
        rows: ids.
        given: columns that they are computed from, as SQL keeps them; files as files.
    """

    names: list[str]
    rows: Sequence[int]
    given: dict[str, list[Any]]


@dataclass
class Results:
    """What came of a task.

    Attributes:
        values: ids of rows and values as SQL keeps them by column; of files, where they are in the store.
        failures: of the other rows.
        errors: that were raised there.
    """

    values: dict[str, tuple[Sequence[int], list[Any]]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)


class Planner:
    """Finds out what is to be computed of rows.

    Args:
        store: of the dataset.
        names: of derived columns that are wanted.

    Attributes:
        keys: of the versions of these columns and of those that they are computed from.
        versions: their numbers.
    """

    def __init__(self, store: ColumnStore, names: Sequence[str]) -> None:
        self._store = store
        self._declaration = store.declaration
        self._names = [name for name in store.declaration.derived if name in names]
        self.keys = keys_of(store.declaration, store.field_numbers, names)
        self.versions = store.versions(self.keys)

    def tasks(
        self,
        ids: Sequence[int],
        most_rows: Callable[[], int],
        failed: Mapping[int, frozenset[str]] | None = None,
    ) -> Iterator[Task]:
        """What is missing, as tasks of rows of which the same is missing.

        Args:
            ids: of rows; those that are not there are left out.
            most_rows: tells how many rows the next task may have.
            failed: columns by row that are passed over, and with them those that need them.
        """
        missing = self._store.missing(ids, self._names, self.versions)
        for there, rows, passed_over in _alike(missing, failed or {}):
            has = dict(zip(self.versions, there, strict=True))
            names = self._wanted(has, passed_over)
            if not names:
                continue
            inputs = {each for name in names for each in self._declaration.derived[name].inputs}
            given = sorted(inputs.difference(names))
            start = 0
            while start < len(rows):
                some = rows[start : start + most_rows()]
                start += len(some)
                page = self._store.read(some, given, self.versions)
                if page.lacking:
                    # another process pruned in between: its version may be another code
                    gone = set(page.lacking)
                    columns = {name: _left(values, gone) for name, values in page.columns.items()}
                    page = Page(_left(page.ids, gone), columns, [])
                if page.ids:
                    yield Task(names, page.ids, page.columns)

    def _wanted(self, has: Mapping[str, int], passed_over: frozenset[str]) -> list[str]:
        """Columns to compute: those that are asked for, and what they need."""
        derived = self._declaration.derived
        needs: dict[str, set[str]] = {}
        for name in self.keys:
            missing = [each for each in derived[name].inputs if not has.get(each, 1)]
            needs[name] = {name}.union(*(needs[each] for each in missing))
        found = set()
        for name in self._names:
            if not has[name] and passed_over.isdisjoint(needs[name]):
                found |= needs[name]
        return [name for name in self.keys if name in found]


def compute(task: Task, declaration: Declaration, files: FileStore) -> Results:
    """Compute a task; where a function raises an error, what needs its value is not computed.

    Args:
        task: what to compute.
        declaration: of the dataset.
        files: the data directory.
    """
    results = Results()
    kept: dict[str, list[Any]] = dict(task.given)
    # rows that have no value of a column
    without: dict[str, set[int]] = {}
    for name in task.names:
        inputs = declaration.derived[name].inputs
        failed = set().union(*(without.get(each, set()) for each in inputs))
        rows = _left_of(task.rows, failed)
        given = {each: kept[each] for each in inputs}
        if failed:
            places = {place for place, row in enumerate(task.rows) if row in failed}
            given = {each: _left(values, places) for each, values in given.items()}
        step = _Step(declaration.derived[name], declaration, files)
        failed |= step.run(rows, given, results)
        results.values[name] = _left_of(rows, failed), step.stored
        kept[name] = step.values
        if failed:
            without[name] = failed
            by_row = dict(zip(results.values[name][0], step.values, strict=True))
            kept[name] = [by_row.get(row) for row in task.rows]
    return results


class _Step:
    """Computes a column of the rows of a task."""

    def __init__(self, column: Derived, declaration: Declaration, files: FileStore) -> None:
        self._column = column
        self._kinds = [declaration.type_of(each) for each in column.inputs]
        self._files = files
        self.values: list[Any] = []
        self.stored: list[Any] = []

    def run(
        self, rows: Sequence[int], kept: Mapping[str, Sequence[Any]], results: Results
    ) -> set[int]:
        """Compute it; returns the rows that failed."""
        column = self._column
        name, kind = column.name, column.type
        inputs = [
            # decoded one after the other, and anew: a function may change what it is given
            kept[each] if inner.is_as_kept else map(inner.decoded, kept[each])
            for each, inner in zip(column.inputs, self._kinds, strict=True)
        ]
        call = column.call
        given = zip(*inputs, strict=True) if inputs else itertools.repeat((), len(rows))
        errors: dict[int, Exception] = {}
        for place, arguments in enumerate(given):
            try:
                value = kind.encoded(call(*arguments))
            except Exception as error:  # noqa: BLE001 - what a function raises is kept and told, not hidden
                errors[place] = error
                continue
            self.values.append(value)
        self.stored = self._bring_in(rows, errors) if kind.is_file else self.values
        for place, raised in sorted(errors.items()):
            text = ''.join(traceback.format_exception(raised))
            message = f'{type(raised).__name__}: {raised}'
            results.failures.append(new_failure(rows[place], name, message, text))
            results.errors.append(raised)
        return {rows[place] for place in errors}

    def _bring_in(self, rows: Sequence[int], errors: dict[int, Exception]) -> list[Any]:
        """Bring files in; those that cannot be brought are errors, too."""
        stored = put_all(self._files, self._column.name, self.values)
        places = (place for place in range(len(rows)) if place not in errors)
        failed = {
            place: each
            for place, each in zip(list(places), stored, strict=True)
            if isinstance(each, Exception)
        }
        if failed:
            self.values = [
                value
                for value, each in zip(self.values, stored, strict=True)
                if not isinstance(each, Exception)
            ]
            errors.update(failed)
        return [each for each in stored if not isinstance(each, Exception)]


class Values:
    """Values of columns of rows; what is missing is computed and kept.

    Functions count as they are when this is made.

    Args:
        store: of the dataset.
        names: of fields and derived columns that are wanted.
    """

    def __init__(self, store: ColumnStore, names: Sequence[str]) -> None:
        self._store = store
        self._declaration = store.declaration
        self._names = list(dict.fromkeys(names))
        self._derived = [name for name in self._names if name in self._declaration.derived]
        self._planner = Planner(store, self._derived)

    def of(self, ids: Sequence[int]) -> dict[str, list[Any]]:
        """Columns by name.

        Args:
            ids: of the rows.

        Raises:
            DataError: a row is not there, or a function raised an error, which is its cause.
        """
        page = self._read(ids)
        if page.lacking:
            self._compute([page.ids[place] for place in page.lacking])
            page = self._read(ids)
            if page.lacking:
                raise DataError(
                    f'{self._declaration.name}: what was computed is not there: somebody pruned it at '
                    'this moment; try again'
                )
        return self._decoded(page)

    def batches(self, ids: Sequence[int], batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """The same, some rows at a time.

        Args:
            ids: of the rows.
            batch_size: rows a time.
        """
        start = 0
        while start < len(ids):
            num_ahead = max(1, self._num_ahead(ids, start) // batch_size) * batch_size
            some = ids[start : start + num_ahead]
            start += num_ahead
            page = self._read(some)
            if page.lacking:
                for first in range(0, len(some), batch_size):
                    yield self.of(some[first : first + batch_size])
                continue
            columns = self._decoded(page)
            for first in range(0, len(some), batch_size):
                yield {name: each[first : first + batch_size] for name, each in columns.items()}

    def _num_ahead(self, ids: Sequence[int], start: int) -> int:
        """How many rows are read at once: what is large is not read before it is needed."""
        kinds = [self._declaration.type_of(name) for name in self._names]
        if not all(kind.is_file or kind.python in SMALL for kind in kinds):
            return 1
        if any(kind.is_file for kind in kinds):
            return _ROWS_AHEAD
        last = min(start + _ROWS_AHEAD, len(ids)) - 1
        # rows here and there are found faster in a pass over all of them
        return _ROWS_AHEAD if ids[last] - ids[start] == last - start else _SHUFFLED_ROWS_AHEAD

    def _decoded(self, page: Page) -> dict[str, list[Any]]:
        return {
            name: self._declaration.type_of(name).decoded_all(page.columns[name])
            for name in self._names
        }

    def _read(self, ids: Sequence[int]) -> Page:
        page = self._store.read(ids, self._names, self._planner.versions)
        if len(page.ids) != len(ids):
            gone = next(each for each in ids if each not in set(page.ids))
            raise DataError(f'{self._declaration.name} has no row {gone} any more')
        return page

    def _compute(self, ids: Sequence[int]) -> None:
        """Compute what is missing here and now, and keep it."""
        planner = self._planner
        for task in planner.tasks(ids, lambda: len(ids)):
            with self._store.writing():
                results = compute(task, self._declaration, self._store.files)
                self._store.keep(planner.keys, results.values, results.failures)
            planner.versions = self._store.versions(planner.keys)
            if results.failures:
                failure = results.failures[0]
                function = self._declaration.derived[failure.column].function
                raise DataError(
                    f'{self._declaration.name}.{failure.column} of row {failure.row} cannot be '
                    f'computed: {failure.message} ({where(function)})'
                ) from results.errors[0]


def attached(task: Task, files: FileStore) -> Task:
    """A task that came from another process, its files in a store of this one."""
    for column in task.given.values():
        for value in column:
            if isinstance(value, File):
                value.attached(files)
    return task


def _alike(
    missing: Mapping[tuple[int, ...], list[int]], failed: Mapping[int, frozenset[str]]
) -> Iterator[tuple[tuple[int, ...], list[int], frozenset[str]]]:
    """Rows that have the same, and of which the same failed."""
    for there, rows in missing.items():
        groups: dict[frozenset[str], list[int]] = {}
        for row in rows if failed else ():
            groups.setdefault(failed.get(row, frozenset()), []).append(row)
        for names, some in (groups or {frozenset(): rows}).items():
            yield there, some, names


def _left_of(rows: Sequence[int], failed: set[int]) -> Sequence[int]:
    return [row for row in rows if row not in failed] if failed else rows


def _left(values: Sequence[Any], places: set[int]) -> list[Any]:
    return [each for place, each in enumerate(values) if place not in places]


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, 'big') + data
