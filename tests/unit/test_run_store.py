"""The run store: what may become of a run, and that what is written is read back."""

import math
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from finetuner.config import RunConfig
from finetuner.excepts import ConfigError, ConflictError, NotFoundError
from finetuner.runs.records import MAX_LINE, LogLine, MetricValue, ProcessMark
from finetuner.runs.store import RunStore
from finetuner.storage.database import open_database

ROOT = Path(__file__).parents[2]
LAUNCHER = ProcessMark(11, 'launcher')
WORKER = ProcessMark(12, 'worker')


@pytest.fixture
def url(tmp_path):
    return f'sqlite:///{tmp_path / "runs.db"}'


@pytest.fixture
def store(url):
    return RunStore(open_database(url))


def _create(store, name='run', experiment='default', **parameters):
    config = RunConfig(train_data='sha256:00', experiment_name=experiment, **parameters)
    return store.create_run(config, name, LAUNCHER, 'this-host')


def _line(text, seconds=0):
    return LogLine(
        datetime(2024, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds), 'INFO', text
    )


def test_created_run_is_read_back(store):
    before = datetime.now(timezone.utc)
    run = _create(store, description='why', epochs=3, callbacks=[{'name': 'EarlyStopping'}])
    assert run == store.get_run('default', 'run') == store.read_run(run.id)
    assert run == store.find_by_artifact(run.artifact_id)
    assert (run.status, run.details, run.description) == ('CREATED', '', 'why')
    assert run.config['epochs'] == 3
    assert run.config['callbacks'] == [{'name': 'EarlyStopping', 'options': {}}]
    assert len(run.artifact_id) == 24
    assert int(run.artifact_id, 16) >= 0
    assert before <= datetime.fromisoformat(run.created_at) <= datetime.now(timezone.utc)
    assert (run.started_at, run.finished_at, run.worker) == (None, None, None)
    assert run.launcher == LAUNCHER
    assert 'launcher' not in run.shown()


def test_good_end(store):
    run = _create(store)
    assert store.mark_started(run.id, WORKER)
    assert store.read_run(run.id).worker == WORKER
    assert store.mark_finished(run.id)
    ended = store.read_run(run.id)
    assert ended.status == 'FINISHED'
    assert ended.created_at <= ended.started_at <= ended.finished_at
    assert not ended.is_going


@pytest.mark.parametrize('end', ['mark_finished', 'mark_failed'])
def test_what_has_ended_stays_as_it_ended(store, end):
    run = _create(store)
    store.mark_started(run.id, WORKER)
    assert (
        store.mark_finished(run.id) if end == 'mark_finished' else store.mark_failed(run.id, 'why')
    )
    ended = store.read_run(run.id)
    assert not store.mark_failed(run.id, 'another reason')
    assert not store.mark_finished(run.id)
    assert not store.mark_started(run.id, ProcessMark(13, 'late'))
    assert not store.request_cancel(run.id)
    store.set_worker(run.id, ProcessMark(13, 'late'))
    assert store.read_run(run.id) == ended


def test_a_run_starts_once_and_does_not_finish_unstarted(store):
    run = _create(store)
    assert not store.mark_finished(run.id)
    assert store.mark_started(run.id, WORKER)
    assert not store.mark_started(run.id, ProcessMark(13, 'second'))
    assert not store.mark_failed(run.id, 'cancelled', only_from=['CREATED'])
    assert store.read_run(run.id).worker == WORKER


def test_reason_of_a_failure_is_the_last_line_of_the_log(store):
    run = _create(store)
    store.record(run.id, [_line('first')])
    store.mark_failed(run.id, 'loss is nan in epoch 2')
    assert store.read_run(run.id).details == 'loss is nan in epoch 2'
    assert store.read_log_lines(run.id)[-1][1].endswith('The run failed: loss is nan in epoch 2')


def test_names_are_unique_within_an_experiment(store):
    first = _create(store, 'a', 'x')
    _create(store, 'a', 'y')
    with pytest.raises(ConflictError, match="'a' is there already in experiment 'x'"):
        _create(store, 'a', 'x')
    assert [run.id for run in store.list_runs('x', 1, 10)] == [first.id]


@pytest.mark.parametrize('name', ['', ' a', 'a\n', 'a\0', 'x' * 201, 7, '\ud800'])
def test_names_that_cannot_be(store, name):
    with pytest.raises(ConfigError, match='printable'):
        store.check_run_name('default', name)
    with pytest.raises(ConfigError, match='printable'):
        store.create_experiment(name, '')
    assert store.experiment_names() == []


@pytest.mark.parametrize(
    'name', ['../x', '%2e%2e', 'a#b', '\N{GRINNING FACE}', "'; DROP TABLE runs; --"]
)
def test_odd_names_are_only_names(store, name):
    run = _create(store, name, name)
    assert store.get_run(name, name) == run
    assert [r.name for r in store.list_runs(name, 1, 10)] == [name]


def test_unknown_names_suggest_the_nearest(store):
    _create(store, 'quiet-heron', 'emoji')
    with pytest.raises(NotFoundError, match="did you mean 'quiet-heron'"):
        store.get_run('emoji', 'quiet-herons')
    with pytest.raises(NotFoundError, match="experiment 'emojis': did you mean 'emoji'"):
        store.get_run('emojis', 'quiet-heron')
    with pytest.raises(NotFoundError, match="did you mean 'emoji'"):
        store.get_experiment('emojy')
    with pytest.raises(NotFoundError, match="did you mean 'emoji'"):
        store.list_runs('emojy', 1, 10)
    with pytest.raises(NotFoundError):
        store.find_dataset('nothing')


def test_pages_are_newest_first_and_complete(store):
    for number in range(7):
        _create(store, f'r{number}')
    pages = [[run.name for run in store.list_runs(None, page, 3)] for page in (1, 2, 3, 4)]
    assert pages == [['r6', 'r5', 'r4'], ['r3', 'r2', 'r1'], ['r0'], []]
    for page, size in ((0, 10), (1, 0), (1, 101)):
        with pytest.raises(ConfigError, match='pages count from 1'):
            store.list_runs(None, page, size)


def test_experiments(store):
    made = store.create_experiment('e', 'what for')
    assert made == store.get_experiment('e')
    assert made['status'] == 'ACTIVE'
    with pytest.raises(ConflictError, match="'e' is there already"):
        store.create_experiment('e', '')
    _create(store, 'r', 'e')
    assert store.get_experiment('e')['num_runs'] == 1
    with pytest.raises(ConflictError):
        store.delete_experiment('e')
    run = store.get_run('e', 'r')
    store.mark_failed(run.id, 'x')
    assert store.delete_run(run.id)
    store.delete_experiment('e')
    assert store.list_experiments(1, 10) == []


def test_delete_takes_all_that_was_written_and_nothing_else(store):
    gone, kept = _create(store, 'gone'), _create(store, 'kept')
    for run in (gone, kept):
        store.record(run.id, [_line('line')], [MetricValue(1, 0, 'loss', 0.5)], {'epoch': 1})
        store.set_evaluation(run.id, 'before', 'metrics', {'recall': 0.5})
    assert not store.delete_run(gone.id)  # still going
    store.mark_failed(gone.id, 'x')
    assert store.delete_run(gone.id)
    with pytest.raises(NotFoundError):
        store.read_run(gone.id)
    with pytest.raises(NotFoundError, match='was deleted'):
        store.record(gone.id, [_line('late')])
    assert store.read_log_lines(gone.id) == []
    assert store.read_metrics(gone.id) == []
    assert store.read_evaluations(gone.id, 'metrics') == {}
    assert len(store.read_log_lines(kept.id)) == len(store.read_metrics(kept.id)) == 1
    assert _create(store, 'next').id > kept.id > gone.id  # numbers never come again


def test_log_lines_are_read_in_order_after_an_id(store):
    run, other = _create(store, 'a'), _create(store, 'b')
    store.record(run.id, [_line('one'), _line('two', 61)])
    store.record(other.id, [_line('elsewhere')])
    store.record(run.id, [_line('three\nand more', 62)])
    ids, lines = zip(*store.read_log_lines(run.id), strict=True)
    assert lines == (
        '2024-01-01 00:00:00 INFO     one',
        '2024-01-01 00:01:01 INFO     two',
        '2024-01-01 00:01:02 INFO     three\nand more',
    )
    assert list(ids) == sorted(ids)
    assert store.read_log_lines(run.id, after=ids[1]) == [(ids[2], lines[2])]
    assert store.read_log_lines(run.id, limit=1) == [(ids[0], lines[0])]


def test_a_line_of_ten_megabytes_and_bytes_no_database_takes(store):
    run = _create(store)
    store.record(run.id, [_line('x' * 10_000_000), _line('a\0b\ud800c')])
    long, odd = (line for _, line in store.read_log_lines(run.id))
    assert len(long) < MAX_LINE + 100
    assert long.endswith('(9,934,464 more characters)')
    assert 'a\N{REPLACEMENT CHARACTER}b?c' in odd


def test_metrics_keep_their_values(store):
    run = _create(store)
    values = [
        MetricValue(1, 0, 'loss', 0.1),
        MetricValue(2, 0, 'loss', math.inf),
        MetricValue(None, 0, 'train_loss', 1 / 3),
    ]
    store.record(run.id, metrics=[*values, MetricValue(3, 0, 'loss', math.nan)])
    found = store.read_metrics(run.id)
    assert found[:3] == values
    assert math.isnan(found[3].value)
    assert store.read_metrics(run.id, 'train_loss') == [values[2]]


def test_progress_and_cancel(store):
    run = _create(store)
    assert store.record(run.id, progress={'epoch': np.int64(1), 'loss': math.nan}) is False
    assert store.read_run(run.id).progress == {'epoch': 1, 'loss': None}
    assert store.request_cancel(run.id)
    assert store.record(run.id) is True


def test_evaluations(store):
    run = _create(store)
    store.set_evaluation(run.id, 'after', 'metrics', {'recall': np.float32(0.5), 'f1': 1.0})
    store.set_evaluation(run.id, 'before', 'metrics', {'recall': 0.1})
    store.set_evaluation(run.id, 'before', 'metrics', {'recall': 0.25})
    store.set_evaluation(run.id, 'after', 'examples', {'q': ['a', 'b']})
    metrics = store.read_evaluations(run.id, 'metrics')
    assert list(metrics) == ['before', 'after']
    assert metrics == {'before': {'recall': 0.25}, 'after': {'recall': 0.5, 'f1': 1.0}}
    assert store.read_evaluations(run.id, 'examples') == {'after': {'q': ['a', 'b']}}


def test_a_failed_run_opens_again_once(store):
    run = _create(store)
    other = ProcessMark(13, 'other launcher')
    for status in ('CREATED', 'STARTED'):
        assert not store.reopen(run.id, other, 'there'), status
        store.mark_started(run.id, WORKER)
    store.request_cancel(run.id)
    store.mark_failed(run.id, 'cancelled')
    assert store.reopen(run.id, other, 'there')
    assert not store.reopen(run.id, other, 'there')
    opened = store.read_run(run.id)
    assert (opened.status, opened.details, opened.cancel_requested) == ('CREATED', '', False)
    assert (opened.launcher, opened.worker, opened.host) == (other, None, 'there')
    assert opened.finished_at is None
    assert opened.artifact_id == run.artifact_id
    store.mark_started(run.id, ProcessMark(14, 'second worker'))
    store.mark_finished(run.id)
    assert not store.reopen(run.id, other, 'there')


def test_a_second_worker_is_not_buried_for_the_first(store):
    run = _create(store)
    store.mark_started(run.id, WORKER)
    seen = store.read_run(run.id)
    # another process finds it dead first, and the run goes on
    assert store.mark_failed(run.id, 'killed', seen=seen)
    store.reopen(run.id, LAUNCHER, 'this-host')
    assert not store.mark_failed(run.id, 'killed', seen=seen)
    store.mark_started(run.id, ProcessMark(12, 'second worker'))
    assert not store.mark_failed(run.id, 'killed', seen=seen)
    assert store.read_run(run.id).status == 'STARTED'
    assert store.mark_failed(run.id, 'killed', seen=store.read_run(run.id))


def test_a_late_launcher_does_not_hide_the_worker(store):
    run = _create(store)
    store.set_worker(run.id, WORKER)
    assert store.read_run(run.id).worker == WORKER
    quick = ProcessMark(15, 'started meanwhile')
    store.mark_started(run.id, quick)
    store.set_worker(run.id, WORKER)
    assert store.read_run(run.id).worker == quick


def test_values_after_a_place_are_forgotten(store):
    run, other = _create(store), _create(store, 'other')
    values = [
        MetricValue(step, epoch, 'loss', step / 10)
        for epoch, steps in enumerate([(1, 2), (3, 4), (5, 6)])
        for step in steps
    ]
    ends = [MetricValue(None, epoch, 'train_loss', 1.0) for epoch in range(3)]
    for each in (run, other):
        store.record(each.id, metrics=values + ends)
    store.forget_metrics(run.id, 3, 1)
    assert store.read_metrics(run.id) == [*values[:3], ends[0]]
    store.forget_metrics(run.id, 0, 0)
    assert store.read_metrics(run.id) == []
    assert len(store.read_metrics(other.id)) == 9


def test_a_name_of_data_moves(store):
    store.name_dataset('emoji', 'a' * 64, 10, 100)
    store.name_dataset('emoji', 'b' * 64, 20, 200)
    assert store.find_dataset('emoji') == 'b' * 64
    with pytest.raises(NotFoundError, match="did you mean 'emoji'"):
        store.find_dataset('emojis')


def test_two_processes_write_one_log(store, url):
    run = _create(store)
    code = f"""
import sys
from datetime import datetime, timezone
from finetuner.runs.records import LogLine
from finetuner.runs.store import RunStore
from finetuner.storage.database import open_database
store = RunStore(open_database({url!r}))
for batch in range(20):
    now = datetime.now(timezone.utc)
    store.record({run.id}, [LogLine(now, 'INFO', f'{{sys.argv[1]}} {{batch * 5 + i}}') for i in range(5)])
"""
    writers = [subprocess.Popen([sys.executable, '-c', code, name], cwd=ROOT) for name in 'ab']
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    written = [line.split()[-2:] for _, line in store.read_log_lines(run.id)]
    for name in 'ab':
        assert [int(n) for who, n in written if who == name] == list(range(100))
