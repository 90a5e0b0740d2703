"""Batches for training, made ahead of time by threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuner.collections.batch_options import BatchOptions, Preparer
from finetuner.collections.cache import OpenCache
from finetuner.collections.threads import num_threads, submit
from finetuner.excepts import DataError

# batches that wait to be taken, as long as they are small
_MOST_AHEAD = 2
_BYTES_AHEAD = 256 << 20


class Batch(NamedTuple):
    """What is to become a batch.

    Attributes:
        positions: `[n]` int64, in the cache.
        is_flipped: `[n, 2]` bool, horizontally and vertically.
    """

    positions: NDArray[np.int64]
    is_flipped: NDArray[np.bool_]


class BatchGenerator:
    """Batches `(x, y)` of some pairs; each iteration over it is a new epoch.

    `x` is `[n, bands, height, width]`, or with channels last. `y` is `[n, classes]` for classes,
    `[n, height, width]` for masks, and for boxes a list of n labels. The arrays are new for
    each batch. Threads read the next batches meanwhile; `image_transform` and `label_transform` are
    called by the thread that iterates.

    Attributes:
        options: how the batches are made.
    """

    def __init__(
        self, cache: OpenCache, positions: NDArray[np.int64], options: BatchOptions
    ) -> None:
        """Note what to read; nothing is read yet.

        Args:
            cache: of the collection.
            positions: `[n]`, the pairs of an epoch.
            options: how the batches are made.

        Raises:
            ConfigError: images of this collection cannot be prepared like this.
            DataError: an endless loop over no batch.
        """
        self.options = options
        self._cache = cache
        self._positions = positions
        self._preparer = Preparer(options.preparation, cache.shape, cache.dtype, cache.kind)
        self._entropy = np.random.SeedSequence(options.seed).entropy
        self._epochs = itertools.count()
        if options.loop and not len(self):
            raise DataError(
                f'loop=True over {len(positions)} pairs, which make no batch of '
                f'{options.batch_size}: it would never end'
            )

    def __len__(self) -> int:
        """How many batches an epoch has."""
        full, rest = divmod(len(self._positions), self.options.batch_size)
        return full + bool(rest and not self.options.drop_last)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Any]]:
        """Read an epoch, or, with `loop`, one after the other."""
        num_bytes = self.options.batch_size * self._preparer.new_images(1).nbytes
        ahead = max(1, min(_MOST_AHEAD, _BYTES_AHEAD // num_bytes))
        waiting: deque[_Reading] = deque()
        try:
            for batch in self._batches():
                waiting.append(_Reading(self._cache, self._preparer, batch))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for reading in waiting:
                reading.cancel()

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self._epoch(next(self._epochs))
            if not self.options.loop:
                return

    def _epoch(self, number: int) -> Iterator[Batch]:
        random = np.random.default_rng(np.random.SeedSequence(self._entropy, spawn_key=(number,)))
        count = len(self._positions)
        order = random.permutation(count) if self.options.shuffle else np.arange(count)
        preparation = self.options.preparation
        is_flipped = random.random((count, 2)) < 0.5
        is_flipped &= [preparation.flip_horizontal, preparation.flip_vertical]
        for first in range(0, len(self) * self.options.batch_size, self.options.batch_size):
            chosen = slice(first, first + self.options.batch_size)
            yield Batch(self._positions[order[chosen]], is_flipped[chosen])


class _Reading:
    """A batch that threads are reading."""

    def __init__(self, cache: OpenCache, preparer: Preparer, batch: Batch) -> None:
        self._cache = cache
        self._preparer = preparer
        self._batch = batch
        count = len(batch.positions)
        self._images = preparer.new_images(count)
        self._labels: list[Any] = [None] * count
        share = -(-count // num_threads())
        self._futures: list[Future[None]] = [
            submit(self._read, start, min(start + share, count)) for start in range(0, count, share)
        ]

    def _read(self, start: int, stop: int) -> None:
        for row in range(start, stop):
            position = int(self._batch.positions[row])
            horizontal, vertical = self._batch.is_flipped[row].tolist()
            self._preparer.write_image(
                self._cache.read_image(position),
                self._images[row],
                horizontal=horizontal,
                vertical=vertical,
            )
            self._labels[row] = self._preparer.label(
                self._cache.read_label(position), horizontal=horizontal, vertical=vertical
            )

    def result(self) -> tuple[np.ndarray, Any]:
        for future in self._futures:
            future.result()
        return (
            self._preparer.transformed_images(self._images),
            self._preparer.transformed_labels(self._labels),
        )

    def cancel(self) -> None:
        for future in self._futures:
            future.cancel()
