"""Deleting what a dataset needs no more: values of functions as they were, and files of nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, select
from sqlalchemy.exc import DatabaseError

from finetuner.columns.inspecting import DatasetFile, error_of
from finetuner.columns.locking import pruning
from finetuner.columns.states import is_file_type
from finetuner.columns.tables import FILES, CommonTables, values_table
from finetuner.excepts import ForbiddenError, NotFoundError
from finetuner.storage.database import Database, open_file
from finetuner.storage.files import FileStore

_USERS = '.used-by'


@dataclass(frozen=True)
class Pruned:
    """What was deleted.

    Attributes:
        num_values: derived values.
        num_files: files in the data directory.
        num_bytes: of these files.
        shared_with: other SQLite files whose datasets have the same data directory: because of them no
            file was deleted.
    """

    num_values: int
    num_files: int
    num_bytes: int
    shared_with: tuple[str, ...] = ()


def prune(database: Database, sql_file: Path, dataset: str, files: FileStore) -> Pruned:
    """Delete what is stale of a dataset, and what removed derived columns left.

    Fields that were removed stay: they are data.

    Args:
        database: the SQLite file, opened.
        sql_file: path of it.
        dataset: name of it.
        files: its data directory.

    Raises:
        ConflictError: rows are being added or computed.
    """
    tables = CommonTables()
    with pruning(sql_file):
        with database.session() as session:
            connection = session.connection()
            folders = {
                row.name
                for row in connection.execute(tables.columns.select())
                if is_file_type(row.type)
            }
            num_values = _prune_values(connection, tables, dataset)
            _forget_files(connection, dataset)
            known = {
                path
                for name in connection.execute(select(tables.datasets.c.name)).scalars().all()
                for (path,) in connection.exec_driver_sql(
                    f'SELECT path FROM "{values_table(name, FILES)}"'
                )
            }
        others = _other_users(files, sql_file)
        if others:
            return Pruned(num_values, 0, 0, tuple(others))
        # what is there and known to nobody: of the values above, of rows that are gone, and of
        # processes that were killed before they could commit
        num_files, num_bytes = 0, 0
        for key in _keys(files, sorted(folders)):
            if key not in known:
                num_bytes += files.size(key)
                num_files += 1
                files.delete(key)
        for path in files.list_unfinished() if files.is_local else []:
            path.unlink(missing_ok=True)
        return Pruned(num_values, num_files, num_bytes)


def prune_file(file: DatasetFile, dataset: str) -> Pruned:
    """Do so without the class: of each function the version stays that was asked for last.

    Args:
        file: that has the dataset.
        dataset: name of it.

    Raises:
        NotFoundError: there is no such dataset.
        ConflictError: rows are being added or computed, or the file is locked.
        ForbiddenError: the file, or its data directory, cannot be written to.
    """
    files = file.files(dataset)
    database = open_file(file.path)
    try:
        return prune(database, file.path, dataset, files)
    except DatabaseError as error:
        raise error_of(file.path, error) from error
    except OSError as error:
        raise ForbiddenError(f'{error.filename or file.path}: {error.strerror}') from error
    finally:
        database.close()


def note_user(files: FileStore, sql_file: Path) -> None:
    """Have a data directory say that a SQLite file has its files there."""
    key = _mark(sql_file)
    if not files.exists(key):
        files.write(key, [str(sql_file).encode()])


def _other_users(files: FileStore, sql_file: Path) -> list[str]:
    others = []
    for name in files.list_names(_USERS):
        key = f'{_USERS}/{name}'
        if key == _mark(sql_file):
            continue
        try:
            path = b''.join(files.read(key)).decode(errors='replace')
        except NotFoundError:
            continue
        if files.is_local and not Path(path).exists():
            # it was moved or deleted
            files.delete(key)
            continue
        others.append(path)
    return others


def _mark(sql_file: Path) -> str:
    return f'{_USERS}/{hashlib.sha256(str(sql_file).encode()).hexdigest()[:32]}'


def _prune_values(connection: Connection, tables: CommonTables, dataset: str) -> int:
    """Delete values of versions that are not those that were asked for last; returns how many."""
    num_values = 0
    there = set(inspect(connection).get_table_names())
    columns, versions, errors = tables.columns, tables.versions, tables.errors
    mine = columns.c.dataset == dataset
    rows = connection.execute(columns.select().where(mine, columns.c.kind.like('%derived'))).all()
    for row in rows:
        for is_file in (False, True):
            table = values_table(dataset, row.name, is_file)
            if table not in there:
                continue
            if row.kind.startswith('removed'):
                count = connection.exec_driver_sql(f'SELECT count(*) FROM "{table}"').scalar()
                _drop(connection, table)
            else:
                count = connection.exec_driver_sql(
                    f'DELETE FROM "{table}" WHERE version != ? '
                    f'OR row NOT IN (SELECT id FROM "{dataset}")',
                    (row.current or 0,),
                ).rowcount
            num_values += count or 0
        if row.kind.startswith('removed'):
            connection.execute(columns.delete().where(columns.c.id == row.id))
    current = select(columns.c.current).where(mine, columns.c.current.is_not(None))
    connection.execute(
        versions.delete().where(versions.c.dataset == dataset, versions.c.id.not_in(current))
    )
    of_nobody = errors.c.version.not_in(current)
    connection.execute(errors.delete().where(errors.c.dataset == dataset, of_nobody))
    connection.exec_driver_sql(
        f'DELETE FROM {errors.name} WHERE dataset = ? AND row NOT IN (SELECT id FROM "{dataset}")',
        (dataset,),
    )
    return num_values


def _drop(connection: Connection, table: str) -> None:
    sql = "SELECT name FROM sqlite_schema WHERE type = 'trigger' AND name IN (?, ?, ?)"
    names = tuple(f'{table}__{what}' for what in ('updated', 'deleted', 'replaced'))
    for name in connection.exec_driver_sql(sql, names).scalars().all():
        connection.exec_driver_sql(f'DROP TRIGGER "{name}"')
    connection.exec_driver_sql(f'DROP TABLE "{table}"')


def _forget_files(connection: Connection, dataset: str) -> None:
    """Delete rows of files that no row and no value names, in whichever table."""
    files = values_table(dataset, FILES)
    conditions = ''
    for table in inspect(connection).get_table_names():
        for key in inspect(connection).get_foreign_keys(table):
            if key['referred_table'] == files:
                column = key['constrained_columns'][0]
                conditions += f' AND id NOT IN (SELECT "{column}" FROM "{table}" WHERE "{column}" IS NOT NULL)'
    connection.exec_driver_sql(f'DELETE FROM "{files}" WHERE 1{conditions}')


def _keys(files: FileStore, folders: list[str]) -> Iterator[str]:
    """All that is in the folders of columns."""
    for folder in folders:
        for part in files.list_names(folder):
            for name in files.list_names(f'{folder}/{part}'):
                yield f'{folder}/{part}/{name}'
