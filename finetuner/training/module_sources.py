"""What a model of one's own is trained on: Documents that are held, or batches that are streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from docarray import Document

from finetuner.data.checks import check_training_data
from finetuner.data.datasets import ClassDataset
from finetuner.data.labelled import LabelledDataset
from finetuner.data.loading import BatchLoader, build_dataset
from finetuner.data.samplers import SequentialSampler
from finetuner.data.sharded_batches import ShardedBatches
from finetuner.excepts import ConfigError, DataError
from finetuner.training.losses import build_loss, learns_class_weights
from finetuner.training.ranks import Ranks
from finetuner.training.setup import BatchShape, Pipeline, resolve_batch

if TYPE_CHECKING:
    from finetuner.training.module_fit import ModuleFitOptions

DEFAULT_BATCH_SIZE = 256


class HeldSource:
    """Documents, of which batches are drawn.

    Attributes:
        dataset: of them.
        shape: of a batch.
        kind: of the data.
    """

    def __init__(self, docs: Sequence[Document], options: ModuleFitOptions, name: str) -> None:
        """Look at all of them.

        Raises:
            DataError: they cannot be trained on; `name` is what they are called.
        """
        self.dataset, self.shape = _build(docs, options, name)
        self.kind = self.dataset.kind

    def check_ranks(self, ranks: Ranks) -> None:
        """Held data is dealt to any number of processes."""

    def two(self, pipeline: Pipeline) -> Any:
        """Inputs of two items."""
        sampler = SequentialSampler(len(self.dataset), 2)
        loader = pipeline.loader(self.dataset, sampler, on_broken=pipeline.on_broken)
        return next(iter(loader))[0]

    def loader(self, pipeline: Pipeline) -> BatchLoader:
        """Batches, of each of which this process loads its part."""
        return pipeline.training_loader(self.dataset, self.shape)

    def loss(self, name: str, dimension: int) -> torch.nn.Module:
        """A loss by its name."""
        return build_loss(name, None, dimension, self.dataset.num_classes)

    def finish(self, loader: Any, ranks: Ranks) -> None:
        """Say what was left out."""
        loader.add_broken(ranks.collect(loader.broken))
        if ranks.is_first:
            loader.log_broken()


class StreamedSource:
    """Batches of shards, of which each process makes its own part of the batch that all train on.

    Attributes:
        dataset: None, as nothing is held.
        shape: of a batch.
        kind: of the data.
    """

    dataset = None

    def __init__(self, batches: ShardedBatches) -> None:
        """Read a Document or two.

        Raises:
            DataError: there are none, or they cannot be read.
        """
        self._batches = batches
        items, views = batches.num_items_per_class, batches.views_per_instance
        self.shape = BatchShape(batches.batch_size, items, views)
        try:
            self.kind, self._inputs = batches.first_inputs()
        except DataError as error:
            raise type(error)(f'train_data: {error}') from error

    def check_ranks(self, ranks: Ranks) -> None:
        """Refuse a stream of which the processes would not all make as many batches of their own.

        Raises:
            ConfigError: it is of other ranks, or does not say how many batches there are.
        """
        docs = self._batches.documents
        if (docs.rank, docs.num_ranks) != (ranks.rank, ranks.size):
            raise ConfigError(
                f'train_data streams the rows of rank {docs.rank} of {docs.num_ranks}, and this process '
                f'is {ranks.rank} of {ranks.size}: leave rank and num_ranks of ShardedDocuments out'
            )
        if ranks.size > 1 and self._batches.num_batches is None:
            raise ConfigError(
                f'train_data is streamed to {ranks.size} processes, which have to make as many steps '
                'each: give ShardedBatches num_batches, the batches of an epoch'
            )

    def two(self, pipeline: Pipeline) -> Any:
        """Inputs of two items or more."""
        return self._inputs

    def loader(self, pipeline: Pipeline) -> StreamLoader:
        """The batches of this process, from the epoch on at which the stream stands."""
        return StreamLoader(self._batches, pipeline.num_workers)

    def loss(self, name: str, dimension: int) -> torch.nn.Module:
        """A loss by its name.

        Raises:
            ConfigError: it needs to know how many classes there are.
        """
        num_classes = self._batches.num_classes
        if num_classes is None and learns_class_weights(name, None):
            raise ConfigError(
                f'loss {name} learns weights of classes, and a stream shows these only at its end: '
                'give ShardedBatches classes'
            )
        return build_loss(name, None, dimension, num_classes or 0)

    def finish(self, loader: Any, ranks: Ranks) -> None:
        """What was left out is in the log already."""


class StreamLoader:
    """Streamed batches with a length, which is 0 where it shows at the end of an epoch only."""

    def __init__(self, batches: ShardedBatches, num_workers: int) -> None:
        """Begin with the epoch at which the batches stand."""
        self._num_batches = batches.num_batches or 0
        self._loader = batches.loader(num_workers)

    def __len__(self) -> int:
        """Return the number of batches of an epoch, 0 where that is not known."""
        return self._num_batches

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of the next epoch."""
        return iter(self._loader)


def open_source(
    train_data: Sequence[Document] | ShardedBatches, options: ModuleFitOptions
) -> tuple[HeldSource | StreamedSource, ModuleFitOptions]:
    """Look at what is trained on.

    Returns:
        The source, and the options with what a stream says of them.

    Raises:
        ConfigError: an option is given that the stream has.
        DataError: it cannot be trained on.
    """
    if not isinstance(train_data, ShardedBatches):
        return HeldSource(train_data, options, 'train_data'), options
    unset = dict.fromkeys(('batch_size', 'preprocess_fn', 'collate_fn'))
    unset = {**unset, 'num_items_per_class': None, 'views_per_instance': 2}
    for name, default in unset.items():
        if getattr(options, name) != default:
            raise ConfigError(
                f'{name}={getattr(options, name)!r}: train_data is a ShardedBatches, which has its '
                'own: give it there, and leave it out here'
            )
    own = {name: getattr(train_data, name) for name in unset}
    return StreamedSource(train_data), replace(options, **own)


def _build(
    docs: Sequence[Document], options: ModuleFitOptions, name: str
) -> tuple[LabelledDataset[Any], BatchShape]:
    try:
        dataset = build_dataset(docs)
        asked = BatchShape(0, options.num_items_per_class, options.views_per_instance)
        shape = _filled(asked, options.batch_size, dataset)
        items, views = shape.num_items_per_class, shape.views_per_instance
        check_training_data(dataset, shape.size, items, views)
    except DataError as error:
        raise DataError(f'{name}: {error}') from error
    return dataset, shape


def _filled(shape: BatchShape, batch_size: int | None, dataset: LabelledDataset[Any]) -> BatchShape:
    """Divide the batch among all classes, but never so that nothing in it is similar."""
    if not isinstance(dataset, ClassDataset) or shape.num_items_per_class is not None:
        return resolve_batch(shape, batch_size, dataset, DEFAULT_BATCH_SIZE)
    size = batch_size or min(DEFAULT_BATCH_SIZE, len(dataset))
    items = size // len(dataset.classes)
    return replace(shape, size=size, num_items_per_class=items if items > 1 else None)
