"""Building the arguments of `client.post` for /fit and /data, so that one post is one run.

Jina's client cuts what it posts into requests of 100 Documents, and the server cannot see which
is the last; these helpers say how many there are in all and which belong together.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetuner.excepts import ConfigError, DataError

if TYPE_CHECKING:
    from docarray import Document, DocumentArray

# a request stays well below gRPC's 2 GB, and the next is cut while the last one travels
_REQUEST_BYTES = 16 * 2**20


def fit_request(
    docs: DocumentArray | str, parameters: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of `client.post` that start one run on these Documents.

    `client.post(**fit_request(train_data, {'model': 'efficientnet-lite0', 'epochs': 5}))` gives
    one Document whose tags hold run, experiment, status and artifact_id.

    Args:
        docs: labelled Documents (local files are read into their blobs), or the name of data
            pushed with `data_request`.
        parameters: arguments of `finetuner.fit`, and `wait: True` to be answered at the end.

    Returns:
        `on`, `inputs`, `parameters`, `request_size` and `prefetch`.

    Raises:
        ConfigError: the parameters name `total`, `upload` or `train_data` themselves.
        DataError: there is no Document, or a file cannot be read.
    """
    given = _checked(parameters, ('total', 'upload', 'train_data'))
    if isinstance(docs, str):
        return {'on': '/fit', 'parameters': {**given, 'train_data': docs}}
    return _upload('/fit', docs, given)


def data_request(name: str, docs: DocumentArray) -> dict[str, Any]:
    """The arguments of `client.post` that keep these Documents on the server under a name.

    Args:
        name: what `fit` takes as `train_data`, `eval_data`, `query_data` or `index_data`.
        docs: the Documents; local files are read into their blobs.

    Returns:
        `on`, `inputs`, `parameters`, `request_size` and `prefetch`.

    Raises:
        DataError: there is no Document, or a file cannot be read.
    """
    return _upload('/data', docs, {'name': name})


def _checked(parameters: Mapping[str, Any] | None, ours: tuple[str, ...]) -> dict[str, Any]:
    given = dict(parameters or {})
    taken = [name for name in ours if name in given]
    if taken:
        raise ConfigError(f'{", ".join(taken)} is set here: leave it out of the parameters')
    return given


def _upload(endpoint: str, docs: DocumentArray, parameters: dict[str, Any]) -> dict[str, Any]:
    from docarray import DocumentArray

    from finetuner.data.contents import load_contents

    if not len(docs):
        raise DataError('there is no Document to send')
    loaded = load_contents(DocumentArray(docs))
    largest = max(_size(doc) for doc in loaded)
    return {
        'on': endpoint,
        'inputs': loaded,
        'parameters': {**parameters, 'total': len(loaded), 'upload': uuid.uuid4().hex},
        'request_size': max(1, min(1000, _REQUEST_BYTES // max(1, largest))),
        # one request at a time keeps the Documents in order: the same data, the same run
        'prefetch': 1,
    }


def _size(doc: Document) -> int:
    """Bytes of a Document's content, and of those in it."""
    from finetuner.data.contents import content_of, nested_documents

    content = content_of(doc)
    own = len(content) if isinstance(content, (str, bytes)) else getattr(content, 'nbytes', 0)
    parts = [*nested_documents(doc, 'chunks'), *nested_documents(doc, 'matches')]
    return own + sum(_size(part) for part in parts)
