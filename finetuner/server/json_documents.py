"""Documents as JSON and back: what HTTP carries, checked at the door.

Jina's own reading ignores unknown fields, takes broken base64 for an empty blob and turns the
labels 0 and 1 into false and true; so HTTP requests are read here.
"""

from __future__ import annotations

import base64
import binascii
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from docarray import Document, DocumentArray
from docarray.math.ndarray import to_numpy_array

from finetuner.excepts import (
    ConfigError,
    DataError,
    FinetunerError,
    TooLargeError,
    unknown_name,
)
from finetuner.server.limits import Limits
from finetuner.server.wire import NESTED_A_DOCUMENT, too_many_nested

_TEXTS = ('id', 'text', 'uri', 'mime_type', 'modality', 'parent_id')
# those of protobuf: float and uint32
_REAL, _WHOLE = ('weight', 'offset'), ('granularity', 'adjacency')
_NUMBERS = (*_REAL, *_WHOLE)
_LARGEST_REAL, _LARGEST_WHOLE = 3.4028234e38, (1 << 32) - 1
_ARRAYS = ('tensor', 'embedding')
_NESTED = ('chunks', 'matches')
_FIELDS = (*_TEXTS, *_NUMBERS, *_ARRAYS, *_NESTED, 'blob', 'tags')
# protobuf reads no more than a hundred messages in one another, and an object of JSON takes three
_MAX_DEPTH = 20
_LARGEST = sys.float_info.max
_IGNORED = ('location', 'evaluations', 'scores', '_metadata')  # Jina's client sends them
_BODY_KEYS = (
    'data',
    'parameters',
    'exec_endpoint',
    'execEndpoint',
    'target_executor',
    'targetExecutor',
)
_BODY_IGNORED = ('header', 'routes', 'request_id')


def read_body(
    raw: bytes, limits: Limits | None = None
) -> tuple[DocumentArray, dict[str, Any], str | None, str | None]:
    """Read the JSON body of a request.

    Args:
        raw: an object with `data` (a list of Documents, or `{"docs": [...]}`), `parameters`,
            and for `/post` the `exec_endpoint`.
        limits: of requests; None for those that stand where nobody sets others.

    Returns:
        The Documents, the parameters, the endpoint and the Executor the body names (or None).

    Raises:
        ConfigError: the body is no such object.
        DataError: a Document cannot be read; the message names its position.
        TooLargeError: there are too many, or too many in others.
    """
    try:
        body = json.loads(raw or b'{}')
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'the body is not JSON: {error}') from error
    if not isinstance(body, dict):
        raise ConfigError('the body is not a JSON object such as {"data": [...]}')
    for key in body:
        if key not in _BODY_KEYS and key not in _BODY_IGNORED:
            raise ConfigError(unknown_name('key of the body', key, _BODY_KEYS))
    parameters = body.get('parameters') or {}
    if not isinstance(parameters, dict):
        raise ConfigError('`parameters` is not a JSON object')
    check_sendable(parameters, 'a parameter', ConfigError)
    endpoint = body.get('exec_endpoint') or body.get('execEndpoint')
    target = body.get('target_executor') or body.get('targetExecutor')
    for name, value in (('exec_endpoint', endpoint), ('target_executor', target)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f'`{name}` is {value!r}: it takes a text')
        check_sendable(value, f'`{name}`', ConfigError)
    docs = _read_documents(body.get('data'), limits or Limits())
    return docs, parameters, endpoint, target


def _read_documents(data: Any, limits: Limits) -> DocumentArray:
    if isinstance(data, dict):
        if set(data) != {'docs'}:
            raise ConfigError('`data` is a list of Documents, or an object with the key "docs"')
        data = data['docs']
    if data is None:
        return DocumentArray()
    if not isinstance(data, list):
        raise ConfigError('`data` is not a list of Documents')
    # two bytes make a Document, so they are counted before any is made
    limits.check_documents(len(data))
    nested = _Nested(limits)
    return DocumentArray([_read_document(item, str(i), nested) for i, item in enumerate(data)])


class _Nested:
    """Counts the Documents within others."""

    def __init__(self, limits: Limits) -> None:
        self._most = limits.max_documents
        self._left = NESTED_A_DOCUMENT * limits.max_documents

    def add(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise TooLargeError(too_many_nested(self._most))


def _read_document(item: Any, position: str, nested: _Nested) -> Document:
    if not isinstance(item, Mapping):
        raise DataError(
            f'document {position} is not a JSON object such as {{"text": "..."}} or '
            '{"blob": "<base64>"}'
        )
    fields: dict[str, Any] = {}
    for name, value in item.items():
        if name in _IGNORED or value is None:
            continue
        if name not in _FIELDS:
            raise DataError(f'document {position}: {unknown_name("field", name, _FIELDS)}')
        fields[name] = _read_field(name, value, position, nested)
    return Document(**fields)


def _read_field(name: str, value: Any, position: str, nested: _Nested) -> Any:
    if name == 'blob':
        return _read_blob(value, position)
    if name in _NESTED:
        if not isinstance(value, list):
            raise DataError(f'document {position}: {name!r} is not a list of Documents')
        if position.count(f'.{name}[') >= _MAX_DEPTH:
            raise DataError(f'document {position}: {name!r} nest more than {_MAX_DEPTH} deep')
        nested.add(len(value))
        return [
            _read_document(part, f'{position}.{name}[{i}]', nested) for i, part in enumerate(value)
        ]
    if name in _ARRAYS:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise DataError(f'document {position}: {name!r} is ragged: {error}') from error
        if array.dtype.kind not in 'fiub':
            raise DataError(f'document {position}: {name!r} holds more than numbers')
        return array
    expected: type | tuple[type, ...] = str
    if name == 'tags':
        expected = dict
    elif name in _NUMBERS:
        expected = (int, float)
    if not isinstance(value, expected):
        raise DataError(f'document {position}: {name!r} is {str(value)[:60]!r}, of a wrong type')
    if name in _NUMBERS:
        return _read_number(name, value, position)
    what = 'a tag' if name == 'tags' else repr(name)
    check_sendable(value, f'document {position}: {what}', DataError)
    return value


def _read_number(name: str, value: Any, position: str) -> float:
    is_whole = name in _WHOLE
    least, most = (0, _LARGEST_WHOLE) if is_whole else (-_LARGEST_REAL, _LARGEST_REAL)
    if least <= value <= most and (not is_whole or value == int(value)):
        return int(value) if is_whole else float(value)
    kind = 'a whole number' if is_whole else 'a number'
    raise DataError(
        f'document {position}: {name!r} is {str(value)[:60]}: it takes {kind} from {least:g} to '
        f'{most:g}'
    )


def check_sendable(value: Any, what: str, error: type[FinetunerError]) -> None:
    """Refuse what JSON can say, as Python reads it, and protobuf cannot.

    Args:
        value: read from JSON.
        what: it is, for the message.
        error: to raise.

    Raises:
        FinetunerError: of the kind `error`.
    """
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise error(f'{what} nests more than {_MAX_DEPTH} deep')
        if isinstance(one, dict):
            waiting += [(inner, depth + 1) for pair in one.items() for inner in pair]
        elif isinstance(one, list):
            waiting += [(inner, depth + 1) for inner in one]
        elif isinstance(one, str):
            _check_text(one, what, error)
        elif isinstance(one, int | float) and not -_LARGEST <= one <= _LARGEST:
            found = 'an integer beyond 1.8e308'
            if isinstance(one, float):
                found = 'NaN' if one != one else 'infinite'
            raise error(f'{what} is {found}: such numbers cannot be sent; mend or remove it')


def _check_text(text: str, what: str, error: type[FinetunerError]) -> None:
    try:
        text.encode('utf-8')
    except UnicodeEncodeError as refused:
        raise error(
            f'{what} holds half a character (a surrogate), which is no text: mend or remove it'
        ) from refused


def _read_blob(value: Any, position: str) -> bytes:
    mend = 'it takes standard base64, such as the command `base64` writes'
    if not isinstance(value, str):
        raise DataError(f'document {position}: blob is not a text: {mend}')
    try:
        return base64.b64decode(''.join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f'document {position}: blob is not base64 ({error}): {mend}') from error


def write_documents(docs: DocumentArray) -> list[dict[str, Any]]:
    """Turn Documents into values that orjson writes, empty fields left out.

    Args:
        docs: the Documents of an answer.

    Returns:
        One object a Document; arrays as of numpy, blobs as standard base64.
    """
    return [_write_document(doc) for doc in docs]


def _write_document(doc: Document) -> dict[str, Any]:
    written: dict[str, Any] = {'id': doc.id}
    for name in doc.non_empty_fields:
        value = getattr(doc, name)
        if name == 'blob':
            written[name] = base64.b64encode(value).decode()
        elif name in _NESTED:
            written[name] = write_documents(value)
        elif name in _ARRAYS:
            written[name] = to_numpy_array(value)
        elif name in _TEXTS or name in _NUMBERS or name == 'tags':
            written[name] = value
        elif name == 'scores':
            written[name] = {key: {'value': score.value} for key, score in value.items()}
    return written
