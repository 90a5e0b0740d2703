"""Samplers: which items stand together in a batch, drawn anew each epoch."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_MIXING_ROUNDS = 12
_BATCHES_AT_ONCE = 512


class EpochSampler(ABC):
    """Yields batches of indices; each iteration is the next epoch.

    Attributes:
        epoch: number of the epoch that the next iteration yields, from 0. Setting it goes on from
            there: with the same seed, epoch 7 is the same whether or not 0 to 6 came before.
    """

    def __init__(self, seed: int | None = None) -> None:
        """Start at epoch 0.

        Args:
            seed: not negative; None for a different order each time.
        """
        if seed is not None and seed < 0:
            raise ValueError(f'seed must be 0 or more, not {seed}')
        self._seed = secrets.randbits(63) if seed is None else int(seed)
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of epoch `epoch`, which counts as begun with the first of them.

        Not with this call: torch's loader, when it has workers, makes two iterators for its first
        epoch and uses one.
        """
        generator = np.random.default_rng([self._seed, self.epoch])
        self.epoch += 1
        yield from self._batches(generator)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches of every epoch."""

    @abstractmethod
    def _batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        """Yield the batches of one epoch."""


class ClassSampler(EpochSampler):
    """Batches of the same number of classes and the same number of items of each class.

    The items of a class are shuffled into groups of `num_items_per_class`; a batch takes one group
    each of `batch_size // num_items_per_class` different classes, the groups standing one after
    the other. Every item is used once an epoch where counts allow:

    - an item short of a full group is made up from the same class, evenly: as long as the class
      has `num_items_per_class` items none comes twice in one group;
    - the number of batches is the largest that the rule allows, so the classes with most groups
      come most often. Groups that still cannot fill a batch (the surplus of a class that would
      have to stand in one batch twice, or fewer than one batch at the end) are dropped for that
      epoch, drawn at random.

    Where classes have several groups, which of them meet in a batch is shuffled as well.
    """

    def __init__(
        self,
        labels: Sequence[int],
        batch_size: int,
        num_items_per_class: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Count classes and groups.

        Args:
            labels: one label an item.
            batch_size: items in a batch at most; a multiple of `num_items_per_class` is filled.
            num_items_per_class: items of one class in a batch; by default
                `batch_size // number of classes`, at least 1.
            seed: for the same batches again; None for others each time.

        Raises:
            ValueError: a size is not a positive whole number, or `num_items_per_class` is more
                than `batch_size`.
        """
        super().__init__(seed)
        batch_size = whole_number('batch_size', batch_size)
        classes, counts = _count_classes(np.asarray(labels))
        if num_items_per_class is None:
            num_items_per_class = max(1, batch_size // max(1, len(counts)))
        num_items_per_class = whole_number('num_items_per_class', num_items_per_class)
        if num_items_per_class > batch_size:
            raise ValueError(
                f'num_items_per_class must be at most batch_size ({batch_size}), '
                f'not {num_items_per_class}'
            )
        self._classes = classes
        self._counts = counts
        self._first = np.cumsum(counts, dtype=counts.dtype) - counts
        self._num_items = num_items_per_class
        self._num_classes = batch_size // num_items_per_class
        self._groups = -(-self._counts // num_items_per_class)
        self._num_batches = _most_batches(self._groups, self._num_classes)

    def __len__(self) -> int:
        """Return the number of batches of every epoch."""
        return self._num_batches

    def _batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        if not self._num_batches:
            return
        table = self._table(generator)
        groups = _occurrence(table.reshape(-1)).reshape(table.shape)
        shuffled = self._shuffled(generator)
        for start in range(0, len(table), _BATCHES_AT_ONCE):
            part = slice(start, start + _BATCHES_AT_ONCE)
            yield from self._items(table[part], groups[part], shuffled).tolist()

    def _table(self, generator: np.random.Generator) -> NDArray[np.integer]:
        """Draw which classes make up each batch.

        Returns:
            `[num_batches, classes in a batch]` int, no class twice in a row.
        """
        used = self._drawn_groups(generator)
        order = generator.permutation(len(used)).astype(used.dtype)
        groups = np.repeat(order, used[order])
        # Dealt like cards, one to each batch in turn: a class has at most as many groups as there
        # are batches, and they lie side by side, so no batch gets the same class twice.
        table = groups.reshape(self._num_classes, self._num_batches).T
        if used.max() > 1 and self._num_classes > 1:
            for _ in range(_MIXING_ROUNDS):
                table = _mix(table, generator)
        return table[generator.permutation(self._num_batches)]

    def _drawn_groups(self, generator: np.random.Generator) -> NDArray[np.integer]:
        """Draw how many groups of each class the epoch has: what fills its batches exactly.

        Returns:
            `[num_classes]` int, none more than the batches.
        """
        used = np.minimum(self._groups, self._num_batches)
        surplus = int(used.sum()) - self._num_batches * self._num_classes
        if surplus:
            dropped = generator.choice(int(used.sum()), surplus, replace=False)
            np.subtract.at(used, np.repeat(np.arange(len(used)), used)[dropped], 1)
        return used

    def _shuffled(self, generator: np.random.Generator) -> NDArray[np.integer]:
        """Draw the order of the items within each class.

        Returns:
            `[num_items]` int, indices of items: those of the first class, of the second, and so on.
        """
        order = generator.permutation(len(self._classes)).astype(self._classes.dtype)
        return order[np.argsort(self._classes[order], kind='stable')]

    def _items(
        self,
        table: NDArray[np.integer],
        groups: NDArray[np.integer],
        shuffled: NDArray[np.integer],
    ) -> NDArray[np.integer]:
        """Put items into a part of the table of classes, given which group of its class each is.

        Returns:
            `[batches, items in a batch]` int, indices of items.
        """
        place = groups[..., None] * self._num_items + np.arange(self._num_items)
        # Past its last item a class begins again with its first.
        place %= self._counts[table][..., None]
        return shuffled[self._first[table][..., None] + place].reshape(len(table), -1)


class RandomSampler(EpochSampler):
    """Batches of shuffled items, whatever their labels; each item once an epoch.

    The last batch may be short. One item alone, from which nothing can be learned, is left out.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int | None = None) -> None:
        """Take the sizes.

        Args:
            num_items: items in the dataset, 0 or more.
            batch_size: items in a batch.
            seed: for the same batches again; None for others each time.

        Raises:
            ValueError: `batch_size` is not a positive whole number.
        """
        super().__init__(seed)
        self._num_items = num_items
        self._batch_size = whole_number('batch_size', batch_size)
        alone = self._batch_size > 1 and num_items > 1 and num_items % self._batch_size == 1
        self._num_used = num_items - 1 if alone else num_items

    def __len__(self) -> int:
        """Return the number of batches of every epoch."""
        return -(-self._num_used // self._batch_size)

    def _batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        order = generator.permutation(self._num_items)[: self._num_used]
        for start in range(0, self._num_used, self._batch_size):
            yield order[start : start + self._batch_size].tolist()


class SequentialSampler(EpochSampler):
    """Batches of items in order, every epoch the same; the last may be short."""

    def __init__(self, num_items: int, batch_size: int) -> None:
        """Take the sizes.

        Args:
            num_items: items in the dataset, 0 or more.
            batch_size: items in a batch.

        Raises:
            ValueError: `batch_size` is not a positive whole number.
        """
        super().__init__(seed=0)
        self._num_items = num_items
        self._batch_size = whole_number('batch_size', batch_size)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self._num_items // self._batch_size)

    def _batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        for start in range(0, self._num_items, self._batch_size):
            yield list(range(start, min(start + self._batch_size, self._num_items)))


def whole_number(name: str, value: int, least: int = 1) -> int:
    """Check that a size is a whole number.

    Args:
        name: the argument, for the message.
        value: what came for it.
        least: the smallest that is allowed.

    Raises:
        ValueError: it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f'{name} must be a whole number of at least {least}, not {value!r}')
    return int(value)


def batch_starts(following: NDArray[np.int64]) -> NDArray[np.int64]:
    """Walk from batch to batch.

    Args:
        following: `[num_items]` int, for each item where the next batch would begin if one began
            with this item: after it.

    Returns:
        `[num_batches + 1]` int: where each batch begins, and `num_items`.
    """
    end, place = len(following), 0
    steps = following.tolist()
    starts = [0]
    while place < end:
        place = min(steps[place], end)
        starts.append(place)
    return np.array(starts, dtype=np.int64)


def _count_classes(
    labels: NDArray[np.integer],
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Number the classes from 0, in the order of their labels.

    Returns:
        `[num_items]` the class of each item, the labels themselves where they are such numbers, and
        `[num_classes]` its number of items; int32 where that is enough, since there are millions.
    """
    whole: type[np.integer] = np.int32 if len(labels) <= np.iinfo(np.int32).max // 2 else np.int64
    if labels.dtype.kind == 'i' and len(labels) and 0 <= labels.min() <= labels.max() < len(labels):
        counts = np.bincount(labels)
        if counts.all():
            return labels.astype(whole, copy=False), counts.astype(whole)
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return classes.reshape(-1).astype(whole), counts.astype(whole)


def _most_batches(groups: NDArray[np.integer], num_classes: int) -> int:
    """Return the most batches of `num_classes` different classes that the groups allow.

    A class can stand in each batch once, so `n` batches can be made exactly when
    `sum(min(groups, n)) >= n * num_classes`; where that holds for `n` it holds for less.
    """
    low, high = 0, int(groups.sum()) // num_classes
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(groups, middle).sum()) >= middle * num_classes:
            low = middle
        else:
            high = middle - 1
    return low


def _mix(table: NDArray[np.integer], generator: np.random.Generator) -> NDArray[np.integer]:
    """Let batches swap classes, two by two at random, where neither gets one twice.

    Only classes that one batch of the two has and the other has not are swapped.
    """
    half = len(table) // 2
    num_classes = table.shape[1]
    table = generator.permuted(table[generator.permutation(len(table))], axis=1)
    both = np.concatenate([table[:half], table[half : 2 * half]], axis=1)
    order = np.argsort(both, axis=1)
    ordered = np.take_along_axis(both, order, axis=1)
    equal = ordered[:, 1:] == ordered[:, :-1]
    shared = np.zeros(both.shape, dtype=bool)
    beside = np.zeros(both.shape, dtype=bool)
    beside[:, 1:] |= equal
    beside[:, :-1] |= equal
    np.put_along_axis(shared, order, beside, axis=1)
    swap = ~(shared[:, :num_classes] | shared[:, num_classes:])
    swap &= generator.random(swap.shape) < 0.5
    one, other = both[:, :num_classes], both[:, num_classes:]
    table[:half] = np.where(swap, other, one)
    table[half : 2 * half] = np.where(swap, one, other)
    return table


def _occurrence(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """Count, for each value, how many equal ones stand before it."""
    order = np.argsort(values, kind='stable')
    counts = np.bincount(values)
    counts = counts[counts > 0]
    ranks = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    occurrence = np.empty_like(values)
    occurrence[order] = ranks
    return occurrence
