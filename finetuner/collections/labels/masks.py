"""Which class each pixel of an image belongs to."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuner.collections.burning import burn
from finetuner.collections.geometry import Frame
from finetuner.collections.labels.base import LabelKind, damaged, shown, some
from finetuner.excepts import ConfigError, DataError

# a mask has a byte a pixel, and 0 is what belongs to no class
MOST_MASK_CLASSES = 255


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
        if isinstance(label, Mapping) or is_features(label):
            return self._of_features(label, frame)
        try:
            mask = np.asarray(label)
        except (TypeError, ValueError):
            raise DataError(f'{self._expected(frame)}: not {shown(label)}') from None
        if mask.dtype.kind not in 'bui':
            raise DataError(f'{self._expected(frame)}: not {shown(label)}')
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

    def encode(self, label: np.ndarray) -> bytes:
        """Its bytes row by row, as zlib compresses them."""
        return zlib.compress(label.tobytes(), 1)

    def decode(self, data: bytes, frame: Frame) -> np.ndarray:
        """See `LabelKind.decode`."""
        size = frame.height * frame.width
        reading = zlib.decompressobj()
        try:
            plain = reading.decompress(data, size + 1)
        except zlib.error:
            raise damaged(self, data) from None
        mask = np.frombuffer(plain, np.uint8)
        if mask.size != size or not reading.eof or mask.max() > len(self.classes):
            raise damaged(self, data)
        return mask.reshape(frame.height, frame.width)

    def as_json(self, label: np.ndarray) -> list[list[int]]:
        """Rows of values."""
        return label.tolist()

    def _of_layers(self, layers: np.ndarray) -> np.ndarray:
        if ((layers != 0) & (layers != 1)).any():
            raise DataError('a mask for each class holds zeros and ones alone')
        mask = np.zeros(layers.shape[1:], np.uint8)
        for number, layer in enumerate(layers, 1):
            mask[layer != 0] = number
        return mask

    def _of_features(self, label: Any, frame: Frame) -> np.ndarray:
        shapes = []
        for position, feature in enumerate(features_of(label)):
            name = class_of(feature)
            if name is None and len(self.classes) == 1:
                name = self.classes[0]
            if name is None:
                raise DataError(
                    f'feature {position} has no property `label`, which names its class '
                    f'({some(self.classes)})'
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


def is_features(label: Any) -> bool:
    """Whether a label is a list of GeoJSON features."""
    is_list = isinstance(label, Sequence) and not isinstance(label, str | bytes)
    return is_list and all(isinstance(each, Mapping) for each in label)


def class_of(feature: Mapping[str, Any]) -> Any:
    """What the property `label` of a GeoJSON feature says; None where it has none."""
    properties = feature.get('properties')
    return properties.get('label') if isinstance(properties, Mapping) else None


def features_of(label: Any) -> list[Mapping[str, Any]]:
    """The features of a FeatureCollection, of one feature, or of a list of features."""
    if not isinstance(label, Mapping):
        return list(label)
    if label.get('type') == 'FeatureCollection':
        features = label.get('features')
        if not isinstance(features, Sequence) or not is_features(features):
            raise DataError('a GeoJSON FeatureCollection has a list of `features`')
        return list(features)
    return [label]
