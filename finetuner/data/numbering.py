"""Batches that know their place: which epoch, and which batch of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetuner.data.samplers import EpochSampler


@dataclass(frozen=True)
class Part:
    """What one of several processes loads of the batches that all of them draw.

    Attributes:
        rank: of the process, from 0.
        size: how many processes there are.
        unit: items that stay together, as the two of a pair do.
        whole_batches: every so-manieth batch as a whole, for embedding in order; else of each batch
            the process's part, which is empty where there are fewer items than processes.
    """

    rank: int = 0
    size: int = 1
    unit: int = 1
    whole_batches: bool = False

    @property
    def is_all(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def divides(self) -> bool:
        """Whether it is a part of each batch."""
        return not self.is_all and not self.whole_batches

    def of(self, batch: list[int]) -> list[int]:
        """The items of a batch that the process loads, side by side as in the batch."""
        units = -(-len(batch) // self.unit)
        first, end = (units * rank // self.size for rank in (self.rank, self.rank + 1))
        return batch[first * self.unit : end * self.unit]


class NumberedBatch(list[int]):
    """Indices of the items of a batch, with what its random numbers are drawn from.

    Attributes:
        key: seed, epoch, number of the batch in the epoch and, of a part, the process's rank.
    """

    key: tuple[int, ...]


class NumberedBatches:
    """A sampler's batches with their keys, from any place on.

    Attributes:
        sampler: whose batches they are.
        part: what of them this process loads.
    """

    def __init__(self, sampler: EpochSampler, seed: int, part: Part | None = None) -> None:
        """Begin where the sampler stands.

        Args:
            sampler: which items stand together.
            seed: not negative, the first part of the keys.
            part: what this process loads of them; None for all.
        """
        self.sampler = sampler
        self.part = part or Part()
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
        total = len(self.sampler)
        return len(range(self.part.rank, total, self.part.size)) if self._skips else total

    @property
    def _skips(self) -> bool:
        return self.part.whole_batches and not self.part.is_all

    def __iter__(self) -> Iterator[NumberedBatch]:
        """Yield the batches of an epoch, or those of it that are left."""
        # As with the samplers, only the first `next` counts.
        (epoch, first), self._num_skipped = self.next_place, 0
        for number, indices in enumerate(self.sampler):
            if number < first or (self._skips and number % self.part.size != self.part.rank):
                continue
            batch = NumberedBatch(self.part.of(indices) if self.part.divides else indices)
            batch.key = self._seed, epoch, number
            if self.part.divides:
                batch.key = (*batch.key, self.part.rank)
            yield batch
