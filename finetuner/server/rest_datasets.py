"""The part of the REST API that reads datasets declared as classes."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Query, Response

from finetuner.client import LocalClient
from finetuner.columns.looking import LONG, look, plain_state
from finetuner.server.dataset_view import DatasetView, plain_dataset
from finetuner.server.page_datasets import RowNumber, download_file
from finetuner.server.rest_images import MAX_PAGE
from finetuner.server.rest_schema import Name

_TAGS: list[Any] = ['datasets']


def add_datasets(router: APIRouter, reads: Any) -> None:
    """Routes that read datasets.

    Args:
        router: they are added to.
        reads: dependency that gives the client of whoever asks.
    """

    @router.get('/datasets', tags=_TAGS)
    def list_datasets(client: LocalClient = reads) -> Response:
        """Datasets in the files that the server shows, and files that cannot be read."""
        found: list[dict[str, Any]] = []
        for file in _view(client).shown():
            found += [{'file': file.name, **vars(each)} for each in file.datasets]
            if file.problem:
                found.append({'file': file.name, 'error': file.problem})
        return _answer(found)

    @router.get('/dataset', tags=_TAGS)
    def get_dataset(file: Name, dataset: Name, client: LocalClient = reads) -> Response:
        """Columns of a dataset: what is kept, stale, wrong, and how large it is."""
        with _view(client).file(file) as found:
            return _answer(plain_dataset(file, plain_state(found.state(dataset))))

    @router.get('/dataset/rows', tags=_TAGS)
    def list_rows(
        file: Name,
        dataset: Name,
        offset: RowNumber = 0,
        limit: int = Query(100, ge=1, le=MAX_PAGE),
        client: LocalClient = reads,
    ) -> Response:
        """Rows with the values that are kept; long texts cut, arrays by their shape, files by their name."""
        with _view(client).file(file) as found:
            return _answer([row.plain() for row in look(found, dataset, offset, limit, LONG)])

    @router.get('/dataset/file', tags=_TAGS, response_class=Response)
    def get_file(
        file: Name, dataset: Name, row: RowNumber, column: Name, client: LocalClient = reads
    ) -> Response:
        """A file that is a value."""
        return download_file(_view(client), file, dataset, row, column)


def _view(client: LocalClient) -> DatasetView:
    return DatasetView(client.settings.columns)


def _answer(content: Any) -> Response:
    # texts may hold halves of characters, and JSON numbers of any length
    return Response(json.dumps(content), media_type='application/json')
