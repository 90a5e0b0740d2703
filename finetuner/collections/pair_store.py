"""The pairs of collections: rows in SQL, images in packs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session

from finetuner.collections.labels import build_label_kind
from finetuner.collections.packs import PackReader
from finetuner.collections.records import (
    CollectionRecord,
    PairRecord,
    ReadImage,
    collection_record,
    pair_record,
)
from finetuner.collections.spec import is_text
from finetuner.collections.tables import MAX_NUMBER, CollectionPairRow, CollectionRow
from finetuner.excepts import NotFoundError
from finetuner.storage.database import Database
from finetuner.storage.files import FileStore

ROWS_AT_ONCE = 1000


class PairStore:
    """Pairs of the collections of one owner, and of those that others have published.

    Args:
        database: that knows them.
        files: that holds their packs, in a folder by the collection's key.
        owner: who sees and changes his own; '' is this machine's own user.
    """

    def __init__(self, database: Database, files: FileStore, owner: str = '') -> None:
        self._database = database
        self._files = files
        self._owner = owner

    def list_pairs(
        self,
        collection_id: int,
        offset: int,
        limit: int,
        group: str | None = None,
        after: int | None = None,
    ) -> list[PairRecord]:
        """Pairs in the order in which they were fed.

        Args:
            collection_id: of the collection.
            offset: how many are left out before them.
            limit: at most so many.
            group: only its pairs.
            after: only pairs with larger numbers.
        """
        if group is not None and not is_text(group):
            return []
        offset, limit = min(offset, MAX_NUMBER), min(limit, MAX_NUMBER)
        with self._database.reader() as session:
            collection = self._readable_row(session, collection_id)
            query = select(CollectionPairRow).where(
                CollectionPairRow.collection_id == collection_id
            )
            if group is not None:
                query = query.where(CollectionPairRow.group_name == group)
            if after is not None:
                query = query.where(CollectionPairRow.id > max(-1, min(after, MAX_NUMBER)))
            query = query.order_by(CollectionPairRow.id).offset(offset).limit(limit)
            return [pair_record(row, collection) for row in session.scalars(query)]

    def pairs_of(self, collection_id: int, pair_ids: Sequence[int]) -> list[PairRecord]:
        """Pairs of a collection by their numbers, in this order, up to the first that is not there.

        Args:
            collection_id: of the collection.
            pair_ids: at most a thousand.
        """
        with self._database.reader() as session:
            collection = self._readable_row(session, collection_id)
            query = select(CollectionPairRow).where(
                CollectionPairRow.collection_id == collection_id,
                CollectionPairRow.id.in_(_possible(pair_ids)),
            )
            found = {row.id: pair_record(row, collection) for row in session.scalars(query)}
        there = itertools.takewhile(found.__contains__, pair_ids)
        return [found[pair_id] for pair_id in there]

    def iter_pairs(self, collection_id: int) -> Iterator[PairRecord]:
        """All pairs in the order in which they were fed, a thousand in memory at a time."""
        after = 0
        while found := self.list_pairs(collection_id, 0, ROWS_AT_ONCE, after=after):
            yield from found
            after = found[-1].id

    def get_pair(self, pair_id: int) -> tuple[PairRecord, CollectionRecord]:
        """A pair that the owner may read, and its collection; NotFoundError where there is none."""
        with self._database.reader() as session:
            row = _pair_row(session, pair_id)
            try:
                collection = self._readable_row(session, row.collection_id)
            except NotFoundError as error:
                raise NotFoundError(f'there is no pair {pair_id}: it was removed') from error
            return pair_record(row, collection), self._record(session, collection)

    def relabel(self, pair_id: int, label: Any) -> PairRecord:
        """Give a pair another label.

        Raises:
            DataError: it is no label of this collection.
            NotFoundError: the owner has no such pair.
        """
        # read before anything is locked: that may take a while
        with self._database.reader() as session:
            row, collection = self._own_pair(session, pair_id)
            kind = build_label_kind(collection.mltype, tuple(collection.classes))
            frame = pair_record(row, collection).frame
        kept = kind.encode(kind.read(label, frame))
        with self._database.session() as session:
            row, collection = self._own_pair(session, pair_id)
            row.label = kept
            row.updated_at = now()
            touch(collection)
            return pair_record(row, collection)

    def remove_pair(self, pair_id: int) -> None:
        """Remove a pair from its collection; NotFoundError where the owner has none."""
        with self._database.session() as session:
            row, collection = self._own_pair(session, pair_id)
            session.delete(row)
            touch(collection)

    def remove_pairs(self, collection_id: int, pair_ids: Sequence[int]) -> int:
        """Remove pairs from a collection, all at once; returns how many were there."""
        pair_ids = [number for number in pair_ids if 0 <= number <= MAX_NUMBER]
        with self._database.session() as session:
            collection = self._own_row(session, collection_id)
            removed = 0
            known = _possible(pair_ids)
            for start in range(0, len(known), ROWS_AT_ONCE):
                some = CollectionPairRow.id.in_(known[start : start + ROWS_AT_ONCE])
                mine = CollectionPairRow.collection_id == collection_id
                gone = session.execute(delete(CollectionPairRow).where(some, mine))
                removed += gone.rowcount  # type: ignore[attr-defined]
            touch(collection)
            return removed

    def reader_of(self, collection: CollectionRecord) -> ReadImage:
        """What reads the images of a collection."""
        reader = PackReader(self._files, collection.key)
        return lambda pair: reader.read(pair.place)

    def read_images(
        self, collection: CollectionRecord, pairs: Sequence[PairRecord]
    ) -> Iterator[bytes]:
        """The images of several pairs of a collection as they are kept, each read when it is asked for.

        Raises:
            DataError: one is not there any more, or damaged.
        """
        yield from map(self.reader_of(collection), pairs)

    def _mine(self) -> Select[Any]:
        return select(CollectionRow).where(CollectionRow.owner == self._owner)

    def _is_readable(self) -> Any:
        return (CollectionRow.owner == self._owner) | CollectionRow.public

    def _readable_row(self, session: Session, collection_id: int) -> CollectionRow:
        query = select(CollectionRow).where(CollectionRow.id == collection_id, self._is_readable())
        row = session.scalars(query).first() if 0 <= collection_id <= MAX_NUMBER else None
        if row is None:
            raise _no_collection(collection_id)
        return row

    def get_own(self, collection_id: int) -> CollectionRecord:
        """A collection of the owner; NotFoundError where there is none."""
        with self._database.reader() as session:
            return self._record(session, self._own_row(session, collection_id))

    def _own_row(self, session: Session, collection_id: int) -> CollectionRow:
        """The owner's row, which nobody else changes until the session ends."""
        query = self._mine().where(CollectionRow.id == collection_id).with_for_update()
        row = session.scalars(query).first() if 0 <= collection_id <= MAX_NUMBER else None
        if row is None:
            raise _no_collection(collection_id)
        return row

    def _own_pair(self, session: Session, pair_id: int) -> tuple[CollectionPairRow, CollectionRow]:
        row = _pair_row(session, pair_id)
        try:
            return row, self._own_row(session, row.collection_id)
        except NotFoundError as error:
            raise NotFoundError(f'there is no pair {pair_id} of yours') from error

    def _record(self, session: Session, row: CollectionRow) -> CollectionRecord:
        query = (
            select(CollectionPairRow.group_name, func.count())
            .where(CollectionPairRow.collection_id == row.id)
            .group_by(CollectionPairRow.group_name)
            .order_by(func.min(CollectionPairRow.id))
        )
        return collection_record(row, {row[0]: row[1] for row in session.execute(query)})


def touch(row: CollectionRow) -> None:
    """Note that the pairs of a collection were changed."""
    row.revision += 1
    row.updated_at = now()


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(timezone.utc)


def lock_files(database: Database, session: Session, key: str) -> None:
    """Wait for whoever names files of a collection, or deletes those that nobody names.

    Args:
        database: that the session is of.
        session: that may write; nobody else gets past this until it ends.
        key: of the collection's files.
    """
    database.lock(session, int(key[:15], 16))


def _possible(pair_ids: Sequence[int]) -> list[int]:
    return [number for number in pair_ids if 0 <= number <= MAX_NUMBER]


def _pair_row(session: Session, pair_id: int) -> CollectionPairRow:
    row = session.get(CollectionPairRow, pair_id) if 0 <= pair_id <= MAX_NUMBER else None
    if row is None:
        raise NotFoundError(f'there is no pair {pair_id}: it was removed')
    return row


def _no_collection(collection_id: int) -> NotFoundError:
    return NotFoundError(
        f'there is no collection {collection_id}: it was removed, or is not shared; search() lists '
        'those that are there'
    )
