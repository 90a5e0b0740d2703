"""Runs that several processes train together: what comes of them, and of those that are killed."""

import os
import signal
import time

import psutil
import pytest
import torch
from docarray import Document, DocumentArray
from safetensors.torch import load_file

import finetuner
from finetuner.callback import BestModelCheckpoint, EvaluationCallback, TrainingCheckpoint
from finetuner.config import Settings
from finetuner.excepts import ConfigError
from finetuner.runs import processes
from tests.conftest import make_picture_docs
from tests.unit.test_text_image import pairs
from tests.unit.tiny_encoder import write_tiny_clip

# several processes of a run at once, on machines that do other things as well
pytestmark = pytest.mark.timeout(900)
PICTURES = {
    'model': 'resnet18',
    'model_options': {'weights': 'none', 'input_size': 32},
    'freeze_batch_norm': True,
    # Adam makes steps of a whole rate of gradients that are nothing but errors of rounding
    'optimizer': 'SGD',
    'learning_rate': 0.005,
    'batch_size': 7,
    'num_items_per_class': 1,
    'sampler': 'random',
    'epochs': 2,
    'device': 'cpu',
}


# errors of rounding grow with the rate and the steps
SLOW = {'learning_rate': 0.0005}


@pytest.fixture(autouse=True)
def no_workers_left():
    yield
    processes.stop_workers(grace=0.5)


def fit(**parameters):
    return finetuner.fit(**{'train_data': make_picture_docs(), **PICTURES, **parameters})


def wait(run):
    deadline = time.monotonic() + 400
    while run.status()['status'] not in ('FINISHED', 'FAILED'):
        assert time.monotonic() < deadline, run.logs()
        time.sleep(0.1)
    return run


def weights(run):
    folder = finetuner.api.find_artifact(run.artifact_id)
    return {
        f'{path.name} {name}': value
        for path in folder.rglob('*.safetensors')
        for name, value in load_file(path).items()
    }


def evaluated():
    return [
        EvaluationCallback(query_data=make_picture_docs(items_per_class=3, seed=1), limit=3),
        BestModelCheckpoint(monitor='recall_at_k'),
        TrainingCheckpoint(last_k_epochs=2),
    ]


def text_image_run(tmp_path):
    return {
        'model': str(write_tiny_clip(tmp_path / 'clip')),
        'model_options': {},
        'train_data': pairs(),
        'batch_size': 12,
        'num_items_per_class': 4,
        'sampler': 'auto',
        'eval_data': pairs(2),
    }


@pytest.mark.parametrize('kind', ['pictures', 'pairs', 'frozen'])
def test_two_processes_make_the_model_of_one(kind, tmp_path):
    given = {
        'pictures': lambda: {
            'callbacks': evaluated(),
            'val_split': 0.3,
            'hard_negatives': True,
            'sampler': 'auto',
            'batch_size': 8,
            'num_items_per_class': 2,
            **SLOW,
        },
        'pairs': lambda: text_image_run(tmp_path),
        'frozen': lambda: {'freeze': True, 'output_dim': 8, 'callbacks': evaluated()},
    }[kind]()
    one, two = (
        wait(fit(**given, num_processes=number, run_name=f'{kind}-{number}')) for number in (1, 2)
    )
    assert two.status()['status'] == 'FINISHED', two.logs()
    assert '2 processes train together' in str(two.logs())
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if not value.is_floating_point():
            continue
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
    if kind == 'pairs':
        return
    for stage, metrics in one.metrics().items():
        assert two.metrics()[stage] == pytest.approx(metrics, abs=1e-6), stage


def followers(run):
    record = finetuner.client.get_client()._workspace.runs.get_run('default', run.name)
    if record.worker is None or run.status()['status'] != 'STARTED':
        return []
    found = psutil.Process(record.worker.pid).children()
    return [each for each in found if 'RANK' in each.environ()]


def training_run(name, **parameters):
    """A run of two processes that has trained some batches."""
    run = fit(run_name=name, num_processes=2, epochs=500, checkpoint_seconds=0.5, **parameters)
    deadline = time.monotonic() + 300
    while 'batch' not in (progress(run) or {}):
        assert time.monotonic() < deadline, run.logs()
        assert run.status()['status'] in ('CREATED', 'STARTED'), run.logs()
        time.sleep(0.1)
    return run


def progress(run):
    return finetuner.client.get_client().get_run('default', run.name)['progress']


def gone(process):
    deadline = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_whose_second_process_is_killed_says_so_and_goes_on_where_it_was():
    run = training_run('killed')
    time.sleep(1.0)
    (follower,) = followers(run)
    follower.kill()
    details = wait(run).status()
    assert details['status'] == 'FAILED'
    assert 'process 1 of the run ended (signal 9)' in details['details']
    run.resume()
    deadline = time.monotonic() + 300
    while run.status()['status'] == 'CREATED' or 'Going on from' not in str(run.logs()):
        assert time.monotonic() < deadline, run.logs()
        time.sleep(0.1)
    (follower,) = followers(run)
    finetuner.client.get_client().cancel_run('default', run.name)
    gone(follower)
    assert run.status()['status'] == 'FAILED'


def test_the_second_process_ends_with_a_worker_that_is_killed():
    run = training_run('leaderless')
    (follower,) = followers(run)
    os.kill(follower.ppid(), signal.SIGKILL)
    gone(follower)
    assert 'SIGKILL' in wait(run).status()['details']


def test_what_the_second_process_cannot_read_is_told():
    docs = make_picture_docs()
    broken = [Document(blob=docs[0].blob[:60], tags={'finetuner_label': 99}) for _ in range(2)]
    docs = DocumentArray([*docs, *broken])
    refused = fit(train_data=docs, run_name='skips', on_broken='skip', num_processes=2)
    assert wait(refused).status()['status'] == 'FINISHED', refused.logs()
    assert '2 of 26 Documents are left out' in str(refused.logs())


def test_more_processes_than_there_is_room_for_are_refused():
    with pytest.raises(ConfigError, match=r'num_processes=999.*cores'):
        fit(num_processes=999)
    with pytest.raises(ConfigError, match=r'num_nodes=2.*FINETUNER_LAUNCHER=ray'):
        fit(num_processes=2, num_nodes=2)
    with pytest.raises(ConfigError, match='3 processes cannot be divided evenly among 2 nodes'):
        fit(num_processes=3, num_nodes=2)
    assert not (Settings.from_environment().home / 'runs').exists()
