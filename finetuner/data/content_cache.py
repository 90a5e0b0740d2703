"""Decoded pictures, kept in memory from the first epoch on and shared by the loader processes."""

from __future__ import annotations

import functools
import logging
import mmap
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.labelled import LabelledDataset, PreprocessFn
from finetuner.data.memory import available_memory
from finetuner.excepts import DataError

VaryFn = Callable[[Any], Any]

logger = logging.getLogger('finetuner.run')

# what decoded pictures of a run may take: a share of the memory there is, and no more than that
_SHARE_OF_MEMORY = 0.25
_MOST_BYTES = 2 * 2**30
# so many items are tried to see what they become; if none of them can be read, nothing is kept
_NUM_TRIED = 8


class ContentSource(Protocol):
    """Where loaders get contents from."""

    def prepared(
        self,
        dataset: LabelledDataset[Any],
        preprocess_fn: PreprocessFn | None,
        vary_fn: VaryFn | None = None,
    ) -> LabelledDataset[Any]:
        """Return the dataset with contents as a model takes them.

        Args:
            dataset: of any kind.
            preprocess_fn: takes a Document and returns one input, always the same.
            vary_fn: what is done to the input at each access, such as augmentation.
        """


class FreshContents:
    """Contents made of their Documents at each access."""

    def prepared(
        self,
        dataset: LabelledDataset[Any],
        preprocess_fn: PreprocessFn | None,
        vary_fn: VaryFn | None = None,
    ) -> LabelledDataset[Any]:
        """Return the dataset with this way to preprocess; see `ContentSource`."""
        if vary_fn is not None and preprocess_fn is not None:
            preprocess_fn = functools.partial(_varied, preprocess_fn, vary_fn)
        return dataset.with_preprocess(preprocess_fn)


class KeptContents:
    """Contents made of their Documents at the first access, and kept as far as memory goes.

    Arrays of bytes are kept, all of one shape, as pictures are; other contents (the tokens of
    texts) are made anew each time, and so is what is varied, from the picture that is kept.

    The memory is shared with processes forked later: what one has decoded, all have.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """Keep nothing yet.

        Args:
            max_bytes: what is kept in all; None for a quarter of the memory there is, at most
                2 GiB.
        """
        if max_bytes is None:
            max_bytes = min(_MOST_BYTES, int(_SHARE_OF_MEMORY * available_memory()))
        self._bytes_left = max_bytes
        # the Documents are held, so that no others can come to have their address
        self._stores: list[tuple[Sequence[Document], PreprocessFn, _Store]] = []

    def prepared(
        self,
        dataset: LabelledDataset[Any],
        preprocess_fn: PreprocessFn | None,
        vary_fn: VaryFn | None = None,
    ) -> LabelledDataset[Any]:
        """Return the dataset, its contents kept; see `ContentSource`."""
        fresh = FreshContents().prepared(dataset, preprocess_fn)
        found = None
        if preprocess_fn is not None:
            keys = dataset.item_keys()
            found = self._find(dataset, preprocess_fn, keys)
            found = found or self._add(fresh, preprocess_fn, keys)
        if found is None:
            return FreshContents().prepared(dataset, preprocess_fn, vary_fn)
        return dataset.with_contents(_KeptItems(fresh, *found, vary_fn))

    def share_kept(self, dataset: LabelledDataset[Any], preprocess_fn: PreprocessFn) -> float:
        """Which share of a dataset's items is, or will be, kept: 0 to 1."""
        found = self._find(dataset, preprocess_fn, dataset.item_keys())
        return 0.0 if found is None else float((found[1] >= 0).mean())

    def _find(
        self, dataset: LabelledDataset[Any], preprocess_fn: PreprocessFn, keys: NDArray[np.int64]
    ) -> tuple[_Store, NDArray[np.int64]] | None:
        for source, known_fn, store in self._stores:
            if source is dataset.source and known_fn == preprocess_fn:
                rows = find_rows(store.keys, keys)
                if (rows >= 0).any():
                    return store, rows
        return None

    def _add(
        self, fresh: LabelledDataset[Any], preprocess_fn: PreprocessFn, keys: NDArray[np.int64]
    ) -> tuple[_Store, NDArray[np.int64]] | None:
        example = _first_readable(fresh)
        if not isinstance(example, np.ndarray) or example.dtype != np.uint8 or not example.nbytes:
            return None
        count = min(len(keys), self._bytes_left // (example.nbytes + 1))
        if count < len(keys):
            logger.info(
                'Memory holds %d of %d decoded pictures; the others are decoded in each epoch',
                count,
                len(keys),
            )
        if not count:
            return None
        self._bytes_left -= count * (example.nbytes + 1)
        store = _Store(keys[:count], example.shape)
        self._stores.append((fresh.source, preprocess_fn, store))
        return store, find_rows(store.keys, keys)


def find_rows(known: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Say where numbers stand in an array of different numbers: `[num_wanted]`, -1 for nowhere."""
    order = np.argsort(known, kind='stable')
    places = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    rows = order[places]
    return np.where(known[rows] == wanted, rows, -1)


class _Store:
    """Rows of bytes in memory that forked processes share, each with a mark that it is filled."""

    def __init__(self, keys: NDArray[np.int64], shape: tuple[int, ...]) -> None:
        self.keys = keys
        count, size = len(keys), int(np.prod(shape))
        # Anonymous, unlike torch's shared tensors: no file that a small /dev/shm has no room for,
        # and pages that no one has written to take no memory.
        memory = np.frombuffer(mmap.mmap(-1, count * (size + 1)), dtype=np.uint8)
        self._filled = memory[:count]
        self._values = memory[count:].reshape(count, *shape)

    def get(self, row: int) -> NDArray[np.uint8] | None:
        """What stands in a row, not to be written to; None where nothing does yet."""
        if not self._filled[row]:
            return None
        value = self._values[row]
        value.flags.writeable = False
        return value

    def put(self, row: int, value: Any) -> None:
        """Fill a row, unless this is no array like the others."""
        shape = self._values.shape[1:]
        if isinstance(value, np.ndarray) and (value.dtype, value.shape) == (np.uint8, shape):
            self._values[row] = value
            # Marked last. Two processes that fill a row at once write the same bytes.
            self._filled[row] = 1


class _KeptItems:
    """Gives the contents of a dataset's items, from a store where they are kept."""

    def __init__(
        self,
        fresh: LabelledDataset[Any],
        store: _Store,
        rows: NDArray[np.int64],
        vary_fn: VaryFn | None,
    ) -> None:
        self._fresh = fresh
        self._store: _Store | None = store
        self._rows = rows
        self._vary_fn = vary_fn

    def __getstate__(self) -> dict[str, Any]:
        # a process that is not forked shares no memory: it decodes anew
        return {**self.__dict__, '_store': None}

    def __call__(self, index: int) -> Any:
        row = int(self._rows[index])
        store = self._store
        content = None if store is None or row < 0 else store.get(row)
        if content is None:
            content = self._fresh[index][0]
            if store is not None and row >= 0:
                store.put(row, content)
        return content if self._vary_fn is None else self._vary_fn(content)


def _varied(preprocess_fn: PreprocessFn, vary_fn: VaryFn, doc: Document) -> Any:
    return vary_fn(preprocess_fn(doc))


def _first_readable(dataset: LabelledDataset[Any]) -> Any:
    for index in range(min(_NUM_TRIED, len(dataset))):
        try:
            return dataset[index][0]
        except (DataError, OSError):
            # it is named where it is loaded
            continue
    return None
