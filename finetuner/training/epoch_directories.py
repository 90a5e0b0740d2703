"""Names of the directories in which models of single epochs are kept; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

_PREFIX = 'epoch-'


def epoch_name(epoch: int) -> str:
    """The name of an epoch's directory; the first epoch is 1."""
    return f'{_PREFIX}{epoch}'


def kept_epochs(directory: Path) -> dict[int, Path]:
    """The models that are there by epoch, oldest first."""
    if not directory.is_dir():
        return {}
    names = {path.name.removeprefix(_PREFIX): path for path in directory.glob(f'{_PREFIX}*')}
    found = {int(number): path for number, path in names.items() if number.isdigit()}
    return dict(sorted(found.items()))
