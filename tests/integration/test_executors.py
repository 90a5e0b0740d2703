"""Both Executors behind the real Flow: /fit and the run endpoints, /encode in every way it is asked."""

import base64
import concurrent.futures
import io
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from docarray import DocumentArray
from jina.excepts import BadServer

import finetuner
from examples.emoji_data import load_emoji
from finetuner.inference import load_engine
from finetuner.server.requests import data_request, fit_request
from tests.integration.serving import REPOSITORY, Server, serve

FLOW = (REPOSITORY / 'flows' / 'train-and-encode.yml').read_text()
QUICK = {
    'model': 'efficientnet-lite0',
    'model_options': {'input_size': 32},
    'epochs': 1,
    'batch_size': 8,
    'num_workers': 0,
    'device': 'cpu',
}


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with serve(FLOW, tmp_path_factory.mktemp('server'), FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture(scope='module')
def client(server: Server):
    return server.client()


@pytest.fixture(scope='module')
def pictures() -> DocumentArray:
    return load_emoji('test', blobs=True)[:12]


@pytest.fixture(scope='module')
def finished(client) -> dict:
    """Tags of a small run with everything, over gRPC, from Documents pushed by name."""
    client.post(**data_request('tiny', load_emoji('train', blobs=True)[:40]))
    client.post(**data_request('few', load_emoji('test', blobs=True)[:12]))
    callback = {
        'name': 'EvaluationCallback',
        'options': {'query_data': 'few', 'limit': 3, 'gather_examples': True},
    }
    parameters = {**QUICK, 'to_onnx': True, 'callbacks': [callback], 'wait': True}
    answer = client.post(**fit_request('tiny', {**parameters, 'run_name': 'small'}))
    assert len(answer) == 1
    assert answer[0].tags['status'] == 'FINISHED', answer[0].tags
    return answer[0].tags


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    scale = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / scale


def as_json(docs: DocumentArray) -> list[dict]:
    return [{'blob': base64.b64encode(doc.blob).decode()} for doc in docs]


def runs_of(client, experiment: str) -> list[dict]:
    return [doc.tags for doc in client.post('/runs', parameters={'experiment': experiment})]


# /encode


def test_every_way_to_ask_gives_the_same_vectors(server: Server, client, pictures):
    expected = finetuner.encode(
        finetuner.build_model('efficientnet-lite0'), DocumentArray(pictures, copy=True)
    ).embeddings
    over_grpc = client.post('/encode', pictures, results_in_order=True)
    over_http = server.client('http').post('/encode', pictures)
    curled = server.post('/encode', {'data': as_json(pictures)}).json()['data']
    for vectors in (
        over_grpc.embeddings,
        over_http.embeddings,
        np.array([doc['embedding'] for doc in curled]),
    ):
        assert vectors.shape == (12, 1280)
        assert cosines(expected, vectors).min() > 0.9999


def test_contents_come_back_only_when_asked_for(client, pictures):
    plain = client.post('/encode', pictures)
    assert plain[:, 'id'] == pictures[:, 'id']
    assert plain[0].blob == b''
    assert plain[0].tags['concept'] == pictures[0].tags['concept']
    whole = client.post('/encode', pictures, parameters={'return_contents': True})
    assert whole[0].blob == pictures[0].blob
    assert whole[0].embedding is not None


def test_a_document_that_fails_leaves_its_neighbours_alone(client, pictures):
    spoilt = DocumentArray(pictures[:6], copy=True)
    spoilt[1].blob = b'no picture'
    spoilt[3].blob = b''
    spoilt[4].blob, spoilt[4].uri = b'', '/etc/hostname'
    alone = client.post('/encode', DocumentArray([pictures[i] for i in (0, 2, 5)]))
    answer = client.post('/encode', spoilt)
    for position, expected in zip((0, 2, 5), alone, strict=True):
        np.testing.assert_allclose(answer[position].embedding, expected.embedding, atol=1e-5)
        assert 'finetuner_error' not in answer[position].tags
    for position, words in ((1, 'Document 1'), (3, 'empty'), (4, 'not opened here')):
        assert answer[position].embedding is None
        assert words in answer[position].tags['finetuner_error']


def test_a_request_that_fails_whole_or_asks_for_it_is_a_client_error(server: Server, pictures):
    bad = {'blob': base64.b64encode(b'no picture').decode()}
    answer = server.post('/encode', {'data': [bad, {'uri': 'http://127.0.0.1:1/a.png'}]})
    assert answer.status_code == 422
    assert 'Document 0' in answer.json()['message']
    assert 'Document 1' in answer.json()['message']
    mixed = {'data': [*as_json(pictures[:1]), bad], 'parameters': {'on_error': 'raise'}}
    answer = server.post('/encode', mixed)
    assert answer.status_code == 422
    assert 'Document 1' in answer.json()['message']
    assert server.post('/encode', {'data': []}).json()['data'] == []


@pytest.mark.parametrize(
    ('parameters', 'status', 'words'),
    [
        ({'batchsize': 4}, 422, "did you mean 'batch_size'"),
        ({'batch_size': 0}, 422, "'batch_size' is 0: it takes 1 or more"),
        ({'batch_size': 1.5}, 422, 'whole number'),
        ({'return_contents': 'yes'}, 422, 'true or false'),
        ({'on_error': 'ignore'}, 422, 'mark, raise'),
        ({'artifact': 'efficientnet-lite'}, 422, "did you mean 'efficientnet-lite0'"),
        ({'artifact': '/etc'}, 422, 'unknown artifact'),
        ({'artifact': '../../home'}, 422, 'unknown artifact'),
        ({'artifact': '0' * 24}, 404, '0' * 24),
    ],
)
def test_wrong_parameters_of_encode(server: Server, pictures, parameters, status, words):
    answer = server.post('/encode', {'data': as_json(pictures[:1]), 'parameters': parameters})
    assert (answer.status_code, words in answer.json()['message']) == (status, True), answer.text


def test_info(client):
    tags = client.post('/info')[0].tags
    assert (tags['model'], tags['dimension']) == ('efficientnet-lite0', 1280)


# /fit at the door


def test_a_thousand_documents_are_one_run(client):
    docs = load_emoji('train', blobs=True)
    assert len(docs) == 1000
    request = fit_request(docs, {**QUICK, 'experiment_name': 'thousand'})
    answer = client.post(**{**request, 'request_size': 100})
    assert len(answer) == 1
    tags = answer[0].tags
    assert set(tags) == {'run', 'experiment', 'status', 'artifact_id'}
    client.post('/cancel', parameters={'run': tags['run'], 'experiment': 'thousand'})
    assert [run['run'] for run in runs_of(client, 'thousand')] == [tags['run']]


def test_who_does_not_say_how_many_is_told_so_and_starts_nothing(server: Server, client):
    docs = load_emoji('train', blobs=True)[:120]
    parameters = {**QUICK, 'experiment_name': 'nothing'}
    with pytest.raises(BadServer, match=r'total.* is missing'):
        client.post('/fit', docs, parameters=parameters)
    with pytest.raises(BadServer, match='100 of total=120'):
        client.post('/fit', docs, parameters={**parameters, 'total': 120})
    answer = server.post('/fit', {'data': as_json(docs[:8]), 'parameters': parameters})
    assert answer.status_code == 422
    assert 'fit_request' in answer.json()['message']
    assert server.post('/runs', {'parameters': {'experiment': 'nothing'}}).status_code == 404


@pytest.mark.parametrize(
    ('parameters', 'status', 'words'),
    [
        ({'epoch': 5}, 422, "did you mean 'epochs'"),
        ({'epochs': 1.5}, 422, 'whole number'),
        ({'model': 'resnet5'}, 422, "'resnet50'"),
        ({'loss': 'TripletMarginLos'}, 422, "'TripletMarginLoss'"),
        ({'optimizer': 'Adm'}, 422, "'Adam'"),
        ({'model_options': {'weights': '/etc/passwd'}}, 422, 'reads no file'),
        ({'model_artifact': '/etc/passwd'}, 404, 'not the id of an artifact'),
        (
            {'callbacks': [{'name': 'TensorBoardLogger', 'options': {'log_dir': '/etc'}}]},
            422,
            'writes to no place',
        ),
        (
            {'callbacks': [{'name': 'WandBLogger', 'options': {'wandb_args': {'dir': '/etc'}}}]},
            422,
            "cannot give 'dir'",
        ),
        ({'train_data': 'nowhere'}, 422, 'one of the two'),
        ({'wait': 'yes'}, 422, 'true or false'),
        ({'total': 'many'}, 422, 'whole number'),
    ],
)
def test_wrong_parameters_of_fit_start_nothing(server: Server, parameters, status, words):
    docs = as_json(load_emoji('train', blobs=True)[:16])
    for number, doc in enumerate(docs):
        doc['tags'] = {'finetuner_label': number // 4}
    given = {**QUICK, 'experiment_name': 'wrong', 'total': 16, **parameters}
    answer = server.post('/fit', {'data': docs, 'parameters': given})
    assert (answer.status_code, words in answer.json()['message']) == (status, True), answer.text
    assert server.post('/runs', {'parameters': {'experiment': 'wrong'}}).status_code == 404


def test_wrong_documents_start_nothing(server: Server):
    docs = as_json(load_emoji('train', blobs=True)[:16])
    for number, doc in enumerate(docs):
        doc['tags'] = {'finetuner_label': number // 4}
    parameters = {**QUICK, 'experiment_name': 'bad', 'total': 16}

    def refusal(changed: list[dict]) -> str:
        answer = server.post('/fit', {'data': changed, 'parameters': parameters})
        assert answer.status_code == 422, answer.text
        return answer.json()['message']

    unlabelled = [*docs[:5], {'blob': docs[5]['blob']}, *docs[6:]]
    assert 'Document 5' in refusal(unlabelled)
    unreadable = [*docs[:7], {**docs[7], 'blob': 'AAAA'}, *docs[8:]]
    assert 'Document 7' in refusal(unreadable)
    elsewhere = [*docs[:9], {'uri': '/etc/passwd', 'tags': docs[9]['tags']}, *docs[10:]]
    assert 'Document 9' in refusal(elsewhere)
    assert 'opens no uri' in refusal(elsewhere)
    refusal([{**doc, 'tags': {'finetuner_label': 1}} for doc in docs])
    named = server.post('/fit', {'parameters': {**QUICK, 'train_data': 'nowhere'}})
    assert named.status_code == 404
    assert server.post('/fit', {'parameters': QUICK}).status_code == 422
    assert server.post('/runs', {'parameters': {'experiment': 'bad'}}).status_code == 404


def test_labels_0_and_1_over_http_are_two_classes(server: Server, client):
    docs = as_json(load_emoji('train', blobs=True)[:8])
    for number, doc in enumerate(docs):
        doc['tags'] = {'finetuner_label': number // 4}
    parameters = {**QUICK, 'experiment_name': 'http', 'total': 8, 'wait': True}
    answer = server.post('/fit', {'data': docs, 'parameters': parameters})
    assert answer.status_code == 200, answer.text
    assert answer.json()['data'][0]['tags']['status'] == 'FINISHED'
    # Jina's own client makes false and true of them
    sent = DocumentArray(load_emoji('train', blobs=True)[:8])
    for number, doc in enumerate(sent):
        doc.tags = {'finetuner_label': number // 4}
    request = fit_request(sent, {**QUICK, 'experiment_name': 'http', 'wait': True})
    assert server.client('http').post(**request)[0].tags['status'] == 'FINISHED'


# runs


def test_others_are_answered_while_fit_waits(client, server: Server):
    docs = load_emoji('train', blobs=True)[:200]
    request = fit_request(docs, {**QUICK, 'epochs': 50, 'run_name': 'long', 'wait': True})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        fit = pool.submit(lambda: server.client().post(**request))
        until = time.monotonic() + 60
        while time.monotonic() < until:
            answer = server.post('/status', {'parameters': {'run': 'long'}})
            if (
                answer.status_code == 200
                and answer.json()['data'][0]['tags']['status'] != 'CREATED'
            ):
                break
            time.sleep(0.1)
        assert not fit.done()
        took = []
        for path, parameters in (('/status', {'run': 'long'}), ('/runs', {}), ('/info', {})):
            start = time.monotonic()
            assert server.post(path, {'parameters': parameters}).status_code == 200
            took.append(time.monotonic() - start)
        assert max(took) < 3
        assert not fit.done()
        going = server.post('/delete', {'parameters': {'run': 'long'}})
        assert going.status_code == 409
        assert server.post('/cancel', {'parameters': {'run': 'long'}}).status_code == 200
        tags = fit.result(30)[0].tags
    assert tags['status'] == 'FAILED'
    assert 'cancel' in tags['details']
    assert server.post('/delete', {'parameters': {'run': 'long'}}).status_code == 200
    assert server.post('/status', {'parameters': {'run': 'long'}}).status_code == 404


def test_status_logs_metrics_and_examples(client, finished):
    run = {'run': 'small'}
    status = client.post('/status', parameters=run)[0].tags
    assert status['status'] == 'FINISHED'
    assert status['artifact_id'] == finished['artifact_id']
    assert status['config']['epochs'] == 1
    whole = client.post('/logs', parameters=run)[0]
    assert whole.text
    assert whole.tags['ended'] is True
    rest = client.post('/logs', parameters={**run, 'after': whole.tags['last']})[0]
    assert rest.text == ''
    assert rest.tags['last'] == whole.tags['last']
    metrics = client.post('/metrics', parameters=run)[0].tags
    assert set(metrics) == {'before', 'after', 'p_value'}
    assert all(any('recall' in name for name in metrics[stage]) for stage in metrics)
    assert set(client.post('/examples', parameters=run)[0].tags) == {'before', 'after'}


def test_the_artifact_comes_home_and_encodes_like_the_server(
    client, server: Server, finished, pictures, tmp_path
):
    fetched = client.post('/artifact', parameters={'run': 'small'})[0]
    assert fetched.tags['artifact_id'] == finished['artifact_id']
    assert fetched.tags['file_name'] == 'small.zip'
    assert 'artifact.json' in str(zipfile.ZipFile(io.BytesIO(fetched.blob)).namelist())
    archive = tmp_path / 'small.zip'
    archive.write_bytes(fetched.blob)
    by_id = client.post('/artifact', parameters={'artifact_id': finished['artifact_id']})[0]
    assert len(by_id.blob) > 0
    served = client.post(
        '/encode', pictures, parameters={'artifact': finished['artifact_id']}
    ).embeddings
    for is_onnx in (True, False):
        own = DocumentArray(pictures, copy=True)
        assert load_engine(archive, is_onnx=is_onnx).encode_documents(own) == []
        assert cosines(own.embeddings, served).min() > 0.9999


@pytest.mark.parametrize(
    'path', ['/status', '/logs', '/metrics', '/artifact', '/cancel', '/resume', '/delete']
)
def test_unknown_runs_are_404_and_a_run_is_needed(server: Server, finished, path):
    answer = server.post(path, {'parameters': {'run': 'smal'}})
    assert answer.status_code == 404
    assert "'small'" in answer.json()['message']
    assert server.post(path).status_code == 422
    wrong = server.post(path, {'parameters': {'run_nam': 'small'}})
    assert "did you mean 'run'" in wrong.json()['message']


def test_files_stay_within_the_home(server: Server, finished):
    home = Path(server.log).parent / 'home'
    assert list((home / 'uploads').iterdir()) == []
