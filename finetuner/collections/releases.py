"""Releases of collections kept here: archives of what they were at one moment, which never change.

The archive lies beside the packs, under `<key>/releases/<version>-<hash>.tar`; what is known of it is
`<version>.json`, written last: without it nothing is served. It is written while the collection is
locked in the database, which is one for all machines: of several that make the same version one
gets there, and the archives of the others are deleted. What killed makers left is garbage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetuner.collections.draft import clear_drafts, new_directory
from finetuner.collections.records import CollectionRecord
from finetuner.collections.release_archive import write_archive
from finetuner.collections.release_format import archive_path, check_version
from finetuner.collections.store import CollectionStore
from finetuner.excepts import ArtifactError, ConflictError, ForbiddenError, NotFoundError
from finetuner.storage.database import make_private_directory
from finetuner.storage.files import FileStore

FOLDER = 'releases'
# of the hash of an archive, in its name
_DIGITS = 32
_TICKET = 'ticket'


class LocalReleases:
    """Releases of the collections of one owner, and of those that others have published.

    Args:
        store: that knows the collections.
        files: that holds them.
        drafts: directory for archives that are not whole yet.
        owner: whose collections may be released.
    """

    def __init__(self, store: CollectionStore, files: FileStore, drafts: Path, owner: str) -> None:
        self._store = store
        self._files = files
        self._drafts = drafts
        self._owner = owner

    def make(self, record: CollectionRecord, version: str, ticket: str = '') -> dict[str, Any]:
        """Keep a collection as it is now.

        Args:
            record: of the collection, as it is now.
            version: what the release is called.
            ticket: of whoever asks: who asks again with the same one gets the release that was made
                for it; '' is nobody's.

        Returns:
            What is known of it, as `list_all` gives it.

        Raises:
            ConfigError: the version has no such name.
            ForbiddenError: the collection is somebody else's.
            ConflictError: there is such a version, or the collection was changed meanwhile.
        """
        check_version(version)
        if record.owner != self._owner:
            raise ForbiddenError(f'collection {record.name!r} is not yours: its owner releases it')
        if self._exists(record, version):
            return self._made_before(record, version, ticket)
        with self._workspace() as directory:
            path = directory / 'release.tar'
            about = write_archive(self._store, record, version, path)
            while True:
                self._files.put_file(path, _archive_key(record, about), may_link=True)
                published = self._publish(record, about, ticket)
                if published is not None:
                    return published

    def list_all(self, record: CollectionRecord) -> list[dict[str, Any]]:
        """What is known of the releases of a collection, in the order in which they were made."""
        names = self._files.list_names(f'{record.key}/{FOLDER}')
        versions = [name.removesuffix('.json') for name in names if name.endswith('.json')]
        found = [_shown(self._read(record, version)) for version in versions]
        return sorted(found, key=lambda about: (about['created_at'], about['version']))

    def get(self, record: CollectionRecord, version: str) -> dict[str, Any]:
        """What is known of a release.

        Raises:
            ConfigError: a version has no such name.
            NotFoundError: there is no such release.
        """
        check_version(version)
        if not self._exists(record, version):
            known = ', '.join(about['version'] for about in self.list_all(record)) or 'none'
            raise NotFoundError(f'{record.name!r} has no release {version!r}; it has: {known}')
        return _shown(self._read(record, version))

    def fetch(self, record: CollectionRecord, version: str, path: str | os.PathLike[str]) -> Path:
        """Write the archive of a release to a file, or into a directory that is there.

        Returns:
            The path of the file.

        Raises:
            ConfigError: a version has no such name, or the folder of the file is not there.
            NotFoundError: there is no such release.
            ArtifactError: its archive is not what it was.
        """
        about = self.get(record, version)
        target = archive_path(path, about['name'], version)
        unfinished = target.with_name(f'.{uuid.uuid4().hex}.part')
        digest = hashlib.sha256()
        try:
            with unfinished.open('xb') as file:
                for chunk in self.read_archive(record, about):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != about['sha256']:
                raise ArtifactError(
                    f'release {version!r} of {record.name!r} is damaged: its archive has another '
                    'hash than when it was made'
                )
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
        return target

    def local_archive(self, record: CollectionRecord, about: dict[str, Any]) -> Path | None:
        """The archive of a release as a file of this machine; None where it lies elsewhere."""
        if not self._files.is_local:
            return None
        return self._files.local_path(_archive_key(record, about))

    def read_archive(self, record: CollectionRecord, about: dict[str, Any]) -> Iterator[bytes]:
        """The archive of a release, piece by piece."""
        return self._files.read(_archive_key(record, about))

    # below

    def _publish(
        self, record: CollectionRecord, about: dict[str, Any], ticket: str
    ) -> dict[str, Any] | None:
        """Let everybody see an archive, unless another one was quicker.

        Returns:
            What is seen; None when the archive, which had no name yet, was deleted as garbage.
        """
        version, archive = about['version'], _archive_key(record, about)
        try:
            with self._store.held(record) as revision:
                names = self._files.list_names(f'{record.key}/{FOLDER}')
                if f'{version}.json' in names:
                    # who was quicker may have made the very same
                    if _archive_key(record, self._read(record, version)) != archive:
                        self._files.delete(archive)
                    return self._made_before(record, version, ticket)
                if revision == record.revision:
                    if _archive_name(about) not in names:
                        return None
                    text = json.dumps({**about, _TICKET: ticket}, ensure_ascii=False)
                    self._files.write(_about_key(record, version), [text.encode()])
                    return about
        except NotFoundError:
            self._files.delete(archive)
            raise
        self._files.delete(archive)
        raise ConflictError(f'{record.name!r} was changed while it was released: release again')

    def _made_before(self, record: CollectionRecord, version: str, ticket: str) -> dict[str, Any]:
        about = self._read(record, version)
        if not ticket or about[_TICKET] != ticket:
            raise ConflictError(
                f'{record.name!r} has a release {version!r}, and releases never change: choose '
                'another version'
            )
        return _shown(about)

    def _exists(self, record: CollectionRecord, version: str) -> bool:
        # listed, and not asked for: some stores answer from what they listed long ago
        return f'{version}.json' in self._files.list_names(f'{record.key}/{FOLDER}')

    def _read(self, record: CollectionRecord, version: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(b''.join(self._files.read(_about_key(record, version))))
        return found

    @contextmanager
    def _workspace(self) -> Iterator[Path]:
        """A directory that is cleared, by the next one if this process is killed."""
        make_private_directory(self._drafts)
        clear_drafts(self._drafts)
        directory, lock = new_directory(self._drafts)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            lock.release()


def named_files(files: FileStore, key: str) -> set[str]:
    """Names of the files that the releases of a collection are in, by its key."""
    folder = f'{key}/{FOLDER}'
    names = [name for name in files.list_names(folder) if name.endswith('.json')]
    named = set(names)
    for name in names:
        # it may be removed at this moment
        with suppress(NotFoundError):
            named.add(_archive_name(json.loads(b''.join(files.read(f'{folder}/{name}')))))
    return named


def _shown(about: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name != _TICKET}


def _about_key(record: CollectionRecord, version: str) -> str:
    return f'{record.key}/{FOLDER}/{version}.json'


def _archive_key(record: CollectionRecord, about: dict[str, Any]) -> str:
    return f'{record.key}/{FOLDER}/{_archive_name(about)}'


def _archive_name(about: dict[str, Any]) -> str:
    return f'{about["version"]}-{about["sha256"][:_DIGITS]}.tar'
