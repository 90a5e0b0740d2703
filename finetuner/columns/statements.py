"""SQL of many values."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

# of a statement: what any SQLite takes
_MOST_VALUES = 900


def listed(values: Sequence[Any]) -> Any:
    """Any number of values for a condition: SQLite allows no more than some thousand names."""
    return select(func.json_each(json.dumps(list(values))).table_valued('value').c.value)


def insert_many(session: Session, what: str, columns: Sequence[Sequence[Any]]) -> None:
    """Insert rows, many in a statement: SQLite then counts ids only once, and is twice as fast.

    Args:
        session: that may write.
        what: what comes between INSERT and VALUES.
        columns: of the rows.
    """
    num_rows, num_columns = len(columns[0]), len(columns)
    num_each = max(1, min(_MOST_VALUES // num_columns, num_rows))
    marks = f'({", ".join("?" * num_columns)})'
    values = list(itertools.chain.from_iterable(zip(*columns, strict=True)))
    whole = num_rows - num_rows % num_each
    step = num_each * num_columns
    several = f'INSERT {what} VALUES {", ".join([marks] * num_each)}'
    cursor = session.connection().connection.cursor()
    try:
        ends = range(0, whole * num_columns, step)
        cursor.executemany(several, [values[start : start + step] for start in ends])
        if whole < num_rows:
            rest = f'INSERT {what} VALUES {", ".join([marks] * (num_rows - whole))}'
            cursor.execute(rest, values[whole * num_columns :])
    finally:
        cursor.close()
