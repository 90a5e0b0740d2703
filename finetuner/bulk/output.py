"""The folder that encoded data goes to: files are there whole under their names, or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetuner.artifact_files import hash_file
from finetuner.bulk.manifest import OutputFile
from finetuner.excepts import ConfigError, ConflictError, DataError

_UNFINISHED = '.unfinished-'
_LOCK = '.lock'


def import_parquet(what: str) -> Any:
    """The module `pyarrow.parquet`.

    Args:
        what: needs it, for the message.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{what} needs pyarrow: pip install 'finetuner[parquet]'") from error
    return parquet


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A new file to write, which gets its name when the block ends well and is gone otherwise.

    Yields:
        Where to write: beside it, under a name of its own.
    """
    unfinished = path.with_name(f'{_UNFINISHED}{uuid.uuid4().hex}-{path.name}')
    try:
        yield unfinished
        with unfinished.open('rb') as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file; one that is there is replaced."""
    with finished_file(path) as unfinished:
        unfinished.write_bytes(content)


def described(path: Path) -> OutputFile:
    """A file as it is now."""
    return OutputFile(path.name, path.stat().st_size, hash_file(path))


def is_as_described(path: Path, file: OutputFile) -> bool:
    """Whether a file is there with the bytes that were written."""
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        return False
    return hash_file(path) == file.sha256


def check_file(path: Path, file: OutputFile) -> None:
    """Refuse a file that is not the one written.

    Raises:
        DataError: it is missing, or its bytes are others.
    """
    if not path.is_file():
        raise DataError(f'{str(path)!r} is missing: encode again, and only that is done anew')
    if not is_as_described(path, file):
        raise DataError(
            f'{str(path)!r} is not what was written there: its size or sha256 is another. Encode '
            'again, and only that is done anew'
        )


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, if need be, and have it for this process alone; what killed ones left goes.

    Raises:
        ConflictError: another process writes there.
        ConfigError: it cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f'the output {str(folder)!r} cannot be made: {error.strerror or error}'
        ) from error
    try:
        with FileLock(folder / _LOCK, timeout=0):
            _clear_unfinished(folder)
            yield
            # those of workers that were killed
            _clear_unfinished(folder)
    except Timeout as error:
        raise ConflictError(
            f'another process is encoding to {str(folder)!r}: wait for it, or give another output'
        ) from error


def _clear_unfinished(folder: Path) -> None:
    for path in folder.glob(f'{_UNFINISHED}*'):
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    if os.name == 'nt':
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
