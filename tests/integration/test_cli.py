"""The command line from data to vectors, as people type it; with --json, as programs read it."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from finetuner.cli import app
from finetuner.collections import TrainingSet
from finetuner.excepts import ConfigError, ConflictError, FinetunerError, NotFoundError
from tests.conftest import make_picture_docs

runner = CliRunner()


def call(*arguments: str, code: int = 0, **options) -> str:
    done = runner.invoke(app, list(arguments), **options)
    if isinstance(done.exception, FinetunerError):
        raise done.exception
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('home')


@pytest.fixture(autouse=True)
def one_home(home, monkeypatch, tmp_path):
    monkeypatch.setenv('FINETUNER_HOME', str(home))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Pictures in a folder for each class."""
    folder = tmp_path_factory.mktemp('pictures')
    for doc in make_picture_docs(4, 4):
        place = folder / f'class {int(doc.tags["finetuner_label"])}'
        place.mkdir(exist_ok=True)
        (place / f'{doc.id}.png').write_bytes(doc.blob)
    return str(folder)


@pytest.fixture(scope='module')
def finished(home, pictures):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FINETUNER_HOME', str(home))
        out = call(
            'fit',
            'efficientnet-lite0',
            pictures,
            '--query-data',
            pictures,
            '--name',
            'by hand',
            '--epochs',
            '1',
            '--batch-size',
            '8',
            '--set',
            'model_options={"input_size": 32}',
            '--set',
            'num-workers=0',
            '--set',
            'device=cpu',
            '--follow',
        )
    assert 'Epoch 1/1 done' in out
    return 'by hand'


def test_a_run_is_seen_in_every_way(finished):
    listed = json.loads(call('runs', '--json'))
    assert [run['name'] for run in listed] == ['by hand']
    assert finished in call('runs')
    assert call('runs', '--experiment', 'default')
    shown = json.loads(call('show', finished, '--json'))
    assert shown['status'] == 'FINISHED'
    assert shown['config']['num_workers'] == 0
    assert 'status: FINISHED' in call('show', finished)
    assert 'Epoch 1/1 done' in call('logs', finished)
    assert 'Epoch 1/1 done' in call('logs', finished, '--follow')
    metrics = json.loads(call('metrics', finished, '--json'))
    assert set(metrics) == {'before', 'after', 'p_value'}
    assert 'recall_at_k' in call('metrics', finished)


def test_its_model_is_fetched_and_used(finished, pictures, tmp_path):
    path = call('artifact', finished, 'here').strip()
    assert path == 'here/by hand.zip'
    told = json.loads(call('artifact', finished, 'here', '--json'))
    out = call('encode', path, pictures, 'vectors.npy')
    vectors = np.load('vectors.npy')
    assert vectors.shape == (16, 1280)
    assert vectors.dtype == np.float32
    assert '16 embeddings of 1280 numbers' in out
    call('encode', told['artifact_id'], pictures, 'docs.docs')
    (tmp_path / 'texts.txt').write_text('one\n\ntwo words\n')
    call('encode', 'all-MiniLM-L6-v2', 'texts.txt', 'texts.npy')
    assert np.load('texts.npy').shape == (2, 384)
    with pytest.raises(ConfigError, match='allowed endings'):
        call('encode', path, pictures, 'vectors.txt')
    with pytest.raises(ConfigError, match='name=value'):
        call('fit', 'efficientnet-lite0', pictures, '--set', 'epochs')


def test_its_model_has_a_name(finished, pictures):
    told = json.loads(call('alias', 'set', 'default@production', finished, '--json'))
    assert (told['alias'], told['run']) == ('default@production', finished)
    listed = json.loads(call('alias', 'list', '--json'))
    assert listed == [told]
    out = call('alias', 'set', 'other@v1', 'default@latest')
    assert out.strip() == f'other@v1 is {told["artifact_id"]}, the model of run by hand of default'
    call('alias', 'set', 'other@v2', finished, '--experiment', 'default')
    call('alias', 'set', 'other@v3', told['artifact_id'])
    assert 'other@v3' in call('alias', 'list')
    call('encode', 'other@v3', pictures, 'vectors.npy')
    with pytest.raises(ConflictError, match="'default@production', 'other@v1'"):
        call('delete', finished, '--yes')
    with pytest.raises(NotFoundError, match="unknown experiment 'other'"):
        call('alias', 'set', 'other@v1', 'by foot')
    for alias in ('other@v1', 'other@v2', 'other@v3'):
        assert 'is forgotten' in call('alias', 'delete', alias)
    gone = json.loads(call('alias', 'delete', 'default@production', '--json'))
    assert gone == {'alias': 'default@production'}
    assert json.loads(call('alias', 'list', '--json')) == []


def test_data_is_kept_listed_fetched_and_forgotten(pictures):
    assert re.match('mine: sha256:[0-9a-f]{64}', call('data', 'push', pictures, 'mine'))
    listed = json.loads(call('data', 'list', '--json'))
    assert [(each['name'], each['num_documents']) for each in listed] == [('mine', 16)]
    assert 'mine' in call('data', 'list')
    assert '16 Documents' in call('data', 'pull', 'mine', 'mine.docs')
    assert 'is forgotten' in call('data', 'forget', 'mine')
    with pytest.raises(NotFoundError, match='mine'):
        call('data', 'forget', 'mine')
    assert 'would be deleted' in call('data', 'clean', '--hours', '0', '--dry-run')
    assert 'are deleted' in call('data', 'clean', '--hours', '0')


def test_what_collections_left_is_counted_and_deleted():
    made = TrainingSet('set', tile_size=(8, 8), classes=['one'])
    made.feed([(np.zeros((3, 8, 8), np.uint8), [1])])
    made.save()
    made[0].remove()
    words = '0 data sets, 1 files of images, 0 of releases, 0 caches and 0 unfinished pieces'
    seen = call('data', 'clean', '--hours', '0', '--dry-run')
    assert re.search(f'{words}, [0-9]+ bytes, would be deleted', seen)
    (pack,) = json.loads(call('data', 'clean', '--hours', '0', '--json'))['packs']
    assert pack.startswith(made._saved.key)
    assert '0 files of images' in call('data', 'clean', '--hours', '0')


def test_runs_are_cancelled_resumed_and_deleted(pictures):
    call('fit', 'efficientnet-lite0', pictures, '--name', 'long', '--epochs', '900', '--json')
    ended = json.loads(call('cancel', 'long', '--json'))
    assert ended['details'] == 'cancelled'
    assert 'goes on' in call('resume', 'long')
    call('cancel', 'long')
    call('delete', 'long', code=1, input='n\n')
    assert 'is deleted' in call('delete', 'long', input='y\n')
    with pytest.raises(NotFoundError, match="unknown run 'long'"):
        call('delete', 'long', '--yes')


def test_tokens():
    secret = call('token', 'create', 'alice', '--days', '1', '--description', 'a notebook')
    assert re.search(r'^ft_[0-9a-f]{12}_[\w-]{43}$', secret, re.MULTILINE)
    made = json.loads(call('token', 'create', 'bob', '--scope', 'read', '--json'))
    listed = json.loads(call('token', 'list', '--json'))
    assert [(each['user'], each['scope']) for each in listed] == [
        ('alice', 'write'),
        ('bob', 'read'),
    ]
    assert made['token'] not in call('token', 'list')
    assert 'lets nobody in' in call('token', 'revoke', made['id'])
    assert 'revoked' in call('token', 'list', '--user', 'bob')
    with pytest.raises(ConfigError, match="did you mean 'write'"):
        call('token', 'create', 'carol', '--scope', 'wirte')


def test_programs_read_all_of_it(finished, pictures):
    """Every command but those that ask or draw takes --json, and what comes is JSON."""
    import typer

    def walk(group, place=()):
        for name, command in getattr(group, 'commands', {}).items():
            yield from walk(command, (*place, name))
        if not hasattr(group, 'commands'):
            yield ' '.join(place), {option for p in group.params for option in p.opts}

    takes = {name for name, options in walk(typer.main.get_command(app)) if '--json' in options}
    others = {'serve', 'login', 'logout', 'data check', 'data sheet'}
    commands = {name for name, _ in walk(typer.main.get_command(app))}
    assert commands - takes <= others, commands - takes
    assert json.loads(call('logs', finished, '--json').splitlines()[0])
    assert json.loads(call('encode', 'efficientnet-lite0', pictures, 'a.npy', '--json')) == {
        'path': 'a.npy',
        'num_documents': 16,
        'dimension': 1280,
    }
    assert json.loads(call('data', 'push', pictures, 'ours', '--json'))['name'] == 'ours'
    assert json.loads(call('data', 'pull', 'ours', 'a.docs', '--json'))['num_documents'] == 16
    assert json.loads(call('data', 'forget', 'ours', '--json')) == {'name': 'ours'}
    assert 'num_bytes' in json.loads(call('data', 'clean', '--dry-run', '--json'))


def test_a_run_that_fails_is_an_exit_code(tmp_path):
    with pytest.raises(FinetunerError):
        call('fit', 'efficientnet-lite0', 'no such data', '--follow')
