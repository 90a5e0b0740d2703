"""What `fit(callbacks=[...])` takes: plain descriptions, so that a run can be sent elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finetuner.excepts import ConfigError

if TYPE_CHECKING:
    from docarray import DocumentArray

Mode = Literal['auto', 'min', 'max']
LoggerStep = Literal['epoch', 'batch']


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f'{name}: {value!r} is not one of {", ".join(allowed)}')


def _check_at_least(name: str, value: Any, minimum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= minimum:
        raise ConfigError(f'{name}: {value!r} is not a number of at least {minimum}')


def _check_whole(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f'{name}: {value!r} is not a whole number of at least {minimum}')


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f'{name}: {value!r} is not True or False')


def _absolute(path: object) -> object:
    """A path as a worker that starts elsewhere finds it; anything else as it is."""
    if not isinstance(path, str | os.PathLike):
        return path
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


@dataclass
class EvaluationCallback:
    """Measures retrieval before training, after each epoch and with the final weights.

    When others watch its metrics (`BestModelCheckpoint(monitor='recall_at_k')`), name it first.

    Attributes:
        query_data: Documents to search with, labelled; or the name of pushed data.
        index_data: Documents to find, labelled; None searches among the queries themselves.
        model: which of several models embeds the queries; None where there is one.
        index_model: which of several models embeds the index; None takes `model`.
        multi_modal: whether contents stand in chunks by modality (text-image models).
        batch_size: Documents embedded at a time.
        exclude_self: leave a query out of its own results when it is in the index.
        limit: nearest neighbours looked at for each query (the k of `recall_at_k`).
        distance: `cosine`, `euclidean` or `sqeuclidean`.
        steps_per_interval: also evaluate each time after so many batches.
        gather_examples: keep results of a few queries, before and after.
        num_example_queries: how many.
        num_workers: loader processes while embedding.
        caption: put before the metrics' names instead of the model's name.
        output_model_names: accepted for Finetuner's scripts; names are always there.
        query_sample_size: evaluate this many queries, drawn once with the run's seed.
    """

    query_data: DocumentArray | str
    index_data: DocumentArray | str | None = None
    model: str | None = None
    index_model: str | None = None
    multi_modal: bool = False
    batch_size: int = 32
    exclude_self: bool = True
    limit: int = 20
    distance: str = 'cosine'
    steps_per_interval: int | None = None
    gather_examples: bool = False
    num_example_queries: int = 5
    num_workers: int = 8
    caption: str | None = None
    output_model_names: bool = False
    query_sample_size: int | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: an option is out of range.
        """
        _check_choice('distance', self.distance, ('cosine', 'euclidean', 'sqeuclidean'))
        for name in ('batch_size', 'limit', 'num_example_queries'):
            _check_whole(name, getattr(self, name), 1)
        _check_whole('num_workers', self.num_workers, 0)
        for name in ('steps_per_interval', 'query_sample_size'):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)


@dataclass
class BestModelCheckpoint:
    """Keeps the weights of the best epoch and puts them back at the end.

    Attributes:
        monitor: `val_loss`, `train_loss` or a retrieval metric such as `recall_at_k`.
        mode: whether less (`min`) or more (`max`) is better; `auto` knows that losses fall.
    """

    monitor: str = 'val_loss'
    mode: Mode = 'auto'

    def __post_init__(self) -> None:
        """Check the mode.

        Raises:
            ConfigError: it is none of `auto`, `min`, `max`.
        """
        _check_choice('mode', self.mode, ('auto', 'min', 'max'))


@dataclass
class EarlyStopping:
    """Ends training when a value has stopped getting better.

    Attributes:
        monitor: `val_loss`, `train_loss` or a retrieval metric such as `recall_at_k`.
        mode: whether less (`min`) or more (`max`) is better; `auto` knows that losses fall.
        patience: epochs without improvement after which training ends.
        min_delta: least change that counts as improvement.
        baseline: a value that must be beaten for an epoch to count as improvement.
    """

    monitor: str = 'val_loss'
    mode: Mode = 'auto'
    patience: int = 2
    min_delta: float = 0
    baseline: float | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: an option is out of range.
        """
        _check_choice('mode', self.mode, ('auto', 'min', 'max'))
        _check_whole('patience', self.patience, 1)
        _check_at_least('min_delta', self.min_delta, 0)
        if self.baseline is not None:
            _check_at_least('baseline', self.baseline, float('-inf'))


@dataclass
class WiSEFTCallback:
    """Mixes the pretrained weights with the fine-tuned ones at the end of training.

    WiSE-FT (Wortsman and others, Robust fine-tuning of zero-shot models, 2022): what the model
    knew beyond the training data is forgotten less. Comes after `BestModelCheckpoint`, wherever
    the two are named.

    Attributes:
        alpha: the coefficient for merging weights: `(1 - alpha) * pretrained + alpha * fine-tuned`,
            so that 1 keeps only the fine-tuned weights and 0 only the pretrained ones.
    """

    alpha: float = 0.4

    def __post_init__(self) -> None:
        """Check the option.

        Raises:
            ConfigError: alpha is not in 0..1.
        """
        _check_at_least('alpha', self.alpha, 0)
        if self.alpha > 1:
            raise ConfigError(f'alpha: {self.alpha!r} is more than 1')


@dataclass
class WandBLogger:
    """Sends losses, learning rate and evaluation metrics to Weights & Biases.

    Needs `pip install finetuner[wandb]`, and the API key where training runs: `wandb login` or
    WANDB_API_KEY. With `wandb_args={'mode': 'offline'}` nothing leaves the machine.

    Attributes:
        metrics_logger_step: `epoch`, or `batch` for the values of each batch as well.
        wandb_args: arguments of `wandb.init`, in plain JSON values: project, name, mode, dir ...
        log_zero_shot: log the evaluation before training too, as epoch 0.
    """

    metrics_logger_step: LoggerStep = 'epoch'
    wandb_args: dict[str, Any] | None = None
    log_zero_shot: bool = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: an option is out of range, or wandb_args holds what JSON does not know.
        """
        _check_choice('metrics_logger_step', self.metrics_logger_step, ('epoch', 'batch'))
        _check_flag('log_zero_shot', self.log_zero_shot)
        given = {} if self.wandb_args is None else self.wandb_args
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise ConfigError(f'wandb_args: {given!r} is not a mapping of names to values')
        if 'dir' in given:
            self.wandb_args = given = {**given, 'dir': _absolute(given['dir'])}
        try:
            text = json.dumps(dict(given), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f'wandb_args: only plain JSON values can be kept: {error}') from error
        if '"api_key"' in text:
            raise ConfigError(
                'wandb_args are kept with the run, for everyone who sees it to read: give the API '
                'key in WANDB_API_KEY or by `wandb login`'
            )


@dataclass
class TensorBoardLogger:
    """Writes losses, learning rate and evaluation metrics for TensorBoard, and embeddings.

    Needs `pip install finetuner[tensorboard]`. The evaluation before training stands as epoch 0.
    The embeddings of the trained model can be walked through in TensorBoard's projector, with
    labels and, of pictures, thumbnails: of the first `EvaluationCallback`, or of training data.

    Attributes:
        log_dir: where to; None for `$FINETUNER_HOME/tensorboard/<experiment>/<run>`.
        metrics_logger_step: `epoch`, or `batch` for the values of each batch as well.
        log_embeddings: write embeddings at the end of training.
        max_embeddings: how many at most; drawn where there are more.
    """

    log_dir: str | None = None
    metrics_logger_step: LoggerStep = 'epoch'
    log_embeddings: bool = True
    max_embeddings: int = 1000

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: an option is out of range.
        """
        self.log_dir = _absolute(self.log_dir)  # type: ignore[assignment]
        if self.log_dir is not None and not isinstance(self.log_dir, str):
            raise ConfigError(f'log_dir: {self.log_dir!r} is not a path')
        _check_choice('metrics_logger_step', self.metrics_logger_step, ('epoch', 'batch'))
        _check_flag('log_embeddings', self.log_embeddings)
        _check_whole('max_embeddings', self.max_embeddings, 1)
        if self.max_embeddings > 10_000:
            raise ConfigError(
                f'max_embeddings: {self.max_embeddings} thumbnails do not fit into one picture; '
                'allowed are up to 10,000'
            )


@dataclass
class TrainingCheckpoint:
    """Keeps the model after each of the last epochs, as an artifact of its own.

    `Run.checkpoints()` says where: `finetuner.get_model(path)` opens one, and
    `finetuner.fit(..., model_artifact=path)` goes on from it. They are deleted with their run.
    (A run that was interrupted needs none of this: see `Run.resume`.)

    Attributes:
        last_k_epochs: how many epochs are kept.
    """

    last_k_epochs: int = 1

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            ConfigError: it is no whole number of at least 1.
        """
        _check_whole('last_k_epochs', self.last_k_epochs, 1)


CallbackDescription = (
    EvaluationCallback
    | BestModelCheckpoint
    | EarlyStopping
    | WiSEFTCallback
    | WandBLogger
    | TensorBoardLogger
    | TrainingCheckpoint
)
