"""What an index refuses, and its directory: who has it, and how large it is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.excepts import ConfigError, ConflictError, DataError
from finetuner.vector_index.exact import lengths_of

if TYPE_CHECKING:
    from filelock import BaseFileLock

MAX_ID_LENGTH = 4096
# squares of lengths between these are neither 0 nor infinite in float32
_SHORTEST, _LONGEST = 1e-15, 1e15


def checked_embeddings(embeddings: Any, distance: str, side: str) -> np.ndarray:
    """Make float32 rows of embeddings, and refuse those that cannot be measured.

    Args:
        embeddings: `[n, dimension]`, any numbers.
        distance: that is measured.
        side: what they are of, for messages.

    Raises:
        DataError: the shape is another, or one is not finite, too long, or zero under cosine.
    """
    try:
        given = np.asarray(embeddings, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f'the embeddings are not numbers of one shape: {error}') from error
    if not len(np.atleast_1d(given)):
        return np.empty((0, 0), np.float32)
    if given.ndim != 2 or not given.shape[1]:
        raise DataError(
            f'the embeddings have the shape {list(given.shape)}: [n, dimension] is needed'
        )
    with np.errstate(over='ignore', invalid='ignore'):
        values = given.astype(np.float32)
        lengths = lengths_of(values)
    is_bad = np.logical_not(np.isfinite(given)).any(axis=1)
    _refuse(np.asarray(is_bad), side, 'holds nan or infinity')
    _refuse(~(lengths <= _LONGEST), side, f'is longer than {_LONGEST:g}')
    if distance == 'cosine':
        _refuse(lengths < _SHORTEST, side, 'is zero, and the cosine to it is not defined')
    return values


def _refuse(bad: np.ndarray, side: str, reason: str) -> None:
    positions = np.flatnonzero(bad)
    if len(positions):
        more = f' (and {len(positions) - 1} more)' if len(positions) > 1 else ''
        raise DataError(f'the embedding of {side} {positions[0]}{more} {reason}')


def check_ids(ids: Sequence[Any], num_embeddings: int) -> None:
    """Refuse ids that are none.

    Raises:
        DataError: one is no text or of a length that is not allowed, or their number is another
            than that of the embeddings.
    """
    for position, id_ in enumerate(ids):
        if not isinstance(id_, str) or not 1 <= len(id_) <= MAX_ID_LENGTH:
            what = f'of {len(id_):,} characters' if isinstance(id_, str) else repr(id_)
            raise DataError(
                f'the id of Document {position} is {what}: allowed are texts of 1 to '
                f'{MAX_ID_LENGTH:,} characters'
            )
    if len(ids) != num_embeddings:
        raise DataError(f'{len(ids)} Documents came with {num_embeddings} embeddings')


def lock_directory(directory: Path) -> BaseFileLock:
    """Make a directory and hold it, until the lock is released or this process ends.

    Raises:
        ConflictError: it is held already.
        ConfigError: it cannot be made or written to.
    """
    from filelock import FileLock, Timeout

    from finetuner.storage.database import make_private_directory

    # not a singleton: the same process is refused too
    lock = FileLock(directory / 'lock', timeout=0, mode=0o600)
    try:
        make_private_directory(directory)
        lock.acquire()
    except Timeout as error:
        raise ConflictError(
            f'the index {directory} is open already, and one process at a time can have it: end '
            'that one or ask it, or give another directory'
        ) from error
    except OSError as error:
        raise ConfigError(f'the index {directory} cannot be opened: {error}') from error
    return lock


def bytes_in(directory: Path) -> int:
    """Bytes of the files of a directory, some of which may be going while it is read."""
    total = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
