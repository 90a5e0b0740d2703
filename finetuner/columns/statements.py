"""SQL of values."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

# of a statement: what any SQLite takes
_MOST_VALUES = 900


def listed(values: Sequence[Any]) -> Any:
    """Any number of values for a condition: SQLite allows no more than some thousand names."""
    return select(func.json_each(json.dumps(list(values))).table_valued('value').c.value)


def one_or_several(wanted: Any) -> Collection[Any]:
    """The values that a condition names: those of a list or a set, or the one."""
    return wanted if isinstance(wanted, list | tuple | set | frozenset) else [wanted]


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


def literal(kept: Any) -> str | None:
    """A value as SQL writes it; None where it cannot."""
    if isinstance(kept, str):
        return None if '\0' in kept else "'" + kept.replace("'", "''") + "'"
    if isinstance(kept, bytes):
        return f"X'{kept.hex()}'"
    if isinstance(kept, float) and math.isinf(kept):
        return '9e999' if kept > 0 else '-9e999'
    return None if kept is None else str(int(kept) if isinstance(kept, bool) else kept)
