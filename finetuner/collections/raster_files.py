"""Files of rasters, each open once for every thread that reads it at a moment."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from finetuner.collections.raster_formats import (
    gdal_errors,
    header_of,
    local_path,
    open_dataset,
    options_of,
)
from finetuner.excepts import DataError

# rasters whose files stay open though nobody is reading them; a process may have 1024 files open
_MOST_IDLE = 128

# Of everything below. Held while the process forks, and only taken then when nobody reads: a child
# must not find GDAL's own locks held by threads that it does not have.
_TURN = threading.Condition(threading.RLock())
_READING: set[int] = set()
_FORKING: list[int] = []
# the files that are open and not being read, longest unused first
_IDLE: OrderedDict[int, weakref.ref[RasterFile]] = OrderedDict()
# What the parent opened shares its place in the file with the child, where it is neither read nor
# closed.
_INHERITED: list[Any] = []


class RasterFile:
    """A local raster that several threads and processes read at once.

    Each of them reads through an opened file of its own, which stays open for the next. It pickles
    by its path and by what tells whether the file was changed since.

    Attributes:
        path: of the file, absolute.
        header: what the file said when it was opened first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a raster; no pixel is read.

        Args:
            path: of a local file.

        Raises:
            DataError: there is no such file, or it is no raster that is read here.
        """
        self.path = local_path(path)
        self._state = _state_of(self.path)
        self._idle: list[Any] = []
        self._closed = False
        with self._lent() as dataset:
            self.header = header_of(dataset, self.path)
        self._check_unchanged()

    def read(
        self, bands: tuple[int, ...], column: int, row: int, height: int, width: int
    ) -> np.ndarray:
        """Pixels of a part of the raster, which must be within it.

        Args:
            bands: their numbers, from 1.
            column: of the left edge.
            row: of the upper edge.
            height: pixels.
            width: pixels.

        Returns:
            `[len(bands), height, width]` in the dtype of the bands, native byte order.

        Raises:
            DataError: the file is damaged, was changed, is gone or was closed.
        """
        from rasterio.windows import Window

        try:
            with self._lent() as dataset:
                pixels = dataset.read(list(bands), window=Window(column, row, width, height))
        except gdal_errors() as error:
            self._check_unchanged()
            raise DataError(
                f'columns {column} to {column + width - 1}, rows {row} to {row + height - 1} of '
                f'{self.path!r} cannot be read: the file is damaged or incomplete '
                f'({error.__cause__ or error})'
            ) from error
        # After reading, so that a change in between is noticed too.
        self._check_unchanged()
        return pixels

    def close(self) -> None:
        """Close the file; it is read no more."""
        with _TURN:
            self._closed = True
            idle, self._idle = self._idle, []
            for dataset in idle:
                _IDLE.pop(id(dataset), None)
        for dataset in idle:
            dataset.close()

    @property
    def identity(self) -> tuple[Any, ...]:
        """What two files that give the same pixels have in common."""
        return self.path, self._state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_idle': []}

    @contextmanager
    def _lent(self) -> Iterator[Any]:
        """An open dataset that no other thread has until the block ends."""
        with _reading():
            dataset = self._taken()
            if dataset is None:
                self._check_unchanged()
                dataset = open_dataset(self.path)
            try:
                with options_of(dataset):
                    yield dataset
            except BaseException:
                dataset.close()
                raise
            self._keep(dataset)

    def _taken(self) -> Any | None:
        with _TURN:
            if self._closed:
                raise DataError(f'{self.path!r} was closed: open the raster again')
            if not self._idle:
                return None
            dataset = self._idle.pop()
            del _IDLE[id(dataset)]
            return dataset

    def _keep(self, dataset: Any) -> None:
        with _TURN:
            if self._closed:
                dataset.close()
                return
            self._idle.append(dataset)
            _IDLE[id(dataset)] = weakref.ref(self)
            while len(_IDLE) > _MOST_IDLE:
                number, owner = _IDLE.popitem(last=False)
                _close_idle(owner(), number)

    def _check_unchanged(self) -> None:
        if _state_of(self.path) != self._state:
            raise DataError(
                f'{self.path!r} was changed since it was opened: open the raster again, and leave '
                'its file as it is while it is in use'
            )


def _close_idle(owner: RasterFile | None, number: int) -> None:
    for position, dataset in enumerate(owner._idle if owner else ()):
        if id(dataset) == number:
            del owner._idle[position]  # type: ignore[union-attr]
            dataset.close()
            return


@contextmanager
def _reading() -> Iterator[None]:
    """While in here, no other thread forks."""
    thread = threading.get_ident()
    with _TURN:
        while _FORKING:
            _TURN.wait()
        _READING.add(thread)
    try:
        yield
    finally:
        with _TURN:
            _READING.discard(thread)
            _TURN.notify_all()


def _before_fork() -> None:
    _TURN.acquire()
    thread = threading.get_ident()
    _FORKING.append(thread)
    while _READING - {thread}:
        _TURN.wait()


def _after_fork_in_parent() -> None:
    _FORKING.remove(threading.get_ident())
    _TURN.notify_all()
    _TURN.release()


def _after_fork_in_child() -> None:
    _FORKING.clear()
    for owner in {owner() for owner in _IDLE.values()} - {None}:
        _INHERITED.extend(owner._idle)  # type: ignore[union-attr]
        owner._idle = []  # type: ignore[union-attr]
    _IDLE.clear()
    _TURN.release()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


def _state_of(path: str) -> tuple[int, int]:
    """Size and time of the last change.

    Raises:
        DataError: there is no such file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f'there is no file {path!r}') from error
    except OSError as error:
        raise DataError(f'file {path!r} cannot be opened: {error.strerror}') from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f'{path!r} is no regular file: a raster is one file')
    return status.st_size, status.st_mtime_ns
