"""The part of the REST API that gives the images of collections, one or hundreds at once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from finetuner.collections.datapoint import DataPoint
from finetuner.collections.documents import png_of
from finetuner.collections.drawing import as_rgb
from finetuner.excepts import ConfigError

MAX_PAGE = 1000
_TAGS: list[Any] = ['collections']
# small images travel together: each chunk of an answer costs as much as a few of them
_CHUNK_BYTES = 256 << 10
_BYTES = 'application/octet-stream'
# what is shown may be private, and may be so tomorrow
_PRIVATE = {
    'cache-control': 'private, no-cache',
    'vary': 'authorization, cookie',
    'x-content-type-options': 'nosniff',
}


def add_images(router: APIRouter, reads: Any) -> None:
    """Routes of images.

    Args:
        router: they are added to.
        reads: depends on the collections as whoever asks sees them; their `store` is asked.
    """

    @router.get('/datapoints/{pair_id:row}/image', tags=_TAGS, response_class=Response)
    def get_image(
        pair_id: int,
        form: Literal['png', 'npy', 'kept'] = 'png',
        bands: str | None = None,
        view: Any = reads,
    ) -> Response:
        """The image of a pair: a picture to look at, its numbers, or its bytes as they are kept.

        `bands=4,2,1` are shown as red, green and blue.
        """
        pair, collection = view.store.get_pair(pair_id)
        point = DataPoint(pair, collection, view.store, view.store.reader_of(collection))
        if form == 'kept':
            return _image(point.kept[0])
        if form == 'npy':
            file = io.BytesIO()
            np.save(file, point.read(), allow_pickle=False)
            return _image(file.getvalue())
        chosen = None if bands is None else _band_numbers(bands)
        return _image(png_of(as_rgb(point.read(), chosen)), 'image/png')

    @router.get('/data/{collection_id:row}/images', tags=_TAGS, response_class=Response)
    def get_images(
        collection_id: int,
        ids: list[int] = Query(..., max_items=MAX_PAGE),  # noqa: B008 - how FastAPI reads several
        view: Any = reads,
    ) -> Response:
        """The images of pairs as they are kept, in the order of `ids`, one after the other.

        It ends before the first that is not there: how long each is says the list of pairs.
        """
        collection = view.store.get(collection_id)
        pairs = view.store.pairs_of(collection_id, ids)
        images = _together(view.store.read_images(collection, pairs))
        return StreamingResponse(images, media_type=_BYTES, headers=_PRIVATE)


def numbers_of(name: str, text: str) -> list[float]:
    """Numbers with commas between, as addresses hold them.

    Raises:
        ConfigError: it is none.
    """
    try:
        return [float(part) for part in text.split(',')]
    except ValueError:
        raise ConfigError(f'{name}={text[:80]!r}: it takes numbers with commas between') from None


def _image(content: bytes, media_type: str = _BYTES) -> Response:
    return Response(content, media_type=media_type, headers=_PRIVATE)


def _band_numbers(text: str) -> list[int]:
    parts = text.split(',')
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise ConfigError(f'bands={text[:80]!r}: it takes three whole numbers, as in 0,1,2')
    return [int(part) for part in parts]


def _together(images: Iterator[bytes]) -> Iterator[bytes]:
    held = bytearray()
    for image in images:
        held += image
        if len(held) >= _CHUNK_BYTES:
            yield bytes(held)
            held.clear()
    yield bytes(held)
