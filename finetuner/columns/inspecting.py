"""What a SQLite file of datasets says of itself, without the classes that they were declared by."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.exc import DatabaseError

from finetuner.columns.tables import FILES, CommonTables, values_table
from finetuner.excepts import DataError, NotFoundError, unknown_name
from finetuner.storage.files import FileStore

_MOST_ROWS = 1000


@dataclass(frozen=True)
class ColumnState:
    """What there is of a column.

    Attributes:
        name: of it.
        kind: `field` or `derived`, after `removed ` where it is declared no more.
        type: of its values, as it is shown.
        inputs: columns that it is computed from.
        num_kept: rows that have a value; of a derived column, one of its function as it was used last.
        num_stale: values of functions as they were before.
        num_errors: rows whose function raised an error.
        num_bytes: of all of its values, and of the files that they are.
    """

    name: str
    kind: str
    type: str
    inputs: tuple[str, ...]
    num_kept: int
    num_stale: int
    num_errors: int
    num_bytes: int

    @property
    def is_file(self) -> bool:
        """Whether its values are files."""
        return is_file_type(self.type)


@dataclass(frozen=True)
class DatasetState:
    """What there is of a dataset.

    Attributes:
        name: of it.
        sql_file: that it is in.
        data_dir: where its files are: a path, or an address.
        num_rows: how many.
        num_files: how many different files.
        num_bytes: of the SQLite file and of these.
        columns: fields first, then derived ones.
    """

    name: str
    sql_file: Path
    data_dir: str
    num_rows: int
    num_files: int
    num_bytes: int
    columns: tuple[ColumnState, ...]


class DatasetFile:
    """A SQLite file of datasets; nothing in it is changed.

    Args:
        path: of the file.

    Raises:
        NotFoundError: there is no such file.
        DataError: it is none of datasets.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        if not self.path.is_file():
            raise NotFoundError(f'{self.path}: there is no such file')
        self._tables = CommonTables()
        self._engine = create_engine('sqlite://', creator=self._connect)
        try:
            with self._engine.connect() as connection:
                is_one = self._tables.datasets.name in inspect(connection).get_table_names()
        except (DatabaseError, sqlite3.Error) as error:
            raise DataError(
                f'{self.path} cannot be read as a SQLite file: {error.args[0]}'
            ) from error
        if not is_one:
            raise DataError(
                f'{self.path} has no dataset of finetuner.columns: give the sql_file of one'
            )

    def names(self) -> list[str]:
        """Names of its datasets."""
        with self._reader() as connection:
            return sorted(connection.execute(self._tables.datasets.select()).scalars())

    def states(self) -> list[DatasetState]:
        """What there is of all of its datasets."""
        return [self.state(name) for name in self.names()]

    def state(self, dataset: str) -> DatasetState:
        """What there is of a dataset.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._reader() as connection:
            data_dir = self._data_dir(connection, dataset)
            there = set(inspect(connection).get_table_names())
            rows = self._columns(connection, dataset)
            files = values_table(dataset, FILES)
            num_files, num_bytes = connection.exec_driver_sql(
                f'SELECT count(*), coalesce(sum(num_bytes), 0) FROM "{files}"'
            ).one()
            return DatasetState(
                dataset,
                self.path,
                data_dir,
                _one(connection, f'SELECT count(*) FROM "{dataset}"'),
                num_files,
                num_bytes + self.path.stat().st_size,
                tuple(self._state(connection, dataset, row, there) for row in rows),
            )

    def rows(self, dataset: str, start: int = 0, count: int = 100) -> list[dict[str, Any]]:
        """Rows with the values that are kept, as SQL keeps them.

        Args:
            dataset: name of it.
            start: place of the first.
            count: how many; 1000 at most.

        Returns:
            Values by name of column, `id` first; of files, their path in the data directory. Derived
            values that are not kept are left out.

        Raises:
            NotFoundError: there is no such dataset.
        """
        with self._reader() as connection:
            self._data_dir(connection, dataset)
            columns = [
                row for row in self._columns(connection, dataset) if 'removed' not in row['kind']
            ]
            fields = [row['name'] for row in columns if row['kind'] == 'field']
            chosen = ', '.join(f'"{name}"' for name in ['id', *fields])
            sql = f'SELECT {chosen} FROM "{dataset}" ORDER BY id LIMIT ? OFFSET ?'
            given = (min(count, _MOST_ROWS), start)
            found = [dict(row) for row in connection.exec_driver_sql(sql, given).mappings()]
            for row in columns:
                if row['kind'] == 'derived':
                    self._add_derived(connection, dataset, row, found)
            for row in columns:
                if is_file_type(row['type']):
                    self._name_files(connection, dataset, row['name'], found)
        return found

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
        return sqlite3.connect(f'{self.path.as_uri()}?mode=ro', uri=True, check_same_thread=False)

    @contextmanager
    def _reader(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            # one state of all tables
            connection.exec_driver_sql('BEGIN')
            yield connection

    def _data_dir(self, connection: Connection, dataset: str) -> str:
        known = {
            row.name: row.data_dir for row in connection.execute(self._tables.datasets.select())
        }
        if dataset not in known:
            raise NotFoundError(unknown_name('dataset', dataset, known))
        return resolved_data_dir(known[dataset], self.path)

    def _columns(self, connection: Connection, dataset: str) -> list[dict[str, Any]]:
        table = self._tables.columns
        query = table.select().where(table.c.dataset == dataset).order_by(table.c.id)
        rows = [dict(row) for row in connection.execute(query).mappings()]
        return sorted(rows, key=lambda row: 'derived' in row['kind'])

    def _state(
        self, connection: Connection, dataset: str, row: Mapping[str, Any], there: set[str]
    ) -> ColumnState:
        name, current, is_file = row['name'], row['current'] or 0, is_file_type(row['type'])
        files = values_table(dataset, FILES)
        if 'field' in row['kind']:
            table, value, num_stale = dataset, name, 0
            num_kept = _one(connection, f'SELECT count("{name}") FROM "{dataset}"')
        else:
            table, value = values_table(dataset, name, is_file), 'value'
            if table not in there:
                return ColumnState(name, row['kind'], row['type'], _inputs(row), 0, 0, 0, 0)
            num_kept = _one(
                connection,
                f'SELECT count(*) FROM "{table}" v JOIN "{dataset}" r ON r.id = v.row '
                'WHERE v.version = ?',
                current,
            )
            sql = f'SELECT count(*) FROM "{table}" WHERE version != ?'
            num_stale = _one(connection, sql, current)
        size = (
            f'SELECT sum(num_bytes) FROM "{files}" WHERE id IN (SELECT "{value}" FROM "{table}")'
            if is_file
            else f'SELECT sum(length(CAST("{value}" AS BLOB))) FROM "{table}"'
        )
        errors = self._tables.errors.name
        num_errors = _one(
            connection,
            f'SELECT count(*) FROM {errors} e JOIN "{dataset}" r ON r.id = e.row '
            'WHERE e.dataset = ? AND e.name = ? AND e.version = ?',
            dataset,
            name,
            current,
        )
        num_bytes = _one(connection, size)
        return ColumnState(
            name, row['kind'], row['type'], _inputs(row), num_kept, num_stale, num_errors, num_bytes
        )

    def _add_derived(
        self,
        connection: Connection,
        dataset: str,
        row: Mapping[str, Any],
        found: Sequence[dict[str, Any]],
    ) -> None:
        table = values_table(dataset, row['name'], is_file_type(row['type']))
        sql = f'SELECT row, value FROM "{table}" WHERE version = ? AND row IN (SELECT value FROM json_each(?))'
        ids = json.dumps([each['id'] for each in found])
        values = dict(
            tuple(each) for each in connection.exec_driver_sql(sql, (row['current'] or 0, ids))
        )
        for each in found:
            if each['id'] in values:
                each[row['name']] = values[each['id']]

    def _name_files(
        self, connection: Connection, dataset: str, name: str, found: Sequence[dict[str, Any]]
    ) -> None:
        numbers = [row[name] for row in found if row.get(name) is not None]
        sql = (
            f'SELECT id, path FROM "{values_table(dataset, FILES)}" '
            'WHERE id IN (SELECT value FROM json_each(?))'
        )
        paths = dict(
            tuple(each) for each in connection.exec_driver_sql(sql, (json.dumps(numbers),))
        )
        for row in found:
            if row.get(name) is not None:
                row[name] = paths[row[name]]


def is_file_type(shown: str) -> bool:
    """Whether a type, as it is shown, is one of files."""
    return shown.removeprefix('Optional[').startswith('File')


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


def _inputs(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(json.loads(row['inputs']))


def _one(connection: Connection, sql: str, *given: Any) -> int:
    return connection.exec_driver_sql(sql, given).scalar() or 0
