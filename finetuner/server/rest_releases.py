"""The part of the REST API that makes releases of collections, lists them and hands them out.

To release 100,000 pairs takes minutes: longer than proxies wait for a byte, and than a thread that
others want too should be held. So a thread of its own makes a release, and a request waits for it no
longer than some seconds; it is then answered with 202, and asked again. The ticket in it says which
release is meant, and is written down with the release: so a request may be repeated after a broken
connection, the end of a server, or at another server of the same collections.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import Field, StrictStr

from finetuner.client import LocalClient
from finetuner.collections.local import LocalCollections
from finetuner.excepts import FinetunerError, ServerError, TooManyRequestsError
from finetuner.server.rest_schema import Body, require

# proxies give up after 30 or 60
WAIT_SECONDS = 15.0
_LOOK_SECONDS = 0.05
# they share the cores with everything else that the server does
_AT_ONCE = 2
_MOST_KNOWN = 64
_TAGS: list[Any] = ['collections']
_TAR = 'application/x-tar'

_About = dict[str, Any]


class ReleaseRequest(Body):
    """What a release is called; the `ticket` of an answer 202 asks for the same release again."""

    version: StrictStr
    ticket: StrictStr | None = Field(None, min_length=1, max_length=64)


class Makers:
    """Releases that are made here, each in a thread that ends with the process."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Future[_About]] = {}
        self._lock = threading.Lock()
        self._turn = threading.Semaphore(_AT_ONCE)

    def ask(self, wish: tuple[Any, ...], make: Callable[[], _About]) -> Future[_About]:
        """What comes of a wish; begun when it was not asked for before.

        Args:
            wish: who wants which release.
            make: makes it.

        Raises:
            TooManyRequestsError: so many are being made that this one would wait for long.
        """
        with self._lock:
            found = self._known.get(wish)
            if found is None:
                self._make_room()
                found = self._known[wish] = Future()
                threading.Thread(target=self._run, args=(found, make), daemon=True).start()
            return found

    def forget(self, wish: tuple[Any, ...]) -> None:
        """Its outcome was told."""
        with self._lock:
            self._known.pop(wish, None)

    def _make_room(self) -> None:
        if len(self._known) < _MOST_KNOWN:
            return
        # nobody asked again
        ended = [wish for wish, future in self._known.items() if future.done()]
        if not ended:
            raise TooManyRequestsError('so many releases are being made: ask again later', 60)
        del self._known[ended[0]]

    def _run(self, future: Future[_About], make: Callable[[], _About]) -> None:
        try:
            with self._turn:
                future.set_result(make())
        except FinetunerError as error:
            future.set_exception(error)
        finally:
            if not future.done():
                future.set_exception(
                    ServerError('the release failed: the log of the server says why')
                )


def add_releases(router: APIRouter, client: LocalClient, is_closing: Callable[[], bool]) -> None:
    """Routes of releases.

    Args:
        router: they are added to.
        client: of the machine's own user; others get a view of their own.
        is_closing: whether the server is about to end, so that nobody is kept waiting.
    """

    def place(scope: Literal['read', 'write']) -> Callable[[], LocalCollections]:
        def of_whoever_asks() -> LocalCollections:
            workspace = client.for_owner(require(scope).user).workspace
            return LocalCollections(client.settings, workspace.owner, workspace.database)

        return of_whoever_asks

    reads, writes = Depends(place('read')), Depends(place('write'))
    _add_making(router, writes, is_closing)
    _add_reading(router, reads)


def _add_making(router: APIRouter, writes: Any, is_closing: Callable[[], bool]) -> None:
    makers = Makers()

    @router.post(
        '/data/{collection_id:row}/releases',
        status_code=201,
        tags=_TAGS,
        responses={202: {'description': 'It is being made: ask again with the `ticket`'}},
    )
    async def make_release(
        request: Request,
        body: ReleaseRequest,
        collection_id: int,
        wait: float = Query(WAIT_SECONDS, ge=0, le=WAIT_SECONDS),
        place: LocalCollections = writes,
    ) -> JSONResponse:
        """Keep a collection as it is now, under a version that never changes.

        What takes longer than `wait` seconds is answered with 202 and a `ticket`; the same request
        with that ticket waits on, and is answered with 201 once the release is there.
        """
        record = await asyncio.to_thread(place.store.get, collection_id)
        ticket = body.ticket or uuid.uuid4().hex
        wish = (place.owner, collection_id, body.version, ticket)
        future = makers.ask(wish, lambda: place.releases.make(record, body.version, ticket))
        until = time.monotonic() + wait
        while not future.done() and time.monotonic() < until and not is_closing():
            await asyncio.sleep(_LOOK_SECONDS)
        if not future.done():
            told = {'version': body.version, 'ticket': ticket, 'status': 'BUILDING'}
            return JSONResponse(told, 202, {'location': f'{request.url.path}/{body.version}'})
        makers.forget(wish)
        return JSONResponse(future.result(), 201)


def _add_reading(router: APIRouter, reads: Any) -> None:
    @router.get('/data/{collection_id:row}/releases', tags=_TAGS)
    def list_releases(collection_id: int, place: LocalCollections = reads) -> list[dict[str, Any]]:
        """What is known of the releases of a collection, in the order in which they were made."""
        return place.releases.list_all(place.store.get(collection_id))

    @router.get('/data/{collection_id:row}/releases/{version}', tags=_TAGS)
    def get_release(
        collection_id: int, version: str, place: LocalCollections = reads
    ) -> dict[str, Any]:
        """What is known of a release: counts, size and hashes."""
        return place.releases.get(place.store.get(collection_id), version)

    @router.get(
        '/data/{collection_id:row}/releases/{version}/archive',
        tags=_TAGS,
        response_class=Response,
    )
    def get_archive(collection_id: int, version: str, place: LocalCollections = reads) -> Response:
        """The archive of a release, a tar; its `ETag` is its SHA-256, and `Range` fetches a part."""
        record = place.store.get(collection_id)
        about = place.releases.get(record, version)
        name, tag = f'{about["folder"]}.tar', f'"{about["sha256"]}"'
        path = place.releases.local_archive(record, about)
        if path is not None:
            return FileResponse(path, headers={'etag': tag}, media_type=_TAR, filename=name)
        # not copied here first: that would take as long again
        headers = {'etag': tag, 'content-length': str(about['size'])}
        pieces = place.releases.read_archive(record, about)
        return StreamingResponse(pieces, media_type=_TAR, headers=headers)
