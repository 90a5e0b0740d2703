"""The part of the REST API that keeps, shares and finds collections of image/label pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response

from finetuner.client import LocalClient
from finetuner.collections.draft import Draft
from finetuner.collections.finding import Query as Search
from finetuner.collections.records import CollectionRecord
from finetuner.collections.spec import CollectionSpec
from finetuner.collections.store import new_key
from finetuner.collections.tables import MAX_NUMBER
from finetuner.excepts import (
    ConfigError,
    TooLargeError,
)
from finetuner.server.collection_bodies import (
    ChangeRequest,
    CollectionRequest,
    DatapointsRequest,
    LabelRequest,
    PublishRequest,
    Turns,
    check_depth,
)
from finetuner.server.collection_view import CollectionView
from finetuner.server.rest_images import MAX_PAGE, add_images, numbers_of
from finetuner.server.rest_schema import require

_TAGS: list[Any] = ['collections']
# numbers and letters of an answer: a list of 8 bytes a number, and its text
_MOST_VALUES = 20_000_000
# of one user at the same time
_DRAFTS_AT_ONCE = 4


def add_collections(router: APIRouter, client: LocalClient) -> None:
    """Routes of collections and their pairs.

    Args:
        router: they are added to.
        client: of the machine's own user; others get a view of their own.
    """

    turns = Turns(_DRAFTS_AT_ONCE)

    def view(scope: Literal['read', 'write']) -> Callable[[Request], CollectionView]:
        def of_whoever_asks(request: Request) -> CollectionView:
            owner = require(scope).user
            return CollectionView(client.for_owner(owner), str(request.base_url).rstrip('/'), turns)

        return of_whoever_asks

    reads, writes = Depends(view('read')), Depends(view('write'))
    _add_collections(router, reads, writes)
    _add_pairs(router, reads, writes)
    _add_pair(router, reads, writes)
    add_images(router, reads)


def _add_collections(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.post('/data', status_code=201, tags=_TAGS)
    def create_collection(body: CollectionRequest, view: CollectionView = writes) -> Response:
        """Make a collection, with its first pairs or without."""
        spec = CollectionSpec.checked(**body.dict(exclude={'pairs'}))
        view.store.check_name(spec.name)
        pairs, key = body.pairs, new_key()
        if pairs is None:
            return _answer(view.shown(view.store.create(spec, None, key)), 201)
        with view.saving(lambda: view.draft_of(spec, None, pairs)) as draft:
            return _answer(view.shown(view.store.create(spec, draft, key)), 201)

    @router.get('/data/{collection_id:row}', tags=_TAGS)
    def get_collection(collection_id: int, view: CollectionView = reads) -> Response:
        """The document that describes a collection."""
        return _answer(view.shown(view.store.get(collection_id)))

    @router.put('/data/{collection_id:row}', tags=_TAGS)
    def change_collection(
        body: ChangeRequest, collection_id: int, view: CollectionView = writes
    ) -> Response:
        """Change the name or the description of a collection."""
        return _answer(view.shown(view.store.change(collection_id, body.name, body.description)))

    @router.delete('/data/{collection_id:row}', status_code=204, tags=_TAGS)
    def delete_collection(collection_id: int, view: CollectionView = writes) -> Response:
        """Delete a collection with all its pairs."""
        view.store.remove(collection_id)
        return Response(status_code=204)

    @router.put('/data/{collection_id:row}/publish', tags=_TAGS)
    def publish_collection(
        collection_id: int, body: PublishRequest | None = None, view: CollectionView = writes
    ) -> Response:
        """Let others read a collection, or stop that."""
        public = True if body is None else body.public
        return _answer(view.shown(view.store.change(collection_id, public=public)))

    @router.get('/data/name', tags=_TAGS)
    def find_collection(name: str, view: CollectionView = reads) -> Response:
        """The document of a collection by its name."""
        return _answer(view.shown(view.store.find(name)))

    @router.get('/search', tags=_TAGS)
    def search(
        text: str = '',
        bbox: str | None = None,
        mltype: str | None = None,
        classes: list[str] = Query([]),  # noqa: B008 - how FastAPI reads several
        limit: int = 100,
        offset: int = 0,
        view: CollectionView = reads,
    ) -> Response:
        """Collections by words, place (`west,south,east,north`), kind and classes."""
        found = Search.checked(
            text, bbox and numbers_of('bbox', bbox), mltype, classes, limit, offset
        )
        records = view.store.search(found)
        _check_values(sum(len(name) for record in records for name in record.classes))
        return _answer([view.shown(record) for record in records])


def _add_pairs(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.post('/data/{collection_id:row}/datapoints', status_code=201, tags=_TAGS)
    def add_datapoints(
        body: DatapointsRequest, collection_id: int, view: CollectionView = writes
    ) -> Response:
        """Add pairs to a collection: all of them, or none."""
        record = view.store.get_own(collection_id)
        pairs, points = body.pairs, body.datapoints
        if (pairs is None) == (points is None):
            raise ConfigError('give `datapoints`, or `pairs` as stored Documents')

        def make() -> Draft:
            if pairs is not None:
                return view.draft_of(record.spec, record, pairs)
            return view.draft_of_inline(record.spec, record, points or ())

        with view.saving(make) as draft:
            return _answer(view.shown(view.store.append(collection_id, draft)), 201)

    @router.get('/data/{collection_id:row}/datapoints', tags=_TAGS)
    def list_datapoints(
        collection_id: int,
        offset: int = Query(0, ge=0, le=MAX_NUMBER),
        limit: int = Query(100, ge=1, le=MAX_PAGE),
        after: int | None = Query(None, ge=-1, le=MAX_NUMBER),
        group: str | None = None,
        kept: bool = False,
        view: CollectionView = reads,
    ) -> Response:
        """Pairs in the order in which they were fed; with `kept` as clients of this package want them."""
        pairs = view.store.list_pairs(collection_id, offset, limit, group, after)
        if kept:
            return _answer([view.shown_kept(pair) for pair in pairs])
        collection = view.store.get(collection_id)
        _check_values(len(pairs) * _values_of_pair(collection))
        return _answer([view.shown_pair(pair, collection) for pair in pairs])

    @router.delete('/data/{collection_id:row}/datapoints', tags=_TAGS)
    def remove_datapoints(
        collection_id: int,
        ids: list[int] = Query(..., max_items=MAX_PAGE),  # noqa: B008
        view: CollectionView = writes,
    ) -> dict[str, int]:
        """Remove pairs, all at once."""
        return {'removed': view.store.remove_pairs(collection_id, ids)}


def _add_pair(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.get('/datapoints/{pair_id:row}', tags=_TAGS)
    def get_datapoint(pair_id: int, view: CollectionView = reads) -> Response:
        """A pair, its image aside."""
        pair, collection = view.store.get_pair(pair_id)
        _check_values(_values_of_pair(collection))
        return _answer(view.shown_pair(pair, collection))

    @router.put('/datapoints/{pair_id:row}', tags=_TAGS)
    def change_datapoint(
        body: LabelRequest, pair_id: int, view: CollectionView = writes
    ) -> Response:
        """Give a pair another label."""
        _check_values(_values_of_pair(view.store.get_pair(pair_id)[1]))
        check_depth(body.label)
        view.store.relabel(pair_id, body.label)
        return _answer(view.shown_pair(*view.store.get_pair(pair_id)))

    @router.delete('/datapoints/{pair_id:row}', status_code=204, tags=_TAGS)
    def remove_datapoint(pair_id: int, view: CollectionView = writes) -> Response:
        """Remove a pair."""
        view.store.remove_pair(pair_id)
        return Response(status_code=204)


def _answer(content: Any, status_code: int = 200) -> Response:
    """JSON, made here: FastAPI would make it where it answers everybody else."""
    return Response(orjson.dumps(content), status_code, media_type='application/json')


def _values_of_pair(collection: CollectionRecord) -> int:
    """Numbers of a label, and letters of the classes that are told with it."""
    num_letters = sum(map(len, collection.classes))
    height, width = collection.tile_size
    is_mask = collection.mltype == 'segmentation'
    return num_letters + (height * width if is_mask else len(collection.classes))


def _check_values(count: int) -> None:
    if count > _MOST_VALUES:
        raise TooLargeError(
            f'the answer would be of {count:,} numbers and letters, and {_MOST_VALUES:,} are told at a '
            'time: ask for fewer with `limit`, or for pairs with `kept=true`'
        )
