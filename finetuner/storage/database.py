"""The SQL database: engine, sessions, and the migrations that bring its tables up to date.

SQLite (embedded, the default) and PostgreSQL. Tables are declared beside the feature they serve,
on `Base`; the statements that make and change them are in `migrations/`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    DateTime,
    Dialect,
    Engine,
    MetaData,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.types import TypeDecorator

from finetuner.excepts import ConfigError

# The newest file of migrations/versions; opening a database of this version runs no migration.
SCHEMA_VERSION = '0004'
BUSY_SECONDS = 30.0
_PAUSE_SECONDS = 0.3

_MIGRATIONS = Path(__file__).parent / 'migrations'
_POSTGRESQL = 'postgresql+psycopg'
_POSTGRESQL_LOCK = 0x66696E65  # any number that nobody else locks in this database
# Alembic keeps its context in module globals: one migration at a time in a process; and one making
# of a file.
_one_at_a_time = threading.Lock()


class Base(DeclarativeBase):
    """Base of all tables; constraints get fixed names, so that migrations can refer to them."""

    metadata = MetaData(
        naming_convention={
            'ix': 'ix_%(table_name)s_%(column_0_N_name)s',
            'uq': 'uq_%(table_name)s_%(column_0_N_name)s',
            'fk': 'fk_%(table_name)s_%(column_0_name)s',
            'pk': 'pk_%(table_name)s',
        }
    )


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time, always with its zone in Python, always UTC; SQLite itself knows no zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store UTC."""
        return None if value is None else value.astimezone(timezone.utc)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Give UTC."""
        if value is None:
            return None
        return (
            value.replace(tzinfo=timezone.utc)
            if value.tzinfo is None
            else value.astimezone(timezone.utc)
        )


class Database:
    """An open database: hands out sessions. Threads may share it, forked children must not.

    Attributes:
        engine: SQLAlchemy's.
        patience_seconds: for so long a session waits for a database that is gone or locked.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.patience_seconds = 0.0
        self._read = sessionmaker(engine, expire_on_commit=False)
        self._write = sessionmaker(
            engine.execution_options(sqlite_begin='IMMEDIATE'), expire_on_commit=False
        )
        _open_databases.add(self)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that may write: committed at the end, rolled back on an exception.

        On SQLite it takes the write lock at once and so waits for other writers here; a
        transaction that reads first and writes later would be refused instead.
        """
        with self._write.begin() as session:
            self._connect(session)
            yield session

    @contextmanager
    def reader(self) -> Iterator[Session]:
        """A session that only reads: waits for nobody, sees one state of the database."""
        with self._read.begin() as session:
            self._connect(session)
            yield session

    def _connect(self, session: Session) -> None:
        """Begin the transaction, with patience: nothing was done yet that would be done twice."""
        deadline = time.monotonic() + self.patience_seconds
        while True:
            try:
                session.connection()
                return
            except OperationalError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def lock(self, session: Session, number: int) -> None:
        """Until the session ends, let no other one go past the same call with the same number.

        On SQLite a session that may write is alone anyway.

        Args:
            session: from `session()`.
            number: any, of 63 bits.
        """
        if self.engine.dialect.name == 'postgresql':
            session.execute(text('SELECT pg_advisory_xact_lock(:number)'), {'number': number})

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_database(url: str) -> Database:
    """Open a database, make it when it is not there and bring its tables up to date.

    Any number of processes may open the same new database at once.

    Args:
        url: `sqlite:///<path>` or `postgresql://...`.

    Raises:
        ConfigError: the address is wrong, nothing answers there, or a newer version of this
            package wrote the database.
    """
    address = _parse(url)
    shown = address.render_as_string(hide_password=True)
    try:
        engine = _build_engine(address)
        _migrate(engine, shown)
    except (SQLAlchemyError, OSError, sqlite3.Error) as error:
        reason = getattr(error, 'orig', None) or error
        raise ConfigError(
            f'cannot open the database {shown}: {reason}; FINETUNER_DATABASE_URL sets its '
            'address, FINETUNER_HOME the directory of the embedded one'
        ) from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the database {shown} needs the package {error.name!r}: '
            'pip install "finetuner[postgresql]"'
        ) from error
    return Database(engine)


def open_file(path: Path) -> Database:
    """Open a SQLite file of any tables, made when it is not there.

    Args:
        path: of the file.

    Raises:
        ConfigError: it cannot be opened, or is no such file.
    """
    try:
        engine = _build_engine(URL.create('sqlite', database=str(path)))
        with engine.connect():
            return Database(engine)
    except (SQLAlchemyError, OSError, sqlite3.Error) as error:
        reason = getattr(error, 'orig', None) or error
        raise ConfigError(f'cannot open {path} as a SQLite file: {reason}') from error


def _parse(url: str) -> URL:
    try:
        address = make_url(url)
        name = address.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        name = ''
    if name not in ('sqlite', 'postgresql'):
        # Not quoted: a mistyped address may hold a password.
        raise ConfigError(
            'FINETUNER_DATABASE_URL is not an address this can use: allowed are '
            'sqlite:///<path> and postgresql://<user>:<password>@<host>/<database>'
        )
    if address.drivername == 'postgresql':
        address = address.set(drivername=_POSTGRESQL)
    if name == 'sqlite' and address.database in (None, '', ':memory:'):
        raise ConfigError(
            'a database in memory cannot be shared with worker processes: give it a file, '
            'sqlite:///<path>'
        )
    return address


def _build_engine(address: URL) -> Engine:
    if address.get_backend_name() != 'sqlite':
        # a database made without an encoding would give bytes in place of texts
        encoding = {'client_encoding': 'utf8'} if address.drivername == _POSTGRESQL else {}
        return create_engine(address, pool_pre_ping=True, connect_args=encoding)
    path = Path(str(address.database))
    make_private_directory(path.parent)
    _make_private_file(path)
    engine = create_engine(address, connect_args={'timeout': BUSY_SECONDS})
    event.listen(engine, 'connect', _prepare_sqlite)
    event.listen(engine, 'begin', _begin_sqlite)
    return engine


def _make_private_file(path: Path) -> None:
    """Make a file for its owner alone: the log of a run is nobody else's business.

    One that is there is not opened: to close it would drop the locks that SQLite holds on it in this
    process, and the next process to close the database would take the log of its writes away.
    """
    with _one_at_a_time, contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def make_private_directory(path: Path) -> None:
    """Make a directory and its missing parents, readable by their owner alone."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver would begin transactions by its own rules; `_begin_sqlite` does it instead.
    connection.isolation_level = None
    connection.execute('PRAGMA foreign_keys = ON')
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.execute('PRAGMA journal_mode').fetchone()[0] != 'wal':
        # SQLite does not wait for locks when it changes the mode: several may try at once.
        try:
            connection.execute('PRAGMA journal_mode = WAL')
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    connection.execute('PRAGMA synchronous = NORMAL')


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if not options.get('sqlite_foreign_keys', True):
        connection.exec_driver_sql('PRAGMA foreign_keys = OFF')
    connection.exec_driver_sql(f'BEGIN {options.get("sqlite_begin", "DEFERRED")}')


def _migrate(engine: Engine, shown: str) -> None:
    with engine.connect() as connection:
        if _schema_version(connection) == SCHEMA_VERSION:
            return
    # A table of SQLite is changed by copying it, and with foreign keys on, dropping the old one
    # would delete what refers to it; a transaction cannot switch them off.
    options = {'sqlite_begin': 'IMMEDIATE', 'sqlite_foreign_keys': False}
    with _one_at_a_time, engine.connect().execution_options(**options) as connection:
        with connection.begin():
            if engine.dialect.name == 'postgresql':
                connection.execute(text(f'SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})'))
            # Asked again: another process may have done it while this one waited for the lock.
            current = _schema_version(connection)
            if current != SCHEMA_VERSION:
                _upgrade(connection, current, shown)
                _check_references(connection)
        connection.invalidate()  # it has foreign keys off


def _check_references(connection: Connection) -> None:
    if connection.dialect.name == 'sqlite':
        broken = connection.exec_driver_sql('PRAGMA foreign_key_check').fetchall()
        if broken:
            raise ConfigError(
                f'the database cannot be brought up to date: rows of {broken[0][0]!r} refer to '
                f'rows of {broken[0][2]!r} that are not there'
            )


def _upgrade(connection: Connection, current: str | None, shown: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option('script_location', str(_MIGRATIONS).replace('%', '%%'))
    config.attributes['connection'] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise ConfigError(
            f'the database {shown} has tables of version {current}, and this version of finetuner '
            f'knows them up to {SCHEMA_VERSION}: upgrade finetuner, or set FINETUNER_DATABASE_URL '
            'or FINETUNER_HOME to another place'
        )
    command.upgrade(config, 'head')


def _schema_version(connection: Connection) -> str | None:
    if not inspect(connection).has_table('alembic_version'):
        return None
    return connection.execute(text('SELECT version_num FROM alembic_version')).scalar()


_open_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _forget_connections() -> None:
    """In a forked child: leave the parent's connections alone, open new ones when asked."""
    for database in _open_databases:
        database.engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)
