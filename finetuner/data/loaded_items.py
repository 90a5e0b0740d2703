"""Batches as they are loaded: contents made into input, and what cannot be loaded told by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from finetuner.data.collation import TextCollate, pad_contents, stack_contents
from finetuner.data.labelled import LabelledDataset
from finetuner.data.numbering import NumberedBatch
from finetuner.data.randomness import drawing_from
from finetuner.excepts import DataError

CollateFn = Callable[[list[Any]], Any]

# what a broken file leads to; anything else is a mistake in preprocess_fn, and stops the run
BROKEN = (DataError, OSError)
# one item alone teaches nothing
_LEAST_ITEMS = 2


class LoadingError(DataError):
    """A Document could not be made into model input; the message names it and the cause.

    torch hands an exception of a worker process on as a new one of the same class, with a whole
    traceback for its message. This class takes its own message out of that again.

    Attributes:
        worker_traceback: what torch made of it; empty when no worker was involved.
    """

    def __init__(self, message: str) -> None:
        marker = f'{type(self).__module__}.{type(self).__qualname__}: '
        before, found, own = message.rpartition(marker)
        super().__init__(own.strip() if found else message)
        self.worker_traceback = before if found else ''


class LoadedBatches:
    """A dataset that torch asks for whole batches, whichever process it does that in."""

    def __init__(self, items: NamedItems, collate: LabelledCollate) -> None:
        self._items = items
        self._collate = collate

    def __getitems__(self, batch: NumberedBatch) -> tuple[Any, ...]:
        with drawing_from(batch.key):
            return self._collate([self._items[index] for index in batch])


class BrokenItem:
    """Stands for the content of an item that could not be loaded."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class NamedItems:
    """The dataset's items with their index, and failures that say which Document failed."""

    def __init__(self, dataset: LabelledDataset[Any], skips: bool) -> None:
        self._dataset = dataset
        self._skips = skips

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self._dataset[index][0]
        except Exception as error:
            # Whatever a user's preprocess_fn raises, and from wherever.
            name = self._dataset.position_of(index)
            reason = f'{name} cannot be preprocessed: {cause(error)}'
            if isinstance(error, LoadingError):
                # said before, where the item was read for all epochs
                reason = str(error)
            if self._skips and isinstance(error, BROKEN):
                return index, BrokenItem(reason)
            raise LoadingError(reason) from error


class LabelledCollate:
    """Stacks contents with the collate_fn and takes their labels from the dataset's array."""

    def __init__(
        self, dataset: LabelledDataset[Any], collate_fn: CollateFn | None, in_parts: bool = False
    ) -> None:
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._in_parts = in_parts

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[Any, ...]:
        """Return inputs and labels, and what was left out where something was.

        A batch of which nothing can be used has neither; a part of a batch has labels then, of no
        items, since the other parts are used all the same.
        """
        indices, contents = [index for index, _ in items], [content for _, content in items]
        broken = {i: c.reason for i, c in items if isinstance(c, BrokenItem)}
        reasons = {self._dataset.position_of(i): reason for i, reason in broken.items()}
        if broken:
            places = self._dataset.usable(indices, broken)
            if len(places) < _LEAST_ITEMS and not self._in_parts:
                return None, None, reasons
            indices, contents = [indices[p] for p in places], [contents[p] for p in places]
        values = self._dataset.label_values[np.asarray(indices, dtype=np.int64)]
        # Losses compare and index with labels, which torch does with 64 bits.
        labels = torch.from_numpy(values if values.dtype.kind == 'f' else values.astype(np.int64))
        names = [self._dataset.position_of(index) for index in indices]
        inputs = collated(contents, names, self._collate_fn) if indices else None
        return (inputs, labels, reasons) if broken else (inputs, labels)


def collated(contents: list[Any], names: list[str], collate_fn: CollateFn | None) -> Any:
    """Make a batch of contents, with errors that name what is in it.

    Args:
        contents: one each.
        names: what to call them in messages.
        collate_fn: None for `stack_contents`.

    Raises:
        LoadingError: they cannot be put together.
    """
    collate: Any = collate_fn or stack_contents
    if collate in (stack_contents, pad_contents) or isinstance(collate, TextCollate):
        # our own name the Document themselves
        try:
            return collate(contents, names)
        except DataError as error:
            raise LoadingError(str(error)) from error
    try:
        return collate(contents)
    except Exception as error:
        shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
        raise LoadingError(
            f'collate_fn failed on a batch of {len(names)} ({shown}): {cause(error)}'
        ) from error


def cause(error: Exception) -> str:
    """Say what went wrong in code that may be anybody's."""
    return str(error) if isinstance(error, DataError) else f'{type(error).__name__}: {error}'
