"""Pairs as they travel between a client and a server: as Documents, the file format of all data here.

The image is the Document's `tensor` `[bands, height, width]`, or its `blob` where it is a picture's file.
Tags hold `group`, `label` (zeros and ones, or boxes by class), and `transform` and `crs` of an image on a
map; a mask is the tensor of the only chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from docarray import Document

from finetuner.collections.draft import DEFAULT_GROUP, Draft
from finetuner.collections.geometry import Frame
from finetuner.collections.labels import MaskLabels
from finetuner.collections.systems import check_system
from finetuner.collections.tiles import PICTURE, PlacedImage, pixels_of
from finetuner.excepts import ConfigError, DataError

_PARTS = 6


def documents_of_draft(draft: Draft) -> Iterator[Document]:
    """The pairs of a draft as they travel, one by one."""
    kind, form = draft.kind, draft.form
    for pair in draft.pairs():
        data = draft.read(pair.place)
        label = kind.decode(pair.label, pair.frame)
        tags: dict[str, Any] = {'group': pair.group}
        doc = Document(tags=tags)
        if pair.encoding == PICTURE or form is None:
            doc.blob = data
        else:
            doc.tensor = pixels_of(data, pair.encoding, form)
        if isinstance(kind, MaskLabels):
            doc.chunks = [Document(tensor=label)]
        else:
            doc.tags['label'] = kind.as_json(label)
        if pair.frame.transform is not None:
            doc.tags['transform'] = list(pair.frame.transform)
            doc.tags['crs'] = pair.frame.crs
        yield doc


def pair_of_document(doc: Document, tile_size: tuple[int, int]) -> tuple[Any, Any, str]:
    """Image, label and group of a Document that came from outside; nothing is opened by its address.

    Args:
        doc: as `documents_of_draft` makes it.
        tile_size: height and width of the images of its collection.

    Raises:
        DataError: it holds no pair.
    """
    image: Any = doc.tensor if doc.tensor is not None else doc.blob
    if image is None or not (image if isinstance(image, bytes) else np.size(image)):
        raise DataError('the Document holds no image: a pair has it as its tensor or its blob')
    group = doc.tags.get('group', DEFAULT_GROUP)
    frame = _frame_of(doc, tile_size)
    if frame is not None:
        image = PlacedImage(np.asarray(image), frame)
    if len(doc.chunks) == 1:
        return image, doc.chunks[0].tensor, group
    if 'label' not in doc.tags:
        raise DataError('the Document holds no label: a pair has it as its tag `label`, or a mask')
    return image, doc.tags['label'], group


def _frame_of(doc: Document, tile_size: tuple[int, int]) -> Frame | None:
    transform, crs = doc.tags.get('transform'), doc.tags.get('crs')
    if transform is None:
        return None
    is_numbers = isinstance(transform, list) and len(transform) == _PARTS
    if not is_numbers or not all(isinstance(part, int | float) for part in transform):
        raise DataError(f'transform={str(transform)[:80]}: it takes six numbers')
    if crs is not None and not isinstance(crs, str):
        raise DataError(f'crs={str(crs)[:80]}: it takes a text')
    try:
        if crs is not None:
            check_system(crs)
        return Frame(*tile_size, tuple(map(float, transform)), crs)  # type: ignore[arg-type]
    except ConfigError as error:
        raise DataError(str(error)) from error
