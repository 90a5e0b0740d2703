"""Reading columns of rows: a statement for all fields, and one for each derived column."""

from __future__ import annotations

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
_MOST_ROWS = 262_144
_OF_FILES = ('path', 'sha256', 'num_bytes')


@dataclass
class Page:
    """Columns of some rows.

    Attributes:
        ids: of the rows that are there.
        columns: values by name, as SQL keeps them, in the order of `ids`; files as files.
        lacking: places in `ids` of the rows whose value of some derived column is not there.
    """

    ids: Sequence[int]
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

    def read(
        self,
        session: Session,
        ids: Sequence[int],
        names: Sequence[str],
        versions: Mapping[str, int],
    ) -> Page:
        """Values of columns; see `ColumnStore.read`."""
        in_order = _in_order(ids)
        page = self._read(session, in_order, names, versions)
        if ids is in_order or list(ids) == in_order:
            return page
        left = list(ids)
        if len(page.ids) < len(in_order):
            there = set(page.ids)
            left = [row for row in left if row in there]
        columns = {}
        for name, values in page.columns.items():
            by_row = dict(zip(page.ids, values, strict=True))
            columns[name] = list(map(by_row.__getitem__, left))
        lacking = {page.ids[place] for place in page.lacking}
        places = [place for place, row in enumerate(left) if row in lacking] if lacking else []
        return Page(left, columns, places)

    def _read(
        self,
        session: Session,
        ids: Sequence[int],
        names: Sequence[str],
        versions: Mapping[str, int],
    ) -> Page:
        """The same of rows in order of their ids."""
        fields = [name for name in names if name in self._declaration.fields]
        columns: dict[str, list[Any]] = {}
        # derived columns that are not there as a whole
        by_row: dict[str, dict[int, Any]] = {}
        for name in names:
            if name in fields:
                continue
            version = [versions[name]]
            rows = self._rows(session, self._selected_values(name), version, ids)
            if len(rows) == len(ids):
                # one each
                columns[name] = self._values(rows, [name], 0)[name]
                continue
            rows = self._rows(session, self._selected_values(name, True), version, ids)
            found = self._values(rows, [name], 1)[name]
            by_row[name] = dict(zip((row[0] for row in rows), found, strict=True))
        if fields or by_row or not names:
            rows = self._rows(session, self._selected_fields(tuple(fields)), [], ids)
            there = [row[0] for row in rows]
            if len(there) < len(ids):
                # some rows are gone
                for name in columns.keys() - by_row.keys():
                    by_row[name] = dict(zip(ids, columns[name], strict=True))
                ids = there
            columns.update(self._values(rows, fields, 1))
        lacking: set[int] = set()
        for name, values in by_row.items():
            columns[name] = [values.get(row) for row in ids]
            lacking.update(place for place, row in enumerate(ids) if row not in values)
        return Page(ids, columns, sorted(lacking))

    def missing(
        self,
        session: Session,
        ids: Sequence[int],
        names: Sequence[str],
        versions: Mapping[str, int],
    ) -> dict[tuple[int, ...], list[int]]:
        """Rows that lack derived columns; see `ColumnStore.missing`."""
        ids = _in_order(ids)
        counts = {
            name: sum(
                count
                for (count,) in self._rows(session, self._counted(name), [versions[name]], ids)
            )
            for name in versions
        }
        if all(counts[name] == len(ids) for name in names):
            return {}
        found: dict[tuple[int, ...], list[int]] = {}
        if all(count in (0, len(ids)) for count in counts.values()):
            # most often: nothing was begun, or all of it is there
            found[tuple(int(count > 0) for count in counts.values())] = list(ids)
            return found
        selected = self._selected_missing(tuple(versions), tuple(names))
        for row, *there in self._rows(session, selected, list(versions.values()), ids):
            found.setdefault(tuple(there), []).append(row)
        return found

    # below

    def _values(
        self, rows: Sequence[tuple[Any, ...]], names: Sequence[str], place: int
    ) -> dict[str, list[Any]]:
        """Columns of what was read, from a place on: one a name, or three where it is of files."""
        found: dict[str, list[Any]] = {}
        for name in names:
            if self._declaration.type_of(name).is_file:
                found[name] = [
                    None
                    if row[place] is None
                    else File.stored(self._files, *row[place : place + 3])
                    for row in rows
                ]
                place += 3
            else:
                found[name] = [row[place] for row in rows]
                place += 1
        return found

    def _rows(
        self, session: Session, selected: str, versions: list[int], ids: Sequence[int]
    ) -> list[tuple[Any, ...]]:
        # not by SQLAlchemy: it makes an object of each row
        cursor = session.connection().connection.cursor()
        rows: list[tuple[Any, ...]] = []
        try:
            for start in range(0, len(ids), _MOST_ROWS):
                # in order, each once
                some = ids[start : start + _MOST_ROWS]
                first, last = some[0], some[-1]
                if last - first == len(some) - 1:
                    condition = 'BETWEEN ? AND ?'
                    given: list[Any] = [first, last]
                else:
                    condition = 'IN (SELECT value FROM json_each(?))'
                    given = [json.dumps(list(some))]
                cursor.execute(selected.replace('IN IDS', condition), [*versions, *given])
                rows += cursor.fetchall()
        finally:
            cursor.close()
        return rows

    def _selected_fields(self, names: tuple[str, ...]) -> str:
        chosen, joined = ['r.id'], ''
        for number, name in enumerate(names):
            if self._declaration.type_of(name).is_file:
                chosen += [f'f{number}.{each}' for each in _OF_FILES]
                joined += (
                    f' LEFT JOIN "{self._tables.files.name}" f{number} ON f{number}.id = r."{name}"'
                )
            else:
                chosen.append(f'r."{name}"')
        table = self._tables.rows.name
        return (
            f'SELECT {", ".join(chosen)} FROM "{table}" r{joined} WHERE r.id IN IDS ORDER BY r.id'
        )

    def _selected_values(self, name: str, with_rows: bool = False) -> str:
        table = self._tables.values[name].name
        chosen, joined = 'v.value', ''
        if self._declaration.type_of(name).is_file:
            chosen = ', '.join(f'f.{each}' for each in _OF_FILES)
            joined = f' LEFT JOIN "{self._tables.files.name}" f ON f.id = v.value'
        chosen = f'v.row, {chosen}' if with_rows else chosen
        return (
            f'SELECT {chosen} FROM "{table}" v{joined} '
            'WHERE v.version = ? AND v.row IN IDS ORDER BY v.row'
        )

    def _counted(self, name: str) -> str:
        table = self._tables.values[name].name
        return f'SELECT count(*) FROM "{table}" WHERE version = ? AND row IN IDS'

    def _selected_missing(self, names: tuple[str, ...], missing: tuple[str, ...]) -> str:
        chosen, joined, lacking = ['r.id'], '', []
        for number, name in enumerate(names):
            joined += (
                f' LEFT JOIN "{self._tables.values[name].name}" v{number} '
                f'ON v{number}.row = r.id AND v{number}.version = ?'
            )
            chosen.append(f'v{number}.row IS NOT NULL')
            if name in missing:
                lacking.append(f'v{number}.row IS NULL')
        return (
            f'SELECT {", ".join(chosen)} FROM "{self._tables.rows.name}" r{joined} '
            f'WHERE r.id IN IDS AND ({" OR ".join(lacking)})'
        )


def _in_order(ids: Sequence[int]) -> Sequence[int]:
    """The same, each once, from the least to the largest."""
    return ids if isinstance(ids, range) and ids.step == 1 else sorted(set(ids))
