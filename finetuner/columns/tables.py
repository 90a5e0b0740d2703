"""The SQLite file of a dataset: a table of rows, one of files, one for each derived column.

Any tool opens it: a table a dataset, a column a field, `files.id` where a field is a file. Values of
derived columns are by key, see `finetuner.columns.computing`. Columns of fields that are declared no
more stay with what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    inspect,
)
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateTable

from finetuner.columns.declaring import MISSING, Declaration, Field
from finetuner.columns.types import ColumnType
from finetuner.excepts import ConfigError

# no column can be called so
FILES = 'files'
ABOUT, ERRORS = 'finetuner_columns', 'finetuner_errors'


class Tables:
    """The tables of a dataset.

    Attributes:
        rows: a row each, a column a field.
        files: path in the data directory, sha256 and size of each file.
        about: what is declared of each column.
        errors: what functions raised, by key.
        values: of each derived column its values by key.

    Args:
        declaration: of the dataset.
    """

    def __init__(self, declaration: Declaration) -> None:
        self._declaration = declaration
        metadata = self.metadata = MetaData()
        self.files = Table(
            values_table(declaration.name, FILES),
            metadata,
            Column('id', Integer, primary_key=True),
            Column('path', Text, nullable=False, unique=True),
            Column('sha256', Text, nullable=False),
            Column('num_bytes', Integer, nullable=False),
        )
        self.about = Table(
            ABOUT,
            metadata,
            Column('dataset', Text, nullable=False),
            Column('name', Text, nullable=False),
            Column('kind', Text, nullable=False),
            Column('type', Text, nullable=False),
            Column('inputs', Text, nullable=False),
            PrimaryKeyConstraint('dataset', 'name'),
        )
        self.errors = Table(
            ERRORS,
            metadata,
            Column('dataset', Text, nullable=False),
            Column('name', Text, nullable=False),
            Column('key', LargeBinary, nullable=False),
            Column('row', Integer, nullable=False),
            Column('message', Text, nullable=False),
            Column('traceback', Text, nullable=False),
            Column('at', Float, nullable=False),
            PrimaryKeyConstraint('dataset', 'name', 'key'),
        )
        self.rows = Table(
            declaration.name,
            metadata,
            Column('id', Integer, primary_key=True),
            *(self._column(each.name, each.type) for each in declaration.fields.values()),
            sqlite_autoincrement=True,
        )
        self.values = {
            name: Table(
                values_table(declaration.name, name),
                metadata,
                Column('key', LargeBinary, primary_key=True),
                self._column('value', each.type),
            )
            for name, each in declaration.derived.items()
        }

    def make(self, session: Session, renamed: Mapping[str, str]) -> None:
        """Make what is missing, and bring the fields up to date.

        Args:
            session: that may write.
            renamed: old name by new name.

        Raises:
            ConfigError: a new field has no value for the rows that are there, or another type than it
                had.
        """
        connection = session.connection()
        there = set(inspect(connection).get_table_names())
        if self.rows.name in there:
            self._bring_up_to_date(session, renamed)
        for table in self.metadata.sorted_tables:
            if table.name not in there:
                connection.execute(CreateTable(table))
        self._note(session)

    def _bring_up_to_date(self, session: Session, renamed: Mapping[str, str]) -> None:
        connection = session.connection()
        name = self.rows.name
        about = self.about
        mine = (about.c.dataset == name) & (about.c.kind != 'derived')
        known: dict[str, str] = {
            row.name: row.type for row in session.execute(about.select().where(mine))
        }
        quote = connection.dialect.identifier_preparer.quote
        there = {each['name'] for each in inspect(connection).get_columns(name)}
        for new, old in renamed.items():
            if old in there and new not in there:
                sql = f'ALTER TABLE {quote(name)} RENAME COLUMN {quote(old)} TO {quote(new)}'
                connection.exec_driver_sql(sql)
                there = (there - {old}) | {new}
                known[new] = known.pop(old, '')
                self._forget(session, old)
        for field in self._declaration.fields.values():
            if field.name in there:
                self._check_type(field, known.get(field.name, ''))
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
        column = self._column(field.name, field.type)
        Operations(MigrationContext.configure(connection)).add_column(self.rows.name, column)
        if field.default is not MISSING and field.default is not None and not is_empty:
            if field.type.is_file:
                raise ConfigError(f'{self.rows.name}.{field.name}: a file cannot be a default')
            kept = field.type.encoded(field.default)
            session.execute(self.rows.update().values({field.name: kept}))

    def _check_type(self, field: Field, known: str) -> None:
        plain = known.removeprefix('Optional[').removesuffix(']') if known else ''
        now = field.type.name.removeprefix('Optional[')
        now = now.removesuffix(']') if field.type.is_optional else now
        is_file = plain.startswith('File') and field.type.is_file
        if plain in ('', now) or is_file or (plain, now) == ('int', 'float'):
            return
        raise ConfigError(
            f'{self.rows.name}.{field.name} is {field.type.name}, and was {known}: give the field '
            'another name, or derive it from the old one'
        )

    def _note(self, session: Session) -> None:
        """Have the file say what is declared."""
        declared = {**self._declaration.fields, **self._declaration.derived}
        mine = self.about.c.dataset == self.rows.name
        known = session.execute(self.about.select().where(mine)).mappings().all()
        for row in known:
            if row['name'] not in declared and not row['kind'].startswith('removed'):
                self._forget(session, row['name'])
                session.execute(
                    self.about.insert().values({**row, 'kind': f'removed {row["kind"]}'})
                )
        for name, each in declared.items():
            now = self._row(name, each)
            old = next((dict(other) for other in known if other['name'] == name), None)
            if old != now:
                self._forget(session, name)
                session.execute(self.about.insert().values(now))

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

    def _forget(self, session: Session, name: str) -> None:
        mine = self.about.c.dataset == self.rows.name
        session.execute(self.about.delete().where(mine, self.about.c.name == name))


def values_table(dataset: str, column: str) -> str:
    """Name of the table of the values of a derived column."""
    return f'{dataset}__{column}'
