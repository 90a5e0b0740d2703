"""Collections kept on this machine: the store, the drafts, and the caches that batches are read from."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from finetuner.collections.place import Directories
from finetuner.collections.releases import LocalReleases
from finetuner.collections.store import CollectionStore
from finetuner.config import Settings
from finetuner.storage.database import open_database
from finetuner.storage.files import FileStore

if TYPE_CHECKING:
    from finetuner.storage.database import Database


class LocalCollections(Directories):
    """Everything behind a `Settings` that collections need, opened when first needed.

    Args:
        settings: where collections are kept.
        owner: whose they are; '' is this machine's own user.
        database: opened already; None opens that of the settings.
    """

    def __init__(
        self, settings: Settings, owner: str = '', database: Database | None = None
    ) -> None:
        super().__init__(settings)
        self.owner = owner
        self._given = database

    @property
    def address(self) -> str:
        """Of the API that answers the links of documents; a path where no server is asked."""
        return '/api/v1'

    @cached_property
    def store(self) -> CollectionStore:
        """What is known of collections."""
        return CollectionStore(self.database, self.files, self.owner)

    @property
    def is_cached_when_saved(self) -> bool:
        """Its images are here already."""
        return True

    @cached_property
    def releases(self) -> LocalReleases:
        """What keeps versions of collections."""
        return LocalReleases(self.store, self.files, self.drafts, self.owner)

    @cached_property
    def database(self) -> Database:
        """That knows them."""
        return self._given or open_database(self.settings.database_url)

    @cached_property
    def files(self) -> FileStore:
        """Where their packs and releases are, a folder each; beside the artifacts."""
        artifacts = FileStore(self.settings.artifacts_url, self.settings.home / 'cache')
        if artifacts.is_local:
            return FileStore(self.settings.home / 'collections')
        url = self.settings.artifacts_url.rstrip('/') + '/collections'
        return FileStore(url, self.settings.home / 'cache')
