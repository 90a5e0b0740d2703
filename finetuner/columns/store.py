"""Rows, files and derived values of a dataset: a SQLite file and a data directory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from finetuner.columns.declaring import MISSING, Declaration
from finetuner.columns.files import File
from finetuner.columns.tables import Tables
from finetuner.columns.types import ColumnType
from finetuner.excepts import ConfigError, DataError, FinetunerError
from finetuner.storage.database import open_file
from finetuner.storage.files import FileStore

ROWS_AT_ONCE = 1000
# of variables in a statement
_MOST_NAMED = 500


@dataclass(frozen=True)
class Failure:
    """What went wrong when a value was computed.

    Attributes:
        row: id of a row that it is of.
        column: that was computed.
        message: of the error.
        traceback: where it was raised.
        at: when, in seconds since 1970.
    """

    row: int
    column: str
    message: str
    traceback: str
    at: float

    def of_row(self, row: int) -> Failure:
        """The same of another row, whose values are computed from the same."""
        return replace(self, row=row)


class ColumnStore:
    """What is kept of a dataset. Processes may share it; one of them writes at a time.

    Args:
        declaration: of the dataset.
        sql_file: the SQLite file; made where it is not there.
        files: of the data directory.
        renamed: old name by new name of fields.
    """

    def __init__(
        self,
        declaration: Declaration,
        sql_file: Path,
        files: FileStore,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self.declaration = declaration
        self.sql_file = sql_file
        self.files = files
        self._tables = Tables(declaration)
        self._database = open_file(sql_file)
        with self._database.session() as session:
            self._tables.make(session, renamed or {})

    # ---- rows

    def add(self, values: Mapping[str, Any]) -> int:
        """Add a row; returns its id.

        Raises:
            DataError: it is none.
        """
        return self._insert([self._encoded(values)])

    def append(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Add rows, a thousand in a transaction.

        Args:
            rows: values by name of field.

        Returns:
            How many were added.

        Raises:
            DataError: a row is none; it tells its position, and those before it stay.
        """
        waiting = iter(rows)
        position = 0
        while True:
            encoded: list[dict[str, Any]] = []
            error: FinetunerError | None = None
            for row in islice(waiting, ROWS_AT_ONCE):
                try:
                    encoded.append(self._encoded(row))
                except (DataError, ConfigError) as found:
                    error = DataError(f'row {position + len(encoded):,}: {found}')
                    error.__cause__ = found
                    break
            self._insert(encoded)
            position += len(encoded)
            if error is not None:
                raise error
            if not encoded:
                return position

    def ids(self, conditions: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of the rows whose fields have these values, or one of a list of them, in order."""
        table = self._tables.rows
        query = select(table.c.id).order_by(table.c.id)
        for name, wanted in (conditions or {}).items():
            kind = self.declaration.fields[name].type
            several = wanted if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
            kept = [
                each if each is None else self._kept_in_condition(kind, each) for each in several
            ]
            named = [each for each in kept if each is not None]
            is_one = table.c[name].in_(named)
            is_none = table.c[name].is_(None)
            query = query.where(is_one if len(named) == len(kept) else is_one | is_none)
        with self._database.reader() as session:
            return list(session.scalars(query))

    def count(self) -> int:
        """How many rows there are."""
        with self._database.reader() as session:
            return session.scalar(select(func.count()).select_from(self._tables.rows)) or 0

    def rows(self, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The fields of rows, as SQL keeps them; files as files.

        Args:
            ids: of the rows; those that are not there are left out.
        """
        found: dict[int, dict[str, Any]] = {}
        table = self._tables.rows
        with self._database.reader() as session:
            for some in _chunks(ids):
                query = select(table).where(table.c.id.in_(some))
                found.update((row['id'], dict(row)) for row in session.execute(query).mappings())
            for field in self.declaration.fields.values():
                if field.type.is_file:
                    self._open_files(session, list(found.values()), field.name)
        return found

    def delete(self, ids: Sequence[int]) -> int:
        """Delete rows, all at once; returns how many there were."""
        table = self._tables.rows
        with self._database.session() as session:
            return sum(
                session.execute(delete(table).where(table.c.id.in_(some))).rowcount  # type: ignore[attr-defined]
                for some in _chunks(ids)
            )

    # ---- derived values

    def values(self, name: str, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Values of a derived column by key, as SQL keeps them; files as files."""
        table = self._tables.values[name]
        found: list[dict[str, Any]] = []
        with self._database.reader() as session:
            for some in _chunks(keys):
                query = select(table).where(table.c.key.in_(some))
                found += map(dict, session.execute(query).mappings())
            if self.declaration.derived[name].type.is_file:
                self._open_files(session, found, 'value')
        return {row['key']: row['value'] for row in found}

    def known_keys(self, name: str, keys: Sequence[bytes]) -> set[bytes]:
        """Which keys of a derived column have values."""
        table = self._tables.values[name]
        with self._database.reader() as session:
            return {
                key
                for some in _chunks(keys)
                for key in session.scalars(select(table.c.key).where(table.c.key.in_(some)))
            }

    def keep(
        self,
        values: Iterable[tuple[str, bytes, Any]],
        failures: Iterable[tuple[bytes, Failure]] = (),
    ) -> None:
        """Keep values that were computed, and what went wrong, all at once.

        Args:
            values: column, key and value as SQL keeps it; of a file, where it is in the store.
            failures: by key.
        """
        by_column: dict[str, list[tuple[bytes, Any]]] = {}
        for name, key, value in values:
            by_column.setdefault(name, []).append((key, value))
        with self._database.session() as session:
            for name, pairs in by_column.items():
                if self.declaration.derived[name].type.is_file:
                    numbers = self._note_files(session, [value for _, value in pairs])
                    pairs = [(key, value and numbers[value[0]]) for key, value in pairs]
                table = self._tables.values[name].name
                sql = f'INSERT OR IGNORE INTO "{table}" (key, value) VALUES (?, ?)'
                session.connection().exec_driver_sql(sql, pairs)
            for key, failure in failures:
                self._note_failure(session, key, failure)

    def failures(self, name: str, keys: Sequence[bytes]) -> dict[bytes, Failure]:
        """What went wrong when values of a column were computed, by key."""
        table = self._tables.errors
        found: dict[bytes, Failure] = {}
        with self._database.reader() as session:
            for some in _chunks(keys):
                query = select(table).where(self._of_errors(name), table.c.key.in_(some))
                for row in session.execute(query).mappings():
                    found[row['key']] = Failure(
                        row['row'], name, row['message'], row['traceback'], row['at']
                    )
        return found

    def has_failures(self) -> bool:
        """Whether anything went wrong."""
        table = self._tables.errors
        mine = select(table.c.key).where(table.c.dataset == self.declaration.name).limit(1)
        with self._database.reader() as session:
            return session.scalars(mine).first() is not None

    def forgive(self, name: str, keys: Sequence[bytes]) -> None:
        """Forget what went wrong, so that it is tried again."""
        table = self._tables.errors
        with self._database.session() as session:
            for some in _chunks(keys):
                session.execute(delete(table).where(self._of_errors(name), table.c.key.in_(some)))

    # ---- files

    def put(self, name: str, file: File | None) -> tuple[str, str, int] | None:
        """Bring a file into the data directory, under the folder of a column."""
        return None if file is None else file.put(self.files, name)

    # below

    def _encoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        fields = self.declaration.fields
        if not isinstance(row, Mapping):
            raise DataError(f'it takes values by name of field, not a {type(row).__name__}')
        for name in row:
            if name not in fields:
                raise DataError(f'{name!r} is no field; these are: {", ".join(fields)}')
        encoded = {}
        for name, field in fields.items():
            value = row.get(name, field.default)
            if value is MISSING and field.is_required:
                raise DataError(f'{name!r} is missing')
            try:
                encoded[name] = field.type.encoded(None if value is MISSING else value)
                if field.type.is_file:
                    encoded[name] = self.put(name, encoded[name])
            except DataError as error:
                raise DataError(f'{name}: {error}') from error
        return encoded

    def _insert(self, encoded: list[dict[str, Any]]) -> int:
        """Add rows; returns the id of the last."""
        if not encoded:
            return 0
        with self._database.session() as session:
            for name, field in self.declaration.fields.items():
                if field.type.is_file:
                    numbers = self._note_files(session, [row[name] for row in encoded])
                    for row in encoded:
                        row[name] = row[name] and numbers[row[name][0]]
            # an ORM would ask for the id of each
            session.connection().execute(self._tables.rows.insert(), encoded)
            table = self._tables.rows
            return session.scalar(select(func.max(table.c.id))) or 0

    def _note_files(
        self, session: Session, files: Sequence[tuple[str, str, int] | None]
    ) -> dict[str, int]:
        """Numbers of files by path."""
        noted = list({each[0]: each for each in files if each is not None}.values())
        if noted:
            sql = f'INSERT OR IGNORE INTO "{self._tables.files.name}" (path, sha256, num_bytes) VALUES (?, ?, ?)'
            session.connection().exec_driver_sql(sql, noted)
        table = self._tables.files
        found: dict[str, int] = {}
        for some in _chunks([path for path, _, _ in noted]):
            query = select(table.c.path, table.c.id).where(table.c.path.in_(some))
            found.update((row.path, row.id) for row in session.execute(query))
        return found

    def _open_files(self, session: Session, rows: Sequence[dict[str, Any]], name: str) -> None:
        """Put files where their numbers are."""
        table = self._tables.files
        found: dict[int, File] = {}
        for some in _chunks(sorted({row[name] for row in rows if row[name] is not None})):
            query = select(table).where(table.c.id.in_(some))
            for number, path, sha256, num_bytes in session.execute(query):
                found[number] = File.stored(self.files, path, sha256, num_bytes)
        for row in rows:
            if row[name] is not None:
                row[name] = found[row[name]]

    def _kept_in_condition(self, kind: ColumnType, value: Any) -> Any:
        kept = kind.encoded(value)
        if not isinstance(kept, File):
            return kept
        table = self._tables.files
        return select(table.c.id).where(table.c.sha256 == kept.hash).limit(1).scalar_subquery()

    def _note_failure(self, session: Session, key: bytes, failure: Failure) -> None:
        table = self._tables.errors
        row = {
            'dataset': self.declaration.name,
            'name': failure.column,
            'key': key,
            'row': failure.row,
            'message': failure.message,
            'traceback': failure.traceback,
            'at': failure.at,
        }
        session.execute(table.insert().prefix_with('OR REPLACE'), [row])

    def _of_errors(self, name: str) -> Any:
        table = self._tables.errors
        return (table.c.dataset == self.declaration.name) & (table.c.name == name)


def new_failure(row: int, column: str, message: str, traceback: str) -> Failure:
    """What went wrong now."""
    return Failure(row, column, message, traceback, time.time())


def _chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _MOST_NAMED):
        yield values[start : start + _MOST_NAMED]
