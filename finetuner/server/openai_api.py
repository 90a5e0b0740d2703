"""OpenAI's embeddings API, so that its clients can ask this server: `/v1/embeddings`, `/v1/models`."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from docarray import Document, DocumentArray
from fastapi import FastAPI, Request, Response
from jina.proto import jina_pb2
from jina.types.request.data import DataRequest

from finetuner.excepts import ConfigError, DataError, NotFoundError, unknown_name
from finetuner.server.errors import http_status
from finetuner.server.http_calls import check_content_type, check_values, dump, in_thread, send
from finetuner.server.http_door import Door, call_of
from finetuner.server.http_errors import openai_error, set_retry_after
from finetuner.server.json_documents import check_sendable
from finetuner.server.limits import Limits

DEFAULT_MODEL = 'default'
_KEYS = ('model', 'input', 'encoding_format', 'dimensions', 'user')
_FORMATS = ('float', 'base64')
_RESULTS = '__results__'
_ERROR_TAG = 'finetuner_error'
_TAKEN = (
    'it takes a text, a picture as a data URL (data:image/png;base64,...), '
    '{"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": <data URL>}} or '
    '{"image": <data URL or base64>}'
)


def add_openai(app: FastAPI, door: Door) -> None:
    """Add the routes.

    Args:
        app: to add them to.
        door: of the gateway.
    """

    async def embeddings(request: Request) -> Response:
        check_content_type(request)
        with call_of(request, door) as call:
            raw = await request.body()
            asked = await in_thread(len(raw), read_embeddings, raw, door.limits)
            del raw
            answer = await send(door, call, request, '/encode', asked.docs, asked.parameters)
            refusal = _refusal(answer, asked)
            if refusal is not None:
                set_retry_after(refusal, call.retry_after)
                return refusal
            return await in_thread(answer.nbytes, _write_embeddings, answer, asked)

    async def models(request: Request) -> Response:
        listed = await _models(request, door)
        return Response(dump({'object': 'list', 'data': listed}), media_type='application/json')

    async def model(request: Request) -> Response:
        wanted = request.path_params['name']
        for one in await _models(request, door):
            if one['id'] == wanted:
                return Response(dump(one), media_type='application/json')
        return openai_error(f'no model {wanted!r} is served', 404, 'model', 'model_not_found')

    app.add_route('/v1/embeddings', embeddings, methods=['POST'], include_in_schema=False)
    app.add_route('/v1/models', models, methods=['GET'], include_in_schema=False)
    app.add_route('/v1/models/{name:path}', model, methods=['GET'], include_in_schema=False)


@dataclass(frozen=True)
class EmbeddingsRequest:
    """The body of a request for embeddings, read.

    Attributes:
        docs: to embed.
        parameters: of `/encode`.
        model: as it was asked for.
        as_base64: whether embeddings are wanted as base64 of little-endian float32.
    """

    docs: DocumentArray
    parameters: dict[str, Any]
    model: str
    as_base64: bool


def read_embeddings(raw: bytes, limits: Limits) -> EmbeddingsRequest:
    """Read the body of a request for embeddings.

    Args:
        raw: JSON.
        limits: of requests.

    Raises:
        ConfigError: the body is not as OpenAI's clients send it.
        DataError: an input cannot be taken; the message names its index.
        TooLargeError: there are too many inputs.
    """
    check_values(raw)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'the body is not JSON: {error}') from error
    if not isinstance(body, dict):
        raise ConfigError('the body is not a JSON object such as {"input": "a text"}')
    for key in body:
        if key not in _KEYS:
            raise ConfigError(unknown_name('key of the body', key, _KEYS))
    model = body.get('model') or DEFAULT_MODEL
    if not isinstance(model, str):
        raise ConfigError(f'`model` is {str(model)[:60]!r}: it takes the name of a model')
    check_sendable(model, '`model`', ConfigError)
    wanted = body.get('encoding_format') or 'float'
    if wanted not in _FORMATS:
        raise ConfigError(unknown_name('encoding_format', wanted, _FORMATS))
    # one input that cannot be read must not cost the reasons of the others
    parameters: dict[str, Any] = {'on_error': 'mark'}
    if model != DEFAULT_MODEL:
        parameters['artifact'] = model
    dimensions = body.get('dimensions')
    if dimensions is not None:
        if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1:
            raise ConfigError(
                f'`dimensions` is {str(dimensions)[:60]!r}: it takes a whole number of 1 or more'
            )
        check_sendable(dimensions, '`dimensions`', ConfigError)
        parameters['output_dim'] = dimensions
    docs = DocumentArray(_read_inputs(body.get('input'), limits))
    return EmbeddingsRequest(docs, parameters, model, wanted == 'base64')


def _read_inputs(given: Any, limits: Limits) -> list[Document]:
    if isinstance(given, (str, Mapping)):
        given = [given]
    if not isinstance(given, list):
        raise ConfigError('`input` is missing or neither a text nor a list: ' + _TAKEN)
    if not given:
        raise ConfigError('`input` is an empty list: ' + _TAKEN)
    if all(isinstance(item, int) for item in given):
        raise _no_token_ids()
    limits.check_documents(len(given))
    return [_read_input(item, i) for i, item in enumerate(given)]


def _read_input(item: Any, index: int) -> Document:
    if isinstance(item, list) and all(isinstance(part, int) for part in item):
        raise _no_token_ids()
    if isinstance(item, Mapping):
        return _read_part(item, index)
    if not isinstance(item, str):
        raise DataError(f'input {index} is {str(item)[:60]!r}: {_TAKEN}')
    # a text may well begin with "data:"
    if item.startswith('data:image/'):
        return _read_picture(item, index)
    return _read_text(item, index)


def _read_part(item: Mapping[str, Any], index: int) -> Document:
    """A part as chat messages have it, or as other servers of embeddings do."""
    kind = item.get('type')
    named = {key: value for key, value in item.items() if key != 'type'}
    if len(named) != 1 or kind not in (None, 'text', 'image', 'image_url'):
        raise DataError(f'input {index} has the keys {sorted(map(str, item))}: {_TAKEN}')
    key, value = next(iter(named.items()))
    if key == 'image_url' and isinstance(value, Mapping):
        value = value.get('url')
    if not isinstance(value, str) or key not in ('text', 'image', 'image_url'):
        raise DataError(f'input {index} holds {str(key)[:60]!r}: {_TAKEN}')
    return _read_text(value, index) if key == 'text' else _read_picture(value, index)


def _read_text(text: str, index: int) -> Document:
    if not text:
        raise DataError(f'input {index} is empty')
    check_sendable(text, f'input {index}', DataError)
    return Document(text=text)


def _read_picture(text: str, index: int) -> Document:
    content = text
    if text.startswith('data:'):
        head, comma, content = text.partition(',')
        if not comma or not head.startswith('data:image/') or not head.endswith(';base64'):
            raise DataError(
                f'input {index} is a data URL that begins with {head[:60]!r}: taken are pictures, '
                'data:image/<format>;base64,<content>'
            )
    elif '://' in text[:20]:
        raise DataError(
            f'input {index} is an address: this server opens none; send the picture itself as '
            'data:image/<format>;base64,<content>'
        )
    try:
        blob = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f'input {index} is not base64: {error}') from error
    if not blob:
        raise DataError(f'input {index} is empty')
    return Document(blob=blob)


def _no_token_ids() -> ConfigError:
    return ConfigError(
        '`input` holds token ids: those of OpenAI mean nothing to the models here; send the text '
        'itself (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))'
    )


def _refusal(answer: DataRequest, asked: EmbeddingsRequest) -> Response | None:
    """The error that an answer holds, if it does."""
    status = answer.header.status
    if status.code != jina_pb2.StatusProto.ERROR:
        return None
    name, message = status.exception.name, status.description
    no_model = name == NotFoundError.__name__ or message.startswith('unknown artifact')
    if no_model and asked.model != DEFAULT_MODEL:
        return openai_error(message, 404, 'model', 'model_not_found')
    param = 'input' if name in ('DataError', 'ContentError', 'PictureError') else None
    return openai_error(message, http_status(name) or 500, param)


def _write_embeddings(answer: DataRequest, asked: EmbeddingsRequest) -> Response:
    docs = answer.data.docs
    data = []
    for index, doc in enumerate(docs):
        if _ERROR_TAG in doc.tags or doc.embedding is None:
            reason = doc.tags.get(_ERROR_TAG, 'it has no embedding')
            return openai_error(f'input {index}: {reason}', 400, 'input', 'invalid_input')
        vector = np.ascontiguousarray(doc.embedding, dtype='<f4').reshape(-1)
        written = base64.b64encode(vector.tobytes()).decode() if asked.as_base64 else vector
        data.append({'object': 'embedding', 'index': index, 'embedding': written})
    model, tokens = _told(answer)
    body = {
        'object': 'list',
        'data': data,
        'model': model or asked.model,
        'usage': {'prompt_tokens': tokens, 'total_tokens': tokens},
    }
    return Response(dump(body), media_type='application/json')


def _told(answer: DataRequest) -> tuple[str | None, int]:
    """Which model answered and how many tokens it read, as far as the encoder tells."""
    results = answer.parameters.get(_RESULTS) or {}
    for told in results.values():
        if isinstance(told, Mapping) and ('artifact' in told or 'tokens' in told):
            return told.get('artifact'), int(told.get('tokens') or 0)
    return None, 0


async def _models(request: Request, door: Door) -> list[dict[str, Any]]:
    """The served model, under `default` and its own name, and what else `/info` tells of."""
    with call_of(request, door) as call:
        answer = await send(door, call, request, '/info', DocumentArray(), {})
    status = answer.header.status
    if status.code == jina_pb2.StatusProto.ERROR:
        raise NotFoundError(status.description)
    names = [DEFAULT_MODEL]
    for doc in answer.data.docs:
        more = doc.tags.get('models') or ()
        names += [name for name in (doc.tags.get('artifact'), *more) if isinstance(name, str)]
    return [
        {'id': name, 'object': 'model', 'created': 0, 'owned_by': 'finetuner'}
        for name in dict.fromkeys(names)
    ]
