"""Files as values of columns: named by their content, and never changed."""

from __future__ import annotations

import hashlib
import mimetypes
import os
import re
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Union

from finetuner.excepts import ConfigError, DataError, FinetunerError
from finetuner.storage.files import CHUNK_BYTES, FileStore

# path in the data directory, sha256 and size
Stored = tuple[str, str, int]
# one alone waits for the disk, or for the network, most of the time
_NUM_THREADS = 16

_SUFFIX = re.compile(r'(\.[A-Za-z0-9]{1,16}){0,2}')


@dataclass(frozen=True)
class FileType:
    """What `File['png']` says: files with one of some endings.

    Attributes:
        suffixes: with their dots, in lower case.
    """

    suffixes: tuple[str, ...]

    def __str__(self) -> str:
        """As it is written."""
        return f'File[{", ".join(repr(suffix[1:]) for suffix in self.suffixes)}]'

    def __or__(self, other: Any) -> Any:
        """`File['png'] | None`: it may be left out."""
        return Union[self, other]  # noqa: UP007 - that would be this again

    __ror__ = __or__

    def __call__(self, path: str | os.PathLike[str]) -> File:
        """A file on this machine; Python 3.10 takes nothing for a type that cannot be called.

        Raises:
            DataError: there is no such file, or it has another ending.
        """
        file = File(path)
        if file.suffix not in self.suffixes:
            raise DataError(f'{path}: it takes {self}, and the ending is {file.suffix!r}')
        return file

    def make_tmp(self) -> TemporaryFile:
        """A file to write, of the first of the endings; see `File.make_tmp`."""
        return TemporaryFile(self.suffixes[0])


class File:
    """A file: one that is a value of a column, or one on this machine that will be.

    Args:
        path: of a file on this machine. It stays where it is; what is added to a dataset is a copy.

    Raises:
        DataError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path: Path | None = Path(path).expanduser()
        if not self._path.is_file():
            raise DataError(f'{self._path}: there is no such file')
        self.suffix = suffix_of(self._path.name)
        self._store: FileStore | None = None
        self._key = ''
        self._hash: str | None = None
        self._size: int | None = None

    @classmethod
    def stored(cls, store: FileStore, key: str, sha256: str, size: int) -> File:
        """A file of a dataset; nothing is opened.

        Args:
            store: that has it.
            key: its name there.
            sha256: of its bytes, 64 hex digits.
            size: of it in bytes.
        """
        file = cls.__new__(cls)
        file._store, file._key, file._hash, file._size = store, key, sha256, size
        file._path, file.suffix = None, suffix_of(key)
        return file

    def __class_getitem__(cls, suffixes: str | tuple[str, ...]) -> FileType:
        """`File['png']`: the type of files with this ending, or one of several."""
        given = suffixes if isinstance(suffixes, tuple) else (suffixes,)
        if not given or not all(isinstance(each, str) and each.strip('.') for each in given):
            raise ConfigError(f"File[{suffixes!r}]: it takes endings of files, such as File['png']")
        return FileType(tuple('.' + each.lower().lstrip('.') for each in given))

    @staticmethod
    def make_tmp(suffix: str = '') -> TemporaryFile:
        """A file to write, whose content becomes a value.

        with File.make_tmp('.png') as file:
            picture.save(file.path)
            return file

        Args:
            suffix: its ending, such as `.png`.

        Raises:
            ConfigError: it is no ending.
        """
        return TemporaryFile(suffix)

    @property
    def path(self) -> str:
        """Where it is on this machine; what is elsewhere is fetched first. Read it, never write it."""
        if self._path is None and self._store is not None:
            self._path = self._store.local_path(self._key)
        return str(self._path)

    def __fspath__(self) -> str:
        """Its path: a File is taken wherever a path is."""
        return self.path

    def open(self, mode: str = 'rb', encoding: str | None = None) -> IO[Any]:
        """Open it to read.

        Raises:
            ConfigError: the mode would change it.
        """
        if mode not in ('r', 'rt', 'rb'):
            raise ConfigError(f'mode {mode!r}: a File is only read; make_tmp() gives one to write')
        return open(self.path, mode, encoding=encoding)

    def read(self) -> bytes:
        """All of its bytes."""
        with self.open() as file:
            return file.read()

    @property
    def hash(self) -> str:
        """Sha256 of its bytes, 64 hex digits."""
        if self._hash is None:
            with self.open() as file:
                self._hash = _digest(file)
        return self._hash

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return os.path.getsize(self.path) if self._size is None else self._size

    @property
    def media_type(self) -> str:
        """What its ending says it is, such as `image/png`."""
        return mimetypes.guess_type(f'file{self.suffix}')[0] or 'application/octet-stream'

    def __eq__(self, other: object) -> bool:
        """Files of the same content and ending are equal."""
        if not isinstance(other, File):
            return NotImplemented
        return (self.hash, self.suffix) == (other.hash, other.suffix)

    def __hash__(self) -> int:
        """By content."""
        return hash((self.hash, self.suffix))

    def __repr__(self) -> str:
        """Its path, or its name in the dataset."""
        return f'File({str(self._path or self._key)!r})'

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process; see `attached`."""
        return {**vars(self), '_store': None, '_forget': None}

    def attached(self, store: FileStore) -> File:
        """The same file, which came from another process, in a store of this one."""
        if self._key and self._store is None:
            self._store = store
        return self

    def put(self, store: FileStore, column: str) -> Stored:
        """Bring it into a store, unless its content is there.

        Args:
            store: of a dataset.
            column: whose folder it goes into.

        Returns:
            Its key there, its sha256 and its size.
        """
        key = f'{column}/{self.hash[:2]}/{self.hash}{self.suffix}'
        if not store.exists(key):
            store.put_file(Path(self.path), key)
        return key, self.hash, self.size


class TemporaryFile(File):
    """A file to write; it becomes a value when the block ends, and is gone with an error."""

    def __init__(self, suffix: str = '') -> None:
        if not isinstance(suffix, str) or not _SUFFIX.fullmatch(suffix):
            raise ConfigError(f"suffix {suffix!r}: it takes an ending of a file, such as '.png'")
        handle, name = tempfile.mkstemp(suffix, 'column-')
        os.close(handle)
        super().__init__(name)
        self.suffix = suffix.lower()
        # whatever becomes of it, it goes with the object: what was put into a store is there
        self._forget = weakref.finalize(self, _unlink, name)

    def __enter__(self) -> TemporaryFile:
        """Give it to be written."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take it as it is now, or delete it after an error."""
        if error is not None:
            self._forget()

    def open(self, mode: str = 'rb', encoding: str | None = None) -> IO[Any]:
        """Open it, to write it too."""
        return open(self.path, mode, encoding=encoding)


def put_all(
    store: FileStore, column: str, files: Sequence[File | None]
) -> list[Stored | Exception | None]:
    """Bring files into a store, several at a time.

    Args:
        store: of a dataset.
        column: whose folder they go into.
        files: None stays None.

    Returns:
        Of each its key in the store, its sha256 and its size, or what went wrong.
    """

    def put(file: File | None) -> Stored | Exception | None:
        try:
            return None if file is None else file.put(store, column)
        except (OSError, FinetunerError) as error:
            return error

    if len(files) == 1:
        return [put(files[0])]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(put, files))


def suffix_of(name: str) -> str:
    """The ending of a file's name in lower case, `.tar.gz` as a whole; '' where it has none."""
    path = Path(name)
    ending = (
        ''.join(path.suffixes[-2:])
        if path.suffix in ('.gz', '.bz2', '.xz', '.zst')
        else path.suffix
    )
    return ending.lower() if _SUFFIX.fullmatch(ending) else ''


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _unlink(name: str) -> None:
    with suppress(OSError):
        os.unlink(name)
