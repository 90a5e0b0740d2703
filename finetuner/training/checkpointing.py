"""Checkpoints: where a training stands, on disk, so that a process that was killed can be replaced.

A directory holds one checkpoint: a file of tensors and plain values, and `checkpoint.json`, which
names the file and its hash. A new file is on the disk in full before `checkpoint.json` is replaced,
and the old one is deleted after that; so whenever the process ends, one whole checkpoint is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from finetuner.data.randomness import random_state
from finetuner.excepts import CheckpointError, TrainingPausedError

if TYPE_CHECKING:
    from finetuner.training.trainer import Trainer

logger = logging.getLogger('finetuner.training')

VERSION = 1
SUMMARY = 'checkpoint.json'
_SUFFIX = '.pt'
_CHUNK_BYTES = 1 << 20
# after short epochs, saving takes at most one part in so many of the time
_LEAST_RATIO = 20


class ResumableLoader(Protocol):
    """A loader that knows its place, as `finetuner.data.loading.BatchLoader` does."""

    def state_dict(self) -> dict[str, Any]:
        """Its place, as plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Checkpoints:
    """Saves a training at times, and has another one of the same run go on from there.

    Attributes:
        directory: holds the checkpoint.

    Args:
        directory: holds the checkpoint; made when it is not there, for its owner alone.
        seconds: least time between two within an epoch. There is one after every epoch as well,
            unless that would take more than a twentieth of the time.
        on_begin: told, where training begins or goes on, how many steps and whole epochs are done.
        on_save: called before a checkpoint is written, to write down what belongs to the steps
            before it.
        is_paused: asked after every batch and epoch; once it says so, there is a checkpoint and
            training ends with a `TrainingPausedError`.
        saves: False in all but the first of several processes: they go on from the same
            checkpoint, and leave it to the first one to write the next.
    """

    def __init__(
        self,
        directory: Path,
        seconds: float,
        on_begin: Callable[[int, int], None] | None = None,
        on_save: Callable[[], None] | None = None,
        is_paused: Callable[[], bool] | None = None,
        saves: bool = True,
    ) -> None:
        self.directory = directory
        self._seconds = seconds
        self._on_begin = on_begin
        self._on_save = on_save
        self._is_paused = is_paused
        self._saves = saves
        self._loaders: list[ResumableLoader] = []
        self._saved_at = time.monotonic()
        self._cost = 0.0

    def begin(self, loaders: Iterable[ResumableLoader]) -> dict[str, Any] | None:
        """Put the loaders where the checkpoint says.

        Args:
            loaders: all whose place belongs to the training, in the order of last time.

        Returns:
            What `Trainer.state_dict` gave; None without a checkpoint, or with one that is of
            another version or damaged, which is said in the log.

        Raises:
            CheckpointError: it is of a training with other loaders.
        """
        self._loaders = list(loaders)
        self._saved_at = time.monotonic()
        try:
            saved = read_checkpoint(self.directory)
        except CheckpointError as error:
            logger.warning('Training begins anew: %s', error)
            saved = None
        if saved is None:
            if self._on_begin is not None:
                self._on_begin(0, 0)
            return None
        if len(saved['loaders']) != len(self._loaders):
            raise CheckpointError('the checkpoint is of a training with other validation data')
        for loader, state in zip(self._loaders, saved['loaders'], strict=True):
            loader.load_state_dict(state)
        state = saved['trainer']
        step, done = state['state']['step'], state['num_epochs_done']
        logger.info(
            'Going on from the checkpoint after %d steps: done are %d epochs and %d batches of the next',
            step,
            done,
            state['epoch']['num_batches'],
        )
        if self._on_begin is not None:
            self._on_begin(step, done)
        return state

    def after_batch(self, trainer: Trainer) -> None:
        """Save when it is time to."""
        self._pause_if_asked(trainer)
        if self._saves and time.monotonic() - self._saved_at >= self._seconds:
            self.save(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        """Save, unless the last time is not long ago and saving is slow."""
        self._pause_if_asked(trainer)
        least = min(self._seconds, _LEAST_RATIO * self._cost)
        if self._saves and time.monotonic() - self._saved_at >= least:
            self.save(trainer)

    def _pause_if_asked(self, trainer: Trainer) -> None:
        if self._is_paused is not None and self._is_paused():
            self.save(trainer)
            raise TrainingPausedError('training was asked to pause')

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint in the place of the one before; one that cannot be written is logged."""
        started = time.monotonic()
        if self._on_save is not None:
            self._on_save()
        state = trainer.state_dict()
        loaders = [loader.state_dict() for loader in self._loaders]
        place = {
            'step': state['state']['step'],
            'num_epochs_done': state['num_epochs_done'],
            'num_batches': state['epoch']['num_batches'],
        }
        try:
            write_checkpoint(self.directory, {'trainer': state, 'loaders': loaders}, place)
        except CheckpointError as error:
            # no reason to lose the training itself; the checkpoint before is still there
            logger.warning('Training goes on without a new checkpoint: %s', error)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started


def write_checkpoint(directory: Path, state: Mapping[str, Any], place: Mapping[str, int]) -> None:
    """Write a checkpoint in the place of the one before, which stays until this one is whole.

    Args:
        directory: made when it is not there, for its owner alone.
        state: tensors, numbers, texts, None, and lists, tuples and dicts of such.
        place: numbers to be read without the state.

    Raises:
        TypeError: something else stands in the state.
        CheckpointError: it cannot be written, as on a disk that is full.
    """
    plain = plain_state(state)
    path = directory / f'{secrets.token_hex(8)}{_SUFFIX}'
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(directory, path, plain, place)
    # torch makes a RuntimeError of what the file system says
    except (OSError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f'the checkpoint cannot be written: {error}') from error
    # from here on the new one counts
    try:
        _sync_directory(directory)
        for other in directory.glob(f'*{_SUFFIX}'):
            if other != path:
                other.unlink()
    except OSError as error:
        raise CheckpointError(f'the checkpoint before cannot be deleted: {error}') from error


def _write(directory: Path, path: Path, plain: dict[str, Any], place: Mapping[str, int]) -> None:
    with _create(path) as file:
        torch.save(plain, file)
        file.flush()
        os.fsync(file.fileno())
    summary = {
        'version': VERSION,
        'file': path.name,
        'num_bytes': path.stat().st_size,
        'sha256': _hash(path),
        **place,
    }
    unfinished = directory / f'.{SUMMARY}'
    unfinished.unlink(missing_ok=True)
    with _create(unfinished) as file:
        file.write(json.dumps(summary, indent=2).encode())
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(directory / SUMMARY)


def read_checkpoint(directory: Path) -> dict[str, Any] | None:
    """Read what `write_checkpoint` wrote, nothing of which is executed.

    Returns:
        The state, its tensors on the CPU; None when there is no checkpoint.

    Raises:
        CheckpointError: it is of another version, incomplete or changed.
    """
    try:
        summary = json.loads((directory / SUMMARY).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f'the checkpoint is damaged: {SUMMARY} is no JSON') from error
    if not isinstance(summary, dict) or summary.get('version') != VERSION:
        raise CheckpointError('the checkpoint is of another version of finetuner')
    path = directory / Path(str(summary.get('file'))).name
    if not path.is_file() or path.stat().st_size != summary.get('num_bytes'):
        raise CheckpointError('the checkpoint is damaged: its file is missing or incomplete')
    if _hash(path) != summary.get('sha256'):
        raise CheckpointError('the checkpoint is damaged: its hash differs')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f'the checkpoint cannot be read: {error}') from error


def plain_attributes(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Numbers, flags and tensors that parts of a module keep outside its state dict, by part.

    A memory's place in its queue stands there, or whether a head was fitted.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, part in module.named_modules():
        values = {
            name: value
            for name, value in vars(part).items()
            if isinstance(value, (bool, int, float, torch.Tensor)) and name != 'training'
        }
        if values:
            found[path] = values
    return found


def set_plain_attributes(
    module: torch.nn.Module, attributes: Mapping[str, Mapping[str, Any]], device: torch.device
) -> None:
    """Put back what `plain_attributes` found.

    Args:
        module: made as that one was.
        attributes: its answer.
        device: where tensors go.
    """
    parts = dict(module.named_modules())
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(parts[path], name, value.to(device) if torch.is_tensor(value) else value)


@dataclass(frozen=True)
class TrainingParts:
    """The parts of a training that have a state; see `finetuner.training.trainer.Trainer`."""

    model: torch.nn.Module
    objective: torch.nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    callbacks: Sequence[Any]
    device: torch.device
    # of several processes, the one whose callbacks stand in checkpoints: others do not report
    is_first: bool = True

    def state_dict(self) -> dict[str, Any]:
        """All their states, and that of the random numbers."""
        return {
            'modules': [
                {'state': module.state_dict(), 'attributes': plain_attributes(module)}
                for module in (self.model, self.objective)
            ],
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'scheduler': None if self.scheduler is None else self.scheduler.state_dict(),
            'callbacks': [(type(each).__name__, each.state_dict()) for each in self.callbacks],
            'random': random_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Bring parts that were made in the same way to that state; random numbers stay.

        Raises:
            CheckpointError: those parts were others.
        """
        names = [type(each).__name__ for each in self.callbacks]
        kept = [
            (name, state) for name, state in saved['callbacks'] if self.is_first or name in names
        ]
        if [name for name, _ in kept] != names:
            raise CheckpointError('the checkpoint is of a training with other callbacks')
        try:
            for module, state in zip((self.model, self.objective), saved['modules'], strict=True):
                module.load_state_dict(state['state'])
                set_plain_attributes(module, state['attributes'], self.device)
            for optimizer, state in zip(self.optimizers, saved['optimizers'], strict=True):
                optimizer.load_state_dict(state)
            if self.scheduler is not None:
                self.scheduler.load_state_dict(saved['scheduler'])
            for callback, (_, state) in zip(self.callbacks, kept, strict=True):
                callback.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f'the checkpoint does not fit this training: {error}') from error


def plain_state(value: Any, place: str = 'state') -> Any:
    """A state as it can be written: numbers of NumPy as Python's, parameters as tensors.

    Args:
        value: the state, or a part of it.
        place: where the part stands.

    Raises:
        TypeError: something in it is no plain value; says where.
    """
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: plain_state(item, f'{place}[{key!r}]') for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain_state(item, f'{place}[{i}]') for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(
        f'{place} is a {type(value).__name__}: a checkpoint holds tensors, numbers, texts, None '
        'and lists, tuples and dicts of such'
    )


def _create(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), 'wb')


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
