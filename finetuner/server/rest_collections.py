"""The part of the REST API that keeps, shares and finds collections of image/label pairs."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, StrictBool, StrictStr

from finetuner.client import LocalClient
from finetuner.collections.draft import DEFAULT_GROUP, Draft, at_position
from finetuner.collections.exchange import pair_of_document
from finetuner.collections.finding import Query as Search
from finetuner.collections.local import LocalCollections
from finetuner.collections.records import CollectionRecord, PairRecord
from finetuner.collections.spec import CollectionSpec, check_classes
from finetuner.collections.store import new_key
from finetuner.collections.tables import MAX_NUMBER
from finetuner.excepts import ConfigError, ConflictError, DataError
from finetuner.server.rest_images import MAX_PAGE, add_images, numbers_of
from finetuner.server.rest_schema import require
from finetuner.uris import PicturePolicy

# what comes from outside is opened by no address
_POLICY = PicturePolicy(uri_allow=())
_TAGS: list[Any] = ['collections']


class _Body(BaseModel):
    class Config:
        extra = 'forbid'


class Pairs(_Body):
    """Pairs as stored Documents: see the guide of collections for what they hold."""

    documents: StrictStr
    classes: list[StrictStr] | None = None
    sensors: list[StrictStr] = []


class CollectionRequest(_Body):
    """A new collection; without pairs it is empty."""

    name: StrictStr
    mltype: StrictStr = 'classification'
    tile_size: list[int] = [256, 256]
    classes: list[StrictStr] | None = None
    partition: list[float] | None = None
    description: StrictStr = ''
    public: StrictBool = False
    pairs: Pairs | None = None


class Datapoint(_Body):
    """A pair: the file of a picture in base64, and its label."""

    image: StrictStr
    label: Any
    group: StrictStr = DEFAULT_GROUP


class DatapointsRequest(_Body):
    """More pairs, one way or the other."""

    datapoints: list[Datapoint] | None = None
    pairs: Pairs | None = None


class ChangeRequest(_Body):
    """What is to be changed of a collection."""

    name: StrictStr | None = None
    description: StrictStr | None = None


class PublishRequest(_Body):
    """Whether others may read a collection."""

    public: StrictBool = True


class LabelRequest(_Body):
    """Another label for a pair."""

    label: Any


def add_collections(router: APIRouter, client: LocalClient) -> None:
    """Routes of collections and their pairs.

    Args:
        router: they are added to.
        client: of the machine's own user; others get a view of their own.
    """

    def view(scope: Literal['read', 'write']) -> Callable[[Request], _View]:
        def of_whoever_asks(request: Request) -> _View:
            owner = require(scope).user
            return _View(client.for_owner(owner), str(request.base_url).rstrip('/'))

        return of_whoever_asks

    reads, writes = Depends(view('read')), Depends(view('write'))
    _add_collections(router, reads, writes)
    _add_pairs(router, reads, writes)
    _add_pair(router, reads, writes)
    add_images(router, reads)


class _View:
    """Collections as one user sees them.

    Args:
        client: of the user.
        address: of the server, as the user wrote it.
    """

    def __init__(self, client: LocalClient, address: str) -> None:
        workspace = client.workspace
        self.place = LocalCollections(client.settings, workspace.owner, workspace.database)
        self.store = self.place.store
        self._client = client
        self._address = f'{address}/api/v1'

    def shown(self, record: CollectionRecord) -> dict[str, Any]:
        # what is saved here is served at once
        return record.document(100, self._address)

    def shown_pair(self, pair: PairRecord, collection: CollectionRecord) -> dict[str, Any]:
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
        draft = self._new_draft(spec, record, classes)
        draft.sensors = list(pairs.sensors)
        docs = self._client.load_data(pairs.documents)
        return _filled(draft, (pair_of_document(doc, spec.tile_size) for doc in docs))

    def draft_of_inline(
        self, spec: CollectionSpec, record: CollectionRecord, points: Iterable[Datapoint]
    ) -> Draft:
        """A draft of pictures that came in the request."""
        draft = self._new_draft(spec, record, record.classes)
        pairs = ((_from_base64(point.image), point.label, point.group) for point in points)
        return _filled(draft, pairs)

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


def _add_collections(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.post('/data', status_code=201, tags=_TAGS)
    def create_collection(body: CollectionRequest, view: _View = writes) -> dict[str, Any]:
        """Make a collection, with its first pairs or without."""
        spec = CollectionSpec.checked(**body.dict(exclude={'pairs'}))
        view.store.check_name(spec.name)
        if body.pairs is None:
            return view.shown(view.store.create(spec, None, new_key()))
        draft = view.draft_of(spec, None, body.pairs)
        try:
            return view.shown(view.store.create(spec, draft, new_key()))
        finally:
            draft.discard()

    @router.get('/data/{collection_id:int}', tags=_TAGS)
    def get_collection(collection_id: int, view: _View = reads) -> dict[str, Any]:
        """The document that describes a collection."""
        return view.shown(view.store.get(collection_id))

    @router.put('/data/{collection_id:int}', tags=_TAGS)
    def change_collection(
        body: ChangeRequest, collection_id: int, view: _View = writes
    ) -> dict[str, Any]:
        """Change the name or the description of a collection."""
        return view.shown(view.store.change(collection_id, body.name, body.description))

    @router.delete('/data/{collection_id:int}', status_code=204, tags=_TAGS)
    def delete_collection(collection_id: int, view: _View = writes) -> Response:
        """Delete a collection with all its pairs."""
        view.store.remove(collection_id)
        return Response(status_code=204)

    @router.put('/data/{collection_id:int}/publish', tags=_TAGS)
    def publish_collection(
        collection_id: int, body: PublishRequest | None = None, view: _View = writes
    ) -> dict[str, Any]:
        """Let others read a collection, or stop that."""
        public = True if body is None else body.public
        return view.shown(view.store.change(collection_id, public=public))

    @router.get('/data/name', tags=_TAGS)
    def find_collection(name: str, view: _View = reads) -> dict[str, Any]:
        """The document of a collection by its name."""
        return view.shown(view.store.find(name))

    @router.get('/search', tags=_TAGS)
    def search(
        text: str = '',
        bbox: str | None = None,
        mltype: str | None = None,
        classes: list[str] = Query([]),  # noqa: B008 - how FastAPI reads several
        limit: int = 100,
        offset: int = 0,
        view: _View = reads,
    ) -> list[dict[str, Any]]:
        """Collections by words, place (`west,south,east,north`), kind and classes."""
        found = Search.checked(
            text, bbox and numbers_of('bbox', bbox), mltype, classes, limit, offset
        )
        return [view.shown(record) for record in view.store.search(found)]


def _add_pairs(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.post('/data/{collection_id:int}/datapoints', status_code=201, tags=_TAGS)
    def add_datapoints(
        body: DatapointsRequest, collection_id: int, view: _View = writes
    ) -> dict[str, Any]:
        """Add pairs to a collection: all of them, or none."""
        record = view.store.get(collection_id)
        if (body.pairs is None) == (body.datapoints is None):
            raise ConfigError('give `datapoints`, or `pairs` as stored Documents')
        if body.pairs is not None:
            draft = view.draft_of(record.spec, record, body.pairs)
        else:
            draft = view.draft_of_inline(record.spec, record, body.datapoints or ())
        try:
            return view.shown(view.store.append(collection_id, draft))
        finally:
            draft.discard()

    @router.get('/data/{collection_id:int}/datapoints', tags=_TAGS)
    def list_datapoints(
        collection_id: int,
        offset: int = Query(0, ge=0, le=MAX_NUMBER),
        limit: int = Query(100, ge=1, le=MAX_PAGE),
        after: int | None = Query(None, ge=0, le=MAX_NUMBER),
        group: str | None = None,
        kept: bool = False,
        view: _View = reads,
    ) -> list[dict[str, Any]]:
        """Pairs in the order in which they were fed; with `kept` as clients of this package want them."""
        pairs = view.store.list_pairs(collection_id, offset, limit, group, after)
        if kept:
            return [view.shown_kept(pair) for pair in pairs]
        collection = view.store.get(collection_id)
        return [view.shown_pair(pair, collection) for pair in pairs]

    @router.delete('/data/{collection_id:int}/datapoints', tags=_TAGS)
    def remove_datapoints(
        collection_id: int,
        ids: list[int] = Query(..., max_items=MAX_PAGE),  # noqa: B008
        view: _View = writes,
    ) -> dict[str, int]:
        """Remove pairs, all at once."""
        return {'removed': view.store.remove_pairs(collection_id, ids)}


def _add_pair(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.get('/datapoints/{pair_id:int}', tags=_TAGS)
    def get_datapoint(pair_id: int, view: _View = reads) -> dict[str, Any]:
        """A pair, its image aside."""
        return view.shown_pair(*view.store.get_pair(pair_id))

    @router.put('/datapoints/{pair_id:int}', tags=_TAGS)
    def change_datapoint(body: LabelRequest, pair_id: int, view: _View = writes) -> dict[str, Any]:
        """Give a pair another label."""
        view.store.relabel(pair_id, body.label)
        return view.shown_pair(*view.store.get_pair(pair_id))

    @router.delete('/datapoints/{pair_id:int}', status_code=204, tags=_TAGS)
    def remove_datapoint(pair_id: int, view: _View = writes) -> Response:
        """Remove a pair."""
        view.store.remove_pair(pair_id)
        return Response(status_code=204)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError('the image is no standard base64') from None
