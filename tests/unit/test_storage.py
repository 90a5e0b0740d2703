"""The database: sessions, settings of SQLite, migrations, several processes at once."""

import re
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from finetuner.excepts import ConfigError
from finetuner.runs import tables
from finetuner.storage import database, tokens  # noqa: F401 - its table counts too
from finetuner.storage.database import open_database
from tests.unit.declared_tables import differences

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path):
    return f'sqlite:///{tmp_path / "home" / "finetuner.db"}'


def _experiment(name):
    return tables.ExperimentRow(name=name, description='', created_at=datetime.now(timezone.utc))


def _names(db):
    with db.reader() as session:
        return sorted(session.scalars(text('SELECT name FROM experiments')))


def test_new_database_is_private_and_safe(url, tmp_path):
    db = open_database(url)
    with db.reader() as session:
        pragmas = [
            session.scalar(text(f'PRAGMA {name}')) for name in ('journal_mode', 'foreign_keys')
        ]
        timeout = session.scalar(text('PRAGMA busy_timeout'))
    assert pragmas == ['wal', 1]
    assert timeout >= 5_000
    assert stat.S_IMODE((tmp_path / 'home').stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / 'home' / 'finetuner.db').stat().st_mode) == 0o600


def test_migrations_make_what_the_tables_declare(url):
    db = open_database(url)
    with db.engine.connect() as connection:
        assert differences(connection) == []


def test_schema_version_is_the_newest_migration():
    versions = Path(database.__file__).parent / 'migrations' / 'versions'
    numbers = [path.name[:4] for path in versions.glob('[0-9]*.py')]
    assert max(numbers) == database.SCHEMA_VERSION
    assert all(re.fullmatch(r'\d{4}', number) for number in numbers)


def test_session_commits_or_rolls_back_whole(url):
    db = open_database(url)
    with db.session() as session:
        session.add(_experiment('kept'))

    def breaks_off():
        with db.session() as session:
            session.add(_experiment('lost'))
            session.flush()
            raise RuntimeError('stop')

    with pytest.raises(RuntimeError, match='stop'):
        breaks_off()
    with pytest.raises(IntegrityError), db.session() as session:
        session.add_all([_experiment('lost too'), _experiment('kept')])
    assert _names(db) == ['kept']


def test_foreign_keys_are_enforced(url):
    db = open_database(url)
    line = {'run': 7, 'time': '2024-01-01 00:00:00'}
    with pytest.raises(IntegrityError), db.session() as session:
        session.execute(
            text(
                "INSERT INTO log_lines (run_id, time, level, message) VALUES (:run, :time, '', '')"
            ),
            line,
        )


def test_times_keep_their_moment_and_come_back_in_utc(url):
    db = open_database(url)
    moment = datetime(2024, 5, 1, 12, 30, 15, 250, timezone(timedelta(hours=5, minutes=30)))
    with db.session() as session:
        session.add(tables.ExperimentRow(name='e', description='', created_at=moment))
    with db.reader() as session:
        read = session.query(tables.ExperimentRow).one().created_at
    assert read == moment
    assert read.utcoffset() == timedelta(0)


def test_writers_wait_for_each_other(url):
    db = open_database(url)
    with db.session() as session:
        session.add(_experiment('0'))

    def count_up(_):
        with db.session() as session:  # reads, then writes what depends on it
            row = session.query(tables.ExperimentRow).one()
            row.name = str(int(row.name) + 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count_up, range(64)))
    assert _names(db) == ['64']


def test_opened_twice_it_shares_what_other_processes_write(url):
    """SQLite's locks belong to the process: none may be lost when the file is opened once more."""
    first = open_database(url)
    with first.session() as session:
        session.add(_experiment('first'))
    second = open_database(url)
    code = f"""
from tests.unit.declared_tables import differences
from tests.unit.test_storage import _experiment, _names
from finetuner.storage.database import open_database
db = open_database({url!r})
with db.session() as session:
    session.add(_experiment('other'))
db.close()  # were it the last to have it open, it would take the log of writes away
print(_names(open_database({url!r})))
"""
    for expected in (['first', 'other'], ['first', 'other', 'second', 'third']):
        if len(expected) > 2:
            code = code.replace("_experiment('other')", "_experiment('third')")
            with second.session() as session:
                session.add(_experiment('second'))
        out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
        assert out.stdout.strip() == str(expected), out.stderr
        assert _names(first) == expected
        assert _names(second) == expected


def test_reopening_keeps_content_and_runs_no_migration(url):
    db = open_database(url)
    with db.session() as session:
        session.add(_experiment('kept'))
    db.close()
    code = f"""
import sys
from finetuner.storage.database import open_database
open_database({url!r})
print('alembic.command' in sys.modules)
"""
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == 'False', out.stderr
    assert _names(open_database(url)) == ['kept']


def test_database_of_a_newer_version_is_refused(url):
    db = open_database(url)
    with db.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match=r'version 9999.*upgrade finetuner'):
        open_database(url)
    assert db.engine.connect().scalar(text('SELECT version_num FROM alembic_version')) == '9999'


def test_failed_migration_leaves_nothing(url, tmp_path):
    path = tmp_path / 'home' / 'finetuner.db'
    path.parent.mkdir()
    with sqlite3.connect(path) as other:  # another program's table is in the way of ours
        other.execute('CREATE TABLE runs (x)')
    with pytest.raises(ConfigError, match='cannot open the database'):
        open_database(url)
    with sqlite3.connect(path) as other:
        found = [
            row[0] for row in other.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
    assert found == ['runs']


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        ('', 'not an address'),
        ('finetuner.db', 'not an address'),
        ('mysql://host/db', 'not an address'),
        ('sqlite://', 'in memory'),
        ('sqlite:///:memory:', 'in memory'),
    ],
)
def test_wrong_addresses_say_what_is_allowed(bad, reason):
    with pytest.raises(ConfigError, match=reason) as info:
        open_database(bad)
    assert 'sqlite:///<path>' in str(info.value)


def test_passwords_are_never_shown():
    for bad in ('nonsense://u:hunter2@h/d', 'postgresql://u:hunter2@127.0.0.1:1/d', 'u:hunter2@h'):
        with pytest.raises(ConfigError) as info:
            open_database(bad)
        assert 'hunter2' not in str(info.value)


def test_what_is_no_database_is_refused_and_kept(url, tmp_path):
    path = tmp_path / 'home' / 'finetuner.db'
    path.parent.mkdir()
    path.write_text('not a database at all, but long enough to be taken for one' * 20)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match='not a database'):
        open_database(url)
    assert path.read_bytes() == before


def test_eight_processes_open_one_new_database_and_all_write(url):
    code = f"""
import sys
from datetime import datetime, timezone
from finetuner.runs import tables
from finetuner.storage.database import open_database
db = open_database({url!r})
for number in range(5):
    with db.session() as session:
        session.add(tables.ExperimentRow(
            name=f'{{sys.argv[1]}}-{{number}}', description='', created_at=datetime.now(timezone.utc)
        ))
"""
    workers = [
        subprocess.Popen([sys.executable, '-c', code, str(i)], cwd=ROOT, stderr=subprocess.PIPE)
        for i in range(8)
    ]
    errors = [worker.communicate(timeout=60)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8, '\n'.join(errors)
    assert _names(open_database(url)) == sorted(f'{i}-{n}' for i in range(8) for n in range(5))
