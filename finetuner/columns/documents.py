"""Rows as labelled Documents: one column is the content, another the label, others are tags.

A file stays where it is: its Document holds the path, and whoever sends Documents elsewhere reads it then.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from docarray import Document

from finetuner.columns.declaring import Declaration
from finetuner.columns.files import File
from finetuner.columns.types import ColumnType
from finetuner.data.contents import LABEL_TAG, SCORE_TAG, normalise_label
from finetuner.excepts import ConfigError, DataError, NotFoundError, unknown_name

if TYPE_CHECKING:
    from finetuner.columns.rows import Rows

ROW_TAG = 'row'
# tags that say something else to training
_TAKEN_TAGS = (ROW_TAG, LABEL_TAG, SCORE_TAG, 'finetuner')
_LABELS = (str, int, bool)
_PLAIN_TAGS = (str, int, float, bool, datetime, dict, list)
_CONTENTS = 'File, str, bytes, numpy.ndarray or torch.Tensor'

_LOGGER = logging.getLogger(__name__)


def documents_of(
    rows: Rows,
    content: str | None = None,
    label: str | None = None,
    tags: Sequence[str] | None = None,
) -> Iterator[Document]:
    """Labelled Documents, one a row, made one by one; see `Rows.iter_documents`.

    Args:
        rows: that they are made of.
        content: column of the contents; None where only one can be meant.
        label: column of the labels; None for none.
        tags: columns that become tags; None takes the fields that can, content and label aside.

    Raises:
        ConfigError: there is no such column, or it is of a type that cannot be this.
    """
    declaration = rows.dataset.declaration
    content = checked_content(declaration, content, label)
    _check_label(declaration, label)
    chosen = _plain_fields(declaration, (content, label)) if tags is None else tags
    _check_tags(declaration, chosen)
    return _Making(rows, content, label, chosen).documents()


def row_documents_of(
    rows: Rows, content: str | None, label: str | None, on_broken: Literal['stop', 'skip']
) -> Iterator[Document]:
    """Documents to train on, without other tags than label and row.

    Args:
        rows: that they are made of.
        content: column of the contents; None where only one can be meant.
        label: column of the labels; None for none.
        on_broken: `'stop'` at a row whose content or label cannot be had, or `'skip'` it and name it in
            a warning.

    Raises:
        ConfigError: there is no such column, or it is of a type that cannot be this.
    """
    declaration = rows.dataset.declaration
    content = checked_content(declaration, content, label)
    _check_label(declaration, label)
    if on_broken == 'skip':
        docs = _whole_documents(rows, content, label)
    else:
        docs = _Making(rows, content, label).documents()
    return _alike(docs, rows, label)


def checked_content(declaration: Declaration, content: str | None, label: str | None) -> str:
    """The column of the contents, where it may be one.

    Args:
        declaration: of the dataset.
        content: its name; None takes the only column that could be meant.
        label: column of the labels, which is none of these.

    Raises:
        ConfigError: there is no such column, it is of another type, or several could be meant.
    """
    if content is not None:
        kind = type_of_column(declaration, 'content', content)
        if not _is_content(kind):
            raise ConfigError(f'content={content!r} is {kind.name}: it takes {_CONTENTS}')
        return content
    known = [*declaration.fields, *declaration.derived]
    could = [n for n in known if n != label and _is_content(declaration.type_of(n))]
    if len(could) == 1:
        return could[0]
    if not could:
        raise ConfigError(f'{declaration.name} has no column of contents: these are {_CONTENTS}')
    raise ConfigError(
        f'content is missing: in {declaration.name} it could be {", ".join(could)}; say '
        f'content={could[0]!r}, for example'
    )


def type_of_column(declaration: Declaration, parameter: str, name: Any) -> ColumnType:
    """The type of a column that somebody named.

    Args:
        declaration: of the dataset.
        parameter: as which it was given.
        name: of the column.

    Raises:
        ConfigError: there is no such column.
    """
    if not isinstance(name, str):
        raise ConfigError(f'{parameter}={name!r}: it takes the name of a column')
    known = [*declaration.fields, *declaration.derived]
    if name not in known:
        raise ConfigError(f'{parameter}: {unknown_name("column", name, known)}')
    return declaration.type_of(name)


def values_of(rows: Rows, names: Sequence[str | None]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Ids of rows, each with its values of some columns; what is missing is computed and kept.

    Args:
        rows: whose they are.
        names: of the columns; None has no values, which None stands for.
    """
    distinct = [name for name in dict.fromkeys(names) if name is not None]
    places = [None if name is None else distinct.index(name) for name in names]
    columns = [rows.column(name) for name in distinct]
    for row, *found in zip(rows.ids, *columns, strict=True):
        yield row, tuple(None if place is None else found[place] for place in places)


class _Making:
    def __init__(
        self, rows: Rows, content: str, label: str | None, tags: Sequence[str] = ()
    ) -> None:
        self._rows = rows
        self._name = rows.dataset.__name__
        self._content, self._label, self._tags = content, label, tags

    def documents(self) -> Iterator[Document]:
        names = [self._content, self._label, *self._tags]
        for row, (content, label, *others) in values_of(self._rows, names):
            yield self.document(row, content, label, others)

    def document(self, row: int, content: Any, label: Any, others: Sequence[Any] = ()) -> Document:
        tags: dict[str, Any] = {
            name: value.isoformat(sep=' ') if isinstance(value, datetime) else value
            for name, value in zip(self._tags, others, strict=True)
            if not _is_nothing(value)
        }
        tags[ROW_TAG] = row
        column = self._label
        try:
            if label is not None:
                tags[LABEL_TAG] = normalise_label(label)
            doc = Document(id=f'{self._name}-{row}', tags=tags)
            column = self._content
            _fill(doc, content)
        except (DataError, NotFoundError) as error:
            raise DataError(f'{self._name}.{column} of row {row}: {error}') from error
        return doc


def _fill(doc: Document, content: Any) -> None:
    """Set the content; files of text are read, all others are named."""
    if content is None:
        raise DataError('it is None, which is no content: leave such rows out')
    if isinstance(content, str):
        doc.text = content
    elif isinstance(content, bytes):
        doc.blob = content
    elif not isinstance(content, File):
        doc.tensor = content if isinstance(content, np.ndarray) else content.numpy()
    elif content.media_type.startswith('text/'):
        try:
            doc.text = content.read().decode('utf-8')
        except UnicodeDecodeError as error:
            raise DataError(f'a text is UTF-8, and this one is not: {error}') from error
    else:
        doc.uri = os.path.abspath(content.path)


def _whole_documents(rows: Rows, content: str, label: str | None) -> Iterator[Document]:
    """Documents of those rows that one can be made of."""
    left_out = _failed(rows, [content, label])
    whole = type(rows)(rows.dataset, [row for row in rows.ids if row not in left_out])
    making = _Making(whole, content, label)
    for row, values in values_of(whole, [content, label]):
        try:
            doc = making.document(row, *values)
        except DataError as error:
            left_out[row] = str(error)
            continue
        yield doc
    if left_out:
        row, reason = min(left_out.items())
        _LOGGER.warning('rows that are left out: %d, such as %d: %s', len(left_out), row, reason)


def _failed(rows: Rows, names: Sequence[str | None]) -> dict[int, str]:
    """Rows of which one of the columns cannot be computed, and why."""
    derived = [name for name in rows.dataset.declaration.derived if name in names]
    if not derived or not rows.materialize(*derived, workers=0, progress=False):
        return {}
    return {
        failure.row: f'{failure.column} of row {failure.row}: {failure.message}'
        for name in derived
        for failure in rows.errors(name)
    }


def _alike(docs: Iterator[Document], rows: Rows, label: str | None) -> Iterator[Document]:
    """The same, labels of all of them or of none."""
    first: dict[bool, int] = {}
    for doc in docs:
        first.setdefault(LABEL_TAG in doc.tags, doc.tags[ROW_TAG])
        if len(first) > 1:
            raise DataError(
                f'{rows.dataset.__name__}.{label} of row {first[False]} is None, while others have a '
                f'label: leave such rows out, with where({label}=lambda value: value is not None)'
            )
        yield doc


def _check_label(declaration: Declaration, label: str | None) -> None:
    if label is None:
        return
    kind = type_of_column(declaration, 'label', label)
    if kind.python not in _LABELS:
        raise ConfigError(f'label={label!r} is {kind.name}: it takes str, int or bool')


def _check_tags(declaration: Declaration, tags: Any) -> None:
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise ConfigError(f'tags={tags!r}: it takes a list of names of columns')
    for name in tags:
        kind = type_of_column(declaration, 'tags', name)
        if kind.python not in _PLAIN_TAGS:
            raise ConfigError(f'tags: {name} is {kind.name}, which no tag holds: leave it out')
        if name in _TAKEN_TAGS:
            raise ConfigError(f'tags: the tag {name!r} says something else: leave it out')


def _plain_fields(declaration: Declaration, others: Sequence[str | None]) -> list[str]:
    return [
        name
        for name, field in declaration.fields.items()
        if field.type.python in _PLAIN_TAGS and name not in (*others, *_TAKEN_TAGS)
    ]


def _is_content(kind: ColumnType) -> bool:
    # a tensor is known by what it can do: torch need not be there
    return kind.python in (File, str, bytes, np.ndarray) or hasattr(kind.python, 'detach')


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
