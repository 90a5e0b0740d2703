"""The pages of datasets declared as classes: which there are, their columns, and their rows."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from finetuner.client import LocalClient
from finetuner.columns.inspecting import DatasetFile
from finetuner.columns.looking import Cell, LookedRow, file_name, look, size_text
from finetuner.server.dataset_view import DatasetView, is_picture, thumbnail, untrusted_file
from finetuner.server.page_views import render
from finetuner.server.rest_schema import Name

ROWS_A_PAGE = 50
# on the page of the columns
_FIRST_ROWS = 5
_ERRORS_A_PAGE = 50
_LAST_PAGE = 1_000_000_000
RowNumber = Annotated[int, Query(ge=0, lt=2**63)]


def add_dataset_pages(router: APIRouter, reads: Any) -> None:
    """Routes of the pages.

    Args:
        router: of the pages.
        reads: dependency that gives the client of whoever looks.
    """

    @router.get('/ui/datasets', response_class=HTMLResponse)
    def list_datasets(request: Request, client: LocalClient = reads) -> Response:
        return render(request, 'datasets.html', files=_view(client).shown(), size=size_text)

    @router.get('/ui/dataset', response_class=HTMLResponse)
    def show_dataset(
        request: Request, file: Name, dataset: Name, client: LocalClient = reads
    ) -> Response:
        with _view(client).file(file) as found:
            state = found.state(dataset)
            return render(
                request,
                'dataset.html',
                state=state,
                sql_bytes=found.num_bytes,
                graph=found.graph(dataset).svg,
                **_rows(found, file, dataset, 0, _FIRST_ROWS),
            )

    @router.get('/ui/dataset/rows', response_class=HTMLResponse)
    def show_rows(
        request: Request, file: Name, dataset: Name, page: int = 1, client: LocalClient = reads
    ) -> Response:
        with _view(client).file(file) as found:
            total = found.count(dataset)
            num_pages = max(1, -(-total // ROWS_A_PAGE))
            page = min(max(1, page), num_pages)
            start = (page - 1) * ROWS_A_PAGE
            return render(
                request,
                'dataset_rows.html',
                page=page,
                num_pages=num_pages,
                total=total,
                **_rows(found, file, dataset, start, ROWS_A_PAGE),
            )

    @router.get('/ui/dataset/errors', response_class=HTMLResponse)
    def show_errors(
        request: Request,
        file: Name,
        dataset: Name,
        column: Name,
        page: int = 1,
        client: LocalClient = reads,
    ) -> Response:
        page = min(max(1, page), _LAST_PAGE)
        with _view(client).file(file) as found:
            start = (page - 1) * _ERRORS_A_PAGE
            errors = found.errors(dataset, column, start=start, count=_ERRORS_A_PAGE + 1)
        return render(
            request,
            'dataset_errors.html',
            errors=errors[:_ERRORS_A_PAGE],
            has_more=len(errors) > _ERRORS_A_PAGE,
            column=column,
            page=page,
            **_place(file, dataset),
        )

    _add_files(router, reads)


def _add_files(router: APIRouter, reads: Any) -> None:
    @router.get('/ui/dataset/picture', response_class=Response)
    def show_picture(
        file: Name,
        dataset: Name,
        row: RowNumber,
        column: Name,
        at: str = '',
        client: LocalClient = reads,
    ) -> Response:
        del at  # another file, another address: the browser keeps what it has seen
        with _view(client).file(file) as found:
            key = found.file_of(dataset, row, column)
            content = thumbnail(found.files(dataset), key)
        headers = {
            'cache-control': 'private, max-age=86400, immutable',
            'vary': 'authorization, cookie',
            'x-content-type-options': 'nosniff',
        }
        return Response(content, media_type='image/png', headers=headers)

    @router.get('/ui/dataset/file', response_class=Response)
    def download(
        file: Name, dataset: Name, row: RowNumber, column: Name, client: LocalClient = reads
    ) -> Response:
        return download_file(_view(client), file, dataset, row, column)


def download_file(view: DatasetView, file: str, dataset: str, row: int, column: str) -> Response:
    """A file of a dataset to take along.

    Args:
        view: what is shown.
        file: name of the SQLite file.
        dataset: in it.
        row: id of the row.
        column: of files.
    """
    with view.file(file) as found:
        key = found.file_of(dataset, row, column)
        name = file_name(dataset, column, row, key)
        return untrusted_file(found.files(dataset), key, name)


def _view(client: LocalClient) -> DatasetView:
    return DatasetView(client.settings.columns)


def _place(file: str, dataset: str) -> dict[str, Any]:
    """What all pages of a dataset are told, to make addresses of."""

    def address(below: str, /, **more: Any) -> str:
        return f'/ui/dataset{below}?' + urlencode({'file': file, 'dataset': dataset, **more})

    return {'file': file, 'dataset': dataset, 'address': address, 'size': size_text}


def _rows(found: DatasetFile, file: str, dataset: str, start: int, count: int) -> dict[str, Any]:
    place = _place(file, dataset)

    def shown(row: LookedRow, name: str, cell: Cell) -> dict[str, Any]:
        if cell.kind != 'file':
            return {'kind': cell.kind, 'text': cell.text}
        where = {'row': row.id, 'column': name}
        return {
            'kind': 'picture' if is_picture(cell.key) else 'file',
            'text': cell.text,
            'name': file_name(dataset, name, row.id, cell.key),
            'address': place['address']('/file', **where),
            'picture': place['address']('/picture', **where, at=cell.key[-24:]),
        }

    rows = [
        {'id': row.id, 'cells': [shown(row, name, cell) for name, cell in row.cells.items()]}
        for row in look(found, dataset, start, count)
    ]
    return {**place, 'columns': found.columns(dataset), 'rows': rows}
