"""Files under one root, here or on anything fsspec opens: there whole under their name, or not.

A file or directory is written under another name, brought to the disk, then renamed. Storage that
is not a local disk cannot rename a directory: there a list of its files with their hashes, written
last, says that it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from finetuner.excepts import ArtifactError, ConfigError, ConflictError, NotFoundError
from finetuner.storage.database import make_private_directory

CHUNK_BYTES = 1 << 20
_COMPLETE = '.complete'
_STAGING = '.staging-'


class FileStore:
    """Files and directories by key, a relative path with '/' between its parts.

    Args:
        url: a local path, or an address that fsspec opens, such as `s3://bucket/folder`.
        cache: local directory for copies of what is not on a local disk, and for unfinished work;
            needed for such addresses only.
    """

    def __init__(self, url: str | Path, cache: Path | None = None) -> None:
        try:
            self._fs, root = fsspec.core.url_to_fs(str(url))
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f'cannot store files at {str(url)!r}: {error}; give a local path, or an address '
                'whose fsspec package is installed'
            ) from error
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self._root = root.rstrip('/')
        if not self.is_local and cache is None:
            raise ConfigError(f'files at {str(url)!r} need a local directory as cache')
        # one cache serves several stores
        part = hashlib.sha256(str(url).encode()).hexdigest()[:16]
        self._local_root = Path(root) if self.is_local or cache is None else cache / part

    def write(self, key: str, chunks: Iterable[bytes]) -> str:
        """Write a file; one that is there is replaced.

        Args:
            key: where to.
            chunks: its bytes, piece by piece.

        Returns:
            Their sha256, 64 hex characters.
        """
        digest = hashlib.sha256()
        if self.is_local:
            target = self._local(key)
            make_private_directory(target.parent)
            unfinished = target.with_name(f'{_STAGING}{uuid.uuid4().hex}')
            try:
                with unfinished.open('xb') as file:
                    for chunk in chunks:
                        digest.update(chunk)
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(target)
            finally:
                unfinished.unlink(missing_ok=True)
            _sync(target.parent)
            return digest.hexdigest()
        target_path = self._remote(key)
        unfinished_path = f'{target_path}.{uuid.uuid4().hex}.part'
        self._fs.makedirs(target_path.rpartition('/')[0], exist_ok=True)
        try:
            with self._fs.open(unfinished_path, 'wb') as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            self._fs.mv(unfinished_path, target_path)
        except BaseException:
            if self._fs.exists(unfinished_path):
                self._fs.rm(unfinished_path)
            raise
        return digest.hexdigest()

    def read(self, key: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece.

        Raises:
            NotFoundError: no such file.
        """
        try:
            with self._fs.open(self._address(key), 'rb') as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFoundError(f'no file {key!r} is stored') from error

    def sha256(self, key: str) -> str:
        """Hash of a file as it is now, 64 hex characters.

        Raises:
            NotFoundError: no such file.
        """
        digest = hashlib.sha256()
        for chunk in self.read(key):
            digest.update(chunk)
        return digest.hexdigest()

    def put_file(self, source: Path, key: str, move: bool = False, may_link: bool = False) -> None:
        """Store a local file; one that is there is replaced.

        Args:
            source: the file.
            key: where to.
            move: the source is not needed any more: it is renamed where that can be done.
            may_link: the source stays, is on the disk, and never changes again: where that can be
                done, both names are of one file, which then counts as written now.
        """
        if may_link and self.is_local and _link(source, self._local(key)):
            return
        if move and self.is_local:
            target = self._local(key)
            make_private_directory(target.parent)
            if source.stat().st_dev == target.parent.stat().st_dev:
                source.replace(target)
                _sync(target.parent)
                return
        self.write(key, _chunks_of(source))
        if move:
            source.unlink()

    def put_directory(self, source: Path, key: str) -> None:
        """Store a copy of a local directory; links in it are refused.

        Raises:
            ConflictError: something is stored there already.
        """
        with self.staged_directory(key) as staging:
            for path in _files_below(source):
                target = staging / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    @contextmanager
    def staged_directory(self, key: str) -> Iterator[Path]:
        """A new empty local directory to fill; stored under its key when the block ends well.

        When it ends with an exception nothing is left. What a killed process left is cleared here
        or by `delete`.

        Raises:
            ConflictError: something is stored there already.
        """
        if self.exists(key):
            raise ConflictError(f'{key!r} is stored already and is never overwritten')
        staging = self._staging(key)
        shutil.rmtree(staging, ignore_errors=True)
        make_private_directory(staging)
        try:
            yield staging
            self._commit(staging, key)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def list_names(self, folder: str = '') -> list[str]:
        """Names of the files and directories at the top or in a folder, unfinished ones aside."""
        root = str(self._local_root) if self.is_local else self._root
        root = self._address(folder) if folder else root
        # as it is now, whatever was listed before
        self._fs.invalidate_cache(root)
        try:
            paths = self._fs.ls(root, detail=False) if self._fs.isdir(root) else []
        except FileNotFoundError:
            # it was deleted at this moment
            return []
        names = [path.rstrip('/').rpartition('/')[2] for path in paths]
        return sorted(filter(_is_whole, names))

    def list_copies(self, folder: str = '') -> list[Path]:
        """Local copies of files and directories at the top or in a folder; none on a local disk."""
        root = self._local(folder) if folder else self._local_root
        if self.is_local:
            return []
        # as `list_unfinished`, whatever goes away meanwhile
        below = next(os.walk(root), ('', [], []))
        return [root / name for name in sorted(below[1] + below[2]) if _is_whole(name)]

    def list_unfinished(self) -> list[Path]:
        """Local files and directories that are being written now, or that a killed process left."""
        found = []
        for folder, names, files in os.walk(self._local_root):
            found += [Path(folder, name) for name in names + files if not _is_whole(name)]
            names[:] = filter(_is_whole, names)
        return sorted(found)

    def size(self, key: str) -> int:
        """Bytes of a file."""
        return int(self._fs.size(self._address(key)))

    def seconds_since_change(self, key: str) -> float:
        """How long ago a file was written."""
        changed = self._fs.modified(self._address(key))
        return time.time() - changed.timestamp()

    def exists(self, key: str) -> bool:
        """Whether a file, or a whole directory, is stored there."""
        if self.is_local:
            return self._local(key).exists()
        path = self._remote(key)
        return self._fs.isfile(path) or self._fs.isfile(f'{path}/{_COMPLETE}')

    def delete(self, key: str) -> None:
        """Delete a file or directory, unfinished ones too; nothing there is no error."""
        shutil.rmtree(self._staging(key), ignore_errors=True)
        local = self._local(key)
        if local.is_dir():
            # Renamed first: a directory half deleted must not pass for a whole one.
            doomed = self._staging(key)
            local.rename(doomed)
            # somebody else may delete it too
            with suppress(FileNotFoundError):
                shutil.rmtree(doomed)
        else:
            local.unlink(missing_ok=True)
        if not self.is_local and self._fs.exists(self._remote(key)):
            path = self._remote(key)
            with suppress(FileNotFoundError):
                if self._fs.isfile(f'{path}/{_COMPLETE}'):
                    self._fs.rm(f'{path}/{_COMPLETE}')
                self._fs.rm(path, recursive=True)

    def delete_empty(self, folder: str) -> None:
        """Delete a local directory, the store's or of copies, if nothing at all is in it."""
        with suppress(OSError):
            self._local(folder).rmdir()

    def local_path(self, key: str) -> Path:
        """A local path of a file or directory; what is elsewhere is copied here once.

        Raises:
            NotFoundError: nothing is stored there.
            ArtifactError: a copied file's hash is not the one it was stored with.
        """
        local = self._local(key)
        if local.exists():
            return local
        if self.is_local or not self.exists(key):
            raise NotFoundError(f'nothing is stored under {key!r}')
        make_private_directory(local.parent)
        unfinished = local.with_name(f'{_STAGING}{uuid.uuid4().hex}')
        try:
            self._copy_here(key, unfinished)
            if not local.exists():
                unfinished.rename(local)
        except OSError:
            # Another process was quicker: its copy is as good.
            if not local.exists():
                raise
        finally:
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            unfinished.unlink(missing_ok=True)
        return local

    def _commit(self, staging: Path, key: str) -> None:
        files = _files_below(staging)
        if self.is_local:
            for path in files:
                _sync(path)
            staging.rename(self._local(key))
            _sync(staging.parent)
            return
        hashes = {}
        for path in files:
            name = path.relative_to(staging).as_posix()
            hashes[name] = self.write(f'{key}/{name}', _chunks_of(path))
        self.write(f'{key}/{_COMPLETE}', [json.dumps(hashes).encode()])

    def _copy_here(self, key: str, target: Path) -> None:
        if self._fs.isfile(self._remote(key)):
            with target.open('xb') as file:
                for chunk in self.read(key):
                    file.write(chunk)
            return
        expected = json.loads(b''.join(self.read(f'{key}/{_COMPLETE}')))
        for name, sha256 in expected.items():
            path = target.joinpath(*_parts(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with path.open('xb') as file:
                for chunk in self.read(f'{key}/{name}'):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise ArtifactError(
                    f'{name} of {key!r} was changed after it was stored: hash differs'
                )

    def _address(self, key: str) -> str:
        return str(self._local(key)) if self.is_local else self._remote(key)

    def _remote(self, key: str) -> str:
        return '/'.join((self._root, *_parts(key)))

    def _local(self, key: str) -> Path:
        path = self._local_root.joinpath(*_parts(key))
        root = os.path.realpath(self._local_root)
        if os.path.commonpath((os.path.realpath(path), root)) != root:
            raise ConfigError(f'{key!r} is a link that leaves the store')
        return path

    def _staging(self, key: str) -> Path:
        path = self._local(key)
        return path.with_name(f'{_STAGING}{path.name}')


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name; whether that can be done here."""
    unfinished = target.with_name(f'{_STAGING}{uuid.uuid4().hex}')
    try:
        for is_last in (False, True):
            make_private_directory(target.parent)
            try:
                os.link(source, unfinished)
                break
            except FileNotFoundError:
                # the directory was empty, and was taken away at this moment
                if is_last or not source.exists():
                    raise
            except OSError:
                # other disks, and file systems that know no second names
                return False
        os.utime(unfinished)
        unfinished.replace(target)
    finally:
        # renaming one name of a file to another one of it leaves both
        unfinished.unlink(missing_ok=True)
    _sync(target.parent)
    return True


def _is_whole(name: str) -> bool:
    return not name.startswith(_STAGING)


def _parts(key: str) -> tuple[str, ...]:
    parts = key.split('/')
    path = PurePosixPath(key)
    # fsspec takes * ? [ ] for patterns, in `rm` too.
    if (
        '..' in parts
        or '.' in parts
        or '' in parts
        or path.is_absolute()
        or set('\\\0*?[]') & set(key)
    ):
        raise ConfigError(
            f'{key!r} is not a name in the store: allowed are relative paths without empty parts, '
            "'.' and '..', and none of the characters \\ * ? [ ]"
        )
    return path.parts


def _files_below(directory: Path) -> list[Path]:
    paths = sorted(directory.rglob('*'))
    for path in paths:
        if path.is_symlink():
            raise ArtifactError(f'{path.name!r} is a link: only plain files are stored')
    return [path for path in paths if path.is_file()]


def _chunks_of(path: Path) -> Iterator[bytes]:
    with path.open('rb') as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
