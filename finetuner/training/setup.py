"""Put a trainer together: batches and data loaders from their descriptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from docarray import Document

from finetuner.data.content_cache import ContentSource, FreshContents, VaryFn
from finetuner.data.datasets import ClassDataset, InstanceDataset
from finetuner.data.labelled import LabelledDataset, PreprocessFn
from finetuner.data.loading import BatchLoader, CollateFn, OnBroken, build_loader, build_sampler
from finetuner.data.names import document_names
from finetuner.data.numbering import Part
from finetuner.data.samplers import EpochSampler, SequentialSampler
from finetuner.training.callbacks import EvaluationSet
from finetuner.training.ranks import ALONE, Ranks

DEFAULT_BATCH_SIZE = 128


@dataclass(frozen=True)
class BatchShape:
    """How items stand together in a batch.

    Attributes:
        size: items in a batch.
        num_items_per_class: of class data, items of each class; None divides the batch among all.
        views_per_instance: of unlabelled data, views of each Document.
        sampler: `auto`, or of class data `class` or `random`.
    """

    size: int
    num_items_per_class: int | None = None
    views_per_instance: int = 2
    sampler: Any = 'auto'


@dataclass
class Pipeline:
    """How a Document becomes the model's input; its loaders end with its `with` block.

    Attributes:
        preprocess_fn: takes a Document and returns one input.
        collate_fn: makes a batch of a list of inputs; None stacks them.
        num_workers: loader processes.
        seed: of the workers' random numbers.
        on_broken: what training does with Documents that cannot be loaded: `stop` or `skip`.
        tower_reads: of a model of several towers, how each takes a Document.
        contents: where loaders get the inputs from; by default they make them anew each time.
        ranks: the processes of the training, which share its batches.
    """

    preprocess_fn: PreprocessFn | None
    collate_fn: CollateFn | None = None
    num_workers: int = 0
    seed: int = 0
    on_broken: OnBroken = 'stop'
    tower_reads: Mapping[str, PreprocessFn] = field(default_factory=dict)
    contents: ContentSource = field(default_factory=FreshContents)
    ranks: Ranks = ALONE
    _loaders: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __enter__(self) -> Pipeline:
        """Nothing starts before the loaders are used."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers of every loader made here."""
        self._loaders.close()

    def call_at_end(self, close: Callable[[], None]) -> None:
        """Call something where the `with` block ends, in whatever way."""
        self._loaders.callback(close)

    def loader(
        self,
        dataset: LabelledDataset[Any],
        sampler: EpochSampler,
        num_workers: int = 0,
        on_broken: OnBroken = 'stop',
        preprocess_fn: PreprocessFn | None = None,
        vary_fn: VaryFn | None = None,
        part: Part | None = None,
    ) -> BatchLoader:
        """Batches of a dataset as a sampler draws them.

        Args:
            dataset: of any kind.
            sampler: which items stand together.
            num_workers: processes that preprocess.
            on_broken: `stop` or `skip`.
            preprocess_fn: instead of the pipeline's own.
            vary_fn: what is done to an input at each access.
            part: what of them this process loads; None for all.
        """
        fn = preprocess_fn or self.preprocess_fn
        dataset = self.contents.prepared(dataset, fn, vary_fn)
        loader = build_loader(
            dataset,
            sampler,
            self.collate_fn,
            num_workers,
            self.seed,
            on_broken=on_broken,
            part=part,
        )
        self._loaders.callback(loader.close)
        return loader

    def training_loader(
        self,
        dataset: LabelledDataset[Any],
        shape: BatchShape,
        preprocess_fn: PreprocessFn | None = None,
        vary_fn: VaryFn | None = None,
    ) -> BatchLoader:
        """Batches of labelled items, drawn anew each epoch.

        Args:
            dataset: of any kind.
            shape: of the batches.
            preprocess_fn: instead of the pipeline's own.
            vary_fn: what is done to an input at each access, such as augmentation.
        """
        drawn = build_sampler(
            dataset,
            shape.size,
            shape.sampler,
            shape.num_items_per_class,
            self.seed,
            shape.views_per_instance,
        )
        return self.shared_loader(dataset, drawn, preprocess_fn, vary_fn)

    def shared_loader(
        self,
        dataset: LabelledDataset[Any],
        sampler: EpochSampler,
        preprocess_fn: PreprocessFn | None = None,
        vary_fn: VaryFn | None = None,
    ) -> BatchLoader:
        """Batches to train on, of each of which every process of the training loads its part.

        Args:
            dataset: of any kind.
            sampler: which items stand together, the same in all processes.
            preprocess_fn: instead of the pipeline's own.
            vary_fn: what is done to an input at each access.
        """
        # of sessions, which are of any length, each item is one of its own
        part = self.ranks.part(max(1, dataset.items_per_document))
        workers, on_broken = self.num_workers, self.on_broken
        return self.loader(dataset, sampler, workers, on_broken, preprocess_fn, vary_fn, part)

    def evaluation_set(
        self,
        dataset: ClassDataset,
        batch_size: int,
        workers: int,
        preprocess_fn: PreprocessFn | None = None,
    ) -> EvaluationSet:
        """Documents in order, with the labels they came with.

        Args:
            dataset: of queries, or of the index.
            batch_size: embedded at a time.
            workers: loader processes.
            preprocess_fn: instead of the pipeline's own.
        """
        sampler = SequentialSampler(len(dataset), batch_size)
        ids: list[str] = []

        def documents() -> Iterator[Document]:
            for index in range(len(dataset)):
                doc = dataset.document(index)
                ids.append(doc.id)
                yield doc

        names = document_names(documents())
        return EvaluationSet(
            loader=self.loader(
                dataset,
                sampler,
                workers,
                preprocess_fn=preprocess_fn,
                part=self.ranks.part(whole_batches=True),
            ),
            labels=[dataset.classes[label] for label in dataset.labels],
            ids=ids,
            names=names,
        )


def resolve_batch(
    shape: BatchShape,
    batch_size: int | None,
    dataset: LabelledDataset[Any],
    default: int = DEFAULT_BATCH_SIZE,
) -> BatchShape:
    """The shape with the batch size asked for or, when none was, the default as the data allows.

    Args:
        shape: whose size is not looked at.
        batch_size: asked for.
        dataset: of any kind.
        default: items in a batch at most, when none are asked for.
    """
    if batch_size is not None:
        return replace(shape, size=batch_size)
    if isinstance(dataset, ClassDataset):
        items = shape.num_items_per_class or 1
        classes = min(default // items, len(dataset.classes), len(dataset) // items)
        return replace(shape, size=max(2, classes * items))
    if isinstance(dataset, InstanceDataset):
        views = shape.views_per_instance
        return replace(shape, size=min(default // views, len(dataset)) * views)
    return replace(shape, size=min(default, len(dataset)))


def validation_batch(shape: BatchShape, dataset: Any) -> BatchShape:
    """A shape for validation data, as near to that of training as this data allows.

    Args:
        shape: of training.
        dataset: the validation data, of the same kind.
    """
    if isinstance(dataset, ClassDataset) and shape.num_items_per_class is not None:
        items = len(dataset) // len(dataset.classes)
        shape = replace(shape, num_items_per_class=max(1, min(shape.num_items_per_class, items)))
    return replace(shape, size=min(shape.size, resolve_batch(shape, None, dataset).size))
