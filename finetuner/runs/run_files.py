"""What lies in a run's directory beside its worker's output."""

from __future__ import annotations

import shutil
from pathlib import Path


def checkpoint_directory(run_directory: Path) -> Path:
    """Where a going run keeps its training, for another worker to go on with."""
    return run_directory / 'checkpoint'


def epochs_directory(run_directory: Path) -> Path:
    """Where `TrainingCheckpoint` keeps the models of epochs."""
    return run_directory / 'epochs'


def delete_checkpoint(run_directory: Path) -> None:
    """Delete the checkpoint of a run that needs it no more; none there is no error."""
    shutil.rmtree(checkpoint_directory(run_directory), ignore_errors=True)
