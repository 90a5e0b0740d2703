"""What a cache is written from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from finetuner.collections.labels import LabelKind


@dataclass(frozen=True)
class PairRow:
    """A pair of an image and a label, its image aside.

    Attributes:
        id: of the pair, never used again.
        group: `'train'`, `'test'`, `'validate'` or any name.
        label: as `LabelKind.encode` made it.
    """

    id: int
    group: str
    label: bytes


class PairSource(Protocol):
    """One revision of a collection, as its cache is written from it.

    Attributes:
        key: names the collection, lower-case hex.
        revision: grows with every change: pairs added, removed, labels updated.
        shape: `(bands, height, width)` of all images.
        dtype: of all images.
        kind: of all labels.
    """

    key: str
    revision: int
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    kind: LabelKind[Any]

    def rows(self) -> Iterator[PairRow]:
        """All pairs of this revision, in order of id."""

    def read_image(self, pair_id: int) -> np.ndarray:
        """The image of a pair, `[bands, height, width]`; under its id it never changes.

        The array is read by another thread afterwards, so each image needs one of its own.
        """

    def read_images(self, pair_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """The images of several pairs, in this order, each read when it is asked for."""
