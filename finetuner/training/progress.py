"""Show where training stands: a bar in a terminal, or values and log lines for whoever watches."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from finetuner.training.trainer import BaseCallback, Trainer, TrainerState

logger = logging.getLogger('finetuner.training')


def describe(state: TrainerState) -> dict[str, Any]:
    """Where training stands, in plain values: epochs and batches counted from 1."""
    return {
        'epoch': state.epoch + 1,
        'num_epochs': state.num_epochs,
        'batch': state.batch + 1,
        'num_batches': state.num_batches,
        'loss': state.loss,
        'images_per_second': round(state.items_per_second, 1),
        'seconds_left': round(state.seconds_left, 1),
    }


def progress_bar(console: Console | None = None) -> Progress:
    """A bar with epoch, batch, loss, images a second and time left; see `bar_fields`."""
    return Progress(
        TextColumn('[bold]Training'),
        TextColumn('epoch {task.fields[epoch]}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('loss {task.fields[loss]}'),
        TextColumn('{task.fields[speed]} Documents/s'),
        TextColumn('{task.fields[left]} left'),
        console=console,
    )


def bar_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Turn what `describe` gave, directly or as floats over gRPC, into `Progress.update`'s."""
    left = '-'
    # of a stream nobody knows
    if math.isfinite(values['seconds_left']):
        minutes, seconds = divmod(round(values['seconds_left']), 60)
        left = f'{minutes}:{seconds:02d}'
    done = (values['epoch'] - 1) * values['num_batches'] + values['batch']
    return {
        'completed': done,
        'total': values['num_epochs'] * values['num_batches'] or None,
        'epoch': f'{values["epoch"]:.0f}/{values["num_epochs"]:.0f}',
        'loss': f'{values["loss"]:.4f}',
        'speed': f'{values["images_per_second"]:.0f}',
        'left': left,
    }


class ProgressBar(BaseCallback):
    """A bar in the terminal, for training in one's own process."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on this console, or on standard output."""
        self._progress = progress_bar(console)
        self._task: TaskID | None = None

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Start drawing."""
        self._task = self._progress.add_task(
            '', total=None, epoch='-', loss='-', speed='-', left='-'
        )
        self._progress.start()

    def on_fit_resume(self, trainer: Trainer) -> None:
        """Start drawing."""
        self.on_fit_begin(trainer)

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Move on."""
        if self._task is not None:
            self._progress.update(self._task, **bar_fields(describe(trainer.state)))

    def on_fit_end(self, trainer: Trainer) -> None:
        """Stop drawing."""
        self._progress.stop()

    def __enter__(self) -> ProgressBar:
        """Draw nothing before training begins."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing, also when training failed."""
        self._progress.stop()


class ProgressReport(BaseCallback):
    """Tells someone the values of each batch and epoch and writes log lines now and then."""

    def __init__(
        self,
        tell: Callable[[dict[str, Any]], None],
        tell_step: Callable[[int, int, dict[str, float]], None],
        tell_epoch: Callable[[int, dict[str, float]], None],
        seconds_between_lines: float = 5.0,
    ) -> None:
        """Say whom to tell.

        Args:
            tell: progress as `describe` gives it, each batch.
            tell_step: step, epoch and named values, each batch.
            tell_epoch: epoch and named values, each epoch.
            seconds_between_lines: least time between two log lines within an epoch.
        """
        self._tell = tell
        self._tell_step = tell_step
        self._tell_epoch = tell_epoch
        self._seconds_between_lines = seconds_between_lines
        self._last_line = time.monotonic()
        self._epoch_began = time.monotonic()

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """Start the clock of the epoch."""
        self._epoch_began = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Tell progress and the batch's values."""
        state = trainer.state
        values = describe(state)
        self._tell(values)
        self._tell_step(
            state.step, state.epoch, {'loss': state.loss, 'learning_rate': state.learning_rate}
        )
        if time.monotonic() - self._last_line >= self._seconds_between_lines:
            self._last_line = time.monotonic()
            logger.info(
                'Training [%d/%d] batch %d/%d: loss %.4f, %.0f Documents/s, %.0f s left',
                *(values[name] for name in ('epoch', 'num_epochs', 'batch', 'num_batches')),
                *(values[name] for name in ('loss', 'images_per_second', 'seconds_left')),
            )

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Tell the epoch's values."""
        state = trainer.state
        self._tell_epoch(state.epoch, dict(state.metrics))
        losses = ', '.join(f'{n} {v:.4f}' for n, v in state.metrics.items() if n.endswith('loss'))
        logger.info(
            'Epoch %d/%d done in %.1f s: %s, %.1f Documents/s',
            state.epoch + 1,
            state.num_epochs,
            time.monotonic() - self._epoch_began,
            losses,
            state.items_per_second,
        )
