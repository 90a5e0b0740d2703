"""Batches of classes that lie close to one another, which is where a model errs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finetuner.data.samplers import ClassSampler


class NeighbourClassSampler(ClassSampler):
    """A `ClassSampler` that fills its batches with a class and those nearest to it.

    Which classes are near is told by `set_neighbours`; until then batches are drawn at random.
    A batch begins with a class drawn at random among those that are left, and takes its nearest
    that are left. Otherwise it is as a `ClassSampler`'s: as many batches, as many items of each
    class in one, each class as often in an epoch, no class twice in a batch.
    """

    def __init__(
        self,
        labels: Sequence[int],
        batch_size: int,
        num_items_per_class: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Count classes and groups, see `ClassSampler`."""
        super().__init__(labels, batch_size, num_items_per_class, seed)
        self._near: dict[int, list[int]] = {}

    @property
    def num_neighbours(self) -> int:
        """How many neighbours of each class are of use: some are taken before it comes to them."""
        return min(len(self._counts) - 1, 4 * self._num_classes)

    def set_neighbours(self, classes: NDArray[np.integer], neighbours: NDArray[np.integer]) -> None:
        """Say which classes stand together in the epochs from now on.

        Args:
            classes: `[n]` int, labels of classes; of others nothing is known.
            neighbours: `[n, k]` int, the labels of those nearest to each, the nearest first.

        Raises:
            ValueError: there is not a row for each, or a label stands for no class.
        """
        if neighbours.ndim != 2 or len(neighbours) != len(classes):
            raise ValueError(
                f'neighbours of the shape {list(neighbours.shape)} are not a row for each of '
                f'{len(classes)} classes'
            )
        known = len(self._counts)
        for values in (classes, neighbours):
            if values.size and not 0 <= values.min() <= values.max() < known:
                raise ValueError(f'classes must be from 0 to {known - 1}')
        self._near = dict(zip(classes.tolist(), neighbours.tolist(), strict=True))

    def _table(self, generator: np.random.Generator) -> NDArray[np.integer]:
        """As `ClassSampler._table`, classes that are near in one batch."""
        if not self._near:
            return super()._table(generator)
        left = self._drawn_groups(generator)
        # a card for each group: where a batch begins, or goes on when nobody near is left
        deck = generator.permutation(np.repeat(np.arange(len(left)), left)).tolist()
        left_of = left.tolist()
        by_groups_left: dict[int, list[int]] = {}
        for class_, groups in enumerate(left_of):
            by_groups_left.setdefault(groups, []).append(class_)
        table = np.empty((self._num_batches, self._num_classes), dtype=self._counts.dtype)
        start = 0
        for row in range(self._num_batches):
            batches_left = self._num_batches - row
            # these must stand in every batch from here on, for all their groups to be used
            due = by_groups_left.pop(batches_left, [])
            batch = [class_ for class_ in due if left_of[class_] == batches_left]
            if not batch:
                while left_of[deck[start]] == 0:
                    start += 1
                batch.append(deck[start])
                start += 1
            self._fill(batch, left_of, deck, start)
            for class_ in batch:
                left_of[class_] -= 1
                by_groups_left.setdefault(left_of[class_], []).append(class_)
            table[row] = batch
        return table[generator.permutation(self._num_batches)]

    def _fill(self, batch: list[int], left: list[int], deck: list[int], start: int) -> None:
        """Add classes to a batch: the neighbours of its first, of its second, and so on."""
        taken = set(batch)
        position = 0
        while len(batch) < self._num_classes:
            if position < len(batch):
                near = self._near.get(batch[position], [])
                position += 1
            else:
                while left[deck[start]] == 0 or deck[start] in taken:
                    start += 1
                near = deck[start : start + 1]
            for class_ in near:
                if len(batch) < self._num_classes and left[class_] and class_ not in taken:
                    batch.append(class_)
                    taken.add(class_)
