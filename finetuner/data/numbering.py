"""Batches that know their place: which epoch, and which batch of it."""

from __future__ import annotations

from collections.abc import Iterator

from finetuner.data.samplers import EpochSampler


class NumberedBatch(list[int]):
    """Indices of the items of a batch, with what its random numbers are drawn from.

    Attributes:
        key: seed, epoch, and number of the batch in the epoch.
    """

    key: tuple[int, int, int]


class NumberedBatches:
    """A sampler's batches with their keys, from any place on.

    Attributes:
        sampler: whose batches they are.
    """

    def __init__(self, sampler: EpochSampler, seed: int) -> None:
        """Begin where the sampler stands.

        Args:
            sampler: which items stand together.
            seed: not negative, the first part of the keys.
        """
        self.sampler = sampler
        self._seed = seed
        self._num_skipped = 0

    @property
    def next_place(self) -> tuple[int, int]:
        """The epoch and the batch that the next iteration begins with."""
        return self.sampler.epoch, self._num_skipped

    @next_place.setter
    def next_place(self, place: tuple[int, int]) -> None:
        self.sampler.epoch, self._num_skipped = place

    def __len__(self) -> int:
        """Return the number of batches of every epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[NumberedBatch]:
        """Yield the batches of an epoch, or those of it that are left."""
        # As with the samplers, only the first `next` counts.
        (epoch, first), self._num_skipped = self.next_place, 0
        for number, indices in enumerate(self.sampler):
            if number >= first:
                batch = NumberedBatch(indices)
                batch.key = self._seed, epoch, number
                yield batch
