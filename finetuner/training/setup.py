"""Put a trainer together: data loaders, callbacks and optimizers from their descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np

from finetuner.callback import BestModelCheckpoint, EarlyStopping, EvaluationCallback
from finetuner.data.checks import (
    build_evaluation_dataset,
    check_evaluation_data,
    check_findable,
)
from finetuner.data.content_cache import ContentSource, FreshContents, VaryFn
from finetuner.data.datasets import ClassDataset, InstanceDataset
from finetuner.data.labelled import LabelledDataset, PreprocessFn
from finetuner.data.loading import BatchLoader, CollateFn, OnBroken, build_loader, build_sampler
from finetuner.data.samplers import EpochSampler, SequentialSampler
from finetuner.evaluation import METRICS
from finetuner.excepts import ConfigError, DataError, unknown_name
from finetuner.training.callbacks import (
    BestWeights,
    EvaluationOptions,
    EvaluationSet,
    ReportExamples,
    ReportMetrics,
    RetrievalEvaluation,
    Stopping,
)
from finetuner.training.trainer import BaseCallback

DEFAULT_BATCH_SIZE = 128
CALLBACKS = {c.__name__: c for c in (EvaluationCallback, BestModelCheckpoint, EarlyStopping)}
Description = EvaluationCallback | BestModelCheckpoint | EarlyStopping


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
        contents: where loaders get the inputs from; by default they make them anew each time.
    """

    preprocess_fn: PreprocessFn | None
    collate_fn: CollateFn | None = None
    num_workers: int = 0
    seed: int = 0
    on_broken: OnBroken = 'stop'
    contents: ContentSource = field(default_factory=FreshContents)
    _loaders: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __enter__(self) -> Pipeline:
        """Nothing starts before the loaders are used."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers of every loader made here."""
        self._loaders.close()

    def loader(
        self,
        dataset: LabelledDataset[Any],
        sampler: EpochSampler,
        num_workers: int = 0,
        on_broken: OnBroken = 'stop',
        preprocess_fn: PreprocessFn | None = None,
        vary_fn: VaryFn | None = None,
    ) -> BatchLoader:
        """Batches of a dataset as a sampler draws them.

        Args:
            dataset: of any kind.
            sampler: which items stand together.
            num_workers: processes that preprocess.
            on_broken: `stop` or `skip`.
            preprocess_fn: instead of the pipeline's own.
            vary_fn: what is done to an input at each access.
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
        return self.loader(dataset, drawn, self.num_workers, self.on_broken, preprocess_fn, vary_fn)

    def evaluation_set(self, dataset: ClassDataset, batch_size: int, workers: int) -> EvaluationSet:
        """Documents in order, with the labels they came with."""
        sampler = SequentialSampler(len(dataset), batch_size)
        ids, names = [], []
        taken: set[str] = set()
        for index in range(len(dataset)):
            doc = dataset.document(index)
            ids.append(doc.id)
            name = document_name(doc, index)
            # results are kept by the names of the queries
            names.append(f'{name} (Document {index})' if name in taken else name)
            taken.add(names[-1])
        return EvaluationSet(
            loader=self.loader(dataset, sampler, workers),
            labels=[dataset.classes[label] for label in dataset.labels],
            ids=ids,
            names=names,
        )


def document_name(doc: Any, position: int) -> str:
    """What to call a Document in example results: its text, its address, or its place."""
    if doc.text:
        return doc.text[:80]
    return doc.uri or doc.tags.get('file') or f'Document {position} ({doc.id})'


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


def parse_callback(name: str, options: dict[str, Any], data: dict[str, Any]) -> Description:
    """Make a callback's description from its name and options.

    Args:
        name: class name in `finetuner.callback`.
        options: plain values.
        data: Documents that stand in for references among the options.

    Raises:
        ConfigError: the name or an option is unknown or out of range.
    """
    if name not in CALLBACKS:
        raise ConfigError(unknown_name('callback', name, CALLBACKS))
    class_ = CALLBACKS[name]
    known = {f.name for f in fields(class_)}
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f'option of callback {name}', option, known))
    try:
        return class_(**{**options, **data})
    except TypeError as error:
        raise ConfigError(f'callback {name}: {error}') from error


def prepare_callbacks(
    descriptions: Sequence[Description | BaseCallback], has_validation_data: bool
) -> list[Description | BaseCallback]:
    """Check what callbacks evaluate and monitor, before anything is trained.

    Args:
        descriptions: as the user gave them; a `BaseCallback` is left alone.
        has_validation_data: whether there is a validation loss to monitor.

    Returns:
        The same, with datasets in the place of evaluation data.

    Raises:
        ConfigError: one monitors what nothing measures, or two report under the same names.
        DataError: evaluation data lacks labels, or the index lacks a query's.
    """
    measured = {'train_loss'}
    if has_validation_data:
        measured.add('val_loss')
    captions = [d.caption for d in descriptions if isinstance(d, EvaluationCallback)]
    if len(set(captions)) < len(captions):
        raise ConfigError(
            'two EvaluationCallbacks would overwrite the metrics of each other: give each a '
            'caption of its own'
        )
    prepared: list[Description | BaseCallback] = []
    for description in descriptions:
        if isinstance(description, EvaluationCallback):
            measured |= set(METRICS)
            description = _prepare_evaluation(description)
        elif not isinstance(description, BaseCallback) and description.monitor not in measured:
            name = type(description).__name__
            hint = (
                'give eval_data or val_split'
                if description.monitor == 'val_loss'
                else 'put an EvaluationCallback before it'
            )
            raise ConfigError(
                f'{name} monitors {description.monitor!r}, which nothing measures: {hint}, or '
                f'monitor one of {", ".join(sorted(measured))}'
            )
        prepared.append(description)
    return prepared


def _prepare_evaluation(description: EvaluationCallback) -> EvaluationCallback:
    if description.model or description.index_model or description.multi_modal:
        raise ConfigError(
            'EvaluationCallback: model, index_model and multi_modal are for models with several '
            'towers; this one has a single model'
        )
    queries = _evaluation_dataset(description.query_data, 'query_data', 'give labelled Documents')
    if description.index_data is None:
        if description.exclude_self:
            check_findable(queries)
        return replace(description, query_data=queries)
    index = _evaluation_dataset(
        description.index_data,
        'index_data',
        'give labelled Documents, or leave it out to search among the queries',
    )
    check_evaluation_data(queries, index)
    return replace(description, query_data=queries, index_data=index)


def _evaluation_dataset(docs: Any, name: str, hint: str) -> Any:
    if isinstance(docs, str) or not isinstance(docs, Sequence) or not len(docs):
        raise DataError(f'{name} of the EvaluationCallback is empty: {hint}')
    return build_evaluation_dataset(docs, name)


def build_callbacks(
    descriptions: Sequence[Description | BaseCallback],
    caption: str,
    pipeline: Pipeline,
    report: ReportMetrics,
    report_examples: ReportExamples,
) -> list[BaseCallback]:
    """Set the described callbacks to work.

    Args:
        descriptions: as `prepare_callbacks` gives them; a `BaseCallback` is taken as it is.
        caption: put before the names of metrics in reports: the model's name.
        pipeline: how Documents become inputs.
        report: told metrics before and after training.
        report_examples: told example results before and after training.
    """
    built: list[BaseCallback] = []
    for description in descriptions:
        if isinstance(description, BaseCallback):
            built.append(description)
        elif isinstance(description, BestModelCheckpoint):
            built.append(BestWeights(description.monitor, description.mode))
        elif isinstance(description, EarlyStopping):
            built.append(
                Stopping(
                    description.monitor,
                    description.mode,
                    description.patience,
                    description.min_delta,
                    description.baseline,
                )
            )
        else:
            prefix = description.caption or caption
            evaluation = _build_evaluation(description, prefix, pipeline, report, report_examples)
            built.append(evaluation)
    return built


def _build_evaluation(
    description: EvaluationCallback,
    caption: str,
    pipeline: Pipeline,
    report: ReportMetrics,
    report_examples: ReportExamples,
) -> RetrievalEvaluation:
    # `prepare_callbacks` has put datasets there
    query_data: Any = description.query_data
    queries = sample(query_data, description.query_sample_size, pipeline.seed)
    # loader processes cost more than they save on what is decoded in a second
    workers = min(description.num_workers, pipeline.num_workers) if len(queries) > 5_000 else 0
    sets = [
        None if data is None else pipeline.evaluation_set(data, description.batch_size, workers)
        for data in (queries, cast('ClassDataset | None', description.index_data))
    ]
    options = EvaluationOptions(
        limit=description.limit,
        distance=description.distance,
        exclude_self=description.exclude_self,
        steps_per_interval=description.steps_per_interval,
        num_examples=description.num_example_queries if description.gather_examples else 0,
    )
    return RetrievalEvaluation(caption, sets[0], sets[1], options, report, report_examples)  # type: ignore[arg-type]


def sample(dataset: ClassDataset, size: int | None, seed: int) -> ClassDataset:
    """Draw so many Documents, in their order; all of them when size is None or more."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.subset(np.sort(np.random.default_rng(seed).choice(len(dataset), size, False)))
