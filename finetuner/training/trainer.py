"""The training loop: batches in, embeddings, loss, step; everything else hears of it by events."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed

from finetuner.data.randomness import set_random_state
from finetuner.excepts import CheckpointError, TrainingError
from finetuner.training.checkpointing import Checkpoints, TrainingParts
from finetuner.training.optimization import Schedule
from finetuner.training.ranks import ALONE, Ranks
from finetuner.training.step import StepOptions, TrainingStep

logger = logging.getLogger('finetuner.training')


class Loader(Protocol):
    """What the loop needs of a data loader: (inputs, labels) pairs and a length in batches, or 0."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...


@dataclass
class TrainerState:
    """Where training stands; callbacks read it.

    Attributes:
        epoch: current epoch, from 0.
        num_epochs: epochs planned.
        batch: current batch within the epoch, from 0.
        num_batches: batches in the epoch; 0 where that shows only at its end.
        step: batches trained since the start.
        loss: loss of the current batch.
        train_loss: mean loss of the last epoch.
        val_loss: mean loss on the validation data after the last epoch, if there is any.
        learning_rate: of the first parameter group, for the current batch.
        items_per_second: training items a second since the epoch began.
        seconds_left: estimate until the last epoch ends; NaN where nothing says how far that is.
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


@dataclass
class _EpochSums:
    """How far the current epoch got."""

    num_batches: int = 0
    num_items: int = 0
    loss: float = 0.0
    seconds: float = 0.0


class BaseCallback:
    """Hears of what happens in training; override what is of interest.

    Every method gets the `Trainer`, whose `state` and `model` may be read. Setting
    `trainer.state.should_stop` ends training after the current epoch.

    A callback that remembers something from one event to the next overrides `state_dict` and
    `load_state_dict` too, so that a run that was interrupted goes on as if it had not been.
    """

    def state_dict(self) -> dict[str, Any]:
        """What it remembers: tensors, numbers, texts, None, and lists, tuples, dicts of such."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what another one of its kind did; called before `on_fit_resume`."""

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Before the first epoch."""

    def on_fit_resume(self, trainer: Trainer) -> None:
        """Instead of `on_fit_begin`, where training goes on from a checkpoint.

        Within an epoch, no `on_epoch_begin` follows: it came before the checkpoint.
        """

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
        ranks: the processes that train together, this one among them.
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
        ranks: Ranks = ALONE,
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
            ranks: the processes that train together, each with the same arguments.
        """
        known = PartialState._shared_state
        if known and known.get('_cpu', False) != (device == 'cpu'):
            # accelerate keeps one device for the process until told to forget it
            AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(cpu=device == 'cpu')
        # Several ranks are not wrapped (`evaluation_mode`): they add up their gradients where the
        # step is whole, which may be after several passes, or none where a part of a batch is empty
        self._prepared = self._accelerator.prepare_model(model, evaluation_mode=ranks.size > 1)
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
            ranks=ranks,
        )
        self.ranks = ranks
        self._schedule = schedule
        self._callbacks = list(callbacks)
        self._freeze_batch_norm = freeze_batch_norm
        self.model = model
        self.state = TrainerState()
        self._num_epochs_done = 0
        self._sums = _EpochSums()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._accelerator.device

    def fit(
        self,
        train_loader: Loader,
        epochs: int,
        val_loader: Iterable[Any] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> TrainerState:
        """Train.

        Args:
            train_loader: yields (inputs, labels `[batch]` or `[batch, 2]`), anew at each iteration.
            epochs: how many times it is gone through.
            val_loader: the same for the validation loss.
            checkpoints: where training goes on from, if there is one, and where it is saved; both
                loaders have to be `BatchLoader`s then.

        Returns:
            The final state.

        Raises:
            TrainingError: the loss became infinite or not a number.
            CheckpointError: the checkpoint is of another training.
        """
        self.state.num_epochs = epochs
        self._begin(train_loader, val_loader, checkpoints)
        while self._num_epochs_done < epochs and not self.state.should_stop:
            epoch = self._num_epochs_done
            if not self._sums.num_batches:
                self.state.epoch, self.state.metrics = epoch, {}
                self._emit('on_epoch_begin')
            self._train_epoch(train_loader, checkpoints)
            self.state.weights_epoch = epoch
            if val_loader is not None:
                self.state.val_loss = self._validate(val_loader)
                self.state.metrics['val_loss'] = self.state.val_loss
                self._emit('on_val_end')
            self._emit('on_epoch_end')
            self.state.should_stop = self.ranks.any(self.state.should_stop, self.device)
            self._num_epochs_done, self._sums = epoch + 1, _EpochSums()
            if checkpoints is not None:
                checkpoints.after_epoch(self)
        if self.state.should_stop:
            logger.info('Training stopped after epoch %d of %d', self._num_epochs_done, epochs)
        self._emit('on_train_end')
        self._emit('on_fit_end')
        self.model.eval()
        return self.state

    def _begin(self, train_loader: Any, val_loader: Any, checkpoints: Checkpoints | None) -> None:
        """Start at the beginning, or where the checkpoint says."""
        saved = None
        if checkpoints is not None:
            saved = checkpoints.begin(
                each for each in (train_loader, val_loader) if each is not None
            )
        self.ranks.copy_first((self.model, self._objective))
        if len(set(self.ranks.collect(-1 if saved is None else saved['state']['step']))) > 1:
            raise CheckpointError(
                'the processes of this training do not see the same checkpoint: its directory has '
                'to be the same on all machines'
            )
        if saved is None:
            self._emit('on_fit_begin')
            self.ranks.draw_apart(0)
            return
        self.load_state_dict(saved)
        self._emit('on_fit_resume')
        # last, since who heard of it may have drawn some
        set_random_state(saved['random'])
        self.ranks.draw_apart(self.state.step)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, loaders aside: tensors and plain values."""
        return {
            **self._parts().state_dict(),
            'step': self._step.state_dict(),
            'state': asdict(self.state),
            'num_epochs_done': self._num_epochs_done,
            'epoch': asdict(self._sums),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where another trainer was, made of the same parts; random numbers aside.

        Args:
            saved: its `state_dict`.

        Raises:
            CheckpointError: it was made of other parts.
        """
        self._parts().load_state_dict(saved)
        self._step.load_state_dict(saved['step'])
        for name, value in saved['state'].items():
            setattr(self.state, name, value)
        self._num_epochs_done = saved['num_epochs_done']
        self._sums = _EpochSums(**saved['epoch'])

    def _parts(self) -> TrainingParts:
        return TrainingParts(
            self.model,
            self._objective,
            self._optimizers,
            None if self._schedule is None else self._schedule.scheduler,
            self._callbacks,
            self.device,
            self.ranks.is_first,
        )

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

    def _train_epoch(self, loader: Loader, checkpoints: Checkpoints | None) -> None:
        state, sums = self.state, self._sums
        state.num_batches = len(loader)
        self.set_training_mode()
        started = time.perf_counter() - sums.seconds
        for inputs, labels in loader:
            batch = state.batch = sums.num_batches
            state.learning_rate = self._optimizers[0].param_groups[0]['lr']
            loss = self._step(inputs, labels)
            if loss is None:
                continue
            state.loss = loss
            if not math.isfinite(state.loss):
                raise TrainingError(
                    f'the loss became {state.loss} in epoch {state.epoch + 1}, batch {batch + 1} '
                    f'of {state.num_batches}, at learning rate {state.learning_rate:.3g}: take a '
                    'lower learning_rate or a warm-up (scheduler_options num_warmup_steps), and '
                    'look for empty or extreme inputs'
                )
            state.step += 1
            sums.num_batches = batch + 1
            sums.num_items += self._step.num_items
            sums.loss += state.loss
            sums.seconds = time.perf_counter() - started
            state.items_per_second = sums.num_items / sums.seconds
            batches_left = (state.num_epochs - state.epoch) * state.num_batches - batch - 1
            seconds_left = sums.seconds / (batch + 1) * batches_left
            state.seconds_left = seconds_left if state.num_batches else math.nan
            if self._schedule is not None and self._schedule.step_on == 'batch':
                self._schedule.scheduler.step()
            self._emit('on_train_batch_end')
            if checkpoints is not None:
                checkpoints.after_batch(self)
        if self._schedule is not None and self._schedule.step_on == 'epoch':
            self._schedule.scheduler.step()
        state.train_loss = sums.loss / max(1, state.num_batches, sums.num_batches)
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
