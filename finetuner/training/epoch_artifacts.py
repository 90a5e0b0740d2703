"""Keep the model after each of the last epochs, each as a directory of its own."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from finetuner.excepts import ConfigError
from finetuner.training.epoch_directories import epoch_name, kept_epochs
from finetuner.training.trainer import BaseCallback, Trainer

logger = logging.getLogger('finetuner.training')


@dataclass(frozen=True)
class EpochStore:
    """Where models are kept by epoch, and how one is written.

    Attributes:
        directory: holds a directory for each epoch, `epoch-1` for the first.
        model: the whole of what is trained, of which a trainer may know a part.
        save: writes a model, which it may change, into a directory that is not there yet.
    """

    directory: Path
    model: torch.nn.Module
    save: Callable[[torch.nn.Module, Path], None]


class EpochArtifacts(BaseCallback):
    """Writes the model after each epoch and deletes those of epochs that are too long ago."""

    def __init__(self, store: EpochStore | None, num_kept: int) -> None:
        """See `finetuner.callback.TrainingCheckpoint`.

        Args:
            store: where to; None where no run has a directory.
            num_kept: epochs that are kept.

        Raises:
            ConfigError: there is no store.
        """
        if store is None:
            raise ConfigError(
                "TrainingCheckpoint keeps models in a run's directory, and a model of one's own is "
                'trained without a run: leave it out, and save the model in on_epoch_end of a '
                'callback of your own'
            )
        self._store = store
        self._num_kept = num_kept

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Clear what an earlier attempt at the same run left."""
        shutil.rmtree(self._store.directory, ignore_errors=True)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Write the model as it is now."""
        epoch = trainer.state.epoch + 1
        directory = self._store.directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = directory / f'.{epoch_name(epoch)}'
        shutil.rmtree(unfinished, ignore_errors=True)
        # a copy: saving moves a model to the CPU and ends its training mode
        self._store.save(copy.deepcopy(self._store.model), unfinished)
        for other, path in kept_epochs(directory).items():
            if not epoch - self._num_kept < other < epoch:
                _delete(path)
        unfinished.rename(directory / epoch_name(epoch))
        logger.info('Kept the model of epoch %d', epoch)


def _delete(path: Path) -> None:
    # renamed first: one that is half deleted must not pass for a whole one
    doomed = path.with_name(f'.deleted-{path.name}')
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
