"""/encode on a real server: the same vector whoever asks, and all that a request may ask for."""

from __future__ import annotations

import base64
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from docarray import Document, DocumentArray
from jina.excepts import BadServer

from finetuner.artifact import save_artifact
from finetuner.inference import load_engine
from tests.integration.serving import REPOSITORY, Server, serve
from tests.unit.tiny_artifacts import assert_same_vectors, make_model, make_spec, pictures

ENCODER = REPOSITORY / 'executors' / 'encoder' / 'config.yml'
NUM_PICTURES = 64
TOLERANCE = 1e-4
WAYS = [(protocol, executor) for protocol in ('grpc', 'http') for executor in ('torch', 'onnx')]


@pytest.fixture(scope='module')
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp('artifact') / 'tiny'
    spec = replace(make_spec(), matryoshka_dims=(4, 8))
    save_artifact(folder, make_model(), spec, onnx_inputs=pictures(), onnx_required=True)
    return folder


@pytest.fixture(scope='module')
def server(artifact, tmp_path_factory):
    """One Flow with both engines, told apart by their names."""
    flow = (REPOSITORY / 'flows' / 'encode.yml').read_text()
    head, _, _ = flow.partition('executors:')
    parts = [
        f'  - name: {name}\n    uses: {ENCODER}\n    uses_with:\n      artifact: {artifact}\n'
        f'      is_onnx: {is_onnx}\n      batch_size: 16\n'
        for name, is_onnx in (('torch', 'false'), ('onnx', 'true'))
    ]
    text = ''.join([head, 'executors:\n', *parts])
    with serve(text, tmp_path_factory.mktemp('server'), FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture(scope='module')
def blobs() -> list[bytes]:
    from PIL import Image

    found = []
    for number, picture in enumerate(pictures(NUM_PICTURES, seed=3)):
        import io

        file = io.BytesIO()
        Image.fromarray(picture).resize((20 + number, 40)).save(file, 'PNG')
        found.append(file.getvalue())
    return found


@pytest.fixture(scope='module')
def expected(artifact, blobs) -> np.ndarray:
    """One at a time, in torch, without any server."""
    engine = load_engine(artifact, is_onnx=False)
    docs = DocumentArray([Document(blob=blob) for blob in blobs])
    for doc in docs:
        assert engine.encode_documents(DocumentArray([doc])) == []
    return docs.embeddings


def encode(
    server: Server, way: tuple[str, str], blobs: list[bytes], **parameters
) -> list[np.ndarray | None]:
    """Ask in one request."""
    protocol, executor = way
    if protocol == 'http':
        data = [{'blob': base64.b64encode(blob).decode()} for blob in blobs]
        body = {'data': data, 'parameters': parameters, 'target_executor': executor}
        answer = server.post('/encode', body)
        assert answer.status_code == 200, answer.text
        return [doc.get('embedding') for doc in answer.json()['data']]
    docs = server.client().post(
        '/encode',
        DocumentArray([Document(blob=blob) for blob in blobs]),
        parameters=parameters,
        target_executor=executor,
        request_size=-1,
    )
    return [doc.embedding for doc in docs]


@pytest.mark.parametrize('way', WAYS, ids='-'.join)
def test_a_vector_is_the_same_in_any_batch_at_any_place(server, way, blobs, expected):
    whole = np.array(encode(server, way, blobs))
    backwards = np.array(encode(server, way, blobs[::-1]))[::-1]
    assert_same_vectors(whole, expected, TOLERANCE)
    assert_same_vectors(backwards, expected, TOLERANCE)
    for number in (0, 31, 63):
        alone = np.array(encode(server, way, [blobs[number]]))
        assert_same_vectors(alone, expected[[number]], TOLERANCE)
        small = np.array(encode(server, way, blobs, batch_size=1 + number % 7))
        assert_same_vectors(small, expected, TOLERANCE)


@pytest.mark.parametrize('way', WAYS, ids='-'.join)
def test_a_vector_is_the_same_beside_neighbours_that_fail(server, way, blobs, expected):
    spoilt = list(blobs)
    broken = [0, 5, 6, 40, 63]
    for place, data in zip(
        broken, (b'', b'no picture', blobs[1][:40], b'GIF89a', b'\xff\xd8'), strict=True
    ):
        spoilt[place] = data
    found = encode(server, way, spoilt)
    assert [place for place, each in enumerate(found) if each is None] == broken
    good = [place for place in range(NUM_PICTURES) if place not in broken]
    assert_same_vectors(np.array([found[place] for place in good]), expected[good], TOLERANCE)


def test_the_log_has_a_line_for_a_request_that_is_refused(server):
    before = len(server.log.read_text())
    for _ in range(3):
        answer = server.post('/encode', {'data': [{'text': 'a'}], 'target_executor': 'onnx'})
        assert answer.status_code == 422
    logged = server.log.read_text()[before:]
    assert logged.count('refused: DataError') == 3
    assert 'Traceback' not in logged


def test_a_vector_is_the_same_while_others_ask(server, blobs, expected):
    rng = np.random.default_rng(0)
    together = threading.Barrier(8)
    asked = [
        (WAYS[n % 4], list(rng.integers(0, NUM_PICTURES, rng.integers(1, 40)))) for n in range(32)
    ]

    def ask(one):
        way, numbers = one
        if together.n_waiting or not together.broken:
            together.wait(60)
        return encode(server, way, [blobs[number] for number in numbers])

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, asked))
    for (_, numbers), found in zip(asked, answers, strict=True):
        assert_same_vectors(np.array(found), expected[numbers], TOLERANCE)


@pytest.mark.parametrize('way', WAYS, ids='-'.join)
def test_embeddings_may_be_cut_and_made_of_length_1(server, way, blobs, expected):
    cut = np.array(encode(server, way, blobs[:3], output_dim=8))
    assert_same_vectors(cut, expected[:3, :8], TOLERANCE)
    unit = expected[:3, :4] / np.linalg.norm(expected[:3, :4], axis=1, keepdims=True)
    short = np.array(encode(server, way, blobs[:3], output_dim=4, normalize=True))
    assert_same_vectors(short, unit, TOLERANCE)


@pytest.mark.parametrize(
    ('parameters', 'words'),
    [
        ({'output_dim': 5}, 'good at 4, 8, 16 numbers'),
        ({'output_dim': 0}, 'takes 1 or more'),
        ({'normalize': 'yes'}, 'takes true or false'),
        ({'select_model': 'clip-text'}, 'is a single model'),
        ({'access_paths': '@x'}, "access_paths='@x' names no Documents"),
        ({'access_paths': '@' + 'c' * 100}, 'names no Documents'),
        ({'artifact': 'shoes@latest'}, 'shoes@latest'),
    ],
)
def test_what_cannot_be_asked_for(server, blobs, parameters, words):
    body = {'data': [{'blob': base64.b64encode(blobs[0]).decode()}], 'parameters': parameters}
    answer = server.post('/encode', body)
    assert answer.status_code in (404, 422)
    assert words in answer.json()['message']
    docs = DocumentArray([Document(blob=blobs[0])])
    with pytest.raises(BadServer, match=words[:12]):
        server.client().post('/encode', docs, parameters=parameters)


def test_chunks_and_matches_are_embedded_when_they_are_asked_for(server, blobs, expected):
    def nested() -> Document:
        first, second, third = (Document(blob=blob) for blob in blobs[1:4])
        return Document(blob=blobs[0], chunks=[first, second], matches=[third])

    def ask(paths: str) -> Document:
        return server.client().post(
            '/encode',
            DocumentArray([nested()]),
            parameters={'access_paths': paths},
            target_executor='onnx',
        )[0]

    def vectors(answer: Document) -> list[int]:
        parts = [answer, *answer.chunks, *answer.matches]
        for number, part in enumerate(parts):
            if part.embedding is not None:
                assert_same_vectors(part.embedding, expected[number], TOLERANCE)
            assert not part.blob
        return [number for number, part in enumerate(parts) if part.embedding is not None]

    assert vectors(ask('@c')) == [1, 2]
    assert vectors(ask('@r,m')) == [0, 3]
    assert vectors(ask('@r,c,m')) == [0, 1, 2, 3]
    assert vectors(ask('c')) == [1, 2]
    plain = ask('@r')
    assert (len(plain.chunks), len(plain.matches)) == (0, 0)


def test_the_encoder_is_ready_and_says_what_it_is(server):
    ready = server.client().post('/ready', target_executor='torch')[0].tags
    assert ready == {'ready': True, 'reason': ''}
    told = server.client().post('/info', target_executor='onnx')[0].tags
    assert told['dimension'] == 16
    assert re.fullmatch('local-[0-9a-f]{12}', told['artifact'])
