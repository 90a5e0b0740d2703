"""Batches of shards, streamed: what `torch.utils.data.DataLoader` takes in any number of processes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from docarray import Document
from torch.utils.data import IterableDataset, get_worker_info

from finetuner.data.balancing import TooFewClassesError, balanced_batches
from finetuner.data.contents import content_of, copy_document
from finetuner.data.documents import DataKind, kind_of
from finetuner.data.labelled import PreprocessFn
from finetuner.data.loaded_items import BROKEN, CollateFn, LoadingError, cause, collated
from finetuner.data.loading import cap_workers
from finetuner.data.randomness import drawing_from
from finetuner.data.samplers import whole_number
from finetuner.data.shards import ShardedDocuments, uniform
from finetuner.data.streamed_items import Labeller, Streamed, named_items, without_broken
from finetuner.excepts import ConfigError, DataError

if TYPE_CHECKING:
    from finetuner.data.shard_loader import ShardLoader

_LOGGER = logging.getLogger(__name__)
# numbers of epochs are below it; those above are of rows that come again within one
_AGAIN = 1 << 32
_NUM_LOGGED = 20


class Place(NamedTuple):
    """How far a reader came in an epoch.

    Attributes:
        again: how often its rows had come before, where they come again for `num_batches`.
        num_made: batches that were put together of them this time.
        num_given: batches that were given, in all of the epoch: of others nothing could be loaded.
    """

    again: int = 0
    num_made: int = 0
    num_given: int = 0


class ShardedBatches(IterableDataset[Any]):
    """Batches of the rows of one rank, as `(inputs, labels)`; each iteration is the next epoch.

    In processes of a `DataLoader(batches, batch_size=None, num_workers=...)` each of these takes its
    share of the rank's shards. It gets a copy as the batches stand then: set `epoch` before each
    iteration, as with any sampler, or take `loader`, which does, and whose place can be kept.

    Attributes:
        epoch: number of the epoch that the next iteration yields, from 0; setting it goes on with the
            beginning of that epoch.
        documents: whose Documents they are.
        num_classes: how many `classes` were given, None for none.
        batch_size, preprocess_fn, collate_fn, num_items_per_class, num_batches, views_per_instance: as
            they were given.
    """

    def __init__(
        self,
        documents: ShardedDocuments,
        batch_size: int,
        preprocess_fn: PreprocessFn | None = None,
        collate_fn: CollateFn | None = None,
        num_items_per_class: int | None = None,
        drop_last: bool = False,
        num_batches: int | None = None,
        classes: Sequence[int | str] | None = None,
        views_per_instance: int = 2,
        on_broken: Literal['stop', 'skip'] = 'stop',
    ) -> None:
        """Take what batches are made of; nothing is read yet.

        Args:
            documents: rows of this rank.
            batch_size: items in a batch: Documents, views, roots and matches, or chunks.
            preprocess_fn: takes a Document, returns one input; None gives its content.
            collate_fn: makes a batch of a list of inputs; None stacks them.
            num_items_per_class: of class data: batches hold so many Documents of each of
                `batch_size // num_items_per_class` classes, drawn from the rows in the buffer
                (`shuffle_buffer` of them); see `finetuner.data.balancing.balanced_batches`. None for
                rows as they come.
            drop_last: leave the last batch of an epoch out where it is short.
            num_batches: of every epoch, where ranks have to make the same number of steps: the rank's
                rows as far as they go and, where they are over, from the beginning again. None for
                each row once.
            classes: of class data, the labels there are: labels of a batch are places in this list.
            views_per_instance: of unlabelled data, how often each Document stands in a batch.
            on_broken: `'stop'` at a Document of which `preprocess_fn` says that it is broken
                (`DataError`, `OSError`), or `'skip'` it, and make its batch smaller.

        Raises:
            ValueError: a number is out of range.
            ConfigError: arguments do not go together.
        """
        self.documents = documents
        self.batch_size = whole_number('batch_size', batch_size)
        self.num_batches = num_batches and whole_number('num_batches', num_batches)
        self.preprocess_fn, self.collate_fn = preprocess_fn, collate_fn
        self.views_per_instance = whole_number('views_per_instance', views_per_instance)
        self._labeller = Labeller(classes, self.views_per_instance)
        self._drop_last = drop_last
        if on_broken not in ('stop', 'skip'):
            raise ConfigError(f'on_broken={on_broken!r} is not stop or skip')
        self._skips = on_broken == 'skip'
        self.num_classes = None if classes is None else len(classes)
        self.num_items_per_class: int | None = None
        if num_items_per_class is not None:
            self.num_items_per_class = whole_number('num_items_per_class', num_items_per_class)
            if self.num_items_per_class > self.batch_size:
                raise ConfigError(
                    f'num_items_per_class={num_items_per_class} is more than batch_size={batch_size}'
                )
            if documents.shuffle_buffer < self.batch_size:
                raise ConfigError(
                    f'shuffle_buffer={documents.shuffle_buffer} holds less than a batch of '
                    f'{batch_size}, and classes are drawn from it: make it larger'
                )
        self._num_broken = 0
        self._epoch = 0
        self._place = Place()

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next iteration yields."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch, self._place = whole_number('epoch', epoch, 0), Place()

    def __len__(self) -> int:
        """Return the number of batches of an epoch.

        Raises:
            TypeError: it shows only at the end of one.
        """
        if self.num_batches is None:
            raise TypeError('how many batches these are shows at their end: give num_batches')
        return self.num_batches

    def state_dict(self) -> dict[str, Any]:
        """The epoch and how far it was read in this process, as plain values."""
        return {'epoch': self._epoch, 'place': list(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, at the next iteration, from where another object of the same arguments was."""
        self._epoch, self._place = state['epoch'], Place(*state['place'])

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield the batches of an epoch, or those of it that are left.

        Raises:
            LoadingError: a Document cannot be preprocessed; shard and row are named.
            DataError: a shard cannot be read, a row is none, or the rows are of too few classes.
        """
        worker = get_worker_info()
        share = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch = self._epoch
        for place, batch in self.read_epoch(epoch, *share, self._place):
            self._epoch, self._place = epoch, place
            yield batch
        self._epoch, self._place = epoch + 1, Place()

    def loader(self, num_workers: int = 0, pin_memory: bool = False) -> ShardLoader:
        """Make a loader that knows its place, whatever the number of processes.

        Args:
            num_workers: processes that read and preprocess, at most the cores there are; 0 for none.
            pin_memory: copy batches to page-locked memory, from where CUDA takes them faster.
        """
        from finetuner.data.shard_loader import ShardLoader

        return ShardLoader(self, cap_workers(num_workers), pin_memory)

    def first_inputs(self) -> tuple[DataKind, Any]:
        """Read a Document or two past the buffer, to see of what kind they are and what is made of them.

        Returns:
            The kind of the data, and a batch of inputs of at least one Document.

        Raises:
            LoadingError: a Document cannot be preprocessed; shard and row are named.
            DataError: a shard cannot be read, or there is no row to be had.
        """
        kind: DataKind | None = None
        batch: list[Streamed] = []
        for where, doc in self.documents.read_epoch(self._epoch, buffer=1):
            batch.append(self._labeller.streamed(where, doc, 0, kind))
            kind = batch[0].kind
            if sum(len(each.items) for each in batch) > 1:
                with drawing_from(self._key(_Rows(self._epoch, 0, 1))):
                    loaded = self._loaded(batch)
                if loaded is not None:
                    return kind, loaded[0]
                batch = []
        docs = self.documents
        raise DataError(
            f'rank {docs.rank} of {docs.num_ranks} has not two items that can be loaded: give more '
            'shards, or train in fewer processes'
        )

    def read_epoch(
        self, epoch: int, reader: int, num_readers: int, place: Place
    ) -> Iterator[tuple[Place, tuple[Any, torch.Tensor]]]:
        """Read the batches of an epoch that one of several readers makes, from a place on.

        Args:
            epoch: which.
            reader: which of the readers, from 0.
            num_readers: among which the rank's shards are dealt.
            place: after which to begin.

        Yields:
            The place after a batch, and the batch.
        """
        most = None
        if self.num_batches is not None:
            most = self.num_batches // num_readers + (reader < self.num_batches % num_readers)
        again, first, num_given = place
        while num_given != most:
            number, num_before = first, num_given
            rows = _Rows(epoch + again * _AGAIN, reader, num_readers)
            for number, batch in enumerate(self._composed(rows, first), first + 1):
                with drawing_from((*self._key(rows), number)):
                    loaded = self._loaded(batch)
                if loaded is not None:
                    num_given += 1
                    yield Place(again, number, num_given), loaded
                if num_given == most:
                    return
            if most is None:
                return
            if not first and num_given == num_before:
                raise DataError(
                    f'rank {self.documents.rank} of {self.documents.num_ranks}, process {reader} of '
                    f'{num_readers}: its rows give no batch, and num_batches={self.num_batches} are '
                    'asked for: have more shards, or fewer processes'
                )
            again, first = again + 1, 0

    def _key(self, rows: _Rows) -> tuple[int, ...]:
        """What is drawn for a reader in an epoch is drawn from it."""
        return self.documents.seed, rows.epoch, self.documents.rank + 1, rows.reader + 1, 1

    def _composed(self, rows: _Rows, num_skipped: int) -> Iterator[list[Streamed]]:
        """The batches of all of a reader's rows, but for the first ones."""
        docs = self.documents
        first = next(docs.read_epoch(*rows, buffer=1), None)
        if first is None:
            return
        kind = kind_of(first[1])
        if self.num_items_per_class is not None and kind != 'class':
            raise ConfigError(
                f'num_items_per_class={self.num_items_per_class} is for class data, and this is of kind '
                f'{kind}: leave it out'
            )
        per_document = self._labeller.items_per_document(kind)
        num_taken = 0
        # rows are drawn where they wait for their class
        buffer = None if self.num_items_per_class is None else 1
        if self.num_items_per_class is None and per_document is not None:
            num_taken = num_skipped * (self.batch_size // per_document)
            num_skipped = 0
        step, start = docs.num_ranks * rows.num_readers, docs.rank * rows.num_readers + rows.reader
        streamed = (
            self._labeller.streamed(where, doc, start + number * step, kind)
            for number, (where, doc) in enumerate(
                docs.read_epoch(*rows, num_taken, buffer), num_taken
            )
        )
        batches = self._in_turn(streamed, self.batch_size % (per_document or self.batch_size))
        if self.num_items_per_class is not None:
            batches = self._balanced(streamed, self.num_items_per_class, uniform(self._key(rows)))
        yield from itertools.islice(batches, num_skipped, None)

    def _in_turn(self, streamed: Iterator[Streamed], num_free: int) -> Iterator[list[Streamed]]:
        """Rows as they come, as many as fit; `num_free` is what a full batch leaves free."""
        batch: list[Streamed] = []
        size = 0
        for each in streamed:
            num_items = len(each.items)
            if num_items > self.batch_size:
                raise DataError(
                    f'{each.where}: it is {num_items} items, and a batch has {self.batch_size}: '
                    'make batch_size larger'
                )
            if size + num_items > self.batch_size:
                yield batch
                batch, size = [], 0
            batch.append(each)
            size += num_items
        if batch and not (self._drop_last and size + num_free < self.batch_size):
            yield batch

    def _balanced(
        self, streamed: Iterator[Streamed], num_items: int, draw: Callable[[], float]
    ) -> Iterator[list[Streamed]]:
        num_classes, size = self.batch_size // num_items, self.documents.shuffle_buffer
        labelled = ((each.items[0][1], each) for each in streamed)
        num_batches = 0
        drawn = balanced_batches(labelled, num_classes, num_items, size, draw)
        try:
            while True:
                yield next(drawn)
                num_batches += 1
        except TooFewClassesError as error:
            found = f'{size} rows hold {error.num_classes} classes'
        except StopIteration as end:
            if num_batches:
                return
            found = f'all {end.value} rows of this process hold fewer classes'
        raise DataError(
            f'{found}, and a batch takes {num_classes}: make shuffle_buffer larger, batch_size smaller, '
            'or shuffle rows before they are written into shards'
        )

    def _loaded(self, batch: list[Streamed]) -> tuple[Any, torch.Tensor] | None:
        """Inputs and labels; None where broken Documents leave nothing to learn from."""
        names: list[str] = []
        contents: list[Any] = []
        labels: list[Any] = []
        num_items = 0
        for each in batch:
            loaded = [self._content(where, doc) for where, doc, _ in named_items(each)]
            num_items += len(loaded)
            broken = {place for place, content in enumerate(loaded) if isinstance(content, _Broken)}
            items = list(named_items(each))
            for place in without_broken(each, broken):
                names.append(items[place][0])
                contents.append(loaded[place])
                labels.append(items[place][2])
        if len(labels) < min(2, num_items):
            return None
        inputs = collated(contents, names, self.collate_fn)
        kind = np.float32 if batch[0].kind == 'scored_pair' else np.int64
        return inputs, torch.from_numpy(np.array(labels, dtype=kind))

    def _content(self, where: str, doc: Document) -> Any:
        if self.preprocess_fn is None:
            return content_of(doc)
        try:
            return self.preprocess_fn(copy_document(doc))
        except Exception as error:
            # whatever the user's own code raises
            reason = f'{where} cannot be preprocessed: {cause(error)}'
            if not self._skips or not isinstance(error, BROKEN):
                raise LoadingError(reason) from error
            self._num_broken += 1
            if self._num_broken <= _NUM_LOGGED:
                _LOGGER.warning('Left out: %s', reason)
            return _Broken()


class _Rows(NamedTuple):
    """Whose rows, of which epoch."""

    epoch: int
    reader: int
    num_readers: int


class _Broken:
    """Stands for the content of an item that could not be loaded."""
