"""Rows of a dataset from CSV files with a header: cells are read as the types of their fields say."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.columns.files import File
from finetuner.columns.ingesting import add_all, check_value, no_field
from finetuner.columns.types import ColumnType
from finetuner.data.contents import is_local_file
from finetuner.data.csv import CSVOptions
from finetuner.data.csv_rows import Row, RowReader, open_csv
from finetuner.data.folders import picture_uri
from finetuner.excepts import ConfigError, DataError

if TYPE_CHECKING:
    from finetuner.columns.dataset import DatasetType
    from finetuner.columns.declaring import Declaration

_WORDS = {
    **dict.fromkeys(('true', 't', 'yes', 'y', 'on', '1'), True),
    **dict.fromkeys(('false', 'f', 'no', 'n', 'off', '0'), False),
}
_WHOLE = re.compile(r'[+-]?[0-9]+')


def import_csv(
    dataset: DatasetType,
    path: str | os.PathLike[str],
    columns: Mapping[str, str] | None,
    delimiter: str | None,
    encoding: str,
    base_dir: str | os.PathLike[str] | None,
) -> int:
    """Add the rows of a CSV file; see `Dataset.import_csv`."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f'import_csv takes the path of a file, not {type(path).__name__}')
    dialect = _dialect(delimiter)
    CSVOptions(encoding=encoding)
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise DataError(f'there is no CSV file {str(path)!r}')
    if base_dir is not None and not os.path.isdir(os.path.expanduser(base_dir)):
        raise DataError(f'base_dir={os.fspath(base_dir)!r}: there is no such folder')
    names = _header_names(dataset.declaration, columns)
    cells = _Cells(file.parent, base_dir)
    with open_csv(file, encoding) as text:
        reader = RowReader(text, str(path), dialect, header=names.values())
        rows = reader.rows()
        header = next(rows, None)
        if header is None:
            raise DataError(f'{str(path)!r} holds no header, nor anything else')
        try:
            places = _places(dataset.declaration, cells, header, names, columns is not None)
        except DataError as error:
            reader.refuse(header, str(error), error)
        return add_all(dataset, _values(dataset.declaration, reader, rows, places, cells))


def _dialect(delimiter: Any) -> Any:
    if delimiter is None:
        return 'auto'
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n\0\ufeff':
        raise ConfigError(
            f"delimiter={delimiter!r}: it is one character, such as ';', or None to find it out"
        )
    rules = {'delimiter': delimiter, 'skipinitialspace': True, 'strict': True}
    return type('Given', (csv.excel,), rules)


def _header_names(declaration: Declaration, columns: Any) -> dict[str, str]:
    """Names of the header by field."""
    given = {} if columns is None else columns
    if not isinstance(given, Mapping) or not all(isinstance(each, str) for each in given.values()):
        raise ConfigError(
            f"columns={columns!r:.200}: it takes names of the header by field, such as {{'image': 'path'}}"
        )
    for name in given:
        if name not in declaration.fields:
            raise ConfigError(f'columns: {no_field(declaration, name)}')
    named = {name: header.strip() for name, header in given.items()}
    # what one field takes is no longer that of the field of its name
    others = {name: name for name in declaration.fields if name not in {*named, *named.values()}}
    return {**named, **others}


def _places(
    declaration: Declaration,
    cells: _Cells,
    header: Row,
    names: Mapping[str, str],
    may_have_others: bool,
) -> list[tuple[str, str, int]]:
    """Fields, what the header calls them, and where their cells are."""
    found = [cell.strip() for cell in header.cells]
    others = [cell for cell in found if cell not in names.values()]
    if others and not may_have_others:
        is_none = ' The first row has to be a header.' if len(others) == len(found) else ''
        raise DataError(
            f'{no_field(declaration, others[0])}{is_none} For a header of other names, give '
            "columns={'field': 'header'}: what is of no field is then left out"
        )
    places = []
    for name, field in declaration.fields.items():
        wanted = names.get(name)
        if found.count(wanted or '') > 1:
            raise DataError(f'the header names {wanted!r} twice')
        if wanted in found:
            cells.check(name, field.type)
            places.append((name, wanted, found.index(wanted)))
        elif field.is_required or wanted not in (name, None):
            raise DataError(
                f'the header has no {wanted or name!r}, for the field {name!r}. It has '
                f'{", ".join(found):.300}. Where it is called otherwise, give columns={{{name!r}: ...}}'
            )
    return places


def _values(
    declaration: Declaration,
    reader: RowReader,
    rows: Iterator[Row],
    places: Sequence[tuple[str, str, int]],
    cells: _Cells,
) -> Iterator[dict[str, Any]]:
    """The values of rows by field; what is empty is left out."""
    for row in rows:
        found = {}
        for name, column, place in places:
            field, cell = declaration.fields[name], row.cells[place]
            try:
                if cell and (field.type.python is str or not cell.isspace()):
                    found[name] = cells.value(field.type, cell)
                    check_value(declaration, name, found[name])
                elif field.is_required:
                    raise DataError(
                        f'it is empty, and {name!r} has no default: give the field one, or say '
                        f'Optional[{field.type.name}]'
                    )
            except DataError as error:
                reader.refuse(row, f'column {column!r}: {error}', error)
        yield found


class _Cells:
    """Reads cells as values.

    Args:
        folder: that of the CSV file.
        base_dir: where paths start, and what they may leave; None for the folder, which they may not.
    """

    def __init__(self, folder: Path, base_dir: str | os.PathLike[str] | None) -> None:
        self._folder = folder if base_dir is None else Path(os.path.expanduser(base_dir))
        self._may_leave = base_dir is not None

    def check(self, name: str, kind: ColumnType) -> None:
        """Refuse a field whose values no cell can be."""
        if kind.python is not File and kind.python not in _READERS:
            raise ConfigError(
                f'{name!r} is {kind.name}, and a CSV says neither dtype nor shape: read it by an @ingest '
                'function, or keep arrays in files and name those'
            )

    def value(self, kind: ColumnType, cell: str) -> Any:
        """What a cell says.

        Raises:
            DataError: it is none of the type.
        """
        if kind.python is File:
            return self._file(cell.strip())
        text = cell if kind.python is str else cell.strip()
        try:
            return _READERS[kind.python](text)
        except (ValueError, RecursionError) as error:
            said = f': {error}' if str(error) else ''
            shown = repr(cell if len(cell) <= 60 else f'{cell[:60]}...')
            raise DataError(
                f'it takes {_HOW.get(kind.python, kind.name)}, not {shown}{said}'
            ) from error

    def _file(self, cell: str) -> File:
        if not is_local_file(cell):
            raise DataError(
                f'{cell!r:.200} is an address, and files are local: download it first, or add rows by an '
                '@ingest function that does'
            )
        path = picture_uri(cell, self._folder)
        is_absolute = os.path.isabs(os.path.expanduser(cell)) or cell.lower().startswith('file:/')
        may_be_anywhere = is_absolute or self._may_leave
        if not (may_be_anywhere or Path(path).is_relative_to(os.path.abspath(self._folder))):
            raise DataError(
                f'{cell!r} leaves the folder of the CSV: where that is meant, give '
                f'base_dir={str(self._folder)!r}'
            )
        return File(path)


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise ValueError
    return int(text)


def _number(text: str) -> float:
    if '_' in text:
        raise ValueError
    try:
        return float(text)
    except ValueError:
        raise ValueError from None


def _truth(text: str) -> bool:
    if text.lower() not in _WORDS:
        raise ValueError
    return _WORDS[text.lower()]


def _moment(text: str) -> datetime:
    # Python 3.10 does not know it
    return datetime.fromisoformat(f'{text[:-1]}+00:00' if text[-1:] in 'zZ' else text)


def _bytes(text: str) -> bytes:
    return base64.b64decode(''.join(text.split()), validate=True)


def _json_of(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = json.loads(text)
        if not isinstance(value, kind):
            raise ValueError(f'it is JSON of {type(value).__name__}')
        return value

    return read


_READERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: _whole,
    float: _number,
    bool: _truth,
    datetime: _moment,
    bytes: _bytes,
    dict: _json_of(dict),
    list: _json_of(list),
}
_HOW: dict[type, str] = {
    int: "int, such as '12'",
    float: "float, such as '0.5'",
    bool: f'bool ({", ".join(_WORDS)})',
    datetime: "datetime, such as '2024-05-01 12:30:00'",
    bytes: 'bytes in base64',
    dict: 'dict, as JSON',
    list: 'list, as JSON',
}
