"""Packs: files that hold the images of many pairs one after the other, written once and only read then.

A file for each image would be a hundred thousand of them, and a row of a database for each a
database of their size.
"""

from __future__ import annotations

import os
import threading
import uuid
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from finetuner.excepts import DataError, NotFoundError
from finetuner.storage.files import FileStore

PACK_BYTES = 256 << 20
_MOST_OPEN = 64


@dataclass(frozen=True)
class Place:
    """Where a record lies.

    Attributes:
        pack: name of its file.
        offset: of its first byte.
        num_bytes: of it.
        checksum: CRC-32 of it.
    """

    pack: str
    offset: int
    num_bytes: int
    checksum: int


class PackWriter:
    """Writes records into packs of a directory, a new one whenever one is full.

    Args:
        directory: exists; what is written there belongs to the caller.
        pack_bytes: after which a pack is full.
    """

    def __init__(self, directory: Path, pack_bytes: int = PACK_BYTES) -> None:
        self._directory = directory
        self._pack_bytes = pack_bytes
        self._file: int | None = None
        self._name = ''
        self._offset = 0

    def write(self, record: bytes) -> Place:
        """Append a record; it is on its way to the disk, and there after `close`."""
        if self._file is None:
            self._name = f'{uuid.uuid4().hex}.pack'
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            self._file = os.open(self._directory / self._name, flags, 0o600)
            self._offset = 0
        view = memoryview(record)
        while view:
            # what a full disk left is written over by nothing: its place is known to nobody
            written = os.pwrite(self._file, view, self._offset + len(record) - len(view))
            view = view[written:]
        place = Place(self._name, self._offset, len(record), zlib.crc32(record))
        self._offset += len(record)
        if self._offset >= self._pack_bytes:
            self.close()
        return place

    def close(self) -> None:
        """Bring what was written to the disk; the next record begins a new pack."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file)
            finally:
                os.close(file)


class PackReader:
    """Reads records of a collection, from any thread.

    Args:
        files: that hold the packs.
        folder: in which they are there.
    """

    def __init__(self, files: FileStore, folder: str) -> None:
        self._files = files
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()
        self._process = os.getpid()
        self._lock = threading.Lock()

    def read(self, place: Place) -> bytes:
        """The bytes of a record.

        Raises:
            DataError: they are not there any more, or not what was written.
        """
        data = self._read(place)
        if len(data) != place.num_bytes or zlib.crc32(data) != place.checksum:
            raise DataError(
                f'{place.num_bytes:,} bytes at {place.offset:,} of {self._folder}/{place.pack} are '
                'not what was written there: the file is damaged'
            )
        return data

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        """Close all files."""
        if getattr(self, '_open', None) and self._process == os.getpid():
            self.close()

    def _read(self, place: Place) -> bytes:
        # the lock is held while reading: nobody closes the file meanwhile
        with self._lock:
            if place.pack not in self._open:
                if len(self._open) >= _MOST_OPEN:
                    os.close(self._open.popitem(last=False)[1])
                self._open[place.pack] = self._opened(place.pack)
            self._open.move_to_end(place.pack)
            return os.pread(self._open[place.pack], place.num_bytes, place.offset)

    def _opened(self, pack: str) -> int:
        try:
            return os.open(self._files.local_path(f'{self._folder}/{pack}'), os.O_RDONLY)
        except (NotFoundError, FileNotFoundError) as error:
            raise DataError(
                f'the images of {self._folder}/{pack} are not there any more: the collection was '
                'removed'
            ) from error
