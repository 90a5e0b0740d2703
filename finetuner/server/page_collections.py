"""The pages of collections: which there are, and a grid to flip through pairs and mark bad ones.

Marks travel with the form from page to page, so that nothing is kept for whoever goes away.
"""

from __future__ import annotations

import io
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from finetuner.client import LocalClient
from finetuner.collections.datapoint import DataPoint
from finetuner.collections.finding import Query
from finetuner.collections.local import LocalCollections
from finetuner.collections.records import CollectionRecord
from finetuner.collections.store import CollectionStore
from finetuner.excepts import ConfigError, FinetunerError
from finetuner.server.errors import http_status
from finetuner.server.page_views import render
from finetuner.server.rest_schema import identity

PAIRS_A_PAGE = 60
_COLLECTIONS_A_PAGE = 50
_MOST_MARKED = 10_000
_PICTURE_SIZE = 256
_LAST_PAGE = 1_000_000
# of classes that a pair shows
_MOST_NAMES = 5


def add_collection_pages(router: APIRouter, reads: Any, writes: Any) -> None:
    """Routes of the pages.

    Args:
        router: of the pages.
        reads: dependency that gives the client of whoever looks.
        writes: the same for who may change things.
    """

    @router.get('/ui/collections', response_class=HTMLResponse)
    def list_collections(
        request: Request, text: str = '', page: int = 1, client: LocalClient = reads
    ) -> Response:
        page = min(max(1, page), _LAST_PAGE)
        start = (page - 1) * _COLLECTIONS_A_PAGE
        found = Query.checked(text, limit=_COLLECTIONS_A_PAGE, offset=start)
        return render(
            request,
            'collections.html',
            collections=_store(client).search(found),
            text=text,
            page=page,
            size=_COLLECTIONS_A_PAGE,
            own=client.workspace.owner,
            page_address=lambda number: (
                '/ui/collections?' + urlencode({'text': text, 'page': number})
            ),
        )

    _add_collection(router, reads)
    _add_removal(router, writes)


def _add_collection(router: APIRouter, reads: Any) -> None:
    @router.get('/ui/collection', response_class=HTMLResponse)
    def show_collection(
        request: Request, collection: int, group: str = '', client: LocalClient = reads
    ) -> Response:
        return _grid(request, client, collection, group, 1, [])

    @router.post('/ui/collection', response_class=HTMLResponse)
    def turn_page(
        request: Request,
        collection: int = Form(),
        group: str = Form(''),
        page: int = Form(1),
        bad: list[int] = Form([]),  # noqa: B008 - how FastAPI reads several
        client: LocalClient = reads,
    ) -> Response:
        return _grid(request, client, collection, group, page, bad)

    @router.get('/ui/pair', response_class=Response)
    def show_pair(pair: int, at: str = '', client: LocalClient = reads) -> Response:
        del at  # another label, another address: the browser keeps what it has seen
        store = _store(client)
        found, record = store.get_pair(pair)
        point = DataPoint(found, record, store, store.reader_of(record))
        picture = point.draw(most=4 * _PICTURE_SIZE)
        picture.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
        file = io.BytesIO()
        picture.save(file, 'PNG')
        headers = {
            'cache-control': 'private, max-age=86400, immutable',
            'vary': 'authorization, cookie',
        }
        return Response(file.getvalue(), media_type='image/png', headers=headers)


def _add_removal(router: APIRouter, writes: Any) -> None:
    @router.post('/ui/collection/remove', response_class=HTMLResponse)
    def remove_marked(
        request: Request,
        collection: int = Form(),
        group: str = Form(''),
        bad: list[int] = Form([]),  # noqa: B008
        sure: str = Form(''),
        client: LocalClient = writes,
    ) -> Response:
        try:
            marked = _checked_marks(bad)
            if sure != 'yes':
                return render(
                    request,
                    'collection_remove.html',
                    collection=_store(client).get(collection),
                    group=group,
                    marked=marked,
                )
            _store(client).remove_pairs(collection, marked)
        except FinetunerError as error:
            return _grid(request, client, collection, group, 1, [], error)
        place = urlencode({'collection': collection, 'group': group})
        return RedirectResponse(f'/ui/collection?{place}', 303)


def _store(client: LocalClient) -> CollectionStore:
    workspace = client.workspace
    return LocalCollections(client.settings, workspace.owner, workspace.database).store


def _checked_marks(marked: list[int]) -> list[int]:
    if len(marked) > _MOST_MARKED:
        raise ConfigError(f'{len(marked):,} pairs are marked: remove {_MOST_MARKED:,} at a time')
    if not marked:
        raise ConfigError('no pair is marked: tick the bad ones first')
    return list(dict.fromkeys(marked))


def _grid(
    request: Request,
    client: LocalClient,
    collection: int,
    group: str,
    page: int,
    marked: list[int],
    error: FinetunerError | None = None,
) -> Response:
    store = _store(client)
    record = store.get(collection)
    total = record.counts.get(group, 0) if group else record.num_pairs
    num_pages = max(1, -(-total // PAIRS_A_PAGE))
    page = min(max(1, page), num_pages)
    start = (page - 1) * PAIRS_A_PAGE
    pairs = store.list_pairs(collection, start, PAIRS_A_PAGE, group or None)
    here = {pair.id for pair in pairs}
    return render(
        request,
        'collection.html',
        status_code=200 if error is None else http_status(type(error).__name__) or 500,
        collection=record,
        group=group,
        page=page,
        num_pages=num_pages,
        total=total,
        tiles=[_tile(record, pair, pair.id in marked) for pair in pairs],
        elsewhere=[number for number in dict.fromkeys(marked) if number not in here],
        own=record.owner == identity().user,
        message=error or '',
    )


def _tile(record: CollectionRecord, pair: Any, is_marked: bool) -> dict[str, Any]:
    kind = record.kind
    present = kind.present(kind.decode(pair.label, pair.frame))
    more = f' and {len(present) - _MOST_NAMES} more' if len(present) > _MOST_NAMES else ''
    return {
        'id': pair.id,
        'group': pair.group,
        'classes': (', '.join(present[:_MOST_NAMES]) + more) or '-',
        'address': f'/ui/pair?{urlencode({"pair": pair.id, "at": pair.updated_at})}',
        'is_marked': is_marked,
    }
