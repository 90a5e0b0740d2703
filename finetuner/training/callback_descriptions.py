"""Descriptions of callbacks, checked before anything is trained."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_args

from finetuner.callback import (
    BestModelCheckpoint,
    CallbackDescription,
    EarlyStopping,
    EvaluationCallback,
    TensorBoardLogger,
    WandBLogger,
)
from finetuner.data.checks import (
    build_evaluation_dataset,
    check_evaluation_data,
    check_findable,
)
from finetuner.evaluation import METRICS
from finetuner.excepts import ConfigError, DataError, unknown_name
from finetuner.training.matryoshka import metric_name
from finetuner.training.tower_evaluation import choose_towers, split_pairs
from finetuner.training.trainer import BaseCallback

CALLBACKS: dict[str, type[Any]] = {
    class_.__name__: class_ for class_ in get_args(CallbackDescription)
}


def parse_callback(name: str, options: dict[str, Any], data: dict[str, Any]) -> CallbackDescription:
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
    descriptions: Sequence[CallbackDescription | BaseCallback],
    has_validation_data: bool,
    lengths: Sequence[int] = (),
    towers: Sequence[str] = (),
) -> list[CallbackDescription | BaseCallback]:
    """Check what callbacks evaluate and monitor, before anything is trained.

    Args:
        descriptions: as the user gave them; a `BaseCallback` is left alone.
        has_validation_data: whether there is a validation loss to monitor.
        lengths: that embeddings are cut to and measured at besides the whole.
        towers: of a model that has several: the one of texts, and the one of pictures.

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
    prepared: list[CallbackDescription | BaseCallback] = []
    for description in descriptions:
        if isinstance(description, EvaluationCallback):
            measured |= set(METRICS)
            measured |= {metric_name(name, length) for name in METRICS for length in lengths}
            description = _prepare_evaluation(description, towers)
        elif isinstance(description, WandBLogger):
            _check_package('wandb', description)
            _check_wandb_arguments(description.wandb_args or {})
        elif isinstance(description, TensorBoardLogger):
            _check_package('tensorboard', description)
        elif (
            isinstance(description, BestModelCheckpoint | EarlyStopping)
            and description.monitor not in measured
        ):
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


def _check_package(package: str, description: CallbackDescription) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f'{type(description).__name__} needs a package that is not installed: '
            f'pip install finetuner[{package}]'
        )


def _check_wandb_arguments(arguments: Mapping[str, Any]) -> None:
    import wandb

    known = inspect.signature(wandb.init).parameters
    for name in arguments:
        if name not in known:
            raise ConfigError(unknown_name('argument of wandb.init', name, known))
    modes = ('online', 'offline', 'shared', 'disabled')
    if arguments.get('mode', 'online') not in modes:
        raise ConfigError(
            f'wandb_args: mode {arguments["mode"]!r} is not one of {", ".join(modes)}'
        )


def _prepare_evaluation(
    description: EvaluationCallback, towers: Sequence[str]
) -> EvaluationCallback:
    if not towers and (description.model or description.index_model or description.multi_modal):
        raise ConfigError(
            'EvaluationCallback: model, index_model and multi_modal are for models with several '
            'towers; this one has a single model'
        )
    if description.multi_modal:
        description = split_pairs(description)
    queries = _evaluation_dataset(description.query_data, 'query_data', 'give labelled Documents')
    index = None
    if description.index_data is not None:
        index = _evaluation_dataset(
            description.index_data,
            'index_data',
            'give labelled Documents, or leave it out to search among the queries',
        )
        check_evaluation_data(queries, index)
    elif description.exclude_self:
        check_findable(queries)
    description = replace(description, query_data=queries, index_data=index)
    return choose_towers(description, towers) if towers else description


def _evaluation_dataset(docs: Any, name: str, hint: str) -> Any:
    if isinstance(docs, str) or not isinstance(docs, Sequence) or not len(docs):
        raise DataError(f'{name} of the EvaluationCallback is empty: {hint}')
    return build_evaluation_dataset(docs, name)
