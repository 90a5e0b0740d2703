"""Pairs of a collection as a dataset of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from finetuner.collections.batch_options import Preparation, Preparer
from finetuner.collections.cache import OpenCache


class TorchPairs(Dataset[tuple[Tensor, Any]]):
    """Pairs `(x, y)`, prepared: `x` is a tensor `[bands, height, width]`.

    `y` is a uint8 tensor `[classes]` for classes and `[height, width]` for masks, and for boxes a list
    of the boxes of each class: there a DataLoader needs `collate_fn=dataset.collate`. Whether a pair
    is flipped comes from torch's random numbers, which a DataLoader seeds anew in each worker. Workers
    may be forked or spawned; each opens the cache for itself.
    """

    def __init__(
        self, cache: OpenCache, positions: NDArray[np.int64], preparation: Preparation
    ) -> None:
        """Look at some pairs of a cache.

        Args:
            cache: open.
            positions: `[n]` int64, of the pairs.
            preparation: what becomes of each pair; without `channels_last`.

        Raises:
            ConfigError: images of this collection cannot be prepared like this.
        """
        self._cache = cache
        self._positions = positions
        self._preparation = preparation
        self._preparer = Preparer(preparation, cache.shape, cache.dtype, cache.kind)

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._positions)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Read a pair.

        Args:
            index: a number, negative from the end.

        Raises:
            IndexError: there is no such pair.
            DataError: the cache is damaged, or was closed.
        """
        position = int(self._positions[index])
        options = self._preparation
        horizontal = options.flip_horizontal and bool(torch.rand(()) < 0.5)
        vertical = options.flip_vertical and bool(torch.rand(()) < 0.5)
        image = self._preparer.new_images(1)[0]
        self._preparer.write_image(
            self._cache.read_image(position), image, horizontal=horizontal, vertical=vertical
        )
        x = torch.from_numpy(image)
        if options.image_transform is not None:
            x = options.image_transform(x)
        y = self._preparer.label(
            self._cache.read_label(position), horizontal=horizontal, vertical=vertical
        )
        if isinstance(y, np.ndarray):
            # a tensor holds no array that is turned over or read-only
            y = torch.from_numpy(np.array(y))
        if options.label_transform is not None:
            y = options.label_transform(y)
        return x, y

    @staticmethod
    def collate(pairs: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """A batch: images stacked, labels too if they are tensors of one shape, else in a list.

        Args:
            pairs: what a DataLoader read.
        """
        images, labels = zip(*pairs, strict=True)
        are_tensors = all(isinstance(label, Tensor) for label in labels)
        if are_tensors and len({label.shape for label in labels}) == 1:
            return torch.stack(images), torch.stack(labels)
        return torch.stack(images), list(labels)
