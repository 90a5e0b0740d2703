"""Labels of image/label pairs: what people give, what is kept, and what becomes of it in a flip.

A collection has labels of one kind. Whatever form a label comes in, it is checked against the image
it belongs to and made into the one form that is kept: a vector of zeros and ones a class, boxes a
class, or a mask.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from finetuner.collections.geometry import Frame, burn
from finetuner.excepts import ConfigError, DataError, unknown_name

MLTYPES = ('classification', 'object_detection', 'segmentation')
# a mask has a byte a pixel, and 0 is what belongs to no class
MOST_MASK_CLASSES = 255
_BOX = 4

Label = TypeVar('Label')
Box = tuple[float, float, float, float]
Boxes = list[list[Box]]


@dataclass(frozen=True)
class LabelKind(ABC, Generic[Label]):
    """What the labels of a collection are.

    Attributes:
        classes: their names, in the order in which labels count them.
    """

    classes: tuple[str, ...]
    mltype: ClassVar[str]

    @abstractmethod
    def read(self, label: Any, frame: Frame) -> Label:
        """Check a label, and bring it into the form that is kept.

        Args:
            label: in any of the forms that its kind takes.
            frame: of the image it belongs to.

        Raises:
            DataError: it is no label of this kind, or of another image.
        """

    @abstractmethod
    def flip(self, label: Label, frame: Frame, *, horizontal: bool, vertical: bool) -> Label:
        """What a label becomes when its image is turned over.

        Args:
            label: in the form that is kept.
            frame: of the image.
            horizontal: whether left becomes right.
            vertical: whether top becomes bottom.
        """

    @abstractmethod
    def present(self, label: Label) -> list[str]:
        """Names of the classes that a label says are there."""

    def index_of(self, name: str) -> int:
        """Place of a class.

        Raises:
            DataError: there is no such class.
        """
        try:
            return self.classes.index(name)
        except ValueError:
            raise DataError(unknown_name('class', name, self.classes)) from None


@dataclass(frozen=True)
class ClassLabels(LabelKind[np.ndarray]):
    """Which classes an image shows: uint8 `[classes]`, 1 for each that is there.

    Taken are such a vector ("one hot encoding", more than one may be hot), a class's name, or several.
    """

    mltype = 'classification'

    def read(self, label: Any, frame: Frame) -> np.ndarray:
        """See `LabelKind.read`."""
        del frame
        if isinstance(label, str):
            return self._of_names([label])
        values = label.tolist() if isinstance(label, np.ndarray) else label
        if not isinstance(values, Sequence):
            raise DataError(f'{self._expected()}: not {_shown(label)}')
        if values and all(isinstance(value, str) for value in values):
            return self._of_names(values)
        if any(isinstance(value, str) or value not in (0, 1) for value in values):
            raise DataError(f'{self._expected()}: not {_shown(label)}')
        if len(values) != len(self.classes):
            raise DataError(f'{self._expected()}: {_shown(label)} has {len(values)} numbers')
        return np.array(values, np.uint8)

    def flip(
        self, label: np.ndarray, frame: Frame, *, horizontal: bool, vertical: bool
    ) -> np.ndarray:
        """It stays what it is."""
        del frame, horizontal, vertical
        return label

    def present(self, label: np.ndarray) -> list[str]:
        """See `LabelKind.present`."""
        return [name for name, value in zip(self.classes, label, strict=True) if value]

    def _of_names(self, names: Sequence[str]) -> np.ndarray:
        vector = np.zeros(len(self.classes), np.uint8)
        for name in names:
            vector[self.index_of(name)] = 1
        return vector

    def _expected(self) -> str:
        return (
            f'a label of this collection is {len(self.classes)} zeros and ones, or the names of '
            f'classes ({_some(self.classes)})'
        )


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
        given = label.tolist() if isinstance(label, np.ndarray) else label
        found: Boxes = [[] for _ in self.classes]
        if isinstance(given, Mapping):
            for name, boxes in given.items():
                found[self.index_of(name)] = _read_boxes(boxes, frame, name)
            return found
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise DataError(f'{self._expected()}: not {_shown(label)}')
        if len(self.classes) == 1 and not _is_nested(given):
            return [_read_boxes(given, frame, self.classes[0])]
        if len(given) != len(self.classes):
            raise DataError(f'{self._expected()}: {_shown(label)} has {len(given)} lists')
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

    def _expected(self) -> str:
        count = len(self.classes)
        shape = (
            'a list of boxes [minx, miny, maxx, maxy]' if count == 1 else f'{count} lists of boxes'
        )
        return f'a label of this collection is {shape}, or {{class: boxes}} ({_some(self.classes)})'


@dataclass(frozen=True)
class MaskLabels(LabelKind[np.ndarray]):
    """Which class each pixel belongs to: uint8 `[height, width]`, 0 for none, k for the k-th class.

    Taken are such a mask; a mask a class, `[classes, height, width]` of zeros and ones; or GeoJSON
    features in the projected units of the image, the class of each in its property `label` (a name;
    where there is one class, it may be missing). What lies outside the image is cut off. Where
    features or masks overlap, the later ones count.
    """

    mltype = 'segmentation'

    def __post_init__(self) -> None:
        """Refuse more classes than a byte can tell apart.

        Raises:
            ConfigError: there are.
        """
        if len(self.classes) > MOST_MASK_CLASSES:
            raise ConfigError(
                f'{len(self.classes)} classes: a mask tells {MOST_MASK_CLASSES} of them apart'
            )

    def read(self, label: Any, frame: Frame) -> np.ndarray:
        """See `LabelKind.read`."""
        if isinstance(label, Mapping) or _is_features(label):
            return self._of_features(label, frame)
        try:
            mask = np.asarray(label)
        except ValueError:
            raise DataError(f'{self._expected(frame)}: not {_shown(label)}') from None
        if mask.dtype.kind not in 'bui':
            raise DataError(f'{self._expected(frame)}: not {_shown(label)}')
        size = (frame.height, frame.width)
        if mask.shape == (len(self.classes), *size):
            return self._of_layers(mask)
        if mask.shape != size:
            raise DataError(f'{self._expected(frame)}: this one is {list(mask.shape)}')
        if mask.size and (mask.min() < 0 or mask.max() > len(self.classes)):
            raise DataError(f'{self._expected(frame)}: its values are {mask.min()} to {mask.max()}')
        return np.ascontiguousarray(mask, np.uint8)

    def flip(
        self, label: np.ndarray, frame: Frame, *, horizontal: bool, vertical: bool
    ) -> np.ndarray:
        """The mask is turned over with the image."""
        del frame
        turned = label[:, ::-1] if horizontal else label
        return turned[::-1] if vertical else turned

    def present(self, label: np.ndarray) -> list[str]:
        """See `LabelKind.present`."""
        return [self.classes[value - 1] for value in np.unique(label) if value]

    def _of_layers(self, layers: np.ndarray) -> np.ndarray:
        if ((layers != 0) & (layers != 1)).any():
            raise DataError('a mask for each class holds zeros and ones alone')
        mask = np.zeros(layers.shape[1:], np.uint8)
        for number, layer in enumerate(layers, 1):
            mask[layer != 0] = number
        return mask

    def _of_features(self, label: Any, frame: Frame) -> np.ndarray:
        shapes = []
        for position, feature in enumerate(_features_of(label)):
            properties = feature.get('properties') or {}
            name = properties.get('label')
            if name is None and len(self.classes) == 1:
                name = self.classes[0]
            if name is None:
                raise DataError(
                    f'feature {position} has no property `label`, which names its class '
                    f'({_some(self.classes)})'
                )
            shapes.append((feature.get('geometry'), self.index_of(name) + 1))
        return burn(shapes, frame)

    def _expected(self, frame: Frame) -> str:
        size = f'{frame.height}, {frame.width}'
        count = len(self.classes)
        return (
            f'a label of this collection is a mask [{size}] of whole numbers 0 to {count}, one '
            f'[{count}, {size}] of zeros and ones, or GeoJSON features'
        )


_KINDS: dict[str, type[LabelKind]] = {
    kind.mltype: kind for kind in (ClassLabels, BoxLabels, MaskLabels)
}


def build_label_kind(mltype: str, classes: Sequence[str]) -> LabelKind:
    """The labels of a collection.

    Args:
        mltype: one of `MLTYPES`.
        classes: names, each once.

    Raises:
        ConfigError: there is no such kind, or the names are none or not distinct.
    """
    if mltype not in MLTYPES:
        raise ConfigError(unknown_name('mltype', mltype, MLTYPES))
    if isinstance(classes, str) or not all(isinstance(name, str) and name for name in classes):
        raise ConfigError(f'classes={_shown(classes)}: it takes a list of names')
    if not classes or len(set(classes)) != len(classes):
        raise ConfigError(f'classes={_shown(classes)}: it takes one name or more, each once')
    return _KINDS[mltype](tuple(classes))


def _read_boxes(boxes: Any, frame: Frame, name: str) -> list[Box]:
    given = boxes.tolist() if isinstance(boxes, np.ndarray) else boxes
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f'the boxes of {name!r} are {_shown(boxes)}: it takes a list of boxes')
    return [_read_box(box, frame, name) for box in given]


def _read_box(box: Any, frame: Frame, name: str) -> Box:
    values = box.tolist() if isinstance(box, np.ndarray) else box
    fits = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == _BOX
    if not fits or not all(_is_number(value) for value in values):
        raise DataError(
            f'a box of {name!r} is {_shown(box)}: it takes [minx, miny, maxx, maxy] in pixels'
        )
    left, top, right, bottom = (float(value) for value in values)
    if not (0 <= left < right <= frame.width and 0 <= top < bottom <= frame.height):
        raise DataError(
            f'a box of {name!r} is {_shown(box)}: it takes 0 <= minx < maxx <= {frame.width} and '
            f'0 <= miny < maxy <= {frame.height}, from the upper left of its image'
        )
    return left, top, right, bottom


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float, np.integer, np.floating))
    return is_real and not isinstance(value, bool) and math.isfinite(value)


def _is_nested(boxes: Sequence[Any]) -> bool:
    """Whether these are lists of boxes and not boxes."""
    return bool(boxes) and all(
        isinstance(each, Sequence)
        and not isinstance(each, str)
        and all(isinstance(inner, (Sequence, np.ndarray)) for inner in each)
        for each in boxes
    )


def _is_features(label: Any) -> bool:
    return isinstance(label, Sequence) and all(isinstance(each, Mapping) for each in label)


def _features_of(label: Any) -> list[Mapping[str, Any]]:
    """The features of a FeatureCollection, of one feature, or of a list of features."""
    if not isinstance(label, Mapping):
        return list(label)
    if label.get('type') == 'FeatureCollection':
        features = label.get('features')
        if not isinstance(features, Sequence) or not _is_features(features):
            raise DataError('a GeoJSON FeatureCollection has a list of `features`')
        return list(features)
    return [label]


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(map(repr, names[:most])) + more


def _shown(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f'{text[:most]}...'
