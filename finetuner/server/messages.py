"""What Jina does with messages, mended: what they may not hold is refused, and counting them is free.

A request may carry its Documents as `docs_bytes` in place of messages, and Jina reads those with
docarray's default, which is pickle: whoever reaches the gRPC port could run any code in the Executor.
No client of Jina 3.34 sends them. Arrays that say a size and hold nothing would be filled with zeros.

Jina counts the bytes of all messages in two environment variables, which nothing reads. The C library
keeps every value that such a variable ever had: some 330 bytes for each request, without end.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from docarray import DocumentArray
from jina.proto import serializer
from jina.types.request.data import DataRequest

from finetuner.excepts import DataError

_content: Any = DataRequest._DataContent
_jinas_own: Any = _content.docs


def _read_documents(content: Any) -> DocumentArray:
    if content._content.WhichOneof('documents') == 'docs_bytes':
        raise DataError(
            'the request carries its Documents as bytes in `docs_bytes`, which would be unpickled: '
            'send them as messages in `docs`, as every client of Jina does'
        )
    for doc in content._content.docs.docs:
        _check_arrays(doc)
    return _jinas_own.fget(content)


def _check_arrays(doc: Any) -> None:
    """Refuse arrays without values, which docarray fills with zeros: a few bytes would be gigabytes."""
    for name in ('tensor', 'embedding'):
        if doc.HasField(name):
            array = getattr(doc, name).dense
            if not array.buffer and array.shape and all(array.shape):
                raise DataError(
                    f'`{name}` of Document {doc.id!r} has the shape {list(array.shape)} and no values'
                )
    for part in (*doc.chunks, *doc.matches):
        _check_arrays(part)


# importing this module is what refuses them: there is no other place that all requests pass
_content.docs = property(_read_documents, _jinas_own.fset, doc=_jinas_own.__doc__)

# all that module takes from `os`; the counts go into a dict in place of the environment
_counting: Any = serializer
_counting.os = SimpleNamespace(environ={})
