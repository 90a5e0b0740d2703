"""Samplers of items that mean something only beside each other: sessions, pairs, views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from finetuner.data.samplers import EpochSampler, batch_starts, whole_number

_ROOT, _POSITIVE, _NEGATIVE = 0, 1, -1
_REFERENCE_ORDERS = 5
_TRIES = 20


class SessionSampler(EpochSampler):
    """Batches of whole sessions, filled up with a part of the next one.

    Sessions are put into a batch one after the other, each with its root first and its items side
    by side, until the batch holds exactly `batch_size` items; the last batch of an epoch may be
    short. From a session that does not fit any more only the root and a random sample of its
    matches is taken; it comes again, whole, at the start of the next batch. So every session that
    fits a batch is whole in one batch of an epoch. One that is larger than a batch fills a batch
    alone, with its root and a random sample of its matches, and is not continued.

    A sample holds at least one positive and one negative where the session has both, else the
    triplets of that session would be lost; with room for one match only, that is a positive.
    Where one place is left in a batch the root stands there alone. It teaches nothing, but keeps
    batches of one size.

    How many batches an epoch takes depends on the order of the sessions. Here it is the same for
    every epoch and every seed, so that a schedule of the learning rate can rely on it: the number
    is that of a typical order, and of the orders drawn for an epoch the first that takes as many
    is used. Where none does after some tries, the sessions of a typical order change places with
    those of their own size only.
    """

    def __init__(
        self,
        labels: Sequence[tuple[int, int]] | NDArray[np.integer],
        batch_size: int,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        """Find the sessions and count the batches.

        Args:
            labels: `[num_items, 2]` int, or one pair an item: the session, and 0 for its root,
                1 for a positive match, -1 for a negative one. The items of a session stand
                together, the root first.
            batch_size: items in a batch, at least 2.
            shuffle: False for the sessions in the order of their labels.
            seed: for the same batches again; None for others each time.

        Raises:
            ValueError: `batch_size` is no such number, or the labels are not as described; names
                the session.
        """
        super().__init__(seed)
        self._batch_size = whole_number('batch_size', batch_size, least=2)
        self._kinds, self._first = _sessions(labels)
        self._sizes = np.diff(self._first, append=len(self._kinds))
        self._shuffle = shuffle
        self._typical = np.arange(len(self._first))
        if shuffle:
            self._typical = self._typical_order()
        self._num_batches = len(self._starts(self._typical)) - 1

    def __len__(self) -> int:
        """Return the number of batches of every epoch."""
        return self._num_batches

    def _batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        order = self._order(generator)
        starts = self._starts(order).tolist()
        for start, end in pairwise(starts):
            if self._sizes[order[start]] > self._batch_size:
                yield self._sample(order[start], self._batch_size, generator).tolist()
                continue
            batch = self._whole(order[start:end])
            places = self._batch_size - len(batch)
            if places and end < len(order):
                batch = np.concatenate([batch, self._sample(order[end], places, generator)])
            yield batch.tolist()

    def _order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Draw an order of the sessions that takes `len(self)` batches."""
        if not self._shuffle:
            return self._typical
        for _ in range(_TRIES):
            order = generator.permutation(len(self._first))
            if len(self._starts(order)) - 1 == self._num_batches:
                return order
        # The sizes one after the other, and with them the number of batches, stay as they are.
        order = np.empty_like(self._typical)
        sizes = self._sizes[self._typical]
        shuffled = generator.permutation(self._typical)
        places = np.argsort(sizes, kind='stable')
        order[places] = shuffled[np.argsort(self._sizes[shuffled], kind='stable')]
        return order

    def _typical_order(self) -> NDArray[np.int64]:
        """Return, of some random orders, one that takes the median number of batches."""
        # Not from the seed of the sampler: the length of a training must not depend on it.
        generator = np.random.default_rng(0)
        orders = [generator.permutation(len(self._first)) for _ in range(_REFERENCE_ORDERS)]
        counts = [len(self._starts(order)) for order in orders]
        return orders[int(np.argsort(counts, kind='stable')[len(orders) // 2])]

    def _starts(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find the batches of an order.

        Returns:
            `[num_batches + 1]` int: the places in the order whose sessions begin a batch, and the
            number of sessions.
        """
        ends = np.concatenate([[0], np.cumsum(self._sizes[order])])
        # A batch that begins with a session holds those that end within `batch_size` of its start.
        following = np.searchsorted(ends, ends[:-1] + self._batch_size, side='right') - 1
        return batch_starts(np.maximum(following, np.arange(1, len(order) + 1)))

    def _whole(self, sessions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return all items of some sessions, one session after the other."""
        sizes = self._sizes[sessions]
        before = np.cumsum(sizes) - sizes
        return np.repeat(self._first[sessions] - before, sizes) + np.arange(sizes.sum())

    def _sample(
        self, session: int, num_items: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return a session's root and a sample of its matches, fewer than it has."""
        first, num_matches = self._first[session], num_items - 1
        kinds = self._kinds[first + 1 : first + self._sizes[session]]
        rank = generator.random(len(kinds))
        for kind, place in ((_POSITIVE, -2.0), (_NEGATIVE, -1.0)):
            of_kind = np.flatnonzero(kinds == kind)
            if len(of_kind):
                rank[of_kind[np.argmin(rank[of_kind])]] = place
        chosen = np.sort(np.argpartition(rank, num_matches)[:num_matches])
        return np.concatenate([[first], first + 1 + chosen])


class InstanceSampler(EpochSampler):
    """Batches in which each instance comes several times, for as many augmented views of it.

    The views of an instance stand side by side, and each instance is in one batch an epoch. The
    last batch may be short, of whole instances still. One instance alone, which has nothing to be
    told from, is left out where batches hold several: another one each epoch.
    """

    def __init__(
        self,
        num_instances: int,
        batch_size: int,
        views_per_instance: int = 2,
        seed: int | None = None,
    ) -> None:
        """Take the sizes.

        Args:
            num_instances: instances in the dataset, 0 or more.
            batch_size: items in a batch, a multiple of `views_per_instance`.
            views_per_instance: how often each instance comes in its batch, at least 2.
            seed: for the same batches again; None for others each time.

        Raises:
            ValueError: a size is not such a number.
        """
        super().__init__(seed)
        self._num_instances = whole_number('num_instances', num_instances, least=0)
        self._views = whole_number('views_per_instance', views_per_instance, least=2)
        batch_size = whole_number('batch_size', batch_size)
        if batch_size % self._views:
            raise ValueError(
                f'batch_size must be divisible by views_per_instance ({self._views}), '
                f'not {batch_size}'
            )
        self._in_batch = batch_size // self._views
        alone = self._num_instances > 1 and self._num_instances % self._in_batch == 1
        self._num_used = self._num_instances - 1 if alone else self._num_instances

    def __len__(self) -> int:
        """Return the number of batches of every epoch."""
        return -(-self._num_used // self._in_batch)

    def _batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        order = generator.permutation(self._num_instances)[: self._num_used]
        for start in range(0, self._num_used, self._in_batch):
            yield np.repeat(order[start : start + self._in_batch], self._views).tolist()


class PairSampler(EpochSampler):
    """Batches of whole pairs: items `2 * i` and `2 * i + 1`, side by side and in this order.

    Each pair comes once an epoch. The last batch may be short, of whole pairs still.
    """

    def __init__(self, num_pairs: int, batch_size: int, seed: int | None = None) -> None:
        """Take the sizes.

        Args:
            num_pairs: pairs in the dataset, half as many as its items; 0 or more.
            batch_size: items in a batch, at least 2; of an odd number one place stays empty.
            seed: for the same batches again; None for others each time.

        Raises:
            ValueError: a size is not such a number.
        """
        super().__init__(seed)
        self._num_pairs = whole_number('num_pairs', num_pairs, least=0)
        self._in_batch = whole_number('batch_size', batch_size, least=2) // 2

    def __len__(self) -> int:
        """Return the number of batches of every epoch."""
        return -(-self._num_pairs // self._in_batch)

    def _batches(self, generator: np.random.Generator) -> Iterator[list[int]]:
        order = generator.permutation(self._num_pairs)
        for start in range(0, self._num_pairs, self._in_batch):
            left = 2 * order[start : start + self._in_batch]
            yield np.stack([left, left + 1], axis=1).reshape(-1).tolist()


def _sessions(
    labels: Sequence[tuple[int, int]] | NDArray[np.integer],
) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Read and check the labels of sessions.

    Returns:
        `[num_items]` int8, each item 0, 1 or -1; and `[num_sessions]` int, where each begins.
    """
    array = np.asarray(labels)
    if not len(array):
        return np.empty(0, dtype=np.int8), np.empty(0, dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in 'iu':
        raise ValueError(
            'labels must be pairs of whole numbers (the session; 0, 1 or -1), not '
            f'{array.dtype} of shape {array.shape}'
        )
    ids, kinds = array[:, 0], array[:, 1]
    first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    unknown = np.flatnonzero((kinds < _NEGATIVE) | (kinds > _POSITIVE))
    if len(unknown):
        item = int(unknown[0])
        raise ValueError(
            f'session {ids[item]}: item {item} has the label {kinds[item]}, and 0 (the root), 1 '
            '(similar to it) and -1 (not similar) are allowed'
        )
    names, times = np.unique(ids[first], return_counts=True)
    if len(names) < len(first):
        raise ValueError(
            f'session {names[times > 1][0]}: its items do not stand together; sort the labels by '
            'session'
        )
    num_roots = np.add.reduceat((kinds == _ROOT).astype(np.int64), first)
    wrong = np.flatnonzero((num_roots != 1) | (kinds[first] != _ROOT))
    if len(wrong):
        session = int(wrong[0])
        found = {0: 'it has no root', 1: 'its root is not its first item'}.get(
            int(num_roots[session]), f'it has {num_roots[session]} roots'
        )
        raise ValueError(
            f'session {ids[first[session]]}: {found}; label one item 0, the first of the session'
        )
    return kinds.astype(np.int8), first
