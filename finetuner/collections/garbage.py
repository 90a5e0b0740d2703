"""Deletes what no collection refers to any more: images, archives, caches, and unfinished work.

Images are in the store before their rows, so what has no row is garbage, or somebody's who is just
saving. It is deleted in a transaction that waits for whoever saves; who saves looks in such a
transaction whether its images are all there, and stores again what is not: a draft keeps its images
until they have their rows. So what is about to be named is never lost, however old it looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from finetuner.collections.draft import clear_drafts
from finetuner.collections.local import LocalCollections
from finetuner.collections.pair_store import lock_files
from finetuner.collections.releases import FOLDER, named_files
from finetuner.collections.tables import CollectionPairRow, CollectionRow
from finetuner.excepts import ConfigError
from finetuner.logins import read_login
from finetuner.storage.leftovers import KEPT_SECONDS, delete_path, left_over

_KEY = re.compile(r'[0-9a-f]{32}')
_PACK = re.compile(r'[0-9a-f]{32}\.pack')
# that of a server's collection looks like that of one that is gone
_SERVERS_CACHE_SECONDS = 30 * 24 * 3600.0
# nothing but its age says that a half-written file is nobody's
_WRITING_SECONDS = 60.0


@dataclass
class CollectionGarbage:
    """What was, or would be, deleted.

    Attributes:
        packs: files of images of which no pair is left, `<key of the collection>/<name>`.
        releases: archives that no release names, `<key of the collection>/releases/<name>`.
        caches: paths of the caches of collections that are gone.
        unfinished: paths of what a process left that was killed.
        num_bytes: of all that.
    """

    packs: list[str] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    num_bytes: int = 0


def collect_collection_garbage(
    place: LocalCollections, seconds: float = KEPT_SECONDS, only_look: bool = False
) -> CollectionGarbage:
    """Delete what no collection of any owner refers to, and what killed processes left.

    Collections, their pairs and their releases are never touched. A file of images of which any pair is
    left stays as it is.

    Args:
        place: any owner's; all owners' collections are looked at.
        seconds: what is newer stays; half-written files stay for a minute in any case.
        only_look: delete nothing.

    Returns:
        What was deleted, or would be.

    Raises:
        ConfigError: seconds is negative.
    """
    if not seconds >= 0:
        raise ConfigError(f'seconds is {seconds}: it takes 0 or more')
    collecting = _Collecting(place, seconds, only_look)
    for key in collecting.stored_keys():
        collecting.take_packs(key)
        collecting.take_releases(key)
        collecting.take_folders(key)
    collecting.take_caches()
    collecting.take_unfinished()
    return collecting.found


class _Collecting:
    def __init__(self, place: LocalCollections, seconds: float, only_look: bool) -> None:
        self.found = CollectionGarbage()
        self._place = place
        self._files = place.files
        self._database = place.database
        self._seconds = seconds
        self._only_look = only_look

    def stored_keys(self) -> list[str]:
        """Keys of all collections of which there are files, here or in the store."""
        copies = [path.name for path in self._files.list_copies()]
        return sorted(filter(_KEY.fullmatch, {*copies, *self._files.list_names()}))

    def take_packs(self, key: str) -> None:
        """Delete the packs in which no pair is left."""
        # listed before what is named: a copy is made of what is named, a file before it is
        copies = self._files.list_copies(key)
        names = self._files.list_names(key)
        with self._database.reader() as session:
            named = self._named_packs(session, key)
        for name in names:
            if _PACK.fullmatch(name) and name not in named:
                self._take_pack(key, name)
        gone = [path for path in copies if path.name not in {*named, *names, FOLDER}]
        self._take_paths(gone, self.found.packs)
        self._take_half_sent(key, names)

    def take_releases(self, key: str) -> None:
        """Delete the archives that no release names."""
        folder = f'{key}/{FOLDER}'
        for name in self._unnamed(key, self._files.list_names(folder)):
            # as of a pack; what is half sent to a store elsewhere is not asked for when it is named
            at_least = _WRITING_SECONDS if name.endswith('.part') else 0.0
            with self._database.session() as session:
                lock_files(self._database, session, key)
                if self._unnamed(key, [name]):
                    self._take_file(f'{folder}/{name}', self.found.releases, at_least)

    def take_folders(self, key: str) -> None:
        """Delete the folders of a collection that is gone, once nothing is in them."""
        if not self._only_look and not self._is_known(key):
            for folder in (f'{key}/{FOLDER}', key):
                self._files.delete_empty(folder)

    def take_caches(self) -> None:
        """Delete the caches of collections that are gone, and that nobody reads."""
        from finetuner.collections.cache import remove_unused

        is_logged_in = read_login(self._place.settings.home) is not None
        seconds = max(self._seconds, _SERVERS_CACHE_SECONDS if is_logged_in else 0)
        for path, num_bytes in left_over(_folders_of(self._place.cache), seconds):
            if not self._is_known(path.name) and (self._only_look or remove_unused(path)):
                self.found.caches.append(str(path))
                self.found.num_bytes += num_bytes

    def take_unfinished(self) -> None:
        """Delete the drafts of dead processes, and half-written files."""
        drafts = self._place.drafts
        if drafts.is_dir():
            for path, num_bytes in clear_drafts(drafts, self._seconds, self._only_look):
                self.found.unfinished.append(str(path))
                self.found.num_bytes += num_bytes
        half_written = self._files.list_unfinished()
        self._take_paths(half_written, self.found.unfinished, _WRITING_SECONDS)

    def _take_pack(self, key: str, name: str) -> None:
        # a writing transaction: nobody can name the pack until it has ended
        with self._database.session() as session:
            lock_files(self._database, session, key)
            if name not in self._named_packs(session, key):
                self._take_file(f'{key}/{name}', self.found.packs)

    def _take_half_sent(self, key: str, names: list[str]) -> None:
        """What a process began to send to a store that is not a local disk."""
        for name in names:
            if name.endswith('.part'):
                self._take_file(f'{key}/{name}', self.found.unfinished, _WRITING_SECONDS)

    def _take_file(self, key: str, taken: list[str], at_least: float = 0.0) -> None:
        seconds = max(self._seconds, at_least)
        try:
            num_bytes = self._files.size(key)
            if seconds and self._files.seconds_since_change(key) < seconds:
                return
        except FileNotFoundError:
            # another one was quicker
            return
        taken.append(key)
        self.found.num_bytes += num_bytes
        if not self._only_look:
            self._files.delete(key)

    def _take_paths(self, paths: list[Path], taken: list[str], at_least: float = 0.0) -> None:
        for path, num_bytes in left_over(paths, max(self._seconds, at_least)):
            taken.append(str(path))
            self.found.num_bytes += num_bytes
            if not self._only_look:
                delete_path(path)

    def _unnamed(self, key: str, names: list[str]) -> list[str]:
        named = named_files(self._files, key) if self._is_known(key) else set()
        return [name for name in names if name not in named]

    def _is_known(self, key: str) -> bool:
        with self._database.reader() as session:
            known = select(CollectionRow.id).where(CollectionRow.key == key)
            return session.scalars(known).first() is not None

    def _named_packs(self, session: Session, key: str) -> set[str]:
        mine = CollectionPairRow.collection_id == CollectionRow.id
        named = select(CollectionPairRow.pack).join(CollectionRow, mine)
        return set(session.scalars(named.where(CollectionRow.key == key).distinct()))


def _folders_of(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (path for path in root.iterdir() if _KEY.fullmatch(path.name))
