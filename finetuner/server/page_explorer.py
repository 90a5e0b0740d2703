"""The parts of a run's page that its model answers: the map of embeddings, and the box to try it."""

from __future__ import annotations

from typing import Any

from docarray import Document
from fastapi import APIRouter, Form, Request, Response, UploadFile
from fastapi.responses import HTMLResponse

from finetuner.client import LocalClient
from finetuner.excepts import ConflictError, DataError, FinetunerError
from finetuner.models.zoo import get_backbone
from finetuner.runs.records import RunRecord
from finetuner.runs.states import FINISHED
from finetuner.server.exploring import METHOD, ExploredIndex, Explorer
from finetuner.server.page_views import document_tile, render, run_query
from finetuner.server.rest_schema import Name

_MAX_PICTURE_BYTES = 32 << 20


def contents_of_run(run: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a run's model takes texts, and whether it takes pictures."""
    modality = get_backbone(run['config']['model']).modality
    return modality in ('text', 'text-image'), modality in ('image', 'text-image')


def add_explorer(router: APIRouter, reads: Any, explorer: Explorer) -> None:
    """Routes of the map and of the box; for runs of one's own.

    Args:
        router: of the pages.
        reads: dependency that gives the client of whoever asks.
        explorer: embeds.
    """

    @router.get('/ui/map', response_class=HTMLResponse)
    def show_map(
        request: Request, run: Name, experiment: Name = 'default', client: LocalClient = reads
    ) -> Response:
        found = _finished(client, experiment, run)
        state = explorer.state(found)
        points = []
        if state == 'ready':
            points = _points(client, explorer.index(found))
        return render(
            request,
            '_map.html',
            state=state,
            points=points,
            method=METHOD,
            query=run_query(found.shown()),
            message='The index data could not be embedded; the log of the server says why.',
        )

    @router.post('/ui/try', response_class=HTMLResponse)
    def find_nearest(
        request: Request,
        run: Name,
        experiment: Name = 'default',
        text: str = Form(''),
        picture: UploadFile | None = None,
        client: LocalClient = reads,
    ) -> Response:
        try:
            found = _finished(client, experiment, run)
            results = _nearest(client, explorer, found, _document(text, picture))
        except FinetunerError as error:
            return render(request, '_neighbours.html', message=str(error), results=[])
        return render(request, '_neighbours.html', message='', results=results)


def _finished(client: LocalClient, experiment: str, run: str) -> RunRecord:
    found = client.workspace.runs.get_run(experiment, run)
    if found.status != FINISHED:
        raise ConflictError(f'run {run!r} is {found.status}: it has no model to look at')
    return found


def _document(text: str, picture: UploadFile | None) -> Document:
    if picture is not None and picture.filename:
        content = picture.file.read(_MAX_PICTURE_BYTES + 1)
        if len(content) > _MAX_PICTURE_BYTES:
            raise DataError(f'the picture has more than {_MAX_PICTURE_BYTES >> 20} MB')
        return Document(blob=content)
    if not text.strip():
        raise DataError('there is nothing to look for: type a text, or choose a picture')
    return Document(text=text.strip())


def _nearest(
    client: LocalClient, explorer: Explorer, run: RunRecord, doc: Document
) -> list[dict[str, Any]]:
    index = explorer.index(run)
    docs = client.load_data(index.reference)
    tiles = []
    for position, cosine in explorer.nearest(client, run, doc):
        tile = document_tile(docs[position], index.reference, position)
        label = f'{tile["label"]}, ' if tile['label'] else ''
        tiles.append({**tile, 'label': f'{label}{cosine:.2f}'})
    return tiles


def _points(client: LocalClient, index: ExploredIndex) -> list[dict[str, Any]]:
    docs = client.load_data(index.reference)
    points = []
    for position, place in zip(index.positions, index.places, strict=True):
        doc = docs[int(position)]
        tile = document_tile(doc, index.reference, int(position))
        points.append(
            {
                'x': round(float(place[0]), 3),
                'y': round(float(place[1]), 3),
                'label': tile['label'],
                'name': tile['name'],
                'thumbnail': tile['thumbnail'],
            }
        )
    return points
