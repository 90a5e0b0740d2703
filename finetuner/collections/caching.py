"""Caches of collections: written in the background after a save, and before batches are read."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.collections import forks
from finetuner.collections.batches import ImageTrainer
from finetuner.collections.cache import PairRow, count_cached, open_cache, write_cache
from finetuner.collections.place import Store
from finetuner.collections.records import CollectionRecord
from finetuner.collections.tiles import pixels_of
from finetuner.excepts import ConfigError, FinetunerError, NotFoundError

_PAGE = 256
logger = logging.getLogger('finetuner.collections')


class StoredPairs:
    """The pairs of a collection, as its cache is written from them; a page of them in memory.

    Args:
        store: that has them.
        record: of the collection.
    """

    def __init__(self, store: Store, record: CollectionRecord) -> None:
        if record.form is None:
            raise ConfigError(f'collection {record.name!r} has no pairs: feed it some, and save')
        self.key = record.key
        self.revision = record.revision
        self.shape = record.form.shape
        self.dtype = np.dtype(record.form.dtype)
        self.kind = record.kind
        self._store = store
        self._record = record
        self._form = record.form

    def rows(self) -> Iterator[PairRow]:
        """All pairs, in order of id."""
        for pair in self._store.iter_pairs(self._record.id):
            forks.step()
            yield PairRow(pair.id, pair.group, pair.label)

    def read_image(self, pair_id: int) -> np.ndarray:
        """The image of a pair, `[bands, height, width]`.

        Raises:
            NotFoundError: the pair was removed.
        """
        return next(self.read_images([pair_id]))

    def read_images(self, pair_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """The images of several pairs, in this order, each read when it is asked for.

        Args:
            pair_ids: ascending.

        Raises:
            NotFoundError: a pair was removed.
        """
        start = 0
        while start < len(pair_ids):
            wanted = pair_ids[start : start + _PAGE]
            found = self._store.list_pairs(self._record.id, 0, len(wanted), after=wanted[0] - 1)
            asked = set(wanted)
            page = [pair for pair in found if pair.id in asked]
            for pair_id, pair in zip(wanted, page, strict=False):
                if pair.id != pair_id:
                    raise _removed(pair_id)
            if not page:
                raise _removed(wanted[0])
            for pair, data in zip(page, self._store.read_images(self._record, page), strict=True):
                forks.step()
                yield pixels_of(data, pair.encoding, self._form)
            start += len(page)


def _removed(pair_id: int) -> NotFoundError:
    return NotFoundError(f'pair {pair_id} was removed')


def read_batches(
    store: Store, record: CollectionRecord, root: Path, batch_size: int
) -> ImageTrainer:
    """What batches are read from, brought up to date first.

    Args:
        store: that has the collection.
        record: of it.
        root: of all caches.
        batch_size: of the batches.
    """
    write_cache(StoredPairs(store, record), root)
    return ImageTrainer(open_cache(root, record.key), batch_size)


def percent_cached(record: CollectionRecord, root: Path) -> int:
    """How much of a collection its cache holds, 100 only when all of it."""
    if not record.num_pairs:
        return 0
    return min(100, 100 * count_cached(root, record.key) // record.num_pairs)


def forget_cache(root: Path, key: str) -> None:
    """Delete the cache of a collection that was removed; whoever reads it goes on reading."""
    stop_caching(key)
    shutil.rmtree(root / key, ignore_errors=True)


class _Background:
    """A thread that writes the cache of a collection."""

    def __init__(self, key: str, work: Callable[[Callable[[], bool]], Any]) -> None:
        self.key = key
        self._stop = threading.Event()
        self._work = work
        # ends with the process: what is missing is written when batches are asked for
        self._thread = threading.Thread(target=self._run, name=f'caching-{key[:8]}', daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _should_stop(self) -> bool:
        forks.step()
        return self._stop.is_set()

    def _run(self) -> None:
        try:
            with forks.at_work():
                self._work(self._should_stop)
        except (FinetunerError, OSError) as error:
            # nobody waits for it; who asks for batches is told
            logger.warning('the cache of collection %s was not written: %s', self.key, error)


_running: dict[str, _Background] = {}
_running_lock = threading.Lock()


def start_caching(store: Store, record: CollectionRecord, root: Path) -> None:
    """Write the cache of a collection in the background; one that is being written is begun anew.

    Args:
        store: that has the collection.
        record: of it.
        root: of all caches.
    """
    if record.form is None:
        return
    source = StoredPairs(store, record)
    stop_caching(record.key)
    forks.watch_forks()
    with _running_lock:
        _running[record.key] = _Background(
            record.key, lambda should_stop: write_cache(source, root, should_stop=should_stop)
        )


def stop_caching(key: str) -> None:
    """Stop what writes a cache in the background here; what is written stays."""
    with _running_lock:
        found = _running.pop(key, None)
    if found is not None:
        found.stop()


def stop_all_caching() -> None:
    """Stop whatever this process writes in the background, as at its end."""
    for key in list(_running):
        stop_caching(key)


def _forget() -> None:
    global _running_lock
    _running_lock = threading.Lock()
    # it is the parent that goes on with them
    _running.clear()


atexit.register(stop_all_caching)
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget)
