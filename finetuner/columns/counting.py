"""Counts what there is of datasets in a SQLite file, reading each table once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from finetuner.columns.states import ColumnState, DatasetSummary, DeclaredColumn
from finetuner.columns.tables import FILES, CommonTables, values_table

_TABLES = CommonTables()


def summary(
    connection: Connection, dataset: str, columns: Sequence[DeclaredColumn]
) -> DatasetSummary:
    """What is found out quickly.

    Args:
        connection: to the file.
        dataset: name of it.
        columns: that are declared.
    """
    errors = errors_sql(dataset, 'count(*)', [each.name for each in columns])
    files = values_table(dataset, FILES)
    return DatasetSummary(
        dataset,
        one(connection, f'SELECT count(*) FROM "{dataset}"'),
        len(columns),
        one(connection, *errors),
        one(connection, f'SELECT sum(num_bytes) FROM "{files}"'),
    )


def field_states(
    connection: Connection, dataset: str, fields: Sequence[DeclaredColumn]
) -> tuple[int, list[ColumnState]]:
    """How many rows there are, and what there is of fields.

    Args:
        connection: to the file.
        dataset: name of it.
        fields: of it.
    """
    chosen = [f'count("{each.name}"), {_size(each, each.name)}' for each in fields]
    sql = f'SELECT {", ".join(["count(*)", *chosen])} FROM "{dataset}"'
    num_rows, *found = connection.exec_driver_sql(sql).one()
    states = []
    for each, num_kept, size in zip(fields, found[::2], found[1::2], strict=True):
        if each.is_file:
            size = _file_bytes(connection, dataset, dataset, each.name)
        states.append(ColumnState(**vars(each), num_kept=num_kept, num_bytes=size or 0))
    return num_rows, states


def derived_state(
    connection: Connection, dataset: str, column: DeclaredColumn, current: int, num_rows: int
) -> ColumnState:
    """What there is of a derived column whose table is there.

    Args:
        connection: to the file.
        dataset: name of it.
        column: the column.
        current: number of its version.
        num_rows: of the dataset.
    """
    table = values_table(dataset, column.name, column.is_file)
    # SQLite looks both up, but for both at once it would read the table
    first = one(connection, f'SELECT min(id) FROM "{dataset}"')
    last = one(connection, f'SELECT max(id) FROM "{dataset}"')
    # to look up each row takes twice as long as all the rest: done where some were deleted
    is_there = 'row BETWEEN ? AND ?'
    if num_rows and last - first >= num_rows:
        is_there += f' AND row IN (SELECT id FROM "{dataset}")'
    num_kept, num_stale, size = connection.exec_driver_sql(
        f'SELECT sum(version = ? AND {is_there}), sum(version != ?), {_size(column, "value")} '
        f'FROM "{table}"',
        (current, first, last, current),
    ).one()
    if column.is_file:
        size = _file_bytes(connection, dataset, table, 'value')
    return ColumnState(
        **vars(column),
        num_kept=num_kept or 0,
        num_stale=num_stale or 0,
        num_errors=one(connection, *errors_sql(dataset, 'count(*)', [column.name])),
        num_bytes=size or 0,
    )


def errors_sql(
    dataset: str, what: str, names: Sequence[str], rows: Sequence[int] | None = None
) -> tuple[Any, ...]:
    """SQL of what went wrong in derived columns with their functions as they were used last.

    Args:
        dataset: name of it.
        what: is selected of `e`, the table of errors.
        names: of the columns.
        rows: ids; None for all.

    Returns:
        The SQL, and its parameters.
    """
    sql = (
        f'SELECT {what} FROM {_TABLES.errors.name} e JOIN {_TABLES.columns.name} c '
        'ON c.dataset = e.dataset AND c.name = e.name AND c.current = e.version '
        f'JOIN "{dataset}" r ON r.id = e.row '
        'WHERE e.dataset = ? AND e.name IN (SELECT value FROM json_each(?))'
    )
    given = (dataset, json.dumps(list(names)))
    if rows is None:
        return (sql, *given)
    return (
        f'{sql} AND e.row IN (SELECT value FROM json_each(?))',
        *given,
        json.dumps(list(rows)),
    )


def one(connection: Connection, sql: str, *given: Any) -> int:
    """The number that SQL finds; 0 where it finds none."""
    return connection.exec_driver_sql(sql, given).scalar() or 0


def _file_bytes(connection: Connection, dataset: str, table: str, value: str) -> int:
    return one(
        connection,
        f'SELECT sum(num_bytes) FROM "{values_table(dataset, FILES)}" '
        f'WHERE id IN (SELECT "{value}" FROM "{table}")',
    )


def _size(column: DeclaredColumn, value: str) -> str:
    """SQL of the bytes of all values; those of files are counted otherwise."""
    if column.is_file:
        return '0'
    # of bytes SQLite knows the length without reading them
    return (
        f"""sum(CASE typeof("{value}") WHEN 'blob' THEN length("{value}") """
        f'ELSE length(CAST("{value}" AS BLOB)) END)'
    )
