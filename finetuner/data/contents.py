"""What one Document holds: its label, its content, and where it stands among the others."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from docarray import Document, DocumentArray

from finetuner.excepts import DataError, PictureError
from finetuner.uris import read_uri

LABEL_TAG = 'finetuner_label'
SCORE_TAG = 'finetuner_score'
# of the chunks of a text-image pair, in the order of a dataset's items
MODALITIES = ('text', 'image')

# Tags travel as doubles: beyond this two different labels may arrive as one.
_LARGEST_EXACT_INT = 2**53
_TEXT_FIELDS = ('id', 'text', 'uri', 'modality')
_ARRAY_FIELDS: tuple[tuple[str, Any], ...] = (
    ('tensor', (list, tuple)),
    ('blob', (bytes, bytearray, memoryview)),
)
_ELSEWHERE = re.compile(r'(?:data|https?):|[a-z][a-z0-9+.-]+://', re.IGNORECASE)


def positions_text(positions: Sequence[int], count: int | None = None, shown: int = 5) -> str:
    """Name Documents by their positions: the first few, and how many more there are.

    Args:
        positions: from 0, in order, at least one.
        count: how many there are in all, where `positions` holds only the first of them.
        shown: how many are named at most.
    """
    count = len(positions) if count is None else count
    names = ', '.join(str(position) for position in positions[:shown])
    more = f' and {count - shown} more' if count > shown else ''
    return f'Document{"s" if count > 1 else ""} {names}{more}'


def shown_value(value: Any) -> str:
    """Show a value in a message: on one line, and cut where it is long."""
    try:
        text = ' '.join(repr(value).split())
    except ValueError:
        # an int of more than 4,300 digits has no repr
        return f'a very long {type(value).__name__}'
    return text if len(text) <= 80 else f'{text[:80]}...'


def normalise_label(value: Any) -> int | str:
    """Bring a label to the one form it is compared in.

    Protobuf turns ints into floats and HTTP turns 1 into true, so 1, 1.0 and True are one label.
    Strings stay strings: `'1'` is not 1.

    Raises:
        DataError: the value is neither a whole number nor a non-empty string.
    """
    if isinstance(value, str):
        if not value or value.isspace():
            raise DataError(f'label {shown_value(value)} is empty')
        return value
    if isinstance(value, (Real, np.bool_)):
        number = int(value) if isinstance(value, (Integral, np.bool_)) else float(value)
        if isinstance(number, float) and not number.is_integer():
            raise DataError(f'label {shown_value(value)} is not a whole number')
        if abs(number) > _LARGEST_EXACT_INT:
            raise DataError(
                f'label {shown_value(value)} is beyond 2**53, where tags are not exact: use a str'
            )
        return int(number)
    raise DataError(f'label {shown_value(value)} is neither an int nor a str')


def has_label(doc: Document) -> bool:
    """Say whether the Document has a label tag, whatever stands in it."""
    tags = doc.tags
    return LABEL_TAG in tags or 'label' in _older_tags(tags)


def raw_label(doc: Document) -> Any:
    """Return the label tag as it came, in the present form or the older nested one; None without."""
    tags = doc.tags
    return tags[LABEL_TAG] if LABEL_TAG in tags else _older_tags(tags).get('label')


def read_label(doc: Document, position: int | None = None) -> int | str | None:
    """Read a Document's label from `tags['finetuner_label']`, or from the older nested form.

    Args:
        doc: the Document.
        position: named in the error, where known.

    Returns:
        An int or a str as `normalise_label` makes it; None when there is no such tag.

    Raises:
        DataError: the label is there but is no label.
    """
    if not has_label(doc):
        return None
    try:
        return normalise_label(raw_label(doc))
    except DataError as error:
        where = 'Document' if position is None else f'Document {position}'
        raise DataError(
            f'{where}: {error}; `{LABEL_TAG}` takes an int or a str; see docs/data.md#class'
        ) from None


def match_label(match: Document) -> int | None:
    """Return 1 or -1, the label of a match; None for any other, and for none."""
    try:
        label = normalise_label(raw_label(match))
    except DataError:
        return None
    return label if label in (1, -1) and isinstance(label, int) else None


def has_score(doc: Document) -> bool:
    """Say whether the Document has the tag of a scored pair, whatever stands in it."""
    return SCORE_TAG in doc.tags


def read_score(doc: Document) -> float | None:
    """Return the score of a pair; None where its tag holds anything but a number from 0 to 1."""
    score = doc.tags[SCORE_TAG]
    is_number = isinstance(score, (Real, np.bool_))
    # compared as it came: an int may be too large for a float
    return float(score) if is_number and 0 <= score <= 1 else None


def _older_tags(tags: dict[str, Any]) -> dict[str, Any]:
    older = tags.get('finetuner')
    return older if isinstance(older, dict) else {}


def nested_documents(doc: Document, name: str) -> Sequence[Document]:
    """Return a Document's `matches` or `chunks` without making empty ones.

    Reading `doc.matches` builds an array of 400 bytes in every Document that has none.
    """
    return getattr(doc._data, name) or ()


def content_of(doc: Document) -> Any:
    """Return what a Document holds: its text, tensor, blob or uri, the first that is not empty.

    Unlike `doc.content` it takes an ndarray for a blob, as old Jina wrote it, and gives the uri
    of a Document that has nothing else.

    Returns:
        str, array, tensor or bytes; None when there is nothing.
    """
    content = _own_content(doc)
    return content if content is not None else doc.uri or None


def _own_content(doc: Document) -> Any:
    if doc.text:
        return doc.text
    for value in (doc.tensor, doc.blob):
        if value is not None and _num_elements(value):
            return value
    return None


def has_content(doc: Document) -> bool:
    """Say whether text, tensor, blob or uri holds anything but spaces."""
    content = content_of(doc)
    return content is not None and not (isinstance(content, str) and content.isspace())


def wrong_field(doc: Document) -> str | None:
    """Say which field holds what docarray lets pass and nobody can read; None if all are right.

    Only types are looked at, those of matches and chunks too.
    """
    fault = _wrong_field(doc)
    if fault:
        return fault
    for inner in (*nested_documents(doc, 'matches'), *nested_documents(doc, 'chunks')):
        fault = _wrong_field(inner)
        if fault:
            return f'{fault}, in a match or chunk'
    return None


def _wrong_field(doc: Document) -> str | None:
    data = doc._data
    for name in _TEXT_FIELDS:
        value = getattr(data, name)
        if value is not None and not isinstance(value, str):
            return f'its {name} is {shown_value(value)}, and takes a str'
    for name, others in _ARRAY_FIELDS:
        value = getattr(data, name)
        if value is not None and not hasattr(value, 'shape') and not isinstance(value, others):
            return (
                f'its {name} is {shown_value(value)}, and takes an array'
                f'{" or bytes" if name == "blob" else ""}'
            )
    return None


def _num_elements(value: Any) -> int:
    shape = getattr(value, 'shape', None)
    return len(value) if shape is None else int(np.prod(tuple(shape)))


def copy_document(doc: Document) -> Document:
    """Copy a Document without copying its arrays: fields set on the copy leave the original alone.

    docarray's own copy is deep, ten times slower, and fails on a blob that is an ndarray.
    """
    twin = copy.copy(doc)
    twin._data = copy.copy(doc._data)
    twin._data._reference_doc = twin
    twin._data.tags = dict(doc.tags)
    return twin


def is_local_file(uri: str) -> bool:
    """Say whether a uri means a file of this machine, and not `https:`, `data:`, `s3:` ..."""
    return uri[:5].lower() == 'file:' or not _ELSEWHERE.match(uri)


def with_absolute_uris(doc: Document) -> Document:
    """The Document itself, or a copy where relative paths stand: a worker may start elsewhere."""
    path = _relative_path(doc.uri) if doc.uri else None
    inner = {name: nested_documents(doc, name) for name in ('matches', 'chunks')}
    mended = {name: [with_absolute_uris(d) for d in docs] for name, docs in inner.items()}
    changed = [
        n for n in inner if any(a is not b for a, b in zip(inner[n], mended[n], strict=True))
    ]
    if path is None and not changed:
        return doc
    twin = copy_document(doc)
    if path is not None:
        twin.uri = str(path.absolute())
    for name in changed:
        setattr(twin, name, DocumentArray(mended[name]))
    return twin


def _relative_path(uri: str) -> Path | None:
    """The relative path that a uri is, None when it is anything else."""
    if not is_local_file(uri):
        return None
    text = unquote(urlsplit(uri).path) if uri[:5].lower() == 'file:' else uri
    path = Path(text)
    return None if path.is_absolute() or text.startswith('~') else path


def load_contents(docs: Iterable[Document]) -> DocumentArray:
    """Read local files into blobs, so that Documents can be sent to another machine.

    Args:
        docs: left as they are.

    Returns:
        Copies as `portable_document` makes them. Those whose only content is the uri of a local
        file (a path or `file:...`) hold its bytes as `blob` instead, and no uri: a path of this
        machine means nothing elsewhere. The same goes for their matches and chunks.

    Raises:
        DataError: a file cannot be read or is empty; the Document's position is named.
    """
    return DocumentArray(
        portable_document(doc, f'Document {position}', load_file=True)
        for position, doc in enumerate(docs)
    )


def portable_document(doc: Document, where: str = 'Document', load_file: bool = False) -> Document:
    """Copy a Document into what protobuf can carry, its matches and chunks included.

    Args:
        doc: left as it is.
        where: what errors call it.
        load_file: whether a local file becomes a blob, see `load_contents`.

    Returns:
        A copy: a blob that is an ndarray becomes the tensor, numpy values in tags plain ones.

    Raises:
        DataError: a tag holds a number that is not finite, a file cannot be read, or it is nested
            too deep.
    """
    try:
        return _portable(doc, where, load_file)
    except RecursionError as error:
        raise DataError(
            f'{where} is nested too deep, or holds itself: its tags, matches and chunks must end '
            'somewhere'
        ) from error


def _portable(doc: Document, where: str, load_file: bool) -> Document:
    twin = copy_document(doc)
    twin._data.tags = {key: _plain(value, where) for key, value in doc.tags.items()}
    if isinstance(doc.blob, np.ndarray):
        twin.blob = None
        if twin.tensor is None:
            twin.tensor = doc.blob
    if load_file and doc.uri and _own_content(doc) is None and is_local_file(doc.uri):
        try:
            twin.blob = read_uri(doc.uri)
        except PictureError as error:
            raise DataError(f'{where}: {error}; its uri must be a file on this machine') from error
        twin.uri = None
    for name, kind in (('matches', 'match'), ('chunks', 'chunk')):
        inner = nested_documents(doc, name)
        if inner:
            copies = [
                _portable(d, f'{where}, {kind} {number}', load_file)
                for number, d in enumerate(inner)
            ]
            setattr(twin, name, copies)
    return twin


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        # Protobuf writes it without a word, and then cannot read the Document back.
        raise DataError(f'{where}: a tag holds {value}, and tags take finite numbers only')
    return value


def is_text(doc: Document) -> bool:
    """Whether a Document is a text to a model of texts and pictures.

    Its `modality` says it or, where it names none, its content.
    """
    return doc.modality == 'text' or (doc.modality != 'image' and bool(doc.text))
