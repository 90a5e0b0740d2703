"""Callbacks from their descriptions: checked before a run exists, set to work when it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np

from finetuner.callback import BestModelCheckpoint, EarlyStopping, EvaluationCallback
from finetuner.data.checks import (
    build_evaluation_dataset,
    check_evaluation_data,
    check_findable,
)
from finetuner.data.datasets import ClassDataset
from finetuner.evaluation import METRICS
from finetuner.excepts import ConfigError, DataError, unknown_name
from finetuner.training.callbacks import (
    BestWeights,
    EvaluationOptions,
    ReportExamples,
    ReportMetrics,
    RetrievalEvaluation,
    Stopping,
)
from finetuner.training.setup import Pipeline
from finetuner.training.trainer import BaseCallback

CALLBACKS = {c.__name__: c for c in (EvaluationCallback, BestModelCheckpoint, EarlyStopping)}
Description = EvaluationCallback | BestModelCheckpoint | EarlyStopping


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
