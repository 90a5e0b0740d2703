"""Zips from outside: unpacked without trusting what they say of themselves."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from finetuner.excepts import ArtifactError, DataError

MAX_BYTES = 8 * 1024**3
MAX_FILES = 64
# of data: pictures in a folder for each class
MAX_DATA_FILES = 1_000_000
# what unpacks to less may be any share of air; what is more is at most so many times its zip
FREE_BYTES = 256 * 1024**2
MAX_RATIO = 100
# the others take memory that the zip chooses
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# folders in a folder: a tower's, and in it those of its modules
MAX_DEPTH = 2
# RuntimeError is an encrypted member (and, as NotImplementedError, an unknown compression),
# ValueError a name that is no UTF-8
_UNREADABLE = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, zlib.error)


def unzip(path: Path, target: Path) -> None:
    """Unzip one folder of plain files into an empty directory, refusing what could do harm.

    Args:
        path: the zip.
        target: where to; exists and is empty.

    Raises:
        ArtifactError: no zip, more than one folder, links, paths that leave it, or too large.
    """
    with _opened(path, MAX_FILES) as (archive, members):
        root = _root(path.name, members)
        _write(archive, members, len(root), target)


def unzip_data(path: Path, target: Path) -> None:
    """Unzip plain files in any folders into an empty directory, refusing what could do harm.

    Args:
        path: the zip.
        target: where to; exists and is empty.

    Raises:
        DataError: no zip, links, paths that leave it, or too large.
    """
    try:
        with _opened(path, MAX_DATA_FILES) as (archive, members):
            _write(archive, members, 0, target)
    except ArtifactError as error:
        raise DataError(str(error)) from error


@contextmanager
def _opened(path: Path, max_files: int) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.filename.endswith('/')]
            _check_size(path, members, max_files)
            _check_members(path.name, members)
            yield archive, members
    except _UNREADABLE as error:
        raise ArtifactError(f'{path.name} cannot be unzipped: {error}') from error


def _write(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], num_skipped: int, target: Path
) -> None:
    for member in members:
        out = target.joinpath(*_parts(member)[num_skipped:])
        out.parent.mkdir(exist_ok=True, parents=True)
        with archive.open(member) as source, out.open('wb') as file:
            # sizes in the zip's directory can lie: never write more than was declared
            _copy_at_most(source, file, member.file_size)


def _check_size(path: Path, members: list[zipfile.ZipInfo], max_files: int) -> None:
    num_bytes = sum(member.file_size for member in members)
    if len(members) > max_files or num_bytes > MAX_BYTES:
        raise ArtifactError(
            f'{path.name} holds more than {max_files:,} files or {MAX_BYTES // 1024**3} GiB'
        )
    if num_bytes > max(FREE_BYTES, MAX_RATIO * path.stat().st_size):
        raise ArtifactError(
            f'{path.name} is refused: it would unpack to {num_bytes:,} bytes, more than '
            f'{MAX_RATIO} times its size'
        )


def _check_members(name: str, members: list[zipfile.ZipInfo]) -> None:
    seen: set[tuple[str, ...]] = set()
    for member in members:
        parts = _parts(member)
        told = repr(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        leaves = '..' in parts or member.filename.startswith(('/', '\\'))
        if not parts or leaves or any(':' in part for part in parts):
            raise ArtifactError(f'{name} is refused: path {told} leaves it')
        if kind == stat.S_IFLNK:
            raise ArtifactError(f'{name} is refused: {told} is a link')
        if kind not in (0, stat.S_IFREG):
            raise ArtifactError(f'{name} is refused: {told} is no plain file')
        if member.compress_type not in _COMPRESSIONS:
            raise ArtifactError(
                f'{name} is refused: {told} is compressed in a way other than deflate, which all '
                'zip programs know'
            )
        if parts in seen:
            # which of them counts would depend on who reads the zip
            raise ArtifactError(f'{name} is refused: {told} is in it more than once')
        seen.add(parts)


def _root(name: str, members: list[zipfile.ZipInfo]) -> tuple[str, ...]:
    """The folder that all files lie in, right there or deeper; empty where it is none."""
    folders = {_parts(member)[:-1] for member in members}
    root = min(folders, key=len, default=())
    if not folders or len(root) > 1 or any(f[: len(root)] != root for f in folders):
        raise ArtifactError(f'{name} is no artifact: its files do not lie in one folder')
    if any(len(folder) > len(root) + MAX_DEPTH for folder in folders):
        raise ArtifactError(f'{name} is no artifact: its folders go too deep')
    return root


def _parts(member: zipfile.ZipInfo) -> tuple[str, ...]:
    return PurePosixPath(member.filename.replace('\\', '/')).parts


def _copy_at_most(source: IO[bytes], file: IO[bytes], size: int) -> None:
    left = size
    while chunk := source.read(min(1 << 20, left + 1)):
        left -= len(chunk)
        if left < 0:
            raise ArtifactError('the zip holds more bytes than it declares')
        file.write(chunk)
