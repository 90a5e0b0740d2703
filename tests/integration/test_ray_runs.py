"""Runs on a Ray cluster of several nodes: started, followed, cancelled, and their nodes killed."""

import contextlib
import os
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch
from safetensors.torch import load_file

import finetuner
from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.excepts import ConfigError, DataError, ServerError
from finetuner.runs.dispatcher import Dispatcher
from finetuner.runs.workspace import Workspace
from tests.conftest import make_picture_docs
from tests.integration.test_parallel_runs import PICTURES, text_image_run
from tests.ray_nodes import RayNodes
from tests.unit.bulk_cases import write_text_artifact

# each takes as long as a run; ten once in a while: RAY_KILLS=10
KILLS = int(os.environ.get('RAY_KILLS', '1'))
# so does each of these: RAY_LOSSES=CLIPLoss,NTXentLoss,ProxyAnchorLoss,SupConLoss,TripletMarginLoss
LOSSES = os.environ.get('RAY_LOSSES', 'ProxyAnchorLoss').split(',')
pytestmark = pytest.mark.timeout(1200 + 120 * KILLS)
PARAMETERS = {
    **PICTURES,
    'epochs': 16,
    'checkpoint_seconds': 0.2,
    'num_workers': 0,
    'augmentation': 'light',
}


@pytest.fixture(scope='module')
def cluster():
    """A head that does no work; nodes come and go."""
    with RayNodes() as nodes:
        yield nodes


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('ray') / 'home'


@pytest.fixture
def client(cluster, home, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('FINETUNER_HOME', str(home))
    monkeypatch.setenv('FINETUNER_LAUNCHER', 'ray')
    monkeypatch.setenv('FINETUNER_RAY_ADDRESS', cluster.jobs_address)
    client = LocalClient(Settings.from_environment())
    yield client
    client.close()


def start(client, name, **parameters):
    data = {'train_data': make_picture_docs()}
    data |= {key: parameters.pop(key) for key in ('train_data', 'eval_data') if key in parameters}
    if parameters.get('callbacks'):
        data['callbacks.0.query_data'] = make_picture_docs(items_per_class=2, seed=1)
    return client.fit({**PARAMETERS, 'run_name': name, **parameters}, data)['name']


def record(client, name):
    return client._workspace.runs.get_run('default', name)


def last_words(client, run):
    return client._workspace.launcher.last_words(run.worker, run.id)


def log(client, name):
    return str(client.get_run_logs('default', name))


def wait_for(client, name, condition, seconds=400):
    began = looked = time.monotonic()
    while not condition(run := record(client, name)):
        assert run.is_going, (run.details, log(client, name))
        assert time.monotonic() - began < seconds, (run, last_words(client, run))
        if time.monotonic() - looked > 10:
            # a job that is gone without a word is found by those who look
            looked = time.monotonic()
            client._workspace.settle(run)
        time.sleep(0.1)
    return run


def finished(client, name, seconds=400):
    run = wait_for(client, name, lambda run: not run.is_going, seconds)
    assert (run.status, run.details) == ('FINISHED', ''), log(client, name)
    launcher = client._workspace.launcher
    if launcher.name_of(run.worker).startswith('Ray job'):
        wait_for_end(launcher, run.worker)
        # Ray's own process of the job, too, has ended as it should
        assert 'command failed' not in launcher.last_words(run.worker, run.id)
    return run


def wait_for_end(launcher, job):
    deadline = time.monotonic() + 60
    while launcher.is_alive(job):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def in_training(run):
    """Some epochs are done, and so there is a checkpoint."""
    return run.progress.get('epoch', 0) >= 3


def outcome(client, run):
    found = client.find_artifact(run.artifact_id).rglob('*.safetensors')
    weights = {
        f'{path.name} {name}': value for path in found for name, value in load_file(path).items()
    }
    return weights, client.get_run_metrics('default', run.name)


def assert_same(found, expected):
    assert found[1] == expected[1], 'metrics'
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


EVALUATED = {'callbacks': [{'name': 'EvaluationCallback', 'options': {'limit': 3}}]}


def test_runs_go_on_elsewhere_when_their_node_is_killed(client, cluster):
    node = cluster.add(1)
    start(client, 'undisturbed', **EVALUATED)
    expected = outcome(client, finished(client, 'undisturbed'))
    for number in range(KILLS):
        name = start(client, f'killed-{number}', **EVALUATED)
        # on the one node that there is; the other is there in time, so that nothing waits for it
        wait_for(client, name, lambda run: run.status == 'STARTED')
        other = cluster.add(1)
        wait_for(client, name, in_training)
        cluster.kill(node)
        node = other
        run = finished(client, name)
        assert run.retries == 1
        assert 'a node of the run was lost' in log(client, name)
        assert 'Going on from the checkpoint' in log(client, name)
        assert_same(outcome(client, run), expected)
    cluster.kill(node)


def test_two_nodes_train_to_the_weights_of_one_process_and_go_on_when_one_is_killed(
    client, cluster
):
    nodes = [cluster.add(1), cluster.add(1)]
    # errors of rounding grow with the rate and the steps; each process varies pictures in its own way
    gently = {**EVALUATED, 'learning_rate': 0.0005, 'augmentation': 'none'}
    start(client, 'one-process', **gently)
    expected, _ = outcome(client, finished(client, 'one-process'))
    start(client, 'two-nodes', **gently, num_processes=2, num_nodes=2)
    wait_for(client, 'two-nodes', lambda run: run.status == 'STARTED')
    nodes.append(cluster.add(1))
    wait_for(client, 'two-nodes', in_training)
    cluster.kill(nodes[1])
    run = finished(client, 'two-nodes')
    assert '2 processes train together' in log(client, 'two-nodes')
    assert run.retries == 1
    found, _ = outcome(client, run)
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
    for node in (nodes[0], nodes[2]):
        cluster.kill(node)


@pytest.mark.parametrize('loss', LOSSES)
def test_two_nodes_train_to_the_weights_of_one_process(
    loss, client, cluster, monkeypatch, tmp_path
):
    balanced = {**EVALUATED, 'batch_size': 8, 'num_items_per_class': 2, 'sampler': 'auto'}
    with_parameters = {'loss_optimizer': 'SGD'} if loss == 'ProxyAnchorLoss' else {}
    given = text_image_run(tmp_path) if loss == 'CLIPLoss' else balanced | with_parameters
    given |= {'loss': loss, 'epochs': 2, 'learning_rate': 0.0005, 'augmentation': 'none'}
    monkeypatch.setenv('FINETUNER_LAUNCHER', 'process')
    here = LocalClient(Settings.from_environment())
    start(here, f'{loss}-here', **given)
    nodes = [cluster.add(1), cluster.add(1)]
    start(client, f'{loss}-there', **given, num_processes=2, num_nodes=2)
    expected, metrics = outcome(here, finished(here, f'{loss}-here'))
    here.close()
    found, found_metrics = outcome(client, finished(client, f'{loss}-there'))
    assert '2 processes train together' in log(client, f'{loss}-there')
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
    assert found_metrics == metrics
    assert metrics or loss == 'CLIPLoss'
    for node in nodes:
        cluster.kill(node)


def test_a_run_that_fails_in_one_of_its_processes_says_so_and_is_not_tried_again(client, cluster):
    nodes = [cluster.add(1), cluster.add(1)]
    name = start(client, 'too-fast', learning_rate=1e30, num_processes=2, num_nodes=2)
    run = wait_for(client, name, lambda run: not run.is_going)
    assert (run.status, run.retries) == ('FAILED', 0)
    assert 'the loss became' in run.details
    for node in nodes:
        cluster.kill(node)


def test_a_run_is_cancelled_and_gone_with_its_processes(client, cluster):
    node = cluster.add(1)
    name = start(client, 'cancelled', epochs=5000)
    wait_for(client, name, in_training)
    job = record(client, name).worker
    began = time.monotonic()
    assert client.cancel_run('default', name)['status'] == 'FAILED'
    assert record(client, name).details == 'cancelled'
    assert time.monotonic() - began < 30
    wait_for_end(client._workspace.launcher, job)
    assert not workers_of(client, name)
    cluster.kill(node)


def workers_of(client, name):
    run_id = str(record(client, name).id)
    home = client.settings.home
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = each.environ().get('FINETUNER_HOME') == str(home)
            if ours and each.cmdline()[-2:] == ['finetuner.runs.worker', run_id]:
                found.append(each)
    return found


def test_a_queue_sends_its_runs_to_the_cluster_and_the_next_server_finds_them(client, cluster):
    node = cluster.add(1)
    queued = LocalClient(client.settings, max_retries=3)
    dispatchers = [Dispatcher(Workspace(client.settings), 1) for _ in range(2)]
    names = [start(queued, f'queued-{number}') for number in range(2)]
    dispatchers[0].start()
    wait_for(client, names[0], lambda run: run.status == 'STARTED')
    dispatchers[0].drain()
    assert record(client, names[0]).is_going, 'a job does not end with its server'
    dispatchers[1].start()
    for name in names:
        finished(client, name)
    dispatchers[1].drain()
    queued.close()
    cluster.kill(node)


def test_wrong_tokens_addresses_and_names_are_said_at_the_door(client, cluster, monkeypatch):
    def refused(error, words, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(error, match=words):
            start(LocalClient(Settings.from_environment()), 'refused')

    refused(ServerError, 'no Ray cluster answers', FINETUNER_RAY_ADDRESS='http://127.0.0.1:1')
    refused(ConfigError, 'no address of the jobs API', FINETUNER_RAY_ADDRESS='127.0.0.1:6379')
    refused(ConfigError, 'needs FINETUNER_RAY_ADDRESS', FINETUNER_RAY_ADDRESS=' ')
    refused(
        ConfigError,
        'FINETUNER_RAY_CPUS=.many',
        FINETUNER_RAY_ADDRESS=cluster.jobs_address,
        FINETUNER_RAY_CPUS='many',
    )
    refused(ConfigError, "unknown FINETUNER_LAUNCHER 'slurm'", FINETUNER_LAUNCHER='slurm')
    monkeypatch.undo()
    assert [run['name'] for run in client.list_runs(None, 1, 50)].count('refused') == 0


def test_a_wrong_token_is_refused(cluster):
    program = (
        'from finetuner.ray_cluster import jobs_client\n'
        'from finetuner.excepts import ServerError\n'
        f'try:\n    jobs_client({cluster.jobs_address!r})\n'
        'except ServerError as error:\n    print(error)\n'
    )
    environment = {**os.environ, **cluster.environment, 'RAY_AUTH_TOKEN': 'another'}
    done = subprocess.run(
        [sys.executable, '-c', program], env=environment, capture_output=True, text=True
    )
    assert 'RAY_AUTH_TOKEN' in done.stdout, done.stderr


def test_a_data_set_is_encoded_by_a_job_submitted_from_outside(client, cluster, tmp_path):
    node = cluster.add(2)
    artifact = write_text_artifact(tmp_path)
    texts = tmp_path / 'texts.jsonl'
    texts.write_text(''.join(f'{{"text": "red shoe {n}"}}\n' for n in range(50)))
    encode = partial(finetuner.encode_dataset, rows_per_shard=10, artifact=artifact)
    seen = encode(texts, tmp_path / 'out', num_workers=2, ray_address=cluster.jobs_address)
    assert (seen.num_rows, seen.num_shards, seen.missing) == (50, 5, ())
    encode(texts, tmp_path / 'here')
    for path in (tmp_path / 'here').glob('part-*.parquet'):
        assert path.read_bytes() == (tmp_path / 'out' / path.name).read_bytes()
    with pytest.raises(DataError, match='nothing'):
        encode(tmp_path / 'nothing.jsonl', tmp_path / 'no', ray_address=cluster.jobs_address)
    cluster.kill(node)
