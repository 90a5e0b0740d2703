"""The archive of a release: a tar that is written entry by entry.

A tar, not a zip: its entries are written one after the other with nothing to remember of them, and
images are compressed in themselves. What is in it says `finetuner.collections.release_format`.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

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
from finetuner.collections.store import CollectionStore
from finetuner.collections.tiles import pixels_of
from finetuner.storage.files import CHUNK_BYTES

_AT_ONCE = 1000
# always the same; a zip, which people may make of it, knows no time before 1980
_MTIME = 315_619_200
_BLOCK = tarfile.BLOCKSIZE


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


def write_archive(
    store: CollectionStore, record: CollectionRecord, version: str, path: Path
) -> dict[str, Any]:
    """Write the archive of a collection, file by file: any number of pairs takes no memory.

    Args:
        store: that has the collection.
        record: of it.
        version: of the release.
        path: of the archive; nothing is there.

    Returns:
        What is known of it: names, counts, size and hashes.
    """
    from rasterio import Env

    folder = f'{folder_of(record.name)}-{version}'
    with (
        # one for all images, which would otherwise make one each
        Env(),
        path.open('xb') as file,
        tempfile.TemporaryFile(dir=path.parent) as listing,
        tempfile.TemporaryFile(dir=path.parent) as spool,
    ):
        archive = _Archive(file, folder, listing)
        _write_bounds(store, record, spool)
        archive.add(BOUNDS, spool.tell(), _chunks(spool))
        read = store.reader_of(record)
        groups = sorted(record.counts, key=lambda group: f'{folder_of(group)}/')
        for pair in _sorted_pairs(store, record, groups):
            image = tiff_of(pixels_of(read(pair), pair.encoding, pair.form), pair.frame)
            archive.add(f'{IMAGES}/{folder_of(pair.group)}/{pair.id}.tif', len(image), [image])
        for pair in _sorted_pairs(store, record, groups):
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
    store: CollectionStore, record: CollectionRecord, groups: Iterable[str]
) -> Iterator[PairRecord]:
    """All pairs in the order of the names of their files, a few thousand in memory."""

    def run(group: str, num_digits: int) -> Iterator[PairRecord]:
        after = 10 ** (num_digits - 1) - 1
        while found := store.list_pairs(record.id, 0, _AT_ONCE, group, after):
            for pair in found:
                if pair.id >= 10**num_digits:
                    return
                yield pair
            after = found[-1].id

    for group in groups:
        # numbers of one length are sorted as they come, and those of all lengths are merged
        lengths: list[int] = []
        while store.list_pairs(record.id, 0, 1, group, 10 ** len(lengths) - 1):
            lengths.append(len(lengths) + 1)
        yield from heapq.merge(*(run(group, n) for n in lengths), key=lambda pair: str(pair.id))


def _write_bounds(store: CollectionStore, record: CollectionRecord, file: IO[bytes]) -> None:
    file.write(b'{"type": "FeatureCollection", "features": [')
    for number, pair in enumerate(store.iter_pairs(record.id)):
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
