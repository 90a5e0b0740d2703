"""The HTTP side of the gateway: every endpoint as a path, errors as 4xx with one line that helps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from docarray import DocumentArray
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from jina.excepts import InternalNetworkError
from jina.serve.executors import __dry_run_endpoint__ as DRY_RUN
from jina.serve.runtimes.servers.http import HTTPServer
from jina.types.request.data import DataRequest
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from swagger_ui_bundle import swagger_ui_path

from finetuner import __version__
from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.excepts import FinetunerError
from finetuner.runs.dispatcher import MAX_RETRIES
from finetuner.server.calls import GONE, Call
from finetuner.server.errors import message_of_unexpected
from finetuner.server.exploring import Explorer
from finetuner.server.http_calls import answer_call
from finetuner.server.http_door import (
    CallMiddleware,
    Door,
    DoorMiddleware,
    id_of_failure,
)
from finetuner.server.http_errors import error_answer, error_to
from finetuner.server.http_protocol import protocol_with_patience
from finetuner.server.incoming import IncomingData
from finetuner.server.openai_api import add_openai
from finetuner.server.pages import build_pages
from finetuner.server.rest import PREFIX, build_router

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / 'static'
# beyond this, connections that wait for nothing are too many as well
_CONNECTIONS_A_REQUEST = 4
# of what is wrong with a body
_MOST_TOLD = 10
_BODY_SCHEMA = {
    'type': 'object',
    'properties': {
        'data': {
            'type': 'array',
            'items': {'type': 'object'},
            'description': 'Documents: text, blob (standard base64), uri, tags, chunks, matches',
        },
        'parameters': {'type': 'object'},
        'target_executor': {'type': 'string'},
    },
    'example': {'data': [{'blob': '<base64 of a picture>'}], 'parameters': {}},
}

Endpoints = Callable[[], Awaitable[list[str]]]


class HttpServer(HTTPServer):
    """Jina's HTTP server with an app of our own.

    Attributes:
        door: what the gateway hands it.
    """

    door: Door
    _is_closing = False

    @classmethod
    def with_door(cls, door: Door, arguments: dict[str, Any]) -> HttpServer:
        """Build one.

        Args:
            door: of the gateway.
            arguments: of Jina's server.
        """
        limits = door.limits
        ours = {
            'http': protocol_with_patience(limits.slow_client_seconds),
            'limit_concurrency': _CONNECTIONS_A_REQUEST * limits.max_requests,
            'timeout_graceful_shutdown': max(1, int(limits.drain_limit_seconds)),
        }
        given = arguments.get('uvicorn_kwargs') or {}
        server = cls(**{**arguments, 'uvicorn_kwargs': {**ours, **given}})
        server.door = door
        return server

    @property
    def app(self) -> FastAPI:
        """A new app; Jina asks once, when it starts the server."""
        app = build_app(self.door, self._request_handler.streamer, bool(self.tracing))
        app.state.is_closing = lambda: self._is_closing
        return app

    def end_streams(self) -> None:
        """End what clients read for as long as there is something: logs of runs."""
        self._is_closing = True

    async def shutdown(self) -> None:
        """End the streams first: the server waits for whoever is still reading one."""
        self.end_streams()
        await super().shutdown()


class _App(FastAPI):
    """An app that gives each request an id, also where an error handler answers."""

    door: Door
    traces: bool

    def build_middleware_stack(self) -> ASGIApp:
        return CallMiddleware(super().build_middleware_stack(), self.door, self.traces)


def build_app(door: Door, streamer: Any, traces: bool = False) -> FastAPI:
    """The FastAPI app in front of a Flow.

    Args:
        door: of the gateway.
        streamer: Jina's gateway streamer, closed at the end.
        traces: whether clients' spans are of interest.

    Returns:
        An app with `POST /<endpoint>`, Jina's `POST /post` and `GET /dry_run`, and `GET /`.
    """
    app = _App(
        title='Finetuner',
        description='Fine-tune embedding models and get embeddings; see docs/serving.md.',
        version=__version__,
        on_shutdown=[streamer.close],
        openapi_url=None,  # ours, below: only a running Flow knows its endpoints
    )
    app.door, app.traces = door, traces
    app.add_middleware(DoorMiddleware, door=door)
    app.add_exception_handler(FinetunerError, error_to)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.state.is_closing = lambda: False
    app.state.token_required = lambda: door.token.required
    endpoints = door.dispatcher.endpoints
    if door.has_runs:
        _add_runs(app, door)
    _add_description(app, endpoints)
    _add_health(app, door)
    add_openai(app, door)

    @app.get('/{path:path}', include_in_schema=False)
    async def links(request: Request, path: str) -> Response:
        if door.has_runs and not path and 'text/html' in request.headers.get('accept', ''):
            return RedirectResponse('/ui/runs', 303)
        known = await endpoints()
        if path:
            return error_answer(
                'NotFoundError', f'no page /{path}; POST to {", ".join(known)}', 404
            )
        return JSONResponse(
            {'name': 'finetuner', 'version': app.version, 'docs': '/docs', 'endpoints': known}
        )

    async def call(request: Request) -> Response:
        return await answer_call(request, door)

    # a plain route: FastAPI's has much to do for each request, of which nothing is needed here
    app.add_route('/{path:path}', call, methods=['POST'], include_in_schema=False)
    return app


def _add_runs(app: FastAPI, door: Door) -> None:
    """The REST API of runs, and their pages."""
    client = LocalClient(Settings.from_environment(), max_retries=MAX_RETRIES)
    incoming = IncomingData(client.settings.home / 'incoming')
    app.include_router(build_router(client, incoming, lambda: app.state.is_closing()))
    explorer = Explorer(client.settings)
    app.router.on_shutdown.append(explorer.close)
    app.include_router(build_pages(client, door.token, explorer))
    app.mount('/static', StaticFiles(directory=STATIC), name='static')


def _add_health(app: FastAPI, door: Door) -> None:
    """Whether the server lives, can answer, and what it measures."""

    @app.get('/health/live', include_in_schema=False)
    async def live() -> Response:
        return JSONResponse({'live': True})

    @app.get('/health/ready', include_in_schema=False)
    async def ready() -> Response:
        missing = await door.readiness.missing()
        told = {'ready': not missing, 'not_ready': missing}
        return JSONResponse(told, status_code=503 if missing else 200)

    @app.get('/metrics', include_in_schema=False)
    async def metrics() -> Response:
        written = await asyncio.to_thread(door.journal.metrics.write, door.slots.in_flight)
        return Response(written, media_type=CONTENT_TYPE_LATEST)

    @app.get('/dry_run', summary='Whether every Executor answers', include_in_schema=False)
    async def dry_run() -> Response:
        request = DataRequest()
        request.header.exec_endpoint = DRY_RUN
        request.data.docs = DocumentArray()
        answer = await door.dispatcher.answer(request, Call('http', id_of_failure()))
        status = answer.header.status
        return JSONResponse({'code': status.code, 'description': status.description})


def _add_description(app: FastAPI, endpoints: Endpoints) -> None:
    """The description of the API, and its page, which asks no other host for anything."""
    app.openapi_version = '3.0.3'  # the newest that the Swagger UI at hand reads
    app.mount('/swagger', StaticFiles(directory=swagger_ui_path), name='swagger')

    @app.get('/openapi.json', include_in_schema=False)
    async def schema() -> Response:
        return JSONResponse(_schema(app, await endpoints()))

    @app.get('/docs', include_in_schema=False)
    async def page() -> Response:
        return get_swagger_ui_html(
            openapi_url='/openapi.json',
            title=app.title,
            swagger_js_url='/swagger/swagger-ui-bundle.js',
            swagger_css_url='/swagger/swagger-ui.css',
            swagger_favicon_url='data:,',
        )

    @app.get('/redoc', include_in_schema=False)
    async def other_page() -> Response:
        return RedirectResponse('/docs')  # Jina prints this address when a Flow starts


async def _answer_nobody(_: Request, __: Exception) -> Response:
    """The client went away in the middle of its body: no error of the server's."""
    return Response(status_code=GONE)


async def _answer_invalid(_: Request, error: Exception) -> Response:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    places = [('.'.join(map(str, each['loc'][1:])), each['msg']) for each in problems]
    more = f'; and {len(places) - _MOST_TOLD:,} more' if len(places) > _MOST_TOLD else ''
    message = '; '.join(f'{name[:200]}: {message}' for name, message in places[:_MOST_TOLD]) + more
    return error_answer('ConfigError', message, 422)


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    path = request.url.path
    if isinstance(error, InternalNetworkError):
        waited = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        message = 'an Executor did not answer in time' if waited else 'an Executor is not reachable'
        return error_answer('Unavailable', message, 504 if waited else 503, path)
    request_id = id_of_failure()
    logger.error('request %s to %s failed: %r', request_id, path, error)
    return error_answer('InternalError', message_of_unexpected(request_id), 500, path)


def _schema(app: FastAPI, known: list[str]) -> dict[str, Any]:
    answer = {
        'description': 'Documents, in the order they came',
        'content': {'application/json': {}},
    }
    refusal = {'description': 'what was wrong, as {"error": name, "message": text}'}
    body = {'content': {'application/json': {'schema': _BODY_SCHEMA}}}
    paths = {
        endpoint: {
            'post': {
                'summary': f'Send Documents to {endpoint}',
                'requestBody': body,
                'responses': {'200': answer, '404': refusal, '422': refusal},
            }
        }
        for endpoint in [*known, '/post']
    }
    schema = dict(app.openapi())
    # Jina adds a route of its own
    ours = {path: told for path, told in schema['paths'].items() if path.startswith(PREFIX)}
    schema['paths'] = {**ours, **paths}
    return schema
