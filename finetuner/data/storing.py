"""Documents on disk: docarray's protobuf stream, written whole or not at all, never pickle.

The file is one byte 1, the number of Documents (8 bytes), then for each its length (4 bytes) and
its protobuf message, all big-endian. docarray reads it with
`DocumentArray.load_binary(path, protocol='protobuf')`. Its own reader is not used here: it picks
pickle by a file's name, and takes a file cut short for a good one.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from docarray import Document, DocumentArray
from docarray.proto.docarray_pb2 import DocumentProto
from google.protobuf.message import DecodeError, EncodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from finetuner.data.contents import portable_document
from finetuner.excepts import DataError

_VERSION = b'\x01'
_HEADER_BYTES = 9
_LENGTH_BYTES = 4


def save_documents(docs: Sequence[Document], path: str | Path) -> str:
    """Write Documents to a file: complete and on disk under its name, or not there at all.

    Args:
        docs: any Documents; a blob that is an ndarray is written as `tensor`, numpy numbers in
            tags as plain ones.
        path: of the file; its folder must exist. A file there is replaced.

    Returns:
        The sha256 of the file, 64 hex characters: the same for the same Documents (ids included).

    Raises:
        DataError: a Document cannot be written; its position is named.
        OSError: the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.part')
    try:
        with unfinished.open('xb') as file:
            digest = write_documents(docs, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return digest


def write_documents(docs: Sequence[Document], file: BinaryIO) -> str:
    """Write Documents to an open binary file, one at a time; see `save_documents`.

    Returns:
        The sha256 of what was written, in hex.
    """
    digest = hashlib.sha256()
    for part in _parts(docs):
        digest.update(part)
        file.write(part)
    return digest.hexdigest()


def documents_hash(docs: Sequence[Document]) -> str:
    """Return the sha256 that `save_documents` would return, without writing anything."""
    digest = hashlib.sha256()
    for part in _parts(docs):
        digest.update(part)
    return digest.hexdigest()


def load_documents(path: str | Path) -> DocumentArray:
    """Read Documents that `save_documents` wrote.

    Args:
        path: of the file; its name and ending mean nothing.

    Raises:
        DataError: the file is something else, cut short or damaged. Nothing in it is ever
            unpickled.
        OSError: there is no such file, or it cannot be read.
    """
    with Path(path).open('rb') as file:
        return read_documents(file, str(path))


def read_documents(file: BinaryIO, name: str = 'the file') -> DocumentArray:
    """Read Documents from an open, seekable binary file; see `load_documents`.

    Args:
        file: read from where it stands to its end.
        name: what errors call it.
    """
    return DocumentArray(_read_stream(file, name))


def _parts(docs: Sequence[Document]) -> Iterator[bytes]:
    yield _VERSION + len(docs).to_bytes(8, 'big')
    for position, doc in enumerate(docs):
        record = _encode(doc, position)
        yield len(record).to_bytes(_LENGTH_BYTES, 'big')
        yield record


def _encode(doc: Document, position: int) -> bytes:
    portable = portable_document(doc, f'Document {position}')
    try:
        # Deterministic, or the order of tags, and with it the hash, would change between runs.
        return portable.to_protobuf().SerializePartialToString(deterministic=True)
    except (ValueError, TypeError, AttributeError, RecursionError, EncodeError) as error:
        reason = ': '.join(str(part) for part in error.args)
        raise DataError(
            f'Document {position} cannot be stored: {reason}. Tags take numbers, str, bool, '
            'None, and lists and dicts of them; tensors take numpy or torch arrays'
        ) from error


def _read_stream(file: BinaryIO, name: str) -> Iterator[Document]:
    start = file.tell()
    left = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    header = file.read(_HEADER_BYTES)
    num_docs = int.from_bytes(header[1:], 'big')
    if len(header) < _HEADER_BYTES or header[:1] != _VERSION:
        raise _not_documents(name, 'its first bytes are not those of a stream of Documents', header)
    left -= _HEADER_BYTES
    if num_docs * _LENGTH_BYTES > left:
        raise _not_documents(name, f'it says {num_docs} Documents but {left} bytes follow', header)
    for position in range(num_docs):
        length = int.from_bytes(file.read(_LENGTH_BYTES), 'big')
        left -= _LENGTH_BYTES + length
        if left < 0:
            raise _not_documents(
                name, f'it ends within Document {position} of {num_docs}: it was cut short', header
            )
        yield _decode(file.read(length), position, name)
    if left:
        raise _not_documents(name, f'{left} bytes follow its last Document', header)


def _decode(record: bytes, position: int, name: str) -> Document:
    message = DocumentProto()
    try:
        message.ParseFromString(record)
        if not message.id or len(UnknownFieldSet(message)):
            raise DecodeError('its bytes are not a Document')
        return Document.from_protobuf(message)
    except (
        DecodeError,
        ValueError,
        TypeError,
        AttributeError,
        ImportError,
        MemoryError,
        RecursionError,
    ) as error:
        raise DataError(
            f'cannot read Document {position} of {name!r}: {error}. Expected is what '
            "`save_documents` or docarray's `save_binary(protocol='protobuf')` writes"
        ) from error


def _not_documents(name: str, reason: str, header: bytes) -> DataError:
    hint = ''
    if header[:1] == b'\x80':
        hint = ' It looks like pickle, which runs what it holds and is never read.'
    return DataError(
        f'{name!r} holds no Documents: {reason}.{hint} Write it with `save_documents` or '
        "`docs.save_binary(path, protocol='protobuf')`"
    )
