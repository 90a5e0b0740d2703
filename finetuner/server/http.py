"""The HTTP side of the gateway: every endpoint as a path, errors as 4xx with one line that helps."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from docarray import DocumentArray
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, RedirectResponse
from google.protobuf.json_format import MessageToDict
from jina.excepts import InternalNetworkError
from jina.proto import jina_pb2
from jina.serve.executors import __dry_run_endpoint__ as DRY_RUN
from jina.serve.runtimes.servers.http import HTTPServer
from jina.types.request.data import DataRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from finetuner import __version__
from finetuner.excepts import ConfigError, FinetunerError
from finetuner.server.errors import http_status, message_of_unexpected
from finetuner.server.json_documents import read_body, write_documents
from finetuner.server.security import DENIED, TokenCheck

logger = logging.getLogger(__name__)

_OPEN_PATHS = ('/', '/dry_run', '/docs', '/redoc', '/openapi.json')
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
    """

    token: TokenCheck = TokenCheck(None)
    endpoints: Endpoints

    @property
    def app(self) -> FastAPI:
        """A new app; Jina asks once, when it starts the server."""
        return build_app(self._request_handler.streamer, self.endpoints, self.token)


class _TokenMiddleware:
    """Turns away requests without the token before anything reads their body."""

    def __init__(self, app: ASGIApp, token: TokenCheck) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] == 'http':
            is_open = scope['method'] in ('GET', 'HEAD') and scope['path'] in _OPEN_PATHS
            given = dict(scope['headers']).get(b'authorization')
            if not is_open and not self._token.admits(given):
                denied = _error('Unauthorized', DENIED, 401)
                denied.headers['www-authenticate'] = 'Bearer'
                await denied(scope, receive, send)
                return
        await self._app(scope, receive, send)


def build_app(streamer: Any, endpoints: Endpoints, token: TokenCheck) -> FastAPI:
    """The FastAPI app in front of a Flow.

    Args:
        streamer: Jina's gateway streamer, which carries requests to the Executors.
        endpoints: coroutine function giving the endpoints the Executors know.
        token: the check of the `Authorization` header.

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
    app.add_middleware(_TokenMiddleware, token=token)
    app.add_exception_handler(FinetunerError, _answer_error)
    app.add_exception_handler(Exception, _answer_unexpected)

    @app.get('/dry_run', summary='Whether every Executor answers', include_in_schema=False)
    async def dry_run() -> Response:
        answer = await _send(streamer, DRY_RUN, DocumentArray(), {}, None)
        status = answer.header.status
        return JSONResponse({'code': status.code, 'description': status.description})

    @app.get('/openapi.json', include_in_schema=False)
    async def schema() -> Response:
        return JSONResponse(_schema(app, await endpoints()))

    @app.get('/docs', include_in_schema=False)
    async def page() -> Response:
        return get_swagger_ui_html(openapi_url='/openapi.json', title=app.title)

    @app.get('/redoc', include_in_schema=False)
    async def other_page() -> Response:
        return RedirectResponse('/docs')  # Jina prints this address when a Flow starts

    @app.get('/{path:path}', include_in_schema=False)
    async def links(path: str) -> Response:
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


async def _answer_error(_: Request, error: Exception) -> Response:
    name = type(error).__name__
    return _error(name, str(error), http_status(name) or 500)


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
    return {
        'openapi': '3.1.0',
        'info': {'title': app.title, 'version': app.version, 'description': app.description},
        'paths': paths,
    }
