"""Sessions, unlabelled data and scored pairs posted to a real server: runs that finish, or refusals."""

import base64
import json
import time

import httpx
import pytest
from docarray import Document, DocumentArray
from jina.excepts import BadServer

from finetuner.client import LocalClient
from finetuner.data.loading import build_dataset
from finetuner.server.requests import data_request, fit_request
from tests.conftest import make_picture_docs
from tests.integration.serving import REPOSITORY, Server, serve, store_of

FLOW = (REPOSITORY / 'flows' / 'train.yml').read_text()
QUICK = {
    'model': 'mobilenet_v3_small',
    'model_options': {'input_size': 32, 'weights': 'none'},
    'epochs': 1,
    'num_workers': 0,
    'device': 'cpu',
}
LOSSES = {'session': 'TripletMarginLoss', 'instance': 'NTXentLoss'}
LOSSES['scored_pair'] = 'CosineSimilarityLoss'
# more than the 100 that Jina's client puts into one request
NUM_INSTANCES = 104


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with serve(FLOW, tmp_path_factory.mktemp('server'), FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture(scope='module')
def store(server: Server):
    with store_of(server) as client:
        yield client


def pictures(count: int) -> list[bytes]:
    return [doc.blob for doc in make_picture_docs(count, 1, size=16)]


def sessions() -> DocumentArray:
    blobs = pictures(12)
    docs = DocumentArray()
    for number in range(4):
        root, *matches = blobs[3 * number : 3 * number + 3]
        doc = Document(blob=root)
        doc.matches = [
            Document(blob=blob, tags={'finetuner_label': label})
            for blob, label in zip(matches, (1, -1), strict=True)
        ]
        docs.append(doc)
    return docs


def instances() -> DocumentArray:
    return DocumentArray(Document(blob=blob) for blob in pictures(NUM_INSTANCES))


def scored_pairs() -> DocumentArray:
    blobs = pictures(12)
    return DocumentArray(
        Document(
            chunks=[Document(blob=blobs[2 * number]), Document(blob=blobs[2 * number + 1])],
            tags={'finetuner_score': score},
        )
        for number, score in enumerate((0, 1, 0.25, 1, 0, 1))
    )


KINDS = {'session': sessions, 'instance': instances, 'scored_pair': scored_pairs}
EXPECTED = {
    'session': [(session, label) for session in range(4) for label in (0, 1, -1)],
    'instance': list(range(NUM_INSTANCES)),
    'scored_pair': [score for score in (0, 1, 0.25, 1, 0, 1) for _ in range(2)],
}


def as_json(doc: Document) -> dict:
    """A Document as people write it by hand: numbers as they are, bytes in base64."""
    written: dict = {}
    if doc.blob:
        written['blob'] = base64.b64encode(doc.blob).decode()
    if doc.uri:
        written['uri'] = doc.uri
    if doc.tags:
        written['tags'] = doc.tags
    for name in ('matches', 'chunks'):
        if len(getattr(doc, name)):
            written[name] = [as_json(part) for part in getattr(doc, name)]
    return written


def over_grpc(server: Server, docs: DocumentArray, parameters: dict) -> dict:
    given = {**parameters, 'total': len(docs), 'upload': parameters['run_name']}
    answer = server.client().post('/fit', docs, parameters=given, request_size=100)
    assert len(answer) == 1
    return answer[0].tags


def over_http(server: Server, docs: DocumentArray, parameters: dict) -> dict:
    body = {
        'data': [as_json(doc) for doc in docs],
        'parameters': {**parameters, 'total': len(docs)},
    }
    answer = server.post('/fit', body)
    assert answer.status_code == 200, answer.text
    (doc,) = answer.json()['data']
    return doc['tags']


def over_jinas_http(server: Server, docs: DocumentArray, parameters: dict) -> dict:
    """Jina's own HTTP client, which sends 0 and 1 as false and true."""
    return server.client('http').post(**fit_request(docs, parameters))[0].tags


SENDERS = {'grpc': over_grpc, 'http': over_http, 'jinas_http': over_jinas_http}
RUNS = [(kind, way) for kind in KINDS for way in ('grpc', 'http')]
RUNS += [('session', 'jinas_http'), ('scored_pair', 'jinas_http')]


@pytest.fixture(scope='module')
def started(server: Server) -> dict:
    """Tags of the answers to every kind sent in every way, one run beside the other."""
    answers = {}
    for kind, way in RUNS:
        parameters = {**QUICK, 'loss': LOSSES[kind], 'run_name': f'{kind}-{way}'}
        answers[kind, way] = SENDERS[way](server, KINDS[kind](), parameters)
    return answers


def ended(store: LocalClient, name: str, seconds: float = 120) -> dict:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        run = store.get_run('default', name)
        if run['status'] in ('FINISHED', 'FAILED'):
            return run
        time.sleep(0.2)
    raise AssertionError(f'{name} is {run["status"]} after {seconds} s')


@pytest.mark.parametrize(('kind', 'way'), RUNS)
def test_each_kind_sent_in_each_way_becomes_a_run_that_finishes(started, store, kind, way):
    tags = started[kind, way]
    assert tags['run'] == f'{kind}-{way}'
    run = ended(store, tags['run'])
    assert run['status'] == 'FINISHED', store.get_run_logs('default', tags['run'])
    assert run['artifact_id']
    assert 'Epoch 1/1 done' in store.get_run_logs('default', tags['run'])
    assert store.find_artifact(run['artifact_id']).is_dir()


@pytest.mark.parametrize(('kind', 'way'), RUNS)
def test_what_the_labels_say_survives_the_way(started, store, kind, way):
    """HTTP makes true of 1, protobuf 1.0: what is stored is the data that was sent."""
    stored = store.load_data(
        store.get_run('default', started[kind, way]['run'])['config']['train_data']
    )
    assert len(stored) == len(KINDS[kind]())
    dataset = build_dataset(stored)
    assert dataset.kind == kind
    assert dataset.labels == EXPECTED[kind]
    sent = build_dataset(KINDS[kind]())
    assert [content for content, _ in dataset] == [content for content, _ in sent]


def test_one_post_in_several_requests_is_one_run(started, store):
    assert NUM_INSTANCES > 100
    runs = [run['name'] for run in store.list_runs('default')]
    assert sorted(runs) == sorted(f'{kind}-{way}' for kind, way in RUNS)


def test_pushed_data_of_a_kind_is_trained_on_by_name(server: Server, store, started):
    client = server.client()
    client.post(**data_request('clicks', sessions()))
    parameters = {**QUICK, 'run_name': 'pushed', 'wait': True, 'eval_data': 'clicks'}
    tags = client.post(**fit_request('clicks', parameters))[0].tags
    assert tags['status'] == 'FINISHED'
    config = store.get_run('default', 'pushed')['config']
    assert config['train_data'] == config['eval_data']
    same = store.get_run('default', 'session-grpc')['config']['train_data']
    assert len(store.load_data(same)) == len(store.load_data(config['train_data']))


# what is wrong starts nothing


def with_nan_score() -> DocumentArray:
    docs = scored_pairs()
    docs[2].tags = {'finetuner_score': float('nan')}
    return docs


def with_score_above_1() -> DocumentArray:
    docs = scored_pairs()
    docs[2].tags = {'finetuner_score': 2}
    return docs


def with_unlabelled_match() -> DocumentArray:
    docs = sessions()
    docs[2].matches[1].tags = {}
    return docs


def with_match_labelled_0() -> DocumentArray:
    docs = sessions()
    docs[2].matches[1].tags = {'finetuner_label': 0}
    return docs


def with_two_kinds() -> DocumentArray:
    return DocumentArray([*sessions()[:2], *scored_pairs()[:2]])


def with_half_a_pair() -> DocumentArray:
    docs = scored_pairs()
    docs[2].chunks = docs[2].chunks[:1]
    return docs


def with_uri_in_a_match() -> DocumentArray:
    docs = sessions()
    docs[2].matches[1].blob = b''
    docs[2].matches[1].uri = '/etc/hostname'
    return docs


def with_broken_match() -> DocumentArray:
    docs = sessions()
    docs[2].matches[1].blob = b'no picture'
    return docs


WRONG = [
    (with_nan_score, 'CosineSimilarityLoss', 'a tag', 'is NaN'),
    (with_score_above_1, 'CosineSimilarityLoss', 'Document 2', 'not a number from 0 to 1'),
    (with_unlabelled_match, 'TripletMarginLoss', 'Document 2', 'a match has no label'),
    (with_match_labelled_0, 'TripletMarginLoss', 'Document 2', 'labelled 1 (similar'),
    (with_two_kinds, 'TripletMarginLoss', 'Documents 2, 3', 'must be of one kind'),
    (with_half_a_pair, 'CosineSimilarityLoss', 'Document 2', 'two chunks, not 1'),
    (with_uri_in_a_match, 'TripletMarginLoss', 'Document 2', 'opens no uri'),
    (with_broken_match, 'TripletMarginLoss', 'Document 2, match 1', 'not a picture'),
    (sessions, 'CosineSimilarityLoss', 'CosineSimilarityLoss', 'scored pairs only'),
    (scored_pairs, 'TripletMarginLoss', 'TripletMarginLoss', 'use CosineSimilarityLoss'),
    (sessions, 'ArcFaceLoss', 'ArcFaceLoss', 'cannot learn from sessions'),
]


def assert_clean(text: str) -> None:
    for leak in ('Traceback', 'site-packages', '.py', 'line '):
        assert leak not in text, text


@pytest.mark.parametrize(
    ('build', 'loss', 'where', 'why'), WRONG, ids=[f'{w[0].__name__}-{w[1]}' for w in WRONG]
)
def test_what_is_wrong_is_a_client_error(server: Server, build, loss, where, why):
    docs = build()
    parameters = {**QUICK, 'loss': loss, 'total': len(docs), 'experiment_name': 'wrong'}
    # by hand, as httpx writes no NaN
    body = json.dumps({'data': [as_json(doc) for doc in docs], 'parameters': parameters})
    headers = {'content-type': 'application/json'}
    answer = httpx.post(f'{server.url}/fit', content=body, headers=headers, timeout=60)
    assert answer.status_code == 422, answer.text
    with pytest.raises(BadServer) as caught:
        server.client().post('/fit', docs, parameters=parameters)
    for text in (answer.json()['message'], str(caught.value)):
        assert where in text
        assert why in text
        assert_clean(text)
    assert server.post('/runs', {'parameters': {'experiment': 'wrong'}}).status_code == 404


def test_numbers_that_cannot_be_sent_are_refused_before_they_are():
    with pytest.raises(ValueError, match=r'^Document 2: a tag holds nan'):
        fit_request(with_nan_score(), {**QUICK, 'loss': 'CosineSimilarityLoss'})
