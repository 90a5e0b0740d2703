"""The SQLite file of a dataset: a table of rows, one of files, one for each derived column.

Any tool opens it: a table a dataset, a column a field, `files.id` where a field is a file. Values of
derived columns stand by row and version, see `finetuner.columns.computing`. Columns of fields that are
declared no more stay with what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    Column,
    Connection,
    DefaultClause,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    text,
)
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateTable
from sqlalchemy.types import UserDefinedType

from finetuner.columns.declaring import MISSING, Declaration, Field
from finetuner.columns.files import File
from finetuner.columns.statements import literal
from finetuner.columns.states import is_file_type, is_optional_type, plain_type
from finetuner.columns.types import SMALL, ColumnType
from finetuner.excepts import ConfigError, ConflictError

# no column can be called so
FILES = 'files'


class CommonTables:
    """Tables of a SQLite file that all of its datasets share.

    Attributes:
        datasets: where the files of each dataset are: an address, or a path from the SQLite file's folder.
        columns: what is declared of each column; `current` is the version of a derived one that was
            asked for last. Fields keep their number when they are renamed.
        versions: of derived columns: what their functions, and all that they depend on, once were.
        errors: what functions raised, by row and version.
    """

    def __init__(self) -> None:
        metadata = self.metadata = MetaData()
        self.datasets = Table(
            'finetuner_datasets',
            metadata,
            Column('name', Text, primary_key=True),
            Column('data_dir', Text, nullable=False),
        )
        self.columns = Table(
            'finetuner_columns',
            metadata,
            Column('id', Integer, primary_key=True),
            Column('dataset', Text, nullable=False),
            Column('name', Text, nullable=False),
            Column('kind', Text, nullable=False),
            Column('type', Text, nullable=False),
            Column('inputs', Text, nullable=False),
            Column('current', Integer),
            UniqueConstraint('dataset', 'name'),
            sqlite_autoincrement=True,
        )
        self.versions = Table(
            'finetuner_versions',
            metadata,
            Column('id', Integer, primary_key=True),
            Column('dataset', Text, nullable=False),
            Column('name', Text, nullable=False),
            Column('key', LargeBinary, nullable=False),
            UniqueConstraint('dataset', 'name', 'key'),
            sqlite_autoincrement=True,
        )
        self.errors = Table(
            'finetuner_errors',
            metadata,
            Column('dataset', Text, nullable=False),
            Column('name', Text, nullable=False),
            Column('row', Integer, nullable=False),
            Column('version', Integer, nullable=False),
            Column('message', Text, nullable=False),
            Column('traceback', Text, nullable=False),
            Column('at', Float, nullable=False),
            PrimaryKeyConstraint('dataset', 'name', 'row', 'version'),
        )


class Tables(CommonTables):
    """The tables of a dataset.

    Attributes:
        rows: a row each, a column a field.
        files: path in the data directory, sha256 and size of each file.
        values: of each derived column its values by row and version.

    Args:
        declaration: of the dataset.
    """

    def __init__(self, declaration: Declaration) -> None:
        super().__init__()
        self._declaration = declaration
        self.files = Table(
            values_table(declaration.name, FILES),
            self.metadata,
            Column('id', Integer, primary_key=True),
            Column('path', Text, nullable=False, unique=True),
            Column('sha256', Text, nullable=False),
            Column('num_bytes', Integer, nullable=False),
        )
        self.rows = Table(
            declaration.name,
            self.metadata,
            Column('id', Integer, primary_key=True),
            *map(self._field_column, declaration.fields.values()),
            sqlite_autoincrement=True,
        )
        self.values = {
            name: Table(
                values_table(declaration.name, name, each.type.is_file),
                self.metadata,
                Column('row', Integer, nullable=False),
                Column('version', Integer, nullable=False),
                self._value_column(each.type),
                PrimaryKeyConstraint('row', 'version'),
                # small values stand in the tree of the table itself: there is no other to keep
                sqlite_with_rowid=each.type.python not in (*SMALL, File),
            )
            for name, each in declaration.derived.items()
        }

    def make(self, session: Session, renamed: Mapping[str, str], data_dir: str) -> dict[str, int]:
        """Make what is missing, and bring the fields up to date.

        Args:
            session: that may write.
            renamed: old name by new name.
            data_dir: where files are, as `datasets` has it.

        Returns:
            Numbers of fields by name.

        Raises:
            ConfigError: a new field has no value for the rows that are there, or another type than it
                had.
        """
        both = sorted(renamed.keys() & renamed.values())
        if both:
            raise ConfigError(
                f'renamed={dict(renamed)!r}: {both[0]!r} is an old name and a new one: rename one field to '
                'a third name first'
            )
        connection = session.connection()
        there = set(inspect(connection).get_table_names())
        for table in self.metadata.sorted_tables:
            if table.name not in there:
                connection.execute(CreateTable(table))
        if self.rows.name in there:
            self._bring_up_to_date(session, renamed)
        self._note(session, data_dir)
        self._watch(connection)
        known = self._known(session)
        return {name: known[name]['id'] for name in self._declaration.fields}

    def check(self, session: Session, field_numbers: Mapping[str, int]) -> str:
        """Refuse tables that are of other columns than declared: another process has changed them.

        Args:
            session: to the file.
            field_numbers: of the fields, as they were.

        Returns:
            A field that rows need, and that is not declared here; '' for none.

        Raises:
            ConflictError: a column has another name now, or is no more.
        """
        found = inspect(session.connection())
        gone = {table.name for table in self.metadata.sorted_tables} - {*found.get_table_names()}
        known = self._known(session) if not gone else {}
        moved = [
            name
            for name, number in field_numbers.items()
            if known.get(name, {}).get('id') != number
        ]
        if gone or moved:
            what = ', '.join(sorted(gone) or moved)
            raise ConflictError(
                f'{self.rows.name}: {what} was renamed or removed since this class was made: make it '
                'again, in a process that starts anew'
            )
        for column in found.get_columns(self.rows.name):
            row = known.get(column['name'], {'kind': '', 'type': ''})
            is_required = column['default'] is None and not is_optional_type(row['type'])
            if row['kind'] == 'field' and is_required and column['name'] not in field_numbers:
                return str(column['name'])
        return ''

    def _bring_up_to_date(self, session: Session, renamed: Mapping[str, str]) -> None:
        connection = session.connection()
        name = self.rows.name
        known = self._known(session)
        quote = connection.dialect.identifier_preparer.quote
        there = {each['name'] for each in inspect(connection).get_columns(name)}
        for new, old in renamed.items():
            if old not in there or old in self._declaration.fields:
                # it was renamed before
                continue
            if new in there:
                raise ConfigError(
                    f'renamed={{{new!r}: {old!r}}}: {name} still has what was in a field {new!r} that '
                    'was removed: choose another name'
                )
            sql = f'ALTER TABLE {quote(name)} RENAME COLUMN {quote(old)} TO {quote(new)}'
            connection.exec_driver_sql(sql)
            there = (there - {old}) | {new}
            known[new] = known.pop(old, {})
            mine = (self.columns.c.dataset == name) & (self.columns.c.name == old)
            session.execute(self.columns.update().where(mine).values(name=new))
        for field in self._declaration.fields.values():
            if field.name in there:
                self._check_type(field, known.get(field.name, {}).get('type', ''))
                self._check_none(session, field, known.get(field.name, {}))
            else:
                self._add(session, field)

    def _add(self, session: Session, field: Field) -> None:
        connection = session.connection()
        is_empty = (
            session.execute(self.rows.select().with_only_columns(self.rows.c.id)).first() is None
        )
        if field.is_required and not is_empty:
            raise ConfigError(
                f'{self.rows.name}.{field.name} is new, and the rows that are there have no value for '
                f'it: give it a default, make it Optional, or say renamed={{{field.name!r}: '
                '<its old name>}'
            )
        column = self._field_column(field)
        Operations(MigrationContext.configure(connection)).add_column(self.rows.name, column)
        if column.server_default is None and field.left_out is not MISSING and not is_empty:
            kept = field.type.encoded(field.left_out)
            session.execute(self.rows.update().values({field.name: kept}))

    def _check_none(self, session: Session, field: Field, known: Mapping[str, Any]) -> None:
        """Refuse rows without a value, of a time when the field was Optional, or was not declared."""
        was_optional = is_optional_type(known.get('type', ''))
        was_removed = known.get('kind', '').startswith('removed')
        # SQL has no number for what is none
        may_be_none = field.type.is_optional or field.type.python is float
        if may_be_none or not (was_optional or was_removed):
            return
        without = self.rows.c[field.name].is_(None)
        if session.execute(self.rows.select().where(without).limit(1)).first() is None:
            return
        if was_optional or field.is_required:
            raise ConfigError(
                f'{self.rows.name}.{field.name} is {field.type.name}, and there are rows without a value '
                + ('' if was_optional else ', which were added when it was not declared')
                + ': make it Optional'
                + ('' if was_optional else ', or give it a default')
            )
        kept = field.type.encoded(field.default)
        session.execute(self.rows.update().where(without).values({field.name: kept}))

    def _check_type(self, field: Field, known: str) -> None:
        plain, now = plain_type(known), plain_type(field.type.name)
        is_file = is_file_type(known) and field.type.is_file
        if plain in ('', now) or is_file or (plain, now) == ('int', 'float'):
            return
        raise ConfigError(
            f'{self.rows.name}.{field.name} is {field.type.name}, and was {known}: give the field '
            'another name, or derive it from the old one'
        )

    def _known(self, session: Session) -> dict[str, dict[str, Any]]:
        """What the file says of columns."""
        mine = self.columns.select().where(self.columns.c.dataset == self.rows.name)
        return {row['name']: dict(row) for row in session.execute(mine).mappings()}

    def _note(self, session: Session, data_dir: str) -> None:
        """Have the file say what is declared."""
        declared = {**self._declaration.fields, **self._declaration.derived}
        known = self._known(session)
        for name, row in known.items():
            if name not in declared and not row['kind'].startswith('removed'):
                self._change(session, row['id'], {'kind': f'removed {row["kind"]}'})
        for name, each in declared.items():
            now = self._row(name, each)
            old = known.get(name)
            if old is None:
                session.execute(self.columns.insert().values(now))
            elif any(old[key] != value for key, value in now.items()):
                self._change(session, old['id'], now)
        table = self.datasets
        mine = table.c.name == self.rows.name
        if (
            session.scalar(table.select().with_only_columns(table.c.data_dir).where(mine))
            != data_dir
        ):
            row = {'name': self.rows.name, 'data_dir': data_dir}
            session.execute(table.insert().prefix_with('OR REPLACE'), [row])

    def _change(self, session: Session, number: int, values: dict[str, Any]) -> None:
        session.execute(self.columns.update().where(self.columns.c.id == number).values(values))

    def _row(self, name: str, declared: Any) -> dict[str, Any]:
        is_field = isinstance(declared, Field)
        return {
            'dataset': self.rows.name,
            'name': name,
            'kind': 'field' if is_field else 'derived',
            'type': declared.type.name,
            'inputs': json.dumps([] if is_field else declared.inputs),
        }

    def _column(self, name: str, kind: ColumnType) -> Column[Any]:
        if kind.is_file:
            return Column(name, Integer, ForeignKey(self.files.c.id))
        return Column(name, kind.sql)

    def _field_column(self, field: Field) -> Column[Any]:
        """A column of a field; its default is also that of who does not know the field."""
        column = self._column(field.name, field.type)
        if field.left_out is MISSING or field.left_out is None:
            return column
        if field.type.is_file:
            raise ConfigError(f'{self.rows.name}.{field.name}: a file cannot be a default')
        written = literal(field.type.encoded(field.left_out))
        if written is not None:
            column.server_default = DefaultClause(text(written))
        return column

    def _value_column(self, kind: ColumnType) -> Column[Any]:
        # a function may return something else tomorrow: SQLite is to convert nothing
        return self._column('value', kind) if kind.is_file else Column('value', _AnyType())

    def _watch(self, connection: Connection) -> None:
        """Have SQLite forget what was computed of a row that any tool changes, replaces or deletes."""
        quote = connection.dialect.identifier_preparer.quote
        rows = self.rows.name
        there = [each['name'] for each in inspect(connection).get_columns(rows)]
        fields = ', '.join(quote(name) for name in there if name != 'id')
        wanted = {}
        for table in self.values.values():
            values = quote(table.name)
            for what, when, row in (
                ('updated', f'AFTER UPDATE OF {fields} ON {quote(rows)}', 'OLD.id'),
                ('deleted', f'AFTER DELETE ON {quote(rows)}', 'OLD.id'),
                ('replaced', f'BEFORE INSERT ON {quote(rows)} WHEN NEW.id > 0', 'NEW.id'),
            ):
                if what == 'updated' and not fields:
                    continue
                name = f'{table.name}__{what}'
                wanted[name] = (
                    f'CREATE TRIGGER {quote(name)} {when} '
                    f'BEGIN DELETE FROM {values} WHERE row = {row}; END'
                )
        sql = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ?"
        known = dict(tuple(row) for row in connection.exec_driver_sql(sql, (rows,)))
        for name, statement in wanted.items():
            if known.get(name) != statement:
                if name in known:
                    connection.exec_driver_sql(f'DROP TRIGGER {quote(name)}')
                connection.exec_driver_sql(statement)


class _AnyType(UserDefinedType[Any]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return ''


def values_table(dataset: str, column: str, is_file: bool = False) -> str:
    """Name of the table of the values of a derived column."""
    return f'{dataset}__{column}' + ('__file' if is_file else '')
