"""Documents that are more than memory: sequences that read each Document when it is asked for.

What stays in memory is where each Document stands: 8 bytes a Document in one numpy array, which
forked loader workers share and never copy. `StoredDocuments` reads the files of
`finetuner.data.stored.storing`; `finetuner.data.stored.sqlite` reads docarray's SQLite storage.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.stored.lazy import DocumentsView, LazyDocuments
from finetuner.data.stored.protobuf import decode_record
from finetuner.data.stored.sqlite import SQLiteDocuments
from finetuner.data.stored.storing import (
    HEADER_BYTES,
    LENGTH_BYTES,
    bytes_follow,
    cut_short,
    read_header,
    stream_documents,
)
from finetuner.excepts import DataError

__all__ = [
    'DocumentsView',
    'LazyDocuments',
    'SQLiteDocuments',
    'StoredDocuments',
    'spool_documents',
]

_BLOCK_BYTES = 1 << 20
# Records longer than this are hopped over when a file is scanned: only their lengths are read.
_LONG_RECORD_BYTES = 1 << 14
_SEEK_LOCK = threading.Lock()


class StoredDocuments(LazyDocuments):
    """The Documents of a file that `save_documents` wrote, or docarray with protobuf.

    Any number of threads and forked processes may read one object at once: a read says where it
    starts (`os.pread`), so that nobody moves anybody's place. A memory map would do as much, but
    every page read through it counts in the resident set of the process.

    The file stays open: one that was replaced under its name, as `save_documents` does it, is read
    as it was. One that was written into is refused. The object pickles by the file's path.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file and note where each Document starts; none is decoded yet.

        Args:
            path: of the file; its name and ending mean nothing.

        Raises:
            DataError: the file is something else, or cut short. Nothing in it is ever unpickled.
            OSError: there is no such file, or it cannot be read.
        """
        self._open(os.path.abspath(path))

    def _open(self, path: str, temporary: bool = False) -> None:
        self._path = path
        # Not a file object: its one place in the file would be shared with forked processes.
        flags = os.O_RDONLY | getattr(os, 'O_BINARY', 0) | getattr(os, 'O_CLOEXEC', 0)
        self._descriptor = os.open(path, flags)
        self._release = weakref.finalize(
            self, _release, self._descriptor, path if temporary else None, os.getpid()
        )
        try:
            self._state = self._file_state()
            self._offsets = _scan(self._descriptor, self._state[0], path)
        except BaseException:
            self._release()
            raise

    @property
    def path(self) -> str:
        """The absolute path of the file."""
        return self._path

    @property
    def nbytes(self) -> int:
        """Bytes of memory that grow with the number of Documents."""
        return self._offsets.nbytes

    @property
    def largest(self) -> int:
        """Bytes of the largest Document as it is stored; 0 where there is none."""
        return int(np.diff(self._offsets).max(initial=0))

    def __len__(self) -> int:
        """Return how many Documents the file holds."""
        return len(self._offsets) - 1

    def close(self) -> None:
        """Close the file; reading from it afterwards is an error. Views of it close with it."""
        self._release()

    def __enter__(self) -> StoredDocuments:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the path, and what shows that it is still the same file."""
        return {'path': self._path, 'state': self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again."""
        self._open(state['path'])
        if self._state != tuple(state['state']):
            self.close()
            raise self._changed()

    def _read(self, position: int) -> Document:
        start, end = int(self._offsets[position]), int(self._offsets[position + 1])
        return self._decode(self._read_bytes(start, end), 0, end - start, position)

    def _read_run(self, start: int, stop: int) -> Iterator[Document]:
        offsets = self._offsets
        while start < stop:
            block_end = offsets[start] + _BLOCK_BYTES
            # The last Document that ends within the block, and one at least.
            end = int(np.searchsorted(offsets[start : stop + 1], block_end, 'right')) - 1 + start
            end = max(end, start + 1)
            places = (offsets[start : end + 1] - offsets[start]).tolist()
            block = self._read_bytes(int(offsets[start]), int(offsets[end]))
            for number in range(end - start):
                yield self._decode(block, places[number], places[number + 1], start + number)
            start = end

    def _decode(self, block: bytes, start: int, end: int, position: int) -> Document:
        record = block[start + LENGTH_BYTES : end]
        if int.from_bytes(block[start : start + LENGTH_BYTES], 'big') != len(record):
            raise self._changed()
        return decode_record(record, position, repr(self._path))

    def _read_bytes(self, start: int, end: int) -> bytes:
        if not self._release.alive:
            raise DataError(f'{self._path!r} was closed: its Documents can be read no more')
        block = _read_at(self._descriptor, end - start, start)
        # After reading, so that a change in between is noticed too.
        if self._file_state() != self._state:
            raise self._changed()
        return block

    def _file_state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _changed(self) -> DataError:
        return DataError(
            f'{self._path!r} was changed since it was opened: open it again, and replace files in '
            'use (as `save_documents` does) instead of writing into them'
        )


def spool_documents(
    docs: Iterable[Document], directory: str | Path | None = None
) -> StoredDocuments:
    """Write Documents to a temporary file, one at a time, and read them from there.

    Args:
        docs: read once, to the end.
        directory: where the file goes; None for the system's place for such files.

    Returns:
        The Documents. Their file is removed when the object is closed or collected, by the
        process that called this and no other: forked processes go on reading.

    Raises:
        DataError: an element is no Document or cannot be written; its position is named.
        OSError: the file cannot be written.
    """
    descriptor, path = tempfile.mkstemp(prefix='finetuner-', suffix='.docs', dir=directory)
    with ExitStack() as on_failure:
        on_failure.callback(Path(path).unlink, missing_ok=True)
        with os.fdopen(descriptor, 'w+b') as file:
            stream_documents(docs, file)
        spooled = StoredDocuments.__new__(StoredDocuments)
        spooled._open(os.path.abspath(path), temporary=True)
        on_failure.pop_all()
    return spooled


def _release(descriptor: int, temporary: str | None, owner: int) -> None:
    os.close(descriptor)
    if temporary is not None and os.getpid() == owner:
        Path(temporary).unlink(missing_ok=True)


def _scan(descriptor: int, num_bytes: int, path: str) -> NDArray[np.int64]:
    """Return where each record starts, its length included, and where the last one ends.

    Reads ahead in large blocks while records are short, and little else than the lengths of long
    ones.
    """
    num_docs = read_header(_read_at(descriptor, HEADER_BYTES, 0), num_bytes, path)
    offsets = array('q', bytes(8 * (num_docs + 1)))
    at = block_start = HEADER_BYTES
    block = b''
    for position in range(num_docs):
        offsets[position] = at
        place = at - block_start
        if place + LENGTH_BYTES > len(block):
            short = at <= position * _LONG_RECORD_BYTES or position == 0
            block = _read_at(descriptor, _BLOCK_BYTES if short else LENGTH_BYTES, at)
            block_start, place = at, 0
            if len(block) < LENGTH_BYTES:
                raise cut_short(path, position, num_docs)
        at += LENGTH_BYTES + int.from_bytes(block[place : place + LENGTH_BYTES], 'big')
        if at > num_bytes:
            raise cut_short(path, position, num_docs)
    if at < num_bytes:
        raise bytes_follow(path, num_bytes - at)
    offsets[num_docs] = at
    places = np.frombuffer(offsets, dtype=np.int64)
    places.flags.writeable = False
    return places


def _seek_and_read(descriptor: int, length: int, start: int) -> bytes:
    """Do what `os.pread` does, where there is none: threads take turns."""
    with _SEEK_LOCK:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, length)


_read_at: Callable[[int, int, int], bytes] = getattr(os, 'pread', _seek_and_read)
