"""The training loop: batches in, embeddings, loss, step; everything else hears of it by events."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed

from finetuner.excepts import TrainingError
from finetuner.training.optimization import Schedule
from finetuner.training.step import StepOptions, TrainingStep

logger = logging.getLogger('finetuner.training')


class Loader(Protocol):
    """What the loop needs of a data loader: a length in batches and (inputs, labels) pairs."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...


@dataclass
class TrainerState:
    """Where training stands; callbacks read it.

    Attributes:
        epoch: current epoch, from 0.
        num_epochs: epochs planned.
        batch: current batch within the epoch, from 0.
        num_batches: batches in the epoch.
        step: batches trained since the start.
        loss: loss of the current batch.
        train_loss: mean loss of the last epoch.
        val_loss: mean loss on the validation data after the last epoch, if there is any.
        learning_rate: of the first parameter group, for the current batch.
        items_per_second: training items a second since the epoch began.
        seconds_left: estimate until the last epoch ends.
        metrics: all named values of the last epoch: losses and what callbacks measured.
        weights_epoch: epoch after which the model had the weights it has now; -1 before training.
        weights_revision: how often callbacks have changed them otherwise.
        should_stop: set by a callback to end after this epoch.
    """

    epoch: int = 0
    num_epochs: int = 0
    batch: int = 0
    num_batches: int = 0
    step: int = 0
    loss: float = math.nan
    train_loss: float | None = None
    val_loss: float | None = None
    learning_rate: float = math.nan
    items_per_second: float = math.nan
    seconds_left: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    weights_epoch: int = -1
    weights_revision: int = 0
    should_stop: bool = False


class BaseCallback:
    """Hears of what happens in training; override what is of interest.

    Every method gets the `Trainer`, whose `state` and `model` may be read. Setting
    `trainer.state.should_stop` ends training after the current epoch.
    """

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Before the first epoch."""

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """Before an epoch."""

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """After a step of the optimizer."""

    def on_val_end(self, trainer: Trainer) -> None:
        """After the validation loss of an epoch was computed."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch, its validation and the callbacks named before this one."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last epoch: the moment to put other weights into the model."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """At the very end, with the weights that will be kept."""


class Trainer:
    """Trains an embedding model with a metric-learning loss.

    Attributes:
        model: the model being trained, unwrapped.
        state: where training stands.
        device: where the model is.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedule: Schedule | None = None,
        callbacks: Sequence[BaseCallback] = (),
        device: str = 'cpu',
        freeze_batch_norm: bool = False,
        step_options: StepOptions | None = None,
    ) -> None:
        """Prepare model, objective and optimizers for the device.

        Args:
            model: maps inputs to embeddings `[batch, dimension]`.
            objective: called with embeddings and labels, gives the loss; a loss of
                pytorch-metric-learning, or an `Objective`.
            optimizers: one, or one more for the objective's own parameters.
            schedule: of the first optimizer's learning rate.
            callbacks: called in this order at every event.
            device: `cpu` or `cuda`.
            freeze_batch_norm: keep the running statistics of batch normalisation as they came,
                which small batches would ruin.
            step_options: what a step does beyond the plain one.
        """
        known = PartialState._shared_state
        if known and known.get('_cpu', False) != (device == 'cpu'):
            # accelerate keeps one device for the process until told to forget it
            AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(cpu=device == 'cpu')
        self._prepared = self._accelerator.prepare(model)
        self._optimizers = [self._accelerator.prepare(optimizer) for optimizer in optimizers]
        self._objective = objective.to(self._accelerator.device)
        self._step = TrainingStep(
            self._prepared,
            self._objective,
            self._optimizers,
            self.device,
            step_options or StepOptions(),
            # L-BFGS evaluates the loss several times a step, so it steps alone
            needs_closure=isinstance(optimizers[0], torch.optim.LBFGS),
        )
        self._schedule = schedule
        self._callbacks = list(callbacks)
        self._freeze_batch_norm = freeze_batch_norm
        self.model = model
        self.state = TrainerState()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._accelerator.device

    def fit(
        self, train_loader: Loader, epochs: int, val_loader: Iterable[Any] | None = None
    ) -> TrainerState:
        """Train.

        Args:
            train_loader: yields (inputs, labels `[batch]` or `[batch, 2]`), anew at each iteration.
            epochs: how many times it is gone through.
            val_loader: the same for the validation loss.

        Returns:
            The final state.

        Raises:
            TrainingError: the loss became infinite or not a number.
        """
        self.state.num_epochs = epochs
        self._emit('on_fit_begin')
        for epoch in range(epochs):
            self.state.epoch, self.state.metrics = epoch, {}
            self._emit('on_epoch_begin')
            self._train_epoch(train_loader)
            self.state.weights_epoch = epoch
            if val_loader is not None:
                self.state.val_loss = self._validate(val_loader)
                self.state.metrics['val_loss'] = self.state.val_loss
                self._emit('on_val_end')
            self._emit('on_epoch_end')
            if self.state.should_stop:
                logger.info('Training stopped after epoch %d of %d', epoch + 1, epochs)
                break
        self._emit('on_train_end')
        self._emit('on_fit_end')
        self.model.eval()
        return self.state

    def _emit(self, event: str) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self)

    def set_training_mode(self) -> None:
        """Put the model in training mode, batch normalisation excepted when it is frozen."""
        self._prepared.train()
        if self._freeze_batch_norm:
            for module in self._prepared.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _train_epoch(self, loader: Loader) -> None:
        state = self.state
        state.num_batches = len(loader)
        self.set_training_mode()
        started, num_items, loss_sum = time.perf_counter(), 0, 0.0
        for batch, (inputs, labels) in enumerate(loader):
            state.batch = batch
            state.learning_rate = self._optimizers[0].param_groups[0]['lr']
            state.loss = self._step(inputs, labels)
            if not math.isfinite(state.loss):
                raise TrainingError(
                    f'the loss became {state.loss} in epoch {state.epoch + 1}, batch {batch + 1} '
                    f'of {state.num_batches}, at learning rate {state.learning_rate:.3g}: take a '
                    'lower learning_rate or a warm-up (scheduler_options num_warmup_steps), and '
                    'look for empty or extreme inputs'
                )
            state.step += 1
            num_items += len(labels)
            loss_sum += state.loss
            seconds = time.perf_counter() - started
            state.items_per_second = num_items / seconds
            batches_left = (state.num_epochs - state.epoch) * state.num_batches - batch - 1
            state.seconds_left = seconds / (batch + 1) * batches_left
            if self._schedule is not None and self._schedule.step_on == 'batch':
                self._schedule.scheduler.step()
            self._emit('on_train_batch_end')
        if self._schedule is not None and self._schedule.step_on == 'epoch':
            self._schedule.scheduler.step()
        state.train_loss = loss_sum / max(1, state.num_batches)
        state.metrics['train_loss'] = state.train_loss

    def _validate(self, loader: Iterable[Any]) -> float:
        """Mean loss over the batches of the validation data."""
        self._prepared.eval()
        losses = []
        with torch.inference_mode():
            for inputs, labels in loader:
                losses.append(float(self._step.compute_loss(inputs, labels)))
        return sum(losses) / max(1, len(losses))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers, so that a run can be repeated."""
    set_seed(seed)


def resolve_device(device: str) -> str:
    """`cuda` where there is a GPU, else `cpu`, saying so in the log."""
    if device == 'cuda' and not torch.cuda.is_available():
        logger.info('No GPU that torch can use was found: running on the CPU')
        return 'cpu'
    return device
