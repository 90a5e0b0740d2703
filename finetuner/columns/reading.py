"""Reading columns of rows, fields and derived values alike, in one statement."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from finetuner.columns.declaring import Declaration
from finetuner.columns.files import File
from finetuner.columns.tables import Tables
from finetuner.storage.files import FileStore

# rows of a statement
_MOST_ROWS = 20_000


@dataclass
class Page:
    """Columns of some rows.

    Attributes:
        ids: of the rows that are there.
        columns: values by name, as SQL keeps them, in the order of `ids`; files as files.
        lacking: places in `ids` of the rows whose value of some derived column is not there.
    """

    ids: list[int]
    columns: dict[str, list[Any]]
    lacking: list[int]


class Reader:
    """Reads the tables of a dataset.

    Args:
        declaration: of the dataset.
        tables: of it.
        files: of the data directory.
    """

    def __init__(self, declaration: Declaration, tables: Tables, files: FileStore) -> None:
        self._declaration = declaration
        self._tables = tables
        self._files = files
        self._selected = functools.lru_cache(maxsize=256)(self._select)

    def read(
        self, session: Session, ids: Sequence[int], names: Sequence[str], versions: Mapping[str, int]
    ) -> Page:
        """Values of columns; see `ColumnStore.read`."""
        derived = [name for name in names if name in self._declaration.derived]
        selected = self._selected(tuple(names))
        rows = self._rows(session, selected, [versions[name] for name in derived], ids)
        if [row[0] for row in rows] != list(ids):
            by_id = {row[0]: row for row in rows}
            rows = [by_id[each] for each in ids if each in by_id]
        return self._page(rows, names)

    def missing(
        self,
        session: Session,
        ids: Sequence[int],
        names: Sequence[str],
        versions: Mapping[str, int],
    ) -> dict[int, tuple[int, ...]]:
        """Rows that lack derived columns; see `ColumnStore.missing`."""
        selected = self._selected(tuple(versions), tuple(names))
        return {
            row[0]: row[1:] for row in self._rows(session, selected, list(versions.values()), ids)
        }

    def _page(self, rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> Page:
        columns = list(zip(*rows, strict=True)) if rows else []
        found: dict[str, list[Any]] = {}
        lacking: set[int] = set()
        place = 1
        for name in names:
            is_file = self._declaration.type_of(name).is_file
            if not rows:
                found[name] = []
                continue
            if is_file:
                stored = zip(*columns[place : place + 3], strict=True)
                found[name] = [
                    None if key is None else File.stored(self._files, key, sha256, size)
                    for key, sha256, size in stored
                ]
            else:
                found[name] = list(columns[place])
            place += 3 if is_file else 1
            if name in self._declaration.derived:
                if None in columns[place]:
                    lacking.update(n for n, row in enumerate(columns[place]) if row is None)
                place += 1
        return Page(list(columns[0]) if rows else [], found, sorted(lacking))

    def _rows(
        self, session: Session, selected: str, versions: list[int], ids: Sequence[int]
    ) -> list[tuple[Any, ...]]:
        # not by SQLAlchemy: it makes an object of each row
        cursor = session.connection().connection.cursor()
        rows: list[tuple[Any, ...]] = []
        try:
            for start in range(0, len(ids), _MOST_ROWS):
                some = ids[start : start + _MOST_ROWS]
                first, last = some[0], some[-1]
                if last - first == len(some) - 1 and list(some) == list(range(first, last + 1)):
                    condition, given = 'BETWEEN ? AND ?', [first, last]
                else:
                    condition = 'IN (SELECT value FROM json_each(?))'
                    given = [json.dumps(list(some))]
                cursor.execute(selected.replace('IN IDS', condition), [*versions, *given])
                rows += cursor.fetchall()
        finally:
            cursor.close()
        return rows

    def _select(self, names: tuple[str, ...], missing: tuple[str, ...] = ()) -> str:
        """The statement that reads columns, or tells where some are missing; of versions and ids."""
        chosen, joined, lacking = ['r.id'], [], []
        for number, name in enumerate(names):
            is_derived = name in self._declaration.derived
            value = f'r."{name}"'
            if is_derived:
                table = self._tables.values[name].name
                joined.append(
                    f'LEFT JOIN "{table}" v{number} '
                    f'ON v{number}.row = r.id AND v{number}.version = ?'
                )
                value = f'v{number}.value'
            if name in missing:
                lacking.append(f'v{number}.row IS NULL')
            if missing:
                chosen.append(f'v{number}.row IS NOT NULL')
                continue
            if self._declaration.type_of(name).is_file:
                joined.append(f'LEFT JOIN "{self._tables.files.name}" f{number} ON f{number}.id = {value}')
                chosen += [f'f{number}.{each}' for each in ('path', 'sha256', 'num_bytes')]
            else:
                chosen.append(value)
            if is_derived:
                chosen.append(f'v{number}.row')
        condition = f' AND ({" OR ".join(lacking)})' if missing else ''
        return (
            f'SELECT {", ".join(chosen)} FROM "{self._tables.rows.name}" r {" ".join(joined)} '
            f'WHERE r.id IN IDS{condition} ORDER BY r.id'
        )
