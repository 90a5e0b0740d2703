"""The web page: runs, data, results and a form to submit with, rendered here and without a build step.

Names stand in queries, never in paths. What a page changes, it changes by a plain form; a page of
another server is turned away before it gets here (`http._DoorMiddleware`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Form, Request, Response, UploadFile
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from starlette.background import BackgroundTask

from finetuner.client import LocalClient
from finetuner.excepts import ConfigError, FinetunerError, NotFoundError
from finetuner.models.zoo import BACKBONES, DEFAULT_BACKBONE
from finetuner.runs.states import CREATED, GOING
from finetuner.server.admission import refuse_paths
from finetuner.server.exploring import Explorer
from finetuner.server.http_errors import status_of
from finetuner.server.page_collections import add_collection_pages
from finetuner.server.page_datasets import add_dataset_pages
from finetuner.server.page_explorer import add_explorer, contents_of_run
from finetuner.server.page_uploads import store_upload
from finetuner.server.page_views import (
    metric_rows,
    page_examples,
    render,
    run_query,
    short_metrics,
    thumbnail,
)
from finetuner.server.rest_schema import Name, Owner, identity, require
from finetuner.server.security import TokenCheck

COOKIE = 'finetuner_token'
PAGE_SIZE = 50
_LOG_LINES = 400
_COOKIE_SECONDS = 30 * 24 * 3600
_FIELDS = {
    'model': DEFAULT_BACKBONE,
    'train_data': '',
    'query_data': '',
    'index_data': '',
    'epochs': '5',
    'batch_size': '',
    'learning_rate': '',
    'loss': '',
    'run_name': '',
    'experiment_name': 'default',
    'public': '',
}


def build_pages(client: LocalClient, token: TokenCheck, explorer: Explorer) -> APIRouter:
    """All pages.

    Args:
        client: of the machine's own user; others get one like it.
        token: the check at the door, for the page to log in on.
        explorer: embeds the index data of runs.
    """
    router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

    def reader(owner: Owner = None) -> LocalClient:
        who = require('read')
        is_own = owner is None or owner == who.user
        return client.for_owner(who.user if owner is None else owner, only_public=not is_own)

    def writer() -> LocalClient:
        return client.for_owner(require('write').user)

    reads, writes = Depends(reader), Depends(writer)
    _add_login(router, token)
    _add_lists(router, reads)
    _add_comparison(router, reads)
    _add_run(router, reads)
    _add_changes(router, writes)
    _add_submission(router, reads, writes)
    add_explorer(router, reads, explorer)
    add_collection_pages(router, reads, writes)
    add_dataset_pages(router, reads)
    return router


def _add_login(router: APIRouter, token: TokenCheck) -> None:
    @router.get('/login')
    def show_login(request: Request) -> Response:
        return render(request, 'login.html', message='', user=None)

    @router.post('/login')
    def log_in(request: Request, given: str = Form('', alias='token')) -> Response:
        if token.identify(f'Bearer {given.strip()}') is None:
            message = 'This token lets nobody in: it is mistyped, or has ended.'
            return render(request, 'login.html', status_code=401, message=message, user=None)
        answer = RedirectResponse('/ui/runs', 303)
        answer.set_cookie(
            COOKIE,
            given.strip(),
            max_age=_COOKIE_SECONDS,
            httponly=True,
            samesite='strict',
            secure=request.url.scheme == 'https',
        )
        return answer

    @router.post('/ui/logout')
    def log_out() -> Response:
        answer = RedirectResponse('/login', 303)
        answer.delete_cookie(COOKIE)
        return answer


def _add_lists(router: APIRouter, reads: Any) -> None:
    @router.get('/ui')
    def start() -> Response:
        return RedirectResponse('/ui/runs', 303)

    @router.get('/ui/runs')
    def list_runs(
        request: Request,
        experiment: str | None = None,
        page: int = 1,
        rows: bool = False,
        client: LocalClient = reads,
    ) -> Response:
        runs = client.list_runs(experiment, page, PAGE_SIZE)
        place = {} if experiment is None else {'experiment': experiment}

        def address(number: int, **more: Any) -> str:
            return '/ui/runs?' + urlencode({**place, 'page': number, **more})

        return render(
            request,
            '_rows.html' if rows else 'runs.html',
            title='Runs' if experiment is None else f'Runs of {experiment}',
            runs=runs,
            comparable=True,
            show_owner=False,
            page=page,
            size=PAGE_SIZE,
            going=any(run['status'] in GOING for run in runs),
            rows_address=address(page, rows=1),
            page_address=address,
        )

    @router.get('/ui/shared')
    def list_shared(request: Request, page: int = 1, client: LocalClient = reads) -> Response:
        runs = [run.shown() for run in client.workspace.runs.list_shared(page, PAGE_SIZE)]
        return render(
            request,
            'runs.html',
            title='Shared by all users',
            runs=runs,
            comparable=False,
            show_owner=True,
            page=page,
            size=PAGE_SIZE,
            going=False,
            page_address=lambda number: f'/ui/shared?page={number}',
        )

    @router.get('/ui/experiments')
    def list_experiments(request: Request, page: int = 1, client: LocalClient = reads) -> Response:
        found = client.list_experiments(page, PAGE_SIZE)
        return render(request, 'experiments.html', experiments=found)


def _add_comparison(router: APIRouter, reads: Any) -> None:
    @router.get('/ui/compare')
    def compare(request: Request, client: LocalClient = reads) -> Response:
        chosen = request.query_params.getlist('run')
        if len(chosen) != 2:
            raise ConfigError(f'{len(chosen)} runs are ticked: tick two to compare them')
        places = [reference.partition('\t') for reference in chosen]
        runs = [client.get_run(experiment, name) for experiment, _, name in places]
        after = []
        for run in runs:
            stages = client.get_run_metrics(run['experiment_name'], run['name'])
            after.append(short_metrics(run, stages.get('after', {})))
        names = sorted(set(after[0]) | set(after[1]))
        keys = [key for key in runs[0]['config'] if key != 'run_name']
        return render(
            request,
            'compare.html',
            runs=runs,
            metrics=[
                (name, [f'{v[name]:.3f}' if name in v else '' for v in after]) for name in names
            ],
            curves=[{'query': run_query(run), 'label': run['name']} for run in runs],
            differences=[
                (key, [run['config'].get(key) for run in runs])
                for key in keys
                if runs[0]['config'].get(key) != runs[1]['config'].get(key)
            ],
        )


def _add_run(router: APIRouter, reads: Any) -> None:
    @router.get('/ui/run')
    def show_run(
        request: Request, run: Name, experiment: Name = 'default', client: LocalClient = reads
    ) -> Response:
        found = client.get_run(experiment, run)
        owner = client.workspace.owner
        own = owner == identity().user
        # of a long log the end is shown; the rest is in the API
        lines = client.read_run_logs(experiment, run)
        examples = page_examples(client, found, own)
        takes_text, takes_pictures = contents_of_run(found)
        ahead = 0
        if found['status'] == CREATED:
            number = client.workspace.runs.get_run(experiment, run).id
            ahead = client.workspace.runs.count_waiting(number)
        return render(
            request,
            'run.html',
            run=found,
            own=own,
            aliases=client.workspace.runs.aliases.list_of(found['artifact_id']),
            query=run_query(found, None if own else owner),
            going=found['status'] in GOING,
            ahead=ahead,
            metrics=metric_rows(found, client.get_run_metrics(experiment, run)),
            examples=examples,
            explorable=own,
            takes_text=takes_text,
            takes_pictures=takes_pictures,
            log='\n'.join(line for _, line in lines[-_LOG_LINES:]) + ('\n' if lines else ''),
            last=lines[-1][0] if lines else 0,
        )

    @router.get('/ui/thumbnail', response_class=Response)
    def show_thumbnail(reference: Name, position: int, client: LocalClient = reads) -> Response:
        content = thumbnail(client, reference, position)
        headers = {'cache-control': 'private, max-age=86400, immutable'}
        return Response(content, media_type='image/png', headers=headers)

    @router.get('/ui/artifact', response_class=FileResponse)
    def download(
        run: Name, experiment: Name = 'default', client: LocalClient = reads
    ) -> FileResponse:
        found = client.get_run(experiment, run)
        folder = tempfile.TemporaryDirectory(prefix='finetuner-zip-')
        try:
            path = Path(client.download_artifact(found['artifact_id'], folder.name, run))
        except BaseException:
            folder.cleanup()
            raise
        # deleted when it has been sent
        return FileResponse(path, filename=path.name, background=BackgroundTask(folder.cleanup))


def _add_changes(router: APIRouter, writes: Any) -> None:
    @router.get('/ui/confirm/{what}')
    def confirm(
        request: Request,
        what: str,
        run: Name,
        experiment: Name = 'default',
        client: LocalClient = writes,
    ) -> Response:
        found = client.get_run(experiment, run)
        texts = {
            'cancel': ('Cancel it?', 'Its training ends. It can go on later from its checkpoint.'),
            'delete': ('Delete it?', 'Its log, its metrics and its model are gone for good.'),
        }
        if what not in texts:
            raise NotFoundError(f'there is no question {what!r}')
        title, consequence = texts[what]
        return render(
            request,
            'confirm.html',
            question=f'{run}: {title}',
            what=consequence,
            button=f'Yes, {what}',
            action=f'/ui/run/{what}?{run_query(found)}',
            back=f'/ui/run?{run_query(found)}',
        )

    def changing(path: str, change: Callable[[LocalClient, str, str], Any], back: bool) -> None:
        @router.post(path)
        def post(run: Name, experiment: Name = 'default', client: LocalClient = writes) -> Response:
            change(client, experiment, run)
            place = urlencode({'experiment': experiment, 'run': run})
            return RedirectResponse(f'/ui/run?{place}' if back else '/ui/runs', 303)

    changing('/ui/run/cancel', LocalClient.cancel_run, True)
    changing('/ui/run/resume', LocalClient.resume_run, True)
    changing('/ui/run/delete', LocalClient.delete_run, False)

    @router.post('/ui/run/share')
    def share(
        run: Name, public: str, experiment: Name = 'default', client: LocalClient = writes
    ) -> Response:
        client.share_run(experiment, run, public == 'yes')
        place = urlencode({'experiment': experiment, 'run': run})
        return RedirectResponse(f'/ui/run?{place}', 303)


def _add_submission(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.get('/ui/data')
    def show_data(request: Request, client: LocalClient = reads) -> Response:
        return _data_page(request, client)

    @router.post('/ui/data')
    def store(
        request: Request,
        file: UploadFile,
        name: str = Form(),
        labeled: str = Form(''),
        client: LocalClient = writes,
    ) -> Response:
        try:
            store_upload(client, name, file.filename or '', file.file, labeled == 'yes')
        except FinetunerError as error:
            return _data_page(request, client, error)
        return RedirectResponse('/ui/data', 303)

    @router.get('/ui/submit')
    def show_form(request: Request, client: LocalClient = reads) -> Response:
        return _form_page(request, client, _FIELDS)

    @router.post('/ui/submit')
    async def submit(request: Request, client: LocalClient = writes) -> Response:
        from starlette.concurrency import run_in_threadpool

        form = await request.form()
        given = {name: str(form.get(name) or '').strip() for name in _FIELDS}
        try:
            run = await run_in_threadpool(_submit, client, given)
        except FinetunerError as error:
            return await run_in_threadpool(_form_page, request, client, given, error)
        return RedirectResponse(f'/ui/run?{run_query(run)}', 303)


def _submit(client: LocalClient, given: dict[str, str]) -> dict[str, Any]:
    """Make a run of the fields of the form; empty ones are left to the recipe."""
    parameters: dict[str, Any] = {
        name: given[name]
        for name in ('model', 'loss', 'run_name', 'experiment_name')
        if given[name]
    }
    for name, kind in (('epochs', int), ('batch_size', int), ('learning_rate', float)):
        if given[name]:
            try:
                parameters[name] = kind(given[name])
            except ValueError as error:
                raise ConfigError(f'{name} is {given[name]!r}: it takes a number') from error
    parameters['public'] = given['public'] == 'yes'
    data = {'train_data': given['train_data']}
    if not given['train_data']:
        raise ConfigError('train_data is missing: choose what to train on')
    if given['query_data']:
        options = {'gather_examples': True}
        parameters['callbacks'] = [{'name': 'EvaluationCallback', 'options': options}]
        data['callbacks.0.query_data'] = given['query_data']
        if given['index_data']:
            data['callbacks.0.index_data'] = given['index_data']
    elif given['index_data']:
        raise ConfigError('choose the queries that are looked for in the index data')
    refuse_paths(parameters)
    return client.fit(parameters, data)


def _data_page(
    request: Request, client: LocalClient, error: FinetunerError | None = None
) -> Response:
    return render(
        request,
        'data.html',
        status_code=200 if error is None else status_of(error),
        datasets=client.list_data(),
        message=error or '',
        host=str(request.base_url).rstrip('/'),
    )


def _form_page(
    request: Request,
    client: LocalClient,
    given: dict[str, str],
    error: FinetunerError | None = None,
) -> Response:
    return render(
        request,
        'submit.html',
        status_code=200 if error is None else status_of(error),
        datasets=client.list_data(),
        models=list(BACKBONES),
        given=given,
        message=error or '',
    )
