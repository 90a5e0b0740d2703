"""Rows as they are given, as SQL keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetuner.columns.declaring import MISSING, Declaration
from finetuner.columns.files import Put
from finetuner.excepts import ConfigError, DataError, FinetunerError


class RowEncoder:
    """Checks and encodes rows.

    Args:
        declaration: of the dataset.
        put: brings a file into the data directory: `ColumnStore.put`.
    """

    def __init__(self, declaration: Declaration, put: Put) -> None:
        self._declaration = declaration
        self._put = put

    def row(self, row: Mapping[str, Any]) -> list[Any]:
        """A row as SQL keeps it, field by field; of files, where they are in the store.

        Raises:
            DataError: it is none.
        """
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
                kept = field.type.encoded(value)
                encoded.append(self._put(name, kept) if field.type.is_file else kept)
            except DataError as error:
                raise DataError(f'{name}: {error}') from error
        return encoded

    def rows(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Sequence[Any]], FinetunerError | None]:
        """Rows as SQL keeps them, column by column, as far as they are some; and what the next lacks."""
        columns = self._alike(rows)
        if columns is not None:
            return columns, None
        encoded = []
        for row in rows:
            try:
                encoded.append(self.row(row))
            except (DataError, ConfigError) as error:
                return list(zip(*encoded, strict=True)), error
        return list(zip(*encoded, strict=True)), None

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
