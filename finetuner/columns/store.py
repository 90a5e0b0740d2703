"""Rows, files and derived values of a dataset: a SQLite file and a data directory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from finetuner.columns.declaring import Declaration
from finetuner.columns.encoding import RowEncoder
from finetuner.columns.failures import Failure, Failures
from finetuner.columns.files import File
from finetuner.columns.locking import writing
from finetuner.columns.reading import Page, Reader
from finetuner.columns.statements import insert_many, listed, one_or_several
from finetuner.columns.tables import Tables
from finetuner.columns.types import SMALL, ColumnType
from finetuner.excepts import ConflictError, DataError, FinetunerError
from finetuner.storage.database import open_file
from finetuner.storage.files import FileStore

# of a transaction: what a killed process loses
_MOST_ROWS, _MOST_LARGE_ROWS, _MOST_SECONDS = 10_000, 200, 1.0
# between looks at the clock
_ROWS_A_LOOK = 100


class ColumnStore:
    """What is kept of a dataset. Processes may share it; one of them writes at a time.

    Args:
        declaration: of the dataset.
        sql_file: the SQLite file; made where it is not there.
        data_dir: where files are: an address, or a path from the folder of the SQLite file.
        files: of the data directory.
        renamed: old name by new name of fields.

    Attributes:
        field_numbers: of fields by name, which they keep when they are renamed.
    """

    def __init__(
        self,
        declaration: Declaration,
        sql_file: Path,
        data_dir: str,
        files: FileStore,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        self.declaration = declaration
        self.sql_file = sql_file
        self.files = files
        self.tables = Tables(declaration)
        self.database = open_file(sql_file)
        with self.database.session() as session:
            self.field_numbers = self.tables.make(session, renamed or {}, data_dir)
        self._failures = Failures(self.tables, declaration.name)
        self._encoder = RowEncoder(declaration, files)
        self._reader = Reader(declaration, self.tables, files)
        kinds = [field.type.python for field in declaration.fields.values()]
        is_small = all(kind in (*SMALL, str, File) for kind in kinds)
        self._most_rows = _MOST_ROWS if is_small else _MOST_LARGE_ROWS
        # of the tables that were looked at, and a field that rows need and this process knows not of
        self._schema, self._unknown_field = -1, ''
        # versions that this process asked for last: key and number by column
        self._current: dict[str, tuple[bytes, int]] = {}

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with self.database.reader() as session:
            self._check_tables(session)
            yield session

    @contextmanager
    def _changing(self) -> Iterator[Session]:
        with self.database.session() as session:
            self._check_tables(session)
            yield session

    def _check_tables(self, session: Session) -> None:
        """Look whether another process has changed the columns, where it has changed any tables."""
        cursor = session.connection().connection.cursor()
        (schema,) = cursor.execute('PRAGMA schema_version').fetchone()
        cursor.close()
        if schema != self._schema:
            self._unknown_field = self.tables.check(session, self.field_numbers)
            self._schema = schema

    def writing(self) -> AbstractContextManager[None]:
        """While files are brought in whose rows or values are not committed yet: prune waits."""
        return writing(self.sql_file)

    # ---- rows

    def add(self, values: Mapping[str, Any]) -> int:
        """Add a row; returns its id.

        Raises:
            DataError: it is none.
        """
        with self.writing():
            columns, error = self._encoder.rows([values])
            if error is not None:
                raise error
            return self._insert(columns)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Add rows, thousands in a transaction.

        Args:
            rows: values by name of field.

        Returns:
            How many were added.

        Raises:
            DataError: a row is none; it tells its position, and those before it stay.
        """
        waiting = iter(rows)
        num_added = 0
        while True:
            with self.writing():
                some: list[Mapping[str, Any]] = []
                try:
                    _take_for_a_while(waiting, self._most_rows, some)
                finally:
                    # what came before whatever went wrong with the next
                    columns, error = self._encoder.rows(some)
                    self._insert(columns)
            num_added += len(columns[0]) if columns else 0
            if isinstance(error, FinetunerError):
                raise DataError(f'row {num_added:,}: {error}') from error
            if error is not None:
                raise error
            if not some:
                return num_added

    def ids(self, conditions: Mapping[str, Any] | None = None) -> Sequence[int]:
        """Ids of the rows whose fields have these values, or one of a list of them, in order."""
        table = self.tables.rows
        query = select(table.c.id).order_by(table.c.id)
        for name, wanted in (conditions or {}).items():
            kind = self.declaration.fields[name].type
            kept = [
                each if each is None else self._kept_in_condition(kind, each)
                for each in one_or_several(wanted)
            ]
            named = [each for each in kept if each is not None]
            is_one = table.c[name].in_(named)
            is_none = table.c[name].is_(None)
            query = query.where(is_one if len(named) == len(kept) else is_one | is_none)
        with self._reading() as session:
            if conditions:
                return list(session.scalars(query))
            # three questions: SQLite answers each without looking at the rows
            asked = (func.min(table.c.id), func.max(table.c.id), func.count())
            parts = [select(each).select_from(table).scalar_subquery() for each in asked]
            first, last, count = session.execute(select(*parts)).one()
            if not count:
                return []
            if last - first == count - 1:
                # as long as none was deleted
                return range(first, last + 1)
            return list(session.scalars(query))

    def count(self) -> int:
        """How many rows there are."""
        with self._reading() as session:
            return session.scalar(select(func.count()).select_from(self.tables.rows)) or 0

    def delete(self, ids: Sequence[int]) -> int:
        """Delete rows, all at once; returns how many there were."""
        table = self.tables.rows
        with self._changing() as session:
            wanted = table.c.id.in_(listed(ids))
            return session.execute(delete(table).where(wanted)).rowcount  # type: ignore[attr-defined]

    # ---- reading

    def read(self, ids: Sequence[int], names: Sequence[str], versions: Mapping[str, int]) -> Page:
        """Values of columns of rows, as SQL keeps them; files as files.

        Args:
            ids: of the rows; those that are not there are left out.
            names: of fields and derived columns.
            versions: of the derived columns.
        """
        with self._reading() as session:
            return self._reader.read(session, ids, names, versions)

    def missing(
        self, ids: Sequence[int], names: Sequence[str], versions: Mapping[str, int]
    ) -> dict[tuple[int, ...], list[int]]:
        """Rows that lack values of derived columns.

        Args:
            ids: of the rows.
            names: of the columns.
            versions: of these and of others.

        Returns:
            Ids of rows by what they have: for each of `versions` 1 where its value is there, else 0.
        """
        with self._reading() as session:
            return self._reader.missing(session, ids, names, versions)

    # ---- versions of derived columns

    def versions(self, keys: Mapping[str, bytes]) -> dict[str, int]:
        """Numbers of the versions of derived columns, which are noted as those that are asked for.

        Args:
            keys: of what their functions compute now.
        """
        if any(self._current.get(name, (b'', 0))[0] != key for name, key in keys.items()):
            with self._reading() as session:
                numbers = self._numbers(session, keys)
                columns = self.tables.columns
                mine = select(columns.c.name, columns.c.current)
                mine = mine.where(columns.c.dataset == self.declaration.name)
                current = {row.name: row.current for row in session.execute(mine)}
            if any(current.get(name) != numbers.get(name, 0) for name in keys):
                with self._changing() as session:
                    numbers = self._noted(session, keys)
            self._current.update((name, (key, numbers[name])) for name, key in keys.items())
        return {name: self._current[name][1] for name in keys}

    def keep(
        self,
        keys: Mapping[str, bytes],
        values: Mapping[str, tuple[Sequence[int], Sequence[Any]]],
        failures: Sequence[Failure] = (),
    ) -> None:
        """Keep values that were computed, and what went wrong, all at once.

        Args:
            keys: of the versions of the columns.
            values: ids of rows and values as SQL keeps them by column; of files, where they are in the
                store.
            failures: of other rows.
        """
        with self._changing() as session:
            # somebody may have pruned them meanwhile
            versions = self._noted(session, keys)
            for name, (ids, kept) in values.items():
                if not ids:
                    continue
                if self.declaration.derived[name].type.is_file:
                    numbers = self._note_files(session, kept)
                    kept = [each and numbers[each[0]] for each in kept]
                columns = [ids, [versions[name]] * len(ids), kept]
                insert_many(session, f'OR IGNORE INTO "{self.tables.values[name].name}"', columns)
            self._failures.note(session, failures, versions)
        self._current.update((name, (keys[name], versions[name])) for name in keys)

    def failures(self, ids: Sequence[int], versions: Mapping[str, int]) -> list[Failure]:
        """What went wrong when columns were computed of rows, in order of rows."""
        with self._reading() as session:
            return self._failures.found(session, ids, versions)

    def forgive(self, ids: Sequence[int], versions: Mapping[str, int]) -> None:
        """Forget what went wrong, so that it is tried again."""
        with self._changing() as session:
            self._failures.forgive(session, ids, versions)

    # below

    def _insert(self, columns: Sequence[Sequence[Any]]) -> int:
        """Add rows; returns the id of the last."""
        fields = self.declaration.fields
        if not columns:
            return 0
        with self._changing() as session:
            if self._unknown_field:
                raise ConflictError(
                    f'{self.declaration.name} has a field {self._unknown_field!r} since this class was '
                    'made, and rows need it: make it again, in a process that starts anew'
                )
            kept = list(columns)
            for place, field in enumerate(fields.values()):
                if field.type.is_file:
                    numbers = self._note_files(session, kept[place])
                    kept[place] = [each and numbers[each[0]] for each in kept[place]]
            names = ', '.join(f'"{name}"' for name in fields)
            insert_many(session, f'INTO "{self.tables.rows.name}" ({names})', kept)
            return session.scalar(select(func.max(self.tables.rows.c.id))) or 0

    def _numbers(self, session: Session, keys: Mapping[str, bytes]) -> dict[str, int]:
        table = self.tables.versions
        query = select(table.c.name, table.c.key, table.c.id).where(
            table.c.dataset == self.declaration.name, table.c.key.in_(keys.values())
        )
        return {
            name: number for name, key, number in session.execute(query) if keys.get(name) == key
        }

    def _noted(self, session: Session, keys: Mapping[str, bytes]) -> dict[str, int]:
        """Numbers of versions, which are made where they are not there."""
        numbers = self._numbers(session, keys)
        dataset = self.declaration.name
        new = [
            {'dataset': dataset, 'name': name, 'key': key}
            for name, key in keys.items()
            if name not in numbers
        ]
        if new:
            session.execute(self.tables.versions.insert(), new)
            numbers = self._numbers(session, keys)
        if any(self._current.get(name) != (key, numbers[name]) for name, key in keys.items()):
            columns = self.tables.columns
            for name in keys:
                mine = (columns.c.dataset == dataset) & (columns.c.name == name)
                session.execute(columns.update().where(mine).values(current=numbers[name]))
        return numbers

    def _note_files(
        self, session: Session, files: Sequence[tuple[str, str, int] | None]
    ) -> dict[str, int]:
        """Numbers of files by path."""
        noted = list({each[0]: each for each in files if each is not None}.values())
        table = self.tables.files
        if not noted:
            return {}
        what = f'OR IGNORE INTO "{table.name}" (path, sha256, num_bytes)'
        insert_many(session, what, list(zip(*noted, strict=True)))
        query = select(table.c.path, table.c.id)
        query = query.where(table.c.path.in_(listed([path for path, _, _ in noted])))
        return {row.path: row.id for row in session.execute(query)}

    def _kept_in_condition(self, kind: ColumnType, value: Any) -> Any:
        kept = kind.encoded(value)
        if not isinstance(kept, File):
            return kept
        table = self.tables.files
        return select(table.c.id).where(table.c.sha256 == kept.hash).limit(1).scalar_subquery()


def _take_for_a_while(rows: Iterator[Any], most: int, taken: list[Any]) -> None:
    """Take the rows of a transaction."""
    begun = time.monotonic()
    num_taken = -1
    while num_taken < len(taken) < most and time.monotonic() - begun < _MOST_SECONDS:
        num_taken = len(taken)
        taken.extend(itertools.islice(rows, _ROWS_A_LOOK))
