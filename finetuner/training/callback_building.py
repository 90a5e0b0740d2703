"""Callbacks set to work from their descriptions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from finetuner.callback import (
    BestModelCheckpoint,
    CallbackDescription,
    EarlyStopping,
    EvaluationCallback,
    TensorBoardLogger,
    TrainingCheckpoint,
    WandBLogger,
    WiSEFTCallback,
)
from finetuner.config import Settings
from finetuner.data.datasets import ClassDataset
from finetuner.data.labelled import LabelledDataset
from finetuner.training.callbacks import (
    BestWeights,
    EvaluationOptions,
    ReportExamples,
    ReportMetrics,
    RetrievalEvaluation,
    Stopping,
)
from finetuner.training.epoch_artifacts import EpochArtifacts, EpochStore
from finetuner.training.loggers import ScalarLogger, TensorBoardScalars, WandBScalars
from finetuner.training.projection import Projection
from finetuner.training.setup import Pipeline
from finetuner.training.trainer import BaseCallback
from finetuner.training.wise_ft import WeightInterpolation


@dataclass(frozen=True)
class LoggedRun:
    """What loggers say of a run.

    Attributes:
        experiment: its experiment, or what stands for one.
        name: of the run.
        config: how it trains, in plain JSON values.
        train: what it trains on.
    """

    experiment: str = 'default'
    name: str = 'run'
    config: Mapping[str, Any] = field(default_factory=dict)
    train: LabelledDataset[Any] | None = None


@dataclass(frozen=True)
class Surroundings:
    """What callbacks are built with.

    Attributes:
        caption: put before the names of metrics in reports: the model's name.
        pipeline: how Documents become inputs.
        report: told metrics before and after training.
        report_examples: told example results before and after training.
        logged: what loggers say of the run.
        evaluation: the first that was asked for, None where there is none.
        epochs: keeps models by epoch; None where there is no place for them.
        lengths: that embeddings are cut to and measured at besides the whole.
    """

    caption: str
    pipeline: Pipeline
    report: ReportMetrics
    report_examples: ReportExamples
    logged: LoggedRun
    evaluation: EvaluationCallback | None
    epochs: EpochStore | None
    lengths: tuple[int, ...]


def build_callbacks(
    descriptions: Sequence[CallbackDescription | BaseCallback],
    caption: str,
    pipeline: Pipeline,
    report: ReportMetrics,
    report_examples: ReportExamples,
    logged: LoggedRun | None = None,
    epochs: EpochStore | None = None,
    lengths: tuple[int, ...] = (),
) -> list[BaseCallback]:
    """Set the described callbacks to work.

    Args:
        descriptions: as `prepare_callbacks` gives them; a `BaseCallback` is taken as it is.
        caption: put before the names of metrics in reports: the model's name.
        pipeline: how Documents become inputs.
        report: told metrics before and after training.
        report_examples: told example results before and after training.
        logged: what loggers say of the run.
        epochs: keeps models by epoch; None where there is no place for them.
        lengths: that embeddings are cut to and measured at besides the whole.

    Returns:
        In the order of the descriptions, but that what mixes weights comes after those that
        choose them, and loggers after those that measure.

    Raises:
        ConfigError: models of epochs are to be kept, and there is no place for them.
    """
    evaluations = (each for each in descriptions if isinstance(each, EvaluationCallback))
    surroundings = Surroundings(
        caption,
        pipeline,
        report,
        report_examples,
        logged or LoggedRun(),
        next(evaluations, None),
        epochs,
        lengths,
    )
    built = [
        description
        if isinstance(description, BaseCallback)
        else _BUILDERS[type(description)](description, surroundings)
        for description in descriptions
    ]
    return sorted(built, key=_rank)


def without_reports(
    descriptions: Sequence[CallbackDescription | BaseCallback],
) -> list[CallbackDescription | BaseCallback]:
    """Leave out what writes for others to read, which one of several processes does for all."""
    reports = (WandBLogger, TensorBoardLogger, TrainingCheckpoint)
    return [each for each in descriptions if not isinstance(each, reports)]


def _rank(callback: BaseCallback) -> int:
    if isinstance(callback, ScalarLogger):
        return 2
    return 1 if isinstance(callback, WeightInterpolation) else 0


def _build_best_weights(description: BestModelCheckpoint, _: Surroundings) -> BaseCallback:
    return BestWeights(description.monitor, description.mode)


def _build_stopping(description: EarlyStopping, _: Surroundings) -> BaseCallback:
    return Stopping(
        description.monitor,
        description.mode,
        description.patience,
        description.min_delta,
        description.baseline,
    )


def _build_interpolation(description: WiSEFTCallback, _: Surroundings) -> BaseCallback:
    return WeightInterpolation(description.alpha)


def _build_epoch_artifacts(
    description: TrainingCheckpoint, surroundings: Surroundings
) -> BaseCallback:
    return EpochArtifacts(surroundings.epochs, description.last_k_epochs)


def _build_wandb(description: WandBLogger, surroundings: Surroundings) -> BaseCallback:
    logged = surroundings.logged
    arguments = {
        'name': logged.name,
        'group': logged.experiment,
        'config': dict(logged.config),
        'dir': str(Settings.from_environment().home / 'wandb'),
        # one that the user has open in this process stays theirs
        'reinit': 'create_new',
        **(description.wandb_args or {}),
    }
    built = WandBScalars(
        description.metrics_logger_step == 'batch', description.log_zero_shot, arguments
    )
    surroundings.pipeline.call_at_end(built.close)
    return built


def _build_tensorboard(description: TensorBoardLogger, surroundings: Surroundings) -> BaseCallback:
    directory = description.log_dir
    if directory is None:
        home = Settings.from_environment().home / 'tensorboard'
        logged = surroundings.logged
        directory = str(home / _file_name(logged.experiment) / _file_name(logged.name))
    built = TensorBoardScalars(
        description.metrics_logger_step == 'batch',
        Path(directory),
        _build_projection(description, surroundings),
    )
    surroundings.pipeline.call_at_end(built.close)
    return built


def _build_projection(
    description: TensorBoardLogger, surroundings: Surroundings
) -> Projection | None:
    """Of what is evaluated, else of what is trained on; None where that has two kinds of inputs."""
    evaluation = surroundings.evaluation
    train = surroundings.logged.train
    if not description.log_embeddings:
        return None
    if evaluation is not None:
        sides = {'query': evaluation.query_data, 'index': evaluation.index_data}
    elif train is not None and train.kind != 'text_image_pair':
        sides = {'train': train}
    else:
        return None
    given: dict[str, Any] = {side: data for side, data in sides.items() if data is not None}
    return Projection(surroundings.pipeline, given, description.max_embeddings)


def _file_name(name: str) -> str:
    return re.sub(r'[^\w.\- ]', '_', name).lstrip('.') or '_'


def _build_evaluation(
    description: EvaluationCallback, surroundings: Surroundings
) -> RetrievalEvaluation:
    pipeline = surroundings.pipeline
    # `prepare_callbacks` has put datasets there
    query_data: Any = description.query_data
    queries = sample(query_data, description.query_sample_size, pipeline.seed)
    # loader processes cost more than they save on what is decoded in a second
    workers = min(description.num_workers, pipeline.num_workers) if len(queries) > 5_000 else 0
    index_data = cast('ClassDataset | None', description.index_data)
    sides = ((queries, description.model), (index_data, description.index_model))
    sets = [
        None
        if data is None
        else pipeline.evaluation_set(
            data, description.batch_size, workers, pipeline.tower_reads.get(tower or '')
        )
        for data, tower in sides
    ]
    options = EvaluationOptions(
        limit=description.limit,
        distance=description.distance,
        exclude_self=description.exclude_self,
        steps_per_interval=description.steps_per_interval,
        num_examples=description.num_example_queries if description.gather_examples else 0,
        lengths=surroundings.lengths,
    )
    return RetrievalEvaluation(
        description.caption or surroundings.caption,
        sets[0],  # type: ignore[arg-type]
        sets[1],
        options,
        surroundings.report,
        surroundings.report_examples,
    )


# what does the work of each description
_BUILDERS: dict[type, Callable[[Any, Surroundings], BaseCallback]] = {
    EvaluationCallback: _build_evaluation,
    BestModelCheckpoint: _build_best_weights,
    EarlyStopping: _build_stopping,
    WiSEFTCallback: _build_interpolation,
    WandBLogger: _build_wandb,
    TensorBoardLogger: _build_tensorboard,
    TrainingCheckpoint: _build_epoch_artifacts,
}


def sample(dataset: ClassDataset, size: int | None, seed: int) -> ClassDataset:
    """Draw so many Documents, in their order; all of them when size is None or more."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.subset(np.sort(np.random.default_rng(seed).choice(len(dataset), size, False)))
