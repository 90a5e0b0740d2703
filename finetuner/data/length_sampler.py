"""A sampler of items of like length, such as texts that are padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from finetuner.data.samplers import EpochSampler, batch_starts, whole_number


class LengthBucketSampler(EpochSampler):
    """Batches of items of like length, so that little of a padded batch is padding.

    The items are sorted by length, those of one length shuffled among themselves, and cut into
    batches; then the batches are shuffled. Each item comes once an epoch, and the number of
    batches is the same in every epoch. An item whose length nothing else has keeps its
    neighbours.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.integer],
        batch_size: int,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        """Cut the lengths into batches.

        Args:
            lengths: one an item, such as its number of tokens; 0 or more.
            batch_size: items in a batch at most.
            max_tokens: most that a batch may hold when padded, its items times its longest; a
                longer item stands alone. None for no limit.
            shuffle: False for the longest first, so that a batch too large for the memory shows
                at once, and items of one length in their order.
            seed: for the same batches again; None for others each time.

        Raises:
            ValueError: a size is not a positive whole number, or a length is not one of 0 or more.
        """
        super().__init__(seed)
        batch_size = whole_number('batch_size', batch_size)
        if max_tokens is not None:
            max_tokens = whole_number('max_tokens', max_tokens)
        self._lengths = _checked_lengths(lengths)
        self._shuffle = shuffle
        longest_first = np.sort(self._lengths)[::-1]
        # The first of a batch is its longest, so it alone decides how many fit.
        sizes = np.full(len(longest_first), batch_size)
        if max_tokens is not None:
            fitting = max_tokens // np.maximum(longest_first, 1)
            sizes = np.clip(fitting, 1, batch_size)
        self._starts = batch_starts(np.arange(len(sizes)) + sizes)

    def __len__(self) -> int:
        """Return the number of batches of every epoch."""
        return len(self._starts) - 1

    def _batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        items = np.arange(len(self._lengths))
        batches = np.arange(len(self))
        if self._shuffle:
            items, batches = generator.permutation(items), generator.permutation(batches)
        items = items[np.argsort(-self._lengths[items], kind='stable')]
        for batch in batches:
            yield items[self._starts[batch] : self._starts[batch + 1]].tolist()


def _checked_lengths(lengths: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in 'iu'):
        raise ValueError(
            f'lengths must be one whole number an item, not {array.dtype} of shape {array.shape}'
        )
    negative = np.flatnonzero(array < 0)
    if len(negative):
        first = int(negative[0])
        raise ValueError(f'lengths[{first}] must be 0 or more, not {array[first]}')
    return array.astype(np.int64)
