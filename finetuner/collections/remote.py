"""Collections kept on a server, over its REST API: the same store, asked from afar."""

from __future__ import annotations

import base64
import os
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from finetuner.collections.draft import Draft
from finetuner.collections.exchange import documents_of_draft
from finetuner.collections.finding import Query
from finetuner.collections.geometry import Frame
from finetuner.collections.packs import Place
from finetuner.collections.place import Directories
from finetuner.collections.records import CollectionRecord, PairRecord, ReadImage
from finetuner.collections.release_format import archive_path, check_version
from finetuner.collections.spec import CollectionSpec
from finetuner.collections.tiles import ImageForm
from finetuner.config import Settings
from finetuner.excepts import ArtifactError, DataError, NotFoundError
from finetuner.transport import API, Transport

_PAGE = 1000
# of ids in an address
_IDS_AT_ONCE = 200
# a server that is about to end keeps nobody waiting
_PAUSE_SECONDS = 0.2


class RemoteStore:
    """The store of collections of a server; see `finetuner.collections.store` for what each does.

    Args:
        server: where it is.
        directory: for files on their way.
    """

    def __init__(self, server: Transport, directory: Path) -> None:
        self._server = server
        self._directory = directory

    def check_name(self, name: str) -> None:
        """Nothing: the server looks when the collection is made."""

    def create(self, spec: CollectionSpec, draft: Draft | None, key: str) -> CollectionRecord:
        """Make a collection with its first pairs: all of it, or nothing."""
        del key  # the server chooses
        body: dict[str, Any] = asdict(spec)
        if draft is not None:
            body['pairs'] = self._sent(draft)
        return _record(self._server.send('POST', '/data', json=body))

    def append(self, collection_id: int, draft: Draft) -> CollectionRecord:
        """Add pairs to a collection: all of them, or none."""
        path = f'/data/{collection_id}/datapoints'
        return _record(self._server.send('POST', path, json={'pairs': self._sent(draft)}))

    def get(self, collection_id: int) -> CollectionRecord:
        """A collection that may be read."""
        return _record(self._server.get(f'/data/{collection_id}'))

    def find(self, name: str) -> CollectionRecord:
        """A collection by its name."""
        return _record(self._server.get('/data/name', name=name))

    def search(self, query: Query) -> list[CollectionRecord]:
        """Collections that match."""
        sides = None if query.bbox is None else ','.join(map(repr, query.bbox))
        found = self._server.get('/search', **{**asdict(query), 'bbox': sides})
        return [_record(each) for each in found]

    def change(
        self,
        collection_id: int,
        name: str | None = None,
        description: str | None = None,
        public: bool | None = None,
    ) -> CollectionRecord:
        """Change what is not None."""
        path = f'/data/{collection_id}'
        if public is not None:
            return _record(self._server.send('PUT', f'{path}/publish', json={'public': public}))
        body = {'name': name, 'description': description}
        return _record(self._server.send('PUT', path, json=body))

    def remove(self, collection_id: int) -> None:
        """Delete a collection with all its pairs."""
        self._server.send('DELETE', f'/data/{collection_id}')

    def list_pairs(
        self,
        collection_id: int,
        offset: int,
        limit: int,
        group: str | None = None,
        after: int | None = None,
    ) -> list[PairRecord]:
        """Pairs in the order in which they were fed."""
        collection = self.get(collection_id)
        found: list[PairRecord] = []
        while len(found) < limit:
            asked = min(_PAGE, limit - len(found))
            place = {'offset': offset + len(found), 'limit': asked, 'group': group, 'after': after}
            page = self._server.get(f'/data/{collection_id}/datapoints', kept=True, **place)
            found += [_pair(each, collection) for each in page]
            if len(page) < asked:
                break
        return found

    def iter_pairs(self, collection_id: int) -> Iterator[PairRecord]:
        """All pairs in the order in which they were fed, a page in memory at a time."""
        after = 0
        while found := self.list_pairs(collection_id, 0, _PAGE, after=after):
            yield from found
            after = found[-1].id

    def relabel(self, pair_id: int, label: Any) -> PairRecord:
        """Give a pair another label."""
        shown = self._server.send('PUT', f'/datapoints/{pair_id}', json={'label': _plain(label)})
        after = shown['data']['id'] - 1
        return self.list_pairs(shown['data']['dataset_id'], 0, 1, after=after)[0]

    def remove_pair(self, pair_id: int) -> None:
        """Remove a pair from its collection."""
        self._server.send('DELETE', f'/datapoints/{pair_id}')

    def remove_pairs(self, collection_id: int, pair_ids: Sequence[int]) -> int:
        """Remove pairs from a collection; returns how many were there."""
        removed = 0
        for start in range(0, len(pair_ids), _IDS_AT_ONCE):
            some = list(pair_ids[start : start + _IDS_AT_ONCE])
            answer = self._server.send('DELETE', f'/data/{collection_id}/datapoints', ids=some)
            removed += answer['removed']
        return removed

    def reader_of(self, collection: CollectionRecord) -> ReadImage:
        """What reads the images of a collection."""
        del collection
        return self._read

    def read_images(
        self, collection: CollectionRecord, pairs: Sequence[PairRecord]
    ) -> Iterator[bytes]:
        """The images of several pairs of a collection, a request for hundreds of them."""
        for start in range(0, len(pairs), _IDS_AT_ONCE):
            some = pairs[start : start + _IDS_AT_ONCE]
            asked = {'ids': [pair.id for pair in some]}
            sizes = [pair.place.num_bytes for pair in some]
            num_read = 0
            path = f'/data/{collection.id}/images'
            with closing(self._server.get_pieces(path, asked, sizes)) as pieces:
                for pair, data in zip(some, pieces, strict=False):
                    if zlib.crc32(data) != pair.place.checksum:
                        break
                    num_read += 1
                    yield data
            # where an answer ends early, those that it lacks are asked for one by one
            yield from map(self._read, some[num_read:])

    def _read(self, pair: PairRecord) -> bytes:
        data = self._server.get_bytes(f'/datapoints/{pair.id}/image', form='kept')
        if zlib.crc32(data) != pair.place.checksum:
            raise DataError(
                f'the image of pair {pair.id} did not come as the server has it: try again'
            )
        return data

    def _sent(self, draft: Draft) -> dict[str, Any]:
        """Send the pairs of a draft; returns what names them."""
        from finetuner.data.stored.storing import save_documents

        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.push-', dir=self._directory) as folder:
            path = Path(folder) / 'documents'
            sha256 = save_documents(documents_of_draft(draft), path)
            self._server.send_file(path, sha256)
        return {
            'documents': f'sha256:{sha256}',
            'classes': list(draft.classes),
            'sensors': draft.sensors,
        }


class RemoteReleases:
    """The releases of collections of a server; see `LocalReleases` for what each does.

    Args:
        server: where it is.
    """

    def __init__(self, server: Transport) -> None:
        self._server = server

    def make(self, record: CollectionRecord, version: str) -> dict[str, Any]:
        """Keep a collection as it is now, however long that takes.

        The server answers soon, and is asked again until the release is there. A connection that
        breaks, or a server that starts anew, is asked again too: by the ticket it knows what it did.
        """
        check_version(version)
        wish = {'version': version, 'ticket': uuid.uuid4().hex}
        while True:
            about = self._server.ask(f'/data/{record.id}/releases', wish)
            if 'sha256' in about:
                return dict(about)
            time.sleep(_PAUSE_SECONDS)

    def list_all(self, record: CollectionRecord) -> list[dict[str, Any]]:
        """What is known of the releases of a collection, in the order in which they were made."""
        return list(self._server.get(f'/data/{record.id}/releases'))

    def fetch(self, record: CollectionRecord, version: str, path: str | os.PathLike[str]) -> Path:
        """Write the archive of a release to a file, or into a directory that is there."""
        address = f'/data/{record.id}/releases/{check_version(version)}'
        about = self._server.get(address)
        target = archive_path(path, about['name'], version)
        # in a folder of its own: whatever happens, nothing is left beside the target
        with tempfile.TemporaryDirectory(prefix='.release-', dir=target.parent) as folder:
            unfinished = Path(folder) / 'release.tar'
            try:
                self._server.fetch(f'{address}/archive', {}, unfinished, about['sha256'])
            except DataError as error:
                raise ArtifactError(
                    f'release {version!r} of {record.name!r} is damaged, or was on its way: its '
                    'archive has another hash than when it was made; try again'
                ) from error
            unfinished.replace(target)
        return target


class RemoteCollections(Directories):
    """Everything that collections need where they are kept on a server.

    Args:
        host: address of the server.
        token: None for a server that wants none.
        settings: where drafts and caches are kept on this machine.
    """

    def __init__(self, host: str, token: str | None, settings: Settings) -> None:
        super().__init__(settings)
        self.address = host.rstrip('/') + API
        self._server = Transport(host, token)

    @cached_property
    def store(self) -> RemoteStore:
        """What is known of collections."""
        return RemoteStore(self._server, self.settings.home / 'fetched')

    @property
    def is_cached_when_saved(self) -> bool:
        """Whoever sends pairs to a server need not want them back."""
        return False

    @cached_property
    def releases(self) -> RemoteReleases:
        """What keeps versions of collections."""
        return RemoteReleases(self._server)


def _record(document: dict[str, Any]) -> CollectionRecord:
    data = document['data']
    bands, height, width = data['shape'] or (0, *data['tile_size'])
    return CollectionRecord(
        id=data['id'],
        key=data['key'],
        owner=data['userId'],
        name=data['name'],
        description=data['description'],
        mltype=data['mlType'],
        classes=tuple(data['classes']),
        has_fixed_classes=data['has_fixed_classes'],
        partition=data['partition'] and tuple(data['partition']),
        tile_size=(height, width),
        form=ImageForm((bands, height, width), data['dtype']) if data['dtype'] else None,
        sensors=tuple(data['sensors']),
        source=data['source'],
        bbox=data['bbox'] and tuple(data['bbox']),
        public=data['public'],
        revision=data['revision'],
        created_at=data['created_at'],
        updated_at=data['updated_at'],
        counts=data['count'],
    )


def _pair(shown: dict[str, Any], collection: CollectionRecord) -> PairRecord:
    if collection.form is None:
        raise NotFoundError(f'collection {collection.name!r} has no pairs')
    transform = shown['transform'] and tuple(shown['transform'])
    return PairRecord(
        id=shown['id'],
        collection_id=collection.id,
        group=shown['group'],
        place=Place(*shown['place']),
        encoding=shown['encoding'],
        form=collection.form,
        label=base64.b64decode(shown['label']),
        frame=Frame(*collection.tile_size, transform, shown['crs']),
        updated_at=shown['updated_at'],
    )


def _plain(label: Any) -> Any:
    """A label as JSON holds it."""
    if hasattr(label, 'tolist'):
        return label.tolist()
    if isinstance(label, dict):
        return {name: _plain(each) for name, each in label.items()}
    if isinstance(label, list | tuple):
        return [_plain(each) for each in label]
    return label
