"""Reading a cache: images and labels by position, from threads and processes at once."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetuner.collections.cache.disk import Descriptor, cache_directory, hold
from finetuner.collections.cache.packing import ChunkForm
from finetuner.collections.cache.parts import Part, list_parts, place
from finetuner.collections.cache.tables import Table, TableName, list_tables
from finetuner.collections.geometry import Frame
from finetuner.excepts import DataError, NotFoundError

# the files of images that a reader keeps open
_MOST_OPEN = 64
# writers replace files while readers choose one
_TRIES = 10


def open_cache(root: str | Path, key: str) -> OpenCache:
    """Open the cache of a collection as it is now: its newest revision that is whole.

    Where none was ever whole, the pairs whose images are there. What is written afterwards is not
    seen, and what is open stays readable.

    Args:
        root: of all caches.
        key: of the collection.

    Raises:
        NotFoundError: the collection has none.
        DataError: it is damaged.
    """
    directory = cache_directory(root, key)
    for _ in range(_TRIES):
        names = list_tables(directory)
        if not names:
            break
        newest = max(names, key=lambda name: (name.is_whole, name))
        try:
            cache = OpenCache(directory, newest)
            # it says when it was last used
            with suppress(OSError):
                os.utime(directory)
            return cache
        except FileNotFoundError:
            continue
    raise NotFoundError(f'collection {key} has no cache in {directory.parent}: write one first')


def count_cached(root: str | Path, key: str) -> int:
    """How many pairs of the newest revision that was begun have their image in the cache.

    Args:
        root: of all caches.
        key: of the collection.
    """
    directory = cache_directory(root, key)
    for _ in range(_TRIES):
        names = list_tables(directory)
        if not names:
            return 0
        try:
            with OpenCache(directory, names[-1]) as cache:
                return len(cache)
        except FileNotFoundError:
            continue
        except DataError:
            # the next writer finds out what of it is left
            return 0
    return 0


class OpenCache:
    """One revision of a collection, read from its cache. It pickles by its path.

    A pair is named by its position, from 0 in order of id, which is the same in each process that
    opened the same files.

    Attributes:
        directory: of the cache.
        revision: of the collection.
        is_whole: whether all images are there.
        kind: of the labels.
        shape: `(bands, height, width)` of all images.
        dtype: of all images.
        groups: names of the groups that have pairs.
        ids: `[n]` int64, of the pair at each position, those without an image included.
    """

    def __init__(self, directory: Path, name: TableName) -> None:
        """Open the files of one revision.

        Raises:
            FileNotFoundError: they are not there any more.
            DataError: they are damaged.
        """
        self.directory = directory
        self._name = name
        path = directory / str(name)
        self._labels: Descriptor | None = hold(path)
        self._table = table = Table(path)
        about = table.about
        self.revision = about.revision
        self.is_whole = name.is_whole
        self.kind = about.kind
        self.shape = about.form.shape
        self.dtype = about.form.dtype
        self.ids = table.ids
        self._form = about.form
        self._frame = Frame(self.shape[1], self.shape[2])
        self._parts: list[Part | None]
        if about.parts is None:
            parts = read_parts(directory, about.form)
            self._part_numbers, self._part_rows = place(table.ids, parts)
            self._part_paths = [part.path for part in parts]
            self._parts = list(parts)
        else:
            self._part_numbers, self._part_rows = table.part_numbers, table.part_rows
            self._part_paths = [directory / name for name, _ in about.parts]
            self._parts = [None] * len(about.parts)
        self._open: dict[int, Descriptor] = {}
        is_there = self._part_numbers >= 0
        self._positions = {
            group: np.flatnonzero(is_there & (table.group_numbers == number))
            for number, group in enumerate(about.groups)
        }
        self.groups = tuple(group for group, found in self._positions.items() if len(found))

    def __len__(self) -> int:
        """How many pairs can be read."""
        return sum(map(len, self._positions.values()))

    def positions(self, group: str) -> NDArray[np.int64]:
        """Positions of the pairs of a group whose images are there, `[n]` int64, rising.

        Args:
            group: its name; one that has no pairs has no positions.
        """
        return self._positions.get(group, np.zeros(0, np.int64))

    def read_image(self, position: int) -> np.ndarray:
        """An image, `[bands, height, width]`; it may be read-only.

        Args:
            position: of its pair.

        Raises:
            DataError: it is damaged, not there, or the cache was closed.
        """
        number = int(self._part_numbers[position])
        if number < 0:
            raise DataError(f'the image of pair {self.ids[position]} was not written yet')
        # found without a lock, nearly always
        file = self._open.get(number)
        part = self._parts[number]
        if file is None or part is None:
            part, file = self._open_part(number)
        return part.read(int(self._part_rows[position]), file)

    def read_label(self, position: int) -> Any:
        """A label, in the form of its kind.

        Args:
            position: of its pair.

        Raises:
            DataError: it is damaged, or the cache was closed.
        """
        file = self._labels
        if file is None:
            raise self._was_closed()
        return self.kind.decode(self._table.read_label(position, file), self._frame)

    def _open_part(self, number: int) -> tuple[Part, Descriptor]:
        # Without a lock, which a process forked meanwhile would find taken for ever: two threads may
        # open the same part, and one of both is forgotten.
        path = self._part_paths[number]
        if self._labels is None:
            raise self._was_closed()
        try:
            part = self._parts[number]
            if part is None:
                part = self._parts[number] = Part(path, self._form)
            file = Descriptor(path)
        except FileNotFoundError:
            raise DataError(
                f'{path} is gone: open the cache again, and leave its files to finetuner'
            ) from None
        for oldest in list(self._open)[: 1 - _MOST_OPEN]:
            # who reads from it at this moment holds it open
            self._open.pop(oldest, None)
        self._open[number] = file
        return part, file

    def close(self) -> None:
        """Let the files go; reading afterwards is an error."""
        self._labels = None
        self._open.clear()

    def __enter__(self) -> OpenCache:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the files go."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the same files again."""
        return _open_again, (self.directory, self._name)

    def _was_closed(self) -> DataError:
        return DataError(f'the cache in {self.directory} was closed: open it again')


def read_parts(directory: Path, form: ChunkForm) -> list[Part]:
    """All parts of a cache that can be read, those that hold most first."""
    parts = []
    for path in list_parts(directory):
        try:
            parts.append(Part(path, form))
        except (FileNotFoundError, DataError):
            # gone meanwhile, or damaged and marked so
            continue
    return parts


def _open_again(directory: Path, name: TableName) -> OpenCache:
    try:
        return OpenCache(directory, name)
    except FileNotFoundError:
        raise DataError(
            f'{directory / str(name)} is gone: keep the cache open while other processes read it'
        ) from None
