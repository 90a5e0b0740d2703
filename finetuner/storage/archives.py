"""Zips from outside: unpacked without trusting what they say of themselves."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from finetuner.excepts import ArtifactError

MAX_BYTES = 8 * 1024**3
MAX_FILES = 64
# folders in a folder: a tower's, and in it those of its modules
MAX_DEPTH = 2
# RuntimeError is an encrypted member (and, as NotImplementedError, an unknown compression)
_UNREADABLE = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error, lzma.LZMAError)


def unzip(path: Path, target: Path) -> None:
    """Unzip one folder of plain files into an empty directory, refusing what could do harm.

    Args:
        path: the zip.
        target: where to; exists and is empty.

    Raises:
        ArtifactError: no zip, more than one folder, links, paths that leave it, or too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.filename.endswith('/')]
            _check_members(path.name, members)
            root = _root(path.name, members)
            for member in members:
                out = target.joinpath(*_parts(member)[len(root) :])
                out.parent.mkdir(exist_ok=True, parents=True)
                with archive.open(member) as source, out.open('wb') as file:
                    # sizes in the zip's directory can lie: never write more than was declared
                    _copy_at_most(source, file, member.file_size)
    except _UNREADABLE as error:
        raise ArtifactError(f'{path.name} is no artifact: {error}') from error


def _check_members(name: str, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_FILES or sum(member.file_size for member in members) > MAX_BYTES:
        raise ArtifactError(
            f'{name} holds more than {MAX_FILES} files or {MAX_BYTES // 1024**3} GiB'
        )
    for member in members:
        parts = _parts(member)
        if not parts or '..' in parts or member.filename.startswith(('/', '\\')) or ':' in parts[0]:
            raise ArtifactError(f'{name} is refused: path {member.filename!r} leaves the artifact')
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ArtifactError(f'{name} is refused: {member.filename!r} is a link')


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
