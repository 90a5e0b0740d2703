"""Rows of a dataset as people and programs look at them, without the class that declares it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from finetuner.columns.files import suffix_of
from finetuner.columns.inspecting import DatasetFile
from finetuner.columns.states import DatasetState, DeclaredColumn, Long, plain_type
from finetuner.excepts import ConfigError, NotFoundError
from finetuner.storage.files import FileStore

# of the start of a value: what a page shows
SHORT = 300
# what programs get
LONG = 10_000
# of JSON in JSON
_MOST_LEVELS = 100
# what `numpy.save` writes before the numbers
_ARRAY = re.compile(rb"\x93NUMPY.{4,6}\{'descr': '([^']{1,20})', 'fortran_order': .{4,5}, ", re.S)
_SHAPE = re.compile(rb"'shape': \(([0-9, ]{0,100})\)")


@dataclass(frozen=True)
class Cell:
    """A value of a row.

    Attributes:
        kind: `value`; `file`, or `lost` where a file cannot be read; `missing` where none was computed,
            `failed` where computing it raised an error.
        text: what people read.
        plain: what programs get; as JSON has it.
        key: of a file, in the data directory.
        num_bytes: of a file.
    """

    kind: Literal['value', 'file', 'lost', 'missing', 'failed']
    text: str
    plain: Any = None
    key: str = ''
    num_bytes: int = 0


@dataclass(frozen=True)
class LookedRow:
    """A row.

    Attributes:
        id: of it.
        cells: by name of column, in the order of columns.
    """

    id: int
    cells: Mapping[str, Cell]

    def plain(self) -> dict[str, Any]:
        """As JSON has it; values that are not there are left out."""
        there = {
            name: cell.plain
            for name, cell in self.cells.items()
            if cell.kind not in ('missing', 'failed')
        }
        return {'id': self.id, 'values': there}


def look(
    file: DatasetFile, dataset: str, start: int = 0, count: int = 100, most: int = SHORT
) -> list[LookedRow]:
    """Rows with the values that are kept.

    Args:
        file: that has it.
        dataset: name of it.
        start: place of the first.
        count: how many; 1000 at most.
        most: characters of texts that are shown.

    Raises:
        NotFoundError: there is no such dataset.
    """
    columns = file.columns(dataset)
    rows = file.rows(dataset, start, count, max(most, SHORT))
    names = [column.name for column in columns if column.is_file]
    paths = [row[name] for row in rows for name in names if row.get(name) is not None]
    store, sizes = (file.files(dataset), file.sizes(dataset, paths)) if paths else (None, {})
    failures = file.errors(dataset, rows=[row['id'] for row in rows])
    failed = {(each.row, each.column): each.message for each in failures}
    looked = []
    for row in rows:
        cells = {}
        for column in columns:
            name = column.name
            if name not in row:
                message = failed.get((row['id'], name))
                cells[name] = (
                    Cell('missing', 'not computed') if message is None else Cell('failed', message)
                )
            elif column.is_file and store is not None and row[name] is not None:
                cells[name] = _file_cell(store, row[name], sizes)
            else:
                cells[name] = _cell(column, row[name], most)
        looked.append(LookedRow(row['id'], cells))
    return looked


def plain_state(state: DatasetState) -> dict[str, Any]:
    """What there is of a dataset, as JSON has it."""
    columns = [{**asdict(each), 'inputs': list(each.inputs)} for each in state.columns]
    return {**asdict(state), 'sql_file': str(state.sql_file), 'columns': columns}


def size_text(num_bytes: int) -> str:
    """Bytes as people read them, such as `1.2 MB`."""
    from rich.filesize import decimal

    return decimal(num_bytes)


def file_name(dataset: str, column: str, row: int, key: str) -> str:
    """What a file is called that somebody takes along: in the data directory it is named by its content."""
    return f'{dataset}-{column}-{row}{suffix_of(key)}'


def _file_cell(store: FileStore, key: str, sizes: Mapping[str, int]) -> Cell:
    num_bytes = sizes.get(key, 0)
    plain = {'path': key, 'num_bytes': num_bytes}
    try:
        # elsewhere that would be a request for each
        is_there = not store.is_local or store.local_path(key).is_file()
    except ConfigError:
        return Cell('lost', 'no name of a file here', plain)
    except NotFoundError:
        is_there = False
    except OSError as error:
        return Cell('lost', f'cannot be read: {error.strerror}', plain)
    if not is_there:
        return Cell('lost', 'the file is gone', plain)
    text = f'{suffix_of(key).removeprefix(".") or "file"}, {size_text(num_bytes)}'
    return Cell('file', text, plain, key, num_bytes)


def _cell(column: DeclaredColumn, kept: Any, most: int) -> Cell:
    kind = plain_type(column.type)
    if kept is None:
        # SQL has no number for what is none
        is_nan = column.type == 'float'
        return Cell('value', 'nan' if is_nan else 'None', 'nan' if is_nan else None)
    start, length = (kept.start, kept.length) if isinstance(kept, Long) else (kept, None)
    if isinstance(start, bytes):
        return _bytes_cell(kind, start, len(start) if length is None else length)
    if kind == 'bool':
        return Cell('value', 'true' if start else 'false', bool(start))
    if isinstance(start, str):
        return _text_cell(kind, start, length, most)
    if isinstance(start, float) and not math.isfinite(start):
        return Cell('value', str(start), str(start))
    return Cell('value', str(start), start)


def _text_cell(kind: str, text: str, length: int | None, most: int) -> Cell:
    length = len(text) if length is None else length
    if length > most:
        shown = f'{text[:most]}… ({length:,} characters)'
        return Cell('value', shown, {'start': text[:most], 'num_characters': length})
    if kind in ('dict', 'list'):
        return Cell('value', text, _json(text))
    return Cell('value', text, text)


def _json(text: str) -> Any:
    """What JSON says; a text that some tool wrote, and that is none or cannot be told again, as it is."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return text if level else value


def _refuse(name: str) -> None:
    raise ValueError(name)


def _bytes_cell(kind: str, start: bytes, length: int) -> Cell:
    plain: dict[str, Any] = {'num_bytes': length}
    found = _array_of(start) if kind != 'bytes' else None
    if found is None:
        return Cell('value', f'{kind}, {size_text(length)}', plain)
    dtype, shape = found
    plain |= {'dtype': dtype, 'shape': list(shape)}
    form = ' × '.join(map(str, shape)) or 'one number'
    return Cell('value', f'{form}, {dtype}, {size_text(length)}', plain)


def _array_of(start: bytes) -> tuple[str, Sequence[int]] | None:
    """Type and shape of an array that `numpy.save` wrote; None where it did not."""
    head = start[:SHORT]
    described, shaped = _ARRAY.match(head), _SHAPE.search(head)
    if described is None or shaped is None:
        return None
    try:
        dtype = np.dtype(described.group(1).decode('latin-1')).name
    except (TypeError, ValueError):
        return None
    return dtype, [int(each) for each in shaped.group(1).split(b',') if each.strip()]
