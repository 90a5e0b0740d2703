"""Documents in docarray's SQLite storage, used in place: read-only, one row at a time."""

from __future__ import annotations

import lzma
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docarray import Document, DocumentArray
from docarray.helper import decompress_bytes

from finetuner.data.stored.lazy import LazyDocuments
from finetuner.data.stored.protobuf import decode_record
from finetuner.data.stored.sqlite_tables import (
    choose_table,
    connect_read_only,
    file_state,
    quoted,
    scan_rows,
)
from finetuner.excepts import ConfigError, DataError, unknown_name

_COMPRESSIONS = ('bz2', 'gzip', 'lz4', 'lzma', 'zlib')
_BLOCK_BYTES = 1 << 20
_ROWS_AT_FIRST = 16
_MOST_ROWS = 1024

# One for the process and held while it forks: a child must not find SQLite amid a read.
_LOCK = threading.RLock()
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )
# SQLite forbids to use, or even close, in a forked process what its parent opened.
_INHERITED: list[sqlite3.Connection] = []


class SQLiteDocuments(LazyDocuments):
    """The Documents of one table of docarray's SQLite storage, by their `item_order`.

    Threads take turns; each process has a connection of its own. In memory stays one int64 a
    Document. Rows that were removed or put elsewhere since the table was opened are noticed; a
    Document that was set anew under its id is read as it is now. The object pickles by the path.
    """

    def __init__(
        self,
        path: str | Path,
        table: str | None = None,
        protocol: str = 'protobuf',
        compress: str | None = None,
    ) -> None:
        """Open a table and note the order of its rows; only the first is decoded yet.

        Args:
            path: of the database file; it is never written to.
            table: its `table_name`; may be left out when the file has one only.
            protocol: of docarray's `serialize_config`: `'protobuf'`. docarray's own default is
                pickle, which runs what it holds and is never read from a file; see `of`.
            compress: of docarray's `serialize_config`, where it was given.

        Raises:
            ConfigError: `protocol` or `compress` is none that is read.
            DataError: the file is no such database, the table is not there or its first row is
                no Document.
            OSError: there is no such file.
        """
        if protocol == 'pickle':
            raise _pickled(f'table {table!r} of {str(path)!r}')
        if protocol != 'protobuf':
            raise ConfigError(unknown_name('protocol', protocol, ('protobuf',)))
        self._open(os.path.abspath(path), table, {'protocol': protocol, 'compress': compress})

    @classmethod
    def of(cls, docs: DocumentArray) -> SQLiteDocuments:
        """Read what a live DocumentArray holds in its SQLite storage.

        Its own `serialize_config` is used, pickle included: whoever opened the array in this
        process has decided to trust the file. What was written before this call is seen.

        Args:
            docs: with `storage='sqlite'`; any `list_like`. Subindices are left aside.

        Raises:
            DataError: its storage is another, or a database in memory, which no other process
                can open.
        """
        from docarray.array.sqlite import DocumentArraySqlite

        if not isinstance(docs, DocumentArraySqlite):
            raise DataError(
                f'{type(docs).__name__} has no SQLite storage: such arrays are made with '
                "DocumentArray(storage='sqlite', config={'connection': 'a.db'})"
            )
        with _LOCK:
            databases = docs._connection.execute('PRAGMA database_list').fetchall()
        path = next((file for _, name, file in databases if name == 'main'), '')
        if not path:
            raise DataError(
                'the SQLite storage of this DocumentArray is in memory, where loader workers '
                "cannot read it: give config={'connection': 'a.db'}, or DocumentArray(docs), which "
                'keeps the Documents themselves in memory'
            )
        if docs._connection.in_transaction:
            raise DataError(
                f'the DocumentArray in {path!r} has changes that are not committed: finish them '
                'first'
            )
        opened = cls.__new__(cls)
        opened._open(path, docs._config.table_name, dict(docs._config.serialize_config))
        return opened

    def _open(self, path: str, table: str | None, serialize_config: dict[str, Any]) -> None:
        self._path = path
        self._protocol = serialize_config.get('protocol', 'pickle')
        self._compress = serialize_config.get('compress')
        if self._compress is not None and self._compress not in _COMPRESSIONS:
            raise ConfigError(unknown_name('compress', self._compress, _COMPRESSIONS))
        if not os.path.isfile(path):
            raise FileNotFoundError(f'there is no file {path!r}')
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        self._closed = False
        self._source = repr(path)
        try:
            self._find_rows(table)
        except BaseException:
            self.close()
            raise

    def _find_rows(self, table: str | None) -> None:
        with _LOCK:
            self._state = file_state(self._path)
            try:
                self._table = choose_table(self._connected(), table, self._path)
                self._source = f'table {self._table!r} of {self._path!r}'
                self._keys, self._fingerprint = scan_rows(self._connected(), self._table)
            except sqlite3.Error as error:
                raise self._unreadable(error) from error
        if len(self) and self._protocol == 'protobuf':
            self._read(0)

    @property
    def path(self) -> str:
        """The absolute path of the database file."""
        return self._path

    @property
    def table(self) -> str:
        """The name of the table."""
        return self._table

    @property
    def nbytes(self) -> int:
        """Bytes of memory that grow with the number of Documents."""
        return self._keys.nbytes

    def __len__(self) -> int:
        """Return how many Documents the table had when it was opened."""
        return len(self._keys)

    def close(self) -> None:
        """Close the connection of this process; reading afterwards is an error."""
        with _LOCK:
            self._closed = True
            self._disconnect()

    def __enter__(self) -> SQLiteDocuments:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the path, and what shows that the rows are still the same."""
        return {
            'path': self._path,
            'table': self._table,
            'serialize_config': {'protocol': self._protocol, 'compress': self._compress},
            'fingerprint': self._fingerprint,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the table again."""
        self._open(state['path'], state['table'], state['serialize_config'])
        if self._fingerprint != state['fingerprint']:
            self.close()
            raise self._changed()

    def _read(self, position: int) -> Document:
        return self._decode(self._records(position, position + 1)[0], position)

    def _read_run(self, start: int, stop: int) -> Iterator[Document]:
        num_rows = _ROWS_AT_FIRST
        while start < stop:
            end = min(start + num_rows, stop)
            records = self._records(start, end)
            for number, record in enumerate(records):
                yield self._decode(record, start + number)
            # As many as make a block if the next ones are as long as these.
            mean_bytes = sum(map(len, records)) // len(records) + 1
            num_rows = max(1, min(_BLOCK_BYTES // mean_bytes, _MOST_ROWS))
            start = end

    def _records(self, start: int, stop: int) -> list[bytes]:
        keys = self._keys[start:stop].tolist()
        with _LOCK:
            if self._closed:
                raise DataError(f'{self._source} was closed: its Documents can be read no more')
            try:
                rows = (
                    self._connected()
                    .execute(
                        f'SELECT item_order, serialized_value FROM {quoted(self._table)} '
                        'WHERE item_order BETWEEN ? AND ? ORDER BY item_order',
                        (keys[0], keys[-1]),
                    )
                    .fetchall()
                )
                # After reading, so that a change in between is noticed too.
                if file_state(self._path) != self._state:
                    self._check_again()
            except sqlite3.Error as error:
                raise self._unreadable(error) from error
        if [key for key, _ in rows] != keys:
            raise self._changed()
        for number, (_, record) in enumerate(rows):
            if not isinstance(record, bytes):
                raise DataError(
                    f'Document {start + number} of {self._source} is of type '
                    f'{type(record).__name__}, and docarray stores bytes'
                )
        return [record for _, record in rows]

    def _check_again(self) -> None:
        """Find out whether a change of the file was one of these rows."""
        self._disconnect()
        state = file_state(self._path)
        if scan_rows(self._connected(), self._table)[1] != self._fingerprint:
            raise self._changed()
        self._state = state

    def _decode(self, record: bytes, position: int) -> Document:
        if self._compress is not None:
            record = self._decompress(record, position)
        if self._protocol == 'pickle':
            return self._unpickle(record, position)
        if record[:1] == b'\x80':
            raise _pickled(self._source)
        return decode_record(record, position, self._source)

    def _decompress(self, record: bytes, position: int) -> bytes:
        try:
            return decompress_bytes(record, algorithm=self._compress)
        except (
            OSError,
            EOFError,
            ValueError,
            RuntimeError,
            ImportError,
            zlib.error,
            lzma.LZMAError,
        ) as error:
            raise DataError(
                f'Document {position} of {self._source} cannot be decompressed as '
                f'{self._compress}: {error}'
            ) from error

    def _unpickle(self, record: bytes, position: int) -> Document:
        """Read a row of an array that its owner opened with pickle; never come to from a path."""
        try:
            doc = Document.from_bytes(record, protocol='pickle')
        except Exception as error:
            # Unpickling may raise anything.
            raise DataError(
                f'cannot unpickle Document {position} of {self._source}: '
                f'{type(error).__name__}: {error}'
            ) from error
        if not isinstance(doc, Document):
            raise DataError(
                f'Document {position} of {self._source} is a pickled {type(doc).__name__}'
            )
        return doc

    def _connected(self) -> sqlite3.Connection:
        if self._process != os.getpid():
            if self._connection is not None:
                _INHERITED.append(self._connection)
            self._connection, self._process = None, os.getpid()
        if self._connection is None:
            self._connection = connect_read_only(self._path)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None and self._process == os.getpid():
            self._connection.close()
            self._connection = None

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(
            f'cannot read {self._source}: {error}. Expected is the SQLite storage of a docarray '
            'DocumentArray'
        )

    def _changed(self) -> DataError:
        return DataError(
            f'the rows of {self._source} were changed since it was opened: open it again, and '
            'leave it as it is while it is in use'
        )


def _pickled(source: str) -> DataError:
    return DataError(
        f'{source} holds pickled Documents, as docarray writes them unless told otherwise. Pickle '
        'runs what it holds and is never read from a file: write the array again with '
        "config={..., 'serialize_config': {'protocol': 'protobuf'}}"
    )
