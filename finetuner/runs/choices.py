"""What a run chose by what it measured when it began, kept to where it goes on from a checkpoint.

Memory that is free at one time may be taken at another: a run that chose again might step in other
parts, or train another part of the model than its checkpoint is of.
"""

from __future__ import annotations

import logging
from pathlib import Path

from finetuner.runs.findings import Findings, FindingsFile
from finetuner.training.checkpointing import SUMMARY

logger = logging.getLogger('finetuner.run')

_FILE = 'choices.json'


def open_choices(checkpoint_directory: Path) -> Findings:
    """What was chosen before the checkpoint; nothing where there is none.

    A run without a checkpoint begins anew and measures anew: it may have ended for want of memory.

    Args:
        checkpoint_directory: of the run; made when it is not there, for its owner alone.
    """
    path = checkpoint_directory / _FILE
    try:
        checkpoint_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (checkpoint_directory / SUMMARY).is_file():
            path.unlink(missing_ok=True)
    except OSError as error:
        # as with checkpoints, no reason not to train
        logger.warning('What the run chooses is not remembered: %s', error)
    return FindingsFile(path)
