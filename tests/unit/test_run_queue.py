"""The queue of runs and their owners, as the store keeps them."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from finetuner.config import RunConfig
from finetuner.excepts import ConflictError, NotFoundError
from finetuner.runs.records import LogLine, ProcessMark, now
from finetuner.runs.states import TAKEN, WAITING
from finetuner.runs.store import RunStore
from finetuner.storage import database
from finetuner.storage.database import open_database

ROOT = Path(__file__).parents[2]
CLIENT = ProcessMark(10, 'client')
SERVER = ProcessMark(11, 'server')
WORKER = ProcessMark(12, 'worker')
OTHER = ProcessMark(13, 'another worker')


@pytest.fixture
def url(tmp_path):
    return f'sqlite:///{tmp_path / "runs.db"}'


@pytest.fixture
def store(url):
    return RunStore(open_database(url))


def _submit(store, name='run', experiment='default', max_retries=2, **parameters):
    config = RunConfig(train_data='sha256:00', experiment_name=experiment, **parameters)
    return store.create_run(config, name, CLIENT, 'client-host', max_retries)


def _start(store, run, worker=WORKER):
    store.set_worker(run.id, worker)
    assert store.mark_started(run.id, worker)
    return store.read_run(run.id)


# the queue


def test_runs_are_claimed_in_their_order_and_once(store):
    first, second = _submit(store, 'first'), _submit(store, 'second')
    assert (first.status, first.queue) == ('CREATED', WAITING)
    assert [store.count_waiting(), store.count_waiting(second.id)] == [2, 1]
    claimed = store.claim(SERVER, 'server-host')
    assert claimed.id == first.id
    assert (claimed.queue, claimed.host, claimed.launcher) == (TAKEN, 'server-host', SERVER)
    assert store.claim(SERVER, 'server-host').id == second.id
    assert store.claim(SERVER, 'server-host') is None
    assert [run.id for run in store.list_taken()] == [first.id, second.id]


def test_a_run_of_ones_own_is_nobody_elses_to_claim(store):
    store.create_run(RunConfig(train_data='x'), 'mine', CLIENT, 'client-host')
    assert store.claim(SERVER, 'server-host') is None
    assert store.list_taken() == []


def test_a_run_that_waits_starts_in_no_worker(store):
    run = _submit(store)
    assert not store.mark_started(run.id, WORKER)
    store.claim(SERVER, 'server-host')
    assert store.mark_started(run.id, WORKER)


def test_many_servers_claim_each_run_once(url):
    store = RunStore(open_database(url))
    expected = {_submit(store, f'run {i}').id for i in range(40)}
    stores = [RunStore(open_database(url)) for _ in range(8)]

    def claim_all(number):
        found = []
        while run := stores[number].claim(ProcessMark(number, f'server {number}'), 'host'):
            found.append(run.id)
        return found

    with ThreadPoolExecutor(8) as pool:
        claimed = [run_id for found in pool.map(claim_all, range(8)) for run_id in found]
    assert len(claimed) == 40
    assert set(claimed) == expected


def claimed_by_processes(url, num_processes):
    """Numbers of the runs that so many processes take at the same time, as each says it."""
    code = f"""
from finetuner.runs.processes import this_process
from finetuner.runs.store import RunStore
from finetuner.storage.database import open_database
store = RunStore(open_database({url!r}))
while run := store.claim(this_process(), 'host'):
    print(run.id)
"""
    workers = [
        subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(num_processes)
    ]
    return [int(line) for worker in workers for line in worker.communicate()[0].split()]


def test_processes_claim_each_run_once(url):
    store = RunStore(open_database(url))
    expected = {_submit(store, f'run {i}').id for i in range(20)}
    claimed = claimed_by_processes(url, 3)
    assert len(claimed) == 20
    assert set(claimed) == expected


def test_a_run_goes_back_into_the_queue(store):
    _submit(store)
    run = _start(store, store.claim(SERVER, 'server-host'))
    assert store.requeue(run.id, 'its worker died', seen=run)
    again = store.read_run(run.id)
    assert (again.status, again.queue, again.worker, again.retries) == (
        'CREATED',
        WAITING,
        None,
        1,
    )
    assert store.read_log_lines(run.id)[-1][1].endswith('WARNING  its worker died')
    assert store.claim(SERVER, 'server-host').id == run.id
    assert store.requeue(run.id, 'the server ends', is_retry=False)
    assert store.read_run(run.id).retries == 1


def test_what_has_another_worker_by_now_is_left_alone(store):
    _submit(store)
    seen = _start(store, store.claim(SERVER, 'server-host'))
    assert store.requeue(seen.id, 'dead', seen=seen)
    fresh = _start(store, store.claim(SERVER, 'server-host'), OTHER)
    assert not store.requeue(seen.id, 'dead', seen=seen)
    assert not store.requeue(seen.id, 'paused', worker=WORKER)
    assert not store.mark_failed(seen.id, 'dead', seen=seen)
    assert not store.mark_failed(seen.id, 'my own failure', worker=WORKER)
    assert not store.mark_finished(seen.id, WORKER)
    assert store.read_run(seen.id) == fresh
    assert store.mark_finished(seen.id, OTHER)
    assert store.read_run(seen.id).queue is None


def test_a_worker_that_lost_its_run_writes_nothing_and_is_told(store):
    _submit(store)
    seen = _start(store, store.claim(SERVER, 'server-host'))
    line = LogLine(now(), 'INFO', 'at work')
    assert store.record(seen.id, [line], worker=WORKER) is False
    store.requeue(seen.id, 'dead', seen=seen)
    _start(store, store.claim(SERVER, 'server-host'), OTHER)
    assert store.record(seen.id, [line], worker=WORKER) is True
    texts = [text for _, text in store.read_log_lines(seen.id)]
    assert sum('at work' in text for text in texts) == 1


def test_beats_grow(store):
    _submit(store)
    run = _start(store, store.claim(SERVER, 'server-host'))
    for _ in range(3):
        store.record(run.id, worker=WORKER, beats=True)
    store.record(run.id, worker=WORKER)
    assert store.read_run(run.id).beats == run.beats + 3


def test_a_cancelled_run_waits_no_longer(store):
    run = _submit(store)
    assert store.request_cancel(run.id)
    assert store.mark_failed(run.id, 'cancelled', only_from=['CREATED'])
    assert store.claim(SERVER, 'server-host') is None
    other = _submit(store, 'other')
    taken = _start(store, store.claim(SERVER, 'server-host'))
    store.request_cancel(taken.id)
    assert not store.requeue(other.id, 'the server ends', worker=WORKER)


def test_a_failed_run_is_queued_again_by_hand(store):
    _submit(store)
    run = _start(store, store.claim(SERVER, 'server-host'))
    store.requeue(run.id, 'dead', seen=run)
    run = _start(store, store.claim(SERVER, 'server-host'))
    store.mark_failed(run.id, 'nan')
    assert store.reopen(run.id, CLIENT, 'client-host', WAITING)
    again = store.claim(SERVER, 'server-host')
    assert (again.id, again.retries) == (run.id, 0)


# owners


def test_owners_do_not_see_each_other(store):
    alice, bob = RunStore(store._database, 'alice'), RunStore(store._database, 'bob')
    mine = _submit(alice, 'secret plans', 'merger')
    alice.name_dataset('salaries', 'a' * 64, 1, 1)
    assert bob.list_runs(None, 1, 50) == []
    assert bob.experiment_names() == []
    assert bob.list_experiments(1, 50) == []
    assert bob.list_datasets() == []
    assert bob.find_by_artifact(mine.artifact_id) is None
    for asked in (
        lambda: bob.get_run('merger', 'secret plans'),
        lambda: bob.get_run('merger', 'secret plan'),
        lambda: bob.get_experiment('merge'),
        lambda: bob.list_runs('merge', 1, 50),
        lambda: bob.find_dataset('salarie'),
    ):
        with pytest.raises(NotFoundError) as caught:
            asked()
        for name in ('secret plans', 'merger', 'salaries', 'alice'):
            assert f"did you mean '{name}" not in str(caught.value)
        assert 'Known: none' in str(caught.value)
    with pytest.raises(ConflictError):
        bob.delete_experiment('merger')
    assert alice.get_run('merger', 'secret plans').owner == 'alice'


def test_names_are_unique_to_their_owner(store):
    alice, bob = RunStore(store._database, 'alice'), RunStore(store._database, 'bob')
    first, second = _submit(alice), _submit(bob)
    assert first.id != second.id
    assert alice.get_run('default', 'run').id == first.id
    assert bob.get_run('default', 'run').id == second.id
    with pytest.raises(ConflictError):
        _submit(bob)
    alice.create_experiment('e', 'of alice')
    assert bob.create_experiment('e', 'of bob')['owner'] == 'bob'
    assert alice.get_experiment('e')['description'] == 'of alice'
    bob.delete_experiment('e')
    assert alice.get_experiment('e')


def test_what_is_public_is_seen_and_nothing_else(store):
    alice, bob = RunStore(store._database, 'alice'), RunStore(store._database, 'bob')
    shared, kept = _submit(alice, 'shared', 'a', public=True), _submit(alice, 'kept', 'a')
    _submit(alice, 'kept too', 'b')
    seen = RunStore(store._database, 'alice', only_public=True)
    assert [run.id for run in seen.list_runs(None, 1, 50)] == [shared.id]
    assert [run.id for run in bob.list_shared(1, 50)] == [shared.id]
    assert seen.experiment_names() == ['a']
    assert seen.get_experiment('a')['num_runs'] == 1
    assert bob.find_by_artifact(shared.artifact_id).id == shared.id
    assert bob.find_by_artifact(kept.artifact_id) is None
    with pytest.raises(NotFoundError):
        seen.get_run('a', 'kept')
    with pytest.raises(NotFoundError):
        seen.get_experiment('b')
    alice.set_public(shared.id, False)
    assert seen.list_runs(None, 1, 50) == []
    assert bob.find_by_artifact(shared.artifact_id) is None


def test_data_is_read_by_who_has_it(store):
    alice, bob = RunStore(store._database, 'alice'), RunStore(store._database, 'bob')
    alice.hold('a' * 64)
    alice.hold('a' * 64)
    assert alice.holds('a' * 64)
    assert not bob.holds('a' * 64)
    alice.name_dataset('pictures', 'a' * 64, 1, 1, public=True)
    assert bob.holds('a' * 64)
    assert store.holds('b' * 64), "the machine's own user has the whole disk"


# the migration


def test_a_store_of_the_first_version_is_brought_up_to_date(tmp_path, url, monkeypatch):
    path = tmp_path / 'runs.db'
    monkeypatch.setattr(database, 'SCHEMA_VERSION', '0001')
    upgrade = command.upgrade
    monkeypatch.setattr(command, 'upgrade', lambda config, _: upgrade(config, '0001'))
    open_database(url).close()
    monkeypatch.undo()
    time = '2024-01-01 00:00:00'
    with sqlite3.connect(path) as old:
        old.execute(f"INSERT INTO experiments VALUES (7, 'e', 'kept', NULL, '{time}')")
        old.execute(f"INSERT INTO experiments VALUES (9, 'gone', '', 'x', '{time}')")
        values = (
            "(5, 7, 'r', 'FINISHED', '', '', '{}', 'abc', NULL, "
            f"'{time}', NULL, NULL, '{{}}', 0, 'host', 1, 'mark', NULL, NULL)"
        )
        old.execute(f'INSERT INTO runs VALUES {values}')
        # the highest number was used by a run that is gone: its directory's name is not used again
        old.execute("UPDATE sqlite_sequence SET seq = 11 WHERE name = 'runs'")
        old.execute(f"INSERT INTO log_lines VALUES (1, 5, '{time}', 'INFO', 'a line')")
        old.execute(f"INSERT INTO datasets VALUES ('d', '{'a' * 64}', 3, 4, '{time}')")
        old.execute('DELETE FROM experiments WHERE id = 9')
    old.close()
    store = RunStore(open_database(url))
    run = store.get_run('e', 'r')
    assert (run.id, run.owner, run.public, run.queue, run.retries) == (5, None, False, None, 0)
    assert [text.endswith('a line') for _, text in store.read_log_lines(5)] == [True]
    assert store.get_experiment('e')['description'] == 'kept'
    assert store.find_dataset('d') == 'a' * 64
    assert _submit(store, 'next').id == 12
    with open_database(url).engine.connect() as connection:
        assert connection.exec_driver_sql('PRAGMA foreign_keys').scalar() == 1


def test_the_migration_can_be_undone(url):
    opened = open_database(url)
    config = Config()
    config.set_main_option('script_location', str(database._MIGRATIONS))
    with opened.engine.connect() as connection, connection.begin():
        config.attributes['connection'] = connection
        command.downgrade(config, '0001')
    opened.close()
    assert RunStore(open_database(url)).list_runs(None, 1, 10) == []
