"""Releases of a collection: archives of what it was at one moment, which never change.

A release is a tar, not a zip: its entries are written one after the other with nothing to remember of
them, and images are compressed in themselves. It is beside the packs, under
`<key>/releases/<version>.tar`; what is known of it is `<version>.json`, written last: without it
nothing is served. What is in it says `finetuner.collections.release_format`.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from finetuner.collections.draft import clear_drafts, new_directory
from finetuner.collections.place import Place
from finetuner.collections.records import CollectionRecord, PairRecord, iso
from finetuner.collections.release_format import (
    BOUNDS,
    FORMAT,
    FORMAT_REVISION,
    IMAGES,
    LABELS,
    META,
    folder_of,
    footprint_of,
    label_document,
    tiff_of,
)
from finetuner.collections.tiles import pixels_of
from finetuner.excepts import ArtifactError, ConfigError, ConflictError, NotFoundError
from finetuner.storage.database import make_private_directory
from finetuner.storage.files import CHUNK_BYTES, FileStore

_VERSION = re.compile(r'[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}')
_AT_ONCE = 1000
# always the same; a zip, which people may make of it, knows no time before 1980
_MTIME = 315_619_200
_BLOCK = tarfile.BLOCKSIZE


def release(place: Place, record: CollectionRecord, version: str) -> dict[str, Any]:
    """Keep a collection as it is now.

    Args:
        place: where collections are kept.
        record: of the collection, as it is now.
        version: what the release is called.

    Returns:
        What is known of it, as `list_releases` gives it.

    Raises:
        ConfigError: the version has no such name, or the place is a server.
        ForbiddenError: the collection is somebody else's.
        ConflictError: there is such a version, it is being made, or the collection was changed meanwhile.
    """
    key = _key(record, _check_version(version))
    files = place.files_of(record, to_change=True)
    with _alone(place, record), _workspace(place) as directory:
        if files.exists(f'{key}.json'):
            raise ConflictError(
                f'{record.name!r} has a release {version!r}, and releases never change: choose '
                'another version'
            )
        archive = directory / 'release.tar'
        about = _write(place, record, version, archive)
        if place.store.get(record.id).revision != record.revision:
            raise ConflictError(f'{record.name!r} was changed while it was released: release again')
        files.put_file(archive, f'{key}.tar', move=True)
        files.write(f'{key}.json', [json.dumps(about, ensure_ascii=False).encode()])
    return about


def list_releases(place: Place, record: CollectionRecord) -> list[dict[str, Any]]:
    """What is known of the releases of a collection, in the order in which they were made."""
    files = place.files_of(record, to_change=False)
    folder = f'{record.key}/releases'
    names = [name for name in files.list_names(folder) if name.endswith('.json')]
    found = [json.loads(b''.join(files.read(f'{folder}/{name}'))) for name in names]
    return sorted(found, key=lambda about: (about['created_at'], about['version']))


def named_files(files: FileStore, key: str) -> set[str]:
    """Names of the files that the releases of a collection are in, by its key."""
    names = [name for name in files.list_names(f'{key}/releases') if name.endswith('.json')]
    return {*names, *(f'{name.removesuffix(".json")}.tar' for name in names)}


def release_lock(place: Place, key: str) -> FileLock:
    """What one has, of all on this machine, who releases a collection, by its key."""
    return FileLock(place.drafts / f'.release-{key}.lock')


def list_locks(place: Place) -> dict[str, Path]:
    """The files of such locks, by the keys of their collections."""
    return {path.name[9:-5]: path for path in place.drafts.glob('.release-*.lock')}


def download_release(
    place: Place, record: CollectionRecord, version: str, path: str | os.PathLike[str]
) -> Path:
    """Write the archive of a release to a file, or into a directory that is there.

    Returns:
        The path of the file.

    Raises:
        NotFoundError: there is no such release.
        ArtifactError: its archive is not what it was.
    """
    key = _key(record, _check_version(version))
    files = place.files_of(record, to_change=False)
    if not files.exists(f'{key}.json'):
        known = ', '.join(about['version'] for about in list_releases(place, record)) or 'none'
        raise NotFoundError(f'{record.name!r} has no release {version!r}; it has: {known}')
    about = json.loads(b''.join(files.read(f'{key}.json')))
    target = Path(path).expanduser()
    if target.is_dir():
        target /= f'{about["folder"]}.tar'
    unfinished = target.with_name(f'{target.name}.{uuid.uuid4().hex}.part')
    digest = hashlib.sha256()
    try:
        with unfinished.open('xb') as file:
            for chunk in files.read(f'{key}.tar'):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != about['sha256']:
            raise ArtifactError(
                f'release {version!r} of {record.name!r} is damaged: its archive has another hash '
                'than when it was made'
            )
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


class _Archive:
    """A tar that is written file by file, each by name, in sorted order.

    Attributes:
        num_files: so far.
        content: hash of them: sha256 over a line `sha256  path` of each.
        whole: hash of the tar.

    Args:
        file: that it is written to.
        folder: that all files are in.
        listing: where hash and size of each are noted, as JSON.
    """

    def __init__(self, file: IO[bytes], folder: str, listing: IO[bytes]) -> None:
        self._file = file
        self._folder = folder
        self._listing = listing
        self.num_files = 0
        self.content = hashlib.sha256()
        self.whole = hashlib.sha256()

    def add(self, name: str, num_bytes: int, chunks: Iterable[bytes]) -> None:
        """Write a file, and note it."""
        sha256 = self.add_unlisted(name, num_bytes, chunks)
        self.content.update(f'{sha256}  {name}\n'.encode())
        line = f'{json.dumps(name)}: {json.dumps({"sha256": sha256, "size": num_bytes})}'
        self._listing.write((',\n' + line if self.num_files else line).encode())
        self.num_files += 1

    def add_unlisted(self, name: str, num_bytes: int, chunks: Iterable[bytes]) -> str:
        """Write a file; returns its sha256."""
        info = tarfile.TarInfo(f'{self._folder}/{name}')
        info.size, info.mtime = num_bytes, _MTIME
        self._put(info.tobuf(tarfile.PAX_FORMAT, 'utf-8', 'strict'))
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
            self._put(chunk)
        self._put(bytes(-num_bytes % _BLOCK))
        return digest.hexdigest()

    def close(self) -> None:
        """Write the end, and bring all to the disk."""
        self._put(bytes(2 * _BLOCK))
        self._put(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _put(self, data: bytes) -> None:
        self.whole.update(data)
        self._file.write(data)


def _write(place: Place, record: CollectionRecord, version: str, path: Path) -> dict[str, Any]:
    folder = f'{folder_of(record.name)}-{version}'
    with (
        path.open('xb') as file,
        tempfile.TemporaryFile(dir=path.parent) as listing,
        tempfile.TemporaryFile(dir=path.parent) as spool,
    ):
        archive = _Archive(file, folder, listing)
        _write_bounds(place, record, spool)
        archive.add(BOUNDS, spool.tell(), _chunks(spool))
        read = place.store.reader_of(record)
        groups = sorted(record.counts, key=lambda group: f'{folder_of(group)}/')
        for pair in _sorted_pairs(place, record, groups):
            image = tiff_of(pixels_of(read(pair), pair.encoding, pair.form), pair.frame)
            archive.add(f'{IMAGES}/{folder_of(pair.group)}/{pair.id}.tif', len(image), [image])
        for pair in _sorted_pairs(place, record, groups):
            text = json.dumps(label_document(pair, record), ensure_ascii=False).encode()
            archive.add(f'{LABELS}/{folder_of(pair.group)}/{pair.id}.json', len(text), [text])
        content = archive.content.hexdigest()
        head = {
            'format': FORMAT,
            'format_revision': FORMAT_REVISION,
            'version': version,
            'content_sha256': content,
            'data': record.document(100, '')['data'],
        }
        begin = json.dumps(head, ensure_ascii=False)[:-1].encode() + b', "files": {\n'
        end = b'\n}}\n'
        size = len(begin) + listing.tell() + len(end)
        archive.add_unlisted(META, size, _joined(begin, listing, end))
        archive.close()
    return {
        'version': version,
        'name': record.name,
        'collection': record.id,
        'revision': record.revision,
        'count': record.counts,
        'created_at': iso(datetime.now(timezone.utc)),
        'folder': folder,
        'num_files': archive.num_files + 1,
        'size': path.stat().st_size,
        'sha256': archive.whole.hexdigest(),
        'content_sha256': content,
    }


def _sorted_pairs(
    place: Place, record: CollectionRecord, groups: Iterable[str]
) -> Iterator[PairRecord]:
    """All pairs in the order of the names of their files, a few thousand in memory."""

    def run(group: str, num_digits: int) -> Iterator[PairRecord]:
        after = 10 ** (num_digits - 1) - 1
        while found := place.store.list_pairs(record.id, 0, _AT_ONCE, group, after):
            for pair in found:
                if pair.id >= 10**num_digits:
                    return
                yield pair
            after = found[-1].id

    for group in groups:
        # numbers of one length are sorted as they come, and those of all lengths are merged
        lengths: list[int] = []
        while place.store.list_pairs(record.id, 0, 1, group, 10 ** len(lengths) - 1):
            lengths.append(len(lengths) + 1)
        yield from heapq.merge(*(run(group, n) for n in lengths), key=lambda pair: str(pair.id))


def _write_bounds(place: Place, record: CollectionRecord, file: IO[bytes]) -> None:
    file.write(b'{"type": "FeatureCollection", "features": [')
    for number, pair in enumerate(place.store.iter_pairs(record.id)):
        feature = {
            'type': 'Feature',
            'id': pair.id,
            'properties': {'id': pair.id, 'group': pair.group},
            'geometry': footprint_of(pair.frame),
        }
        text = json.dumps(feature, ensure_ascii=False)
        file.write(f'{"," if number else ""}\n{text}'.encode())
    file.write(b'\n]}\n')


def _joined(begin: bytes, listing: IO[bytes], end: bytes) -> Iterator[bytes]:
    yield begin
    yield from _chunks(listing)
    yield end


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


@contextmanager
def _alone(place: Place, record: CollectionRecord) -> Iterator[None]:
    """While in here, no other process of this machine releases the collection."""
    make_private_directory(place.drafts)
    try:
        with release_lock(place, record.key).acquire(blocking=False):
            yield
    except Timeout as error:
        raise ConflictError(
            f'another release of {record.name!r} is being made: wait until it is there'
        ) from error


@contextmanager
def _workspace(place: Place) -> Iterator[Path]:
    """A directory that is cleared, by the next one if this process is killed."""
    clear_drafts(place.drafts)
    directory, lock = new_directory(place.drafts)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def _check_version(version: Any) -> str:
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise ConfigError(
            f'version={version!r}: it takes letters, digits and . _ - (no dot first), at most 100'
        )
    return version


def _key(record: CollectionRecord, version: str) -> str:
    return f'{record.key}/releases/{version}'
