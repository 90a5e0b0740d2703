"""Rows as they are given, as SQL keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetuner.columns.declaring import MISSING, Declaration
from finetuner.columns.files import put_all
from finetuner.excepts import ConfigError, DataError, FinetunerError
from finetuner.storage.files import FileStore


class RowEncoder:
    """Checks and encodes rows.

    Args:
        declaration: of the dataset.
        files: the data directory.
    """

    def __init__(self, declaration: Declaration, files: FileStore) -> None:
        self._declaration = declaration
        self._files = files

    def rows(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Sequence[Any]], Exception | None]:
        """Rows as SQL keeps them, as far as they are some, and what is wrong with the next.

        Args:
            rows: values by name of field.

        Returns:
            Column by column; of files, where they are in the store.
        """
        columns = self._alike(rows)
        if columns is not None:
            return columns, None
        encoded: list[list[Any]] = []
        error: Exception | None = None
        for row in rows:
            try:
                encoded.append(self._row(row))
            except (DataError, ConfigError) as found:
                error = found
                break
        columns = list(zip(*encoded, strict=True))
        num_rows = len(encoded)
        for place, (name, field) in enumerate(self._declaration.fields.items()):
            if field.type.is_file and columns:
                stored = put_all(self._files, name, columns[place])
                columns[place] = stored
                for number, each in enumerate(stored[:num_rows]):
                    if isinstance(each, Exception):
                        num_rows, error = number, _named(name, each)
                        break
        return [column[:num_rows] for column in columns] if num_rows else [], error

    def _row(self, row: Mapping[str, Any]) -> list[Any]:
        """A row as SQL keeps it, field by field; files as files."""
        fields = self._declaration.fields
        if not isinstance(row, Mapping):
            raise DataError(f'it takes values by name of field, not a {type(row).__name__}')
        for name in row:
            if name not in fields:
                raise DataError(f'{name!r} is no field; these are: {", ".join(fields)}')
        encoded = []
        for name, field in fields.items():
            value = row.get(name, field.left_out)
            if value is MISSING:
                raise DataError(f'{name!r} is missing')
            try:
                encoded.append(field.type.encoded(value))
            except DataError as error:
                raise DataError(f'{name}: {error}') from error
        return encoded

    def _alike(self, rows: Sequence[Mapping[str, Any]]) -> list[Sequence[Any]] | None:
        """The same at once, for rows that are as rows should be; None for any others."""
        fields = self._declaration.fields
        if set(map(type, rows)) != {dict}:
            return None
        if set(map(len, rows)) != {len(fields)}:
            left_out = {
                name: each.left_out for name, each in fields.items() if not each.is_required
            }
            rows = [{**left_out, **row} for row in rows]
        if set(map(len, rows)) != {len(fields)}:
            return None
        columns = []
        for name, field in fields.items():
            try:
                values = [row[name] for row in rows]
            except KeyError:
                return None
            encoded = field.type.encoded_alike(values)
            if encoded is None:
                return None
            columns.append(encoded)
        return columns


def _named(name: str, error: Exception) -> Exception:
    """What went wrong with a file, with the name of its field."""
    if not isinstance(error, FinetunerError):
        # of the disk, which is full or gone: that is no matter of this row
        return error
    named = DataError(f'{name}: {error}')
    named.__cause__ = error
    return named
