"""The handles `Run` and `Experiment`, on a real store whose runs are moved by hand."""

import inspect
import threading
import time
from datetime import datetime, timezone

import pytest

from finetuner.callback import EarlyStopping
from finetuner.client import LocalClient
from finetuner.config import RunConfig, Settings
from finetuner.console import console, print_metrics, print_model_table
from finetuner.excepts import (
    ConfigError,
    ConflictError,
    NotFoundError,
    RunFailedError,
    RunInProgressError,
    RunPreparingError,
)
from finetuner.experiment import Experiment
from finetuner.names import random_run_name
from finetuner.run import Run
from finetuner.runs.processes import this_host, this_process
from finetuner.runs.records import LogLine


@pytest.fixture
def client(tmp_path):
    home = tmp_path / 'home'
    settings = Settings(home, f'sqlite:///{home / "finetuner.db"}', str(home / 'artifacts'))
    client = LocalClient(settings)
    yield client
    client.close()


@pytest.fixture
def store(client):
    return client._workspace.runs


@pytest.fixture
def record(store):
    config = RunConfig(train_data='sha256:00', description='a test', experiment_name='emoji')
    return store.create_run(config, 'first', this_process(), this_host())


@pytest.fixture
def run(client, record):
    return Run.from_dict(client, client.get_run('emoji', record.name))


def _log(store, record, text):
    store.record(record.id, [LogLine(datetime.now(timezone.utc), 'INFO', text)])


def test_what_a_run_is(run, record):
    assert (run.name, run.experiment_name, run.description) == ('first', 'emoji', 'a test')
    assert run.config['train_data'] == 'sha256:00'
    assert run.created_at == record.created_at
    assert run.task == 'training'
    with pytest.raises(ConfigError, match='makes no data'):
        run.train_data  # noqa: B018


def test_created_run_has_no_log_yet(run):
    assert run.status() == {'status': 'CREATED', 'details': ''}
    with pytest.raises(RunPreparingError, match='has not started yet'):
        run.logs()


@pytest.mark.parametrize('started', [False, True])
def test_going_run_has_no_results_yet(run, record, store, started, tmp_path):
    if started:
        store.mark_started(record.id, this_process())
        _log(store, record, 'epoch 1')
        assert run.logs().endswith('epoch 1')
    for ask in (
        run.metrics,
        run.display_metrics,
        run.example_results,
        run.display_examples,
        lambda: run.artifact_id,
        lambda: run.save_artifact(str(tmp_path)),
    ):
        with pytest.raises(RunInProgressError, match=r"'first' is (CREATED|STARTED)"):
            ask()


def test_failed_run_has_no_results_and_says_why(run, record, store):
    store.mark_failed(record.id, 'loss is nan')
    for ask in (run.metrics, run.example_results, lambda: run.artifact_id):
        with pytest.raises(RunFailedError, match=r"'first' failed.*loss is nan"):
            ask()
    assert run.status() == {'status': 'FAILED', 'details': 'loss is nan'}
    assert list(run.stream_logs())[-1].endswith('loss is nan')


def test_finished_run_shows_its_results(run, record, store):
    store.mark_started(record.id, this_process())
    store.set_evaluation(
        record.id, 'before', 'metrics', {'m_recall_at_k': 0.25, 'm_dcg_at_k': 1 / 3}
    )
    store.set_evaluation(record.id, 'after', 'metrics', {'m_recall_at_k': 0.75})
    store.set_evaluation(record.id, 'before', 'examples', {'[red]q': ['a', 'b', 'c']})
    store.mark_finished(record.id)
    assert run.metrics()['after'] == {'m_recall_at_k': 0.75}
    assert run.artifact_id == record.artifact_id
    with console.capture() as shown:
        run.display_metrics()
    tables = shown.get()
    before, _, after = tables.partition('Retrieval metrics after fine-tuning:')
    assert 'Retrieval metrics before fine-tuning:' in before
    assert 'Retrieval Metric' in before
    assert '0.3333333333333333' in before
    assert '0.75' in after
    assert '0.25' not in after
    store.set_evaluation(record.id, 'p_value', 'metrics', {'m_recall_at_k': 0.0})
    with console.capture() as shown:
        run.display_metrics()
    assert '0.250 -> 0.750 (p < 0.001)' in shown.get()
    assert 'p_value' not in shown.get()
    with console.capture() as shown:
        run.display_examples(k=2)
    examples = shown.get()
    assert 'Results before fine-tuning:' in examples
    assert '[red]q' in examples  # no markup
    assert 'Match 2' in examples
    assert 'Match 3' not in examples


def test_log_is_streamed_from_before_the_start_to_the_end(run, record, store):
    seen = []

    def watch():
        for line in run.stream_logs():
            seen.append((time.monotonic(), line.split(' ', 3)[-1].strip()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.3)
    assert seen == []
    store.mark_started(record.id, this_process())
    written = []
    for number in range(3):
        written.append(time.monotonic())
        _log(store, record, f'line {number}')
        time.sleep(0.5)
    assert len(seen) == 3  # not only at the end
    store.mark_finished(record.id)
    watcher.join(timeout=5)
    assert not watcher.is_alive()
    assert [line for _, line in seen] == ['line 0', 'line 1', 'line 2']
    assert max(a - b for (a, _), b in zip(seen, written, strict=True)) < 2


def test_deleted_run_is_not_found(run, record, store):
    store.mark_failed(record.id, 'x')
    store.delete_run(record.id)
    with pytest.raises(NotFoundError):
        run.status()


def test_signatures_are_those_of_finetuner_081():
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(Run.__init__)[1:] == [
        'client', 'name', 'experiment_name', 'config', 'created_at', 'description', 'task', 'train_data',
    ]  # fmt: skip
    assert names(Run.stream_logs) == ['self', 'interval']
    assert inspect.signature(Run.stream_logs).parameters['interval'].default == 5
    assert inspect.signature(Run.display_examples).parameters['k'].default == 5
    assert inspect.signature(Run.save_artifact).parameters['directory'].default == 'artifacts/'
    assert names(Experiment.__init__)[1:] == [
        'client',
        'name',
        'status',
        'created_at',
        'description',
    ]
    assert names(Experiment.list_runs) == ['self', 'page', 'size']


def test_experiment(client, run, record, store):
    experiment = Experiment.from_dict(client, client.get_experiment('emoji'))
    assert (experiment.name, experiment.status, experiment.description) == ('emoji', 'ACTIVE', '')
    assert experiment.get_run('first').config == run.config
    assert [r.name for r in experiment.list_runs()] == ['first']
    assert experiment.list_runs(page=2) == []
    with pytest.raises(NotFoundError, match="did you mean 'first'"):
        experiment.get_run('frist')
    with pytest.raises(ConflictError, match='still going'):
        experiment.delete_run('first')
    store.mark_failed(record.id, 'x')
    experiment.delete_run('first')
    assert experiment.list_runs() == []
    experiment.delete_runs()


def test_experiment_checks_what_a_run_is_told(client):
    client.create_experiment('emoji')
    experiment = Experiment.from_dict(client, client.get_experiment('emoji'))
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        experiment.create_training_run('efficientnet-lite0', 'data', epoch=3)
    with pytest.raises(NotFoundError, match='unknown data'):
        experiment.create_training_run('efficientnet-lite0', 'data', callbacks=[EarlyStopping()])
    with pytest.raises(ConfigError, match='callback 0 is'):
        experiment.create_training_run('efficientnet-lite0', 'data', callbacks=['EarlyStopping'])
    assert experiment.list_runs() == []


def test_tables_fit_what_is_in_them():
    with console.capture() as shown:
        print_model_table([{'name': 'a', 'task': 'b'}, {'name': 'c[d]'}], task='image')
        print_metrics('after', {})
    assert 'Finetuner backbones: image' in shown.get()
    assert 'c[d]' in shown.get()


def test_random_names_differ_and_can_name_runs(store):
    names = {random_run_name() for _ in range(50)}
    assert len(names) >= 49
    for name in names:
        store.check_run_name('default', name)
