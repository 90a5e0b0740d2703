"""Batches with the same number of items of each class, out of as many rows as memory holds."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar('Item')


def balanced_batches(
    rows: Iterable[tuple[int, Item]],
    num_classes: int,
    num_items: int,
    size: int,
    draw: Callable[[], float],
) -> Generator[list[Item], None, int]:
    """Draw batches of as many items of each of so many different classes.

    Rows wait until there are `size` of them. Then a batch is drawn, of classes of which enough wait:
    the more wait, the likelier. Where too few classes have enough, those with most are taken, and
    what is missing is made up from the same class. At the end, too, all are taken that can be; what
    remains of fewer classes than stand in a batch is dropped.

    Args:
        rows: class and item.
        num_classes: in a batch.
        num_items: of each of them.
        size: rows that wait at most; at least those of a batch.
        draw: gives numbers from 0 to 1.

    Yields:
        Items, those of a class beside each other.

    Returns:
        How many rows were dropped at the end.

    Raises:
        TooFewClassesError: `size` rows wait, of fewer classes than stand in a batch.
    """
    waiting: dict[int, list[Item]] = {}
    num_waiting = 0

    def batch(is_last: bool) -> list[Item]:
        nonlocal num_waiting
        items: list[Item] = []
        for label in _classes(waiting, num_classes, num_items, draw, is_last):
            own = waiting[label]
            group = [_taken(own, draw) for _ in range(min(num_items, len(own)))]
            num_waiting -= len(group)
            if not own:
                del waiting[label]
            # a class that is short comes again, evenly
            items += (group * -(-num_items // len(group)))[:num_items]
        return items

    for label, item in rows:
        waiting.setdefault(label, []).append(item)
        num_waiting += 1
        if num_waiting >= size:
            if len(waiting) < num_classes:
                raise TooFewClassesError(len(waiting))
            yield batch(is_last=False)
    while len(waiting) >= num_classes:
        yield batch(is_last=True)
    return num_waiting


class TooFewClassesError(Exception):
    """The rows that wait are of fewer classes than a batch takes.

    Attributes:
        num_classes: of how many they are.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.num_classes = num_classes


def _classes(
    waiting: dict[int, list[Item]],
    num_classes: int,
    num_items: int,
    draw: Callable[[], float],
    is_last: bool,
) -> list[int]:
    ready = [label for label, items in waiting.items() if len(items) >= num_items]
    if len(ready) >= num_classes and not is_last:
        # as if each group of a class were a ticket: Efraimidis and Spirakis' draw without putting back
        keys = ((draw() ** (num_items / len(waiting[label])), label) for label in ready)
        return [label for _, label in heapq.nlargest(num_classes, keys)]
    # those with most groups first: then the most batches can be filled
    sizes = ((-(-len(items) // num_items), draw(), label) for label, items in waiting.items())
    chosen = [label for *_, label in heapq.nlargest(num_classes, sizes)]
    return [_taken(chosen, draw) for _ in range(num_classes)]


def _taken(items: list[Item], draw: Callable[[], float]) -> Item:
    """Take one item out, whichever."""
    place = int(draw() * len(items))
    items[place], items[-1] = items[-1], items[place]
    return items.pop()
