"""Collections as one user of a server sees them, and drafts of the pairs that he sends."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

from finetuner.client import LocalClient
from finetuner.collections.draft import Draft, at_position
from finetuner.collections.exchange import pair_of_document
from finetuner.collections.local import LocalCollections
from finetuner.collections.records import CollectionRecord, PairRecord
from finetuner.collections.spec import CollectionSpec, check_classes, check_sensors, is_text
from finetuner.excepts import (
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
    TooLargeError,
)
from finetuner.server.collection_bodies import Datapoint, Pairs, Turns, check_depth
from finetuner.uris import PicturePolicy

# what comes from outside is opened by no address
_POLICY = PicturePolicy(uri_allow=())
_MOST_PAIRS = 1_000_000
# of a stored Document, which is read whole
_MOST_RECORD = 256 << 20


class CollectionView:
    """Collections as one user sees them.

    Args:
        client: of the user.
        address: of the server, as the user wrote it.
        turns: of those who save pairs.
    """

    def __init__(self, client: LocalClient, address: str, turns: Turns) -> None:
        workspace = client.workspace
        self.place = LocalCollections(client.settings, workspace.owner, workspace.database)
        self.store = self.place.store
        self._client = client
        self._turns = turns
        self._address = f'{address}/api/v1'

    def shown(self, record: CollectionRecord) -> dict[str, Any]:
        """The document that describes a collection."""
        # what is saved here is served at once
        return record.document(100, self._address)

    def shown_pair(self, pair: PairRecord, collection: CollectionRecord) -> dict[str, Any]:
        """What is told of a pair."""
        mine = f'{self._address}/datapoints/{pair.id}'
        links = {
            'self': {'href': mine},
            'image': {'href': f'{mine}/image'},
            'update': {'href': mine, 'method': 'PUT'},
            'delete': {'href': mine, 'method': 'DELETE'},
        }
        return {'data': pair.document(collection), 'links': links}

    def shown_kept(self, pair: PairRecord) -> dict[str, Any]:
        """What a client needs that makes a `DataPoint` of it."""
        return {
            'id': pair.id,
            'group': pair.group,
            'encoding': pair.encoding,
            'label': base64.b64encode(pair.label).decode(),
            'transform': pair.frame.transform,
            'crs': pair.frame.crs,
            'updated_at': pair.updated_at,
            'place': astuple(pair.place),
        }

    @contextmanager
    def saving(self, make: Callable[[], Draft]) -> Iterator[Draft]:
        """A draft that is gone at the end.

        Args:
            make: makes it.

        Raises:
            TooManyRequestsError: the user is saving as many as he may.
        """
        with self._turns.taken(self._client.workspace.owner):
            draft = make()
            try:
                yield draft
            finally:
                draft.discard()

    def draft_of(
        self, spec: CollectionSpec, record: CollectionRecord | None, pairs: Pairs
    ) -> Draft:
        """A draft of stored Documents, looked at one by one."""
        classes = record.classes if record else ()
        if pairs.classes is not None:
            given = check_classes(spec.mltype, pairs.classes)
            expected = spec.classes if spec.classes is not None else given[: len(classes)]
            if expected != (given if spec.classes is not None else classes):
                raise ConflictError(
                    f'these pairs have the classes {list(given[:5])}, and the collection others: open '
                    'it again, and feed them again'
                )
            classes = given
        if not is_text(pairs.documents):
            raise NotFoundError(f'no data is stored under {pairs.documents!r}')
        docs = self._client.workspace.load_data(pairs.documents)
        if len(docs) > _MOST_PAIRS or docs.largest > _MOST_RECORD:
            raise TooLargeError(
                f'these are {len(docs):,} pairs, the largest of {docs.largest:,} bytes: at most '
                f'{_MOST_PAIRS:,} of {_MOST_RECORD >> 20} MiB are saved at a time'
            )
        sensors = check_sensors(pairs.sensors)
        draft = self._new_draft(spec, record, classes)
        draft.note_sensors(sensors)
        return _filled(draft, (pair_of_document(doc, spec.tile_size) for doc in docs))

    def draft_of_inline(
        self, spec: CollectionSpec, record: CollectionRecord, points: Iterable[Datapoint]
    ) -> Draft:
        """A draft of pictures that came in the request."""
        draft = self._new_draft(spec, record, record.classes)
        return _filled(draft, map(_inline_pair, points))

    def _new_draft(
        self, spec: CollectionSpec, record: CollectionRecord | None, classes: tuple[str, ...]
    ) -> Draft:
        form = None if record is None else record.form
        num_saved = 0 if record is None else record.num_pairs
        return Draft(self.place.drafts, spec, form, classes, num_saved, _POLICY)


def _filled(draft: Draft, pairs: Iterable[tuple[Any, Any, str]]) -> Draft:
    position = 0
    try:
        for image, label, group in pairs:
            draft.add(image, label, group)
            position += 1
    except (DataError, ConfigError) as error:
        draft.discard()
        raise at_position(error, position) from error
    except BaseException:
        draft.discard()
        raise
    return draft


def _inline_pair(point: Datapoint) -> tuple[bytes, Any, str]:
    check_depth(point.label)
    return _from_base64(point.image), point.label, point.group


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError('the image is no standard base64') from None
