"""Where in an image things are, as boxes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuner.collections.geometry import Frame
from finetuner.collections.labels.base import LabelKind, damaged, shown, some
from finetuner.excepts import DataError

_BOX = 4
# in an image
MOST_BOXES = 100_000

Box = tuple[float, float, float, float]
Boxes = list[list[Box]]


@dataclass(frozen=True)
class BoxLabels(LabelKind[Boxes]):
    """Where in an image things are: for each class its boxes, `(minx, miny, maxx, maxy)`.

    In pixels from the upper left corner, so that `(0, 0, width, height)` is the whole image. Taken are
    `{class: boxes}`, or the boxes of each class in the order of the classes; where there is one class,
    the boxes alone.
    """

    mltype = 'object_detection'

    def read(self, label: Any, frame: Frame) -> Boxes:
        """See `LabelKind.read`."""
        found = self._read(label.tolist() if isinstance(label, np.ndarray) else label, frame)
        if sum(map(len, found)) > MOST_BOXES:
            raise DataError(
                f'the image has {sum(map(len, found)):,} boxes: at most {MOST_BOXES:,} are taken'
            )
        return found

    def _read(self, given: Any, frame: Frame) -> Boxes:
        found: Boxes = [[] for _ in self.classes]
        if isinstance(given, Mapping):
            for name, boxes in given.items():
                found[self.index_of(name)] = _read_boxes(boxes, frame, name)
            return found
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise DataError(f'{self._expected()}: not {shown(given)}')
        if len(self.classes) == 1 and not is_nested(given):
            return [_read_boxes(given, frame, self.classes[0])]
        if len(given) != len(self.classes):
            raise DataError(f'{self._expected()}: {shown(given)} has {len(given)} lists')
        return [
            _read_boxes(boxes, frame, name) for boxes, name in zip(given, self.classes, strict=True)
        ]

    def flip(self, label: Boxes, frame: Frame, *, horizontal: bool, vertical: bool) -> Boxes:
        """Each box is turned over with the image."""

        def turned(box: Box) -> Box:
            left, top, right, bottom = box
            if horizontal:
                left, right = frame.width - right, frame.width - left
            if vertical:
                top, bottom = frame.height - bottom, frame.height - top
            return left, top, right, bottom

        return [[turned(box) for box in boxes] for boxes in label]

    def present(self, label: Boxes) -> list[str]:
        """See `LabelKind.present`."""
        return [name for name, boxes in zip(self.classes, label, strict=True) if boxes]

    def encode(self, label: Boxes) -> bytes:
        """For each box five float64, little-endian: the number of its class, and its sides."""
        rows = [(number, *box) for number, boxes in enumerate(label) for box in boxes]
        return np.array(rows, '<f8').tobytes()

    def decode(self, data: bytes, frame: Frame) -> Boxes:
        """See `LabelKind.decode`."""
        del frame
        found: Boxes = [[] for _ in self.classes]
        if len(data) % (8 * (1 + _BOX)):
            raise damaged(self, data)
        for number, *box in np.frombuffer(data, '<f8').reshape(-1, 1 + _BOX).tolist():
            if number not in range(len(found)):
                raise damaged(self, data)
            found[int(number)].append((box[0], box[1], box[2], box[3]))
        return found

    def as_json(self, label: Boxes) -> list[list[list[float]]]:
        """For each class its boxes."""
        return [[list(box) for box in boxes] for boxes in label]

    def _expected(self) -> str:
        count = len(self.classes)
        shape = (
            'a list of boxes [minx, miny, maxx, maxy]' if count == 1 else f'{count} lists of boxes'
        )
        return f'a label of this collection is {shape}, or {{class: boxes}} ({some(self.classes)})'


def _read_boxes(boxes: Any, frame: Frame, name: str) -> list[Box]:
    given = boxes.tolist() if isinstance(boxes, np.ndarray) else boxes
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f'the boxes of {name!r} are {shown(boxes)}: it takes a list of boxes')
    return [_read_box(box, frame, name) for box in given]


def _read_box(box: Any, frame: Frame, name: str) -> Box:
    values = box.tolist() if isinstance(box, np.ndarray) else box
    fits = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == _BOX
    if not fits or not all(_is_number(value) for value in values):
        raise DataError(
            f'a box of {name!r} is {shown(box)}: it takes [minx, miny, maxx, maxy] in pixels'
        )
    left, top, right, bottom = (float(value) for value in values)
    if not (0 <= left < right <= frame.width and 0 <= top < bottom <= frame.height):
        raise DataError(
            f'a box of {name!r} is {shown(box)}: it takes 0 <= minx < maxx <= {frame.width} and '
            f'0 <= miny < maxy <= {frame.height}, from the upper left of its image'
        )
    return left, top, right, bottom


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        # one of JSON may be larger than any float
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, (float, np.integer, np.floating)) and math.isfinite(value)


def is_nested(boxes: Sequence[Any]) -> bool:
    """Whether these are lists of boxes and not boxes."""
    return bool(boxes) and all(
        isinstance(each, Sequence)
        and not isinstance(each, str)
        and all(isinstance(inner, (Sequence, np.ndarray)) for inner in each)
        for each in boxes
    )
