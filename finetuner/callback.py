"""What `fit(callbacks=[...])` takes: plain descriptions, so that a run can be sent elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finetuner.excepts import ConfigError

if TYPE_CHECKING:
    from docarray import DocumentArray

Mode = Literal['auto', 'min', 'max']


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f'{name}: {value!r} is not one of {", ".join(allowed)}')


def _check_at_least(name: str, value: Any, minimum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= minimum:
        raise ConfigError(f'{name}: {value!r} is not a number of at least {minimum}')


def _check_whole(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f'{name}: {value!r} is not a whole number of at least {minimum}')


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
