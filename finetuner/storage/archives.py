"""Zips and tars from outside: unpacked without trusting what they say of themselves."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from finetuner.excepts import ArtifactError, DataError

MAX_BYTES = 8 * 1024**3
# of what is read file by file, and never unpacked whole
MAX_READ_BYTES = 1024**4
MAX_FILES = 64
# of data: pictures in a folder for each class
MAX_DATA_FILES = 1_000_000
# what unpacks to less may be any share of air; what is more is at most so many times its zip
FREE_BYTES = 256 * 1024**2
MAX_RATIO = 100
# the others take memory that the zip chooses
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# of a tar: long names, and what pax adds to them
_MAX_HEADER_BYTES = 1 << 20
_MOST_SHOWN = 200
# folders in a folder: a tower's, and in it those of its modules
MAX_DEPTH = 2
# RuntimeError is an encrypted member (and, as NotImplementedError, an unknown compression),
# ValueError a name that is no UTF-8
_UNREADABLE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error),
    *(EOFError, OSError, RuntimeError, ValueError),
)


def unzip(path: Path, target: Path) -> None:
    """Unzip one folder of plain files into an empty directory, refusing what could do harm.

    Args:
        path: the zip.
        target: where to; exists and is empty.

    Raises:
        ArtifactError: no zip, more than one folder, links, paths that leave it, or too large.
    """
    with _opened(path, MAX_FILES, MAX_BYTES) as (archive, members):
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
        with _opened(path, MAX_DATA_FILES, MAX_BYTES) as (archive, members):
            _write(archive, members, 0, target)
    except ArtifactError as error:
        raise DataError(str(error)) from error


@dataclass(frozen=True)
class Members:
    """Plain files of a folder, a zip or a tar, read one at a time.

    Attributes:
        sizes: bytes of each, by its path with '/' between its parts, as they are declared.
    """

    sizes: dict[str, int]
    _read: Callable[[str, int], bytes]

    def read(self, path: str, most: int) -> bytes:
        """The bytes of a file.

        Args:
            path: one of `sizes`.
            most: bytes that it may have.

        Raises:
            DataError: it has more, or cannot be read.
        """
        size = self.sizes[path]
        if size > most:
            raise DataError(
                f'{path!r} has {size:,} bytes: at most {most:,} are read of such a file'
            )
        try:
            data = self._read(path, size)
        except _UNREADABLE as error:
            raise DataError(f'{path!r} cannot be read: {error}') from error
        if len(data) != size:
            raise DataError(f'{path!r} has not the {size:,} bytes that it declares')
        return data


@contextmanager
def open_members(path: Path) -> Iterator[Members]:
    """Open a folder, a zip, a tar or a tar.gz, refusing what could do harm; nothing is unpacked yet.

    Args:
        path: of it.

    Raises:
        DataError: it is none, or holds links, paths that leave it, what is no plain file, a path
            twice, or too much.
    """
    with ExitStack() as stack:
        try:
            members = _members_of(path, stack)
        except ArtifactError as error:
            raise DataError(str(error)) from error
        except DataError:
            raise
        except _UNREADABLE as error:
            raise DataError(
                f'{path.name} is no folder, zip, tar or tar.gz, or damaged: {error}'
            ) from error
        yield members


def _members_of(path: Path, stack: ExitStack) -> Members:
    if path.is_dir():
        return _of_folder(path)
    file = stack.enter_context(path.open('rb'))
    magic = file.read(4)
    if magic[:2] == b'PK':
        archive = stack.enter_context(zipfile.ZipFile(file))
        return _of_zip(archive, _checked_members(path, archive, MAX_DATA_FILES, MAX_READ_BYTES))
    if magic[:2] == b'\x1f\x8b':
        plain = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        _gunzip(path, plain)
        return _of_tar(path, plain)
    return _of_tar(path, file)


def _of_folder(folder: Path) -> Members:
    sizes: dict[str, int] = {}
    for root, names, files in os.walk(folder):
        names.sort()
        for name in sorted([*names, *files]):
            path = Path(root, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise DataError(f'{str(path)!r} is a link or no plain file: it is not followed')
            if stat.S_ISREG(mode):
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size

    def read(name: str, size: int) -> bytes:
        with (folder / name).open('rb') as file:
            return file.read(size + 1)

    return Members(sizes, read)


def _of_zip(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> Members:
    by_path = {'/'.join(_parts(member.filename)): member for member in members}

    def read(name: str, size: int) -> bytes:
        with archive.open(by_path[name]) as file:
            return file.read(size + 1)

    return Members({name: member.file_size for name, member in by_path.items()}, read)


def _of_tar(path: Path, file: IO[bytes]) -> Members:
    places: dict[str, tuple[int, int]] = {}
    for member in tar_members(path, file):
        _check_path(path.name, member.name)
        name = '/'.join(_parts(member.name))
        if name in places:
            raise DataError(f'{path.name} is refused: {name!r} is in it more than once')
        places[name] = member.start, member.size

    def read(name: str, size: int) -> bytes:
        file.seek(places[name][0])
        return file.read(size)

    return Members({name: size for name, (_, size) in places.items()}, read)


class TarMember(NamedTuple):
    """A plain file in a tar: its name, where its bytes begin, and how many they are."""

    name: str
    start: int
    size: int


def tar_members(path: Path, file: IO[bytes]) -> Iterator[TarMember]:
    """Yield the plain files of an open tar in order, refusing what could do harm; none is read.

    Args:
        path: of the tar, for messages.
        file: the tar, seekable. It may be read elsewhere in between.

    Raises:
        DataError: it holds links or what is no plain file, too many files, or is cut short or
            damaged. Names are not looked at.
        tarfile.TarError: it is no tar.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    headers: Any = _Headers(path.name, file)
    with tarfile.open(fileobj=headers, mode='r:') as archive:
        position, num_files = -1, 0
        while (member := archive.next()) is not None:
            # they are not needed again, and there may be a million of them
            archive.members = []  # type: ignore[attr-defined]
            name = shown_text(member.name)
            if archive.offset <= position or member.size < 0:
                raise DataError(f'{path.name} is damaged: {name} begins nowhere')
            position = archive.offset
            if member.isdir():
                continue
            if member.issym() or member.islnk():
                raise DataError(f'{path.name} is refused: {name} is a link')
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                raise DataError(f'{path.name} is refused: {name} is no plain file')
            if member.offset_data + member.size > end:
                raise DataError(f'{path.name} is incomplete: {name} ends behind its end')
            num_files += 1
            if num_files > MAX_DATA_FILES:
                raise DataError(f'{path.name} holds more than {MAX_DATA_FILES:,} files')
            yield TarMember(member.name, member.offset_data, member.size)
        # where a header is damaged or missing tarfile stops as if this were the end
        file.seek(archive.offset)
        last = file.read(tarfile.BLOCKSIZE)
    if len(last) < tarfile.BLOCKSIZE:
        raise DataError(f'{path.name} is incomplete: it ends without the mark of its end')
    if last.strip(b'\0'):
        raise DataError(f'{path.name} is damaged: what follows its file {num_files} is no file')


class _Headers:
    """What tarfile reads of a tar, which is headers alone: none is larger than it must be."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self._name = name
        self._file = file
        self._place = 0

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise DataError(f'{self._name} is refused: a header of it has {size:,} bytes')
        self._file.seek(self._place)
        data = self._file.read(size)
        self._place += len(data)
        return data

    def seek(self, place: int) -> int:
        self._place = place
        return place

    def tell(self) -> int:
        return self._place


def shown_text(text: str) -> str:
    """Show a name from outside in a message: cut where it is long."""
    return repr(text if len(text) <= _MOST_SHOWN else f'{text[:_MOST_SHOWN]}...')


def _gunzip(path: Path, target: IO[bytes]) -> None:
    left = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
    with gzip.open(path) as source:
        while chunk := source.read(1 << 20):
            left -= len(chunk)
            if left < 0:
                raise DataError(
                    f'{path.name} is refused: it would unpack to more than {MAX_RATIO} times its '
                    'size'
                )
            target.write(chunk)


@contextmanager
def _opened(
    path: Path, max_files: int, max_bytes: int
) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive, _checked_members(path, archive, max_files, max_bytes)
    except _UNREADABLE as error:
        raise ArtifactError(f'{path.name} cannot be unzipped: {error}') from error


def _checked_members(
    path: Path, archive: zipfile.ZipFile, max_files: int, max_bytes: int
) -> list[zipfile.ZipInfo]:
    members = [m for m in archive.infolist() if not m.filename.endswith('/')]
    _check_size(path, members, max_files, max_bytes)
    _check_members(path.name, members)
    return members


def _write(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], num_skipped: int, target: Path
) -> None:
    for member in members:
        out = target.joinpath(*_parts(member.filename)[num_skipped:])
        out.parent.mkdir(exist_ok=True, parents=True)
        with archive.open(member) as source, out.open('wb') as file:
            # sizes in the zip's directory can lie: never write more than was declared
            _copy_at_most(source, file, member.file_size)


def _check_size(path: Path, members: list[zipfile.ZipInfo], max_files: int, max_bytes: int) -> None:
    num_bytes = sum(member.file_size for member in members)
    if len(members) > max_files or num_bytes > max_bytes:
        raise ArtifactError(
            f'{path.name} holds more than {max_files:,} files or {max_bytes // 1024**3:,} GiB'
        )
    if num_bytes > max(FREE_BYTES, MAX_RATIO * path.stat().st_size):
        raise ArtifactError(
            f'{path.name} is refused: it would unpack to {num_bytes:,} bytes, more than '
            f'{MAX_RATIO} times its size'
        )


def _check_members(name: str, members: list[zipfile.ZipInfo]) -> None:
    seen: set[tuple[str, ...]] = set()
    for member in members:
        parts = _check_path(name, member.filename)
        told = repr(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
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


def _check_path(name: str, path: str) -> tuple[str, ...]:
    parts = _parts(path)
    leaves = '..' in parts or path.startswith(('/', '\\'))
    if not parts or leaves or any(':' in part for part in parts):
        raise ArtifactError(f'{name} is refused: path {path!r} leaves it')
    return parts


def _root(name: str, members: list[zipfile.ZipInfo]) -> tuple[str, ...]:
    """The folder that all files lie in, right there or deeper; empty where it is none."""
    folders = {_parts(member.filename)[:-1] for member in members}
    root = min(folders, key=len, default=())
    if not folders or len(root) > 1 or any(f[: len(root)] != root for f in folders):
        raise ArtifactError(f'{name} is no artifact: its files do not lie in one folder')
    if any(len(folder) > len(root) + MAX_DEPTH for folder in folders):
        raise ArtifactError(f'{name} is no artifact: its folders go too deep')
    return root


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path.replace('\\', '/')).parts


def _copy_at_most(source: IO[bytes], file: IO[bytes], size: int) -> None:
    left = size
    while chunk := source.read(min(1 << 20, left + 1)):
        left -= len(chunk)
        if left < 0:
            raise ArtifactError('the zip holds more bytes than it declares')
        file.write(chunk)
