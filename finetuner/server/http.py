"""The HTTP side of the gateway: every endpoint as a path, errors as 4xx with one line that helps."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
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
from google.protobuf.json_format import MessageToDict
from jina.excepts import InternalNetworkError
from jina.proto import jina_pb2
from jina.serve.executors import __dry_run_endpoint__ as DRY_RUN
from jina.serve.runtimes.servers.http import HTTPServer
from jina.types.request.data import DataRequest
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send
from swagger_ui_bundle import swagger_ui_path

from finetuner import __version__
from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.excepts import ConfigError, FinetunerError
from finetuner.runs.dispatcher import MAX_RETRIES
from finetuner.server.errors import http_status, message_of_unexpected
from finetuner.server.exploring import Explorer
from finetuner.server.incoming import IncomingData
from finetuner.server.json_documents import read_body, write_documents
from finetuner.server.page_views import render
from finetuner.server.pages import COOKIE, build_pages
from finetuner.server.rest import PREFIX, build_router
from finetuner.server.security import (
    DENIED,
    TokenCheck,
    current_identity,
    is_foreign,
    is_rebound,
)

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / 'static'
_OPEN_BELOW = ('/static/', '/swagger/')
_OPEN_PATHS = ('/', '/login', '/dry_run', '/docs', '/redoc', '/openapi.json')
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
        token: checked on every path but health and documentation.
        endpoints: coroutine function giving the endpoints the Executors know.
        has_runs: whether runs can be submitted and watched here.
    """

    token: TokenCheck = TokenCheck(None)
    endpoints: Endpoints
    has_runs: bool = False
    _is_closing = False

    @property
    def app(self) -> FastAPI:
        """A new app; Jina asks once, when it starts the server."""
        app = build_app(self._request_handler.streamer, self.endpoints, self.token, self.has_runs)
        app.state.is_closing = lambda: self._is_closing
        return app

    async def shutdown(self) -> None:
        """End the streams first: the server waits for whoever is still reading one."""
        self._is_closing = True
        await super().shutdown()


class _DoorMiddleware:
    """Turns away who has no token, and pages of other servers, before anything reads a body."""

    def __init__(self, app: ASGIApp, token: TokenCheck, has_pages: bool) -> None:
        self._app = app
        self._token = token
        self._has_pages = has_pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        looks = scope['method'] in ('GET', 'HEAD')
        if not looks and is_foreign(headers.get('origin'), headers.get('host')):
            message = f'a page of {headers["origin"]} may not send requests to this server'
            await _error('ForbiddenError', message, 403)(scope, receive, send)
            return
        path = scope['path']
        is_open = looks and (path in _OPEN_PATHS or path.startswith(_OPEN_BELOW))
        # its answer to a wrong token is 401 as well
        is_open = is_open or (self._has_pages and path == '/login')
        identity = await asyncio.to_thread(self._token.identify, _authorization(headers))
        if identity is None and not is_open:
            if self._has_pages and looks and 'text/html' in headers.get('accept', ''):
                await RedirectResponse('/login', 303)(scope, receive, send)
                return
            denied = _error('Unauthorized', DENIED, 401)
            denied.headers['www-authenticate'] = 'Bearer'
            await denied(scope, receive, send)
            return
        if is_rebound(headers.get('host')) and not await asyncio.to_thread(self._is_required):
            message = f'this server is on this machine alone, and is not {headers["host"]!r}'
            await _error('ForbiddenError', message, 403)(scope, receive, send)
            return
        current_identity.set(identity)
        await self._app(scope, receive, send)

    def _is_required(self) -> bool:
        return self._token.required


def _authorization(headers: Headers) -> str | None:
    """The header of that name, or what a browser that logged in sends in its place."""
    given = headers.get('authorization')
    if given is not None:
        return given
    cookies = cookie_parser(headers.get('cookie', ''))
    token = cookies.get(COOKIE)
    return None if token is None else f'Bearer {token}'


def build_app(
    streamer: Any, endpoints: Endpoints, token: TokenCheck, has_runs: bool = False
) -> FastAPI:
    """The FastAPI app in front of a Flow.

    Args:
        streamer: Jina's gateway streamer, which carries requests to the Executors.
        endpoints: coroutine function giving the endpoints the Executors know.
        token: the check of the `Authorization` header.
        has_runs: whether the REST API of runs is there as well.

    Returns:
        An app with `POST /<endpoint>`, Jina's `POST /post` and `GET /dry_run`, and `GET /`.
    """
    app = FastAPI(
        title='Finetuner',
        description='Fine-tune embedding models and get embeddings; see docs/serving.md.',
        version=__version__,
        on_shutdown=[streamer.close],
        openapi_url=None,  # ours, below: only a running Flow knows its endpoints
    )
    app.add_middleware(_DoorMiddleware, token=token, has_pages=has_runs)
    app.add_exception_handler(FinetunerError, _answer_error)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.state.is_closing = lambda: False
    app.state.token_required = lambda: token.required
    if has_runs:
        _add_runs(app, token)
    _add_description(app, endpoints)

    @app.get('/dry_run', summary='Whether every Executor answers', include_in_schema=False)
    async def dry_run() -> Response:
        answer = await _send(streamer, DRY_RUN, DocumentArray(), {}, None)
        status = answer.header.status
        return JSONResponse({'code': status.code, 'description': status.description})

    @app.get('/{path:path}', include_in_schema=False)
    async def links(request: Request, path: str) -> Response:
        if has_runs and not path and 'text/html' in request.headers.get('accept', ''):
            return RedirectResponse('/ui/runs', 303)
        known = await endpoints()
        if path:
            return _error('NotFoundError', f'no page /{path}; POST to {", ".join(known)}', 404)
        return JSONResponse(
            {'name': 'finetuner', 'version': app.version, 'docs': '/docs', 'endpoints': known}
        )

    @app.post('/{path:path}', include_in_schema=False)
    async def call(path: str, request: Request) -> Response:
        return await _call(streamer, f'/{path}', request)

    return app


def _add_runs(app: FastAPI, token: TokenCheck) -> None:
    """The REST API of runs, and their pages."""
    client = LocalClient(Settings.from_environment(), max_retries=MAX_RETRIES)
    incoming = IncomingData(client.settings.home / 'incoming')
    app.include_router(build_router(client, incoming, lambda: app.state.is_closing()))
    explorer = Explorer(client.settings)
    app.router.on_shutdown.append(explorer.close)
    app.include_router(build_pages(client, token, explorer))
    app.mount('/static', StaticFiles(directory=STATIC), name='static')


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


async def _call(streamer: Any, path: str, request: Request) -> Response:
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'application/json':
        # also what keeps a page of another origin from posting without asking the browser
        raise ConfigError(
            f'the content type is {kind or "missing"!r}: send `Content-Type: application/json` '
            "(curl: -H 'Content-Type: application/json')"
        )
    # parsing and base64 of megabytes must not hold up the other requests of this process
    docs, parameters, endpoint, target = await asyncio.to_thread(read_body, await request.body())
    if path != '/post':
        endpoint = path
    elif not endpoint:
        raise ConfigError('`exec_endpoint` is missing: name the endpoint, such as "/encode"')
    elif not endpoint.startswith('/'):
        endpoint = f'/{endpoint}'
    answer = await _send(streamer, endpoint, docs, parameters, target)
    status = answer.header.status
    if status.code == jina_pb2.StatusProto.ERROR:
        name = status.exception.name
        return _error(name, status.description, http_status(name) or 500)
    return await asyncio.to_thread(_write_answer, answer)


async def _send(
    streamer: Any,
    endpoint: str,
    docs: DocumentArray,
    parameters: dict[str, Any],
    target: str | None,
) -> DataRequest:
    request = DataRequest()
    request.header.exec_endpoint = endpoint
    if target:
        request.header.target_executor = target
    request.parameters = parameters
    request.data.docs = docs
    return await streamer.process_single_data(request)


def _write_answer(answer: DataRequest) -> Response:
    written = MessageToDict(
        answer.proto_wo_data, preserving_proto_field_name=True, use_integers_for_enums=True
    )
    written['data'] = write_documents(answer.data.docs)
    return Response(json.dumps(written), media_type='application/json')


def _error(name: str, message: str, status: int) -> JSONResponse:
    return JSONResponse({'error': name, 'message': message}, status_code=status)


async def _answer_error(request: Request, error: Exception) -> Response:
    name = type(error).__name__
    status = http_status(name) or 500
    if request.url.path.startswith('/ui') and 'text/html' in request.headers.get('accept', ''):
        title = {404: 'Not found', 403: 'Not allowed', 409: 'Not now'}.get(status, 'This cannot be')
        return render(request, 'error.html', status_code=status, title=title, message=str(error))
    return _error(name, str(error), status)


async def _answer_invalid(_: Request, error: Exception) -> Response:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    places = [('.'.join(map(str, each['loc'][1:])), each['msg']) for each in problems]
    return _error('ConfigError', '; '.join(f'{name}: {message}' for name, message in places), 422)


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    if isinstance(error, InternalNetworkError):
        waited = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        message = 'an Executor did not answer in time' if waited else 'an Executor is not reachable'
        return _error('Unavailable', message, 504 if waited else 503)
    request_id = uuid.uuid4().hex
    logger.error('request %s to %s failed: %r', request_id, request.url.path, error)
    return _error('InternalError', message_of_unexpected(request_id), 500)


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
