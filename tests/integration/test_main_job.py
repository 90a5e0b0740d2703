"""The main job on real processes: /fit, artifact, ONNX, Flow; and what happens when it goes wrong."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from docarray import DocumentArray
from emoji_data import load_emoji, load_emoji_queries_and_index
from jina import Flow

import finetuner
from finetuner.client import get_client
from finetuner.excepts import ArtifactError, NotFoundError, RunFailedError
from finetuner.server import FinetunerExecutor, data_request, fit_request
from tests.integration.serving import REPOSITORY, Server, serve
from tests.scripts import run_script

# training takes two minutes by itself, and longer beside other tests
pytestmark = pytest.mark.timeout(900)

MODEL = 'efficientnet-lite0'
NUM_CONCEPTS, NUM_TEST_CONCEPTS = 120, 250
# as `examples/demo.py`, on smaller pictures of fewer concepts, from which less can be learned
RECIPE = {
    'model': MODEL,
    'model_options': {'input_size': 64},
    'loss': 'MultiSimilarityLoss',
    'loss_options': {'alpha': 2, 'beta': 50, 'base': 0.5},
    'optimizer': 'AdamW',
    'learning_rate': 3e-4,
    'scheduler': 'cosine',
    'scheduler_options': {'num_warmup_steps': 0.15},
    'batch_size': 64,
    'epochs': 3,
    'num_workers': 0,
    'callbacks': [
        {
            'name': 'EvaluationCallback',
            'options': {'query_data': 'queries', 'index_data': 'index', 'limit': 3},
        }
    ],
}
QUICK = {
    'model': MODEL,
    'model_options': {'input_size': 32},
    'epochs': 1,
    'batch_size': 8,
    'num_workers': 0,
    'device': 'cpu',
}


@pytest.fixture(autouse=True, scope='module')
def finetuner_home(tmp_path_factory):
    """One home for this module: its tests look at the same runs."""
    home = tmp_path_factory.mktemp('main-job')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FINETUNER_HOME', str(home))
        patch.setenv('PYTHONPATH', str(REPOSITORY))
        yield home


@pytest.fixture(scope='module')
def server(finetuner_home, tmp_path_factory):
    flow = (REPOSITORY / 'flows' / 'train-and-encode.yml').read_text()
    folder = tmp_path_factory.mktemp('server')
    with serve(
        flow, folder, FINETUNER_HOME=str(finetuner_home), FINETUNER_TOKEN='', OMP_NUM_THREADS='2'
    ) as running:
        yield running


@pytest.fixture(scope='module')
def run(server: Server) -> finetuner.run.Run:
    """A run started over gRPC, waited for here, by its name."""
    queries, index = load_emoji_queries_and_index('test')
    client = server.client()
    client.post(**data_request('queries', queries[:NUM_TEST_CONCEPTS]))
    client.post(**data_request('index', index[: 3 * NUM_TEST_CONCEPTS]))
    started = client.post(**fit_request(load_emoji('train')[: 4 * NUM_CONCEPTS], RECIPE))[0].tags
    run = finetuner.get_run(started['run'])
    messages = list(run.stream_logs())
    assert run.status()['status'] == 'FINISHED', messages
    assert run.artifact_id == started['artifact_id']
    return run


@pytest.fixture(scope='module')
def artifact(run) -> Path:
    return get_client().find_artifact(run.artifact_id)


@pytest.fixture(scope='module')
def pictures() -> DocumentArray:
    """Twelve pictures the run has not seen, as the bytes of their files."""
    return load_emoji('test', blobs=True)[200:248:4]


@pytest.fixture(scope='module')
def expected(run, pictures) -> np.ndarray:
    """Their embeddings by torch, in this process."""
    model = finetuner.get_model(run.artifact_id, is_onnx=False)
    assert not model.is_onnx
    return finetuner.encode(model, DocumentArray(pictures, copy=True)).embeddings


def assert_same(vectors: np.ndarray, expected: np.ndarray) -> None:
    assert vectors.shape == expected.shape == (12, 1280)
    scale = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((vectors * expected).sum(axis=1) / scale).min() >= 0.9999


# /fit, and what it leaves


def test_fine_tuning_finds_more(run):
    metrics = run.metrics()
    before, after = (metrics[stage][f'{MODEL}_recall_at_k'] for stage in ('before', 'after'))
    assert after >= before + 0.06
    assert metrics['after'][f'{MODEL}_average_precision'] > 0.5


def test_the_metrics_are_those_of_the_model(run):
    """The run's last evaluation, worked out again from the artifact by docarray."""
    queries, index = load_emoji_queries_and_index('test')
    queries, index = queries[:NUM_TEST_CONCEPTS], index[: 3 * NUM_TEST_CONCEPTS]
    model = finetuner.get_model(run.artifact_id)
    finetuner.encode(model, queries)
    finetuner.encode(model, index)
    queries.match(index, limit=3)
    found = [
        sum(match.tags['concept'] == query.tags['concept'] for match in query.matches) / 3
        for query in queries
    ]
    assert np.mean(found) == pytest.approx(run.metrics()['after'][f'{MODEL}_recall_at_k'], abs=0.01)


def test_one_post_was_one_run_on_all_documents(run):
    assert [other.name for other in finetuner.list_runs()] == [run.name]
    assert f'Training on {4 * NUM_CONCEPTS} Documents' in run.logs()


def test_the_artifact_is_plain_files_that_know_their_run(run, artifact, tmp_path):
    names = {path.name for path in artifact.iterdir()}
    assert names == {'artifact.json', 'model.safetensors', 'model.onnx', 'README.md'}
    described = json.loads((artifact / 'artifact.json').read_text())
    assert set(described['files']) == names - {'artifact.json'}
    assert described['metrics'] == run.metrics()
    archive = run.save_artifact(str(tmp_path))
    assert finetuner.get_model(archive).dimension == 1280


# one picture, one vector


def test_onnx_gives_the_same_vectors(run, pictures, expected):
    model = finetuner.get_model(run.artifact_id, is_onnx=True)
    assert model.is_onnx
    assert_same(finetuner.encode(model, DocumentArray(pictures, copy=True)).embeddings, expected)
    paths = [doc.tags['file'] for doc in pictures]
    assert_same(finetuner.encode(model, paths), expected)


def test_the_model_is_another_than_the_pretrained(pictures, expected):
    pretrained = finetuner.build_model(MODEL, RECIPE['model_options'])
    vectors = finetuner.encode(pretrained, DocumentArray(pictures, copy=True)).embeddings
    with pytest.raises(AssertionError):
        assert_same(vectors, expected)


@pytest.mark.parametrize('protocol', ['grpc', 'http'])
def test_jinas_client_gets_the_same_vectors(server: Server, run, pictures, expected, protocol):
    answer = server.client(protocol).post(
        '/encode', pictures, parameters={'artifact': run.artifact_id}
    )
    assert answer[:, 'id'] == pictures[:, 'id']
    assert_same(answer.embeddings, expected)


@pytest.mark.parametrize('path', ['/encode', '/post'])
def test_json_gets_the_same_vectors(server: Server, run, pictures, expected, path):
    """What curl sends: base64 in JSON."""
    body = {
        'data': [{'blob': base64.b64encode(doc.blob).decode()} for doc in pictures],
        'parameters': {'artifact': run.artifact_id},
    }
    if path == '/post':
        body['exec_endpoint'] = '/encode'
    answer = server.post(path, body)
    assert answer.status_code == 200
    assert_same(np.array([doc['embedding'] for doc in answer.json()['data']]), expected)


FLOW_SCRIPT = """
import numpy as np
from docarray import DocumentArray
from jina import Flow

from finetuner.server import FinetunerExecutor

pictures = DocumentArray.load_binary({pictures!r}, protocol='protobuf')
flow = Flow(host='127.0.0.1').add(uses={uses}, uses_with={{'artifact': {artifact!r}}})
with flow:
    np.save({vectors!r}, flow.post('/encode', pictures, results_in_order=True).embeddings)
"""


@pytest.mark.parametrize('uses', ['FinetunerExecutor', "'executors/encoder/config.yml'"])
def test_a_flow_of_ones_own_gets_the_same_vectors(run, pictures, expected, uses, tmp_path):
    sent, vectors = str(tmp_path / 'pictures'), str(tmp_path / 'vectors.npy')
    pictures.save_binary(sent, protocol='protobuf')
    run_script(
        FLOW_SCRIPT.format(uses=uses, artifact=run.artifact_id, pictures=sent, vectors=vectors)
    )
    assert_same(np.load(vectors), expected)


# what goes wrong


@pytest.mark.parametrize('path', sorted(REPOSITORY.glob('flows/*.yml')), ids=lambda path: path.name)
def test_a_slow_request_after_a_pause_keeps_its_connection(path):
    """Three pings in silence, and gRPC answers the next request with "too many pings"."""
    flow = Flow.load_config(str(path))
    for name, deployment in flow:
        assert deployment.args.grpc_server_options == {'grpc.http2.max_ping_strikes': 0}, name


def spoil(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('name', ['model.safetensors', 'model.onnx', 'README.md'])
def test_a_tampered_artifact_is_refused(artifact, tmp_path, name):
    copy = tmp_path / 'copy'
    shutil.copytree(artifact, copy)
    assert finetuner.get_model(copy).dimension == 1280
    spoil(copy / name)
    for load in (finetuner.get_model, lambda path: FinetunerExecutor(artifact=str(path))):
        with pytest.raises(ArtifactError, match=name):
            load(copy)


SCRIPT = f"""
import finetuner
from emoji_data import load_emoji

run = finetuner.fit(train_data=load_emoji('train')[:40], run_name='of-a-script', **{QUICK!r})
print(run.status()['status'])
"""


@pytest.fixture(scope='module')
def two_runs():
    """One of this process and one of a script that is gone: at work at the same time."""
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(REPOSITORY), str(REPOSITORY / 'examples')]),
    }
    script = subprocess.Popen(
        [sys.executable, '-c', SCRIPT], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert script.stdout.readline().strip() in ('CREATED', 'STARTED')
    ours = finetuner.fit(train_data=load_emoji('train')[:40], run_name='ours', **QUICK)
    script.communicate(timeout=60)
    assert script.returncode == 0
    runs = [ours, finetuner.get_run('of-a-script')]
    for run in runs:
        for _ in run.stream_logs():
            pass
    return runs


def test_two_runs_at_once_both_finish_and_one_outlives_its_script(two_runs):
    ours, of_a_script = two_runs
    for run in two_runs:
        assert run.status()['status'] == 'FINISHED', run.logs()
        assert finetuner.get_model(run.artifact_id).dimension == 1280
    first, second = (get_client().get_run('default', run.name) for run in (ours, of_a_script))
    assert first['artifact_id'] != second['artifact_id']
    overlap = min(first['finished_at'], second['finished_at']) > max(
        first['created_at'], second['created_at']
    )
    assert overlap
    # the same data, config and seed: the same model
    vectors = [
        finetuner.encode(finetuner.get_model(run.artifact_id), [load_emoji('test')[0].uri])
        for run in two_runs
    ]
    np.testing.assert_allclose(*vectors, rtol=1e-3, atol=1e-3)


def test_a_tampered_artifact_is_refused_by_the_server(two_runs, server: Server, pictures):
    ours, _ = two_runs
    artifact = get_client().find_artifact(ours.artifact_id)
    body = {
        'data': [{'blob': base64.b64encode(pictures[0].blob).decode()}],
        'parameters': {'artifact': ours.artifact_id},
    }
    spoil(artifact / 'model.safetensors')
    answer = server.post('/encode', body)
    assert answer.status_code == 422
    assert answer.json()['error'] == 'ArtifactError'
    assert str(artifact) not in answer.text


def test_a_killed_worker_leaves_a_failed_run_and_nothing_else(finetuner_home):
    run = finetuner.fit(train_data=load_emoji('train')[:40], **{**QUICK, 'epochs': 100_000})
    record = get_client()._workspace.runs.get_run('default', run.name)
    until = time.monotonic() + 90
    while not run.progress():
        assert run.status()['status'] in ('CREATED', 'STARTED'), run.status()
        assert time.monotonic() < until
        time.sleep(0.1)
    assert 'finetuner.runs.worker' in ' '.join(psutil.Process(record.worker.pid).cmdline())
    os.kill(record.worker.pid, 9)
    last_lines = list(run.stream_logs())
    status = run.status()
    assert status['status'] == 'FAILED'
    assert f'the worker process {record.worker.pid} ended without finishing' in status['details']
    assert 'signal 9' in status['details']
    assert status['details'] in last_lines[-1]
    with pytest.raises(RunFailedError, match='ended without finishing'):
        _ = run.artifact_id
    with pytest.raises(NotFoundError):
        finetuner.get_model(record.artifact_id)
    assert [path for path in finetuner_home.rglob('*') if record.artifact_id in path.name] == []


def test_a_loss_that_is_no_number_fails_the_run_and_says_so(finetuner_home):
    run = finetuner.fit(
        train_data=load_emoji('train')[:40], **{**QUICK, 'learning_rate': 1e30, 'epochs': 20}
    )
    messages = list(run.stream_logs())
    status = run.status()
    assert status['status'] == 'FAILED'
    assert 'nan' in status['details']
    assert status['details'] in messages[-1]
    artifact_id = get_client().get_run('default', run.name)['artifact_id']
    assert [path for path in finetuner_home.rglob('*') if artifact_id in path.name] == []
