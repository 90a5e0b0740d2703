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
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import BinaryIO

from docarray import Document, DocumentArray

from finetuner.data.stored.protobuf import decode_record, encode_record
from finetuner.excepts import DataError

HEADER_BYTES = 9
LENGTH_BYTES = 4

_VERSION = b'\x01'
_HASH_BLOCK_BYTES = 1 << 20


def save_documents(docs: Iterable[Document], path: str | Path) -> str:
    """Write Documents to a file: complete and on disk under its name, or not there at all.

    Args:
        docs: any Documents, an iterator of them too; a blob that is an ndarray is written as
            `tensor`, numpy numbers in tags as plain ones.
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
        with unfinished.open('x+b') as file:
            digest = write_documents(docs, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return digest


def write_documents(docs: Iterable[Document], file: BinaryIO) -> str:
    """Write Documents to an open binary file, one at a time; see `save_documents`.

    Args:
        docs: any Documents.
        file: where `docs` has no length, it must also be seekable and readable.

    Returns:
        The sha256 of what was written, in hex.
    """
    if not isinstance(docs, Sized):
        start = file.tell()
        stream_documents(docs, file)
        file.seek(start)
        return _hash_to_end(file)
    digest = hashlib.sha256()
    for part in _parts(docs, len(docs)):
        digest.update(part)
        file.write(part)
    return digest.hexdigest()


def stream_documents(docs: Iterable[Document], file: BinaryIO) -> int:
    """Write Documents whose number shows only at their end to an open, seekable binary file.

    Returns:
        How many there were.
    """
    start = file.tell()
    file.write(_header(0))
    num_docs = 0
    for position, doc in enumerate(docs):
        file.writelines(_record_parts(doc, position))
        num_docs += 1
    end = file.tell()
    file.seek(start)
    file.write(_header(num_docs))
    file.seek(end)
    return num_docs


def documents_hash(docs: Sequence[Document]) -> str:
    """Return the sha256 that `save_documents` would return, without writing anything."""
    digest = hashlib.sha256()
    for part in _parts(docs, len(docs)):
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


def read_header(header: bytes, num_bytes: int, name: str) -> int:
    """Return how many Documents a stream says it has.

    Args:
        header: its first 9 bytes, or fewer where there are no more.
        num_bytes: of the whole stream.
        name: what errors call it.

    Raises:
        DataError: this is no header, or promises more than can follow.
    """
    num_docs = int.from_bytes(header[1:], 'big')
    left = num_bytes - HEADER_BYTES
    if len(header) < HEADER_BYTES or header[:1] != _VERSION:
        raise not_documents(name, 'its first bytes are not those of a stream of Documents', header)
    if num_docs * LENGTH_BYTES > left:
        raise not_documents(name, f'it says {num_docs} Documents but {left} bytes follow', header)
    return num_docs


def cut_short(name: str, position: int, num_docs: int) -> DataError:
    """Say that a stream ends within a Document."""
    return not_documents(
        name, f'it ends within Document {position} of {num_docs}: it was cut short'
    )


def bytes_follow(name: str, num_bytes: int) -> DataError:
    """Say that a stream goes on after its last Document."""
    return not_documents(name, f'{num_bytes} bytes follow its last Document')


def not_documents(name: str, reason: str, header: bytes = b'') -> DataError:
    """Say that a file holds no Documents, why, and how to write one that does."""
    hint = ''
    if header[:1] == b'\x80':
        hint = ' It looks like pickle, which runs what it holds and is never read.'
    return DataError(
        f'{name!r} holds no Documents: {reason}.{hint} Write it with `save_documents` or '
        "`docs.save_binary(path, protocol='protobuf')`"
    )


def _header(num_docs: int) -> bytes:
    return _VERSION + num_docs.to_bytes(HEADER_BYTES - 1, 'big')


def _parts(docs: Iterable[Document], num_docs: int) -> Iterator[bytes]:
    yield _header(num_docs)
    found = 0
    for position, doc in enumerate(docs):
        yield from _record_parts(doc, position)
        found += 1
    if found != num_docs:
        raise DataError(
            f'the Documents were said to be {num_docs} and were {found}: do not change them '
            'while they are written'
        )


def _record_parts(doc: Document, position: int) -> tuple[bytes, bytes]:
    record = encode_record(doc, position)
    return len(record).to_bytes(LENGTH_BYTES, 'big'), record


def _hash_to_end(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(_HASH_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _read_stream(file: BinaryIO, name: str) -> Iterator[Document]:
    start = file.tell()
    left = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    num_docs = read_header(file.read(HEADER_BYTES), left, name)
    left -= HEADER_BYTES
    for position in range(num_docs):
        length = int.from_bytes(file.read(LENGTH_BYTES), 'big')
        left -= LENGTH_BYTES + length
        if left < 0:
            raise cut_short(name, position, num_docs)
        yield decode_record(file.read(length), position, repr(name))
    if left:
        raise bytes_follow(name, left)
