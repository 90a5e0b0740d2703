"""What stands in one Document, for an inventory: its items, and the outward signs of each content."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.contents import (
    has_content,
    has_score,
    is_local_file,
    nested_documents,
)
from finetuner.excepts import DataError

_SIGNATURES = (
    ('JPEG', re.compile(rb'\xff\xd8\xff')),
    ('PNG', re.compile(rb'\x89PNG\r\n\x1a\n')),
    ('WEBP', re.compile(rb'RIFF....WEBP', re.DOTALL)),
    ('GIF', re.compile(rb'GIF8[79]a')),
    ('BMP', re.compile(rb'BM')),
    ('TIFF', re.compile(rb'II\*\x00|MM\x00\*')),
)


def items_of(doc: Document) -> Sequence[Document]:
    """Return the items of one Document: a root and its matches, both chunks of a pair, or itself."""
    matches = nested_documents(doc, 'matches')
    if matches:
        return [doc, *matches]
    chunks = nested_documents(doc, 'chunks')
    return chunks if chunks and (has_score(doc) or not has_content(doc)) else [doc]


def item_name(doc: Document, position: int, number: int) -> str:
    """Name an item of a Document: `'Document 3, match 0'`."""
    if nested_documents(doc, 'matches'):
        return f'Document {position}' + (f', match {number - 1}' if number else '')
    return f'Document {position}' + (f', chunk {number}' if items_of(doc)[0] is not doc else '')


def picture_format(beginning: bytes) -> str | None:
    """Name the picture format that the first 16 bytes are those of; None for none that we read."""
    return next((name for name, sign in _SIGNATURES if sign.match(beginning)), None)


def scheme_of(uri: str) -> str:
    """Return the scheme of a uri in small letters; `'path'` where it has none."""
    if uri[:5].lower() == 'file:':
        return 'file'
    return 'path' if is_local_file(uri) else uri.partition(':')[0].lower()


def file_status(uri: str) -> os.stat_result | None:
    """Look at the file that a local uri means, without opening it; None when it is not there."""
    try:
        path = unquote(urlsplit(uri).path) if scheme_of(uri) == 'file' else uri
        return os.stat(os.path.expanduser(path))
    except (OSError, ValueError):
        return None


def shape_text(content: Any) -> str:
    """Name the shape and dtype of a tensor: `'[3, 96, 96] uint8'`."""
    try:
        shape = getattr(content, 'shape', None)
        shape = np.shape(content) if shape is None else tuple(shape)
    except ValueError:
        return 'ragged list'
    dtype = str(getattr(content, 'dtype', type(content).__name__)).removeprefix('torch.')
    return f'{[int(length) for length in shape]} {dtype}'


def plain_array(content: Any) -> NDArray[Any]:
    """Return a tensor as an array of NumPy.

    Raises:
        DataError: it is none, such as a list of lists that differ in length; says why.
    """
    try:
        # a tensor of torch that learns gives its values only so
        return np.asarray(content.detach() if hasattr(content, 'detach') else content)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition('. ')[0]
        raise DataError(f'its tensor is no array: {reason}') from error


def array_key(content: Any) -> Any:
    """Return what tells tensors of different values apart."""
    try:
        array = plain_array(content)
    except DataError:
        return ('no array', id(content))
    return array.tobytes() if array.dtype != object else ('no array', id(content))
