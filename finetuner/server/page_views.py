"""What pages show, made of what the run store has: rows of metrics, example pictures, addresses."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetuner.client import LocalClient
from finetuner.data.contents import content_of
from finetuner.data.names import document_name, document_names
from finetuner.excepts import FinetunerError, NotFoundError
from finetuner.runs.states import FINISHED

TEMPLATES = Path(__file__).parent / 'templates'
THUMBNAIL_SIZE = 96
_NUM_EXAMPLES = 8
_NUM_RESULTS = 6
# names are looked up in data of this many Documents at most
_MAX_NAMES = 20_000
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'; object-src 'none'"
)


def render(request: Request, template: str, status_code: int = 200, **values: Any) -> HTMLResponse:
    """A page of a template; all that is put into it is escaped.

    Args:
        request: asked for it.
        template: name of its file.
        status_code: of the answer.
        values: for the template.
    """
    from finetuner.server.rest_schema import identity

    user = values.pop('user') if 'user' in values else identity().user
    text = (
        _environment()
        .get_template(template)
        .render(user=user, token_required=request.app.state.token_required(), **values)
    )
    headers = {
        'content-security-policy': POLICY,
        'x-content-type-options': 'nosniff',
        'referrer-policy': 'same-origin',
        'cache-control': 'no-store',
    }
    return HTMLResponse(text, status_code, headers)


@lru_cache(1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    environment.filters['address'] = lambda run: f'/ui/run?{run_query(run)}'
    # no name holds a tab
    environment.filters['reference'] = lambda run: f'{run["experiment_name"]}\t{run["name"]}'
    environment.filters['time'] = lambda time: str(time or '')[:19].replace('T', ' ')
    environment.filters['plain'] = _plain
    return environment


def _plain(value: Any) -> str:
    if value is None:
        return ''
    return value if isinstance(value, str) else json.dumps(value)


def run_query(run: dict[str, Any], owner: str | None = None) -> str:
    """The query that names a run in addresses."""
    names = {'experiment': run['experiment_name'], 'run': run['name']}
    return urlencode(names if owner is None else {**names, 'owner': owner})


def short_metrics(run: dict[str, Any], metrics: dict[str, float]) -> dict[str, float]:
    """Metrics by their names without the name of the model, which stands before each."""
    model = f'{run["config"]["model"]}_'
    return {name.removeprefix(model): value for name, value in metrics.items()}


def metric_rows(run: dict[str, Any], metrics: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Rows of the table of metrics: before, after, the change and whether chance explains it."""
    metrics = {stage: short_metrics(run, found) for stage, found in metrics.items()}
    before, after = metrics.get('before', {}), metrics.get('after', {})
    chances = metrics.get('p_value', {})
    rows = []
    for name in before or after:
        old, new = before.get(name), after.get(name)
        row = {'name': name, 'before': _number(old), 'after': _number(new)}
        change = None if old is None or new is None else new - old
        row['change'] = '' if change is None else f'{change:+.3f}'
        row['way'] = '' if not change else 'better' if change > 0 else 'worse'
        chance = chances.get(name)
        row['chance'] = '' if chance is None else _chance(chance)
        rows.append(row)
    return rows


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:.3f}'


def _chance(p_value: float) -> str:
    shown = 'p < 0.001' if p_value < 0.001 else f'p = {p_value:.3f}'
    return f'{shown}, {"no" if p_value < 0.05 else "possibly"}'


def page_examples(client: LocalClient, run: dict[str, Any], own: bool) -> list[dict[str, Any]]:
    """Example queries with their results before and after, as tiles with pictures where there are.

    Args:
        client: that may see the run.
        run: as `get_run` gives it.
        own: whether it is the asker's own; of another's run the data stays unseen.
    """
    if run['status'] != FINISHED:
        return []
    stages = client.get_run_examples(run['experiment_name'], run['name'])
    if not stages:
        return []
    tiles = _Tiles(client, run) if own else None
    queries = list(next(iter(stages.values())))[:_NUM_EXAMPLES]
    shown = []
    for name in queries:
        example: dict[str, Any] = {'query': _tile(tiles, 'query', name, None)}
        label = example['query']['label']
        for stage in ('before', 'after'):
            results = stages.get(stage, {}).get(name, [])[:_NUM_RESULTS]
            example[stage] = [_tile(tiles, 'index', result, label) for result in results]
        shown.append(example)
    return shown


def _tile(tiles: _Tiles | None, side: str, name: Any, wanted: str | None) -> dict[str, Any]:
    text = name if isinstance(name, str) else str(name)
    plain = {'name': short_name(text), 'thumbnail': None, 'label': None, 'way': ''}
    if tiles is None:
        return plain
    return {**plain, **tiles.find(side, text, wanted)}


class _Tiles:
    """Finds the Documents that example results name in the data that was searched."""

    def __init__(self, client: LocalClient, run: dict[str, Any]) -> None:
        self._places: dict[str, dict[str, tuple[str, int]]] = {}
        self._docs: dict[str, Any] = {}
        for callback in run['config'].get('callbacks') or ():
            if callback['name'] != 'EvaluationCallback' or self._places:
                continue
            options = callback['options']
            query = options.get('query_data')
            sides = {'query': query, 'index': options.get('index_data') or query}
            for side, reference in sides.items():
                if reference is not None:
                    self._places[side] = self._read(client, reference)

    def _read(self, client: LocalClient, reference: str) -> dict[str, tuple[str, int]]:
        try:
            docs = client.load_data(reference)
        except FinetunerError:
            return {}  # the results' names are shown without their pictures
        if len(docs) > _MAX_NAMES:
            return {}
        self._docs[reference] = docs
        return {name: (reference, i) for i, name in enumerate(document_names(docs))}

    def find(self, side: str, name: str, wanted: str | None) -> dict[str, Any]:
        reference, position = self._places.get(side, {}).get(name, (None, 0))
        if reference is None:
            return {}
        tile = document_tile(self._docs[reference][position], reference, position)
        way = '' if wanted is None else 'right' if tile['label'] == wanted else 'wrong'
        return {**tile, 'way': way}


def short_name(name: str) -> str:
    """The end of a path: where a file lies on the machine that sent it is in nobody's way here."""
    return '/'.join(Path(name).parts[-2:]) if name.startswith('/') else name


def document_tile(doc: Any, reference: str, position: int) -> dict[str, Any]:
    """How a Document of stored data is shown: name, label, and where its picture is.

    Args:
        doc: the Document.
        reference: of the data.
        position: in it.
    """
    is_text = bool(doc.text) and isinstance(content_of(doc), str)
    query = urlencode({'reference': reference, 'position': position})
    return {
        'name': short_name(document_name(doc, position)),
        'thumbnail': None if is_text else f'/ui/thumbnail?{query}',
        'label': _label_text(doc.tags.get('finetuner_label', '')),
        'way': '',
    }


def _label_text(label: Any) -> str:
    # tags hold numbers as floats
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def thumbnail(client: LocalClient, reference: str, position: int) -> bytes:
    """A small PNG of a picture in stored data.

    Raises:
        NotFoundError: no such data, no such Document, or no picture.
    """
    from PIL import Image

    from finetuner.images import picture_of

    docs = client.load_data(reference)
    if not 0 <= position < len(docs):
        raise NotFoundError(f'there is no Document {position} in {reference}')
    try:
        pixels = picture_of(docs[position], THUMBNAIL_SIZE)
    except FinetunerError as error:
        raise NotFoundError(f'Document {position} is no picture: {error}') from error
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG')
    return buffer.getvalue()
