"""Where collections are kept: on this machine, or on the server that one is logged in to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from finetuner.collections.draft import Draft
from finetuner.collections.finding import Query
from finetuner.collections.records import CollectionRecord, PairRecord, ReadImage
from finetuner.collections.spec import CollectionSpec
from finetuner.config import Settings
from finetuner.logins import Login, read_login


class Store(Protocol):
    """What is known of collections; see `CollectionStore` for what each does."""

    def check_name(self, name: str) -> None:
        """ConflictError when there is one of that name."""

    def create(self, spec: CollectionSpec, draft: Draft | None, key: str) -> CollectionRecord:
        """Save a collection with its first pairs."""
        ...

    def append(self, collection_id: int, draft: Draft) -> CollectionRecord:
        """Save more pairs of a collection."""
        ...

    def get(self, collection_id: int) -> CollectionRecord:
        """A collection by its number."""
        ...

    def find(self, name: str) -> CollectionRecord:
        """A collection by its name."""
        ...

    def search(self, query: Query) -> list[CollectionRecord]:
        """Collections that match."""
        ...

    def change(
        self,
        collection_id: int,
        name: str | None = None,
        description: str | None = None,
        public: bool | None = None,
    ) -> CollectionRecord:
        """Change what is not None."""
        ...

    def remove(self, collection_id: int) -> None:
        """Delete a collection."""

    def list_pairs(
        self,
        collection_id: int,
        offset: int,
        limit: int,
        group: str | None = None,
        after: int | None = None,
    ) -> list[PairRecord]:
        """Pairs in the order in which they were fed."""
        ...

    def iter_pairs(self, collection_id: int) -> Iterator[PairRecord]:
        """All pairs."""
        ...

    def relabel(self, pair_id: int, label: Any) -> PairRecord:
        """Give a pair another label."""
        ...

    def remove_pair(self, pair_id: int) -> None:
        """Remove a pair."""

    def remove_pairs(self, collection_id: int, pair_ids: Sequence[int]) -> int:
        """Remove pairs."""
        ...

    def reader_of(self, collection: CollectionRecord) -> ReadImage:
        """What reads the images of a collection."""
        ...

    def read_images(
        self, collection: CollectionRecord, pairs: Sequence[PairRecord]
    ) -> Iterator[bytes]:
        """The images of several pairs of a collection as they are kept, in their order."""
        ...


class Releases(Protocol):
    """Versions of collections, which never change; see `LocalReleases` for what each does."""

    def make(self, record: CollectionRecord, version: str) -> dict[str, Any]:
        """Keep a collection as it is now."""
        ...

    def list_all(self, record: CollectionRecord) -> list[dict[str, Any]]:
        """What is known of the releases of a collection."""
        ...

    def fetch(self, record: CollectionRecord, version: str, path: str | os.PathLike[str]) -> Path:
        """Write the archive of a release to a file."""
        ...


class Directories:
    """What is on this machine wherever collections are kept.

    Args:
        settings: where it is.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def drafts(self) -> Path:
        """Directory of pairs that are not saved yet."""
        return self.settings.home / 'collections-unsaved'

    @property
    def cache(self) -> Path:
        """Directory of the caches."""
        return self.settings.home / 'cache' / 'collections'


class Place(Protocol):
    """Everything that collections need."""

    @property
    def address(self) -> str:
        """Of the API that answers the links of documents."""
        ...

    @property
    def store(self) -> Store:
        """What is known of collections."""
        ...

    @property
    def drafts(self) -> Path:
        """Directory of pairs that are not saved yet."""
        ...

    @property
    def cache(self) -> Path:
        """Directory of the caches."""
        ...

    @property
    def is_cached_when_saved(self) -> bool:
        """Whether the cache is written as soon as pairs are saved."""
        ...

    @property
    def releases(self) -> Releases:
        """What keeps versions of collections."""
        ...


_places: dict[tuple[int, Settings, Login | None], Place] = {}


def current_place() -> Place:
    """That of what the environment says now; the same one as long as it says the same.

    After a login it is the server's, otherwise this machine's.
    """
    settings = Settings.from_environment()
    login = read_login(settings.home)
    # by process too: a forked child must not use its parent's connections
    key = (os.getpid(), settings, login)
    if key not in _places:
        _places[key] = _open(settings, login)
    return _places[key]


def _open(settings: Settings, login: Login | None) -> Place:
    if login is None:
        from finetuner.collections.local import LocalCollections

        return LocalCollections(settings)
    from finetuner.collections.remote import RemoteCollections

    return RemoteCollections(login.host, login.token, settings)
