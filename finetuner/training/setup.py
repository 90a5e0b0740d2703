"""Put a trainer together: data loaders, callbacks and optimizers from their descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from docarray import DocumentArray

from finetuner.callback import BestModelCheckpoint, EarlyStopping, EvaluationCallback
from finetuner.data.contents import positions_text, read_label
from finetuner.data.datasets import ClassDataset, PreprocessFn
from finetuner.data.documents import check_evaluation_data
from finetuner.data.loading import CollateFn, build_loader, build_sampler
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


@dataclass
class Pipeline:
    """How a Document becomes the model's input; its loaders end with its `with` block.

    Attributes:
        preprocess_fn: takes a Document and returns one input.
        collate_fn: makes a batch of a list of inputs; None stacks them.
        num_workers: loader processes.
        seed: of the workers' random numbers.
    """

    preprocess_fn: PreprocessFn | None
    collate_fn: CollateFn | None = None
    num_workers: int = 0
    seed: int = 0
    _loaders: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __enter__(self) -> Pipeline:
        """Nothing starts before the loaders are used."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers of every loader made here."""
        self._loaders.close()

    def _loader(self, dataset: ClassDataset, sampler: EpochSampler, num_workers: int) -> Any:
        loader = build_loader(dataset, sampler, self.collate_fn, num_workers, self.seed)
        self._loaders.callback(loader.close)
        return loader

    def training_loader(
        self,
        docs: DocumentArray,
        batch_size: int,
        num_items_per_class: int | None,
        sampler: Any,
        preprocess_fn: PreprocessFn | None = None,
    ) -> Any:
        """Batches of labelled Documents, drawn anew each epoch.

        Args:
            docs: class data.
            batch_size: Documents in a batch.
            num_items_per_class: of each class in a batch; None divides the batch among all.
            sampler: `class`, `random` or `auto`.
            preprocess_fn: instead of the pipeline's own.
        """
        dataset = ClassDataset(docs, preprocess_fn or self.preprocess_fn)
        drawn = build_sampler(dataset, batch_size, sampler, num_items_per_class, self.seed)
        return self._loader(dataset, drawn, self.num_workers)

    def evaluation_set(self, docs: DocumentArray, batch_size: int, workers: int) -> EvaluationSet:
        """Documents in order, with the labels they came with."""
        dataset = ClassDataset(docs, self.preprocess_fn)
        sampler = SequentialSampler(len(dataset), batch_size)
        return EvaluationSet(
            loader=self._loader(dataset, sampler, workers),
            labels=[dataset.classes[label] for label in dataset.labels],
            ids=[doc.id for doc in docs],
            names=[document_name(doc, position) for position, doc in enumerate(docs)],
        )


def document_name(doc: Any, position: int) -> str:
    """What to call a Document in example results: its text, its address, or its place."""
    if doc.text:
        return doc.text[:80]
    return doc.uri or doc.tags.get('file') or f'Document {position} ({doc.id})'


def resolve_batch_size(
    batch_size: int | None, num_items_per_class: int, docs: Sequence[Any]
) -> int:
    """The batch size asked for or, when none was, up to 128 as far as classes and items allow."""
    if batch_size is not None:
        return batch_size
    num_classes = len({read_label(doc, position) for position, doc in enumerate(docs)})
    classes = min(
        DEFAULT_BATCH_SIZE // num_items_per_class, num_classes, len(docs) // num_items_per_class
    )
    return max(2, classes * num_items_per_class)


def evaluation_batch(
    docs: Sequence[Any], batch_size: int, num_items_per_class: int
) -> tuple[int, int]:
    """Documents in a batch and of each class, as near to those of training as these allow."""
    num_classes = len({read_label(doc, position) for position, doc in enumerate(docs)})
    items = max(1, min(num_items_per_class, len(docs) // num_classes))
    return min(batch_size, resolve_batch_size(None, items, docs)), items


def parse_callback(
    name: str, options: dict[str, Any], data: dict[str, DocumentArray | None]
) -> Description:
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


def check_callbacks(descriptions: Sequence[Description], has_validation_data: bool) -> None:
    """Check what callbacks evaluate and monitor, before anything is trained.

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
    for description in descriptions:
        if isinstance(description, EvaluationCallback):
            measured |= set(METRICS)
            _check_evaluation(description)
        elif description.monitor not in measured:
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


def _check_evaluation(description: EvaluationCallback) -> None:
    queries, index = description.query_data, description.index_data
    if description.model or description.index_model or description.multi_modal:
        raise ConfigError(
            'EvaluationCallback: model, index_model and multi_modal are for models with several '
            'towers; this one has a single model'
        )
    if not isinstance(queries, DocumentArray) or not len(queries):
        raise DataError('query_data of the EvaluationCallback is empty: give labelled Documents')
    if index is not None and not len(index):
        raise DataError(
            'index_data of the EvaluationCallback is empty: give labelled Documents, or leave it '
            'out to search among the queries'
        )
    check_evaluation_data(queries, queries if index is None else index)
    if index is None and description.exclude_self:
        counts: dict[Any, list[int]] = {}
        for position, doc in enumerate(queries):
            counts.setdefault(read_label(doc, position), []).append(position)
        alone = sorted(where[0] for where in counts.values() if len(where) == 1)
        if alone:
            raise DataError(
                f'query_data: {positions_text(alone)} can find nothing but themselves: without '
                'index_data every label needs at least two Documents'
            )


def build_callbacks(
    descriptions: Sequence[Description | BaseCallback],
    caption: str,
    pipeline: Pipeline,
    report: ReportMetrics,
    report_examples: ReportExamples,
) -> list[BaseCallback]:
    """Set the described callbacks to work.

    Args:
        descriptions: checked; a `BaseCallback` of the user's own is taken as it is.
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
    queries = sample(description.query_data, description.query_sample_size, pipeline.seed)
    # loader processes cost more than they save on what is decoded in a second
    workers = min(description.num_workers, pipeline.num_workers) if len(queries) > 5_000 else 0
    sets = [
        None if docs is None else pipeline.evaluation_set(docs, description.batch_size, workers)
        for docs in (queries, description.index_data)
    ]
    options = EvaluationOptions(
        limit=description.limit,
        distance=description.distance,
        exclude_self=description.exclude_self,
        steps_per_interval=description.steps_per_interval,
        num_examples=description.num_example_queries if description.gather_examples else 0,
    )
    return RetrievalEvaluation(caption, sets[0], sets[1], options, report, report_examples)  # type: ignore[arg-type]


def sample(docs: Any, size: int | None, seed: int) -> DocumentArray:
    """Draw so many Documents, in their order; all of them when size is None or more."""
    if size is None or size >= len(docs):
        return docs
    drawn = np.sort(np.random.default_rng(seed).choice(len(docs), size, replace=False))
    return DocumentArray(docs[int(position)] for position in drawn)
