"""What is done to images and labels between the cache and a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetuner.collections.geometry import Frame
from finetuner.collections.labels import LabelKind
from finetuner.collections.labels.base import shown
from finetuner.excepts import ConfigError, DataError

Pad = int | tuple[int, int]
TransformFn = Callable[[Any], Any]


@dataclass(frozen=True)
class Preparation:
    """What becomes of each pair.

    Attributes:
        rescale: images become float32 in 0..1: whole numbers without sign are divided by the largest of
            their dtype (255, 65535), bool becomes 0 and 1. Numbers with a sign and floats have no
            such range and are refused: an `image_transform` knows theirs.
        flip_horizontal: whether left becomes right, by chance, of half of the pairs.
        flip_vertical: whether top becomes bottom, by chance, of half of the pairs.
        channels_last: whether images are `[height, width, bands]`.
        pad: `(height, width)`, or both in one number, which images and masks are filled up to with
            zeros at the right and the bottom. Boxes stay where they are.
        image_transform: takes an image after all this, and returns what is given instead.
        label_transform: takes a label after all this, and returns what is given instead.
    """

    rescale: bool = False
    flip_horizontal: bool = False
    flip_vertical: bool = False
    channels_last: bool = False
    pad: Pad | None = None
    image_transform: TransformFn | None = None
    label_transform: TransformFn | None = None

    def __post_init__(self) -> None:
        """Refuse what is none.

        Raises:
            ConfigError: an option is of another type or out of range.
        """
        for name in ('rescale', 'flip_horizontal', 'flip_vertical', 'channels_last'):
            _check_bool(name, getattr(self, name))
        for name in ('image_transform', 'label_transform'):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f'{name}={shown(value)}: it takes a function of one argument')
        if self.pad is not None:
            sides = _sides_of(self.pad)
            if len(sides) != 2 or not all(_is_whole(side, 1) for side in sides):
                raise ConfigError(
                    f'pad={shown(self.pad)}: it takes (height, width) in pixels, or one number'
                )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what comes out.

        Raises:
            ConfigError: images are larger than they are to be.
        """
        if self.pad is None:
            return height, width
        padded_height, padded_width = map(int, _sides_of(self.pad))
        if padded_height < height or padded_width < width:
            raise ConfigError(
                f'pad={self.pad!r}: images are {height} x {width} pixels already, and get no smaller'
            )
        return padded_height, padded_width


@dataclass(frozen=True)
class BatchOptions:
    """How batches are made.

    Attributes:
        batch_size: pairs in a batch.
        shuffle: whether each epoch has an order of its own.
        loop: whether epoch follows epoch for ever.
        seed: from which orders and flips come; the same seed, the same epochs. None for others
            each time.
        drop_last: whether a last batch that is not full is left out.
        preparation: what becomes of each pair.
    """

    batch_size: int
    shuffle: bool = True
    loop: bool = False
    seed: int | None = None
    drop_last: bool = False
    preparation: Preparation = field(default_factory=Preparation)

    def __post_init__(self) -> None:
        """Refuse what is none.

        Raises:
            ConfigError: an option is of another type or out of range.
        """
        check_batch_size(self.batch_size)
        for name in ('shuffle', 'loop', 'drop_last'):
            _check_bool(name, getattr(self, name))
        if self.seed is not None and not _is_whole(self.seed, 0):
            raise ConfigError(f'seed={shown(self.seed)}: it takes a whole number from 0, or None')


class Preparer:
    """Prepares the pairs of one collection.

    Attributes:
        shape: of an image that comes out, before `image_transform`.
        dtype: of it.
    """

    def __init__(
        self,
        preparation: Preparation,
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        kind: LabelKind[Any],
    ) -> None:
        """Check that the images can be prepared like this.

        Args:
            preparation: what is to become of each pair.
            shape: of the images, `(bands, height, width)`.
            dtype: of the images.
            kind: of the labels.

        Raises:
            ConfigError: they cannot.
        """
        self._options = preparation
        self._kind = kind
        bands, height, width = shape
        self._frame = Frame(height, width)
        self._size = preparation.size(height, width)
        self._divisor = _largest(dtype) if preparation.rescale else None
        self.dtype = np.dtype(np.float32) if preparation.rescale else dtype
        self.shape = (*self._size, bands) if preparation.channels_last else (bands, *self._size)

    def new_images(self, count: int) -> np.ndarray:
        """Room for images, `[count, *shape]`; zeros where nothing will be written."""
        is_padded = self._size != (self._frame.height, self._frame.width)
        return (np.zeros if is_padded else np.empty)((count, *self.shape), self.dtype)

    def write_image(
        self, image: np.ndarray, out: np.ndarray, *, horizontal: bool, vertical: bool
    ) -> None:
        """Prepare an image.

        Args:
            image: `[bands, height, width]`.
            out: of `shape`, where to.
            horizontal: whether this one is flipped so.
            vertical: whether this one is flipped so.
        """
        room = out.transpose(2, 0, 1) if self._options.channels_last else out
        room = room[:, : self._frame.height, : self._frame.width]
        # turned over where it is written, so that it is read in one go
        if horizontal:
            room = room[:, :, ::-1]
        if vertical:
            room = room[:, ::-1]
        # with channels last, band by band is four times as fast as all at once
        in_bands = zip(room, image, strict=True)
        for to, band in in_bands if self._options.channels_last else ((room, image),):
            if self._divisor is None:
                to[...] = band
            else:
                np.divide(band, self._divisor, out=to, casting='same_kind')

    def label(self, label: Any, *, horizontal: bool, vertical: bool) -> Any:
        """A prepared label, before `label_transform`; of masks it may be a view."""
        if horizontal or vertical:
            label = self._kind.flip(label, self._frame, horizontal=horizontal, vertical=vertical)
        if self._kind.mltype != 'segmentation' or label.shape == self._size:
            return label
        padded = np.zeros(self._size, label.dtype)
        padded[: self._frame.height, : self._frame.width] = label
        return padded

    def transformed_images(self, images: np.ndarray) -> np.ndarray:
        """What `image_transform` makes of a batch, image by image in order.

        Raises:
            DataError: what it returns cannot be stacked.
        """
        transform = self._options.image_transform
        if transform is None:
            return images
        found = [np.asarray(transform(image)) for image in images]
        shapes = sorted({image.shape for image in found})
        if len(shapes) > 1 or any(image.dtype.kind not in 'buifc' for image in found):
            raise DataError(
                f'image_transform gave {found[0].dtype} of the shapes {shapes}: in a batch, it takes '
                'arrays of numbers and of one shape'
            )
        return np.stack(found)

    def transformed_labels(self, labels: list[Any]) -> Any:
        """What `label_transform` makes of a batch, label by label in order; stacked where it can be."""
        transform = self._options.label_transform
        if transform is not None:
            labels = [transform(writeable(label)) for label in labels]
        return stack_labels(labels)


def writeable(value: Any) -> Any:
    """An image or label that whoever gets it may change: what came from bytes is read-only."""
    is_held = isinstance(value, np.ndarray) and not value.flags.writeable
    return value.copy() if is_held else value


def stack_labels(labels: Sequence[Any]) -> Any:
    """Labels as one array `[n, ...]` where they are arrays or numbers of one shape, else a list."""
    are_arrays = all(isinstance(label, (np.ndarray, np.generic, int, float)) for label in labels)
    if labels and are_arrays and len({np.shape(label) for label in labels}) == 1:
        return np.stack(labels)
    return list(labels)


def check_batch_size(value: object) -> None:
    """Refuse what is no size of a batch.

    Raises:
        ConfigError: it is none.
    """
    if not _is_whole(value, 1):
        raise ConfigError(f'batch_size={shown(value)}: it takes a whole number from 1')


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(f'{name}={shown(value)}: it takes True or False')


def _is_whole(value: object, least: int) -> bool:
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_int and value >= least  # type: ignore[operator]


def _sides_of(pad: Any) -> Sequence[Any]:
    return pad if isinstance(pad, Sequence) else (pad, pad)


def _largest(dtype: np.dtype[Any]) -> np.float32:
    """What `rescale` divides by."""
    if dtype.kind == 'b':
        return np.float32(1)
    if dtype.kind != 'u':
        raise ConfigError(
            f'rescale=True: images of {dtype} have no range that becomes 0..1; give an '
            'image_transform that knows theirs'
        )
    return np.float32(np.iinfo(dtype).max)
