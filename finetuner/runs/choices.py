"""What a run chose by what it measured when it began, kept to where it goes on from a checkpoint.

Memory that is free at one time may be taken at another: a run that chose again might step in other
parts, or train another part of the model than its checkpoint is of.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finetuner.runs.findings import Findings, FindingsFile, NoFindings
from finetuner.training.checkpointing import SUMMARY

if TYPE_CHECKING:
    from finetuner.training.ranks import Ranks

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


class SharedChoices:
    """Choices of the first process of a run, which the others wait for and take over.

    All of them ask in the same order; one that is not known yet is told to the others when the first
    process remembers it.
    """

    def __init__(self, own: Findings, ranks: Ranks) -> None:
        self._own = own
        self._ranks = ranks

    @classmethod
    def opened(cls, checkpoint_directory: Path | None, ranks: Ranks) -> SharedChoices:
        """Those of a run; see `open_choices`."""
        if checkpoint_directory is None or not ranks.is_first:
            return cls(NoFindings(), ranks)
        return cls(open_choices(checkpoint_directory), ranks)

    def recall(self, key: str) -> dict[str, float] | None:
        """What was chosen; None in the first process where it is to choose and remember."""
        if not self._ranks.is_first:
            return self._ranks.of_first(None)
        found = self._own.recall(key)
        return None if found is None else self._ranks.of_first(found)

    def remember(self, key: str, values: Mapping[str, float]) -> None:
        """Keep what was chosen, and tell the others if they still wait for it."""
        is_new = self._own.recall(key) is None
        self._own.remember(key, values)
        if self._ranks.is_first and is_new:
            self._ranks.of_first(dict(values))
