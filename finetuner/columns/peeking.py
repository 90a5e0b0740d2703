"""Reads rows of datasets as SQL keeps them, whole or the start of what is long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from finetuner.columns.states import DeclaredColumn, Long
from finetuner.columns.tables import FILES, values_table


def read_rows(
    connection: Connection,
    dataset: str,
    columns: Sequence[tuple[DeclaredColumn, int]],
    which: tuple[Any, ...],
    most: int | None = None,
) -> list[dict[str, Any]]:
    """Rows with the values that are kept, as SQL keeps them.

    Args:
        connection: to the file.
        dataset: name of it.
        columns: that are wanted, and versions of derived ones.
        which: SQL that says which rows, and its parameters.
        most: characters of texts, and bytes; what is longer comes as `Long`. None for all.

    Returns:
        Values by name of column, `id` first; of files, their path in the data directory. Derived values
        that are not kept are left out.
    """
    fields = [each.name for each, _ in columns if not each.is_derived]
    chosen = ', '.join(['id', *(_cut(name, most) for name in fields)])
    sql, *given = which
    found = []
    for row_id, *kept in connection.exec_driver_sql(
        f'SELECT {chosen} FROM "{dataset}" {sql}', tuple(given)
    ):
        values = map(_whole, kept[::2], kept[1::2])
        found.append({'id': row_id, **dict(zip(fields, values, strict=True))})
    ids = json.dumps([each['id'] for each in found])
    for column, current in columns:
        if column.is_derived:
            table = values_table(dataset, column.name, column.is_file)
            derived = {
                row: _whole(value, length)
                for row, value, length in connection.exec_driver_sql(
                    f'SELECT row, {_cut("value", most)} FROM "{table}" '
                    'WHERE version = ? AND row IN (SELECT value FROM json_each(?))',
                    (current, ids),
                )
            }
            for each in found:
                if each['id'] in derived:
                    each[column.name] = derived[each['id']]
        if column.is_file:
            _name_files(connection, dataset, column.name, found)
    return found


def _name_files(
    connection: Connection, dataset: str, name: str, found: Sequence[dict[str, Any]]
) -> None:
    numbers = [row[name] for row in found if row.get(name) is not None]
    sql = (
        f'SELECT id, path FROM "{values_table(dataset, FILES)}" '
        'WHERE id IN (SELECT value FROM json_each(?))'
    )
    paths = pairs(connection, sql, json.dumps(numbers))
    for row in found:
        if row.get(name) is not None:
            row[name] = paths.get(row[name])


def _cut(value: str, most: int | None) -> str:
    """SQL of the start of a value, and of its length where that is longer."""
    if most is None:
        return f'"{value}", NULL'
    is_long = f"""typeof("{value}") IN ('text', 'blob') AND length("{value}") > {most:d}"""
    return (
        f'CASE WHEN {is_long} THEN substr("{value}", 1, {most:d}) ELSE "{value}" END, '
        f'CASE WHEN {is_long} THEN length("{value}") END'
    )


def _whole(value: Any, length: int | None) -> Any:
    return value if length is None else Long(value, length)


def pairs(connection: Connection, sql: str, *given: Any) -> dict[Any, Any]:
    """What SQL finds in two columns."""
    return dict(tuple(each) for each in connection.exec_driver_sql(sql, given))
