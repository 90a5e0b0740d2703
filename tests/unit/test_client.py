"""The local client: data, validation at the door, runs by real processes, cancelling, deleting."""

import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray
from PIL import Image
from typer.testing import CliRunner

from finetuner.callback import EvaluationCallback
from finetuner.cli import app
from finetuner.client import Client, LocalClient, callback_parameters, get_client
from finetuner.config import Settings
from finetuner.excepts import (
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
)
from finetuner.runs.processes import is_alive

ROOT = Path(__file__).parents[2]

# A worker whose training is a few lines: what it does is said in the run's description.
WORKER = f"""
import logging, sys, time
sys.path.insert(0, {str(ROOT)!r})
from finetuner.config import Settings
from finetuner.runs.worker import run_worker

def execute(config, load_data, directory, observer, run_directory):
    log = logging.getLogger('finetuner.test')
    log.info('training on %d Documents', len(load_data(config.train_data)))
    observer.progress({{'epoch': 1, 'num_epochs': 2}})
    observer.evaluation('before', {{'recall_at_k': 0.25}})
    (directory / 'half').write_text('half an artifact')
    deadline = time.monotonic() + 60
    while config.description == 'slow' and time.monotonic() < deadline:
        time.sleep(0.01)
    if config.description == 'fails':
        raise ValueError('no luck')
    observer.step_metrics(1, 0, {{'loss': 0.5}})
    observer.evaluation('after', {{'recall_at_k': 0.75}})
    observer.examples('after', {{'query': ['match 1', 'match 2']}})
    (directory / 'half').unlink()
    (directory / 'artifact.json').write_text('whole')

sys.exit(0 if run_worker(int(sys.argv[1]), Settings.from_environment(), execute) else 1)
"""


def _picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


@pytest.fixture
def docs():
    return DocumentArray(
        Document(blob=_picture(i), tags={'finetuner_label': i // 4}) for i in range(16)
    )


@pytest.fixture
def settings(tmp_path):
    home = tmp_path / 'home'
    return Settings(home, f'sqlite:///{home / "finetuner.db"}', str(home / 'artifacts'))


@pytest.fixture
def client(settings, tmp_path):
    script = tmp_path / 'worker.py'
    script.write_text(WORKER)
    client = LocalClient(settings, worker_command=(sys.executable, str(script)))
    yield client
    for run in client.list_runs(size=100):
        if run['status'] in ('CREATED', 'STARTED'):
            client.cancel_run(run['experiment_name'], run['name'])
    client.close()


def _parameters(**others):
    return {'model': 'efficientnet-lite0', 'batch_size': 8, 'num_workers': 0, **others}


def _wait(client, run, *statuses):
    deadline = time.monotonic() + 60
    while (now := client.get_run(run['experiment_name'], run['name']))['status'] not in statuses:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    return now


def _files(settings):
    return sorted(
        path.relative_to(settings.home).as_posix()
        for place in ('artifacts', 'runs')
        for path in (settings.home / place).rglob('*')
    )


# data


def test_pushed_data_comes_back(client, docs):
    reference = client.push_data(docs, 'emoji')
    assert reference == client.push_data(docs)
    assert reference.startswith('sha256:')
    for name in (reference, 'emoji'):
        loaded = client.load_data(name)
        assert [(d.id, d.blob, d.tags) for d in loaded] == [(d.id, d.blob, d.tags) for d in docs]


def test_pushed_data_lies_once_and_beside_nothing_else(client, docs, settings):
    reference = client.push_data(docs)
    client.push_data(docs, 'again')
    files = [p for p in settings.home.rglob('*') if p.is_file() and 'finetuner.db' not in p.name]
    assert [p.name for p in files] == [reference.removeprefix('sha256:') + '.docs']


def test_relative_paths_are_stored_absolute(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = Document(uri='inner.png')
    doc = Document(uri='pictures/a.png', chunks=[inner], matches=[Document(uri='file:b.png')])
    others = ['https://example.org/a.png', '/abs/a.png', 'data:image/png;base64,AA', '~/a.png']
    loaded = client.load_data(
        client.push_data(DocumentArray([doc, *(Document(uri=u) for u in others)]))
    )
    assert loaded[0].uri == str(tmp_path / 'pictures' / 'a.png')
    assert loaded[0].chunks[0].uri == str(tmp_path / 'inner.png')
    assert loaded[0].matches[0].uri == str(tmp_path / 'b.png')
    assert [d.uri for d in loaded[1:]] == others
    assert (doc.uri, inner.uri) == ('pictures/a.png', 'inner.png')  # the caller's are left alone


def test_unknown_and_changed_data(client, docs, settings):
    reference = client.push_data(docs, 'emoji')
    with pytest.raises(NotFoundError, match="did you mean 'emoji'"):
        client.load_data('emojis')
    with pytest.raises(NotFoundError, match='no data is stored'):
        client.load_data('sha256:' + 'f' * 64)
    path = settings.home / 'data' / f'{reference[7:]}.docs'
    path.write_bytes(path.read_bytes()[:-1] + b'!')
    with pytest.raises(DataError, match='was changed'):
        client.load_data('emoji')


# runs


def test_run_from_fit_to_archive(client, docs, tmp_path):
    run = client.fit(_parameters(run_name='first', experiment_name='emoji'), {'train_data': docs})
    assert (run['name'], run['experiment_name'], run['status']) == ('first', 'emoji', 'CREATED')
    lines = list(client.stream_run_logs('emoji', 'first'))
    assert lines[0].endswith('training on 16 Documents')
    ended = client.get_run('emoji', 'first')
    assert (ended['status'], ended['details']) == ('FINISHED', '')
    assert ended['artifact_id'] == run['artifact_id']
    assert ended['progress'] == {'epoch': 1, 'num_epochs': 2}
    assert client.get_run_status('emoji', 'first') == {'status': 'FINISHED', 'details': ''}
    assert client.get_run_logs('emoji', 'first') == '\n'.join(lines)
    assert client.get_run_metrics('emoji', 'first') == {
        'before': {'recall_at_k': 0.25},
        'after': {'recall_at_k': 0.75},
    }
    assert client.get_run_examples('emoji', 'first') == {'after': {'query': ['match 1', 'match 2']}}
    directory = client.find_artifact(run['artifact_id'])
    assert [path.name for path in directory.iterdir()] == ['artifact.json']
    assert client.load_data(ended['config']['train_data'])[0].blob == docs[0].blob


def test_data_may_be_a_name_and_the_config_keeps_its_hash(client, docs):
    reference = client.push_data(docs, 'emoji')
    run = client.fit(_parameters(), {'train_data': 'emoji'})
    assert run['config']['train_data'] == reference
    again = client.fit(_parameters(train_data=reference), {})
    assert again['config']['train_data'] == reference
    assert again['name'] != run['name']


def test_callbacks_carry_their_data_as_references(client, docs):
    callbacks, data = callback_parameters(
        [EvaluationCallback(query_data=docs[:8], index_data=docs[8:], limit=3, exclude_self=False)]
    )
    assert set(data) == {'callbacks.0.query_data', 'callbacks.0.index_data'}
    # labels of the queries must be in the index
    data['callbacks.0.index_data'] = docs
    run = client.fit(_parameters(callbacks=callbacks), {'train_data': docs, **data})
    (stored,) = run['config']['callbacks']
    assert stored['name'] == 'EvaluationCallback'
    assert stored['options']['limit'] == 3
    assert len(client.load_data(stored['options']['query_data'])) == 8
    assert len(client.load_data(stored['options']['index_data'])) == 16


@pytest.mark.parametrize(
    ('parameters', 'data', 'error', 'message'),
    [
        ({'los': 'TripletMarginLoss'}, {}, ConfigError, "did you mean 'loss'"),
        ({'loss': 'TripletMarginLos'}, {}, ConfigError, "did you mean 'TripletMarginLoss'"),
        ({'model': 'efficientnet-light0'}, {}, ConfigError, "did you mean 'efficientnet-lite0'"),
        ({'epochs': 1.5}, {}, ConfigError, 'epochs'),
        ({'run_name': ' x'}, {}, ConfigError, 'printable'),
        ({'callbacks': 'EarlyStopping'}, {}, ConfigError, 'not a list'),
        ({'callbacks': ['EarlyStopping']}, {}, ConfigError, 'callback 0'),
        (
            {'callbacks': [{'name': 'EarlyStoping'}]},
            {},
            ConfigError,
            "did you mean 'EarlyStopping'",
        ),
        ({}, {'callbacks.0.query_data': 'x'}, ConfigError, 'belongs nowhere'),
        ({}, {'test_data': 'x'}, ConfigError, 'belongs nowhere'),
        ({}, {'train_data': None}, ConfigError, 'train_data is a NoneType'),
        ({}, {'train_data': 'unknown'}, NotFoundError, 'unknown data'),
        ({}, {'train_data': DocumentArray()}, DataError, 'no Documents'),
        (
            {},
            {'train_data': DocumentArray([Document(text='no label')])},
            DataError,
            'one Document only',
        ),
        ({'model_artifact': 'ab' * 12}, {}, NotFoundError, 'no artifact'),
        ({'model_artifact': 'not-there'}, {}, NotFoundError, 'no artifact'),
    ],
)
def test_what_is_wrong_is_refused_and_leaves_nothing(
    client, settings, docs, parameters, data, error, message
):
    with pytest.raises(error, match=message):
        client.fit(_parameters(**parameters), {'train_data': docs, **data})
    assert client.list_runs() == []
    assert client.list_experiments() == []
    assert _files(settings) == []
    assert not (settings.home / 'data').exists()


def test_a_taken_name_is_refused(client, docs):
    client.fit(_parameters(run_name='a'), {'train_data': docs})
    with pytest.raises(ConflictError, match="'a' is there already"):
        client.fit(_parameters(run_name='a'), {'train_data': docs})
    client.fit(_parameters(run_name='a', experiment_name='other'), {'train_data': docs})
    assert len(client.list_runs()) == 2


def test_a_worker_that_cannot_be_started_leaves_no_run(settings, docs):
    client = LocalClient(settings, worker_command=('/no/such/program',))
    with pytest.raises(OSError, match='no/such/program'):
        client.fit(_parameters(), {'train_data': docs})
    assert client.list_runs() == []


def test_failed_run_says_why_and_leaves_no_artifact(client, settings, docs):
    run = client.fit(_parameters(run_name='bad', description='fails'), {'train_data': docs})
    lines = list(client.stream_run_logs('default', 'bad'))
    assert client.get_run_status('default', 'bad') == {
        'status': 'FAILED',
        'details': 'ValueError: no luck',
    }
    assert lines[-1].endswith('The run failed: ValueError: no luck')
    assert any('Traceback' in line for line in lines[:-1])
    with pytest.raises(NotFoundError, match='is FAILED: ValueError: no luck'):
        client.find_artifact(run['artifact_id'])
    assert list((settings.home / 'artifacts').iterdir()) == []


def test_cancel_and_delete(client, settings, docs):
    going = client.fit(_parameters(run_name='slow', description='slow'), {'train_data': docs})
    _wait(client, going, 'STARTED')
    for call in (
        lambda: client.delete_run('default', 'slow'),
        lambda: client.delete_runs(),
        lambda: client.delete_experiment('default'),
    ):
        with pytest.raises(ConflictError, match="'slow' is still going: cancel first"):
            call()
    with pytest.raises(NotFoundError, match='is STARTED'):
        client.find_artifact(going['artifact_id'])
    worker = client._record('default', 'slow').worker
    start = time.monotonic()
    cancelled = client.cancel_run('default', 'slow')
    assert time.monotonic() - start < 5  # the worker ended by itself
    assert (cancelled['status'], cancelled['details']) == ('FAILED', 'cancelled')
    assert not is_alive(worker)
    assert list((settings.home / 'artifacts').iterdir()) == []
    with pytest.raises(ConflictError, match='has ended already'):
        client.cancel_run('default', 'slow')
    client.delete_run('default', 'slow')
    with pytest.raises(NotFoundError):
        client.get_run('default', 'slow')
    assert _files(settings) == ['artifacts', 'runs'] or _files(settings) == []


def test_a_cancelled_run_goes_on_in_another_worker(client, settings, docs):
    run = client.fit(_parameters(description='slow', run_name='slow'), {'train_data': docs})
    with pytest.raises(ConflictError, match=r"'slow' is (CREATED|STARTED): only a FAILED run"):
        client.resume_run('default', 'slow')
    first = _wait(client, run, 'STARTED')
    assert client.cancel_run('default', 'slow')['details'] == 'cancelled'
    again = client.resume_run('default', 'slow')
    assert (again['status'], again['details'], again['finished_at']) == ('CREATED', '', None)
    assert again['artifact_id'] == run['artifact_id']
    going = _wait(client, run, 'STARTED')
    assert going['created_at'] == first['created_at']
    assert is_alive(client._record('default', 'slow').worker)
    client.cancel_run('default', 'slow')
    lines = client.get_run_logs('default', 'slow').splitlines()
    assert [line.endswith('The run failed: cancelled') for line in lines].count(True) == 2
    # from the command line
    done = CliRunner().invoke(
        app, ['resume', 'slow'], env={'FINETUNER_HOME': str(settings.home)}, catch_exceptions=False
    )
    assert 'slow goes on' in done.output
    assert client.get_run('default', 'slow')['status'] in ('CREATED', 'STARTED')
    client.cancel_run('default', 'slow')


def test_a_finished_run_does_not_go_on(client, docs):
    run = client.fit(_parameters(run_name='done'), {'train_data': docs})
    _wait(client, run, 'FINISHED')
    with pytest.raises(ConflictError, match=r"'done' is FINISHED.*model_artifact"):
        client.resume_run('default', 'done')
    with pytest.raises(NotFoundError, match='done'):
        client.resume_run('default', 'don')
    assert client.get_run_checkpoints('default', 'done') == {}


def test_delete_takes_the_artifact(client, settings, docs):
    run = client.fit(_parameters(experiment_name='e'), {'train_data': docs})
    _wait(client, run, 'FINISHED')
    assert client.find_artifact(run['artifact_id']).is_dir()
    assert client.delete_experiment('e')['num_runs'] == 1
    assert _files(settings) == []
    assert client.list_experiments() == []
    with pytest.raises(NotFoundError, match='was deleted'):
        client.find_artifact(run['artifact_id'])
    assert len(client.load_data(run['config']['train_data'])) == 16  # data is kept


def test_delete_everything(client, docs):
    runs = [client.fit(_parameters(experiment_name=e), {'train_data': docs}) for e in ('a', 'b')]
    client.create_experiment('empty')
    for run in runs:
        _wait(client, run, 'FINISHED')
    assert {e['name'] for e in client.delete_experiments()} == {'a', 'b', 'empty'}
    assert client.list_experiments() == client.list_runs() == []


@pytest.mark.parametrize('artifact_id', ['../../etc', 'A' * 24, '', 'ab' * 12, '%2e' * 8])
def test_what_is_no_artifact(client, artifact_id):
    with pytest.raises(NotFoundError, match='artifact'):
        client.find_artifact(artifact_id)


def test_archive_of_what_is_no_artifact_is_refused(client, docs, tmp_path):
    run = client.fit(_parameters(), {'train_data': docs})
    _wait(client, run, 'FINISHED')
    with pytest.raises(ValueError, match=r'artifact\.json'):  # the test worker's is none
        client.download_artifact(run['artifact_id'], tmp_path / 'out', '../x')
    assert not list(tmp_path.rglob('*.zip'))


def test_get_client_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv('FINETUNER_DATABASE_URL', raising=False)
    monkeypatch.delenv('FINETUNER_ARTIFACTS_URL', raising=False)
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'a'))
    first: Client = get_client()
    assert get_client() is first
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'b'))
    second = get_client()
    assert second is not first
    first.create_experiment('only in a')
    assert second.list_experiments() == []
    child = os.fork()
    if child == 0:
        os._exit(0 if get_client() is not second else 1)
    assert os.waitpid(child, 0)[1] == 0
