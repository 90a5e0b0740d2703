"""What an index keeps on the disk: its Documents, their embeddings and its facts, in SQLite."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.excepts import ConfigError, DataError, ServerError

SCHEMA_VERSION = '1'
_BUSY_SECONDS = 30.0
_IDLE_READERS = 8
_ASKED_AT_ONCE = 500
_LOADED_AT_ONCE = 2048
_LARGEST = 2**1023  # what a float can hold, as all numbers do that come through protobuf

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    embedding BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    text TEXT NOT NULL,
    uri TEXT NOT NULL,
    tags TEXT NOT NULL
);
CREATE TABLE contents (
    key INTEGER PRIMARY KEY REFERENCES documents ON DELETE CASCADE,
    content BLOB NOT NULL
);
CREATE TABLE terms (
    term BLOB NOT NULL,
    key INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    PRIMARY KEY (term, key)
) WITHOUT ROWID;
CREATE INDEX terms_of_documents ON terms (key);
"""

Scalar = str | float | int | bool


@dataclass(frozen=True)
class Item:
    """What an index gives back of a Document.

    Attributes:
        id: any text but an empty one.
        text: of the Document.
        uri: of the Document; never opened here.
        tags: JSON values.
        content: anything else worth keeping, as bytes.
    """

    id: str
    text: str = ''
    uri: str = ''
    tags: Mapping[str, Any] = field(default_factory=dict)
    content: bytes | None = None


class Rows:
    """The database of one index. One thread writes at a time, any number read.

    A key stands for one embedding for ever: what replaces a Document gets a new, larger one.
    """

    def __init__(self, path: Path) -> None:
        """Open the database, or make it.

        Args:
            path: its file.

        Raises:
            ConfigError: it is damaged, no such database, or of a newer version.
        """
        self._path = path
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._writing = threading.Lock()
        try:
            # a private file: SQLite's own would be for everybody
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._writer = self._connect()
        except (sqlite3.Error, OSError) as error:
            raise self._unreadable(str(error)) from error
        try:
            self._prepare()
        except (sqlite3.Error, ServerError) as error:
            self.close()
            raise self._unreadable(str(error)) from error
        except ConfigError:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute('PRAGMA foreign_keys = ON')
            # what was answered is on the disk, not only in the system's memory
            connection.execute('PRAGMA synchronous = FULL')
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _prepare(self) -> None:
        self._writer.execute('PRAGMA journal_mode = WAL')
        with self._transaction() as connection:
            tables = connection.execute('SELECT count(*) FROM sqlite_master').fetchone()[0]
            if not tables:
                for statement in _SCHEMA.split(';\n'):
                    connection.execute(statement)
                self._set_facts(connection, {'version': SCHEMA_VERSION})
        version = self.facts().get('version')
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f'the index {self._path} is of version {version}, and this version of finetuner '
                f'reads {SCHEMA_VERSION}: upgrade finetuner, or give another directory'
            )
        found = self._writer.execute('PRAGMA quick_check(1)').fetchone()[0]
        if found != 'ok':
            raise self._unreadable(found)

    def close(self) -> None:
        """Close all connections; nothing may be asked afterwards."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()
        self._writer.close()

    def facts(self) -> dict[str, str]:
        """What is known of the index as a whole."""
        with self._reading() as connection:
            return dict(connection.execute('SELECT name, value FROM facts').fetchall())

    def set_facts(self, facts: Mapping[str, str]) -> None:
        """Note facts, in place of those of the same names."""
        with self._transaction() as connection:
            self._set_facts(connection, facts)

    def _set_facts(self, connection: sqlite3.Connection, facts: Mapping[str, str]) -> None:
        connection.executemany('INSERT OR REPLACE INTO facts VALUES (?, ?)', facts.items())

    def embeddings(self, dimension: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All keys in order and their embeddings, in blocks.

        Args:
            dimension: of each.

        Raises:
            ConfigError: an embedding is not what was written.
        """
        with self._reading() as connection:
            cursor = connection.execute(
                'SELECT key, id, embedding, checksum FROM documents ORDER BY key'
            )
            while rows := cursor.fetchmany(_LOADED_AT_ONCE):
                for _, id_, embedding, checksum in rows:
                    if len(embedding) != 4 * dimension or zlib.crc32(embedding) != checksum:
                        raise self._unreadable(f'the embedding of {id_[:100]!r} is damaged')
                values = np.frombuffer(b''.join(row[2] for row in rows), '<f4')
                keys = np.array([row[0] for row in rows], np.int64)
                yield keys, values.reshape(-1, dimension).astype(np.float32, copy=False)

    def replace(
        self,
        items: Sequence[Item],
        embeddings: np.ndarray,
        facts: Mapping[str, str],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Store Documents in place of those with the same ids, all or none.

        Args:
            items: each id once.
            embeddings: `[len(items), dimension]` float32.
            facts: to note with them.

        Returns:
            The keys of the new ones, ascending, and those of the old.

        Raises:
            DataError: tags are no JSON, or a text is no UTF-8.
        """
        keys, removed = [], []
        with self._transaction() as connection:
            self._set_facts(connection, facts)
            for item, embedding in zip(items, embeddings.astype('<f4', copy=False), strict=True):
                removed += _delete(connection, item.id)
                raw = embedding.tobytes()
                cursor = connection.execute(
                    'INSERT INTO documents (id, embedding, checksum, text, uri, tags) '
                    'VALUES (?, ?, ?, ?, ?, ?)',
                    (item.id, raw, zlib.crc32(raw), item.text, item.uri, _to_json(item)),
                )
                key = cursor.lastrowid
                keys.append(key)
                connection.executemany(
                    'INSERT INTO terms VALUES (?, ?)', [(term, key) for term in terms_of(item.tags)]
                )
                if item.content is not None:
                    connection.execute('INSERT INTO contents VALUES (?, ?)', (key, item.content))
        return np.array(keys, np.int64), np.array(removed, np.int64)

    def delete(self, ids: Iterable[str]) -> np.ndarray:
        """Delete Documents, all in one step.

        Args:
            ids: those that are not there are passed over.

        Returns:
            The keys of those that were there.
        """
        with self._transaction() as connection:
            removed = [key for each in ids for key in _delete(connection, each)]
        return np.array(removed, np.int64)

    def delete_all(self) -> None:
        """Delete all Documents."""
        with self._transaction() as connection:
            for table in ('contents', 'terms', 'documents'):
                connection.execute(f'DELETE FROM {table}')

    def ids_there(self, ids: Sequence[str]) -> int:
        """How many of these ids are stored."""
        with self._reading() as connection:
            return sum(
                connection.execute(
                    f'SELECT count(*) FROM documents WHERE id IN ({_marks(some)})', some
                ).fetchone()[0]
                for some in _portions(ids)
            )

    def read(self, keys: Sequence[int], with_contents: bool = False) -> dict[int, Item]:
        """The Documents of those keys that are stored.

        Args:
            keys: of embeddings.
            with_contents: whether contents are read too.
        """
        found: dict[int, Item] = {}
        content, join = (
            ('content', 'LEFT JOIN contents USING (key)') if with_contents else ('NULL', '')
        )
        with self._reading() as connection:
            for some in _portions(keys):
                for key, id_, text, uri, tags, bytes_ in connection.execute(
                    f'SELECT key, id, text, uri, tags, {content} FROM documents {join} '
                    f'WHERE key IN ({_marks(some)})',
                    some,
                ):
                    found[key] = Item(id_, text, uri, json.loads(tags), bytes_)
        return found

    def keys_where(self, where: Mapping[str, Scalar | Sequence[Scalar]]) -> np.ndarray:
        """Keys of Documents with such tags, ascending.

        Args:
            where: by tag the value it has, or those of which it has one; all must hold.

        Raises:
            ConfigError: a value is no text, number, true or false, nor a list of such.
        """
        keys: np.ndarray | None = None
        with self._reading() as connection:
            for name, allowed in where.items():
                values = allowed if isinstance(allowed, (list, tuple)) else [allowed]
                terms = sorted({_wanted_term(name, value) for value in values})
                rows = [
                    row[0]
                    for some in _portions(terms)
                    for row in connection.execute(
                        f'SELECT key FROM terms WHERE term IN ({_marks(some)})', some
                    )
                ]
                these = np.unique(np.array(rows, np.int64))
                keys = these if keys is None else np.intersect1d(keys, these, assume_unique=True)
        return np.empty(0, np.int64) if keys is None else keys

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write, all or nothing."""
        with self._writing:
            try:
                self._writer.execute('BEGIN IMMEDIATE')
                try:
                    yield self._writer
                    self._writer.execute('COMMIT')
                except BaseException:
                    # a disk that is full has rolled back already
                    if self._writer.in_transaction:
                        self._writer.execute('ROLLBACK')
                    raise
            except UnicodeEncodeError as error:
                raise DataError(
                    'an id, a text or a uri holds half a character (a surrogate), which is no text'
                ) from error
            except sqlite3.Error as error:
                raise ServerError(f'the index cannot be written: {error}') from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection nobody else uses meanwhile, to which the database stands still."""
        try:
            try:
                connection = self._idle.get_nowait()
            except queue.Empty:
                connection = self._connect()
            try:
                connection.execute('BEGIN')
                yield connection
                connection.execute('COMMIT')
            except BaseException:
                connection.close()
                raise
            if self._idle.qsize() < _IDLE_READERS:
                self._idle.put(connection)
            else:
                connection.close()
        except UnicodeEncodeError as error:
            raise DataError(
                'an id holds half a character (a surrogate), which is no text'
            ) from error
        except sqlite3.Error as error:
            raise ServerError(f'the index cannot be read: {error}') from error

    def _unreadable(self, reason: str) -> ConfigError:
        return ConfigError(
            f'the index {self._path} cannot be opened: {reason}. Put a copy of its directory in '
            'its place that was made while it was closed, or remove the directory and index the '
            'Documents again'
        )


def _delete(connection: sqlite3.Connection, id_: str) -> list[int]:
    rows = connection.execute('DELETE FROM documents WHERE id = ? RETURNING key', (id_,))
    return [row[0] for row in rows.fetchall()]


def _to_json(item: Item) -> str:
    try:
        return json.dumps(dict(item.tags), allow_nan=False, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f'the tags of {item.id[:100]!r} are no JSON: {error}') from error


def terms_of(tags: Mapping[str, Any]) -> set[bytes]:
    """What a filter can find a Document by: each tag with its value, or with each in its list."""
    return {
        term
        for name, value in tags.items()
        for each in (value if isinstance(value, (list, tuple)) else [value])
        if (term := _term(name, each)) is not None
    }


def _term(name: str, value: Any) -> bytes | None:
    """A short stand-in for a tag of any length; 1, 1.0 and true are one, as they are for Jina."""
    if isinstance(value, (bool, int, float)):
        if not abs(value) < _LARGEST:
            return None
        value = float(value) + 0.0  # -0.0 is 0 and is written otherwise
    elif not isinstance(value, str):
        return None
    return hashlib.blake2b(json.dumps([name, value]).encode(), digest_size=16).digest()


def _wanted_term(name: str, value: Any) -> bytes:
    term = _term(name, value)
    if term is None:
        raise ConfigError(
            f'filter: {name!r} is {value!r}: it takes a text, a number, true or false, or a list '
            'of such'
        )
    return term


def _portions(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """SQLite takes a limited number of values in one statement."""
    for start in range(0, len(values), _ASKED_AT_ONCE):
        yield values[start : start + _ASKED_AT_ONCE]


def _marks(values: Sequence[Any]) -> str:
    return ','.join('?' * len(values))
