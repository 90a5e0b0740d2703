"""Names of a cache's files, and how they come, are held and go."""

from __future__ import annotations

import fcntl
import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.excepts import ConfigError, DataError

if TYPE_CHECKING:
    import h5py

# The first HDF5 whose chunk indexes have checksums: files can be read by it and all later ones.
_LIBVER = ('v110', 'v110')
# what h5py raises where a file is none, ends early or was changed
_UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
_KEY = re.compile(r'[0-9a-f]{1,128}')
_UNFINISHED = '.unfinished-'
_DAMAGED = '.damaged'


class Descriptor:
    """An open file, read by place: threads and forked processes may share it.

    It is closed when nobody holds the object any more, so never while somebody reads.
    """

    def __init__(self, path: Path) -> None:
        """Open a file for reading.

        Raises:
            OSError: it cannot be opened.
        """
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        """Close it."""
        if self.number >= 0:
            os.close(self.number)


def cache_directory(root: str | Path, key: str) -> Path:
    """Where the cache of a collection is.

    Args:
        root: of all caches.
        key: of the collection.

    Raises:
        ConfigError: the key is none.
    """
    if not _KEY.fullmatch(key):
        raise ConfigError(f'{key!r} names no collection: a key is made of the digits 0-9 and a-f')
    return Path(os.path.abspath(root)) / key


class NewFile(io.RawIOBase):
    """A file that HDF5 writes to. An error is kept until somebody asks for it.

    HDF5 cannot close a file that it cannot write all of, as on a full disk: then it keeps the file, and
    may crash later. So it is told that all is well.
    """

    def __init__(self, path: Path) -> None:
        """Make the file.

        Raises:
            OSError: it cannot be made.
        """
        super().__init__()
        self._file = path.open('xb+', buffering=0)
        self._error: OSError | None = None

    def check(self) -> None:
        """Say what went wrong.

        Raises:
            OSError: something could not be written.
        """
        if self._error is not None:
            raise self._error

    def sync(self) -> None:
        """Bring all to the disk.

        Raises:
            OSError: something could not be written, now or before.
        """
        self.check()
        os.fsync(self._file.fileno())

    def write(self, data: Any) -> int:
        """Write some, or what can be written of it."""
        if self._error is None:
            try:
                return self._file.write(data) or 0
            except OSError as error:
                self._error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Make the file that long."""
        if self._error is None:
            try:
                return self._file.truncate(size)
            except OSError as error:
                self._error = error
        return size or 0

    def readinto(self, room: Any) -> int:
        """Read some."""
        return self._file.readinto(room) or 0

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Go somewhere."""
        return self._file.seek(place, whence)

    def tell(self) -> int:
        """Where it is."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class NewHDF5:
    """An HDF5 file that is being written.

    Attributes:
        file: what to write to.
        name: what it will be called; without a name, nothing is kept.
    """

    def __init__(self, file: h5py.File, raw: NewFile, name: str | None) -> None:
        """Note all."""
        self.file = file
        self.name = name
        self.check = raw.check


@contextmanager
def new_hdf5(directory: Path, name: str | None = None) -> Iterator[NewHDF5]:
    """An HDF5 file to write, there under its name when the block ends well and not before.

    What a killed process left of it, `clear_unfinished` removes.

    Args:
        directory: where to.
        name: of the file; may be set on what is yielded.

    Raises:
        OSError: something could not be written.
    """
    import h5py

    path = directory / f'{_UNFINISHED}{secrets.token_hex(8)}'
    try:
        with closing(NewFile(path)) as raw:
            with h5py.File(raw, 'w', libver=_LIBVER) as file:
                new = NewHDF5(file, raw, name)
                yield new
            raw.sync()
        if new.name is not None:
            path.rename(directory / new.name)
            _sync_directory(directory)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def read_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to read, which must not be damaged; if it is, the next writer is told.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it cannot be read now.
        DataError: it is damaged, or what the block expects of it is not there.
    """
    import h5py

    try:
        with h5py.File(path, 'r', locking=False) as file:
            yield file
    except _UNREADABLE as error:
        # what the system says, of too many open files for one, says nothing about the file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> DataError:
    """What is said of a file that is not what was written; the next writer is told."""
    with suppress(OSError):
        _mark_of(path).touch()
    return DataError(
        f'{path} is damaged: {why}. The next time that the cache of its collection is written, this '
        'file is written anew'
    )


def clear_unfinished(directory: Path) -> None:
    """Remove what killed writers left; for who holds the lock."""
    for path in directory.glob(f'{_UNFINISHED}*'):
        path.unlink(missing_ok=True)


def is_marked(path: Path) -> bool:
    """Whether a reader found a file damaged."""
    return _mark_of(path).exists()


def clear_mark(path: Path) -> None:
    """Take the word back."""
    _mark_of(path).unlink(missing_ok=True)


def clear_stray_marks(directory: Path) -> None:
    """Remove what was said of files that are gone."""
    for mark in directory.glob(f'*{_DAMAGED}'):
        if not mark.with_name(mark.name.removesuffix(_DAMAGED)).exists():
            mark.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, and what was said of it."""
    path.unlink(missing_ok=True)
    clear_mark(path)


def hold(path: Path) -> Descriptor:
    """Open a file that is not removed, by `remove_unless_held`, while the descriptor is open.

    Raises:
        FileNotFoundError: it is not there, or not any more.
    """
    descriptor = Descriptor(path)
    # file systems without locks cannot hold anything: there a reader may have to open anew
    with suppress(OSError):
        fcntl.flock(descriptor.number, fcntl.LOCK_SH)
    if os.fstat(descriptor.number).st_nlink == 0:
        raise FileNotFoundError(f'{path} was removed meanwhile')
    return descriptor


def remove_unless_held(path: Path) -> bool:
    """Remove a file that nobody reads.

    Returns:
        Whether it is gone.
    """
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        # file systems without locks say so with another error: there nothing can be held
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        remove(path)
    finally:
        os.close(handle)
    return True


def _mark_of(path: Path) -> Path:
    return path.with_name(f'{path.name}{_DAMAGED}')


def _sync_directory(path: Path) -> None:
    """Bring the names of files to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
