"""One row of the input: what is embedded, what it is called, and what is copied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docarray import Document

from finetuner.data.folders import picture_uri
from finetuner.excepts import DataError

# what a column of contents is called where nobody says it
TEXT_COLUMNS = ('text',)
PICTURE_COLUMNS = ('image', 'uri', 'blob')
CONTENT_COLUMNS = (*TEXT_COLUMNS, *PICTURE_COLUMNS)


@dataclass(frozen=True)
class Row:
    """A row of the input.

    Attributes:
        id: what it is called.
        doc: what is embedded; without a content where there is an `error`.
        kept: values of the columns that are copied.
        error: why there is nothing to embed; else empty.
    """

    id: str
    doc: Document
    kept: tuple[Any, ...] = ()
    error: str = ''


@dataclass(frozen=True)
class Columns:
    """Which columns are meant.

    Attributes:
        content: of the contents; None for the one with a usual name.
        id: of the ids; None for `id`.
        keep: those that are copied.
        modality: that the model embeds: `text`, `image` or `text-image`.
    """

    content: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    modality: str = 'text-image'

    @property
    def contents(self) -> tuple[str, ...]:
        """Where the content may be, by the model and by the option."""
        if self.content is not None:
            return (self.content,)
        usual = {'text': TEXT_COLUMNS, 'image': PICTURE_COLUMNS}
        return usual.get(self.modality, CONTENT_COLUMNS)

    @property
    def id_column(self) -> str:
        """Where the id is."""
        return self.id or 'id'


def row_of(
    record: Mapping[str, Any], columns: Columns, number: int, path: Path, as_text: bool
) -> Row:
    """Make a row of a record.

    Args:
        record: values by column.
        columns: which of them are meant.
        number: of the row, from 0.
        path: of the file; paths of pictures are relative to its folder.
        as_text: kept values become texts, since nothing says what they are.
    """
    found = record.get(columns.id_column)
    name = f'{path.name}:{number}' if found is None else str(found)
    values = (record.get(column) for column in columns.keep)
    kept = tuple(text_of(value) if as_text else value for value in values)
    given = {c: record[c] for c in columns.contents if record.get(c) not in (None, '', b'')}
    if len(given) != 1:
        known = ' or '.join(columns.contents)
        error = f'there is no content in {known}'
        if given:
            error = f'there are several contents, in {" and ".join(given)}: name one as content'
        return Row(name, Document(), kept, error)
    ((column, value),) = given.items()
    try:
        return Row(name, _document(value, column, columns, path), kept)
    except DataError as error:
        return Row(name, Document(), kept, str(error))


def text_of(value: Any) -> str | None:
    """A kept value as text: itself, or JSON where it is none."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _document(value: Any, column: str, columns: Columns, path: Path) -> Document:
    if isinstance(value, Mapping) and set(value) <= {'bytes', 'path'}:
        # as Hugging Face's data sets have pictures
        value = value.get('bytes') or value.get('path')
    if isinstance(value, bytes) and value:
        return Document(blob=value, modality='image')
    if not isinstance(value, str) or not value:
        raise DataError(
            f'{column} is of type {type(value).__name__}: a content is a text, the path or uri of a '
            'picture, or its bytes'
        )
    takes_text = columns.modality == 'text' or (
        columns.modality == 'text-image' and column not in PICTURE_COLUMNS
    )
    if takes_text:
        if value.isspace():
            raise DataError(f'{column} is empty')
        return Document(text=value, modality='text')
    # one that is not there is found when it is opened
    return Document(uri=picture_uri(value, path.parent, must_exist=False), modality='image')
