"""Training told to others: Weights & Biases and TensorBoard."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from finetuner.evaluation import METRICS
from finetuner.training.projection import Projection
from finetuner.training.trainer import BaseCallback, Trainer

logger = logging.getLogger('finetuner.training')

Axis = Literal['epoch', 'step']


class ScalarLogger(BaseCallback, abc.ABC):
    """Tells values of epochs, counted from 1, and of batches to a service; subclasses say how.

    What the service cannot take ends the logging, with a warning, and never the training.
    Name it after the callbacks that measure.
    """

    service: str

    def __init__(self, each_batch: bool, log_zero_shot: bool) -> None:
        """Say what to log.

        Args:
            each_batch: the values of each batch as well.
            log_zero_shot: what was measured before training, as epoch 0.
        """
        self._each_batch = each_batch
        self._log_zero_shot = log_zero_shot
        self._is_open = False
        self._failed = False

    @abc.abstractmethod
    def _errors(self) -> tuple[type[Exception], ...]:
        """What the service is known to raise."""

    @abc.abstractmethod
    def _open(self) -> None:
        """Begin."""

    @abc.abstractmethod
    def _write(self, axis: Axis, place: int, values: dict[str, float]) -> None:
        """Take values of an epoch, or of the batch at a step."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Make sure that everything is written."""

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Open the service; what it does not like is known at the beginning."""
        measured = _measured(trainer)
        zero_shot = measured if self._log_zero_shot else {}
        self._attempt(lambda: self._write('epoch', 0, zero_shot) if zero_shot else None)

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Tell the loss and learning rate of the batch, when asked to."""
        if self._each_batch:
            state = trainer.state
            values = {'batch/loss': state.loss, 'batch/learning_rate': state.learning_rate}
            self._attempt(lambda: self._write('step', state.step, values))

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Tell the losses, what callbacks measured, and the learning rate."""
        state = trainer.state
        values = {**state.metrics, 'learning_rate': state.learning_rate}
        self._attempt(lambda: self._write('epoch', state.epoch + 1, values))

    def on_fit_end(self, trainer: Trainer) -> None:
        """Tell what the weights that are kept are worth."""
        values = {f'final/{name}': value for name, value in _measured(trainer).items()}
        if values:
            self._attempt(lambda: self._write('epoch', trainer.state.epoch + 1, values))

    def close(self) -> None:
        """End, also when training failed."""
        if self._is_open:
            self._attempt(self._close)
            self._is_open = False

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            if not self._is_open:
                self._open()
                self._is_open = True
            action()
        except self._errors() as error:
            self._failed = True
            logger.warning(
                '%s does not take the values, and training goes on without it: %s: %s',
                self.service,
                type(error).__name__,
                error,
            )


def _measured(trainer: Trainer) -> dict[str, float]:
    """What an evaluation has measured last."""
    metrics = trainer.state.metrics
    return {name: value for name, value in metrics.items() if name.startswith(METRICS)}


class WandBScalars(ScalarLogger):
    """Logs to Weights & Biases."""

    service = 'Weights & Biases'

    def __init__(self, each_batch: bool, log_zero_shot: bool, arguments: dict[str, Any]) -> None:
        """Say what to log and how to begin.

        Args:
            each_batch: the values of each batch as well.
            log_zero_shot: what was measured before training, as epoch 0.
            arguments: of `wandb.init`.
        """
        super().__init__(each_batch, log_zero_shot)
        self._arguments = arguments
        self._run: Any = None

    def _errors(self) -> tuple[type[Exception], ...]:
        import wandb

        # what wandb documents; a lost process or a full disk; arguments that it cannot read
        return wandb.Error, OSError, ValueError, TypeError

    def _open(self) -> None:
        import wandb

        Path(self._arguments.get('dir') or '.').mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(**self._arguments)
        for axis, names in (('epoch', '*'), ('step', 'batch/*')):
            self._run.define_metric(axis)
            self._run.define_metric(names, step_metric=axis)
        logger.info('Weights & Biases: %s', self._run.url or self._run.dir)

    def _write(self, axis: Axis, place: int, values: dict[str, float]) -> None:
        self._run.log({axis: place, **values})

    def _close(self) -> None:
        self._run.finish()

    def state_dict(self) -> dict[str, Any]:
        """Which of W&B's runs this is."""
        return {'run_id': None if self._run is None else self._run.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that one."""
        if state['run_id'] is not None:
            self._arguments = {**self._arguments, 'id': state['run_id'], 'resume': 'allow'}


class TensorBoardScalars(ScalarLogger):
    """Writes what TensorBoard shows."""

    service = 'TensorBoard'

    def __init__(self, each_batch: bool, directory: Path, projection: Projection | None) -> None:
        """Say what to write where.

        Args:
            each_batch: the values of each batch as well.
            directory: made when it is not there.
            projection: the embeddings to be written at the end, None for none.
        """
        super().__init__(each_batch, log_zero_shot=True)
        self._directory = directory
        self._projection = projection
        self._writer: Any = None

    def _errors(self) -> tuple[type[Exception], ...]:
        return (OSError,)

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory))
        logger.info('TensorBoard: tensorboard --logdir %s', self._directory)

    def _write(self, axis: Axis, place: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, place)
        if axis == 'epoch':
            self._writer.flush()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Write what the weights that are kept are worth, and the embeddings they give."""
        super().on_fit_end(trainer)
        projection = self._projection
        if projection is not None:
            self._attempt(lambda: projection.write(self._writer, trainer))

    def _close(self) -> None:
        self._writer.close()
