"""Pairs as labelled Documents: a picture a pair, or a picture a box."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from docarray import Document

from finetuner.collections.drawing import as_rgb
from finetuner.collections.labels import BoxLabels
from finetuner.collections.tiles import PICTURE
from finetuner.data.contents import LABEL_TAG

if TYPE_CHECKING:
    from finetuner.collections.datapoint import DataPoint

NO_CLASS = 'none'
_BETWEEN = ' + '


def documents_of(
    points: Iterable[DataPoint], bands: Sequence[int] | None = None
) -> Iterator[Document]:
    """Labelled Documents, one by one.

    Of a pair with boxes comes one for each box, cut out, its class the label. Of any other pair comes
    the whole picture, the label its classes joined by ` + `, or `none` where it shows none of them; its
    mask stays behind. Tags tell `pair`, `group`, and of a box `box`.

    Args:
        points: the pairs.
        bands: the three that become red, green and blue, counted from 0; see `as_rgb`.

    Yields:
        Documents with a `blob`: the picture as it was fed, or a PNG.
    """
    for point in points:
        tags: dict[str, Any] = {'pair': point.id, 'group': point.group}
        if isinstance(point.kind, BoxLabels):
            yield from _crops(point, tags, bands)
            continue
        kept, encoding = point.kept
        blob = (
            kept if encoding == PICTURE and bands is None else png_of(as_rgb(point.read(), bands))
        )
        yield Document(id=point.name, blob=blob, tags={**tags, LABEL_TAG: class_of_pair(point)})


def class_of_pair(point: DataPoint) -> str:
    """The classes of a pair as one: their names joined by ` + `, or `none` where it shows none."""
    return _BETWEEN.join(point.present) or NO_CLASS


def _crops(
    point: DataPoint, tags: dict[str, Any], bands: Sequence[int] | None
) -> Iterator[Document]:
    rgb = as_rgb(point.read(), bands)
    number = 0
    for name, boxes in zip(point.kind.classes, point.y, strict=True):
        for box in boxes:
            left, top = math.floor(box[0]), math.floor(box[1])
            right, bottom = math.ceil(box[2]), math.ceil(box[3])
            yield Document(
                id=f'{point.name}-{number}',
                blob=png_of(rgb[top:bottom, left:right]),
                tags={**tags, 'box': list(box), LABEL_TAG: name},
            )
            number += 1


def png_of(rgb: np.ndarray) -> bytes:
    """The file of a picture `[height, width, 3]` uint8."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(rgb).save(file, 'PNG', compress_level=1)
    return file.getvalue()
