"""What went wrong when values were computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from finetuner.columns.statements import listed
from finetuner.columns.tables import CommonTables


@dataclass(frozen=True)
class Failure:
    """What went wrong when a value was computed.

    Attributes:
        row: id of the row that it is of.
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


class Failures:
    """Those of a dataset, by row and version of the column.

    Args:
        tables: of the SQLite file.
        dataset: name of it.
    """

    def __init__(self, tables: CommonTables, dataset: str) -> None:
        self._table = tables.errors
        self._dataset = dataset

    def found(
        self, session: Session, ids: Sequence[int], versions: Mapping[str, int]
    ) -> list[Failure]:
        """Those of some rows and of versions by column, in order of rows."""
        if session.scalars(select(self._table.c.row).limit(1)).first() is None:
            return []
        found = []
        for name, number in versions.items():
            query = select(self._table).where(self._of(name, number, ids))
            for row in session.execute(query):
                found.append(Failure(row.row, name, row.message, row.traceback, row.at))
        return sorted(found, key=lambda each: each.row)

    def note(
        self, session: Session, failures: Sequence[Failure], versions: Mapping[str, int]
    ) -> None:
        """Note some, in place of what was noted of the same."""
        rows = []
        for each in failures:
            row = {**vars(each), 'dataset': self._dataset, 'version': versions[each.column]}
            row['name'] = row.pop('column')
            rows.append(row)
        if rows:
            session.execute(self._table.insert().prefix_with('OR REPLACE'), rows)

    def forgive(self, session: Session, ids: Sequence[int], versions: Mapping[str, int]) -> None:
        """Forget those of some rows and of versions by column."""
        for name, number in versions.items():
            session.execute(delete(self._table).where(self._of(name, number, ids)))

    def _of(self, name: str, version: int, ids: Sequence[int]) -> Any:
        table = self._table
        return (
            (table.c.dataset == self._dataset)
            & (table.c.name == name)
            & (table.c.version == version)
            & table.c.row.in_(listed(ids))
        )


def new_failure(row: int, column: str, message: str, traceback: str) -> Failure:
    """What went wrong now."""
    return Failure(row, column, message, traceback, time.time())
