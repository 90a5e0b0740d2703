"""Sequences over a cache: which pairs an index means, and reading many of them ahead of time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from finetuner.collections.batch_options import stack_labels, writeable
from finetuner.collections.cache import OpenCache
from finetuner.collections.labels.base import shown
from finetuner.collections.threads import in_order, num_threads
from finetuner.excepts import ConfigError

_MOST_AT_ONCE = 64
_BYTES_AT_ONCE = 2 << 20

Item = TypeVar('Item')
ReadFn = Callable[[OpenCache, int], Item]


class Images(Sequence[Any]):
    """The images of some pairs; one is `[bands, height, width]`, several `[n, bands, height, width]`.

    Attributes:
        shape: of all together.
        dtype: of all.
    """

    def __init__(self, cache: OpenCache, positions: NDArray[np.int64]) -> None:
        """Look at some pairs of a cache; see `Partition`."""
        self._cache = cache
        self._positions = positions

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(n, bands, height, width)`."""
        return (len(self), *self._cache.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of all images."""
        return self._cache.dtype

    def __len__(self) -> int:
        """How many there are."""
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        """Read one image, or several; see `Partition.__getitem__`."""
        chosen = choose(self._positions, index)
        if isinstance(chosen, int):
            return read_image(self._cache, chosen)
        found = np.empty((len(chosen), *self._cache.shape), self._cache.dtype)
        for row, image in enumerate(read_ahead(self._cache, chosen, OpenCache.read_image)):
            found[row] = image
        return found

    def __iter__(self) -> Iterator[np.ndarray]:
        """Read all in order, some of them ahead of time."""
        return read_ahead(self._cache, self._positions, read_image)


class Labels(Sequence[Any]):
    """The labels of some pairs; several are an array `[n, ...]`, or of boxes a list."""

    def __init__(self, cache: OpenCache, positions: NDArray[np.int64]) -> None:
        """Look at some pairs of a cache; see `Partition`."""
        self._cache = cache
        self._positions = positions

    def __len__(self) -> int:
        """How many there are."""
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        """Read one label, or several; see `Partition.__getitem__`."""
        chosen = choose(self._positions, index)
        if isinstance(chosen, int):
            return read_label(self._cache, chosen)
        found = list(read_ahead(self._cache, chosen, read_label))
        if found:
            return stack_labels(found)
        kind, (_, height, width) = self._cache.kind, self._cache.shape
        shapes = {'classification': (0, len(kind.classes)), 'segmentation': (0, height, width)}
        return np.zeros(shapes[kind.mltype], np.uint8) if kind.mltype in shapes else []

    def __iter__(self) -> Iterator[Any]:
        """Read all in order, some of them ahead of time."""
        return read_ahead(self._cache, self._positions, read_label)


def read_image(cache: OpenCache, position: int) -> np.ndarray:
    """An image that its reader may write to."""
    return writeable(cache.read_image(position))


def read_label(cache: OpenCache, position: int) -> Any:
    """A label that its reader may write to."""
    return writeable(cache.read_label(position))


def read_pair(cache: OpenCache, position: int) -> tuple[np.ndarray, Any]:
    """An image and its label."""
    return read_image(cache, position), read_label(cache, position)


def read_ahead(
    cache: OpenCache, positions: NDArray[np.int64], read: ReadFn[Item]
) -> Iterator[Item]:
    """Read pairs in order, by several threads and some of them ahead of time.

    Args:
        cache: open.
        positions: `[n]`, of the pairs.
        read: what is read of a pair.
    """
    num_bytes = cache.dtype.itemsize * int(np.prod(cache.shape, dtype=np.int64))
    at_once = max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // num_bytes))

    def read_some(some: list[int]) -> list[Item]:
        return [read(cache, position) for position in some]

    runs = (
        positions[first : first + at_once].tolist() for first in range(0, len(positions), at_once)
    )
    for found in in_order(read_some, runs, 2 * num_threads()):
        yield from found


def choose(positions: NDArray[np.int64], index: Any) -> int | NDArray[np.int64]:
    """The position of one pair, or the positions of several.

    Args:
        positions: `[n]`, of all.
        index: a number, negative from the end; a slice; a list or array of numbers, or of n bools.

    Raises:
        IndexError: there is no such pair.
        ConfigError: it is nothing of the kind.
    """
    count = len(positions)
    if isinstance(index, slice):
        return positions[index]
    if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
        number = operator.index(index)
        if not -count <= number < count:
            raise IndexError(f'there is no pair {number}: there are {count}')
        return int(positions[number])
    numbers = np.asarray(index) if isinstance(index, (Sequence, np.ndarray)) else np.array(None)
    if (
        isinstance(index, str)
        or numbers.ndim != 1
        or (len(numbers) and numbers.dtype.kind not in 'bui')
    ):
        raise ConfigError(
            f'{shown(index)} stands for no pairs: give a number, a slice, or a list of numbers'
        )
    if numbers.dtype.kind == 'b':
        if len(numbers) != count:
            raise IndexError(f'{len(numbers)} bools cannot choose from {count} pairs')
        return positions[numbers]
    if len(numbers) and not (-count <= numbers.min() and numbers.max() < count):
        raise IndexError(
            f'there are {count} pairs, and the numbers go from {numbers.min()} to {numbers.max()}'
        )
    return positions[numbers.astype(np.int64)]
