"""The tables in which docarray's SQLite storage keeps Documents: found, opened and scanned."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetuner.excepts import DataError, unknown_name

_COLUMNS = {'doc_id', 'serialized_value', 'item_order'}
_ROWS_SCANNED_AT_ONCE = 4096
_SUBINDEX = 'subindex'  # docarray keeps those of table t in tables named tsubindex...


def connect_read_only(path: str) -> sqlite3.Connection:
    """Open a database to read only; in a folder that cannot be written to as well.

    Args:
        path: of the file, absolute.

    Raises:
        sqlite3.Error: it cannot be opened, or is no database.
    """
    address = f'{Path(path).as_uri()}?mode=ro'
    try:
        return _checked_connection(address)
    except sqlite3.OperationalError:
        # docarray's databases keep a write-ahead log, for which even a reader makes files. Where
        # it cannot, nobody else writes either, and without a log the one file is all there is.
        folder_is_open = os.access(os.path.dirname(path), os.W_OK)
        if folder_is_open or os.path.exists(f'{path}-wal'):
            raise
        return _checked_connection(f'{address}&immutable=1')


def _checked_connection(address: str) -> sqlite3.Connection:
    connection = sqlite3.connect(address, uri=True, check_same_thread=False, isolation_level=None)
    try:
        connection.execute('PRAGMA trusted_schema=OFF')
        connection.execute('SELECT 1 FROM sqlite_master').fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def file_state(path: str) -> tuple[tuple[int, ...] | None, ...]:
    """Return what changes whenever somebody writes to the database."""
    return _state_of(path), _state_of(f'{path}-wal')


def _state_of(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    # Readers make an empty log where there is none.
    return (status.st_ino, status.st_size, status.st_mtime_ns) if status.st_size else None


def choose_table(connection: sqlite3.Connection, table: str | None, path: str) -> str:
    """Find the table of Documents.

    Args:
        connection: to the database.
        table: its name, where the caller gave one.
        path: of the file, for errors.

    Returns:
        The name of the table; without one given, of the only one there is.

    Raises:
        DataError: there is no such table, or none, or several to choose from.
    """
    rows = connection.execute(
        'SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c '
        "WHERE m.type = 'table'"
    ).fetchall()
    columns: dict[str, set[str]] = {}
    for name, column in rows:
        columns.setdefault(name, set()).add(column)
    tables = sorted(name for name in columns if columns[name] >= _COLUMNS)
    if table is not None:
        if table not in tables:
            raise DataError(f'{path!r}: {unknown_name("table", table, tables)}')
        return table
    roots = [name for name in tables if not any(name.startswith(f'{t}{_SUBINDEX}') for t in tables)]
    if not roots:
        raise DataError(
            f'{path!r} has no table of Documents: write one with DocumentArray(docs, '
            "storage='sqlite', config={'connection': path, 'table_name': 'train', "
            "'serialize_config': {'protocol': 'protobuf'}})"
        )
    if len(roots) > 1:
        raise DataError(
            f'{path!r} has {len(roots)} tables of Documents: say which, {", ".join(roots)}'
        )
    return roots[0]


def scan_rows(connection: sqlite3.Connection, table: str) -> tuple[NDArray[np.int64], str]:
    """Return the keys of the rows in order, and a hash over them and the ids of the Documents."""
    cursor = connection.execute(f'SELECT item_order, doc_id FROM {quoted(table)} ORDER BY 1')
    keys = array('q')
    digest = hashlib.sha256()
    while rows := cursor.fetchmany(_ROWS_SCANNED_AT_ONCE):
        try:
            keys.extend([key for key, _ in rows])
        except TypeError as error:
            raise DataError(f'table {table!r}: `item_order` of a row is no number') from error
        digest.update('\n'.join([str(doc_id) for _, doc_id in rows]).encode())
    digest.update(keys)
    found = np.array(keys, dtype=np.int64)
    found.flags.writeable = False
    return found, digest.hexdigest()


def quoted(table: str) -> str:
    """Return the name of a table as SQL takes it."""
    return '"' + table.replace('"', '""') + '"'
