"""Writing a cache: one at a time, and only what is missing."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetuner.collections.cache.disk import (
    Descriptor,
    cache_directory,
    clear_mark,
    clear_stray_marks,
    clear_unfinished,
    is_marked,
    remove,
    remove_unless_held,
)
from finetuner.collections.cache.packing import ChunkForm, DamagedImageError, Packed, pack, unpack
from finetuner.collections.cache.parts import Part, list_parts, place, write_part
from finetuner.collections.cache.reading import read_parts
from finetuner.collections.cache.source import PairSource
from finetuner.collections.cache.tables import (
    About,
    PairList,
    Table,
    list_tables,
    read_pairs,
    write_table,
)
from finetuner.collections.threads import in_order, num_threads
from finetuner.excepts import DataError
from finetuner.storage.database import make_private_directory

ProgressFn = Callable[[int, int], None]
StopFn = Callable[[], bool]

logger = logging.getLogger('finetuner.collections')

_LOCK_NAME = '.writing.lock'
_LOCK_SECONDS = 0.2
_MOST_BYTES_AHEAD = 64 << 20


def write_cache(
    source: PairSource,
    root: str | Path,
    *,
    on_progress: ProgressFn | None = None,
    should_stop: StopFn | None = None,
) -> bool:
    """Bring the cache of a collection up to a revision: images that are there are kept.

    Who finds another writer at work waits. A writer may be killed at any moment; the next one goes on
    where it was.

    Args:
        source: of the pairs; read in this thread.
        root: of all caches.
        on_progress: called with the number of images that are safely there and the number of all,
            at the beginning and after each file.
        should_stop: asked before each image.

    Returns:
        Whether the cache is whole; False if `should_stop` said so before.

    Raises:
        DataError: what the source gives is no collection.
        ConfigError: its key is none.
        OSError: the files cannot be written.
    """
    directory = cache_directory(root, source.key)
    bands, height, width = map(int, source.shape)
    form = ChunkForm((bands, height, width), np.dtype(source.dtype).newbyteorder('='))
    should_stop = should_stop or _never
    make_private_directory(directory)
    with _sole_writer(directory, should_stop) as is_alone:
        if not is_alone:
            return False
        clear_unfinished(directory)
        newest = _newest_usable(directory)
        if newest is not None and newest.about.revision >= source.revision:
            if on_progress is not None:
                on_progress(len(newest.ids), len(newest.ids))
        else:
            with read_pairs(source, directory) as pairs:
                writing = _Writing(source, directory, form, pairs, on_progress, should_stop)
                if not writing.run():
                    return False
        _clean(directory)
        return True


def remove_unused(directory: Path) -> bool:
    """Remove a cache, unless somebody writes it or reads it.

    Returns:
        Whether it was removed here.
    """
    try:
        with _sole_writer(directory, _always) as is_alone:
            if not is_alone:
                return False
            for name in list_tables(directory):
                if not remove_unless_held(directory / str(name)):
                    return False
            shutil.rmtree(directory)
    except FileNotFoundError:
        # somebody else was quicker
        return False
    return True


class _Writing:
    """One writer at work."""

    def __init__(
        self,
        source: PairSource,
        directory: Path,
        form: ChunkForm,
        pairs: PairList,
        on_progress: ProgressFn | None,
        should_stop: StopFn,
    ) -> None:
        self._source = source
        self._directory = directory
        self._form = form
        self._pairs = pairs
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._was_stopped = False
        self._about = About(source.key, source.revision, form, source.kind, pairs.groups)

    def run(self) -> bool:
        """Write all that is missing; whether that was finished."""
        _set_aside_damaged(self._directory, self._form)
        parts = read_parts(self._directory, self._form)
        numbers, rows = place(self._pairs.ids, parts)
        is_missing = numbers < 0
        if is_missing.any():
            # from now on its images are counted, and read where no revision was ever whole
            write_table(self._directory, self._about, self._pairs)
            _clean(self._directory)
        is_kept = self._choose_kept(parts, numbers)
        to_write = np.flatnonzero(is_missing | ~np.append(is_kept, False)[numbers])
        self._tell(num_there := int((~is_missing).sum()))
        images = self._images(parts, self._pairs.ids[to_write], numbers[to_write], rows[to_write])
        written: list[Part] = []
        with closing(in_order(self._pack, images, self._num_ahead())) as packed:
            while (part := self._write_part(packed)) is not None:
                written.append(part)
                now, to_write = to_write[: len(part)], to_write[len(part) :]
                self._tell(num_there := num_there + int(is_missing[now].sum()))
        if self._was_stopped:
            return False
        parts = [part for part, keeps in zip(parts, is_kept, strict=True) if keeps] + written
        sizes = tuple((part.path.name, part.path.stat().st_size) for part in parts)
        about = dataclasses.replace(self._about, parts=sizes)
        write_table(self._directory, about, self._pairs, place(self._pairs.ids, parts))
        return True

    def _choose_kept(self, parts: list[Part], numbers: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which parts stay as they are; the images that are wanted of the others are written anew.

        Those stay of which half or more is wanted. Where images are written anyway, it has to be half
        of what a part may hold, so that a collection that grows by little has no crowd of parts.
        """
        wanted = np.bincount(numbers[numbers >= 0], minlength=len(parts))
        held = np.array([len(part) for part in parts], np.int64)
        is_full = 2 * wanted >= held
        if (numbers < 0).any() or (wanted[~is_full] > 0).any():
            is_full &= 2 * wanted >= self._form.images_per_part
        return is_full & (wanted > 0)

    def _write_part(self, images: Iterator[tuple[int, Packed]]) -> Part | None:
        most = self._form.images_per_part
        path = write_part(self._directory, self._form, islice(images, most), most)
        return None if path is None else Part(path, self._form)

    def _images(
        self,
        parts: list[Part],
        ids: NDArray[np.int64],
        numbers: NDArray[np.int32],
        rows: NDArray[np.int32],
    ) -> Iterator[tuple[int, Packed | np.ndarray]]:
        """Images until it is to stop: as the source gives them, or as a part has them."""
        missing = self._source.read_images(ids[numbers < 0].tolist())
        for pair_id, number, row in zip(ids.tolist(), numbers, rows, strict=True):
            if self._should_stop():
                self._was_stopped = True
                return
            if number < 0:
                yield pair_id, next(missing)
                continue
            packed = self._copy(parts[number], int(row))
            yield pair_id, self._source.read_image(pair_id) if packed is None else packed

    def _copy(self, part: Part, row: int) -> Packed | None:
        packed = part.packed(row, Descriptor(part.path))
        try:
            unpack(packed, self._form)
        except DamagedImageError:
            return None
        return packed

    def _pack(self, item: tuple[int, Packed | np.ndarray]) -> tuple[int, Packed]:
        pair_id, image = item
        return pair_id, image if isinstance(image, Packed) else pack(image, self._form)

    def _num_ahead(self) -> int:
        return min(2 * num_threads(), max(1, _MOST_BYTES_AHEAD // self._form.num_bytes))

    def _tell(self, num_there: int) -> None:
        if self._on_progress is not None:
            self._on_progress(num_there, len(self._pairs.ids))


@contextmanager
def _sole_writer(directory: Path, should_stop: StopFn) -> Iterator[bool]:
    """Wait until no other process or thread writes; whether that came before it is to stop."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory / _LOCK_NAME)
    while True:
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
            break
        except Timeout:
            if should_stop():
                yield False
                return
    try:
        yield True
    finally:
        lock.release()


def _newest_usable(directory: Path) -> Table | None:
    """The newest table of a whole revision, if all that it names is there."""
    names = [name for name in list_tables(directory) if name.is_whole]
    if not names:
        return None
    try:
        table = Table(directory / str(names[-1]))
    except DataError:
        return None
    return table if table.is_usable() else None


def _set_aside_damaged(directory: Path, form: ChunkForm) -> None:
    """Look at the parts that readers found damaged; what is still marked then counts no more."""
    for path in list_parts(directory, with_damaged=True):
        if is_marked(path):
            try:
                is_whole = Part(path, form).is_whole()
            except DataError:
                is_whole = False
            if is_whole:
                clear_mark(path)
            else:
                logger.warning('%s is damaged: its images are written anew', path)


def _clean(directory: Path) -> None:
    """Remove what belongs to no revision that is newest or read by somebody."""
    names = list_tables(directory)
    newest = {max(names, key=lambda name: (name.is_whole, name)), names[-1]}
    left = [
        name for name in names if name in newest or not remove_unless_held(directory / str(name))
    ]
    if not all(name.is_whole for name in left):
        # it may want any of the parts
        return
    wanted: set[str] = set()
    for name in left:
        try:
            wanted.update(part for part, _ in Table(directory / str(name)).about.parts or ())
        except DataError:
            return
    for path in list_parts(directory, with_damaged=True):
        if path.name not in wanted:
            remove(path)
    clear_stray_marks(directory)


def _never() -> bool:
    return False


def _always() -> bool:
    return True
