"""What a SQLite file of datasets says of itself, without the classes that they were declared by."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, NullPool, create_engine, inspect
from sqlalchemy.exc import DatabaseError

from finetuner.columns.counting import derived_state, errors_sql, field_states, one, summary
from finetuner.columns.failures import Failure
from finetuner.columns.peeking import pairs, read_rows
from finetuner.columns.picturing import ColumnGraph, ColumnNode
from finetuner.columns.states import (
    ColumnState,
    DatasetState,
    DatasetSummary,
    DeclaredColumn,
    with_ancestors,
)
from finetuner.columns.tables import FILES, CommonTables, values_table
from finetuner.excepts import (
    ConflictError,
    DataError,
    FinetunerError,
    NotFoundError,
    unknown_name,
)
from finetuner.storage.files import FileStore

_MOST_ROWS = 1000
# who writes keeps no reader waiting, but who copies or repairs the file
_PATIENCE_SECONDS = 2.0


class DatasetFile:
    """A SQLite file of datasets; nothing in it is changed. Others may write to it meanwhile.

    All that it is asked raises ConflictError where the file is locked, and DataError where it is damaged.

    Args:
        path: of the file.

    Raises:
        NotFoundError: there is no such file.
        DataError: it is none of datasets.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        if not os.path.isfile(self.path):
            raise NotFoundError(f'{self.path}: there is no such file')
        self._tables = CommonTables()
        self._engine = create_engine('sqlite://', creator=self._connect, poolclass=NullPool)
        with self._reader() as connection:
            is_one = self._tables.datasets.name in inspect(connection).get_table_names()
        if not is_one:
            raise DataError(
                f'{self.path} has no dataset of finetuner.columns: give the sql_file of one'
            )

    @property
    def num_bytes(self) -> int:
        """Of the SQLite file, with what is logged beside it."""
        log = self.path.with_name(f'{self.path.name}-wal')
        num_bytes = 0
        for each in (self.path, log):
            # the last who closes the file takes the log away
            with suppress(FileNotFoundError):
                num_bytes += os.path.getsize(each)
        return num_bytes

    def names(self) -> list[str]:
        """Names of its datasets."""
        with self._reader() as connection:
            return sorted(connection.execute(self._tables.datasets.select()).scalars())

    def summaries(self) -> list[DatasetSummary]:
        """What is found out quickly of all of its datasets."""
        found = []
        for name in self.names():
            with self._reader() as connection:
                columns = [each for each, _ in self._current(connection, name)]
                found.append(summary(connection, name, columns))
        return found

    def states(self) -> list[DatasetState]:
        """What there is of all of its datasets; all values are looked at, see `state`."""
        return [self.state(name) for name in self.names()]

    def state(self, dataset: str) -> DatasetState:
        """What there is of a dataset. Its tables are read from end to end: 0.3 s for 300 MB.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._reader() as connection:
            data_dir = self._data_dir(connection, dataset)
            there = set(inspect(connection).get_table_names())
            columns = self._columns(connection, dataset)
            files = values_table(dataset, FILES)
            num_files, num_bytes = connection.exec_driver_sql(
                f'SELECT count(*), coalesce(sum(num_bytes), 0) FROM "{files}"'
            ).one()
            num_rows, fields = field_states(
                connection, dataset, [each for each, _ in columns if not each.is_derived]
            )
            derived = [
                derived_state(connection, dataset, each, current, num_rows)
                if values_table(dataset, each.name, each.is_file) in there
                else ColumnState(**vars(each))
                for each, current in columns
                if each.is_derived
            ]
            return DatasetState(
                dataset,
                self.path,
                data_dir,
                num_rows,
                num_files,
                num_bytes + self.num_bytes,
                (*fields, *derived),
            )

    def columns(self, dataset: str) -> list[DeclaredColumn]:
        """What is declared: fields first, then derived columns.

        Raises:
            NotFoundError: there is no such dataset.
        """
        with self._reader() as connection:
            self._data_dir(connection, dataset)
            return [each for each, _ in self._current(connection, dataset)]

    def count(self, dataset: str) -> int:
        """How many rows there are.

        Raises:
            NotFoundError: there is no such dataset.
        """
        with self._reader() as connection:
            self._data_dir(connection, dataset)
            return one(connection, f'SELECT count(*) FROM "{dataset}"')

    def rows(
        self, dataset: str, start: int = 0, count: int = 100, most: int | None = None
    ) -> list[dict[str, Any]]:
        """Rows with the values that are kept, as SQL keeps them.

        Args:
            dataset: name of it.
            start: place of the first.
            count: how many; 1000 at most.
            most: characters of texts, and bytes; what is longer comes as `Long`. None for all.

        Returns:
            Values by name of column, `id` first; of files, their path in the data directory. Derived
            values that are not kept are left out.

        Raises:
            NotFoundError: there is no such dataset.
        """
        with self._reader() as connection:
            self._data_dir(connection, dataset)
            columns = self._current(connection, dataset)
            page = ('ORDER BY id LIMIT ? OFFSET ?', min(count, _MOST_ROWS), start)
            return read_rows(connection, dataset, columns, page, most)

    def file_of(self, dataset: str, row: int, column: str) -> str:
        """Path in the data directory of a file that is a value.

        Raises:
            NotFoundError: there is no such dataset, row or column of files, or no value is kept.
        """
        with self._reader() as connection:
            self._data_dir(connection, dataset)
            known = [each for each in self._current(connection, dataset) if each[0].is_file]
            columns = [each for each in known if each[0].name == column]
            if not columns:
                names = [each.name for each, _ in known]
                raise NotFoundError(unknown_name('column of files', column, names))
            found = read_rows(connection, dataset, columns, ('WHERE id = ?', row))
        key = found[0].get(column) if found else None
        if key is None:
            raise NotFoundError(f'{dataset} has no file {column!r} in a row {row}')
        return key

    def sizes(self, dataset: str, paths: Iterable[str]) -> dict[str, int]:
        """Sizes of files in bytes, as they were when they came, by path in the data directory.

        Raises:
            NotFoundError: there is no such dataset.
        """
        sql = (
            f'SELECT path, num_bytes FROM "{values_table(dataset, FILES)}" '
            'WHERE path IN (SELECT value FROM json_each(?))'
        )
        with self._reader() as connection:
            self._data_dir(connection, dataset)
            return pairs(connection, sql, json.dumps(list(paths)))

    def errors(
        self,
        dataset: str,
        column: str | None = None,
        rows: Sequence[int] | None = None,
        start: int = 0,
        count: int = _MOST_ROWS,
    ) -> list[Failure]:
        """What went wrong when columns were computed with their functions as they were used last.

        Args:
            dataset: name of it.
            column: only of this one, and of those that it is computed from.
            rows: ids; None for all.
            start: place of the first.
            count: how many.

        Returns:
            In order of rows.

        Raises:
            NotFoundError: there is no such dataset or derived column.
        """
        with self._reader() as connection:
            self._data_dir(connection, dataset)
            derived = {
                each.name: each for each, _ in self._current(connection, dataset) if each.is_derived
            }
            if column is not None and column not in derived:
                raise NotFoundError(unknown_name('derived column', column, derived))
            names = list(derived) if column is None else with_ancestors(column, derived)
            sql, *given = errors_sql(
                dataset, 'e.row, e.name, e.message, e.traceback, e.at', names, rows
            )
            sql += ' ORDER BY e.row, e.name LIMIT ? OFFSET ?'
            found = connection.exec_driver_sql(sql, (*given, count, start))
            return [Failure(*each) for each in found]

    def graph(self, dataset: str) -> ColumnGraph:
        """Its columns, and what they are computed from, as a picture.

        Raises:
            NotFoundError: there is no such dataset.
        """
        columns = self.columns(dataset)
        return ColumnGraph(
            (
                ColumnNode(
                    each.name, 'derived' if each.is_derived else 'field', each.type, each.inputs
                )
                for each in columns
            ),
            dataset,
        )

    def files(self, dataset: str) -> FileStore:
        """Where the files of a dataset are.

        Raises:
            NotFoundError: there is no such dataset.
        """
        with self._reader() as connection:
            data_dir = self._data_dir(connection, dataset)
        return FileStore(data_dir, cache_of(self.path))

    # below

    def _connect(self) -> sqlite3.Connection:
        # SQLite makes files beside one that is logged, even to read it. Where it cannot, and none are
        # there, nobody writes.
        log = self.path.with_name(f'{self.path.name}-wal')
        is_fixed = not os.access(self.path.parent, os.W_OK) and not log.exists()
        more = '&immutable=1' if is_fixed else ''
        address = f'{self.path.as_uri()}?mode=ro{more}'
        return sqlite3.connect(address, _PATIENCE_SECONDS, uri=True, check_same_thread=False)

    @contextmanager
    def _reader(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                # one state of all tables
                connection.exec_driver_sql('BEGIN')
                yield connection
        except (DatabaseError, sqlite3.Error) as error:
            raise error_of(self.path, error) from error

    def _data_dir(self, connection: Connection, dataset: str) -> str:
        known = {
            row.name: row.data_dir for row in connection.execute(self._tables.datasets.select())
        }
        if dataset not in known:
            raise NotFoundError(unknown_name('dataset', dataset, known))
        return resolved_data_dir(known[dataset], self.path)

    def _columns(self, connection: Connection, dataset: str) -> list[tuple[DeclaredColumn, int]]:
        """Columns, removed ones too, and the versions of derived ones."""
        table = self._tables.columns
        query = table.select().where(table.c.dataset == dataset).order_by(table.c.id)
        found = [
            (
                DeclaredColumn(row.name, row.kind, row.type, tuple(json.loads(row.inputs))),
                row.current or 0,
            )
            for row in connection.execute(query)
        ]
        return sorted(found, key=lambda each: each[0].is_derived)

    def _current(self, connection: Connection, dataset: str) -> list[tuple[DeclaredColumn, int]]:
        return [each for each in self._columns(connection, dataset) if not each[0].is_removed]


def noted_data_dir(data_dir: str, sql_file: Path, is_local: bool) -> str:
    """How a SQLite file names a data directory: by a path from its folder, so that both can be moved."""
    if not is_local:
        return data_dir
    path = Path(data_dir.removeprefix('file://')).absolute()
    try:
        return path.relative_to(sql_file.parent).as_posix()
    except ValueError:
        return str(path)


def resolved_data_dir(noted: str, sql_file: Path) -> str:
    """The other way."""
    return noted if '://' in noted else str(sql_file.parent / noted)


def cache_of(sql_file: Path) -> Path:
    """Where copies are of files that are on no local disk."""
    return sql_file.parent / f'.{sql_file.name}.files'


def error_of(path: Path, error: Exception) -> FinetunerError:
    """What an error of SQLite means to whoever reads a file."""
    reason = str(getattr(error, 'orig', None) or error)
    if 'locked' in reason:
        return ConflictError(f'{path} is locked by another process: try again when that is done')
    return DataError(f'{path} cannot be read as a SQLite file of datasets: {reason}')
