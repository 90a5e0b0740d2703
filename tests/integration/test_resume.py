"""Runs whose processes are killed, and that go on: the artifact has the same bytes in the end."""

import hashlib
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from finetuner.artifact import load_artifact
from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.excepts import ConflictError
from finetuner.run import Run
from finetuner.runs import processes
from finetuner.runs.processes import ProcessMark, process_mark
from finetuner.runs.worker import run_worker
from finetuner.training.checkpointing import SUMMARY
from tests.conftest import make_picture_docs

FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['finetuner.runs.runner', 'finetuner.runs.worker', __name__])
EPOCHS, BATCHES = 3, 3
PARAMETERS = {
    'model': 'mobilenet_v3_small',
    'model_options': {'weights': 'none', 'input_size': 32},
    'loss': 'CrossBatchMemory',
    'loss_options': {'loss': 'MarginLoss', 'loss_options': {'learn_beta': True}, 'memory_size': 20},
    'epochs': EPOCHS,
    'batch_size': 8,
    'num_items_per_class': 2,
    'num_workers': 2,
    'device': 'cpu',
    'augmentation': 'strong',
    'whiten': True,
    'freeze_batch_norm': False,
    'checkpoint_seconds': 0.001,
    'callbacks': [
        {'name': 'EvaluationCallback', 'options': {'limit': 3, 'gather_examples': True}},
        {'name': 'BestModelCheckpoint', 'options': {'monitor': 'recall_at_k'}},
        {'name': 'EarlyStopping', 'options': {'monitor': 'train_loss', 'patience': 9}},
        {'name': 'TrainingCheckpoint', 'options': {'last_k_epochs': 2}},
    ],
}


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
    home = tmp_path_factory.mktemp('runs') / 'home'
    return Settings(home, f'sqlite:///{home / "finetuner.db"}', str(home / 'artifacts'))


@pytest.fixture(scope='module')
def client(settings):
    client = LocalClient(settings)
    yield client
    processes.stop_workers(grace=0.5)
    client.close()


def forked_worker(settings, run_id, command=None, num_threads=None):
    """A worker process as `launch_worker` starts it, without 10 seconds of imports.

    It is forked by a process that has imported everything and done nothing: one forked by the tests
    themselves inherits what other libraries' threads were at, and now and then crashes.
    """
    worker = FORKS.Process(target=work, args=(settings, run_id))
    worker.start()
    return ProcessMark(worker.pid, process_mark(worker.pid) or 'gone')


def work(settings, run_id):
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    directory = processes.run_directory(settings, run_id)
    directory.mkdir(parents=True, exist_ok=True)
    output = os.open(directory / 'output.txt', os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_worker(run_id, settings)
    os._exit(0)


def start(client, name):
    data = {
        'train_data': make_picture_docs(),
        'callbacks.0.query_data': make_picture_docs(items_per_class=2, seed=1),
    }
    return Run.from_dict(client, client.fit({**PARAMETERS, 'run_name': name}, data))


def record_of(client, run):
    return client._workspace.runs.get_run('default', run.name)


def directory_of(client, run):
    return processes.run_directory(client.settings, record_of(client, run).id)


def until(client, run, condition):
    deadline = time.monotonic() + 120
    while not condition(client.get_run('default', run.name)['status']):
        assert time.monotonic() < deadline, run.logs()
        time.sleep(0.005)


def wait(client, run):
    until(client, run, lambda status: status in ('FINISHED', 'FAILED'))
    assert run.status() == {'status': 'FINISHED', 'details': ''}, run.logs()


def kill(client, run):
    """SIGKILL, and wait for the end; False when the run had finished."""
    mark = record_of(client, run).worker
    if run.status()['status'] != 'STARTED':
        return False
    os.kill(mark.pid, signal.SIGKILL)
    until(client, run, lambda status: status in ('FINISHED', 'FAILED'))
    return run.status()['status'] == 'FAILED'


def outcome(client, run):
    """All that may not differ: the weights' bytes, the metrics, each step's values."""
    directory = client.find_artifact(run.artifact_id)
    manifest = json.loads((directory / 'artifact.json').read_text())
    values = client._workspace.runs.read_metrics(record_of(client, run).id)
    kept = {
        epoch: hashlib.sha256((load_artifact(path).directory / 'model.safetensors').read_bytes())
        for epoch, path in run.checkpoints().items()
    }
    return {
        'weights': hashlib.sha256((directory / 'model.safetensors').read_bytes()).hexdigest(),
        'metrics': manifest['metrics'],
        'shown': run.metrics(),
        'examples': run.example_results(),
        'values': sorted((v.epoch, v.step or 0, v.name, v.value) for v in values),
        'kept': {epoch: digest.hexdigest() for epoch, digest in kept.items()},
    }


@pytest.fixture(scope='module')
def expected(client):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, 'launch_worker', forked_worker)
        run = start(client, 'left alone')
        wait(client, run)
    found = outcome(client, run)
    assert list(found['kept']) == [EPOCHS - 1, EPOCHS]
    steps = [step for _, step, name, _ in found['values'] if name == 'learning_rate']
    assert sorted(steps) == list(range(1, EPOCHS * BATCHES + 1))
    assert not (directory_of(client, run) / 'checkpoint').exists()
    return found


def test_killed_at_random_moments(client, expected, monkeypatch):
    monkeypatch.setattr(processes, 'launch_worker', forked_worker)
    random = np.random.default_rng()
    run = start(client, 'killed')
    num_kills = 0
    while num_kills < 4:
        until(client, run, lambda status: status != 'CREATED')
        # the first before there is a checkpoint, the others anywhere until the end
        time.sleep(float(random.uniform(0, 0.5 + num_kills)))
        if not kill(client, run):
            break
        num_kills += 1
        run.resume()
        with pytest.raises(
            ConflictError, match=r"run 'killed' is (CREATED|STARTED): only a FAILED"
        ):
            run.resume()
    wait(client, run)
    assert num_kills >= 1
    assert run.logs().count('The run failed') == num_kills
    assert outcome(client, run) == expected
    with pytest.raises(ConflictError, match="run 'killed' is FINISHED: only a FAILED"):
        run.resume()
    directory = directory_of(client, run)
    assert sorted(path.name for path in directory.iterdir()) == ['epochs', 'output.txt']
    client.delete_run('default', 'killed')
    assert not directory.exists()


def test_a_run_goes_on_in_a_worker_of_its_own(client):
    """The whole way: two real workers, the first killed once it has a checkpoint.

    Against a run in a worker of its own, too: a forked one has the threads of this process.
    """
    alone = start(client, 'whole way, left alone')
    wait(client, alone)
    run = start(client, 'whole way')
    summary = directory_of(client, run) / 'checkpoint' / SUMMARY
    until(client, run, lambda status: summary.exists() or status in ('FINISHED', 'FAILED'))
    assert kill(client, run), run.status()
    step = json.loads(summary.read_text())['step']
    assert step
    run.resume()
    wait(client, run)
    assert f'Going on from the checkpoint after {step} steps' in run.logs()
    assert outcome(client, run) == outcome(client, alone)
