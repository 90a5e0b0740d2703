"""The store of collections: what is known of them and their pairs in SQL, their images in packs."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from finetuner.collections.draft import Draft
from finetuner.collections.finding import Query, forget_words, matching, note_words
from finetuner.collections.geometry import Bounds, united_boxes, united_degrees
from finetuner.collections.pair_store import ROWS_AT_ONCE, PairStore, lock_files, now, touch
from finetuner.collections.records import CollectionRecord, form_of
from finetuner.collections.spec import (
    MAX_DESCRIPTION,
    MAX_NAME,
    MOST_GROUPS,
    CollectionSpec,
    check_sensors,
    check_text,
    is_text,
)
from finetuner.collections.tables import CollectionPairRow, CollectionRow
from finetuner.excepts import (
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
    unknown_name,
)


class CollectionStore(PairStore):
    """Collections of one owner, and those that others have published.

    Args:
        database: that knows them.
        files: that holds their packs, in a folder by their key.
        owner: who sees and changes his own; '' is this machine's own user.
    """

    def for_owner(self, owner: str) -> CollectionStore:
        """The same store as another owner sees it."""
        return CollectionStore(self._database, self._files, owner)

    # collections

    def check_name(self, name: str) -> None:
        """ConflictError when the owner has a collection of that name."""
        with self._database.reader() as session:
            if session.scalars(self._mine().where(CollectionRow.name == name)).first() is not None:
                raise ConflictError(_taken(name))

    def create(self, spec: CollectionSpec, draft: Draft | None, key: str) -> CollectionRecord:
        """Save a collection with its first pairs: all of it, or nothing.

        Args:
            spec: what it was made with.
            draft: its pairs; None for a collection that is still empty. It stays as it is: after an error
                it can be saved again.
            key: of its files, 32 hex characters.

        Raises:
            ConflictError: the name is taken.
        """
        self.check_name(spec.name)
        row = CollectionRow(
            key=key,
            owner=self._owner,
            name=spec.name,
            description=spec.description,
            words='',
            mltype=spec.mltype,
            classes=list(spec.classes or ()),
            has_fixed_classes=spec.classes is not None,
            partition=None if spec.partition is None else list(spec.partition),
            shape=[0, *spec.tile_size],
            dtype='',
            sensors=[],
            source='',
            public=spec.public,
            revision=0,
            created_at=now(),
            updated_at=now(),
        )
        bounds = None if draft is None else united_degrees(draft.boxes)
        with _taken_is_told(spec.name), self._session_with_packs(draft, key) as session:
            session.add(row)
            session.flush()
            note_words(session, row)
            if draft is not None:
                self._add_pairs(session, row, draft, bounds)
            return self._record(session, row)

    def append(self, collection_id: int, draft: Draft) -> CollectionRecord:
        """Save more pairs of a collection: all of them, or none.

        Raises:
            NotFoundError: the owner has no such collection.
            ConflictError: others have given it pairs of other classes or images meanwhile.
        """
        with self._database.reader() as session:
            key = self._own_row(session, collection_id).key
        bounds = united_degrees(draft.boxes)
        with self._session_with_packs(draft, key) as session:
            row = self._own_row(session, collection_id)
            if tuple(row.classes) != draft.classes[: len(row.classes)]:
                raise ConflictError(
                    f'collection {row.name!r} has other classes by now than when these pairs were '
                    'fed: open it again, and feed them again'
                )
            if form_of(row) not in (None, draft.form):
                raise ConflictError(
                    f'collection {row.name!r} was given other images meanwhile: open it again, and '
                    'feed it images like those'
                )
            self._add_pairs(session, row, draft, bounds)
            record = self._record(session, row)
            if len(record.counts) > MOST_GROUPS:
                raise DataError(
                    f'collection {row.name!r} would have {len(record.counts):,} groups: at most '
                    f'{MOST_GROUPS:,} are taken'
                )
            return record

    def get(self, collection_id: int) -> CollectionRecord:
        """A collection that the owner may read; NotFoundError where there is none."""
        with self._database.reader() as session:
            return self._record(session, self._readable_row(session, collection_id))

    def find(self, name: str) -> CollectionRecord:
        """A collection of the owner by name, or else the only public one of that name.

        Raises:
            NotFoundError: there is none; the nearest names are given.
            ConflictError: several others have published one of that name.
        """
        query = select(CollectionRow).where(self._is_readable(), CollectionRow.name == name)
        if not is_text(name):
            raise NotFoundError(f'there is no collection {name[:80]!r}')
        with self._database.reader() as session:
            rows = session.scalars(query.order_by(CollectionRow.id)).all()
            mine = [row for row in rows if row.owner == self._owner]
            if not rows:
                names = select(CollectionRow.name).where(self._is_readable()).limit(1000)
                raise NotFoundError(unknown_name('collection', name, session.scalars(names)))
            if not mine and len(rows) > 1:
                told = ', '.join(f'{row.id} of {row.owner!r}' for row in rows[:5])
                raise ConflictError(f'several collections are called {name!r}: open {told} by id')
            return self._record(session, (mine or rows)[0])

    def search(self, query: Query) -> list[CollectionRecord]:
        """Collections that the owner may read and that match, the best or the newest first."""
        with self._database.reader() as session:
            found = matching(session, query).where(self._is_readable())
            return [self._record(session, row) for row in session.scalars(found)]

    def change(
        self,
        collection_id: int,
        name: str | None = None,
        description: str | None = None,
        public: bool | None = None,
    ) -> CollectionRecord:
        """Change what is not None.

        Raises:
            NotFoundError: the owner has no such collection.
            ConflictError: the name is taken.
        """
        if name is not None:
            check_text('name', name, MAX_NAME, may_be_empty=False)
        if description is not None:
            check_text('description', description, MAX_DESCRIPTION)
        if public is not None and not isinstance(public, bool):
            raise ConfigError(f'public={public!r}: it is True or False')
        with _taken_is_told(str(name)), self._database.session() as session:
            row = self._own_row(session, collection_id)
            row.name = row.name if name is None else name
            row.description = row.description if description is None else description
            row.public = row.public if public is None else public
            row.updated_at = now()
            session.flush()
            note_words(session, row)
            return self._record(session, row)

    @contextmanager
    def held(self, record: CollectionRecord) -> Iterator[int]:
        """The revision of a collection, which nobody on any machine changes until the block ends.

        Nor does anybody name files of it, or delete those that have no name.

        Raises:
            NotFoundError: the owner has no such collection.
        """
        with self._database.session() as session:
            lock_files(self._database, session, record.key)
            yield self._own_row(session, record.id).revision

    def remove(self, collection_id: int) -> None:
        """Delete a collection with all its pairs.

        Raises:
            NotFoundError: the owner has no such collection.
        """
        with self._database.session() as session:
            row = self._own_row(session, collection_id)
            key = row.key
            forget_words(session, row.id)
            session.execute(delete(CollectionRow).where(CollectionRow.id == row.id))
        # without its rows nobody finds them; what a process leaves that is killed here is garbage
        self._files.delete(key)

    # below

    @contextmanager
    def _session_with_packs(self, draft: Draft | None, key: str) -> Iterator[Session]:
        """A session that may write, in which the images of a draft are there, and stay."""
        packs = []
        if draft is not None:
            draft.seal()
            packs = draft.packs
        is_stored = False
        while not is_stored:
            there = set(self._files.list_names(key)) if packs else set()
            for path in packs:
                if path.name not in there:
                    # the draft keeps them until they have a row
                    self._put_pack(path, key)
            with self._database.session() as session:
                # what has no row yet may have been deleted as garbage, but from now on is not
                lock_files(self._database, session, key)
                there = set(self._files.list_names(key)) if packs else set()
                is_stored = all(path.name in there for path in packs)
                if is_stored:
                    yield session

    def _put_pack(self, path: Path, key: str) -> None:
        try:
            self._files.put_file(path, f'{key}/{path.name}', may_link=True)
        except FileNotFoundError:
            # its folder was deleted with the collection meanwhile: then there is no row either
            if not path.exists():
                raise

    def _add_pairs(
        self, session: Session, row: CollectionRow, draft: Draft, bounds: Bounds | None
    ) -> None:
        rows: list[dict[str, Any]] = []
        for pair in draft.pairs():
            rows.append(
                {
                    'collection_id': row.id,
                    'group_name': pair.group,
                    **asdict(pair.place),
                    'encoding': pair.encoding,
                    'label': pair.label,
                    'transform': pair.frame.transform,
                    'crs': pair.frame.crs,
                    'updated_at': now(),
                }
            )
            if len(rows) == ROWS_AT_ONCE:
                session.execute(insert(CollectionPairRow), rows)
                rows = []
        if rows:
            session.execute(insert(CollectionPairRow), rows)
        row.classes = list(draft.classes)
        if draft.form is not None:
            row.shape, row.dtype = list(draft.form.shape), draft.form.dtype
        row.sensors = check_sensors(list(dict.fromkeys([*row.sensors, *draft.sensors])))
        sources = {*filter(None, [row.source]), *draft.sources}
        row.source = 'mixed' if len(sources) > 1 else ''.join(sources)
        _widen(row, bounds)
        touch(row)
        session.flush()
        note_words(session, row)


def new_key() -> str:
    """A name for the files of a collection that is no other's."""
    return uuid.uuid4().hex


def _widen(row: CollectionRow, bounds: Bounds | None) -> None:
    if bounds is None:
        return
    sides = (row.west, row.south, row.east, row.north)
    if None not in sides:
        bounds = united_boxes([sides, bounds])  # type: ignore[list-item]
    row.west, row.south, row.east, row.north = bounds


def _taken(name: str) -> str:
    return (
        f'a collection {name!r} is there already: choose another name, open it with '
        f'TrainingSet.from_name({name!r}), or remove() that one'
    )


@contextmanager
def _taken_is_told(name: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise ConflictError(_taken(name)) from error
