"""Texts on a real server and on real data: all-MiniLM-L6-v2 from /fit to /encode, and refusals."""

import asyncio
import base64
import json
import re
import shutil
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from docarray import Document, DocumentArray
from emoji_data import load_emoji_text_queries_and_index, load_emoji_texts
from jina.excepts import BadServer

import finetuner
from finetuner.artifact import load_artifact
from finetuner.client import LocalClient
from finetuner.evaluation import evaluate_embeddings
from finetuner.excepts import ConfigError
from finetuner.inference import build_engine
from finetuner.models.backbones import TextSpec
from finetuner.models.tailor import build_embedding_model
from finetuner.models.transformers_import import import_transformers
from finetuner.models.zoo import get_backbone
from finetuner.server import FinetunerExecutor, fit_request
from tests.conftest import make_picture_docs
from tests.integration.serving import REPOSITORY, Server, serve, store_of
from tests.integration.test_data_kinds import assert_clean
from tests.unit.tiny_encoder import DIMENSION, write_tiny_encoder

FLOW = (REPOSITORY / 'flows' / 'train-and-encode.yml').read_text()
MODEL = 'all-MiniLM-L6-v2'
QUICK = {
    'model': MODEL,
    'loss': 'MultiSimilarityLoss',
    'epochs': 1,
    'batch_size': 8,
    'num_items_per_class': 2,
    'learning_rate': 3e-4,
    'num_workers': 0,
    'device': 'cpu',
}
# of one word and of many, so that their order in batches is not the one they came in
TEXTS = [
    'red heart',
    'a long way home, past the mill and over the hill',
    'ok',
    'Über Straße, 100 %',
]
TEXTS += [doc.text for doc in load_emoji_texts('test')[:8]]
PICTURE = make_picture_docs(1, 1)[0].blob


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with serve(FLOW, tmp_path_factory.mktemp('server'), FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture(scope='module')
def store(server: Server):
    with store_of(server) as client:
        yield client


@pytest.fixture(scope='module')
def run(server: Server, store: LocalClient) -> dict:
    """A run on 24 labelled texts, posted over gRPC and waited for."""
    docs = load_emoji_texts('train')[:24]
    tags = server.client().post(**fit_request(docs, {**QUICK, 'run_name': 'texts'}))[0].tags
    until = time.monotonic() + 120
    while (found := store.get_run('default', tags['run']))['status'] not in ('FINISHED', 'FAILED'):
        assert time.monotonic() < until, found
        time.sleep(0.2)
    assert found['status'] == 'FINISHED', store.get_run_logs('default', tags['run'])
    assert found['artifact_id'] == tags['artifact_id']
    return found


@pytest.fixture(scope='module')
def artifact(run: dict, store: LocalClient) -> Path:
    return store.find_artifact(run['artifact_id'])


@pytest.fixture(scope='module')
def expected(artifact: Path) -> np.ndarray:
    """What the artifact makes of the texts by torch, in this process."""
    return finetuner.encode(finetuner.get_model(artifact, is_onnx=False), TEXTS)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    assert one.shape == other.shape == (len(other), 384)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / lengths


# from /fit to vectors


def test_labelled_texts_become_an_artifact(run, artifact, store, expected):
    found = load_artifact(artifact)
    assert (found.spec.backbone, found.spec.inputs) == (MODEL, TextSpec(256, 'mean', True))
    assert found.manifest['num_documents'] == 24
    assert found.onnx_path is not None
    log = store.get_run_logs('default', 'texts')
    assert f'Model {MODEL} of texts of up to 256 tokens, embeddings of length 384, on cpu' in log
    assert 'Training on 24 Documents (class)' in log
    pretrained = finetuner.encode(finetuner.build_model(MODEL), TEXTS)
    assert cosines(pretrained, expected).min() < 0.99


def test_the_log_of_texts_speaks_of_no_images(run, store):
    assert 'image' not in store.get_run_logs('default', 'texts')


def over_client(protocol):
    def post(server: Server, docs: DocumentArray, parameters: dict) -> list[dict]:
        answer = server.client(protocol).post('/encode', docs, parameters=parameters)
        return [{'id': d.id, 'embedding': d.embedding, 'tags': d.tags} for d in answer]

    return post


def over_json(server: Server, docs: DocumentArray, parameters: dict) -> list[dict]:
    data = []
    for doc in docs:
        content = {'text': doc.text, 'blob': base64.b64encode(doc.blob or b'').decode()}
        data.append({'id': doc.id, **{name: value for name, value in content.items() if value}})
    answer = server.post('/encode', {'data': data, 'parameters': parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()['data']


WAYS = {'grpc': over_client('grpc'), 'jinas_http': over_client('http'), 'json': over_json}


@pytest.mark.parametrize('way', WAYS)
def test_the_server_gives_the_same_vectors(server: Server, run, expected, way):
    docs = DocumentArray(Document(text=text) for text in TEXTS)
    answer = WAYS[way](server, docs, {'artifact': run['artifact_id']})
    assert [doc['id'] for doc in answer] == docs[:, 'id']
    vectors = np.array([doc['embedding'] for doc in answer])
    assert cosines(vectors, expected).min() >= 0.9999
    assert cosines(vectors[1:], expected[:-1]).max() < 0.99
    assert not any('finetuner_error' in doc.get('tags', {}) for doc in answer)


def test_the_server_knows_the_pretrained_model(server: Server):
    answer = over_json(server, DocumentArray([Document(text='red heart')]), {'artifact': MODEL})
    vectors = finetuner.encode(finetuner.build_model(MODEL), ['red heart'])
    assert cosines(np.array([answer[0]['embedding']]), vectors).min() >= 0.9999


@pytest.mark.parametrize(
    ('odd', 'said'),
    [
        (Document(blob=PICTURE), 'holds a picture or a tensor, not text: give it a text'),
        (Document(), 'holds no text: give it a text'),
    ],
    ids=['picture', 'empty'],
)
@pytest.mark.parametrize('way', WAYS)
def test_only_the_odd_one_out_is_marked(server: Server, run, expected, way, odd, said):
    docs = DocumentArray(Document(text=text) for text in TEXTS)
    docs.insert(2, Document(odd, copy=True))
    answer = WAYS[way](server, docs, {'artifact': run['artifact_id']})
    assert [doc['id'] for doc in answer] == docs[:, 'id']
    marked = answer.pop(2)
    assert f'Document 2 {said}' in marked['tags']['finetuner_error']
    assert marked.get('embedding') is None
    assert cosines(np.array([doc['embedding'] for doc in answer]), expected).min() >= 0.9999
    assert not any('finetuner_error' in doc.get('tags', {}) for doc in answer)


# what a request may not do


def assert_refused(server: Server, path: str, docs: DocumentArray, parameters: dict, *said: str):
    """Over JSON a client's error, over gRPC the same words."""
    data = [{'text': doc.text, 'tags': doc.tags} for doc in docs]
    answer = server.post(path, {'data': data, 'parameters': parameters})
    assert answer.status_code == 422, answer.text
    with pytest.raises(BadServer) as caught:
        server.client().post(path, docs, parameters=parameters)
    for text in (answer.json()['message'], str(caught.value)):
        assert all(words in text for words in said), text
        assert_clean(text)


@pytest.mark.parametrize('name', ['the artifact', '/etc', '~', './flows', 'somebody/their-model'])
def test_a_request_names_no_folder_and_nothing_to_download(server: Server, artifact, name):
    name = str(artifact) if name == 'the artifact' else name
    docs = load_emoji_texts('train')[:8]
    given = {**QUICK, 'model': name, 'total': len(docs), 'experiment_name': 'wrong'}
    assert_refused(server, '/fit', docs, given, 'unknown model', name, MODEL)
    assert server.post('/runs', {'parameters': {'experiment': 'wrong'}}).status_code == 404
    assert_refused(server, '/encode', docs, {'artifact': name}, 'unknown artifact', name, MODEL)


def test_a_picture_among_labelled_texts_is_refused(server: Server):
    docs = load_emoji_texts('train')[:8]
    docs[5].text, docs[5].blob = '', PICTURE
    with pytest.raises(BadServer, match='train_data: Document 5 holds a picture or a tensor, not'):
        server.client().post(**fit_request(docs, {**QUICK, 'experiment_name': 'wrong'}))
    assert server.post('/runs', {'parameters': {'experiment': 'wrong'}}).status_code == 404


def test_half_a_character_is_a_clients_error(server: Server, run):
    """JSON can write half of a surrogate pair, which UTF-8 cannot."""
    content = json.dumps(
        {
            'data': [{'text': 'red'}, {'text': '\ud800'}],
            'parameters': {'artifact': run['artifact_id']},
        }
    )
    headers = {'content-type': 'application/json'}
    answer = httpx.post(f'{server.url}/encode', content=content, headers=headers, timeout=60)
    assert answer.status_code in (200, 422), answer.text
    assert 'ocument 1' in answer.text


def test_the_server_tells_no_path_of_its_machine(tmp_path):
    folder = write_tiny_encoder(tmp_path / 'encoder')
    finetuner.save(build_engine(str(folder)), tmp_path / 'artifact')
    executor = FinetunerExecutor(artifact=str(tmp_path / 'artifact'))
    tags = asyncio.run(executor.info(parameters={}))[0].tags
    executor.close()
    assert re.fullmatch('local-[0-9a-f]{12}', tags['artifact'])
    assert tags['dimension'] == DIMENSION
    assert str(tmp_path) not in str(tags)


# real data


def test_names_find_keywords():
    queries, index = load_emoji_text_queries_and_index('test')
    wanted, there = ([doc.tags['concept'] for doc in docs] for docs in (queries, index))
    assert (len(wanted), wanted) == (250, there)
    model = finetuner.build_model(MODEL)
    vectors = [np.array(finetuner.encode(model, docs).embeddings) for docs in (queries, index)]
    similar = vectors[0] @ vectors[1].T
    # of equals the right answer comes first
    ranks = (similar > np.diag(similar)[:, None] + 1e-6).sum(axis=1) + 1
    assert np.mean(1 / ranks) == pytest.approx(0.702, abs=0.005)
    metrics = evaluate_embeddings(vectors[0], wanted, vectors[1], there, limit=250)
    assert metrics['reciprocal_rank'] == pytest.approx(0.70, abs=0.005)


# encoders that others laid out


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp('tiny') / 'encoder')


def laid_out(encoder, folder, *modules):
    """The tiny encoder with more modules after it, as sentence-transformers saves them."""
    from sentence_transformers import SentenceTransformer, models

    first = [models.Transformer(str(encoder)), models.Pooling(DIMENSION, pooling_mode='mean')]
    SentenceTransformer(modules=[*first, *modules], device='cpu').save(str(folder))
    return folder


def lower_cased(encoder, folder):
    """A tokenizer that keeps capitals, behind one that does not."""
    laid_out(encoder, folder)
    (folder / 'sentence_bert_config.json').write_text('{"do_lower_case": true}')
    tokenizer = json.loads((folder / 'tokenizer.json').read_text())
    tokenizer['normalizer']['lowercase'] = False
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))
    return folder


def normalized_first(encoder, folder):
    from sentence_transformers import models

    return laid_out(encoder, folder, models.Normalize(), models.Dense(DIMENSION, 6))


@pytest.mark.parametrize(
    'lay_out',
    [
        laid_out,
        lower_cased,
        normalized_first,
    ],
)
def test_a_folder_means_what_it_means_to_sentence_transformers(encoder, tmp_path, lay_out):
    from sentence_transformers import SentenceTransformer

    folder = lay_out(encoder, tmp_path / 'encoder')
    texts = ['Red Shoe', 'a cat and the small dog']
    expected = SentenceTransformer(str(folder), device='cpu').encode(texts)
    found = finetuner.encode(build_engine(str(folder)), texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_freezing_trains_the_dense_layer_only(encoder, tmp_path):
    from sentence_transformers import models

    folder = laid_out(encoder, tmp_path / 'encoder', models.Dense(DIMENSION, 6))
    model = build_embedding_model(get_backbone(str(folder)), freeze=True)
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trained == {f'projection_head.0.linear.{name}' for name in ('weight', 'bias')}


def test_roberta_takes_fewer_tokens_than_it_has_positions(encoder, tmp_path):
    transformers = import_transformers()
    folder = shutil.copytree(encoder, tmp_path / 'roberta')
    config = transformers.RobertaConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=42, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(folder)
    engine = build_engine(str(folder), {'max_length': 40})
    assert finetuner.encode(engine, ['red ' * 50]).shape == (1, 16)
    with pytest.raises(ConfigError, match='max_length: 42 is more than the 40'):
        build_engine(str(folder), {'max_length': 42})
