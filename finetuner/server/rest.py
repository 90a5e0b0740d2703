"""The REST API: runs, experiments, logs as they come, data and artifacts in pieces that resume.

Names of runs and experiments stand in queries and bodies, never in paths: they may hold anything.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse

from finetuner import __version__
from finetuner.client import LocalClient
from finetuner.config import RunConfig
from finetuner.excepts import NotFoundError
from finetuner.runs.states import ENDED
from finetuner.server.admission import fit_requested, refuse_paths
from finetuner.server.incoming import IncomingData
from finetuner.server.rest_collections import add_collections
from finetuner.server.rest_datasets import add_datasets
from finetuner.server.rest_files import add_aliases, add_artifacts, add_data, add_tokens
from finetuner.server.rest_releases import add_releases
from finetuner.server.rest_schema import (
    ExperimentRequest,
    FitRequest,
    Name,
    Owner,
    ShareRequest,
    require,
)
from finetuner.storage.tokens import TokenStore

PREFIX = '/api/v1'
LOOK_SECONDS = 0.2
_KEEP_ALIVE_SECONDS = 15.0


def build_router(
    client: LocalClient, incoming: IncomingData, is_closing: Callable[[], bool]
) -> APIRouter:
    """All routes of the API.

    Args:
        client: of the machine's own user; others get one like it.
        incoming: uploads.
        is_closing: whether the server is about to end, so that streams end too.
    """
    router = APIRouter(prefix=PREFIX)

    def reader(owner: Owner = None) -> LocalClient:
        who = require('read')
        if owner is None or owner == who.user:
            return client.for_owner(who.user)
        return client.for_owner(owner, only_public=True)

    def writer() -> LocalClient:
        return client.for_owner(require('write').user)

    reads, writes = Depends(reader), Depends(writer)
    _add_runs(router, reads, writes)
    _add_run(router, reads, writes)
    _add_run_history(router, reads, is_closing)
    _add_experiments(router, reads, writes)
    add_artifacts(router, reads)
    add_aliases(router, reads, writes)
    add_data(router, reads, writes, incoming)
    add_collections(router, client)
    add_datasets(router, reads)
    add_releases(router, client, is_closing)
    add_tokens(router, lambda: TokenStore(client.workspace.database))
    return router


def _add_runs(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.get('/me', tags=['server'])
    def me() -> dict[str, Any]:
        """Who the token belongs to, and what it allows."""
        who = require('read')
        return {'user': who.user, 'scope': who.scope, 'version': __version__}

    @router.post('/runs', status_code=201, tags=['runs'])
    def submit(body: FitRequest, client: LocalClient = writes) -> dict[str, Any]:
        """Submit a run, whose data was stored before."""
        placed = {'train_data': 'stored', **body.parameters}
        RunConfig.from_parameters(placed)
        refuse_paths(body.parameters)
        return fit_requested(client, body.parameters, body.data)

    @router.get('/runs', tags=['runs'])
    def list_runs(
        experiment: str | None = None, page: int = 1, size: int = 50, client: LocalClient = reads
    ) -> list[dict[str, Any]]:
        """Runs, newest first."""
        return client.list_runs(experiment, page, size)

    @router.get('/runs/shared', tags=['runs'])
    def list_shared(page: int = 1, size: int = 50, client: LocalClient = reads) -> list[Any]:
        """Everybody's public runs, newest first."""
        return [run.shown() for run in client.workspace.runs.list_shared(page, size)]

    @router.delete('/runs', status_code=204, tags=['runs'])
    def delete_runs(experiment: str | None = None, client: LocalClient = writes) -> Response:
        """Delete all ended runs, of one experiment or of all; none when one is going."""
        client.delete_runs(experiment)
        return Response(status_code=204)


def _add_run(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.get('/run', tags=['runs'])
    def get_run(run: Name, experiment: Name = 'default', client: LocalClient = reads) -> Any:
        """Everything about a run but its log and metrics."""
        return client.get_run(experiment, run)

    @router.delete('/run', status_code=204, tags=['runs'])
    def delete_run(
        run: Name, experiment: Name = 'default', client: LocalClient = writes
    ) -> Response:
        """Delete an ended run with its log, metrics and artifact."""
        client.delete_run(experiment, run)
        return Response(status_code=204)

    @router.post('/run/cancel', tags=['runs'])
    def cancel_run(run: Name, experiment: Name = 'default', client: LocalClient = writes) -> Any:
        """End a run that is going or waits."""
        return client.cancel_run(experiment, run)

    @router.post('/run/resume', tags=['runs'])
    def resume_run(run: Name, experiment: Name = 'default', client: LocalClient = writes) -> Any:
        """Go on with a run that failed, from its last checkpoint."""
        return client.resume_run(experiment, run)

    @router.post('/run/share', tags=['runs'])
    def share_run(
        body: ShareRequest, run: Name, experiment: Name = 'default', client: LocalClient = writes
    ) -> Any:
        """Show a run, its log, metrics and artifact to everybody who can log in, or stop that."""
        return client.share_run(experiment, run, body.public)


def _add_run_history(router: APIRouter, reads: Any, is_closing: Callable[[], bool]) -> None:
    @router.get('/run/log', tags=['history'])
    def read_log(
        run: Name, experiment: Name = 'default', after: int = 0, client: LocalClient = reads
    ) -> dict[str, Any]:
        """Log lines after an id, each with its id, and the state the run was in before."""
        state = client.get_run_status(experiment, run)
        return {**state, 'lines': client.read_run_logs(experiment, run, after)}

    @router.get('/run/events', tags=['history'], response_class=StreamingResponse)
    async def stream(
        request: Request,
        run: Name,
        experiment: Name = 'default',
        after: int = 0,
        client: LocalClient = reads,
    ) -> StreamingResponse:
        """Log lines, states and progress as they come: server-sent events, until the run ends.

        `line` events carry ids; a client that comes back with `Last-Event-ID` misses nothing.
        """
        last = request.headers.get('last-event-id', '')
        after = int(last) if last.isdigit() else after
        # an unknown run is answered with 404, not with a stream that breaks off
        await asyncio.to_thread(client.get_run, experiment, run)
        events = _events(client, experiment, run, after, is_closing)
        headers = {'cache-control': 'no-store', 'x-accel-buffering': 'no'}
        return StreamingResponse(events, media_type='text/event-stream', headers=headers)

    @router.get('/run/metrics', tags=['history'])
    def get_metrics(run: Name, experiment: Name = 'default', client: LocalClient = reads) -> Any:
        """Evaluation metrics by stage."""
        return client.get_run_metrics(experiment, run)

    @router.get('/run/examples', tags=['history'])
    def get_examples(run: Name, experiment: Name = 'default', client: LocalClient = reads) -> Any:
        """Results of example queries by stage."""
        return client.get_run_examples(experiment, run)

    @router.get('/run/curves', tags=['history'])
    def get_curves(run: Name, experiment: Name = 'default', client: LocalClient = reads) -> Any:
        """Values measured while training: for each name a list of [step, epoch, value]."""
        return client.get_run_curves(experiment, run)


async def _events(
    client: LocalClient, experiment: str, run: str, after: int, is_closing: Callable[[], bool]
) -> AsyncIterator[str]:
    last_state: Any = None
    silent = 0.0
    while not is_closing():
        try:
            # the state first: what an ended run logged is then all there
            record = await asyncio.to_thread(client.get_run, experiment, run)
            lines = await asyncio.to_thread(client.read_run_logs, experiment, run, after)
        except NotFoundError:
            yield _event('end', {'status': 'DELETED'})
            return
        for number, line in lines:
            after = number
            yield _event('line', line, number)
        state = {name: record[name] for name in ('status', 'details', 'progress')}
        if state != last_state:
            last_state = state
            yield _event('state', state)
        if record['status'] in ENDED:
            yield _event('end', state)
            return
        silent = 0.0 if lines else silent + LOOK_SECONDS
        if silent > _KEEP_ALIVE_SECONDS:
            silent = 0.0
            yield ': still here\n\n'
        await asyncio.sleep(LOOK_SECONDS)


def _event(name: str, data: Any, number: int | None = None) -> str:
    head = '' if number is None else f'id: {number}\n'
    return f'{head}event: {name}\ndata: {json.dumps(data)}\n\n'


def _add_experiments(router: APIRouter, reads: Any, writes: Any) -> None:
    @router.get('/experiments', tags=['experiments'])
    def list_experiments(page: int = 1, size: int = 50, client: LocalClient = reads) -> Any:
        """Experiments, newest first."""
        return client.list_experiments(page, size)

    @router.post('/experiments', status_code=201, tags=['experiments'])
    def create_experiment(body: ExperimentRequest, client: LocalClient = writes) -> Any:
        """Create an experiment."""
        return client.create_experiment(body.name, body.description)

    @router.delete('/experiments', tags=['experiments'])
    def delete_experiments(client: LocalClient = writes) -> Any:
        """Delete all experiments with their runs; returns what they were."""
        return client.delete_experiments()

    @router.get('/experiment', tags=['experiments'])
    def get_experiment(name: Name, client: LocalClient = reads) -> Any:
        """An experiment and how many runs it has."""
        return client.get_experiment(name)

    @router.delete('/experiment', tags=['experiments'])
    def delete_experiment(name: Name, client: LocalClient = writes) -> Any:
        """Delete an experiment with its runs; returns what it was."""
        return client.delete_experiment(name)
