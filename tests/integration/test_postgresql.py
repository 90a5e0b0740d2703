"""The run store on a real PostgreSQL server: tables, claims, owners, names for artifacts and garbage.

What an outage of the server does is in `test_faults.py`.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetuner.config import RunConfig, Settings
from finetuner.excepts import ConfigError, ConflictError
from finetuner.runs.records import ProcessMark
from finetuner.runs.store import RunStore
from finetuner.storage.database import open_database
from finetuner.storage.tokens import Identity, TokenStore
from tests.postgresql import INSTALLED, REASON, postgresql
from tests.unit import test_collection_garbage, test_garbage
from tests.unit.alias_cases import CASES
from tests.unit.declared_tables import differences
from tests.unit.test_run_queue import claimed_by_processes

pytestmark = pytest.mark.skipif(not INSTALLED, reason=REASON)

ROOT = Path(__file__).parents[2]
MARK = ProcessMark(1, 'a server')


@pytest.fixture(scope='module')
def server():
    with postgresql() as running:
        yield running


@pytest.fixture
def url(server, request):
    name = ''.join(c for c in request.node.name.lower() if c.isalnum())[:50]
    return server.create_database(name)


@pytest.fixture
def settings(url, tmp_path):
    return Settings(tmp_path / 'home', url, str(tmp_path / 'home' / 'artifacts'))


def submit(store, name, **parameters):
    return store.create_run(RunConfig(train_data='x', **parameters), name, MARK, 'host', 3)


def test_migrations_make_what_the_tables_declare(url):
    database = open_database(url)
    with database.engine.connect() as connection:
        assert differences(connection) == []
    database.close()


def test_many_open_a_new_database_at_once(url):
    with ThreadPoolExecutor(6) as pool:
        for database in pool.map(lambda _: open_database(url), range(6)):
            database.close()


def test_each_run_is_claimed_once_by_many_processes(url):
    store = RunStore(open_database(url))
    expected = {submit(store, f'run {i}').id for i in range(60)}
    claimed = claimed_by_processes(url, 4)
    assert len(claimed) == 60
    assert set(claimed) == expected


def test_claims_do_not_wait_for_each_other(url):
    """One that is being claimed is passed over, not waited for."""
    store = RunStore(open_database(url))
    first, second = submit(store, 'first'), submit(store, 'second')
    from sqlalchemy import select

    from finetuner.runs.tables import RunRow

    with store._database.session() as session:
        session.execute(select(RunRow).where(RunRow.id == first.id).with_for_update(of=RunRow))
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            claimed = pool.submit(store.claim, MARK, 'host').result(timeout=10)
        assert time.monotonic() - began < 2
    assert claimed.id == second.id


def test_owners_and_tokens(url):
    database = open_database(url)
    alice, bob = RunStore(database, 'alice'), RunStore(database, 'bob')
    mine = submit(alice, 'run')
    assert submit(bob, 'run').id != mine.id
    with pytest.raises(ConflictError):
        submit(alice, 'run')
    assert bob.find_by_artifact(mine.artifact_id) is None
    tokens = TokenStore(database)
    secret, _ = tokens.create('alice', 'read')
    assert tokens.identify(secret) == Identity('alice', 'read')


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.__name__)
def test_names_for_artifacts(case, url):
    database = open_database(url)
    case(database)
    database.close()


def test_garbage_is_not_what_is_being_used(settings, monkeypatch):
    monkeypatch.setattr(test_garbage, 'Settings', lambda *_: settings)
    test_garbage.test_data_that_is_being_used_is_not_taken_away(settings.home.parent)


def test_garbage_of_collections_is_not_what_is_being_saved(settings, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(settings.home))
    monkeypatch.setenv('FINETUNER_DATABASE_URL', settings.database_url)
    test_collection_garbage.test_what_is_being_saved_and_released_is_not_taken_away(settings.home)


def test_a_server_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r'cannot open the database postgresql.*127\.0\.0\.1'):
        open_database('postgresql://tests:secret@127.0.0.1:9/nothing')
