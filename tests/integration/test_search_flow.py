"""flows/search.yml as people start it: index pictures, find similar ones, rank, delete, restart."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from docarray import Document, DocumentArray
from jina.excepts import BadServer

from examples.emoji_data import load_emoji
from finetuner.config import Settings
from finetuner.search import search
from finetuner.server import encoder, indexer
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import REPOSITORY, serve

FLOW = (REPOSITORY / 'flows' / 'search.yml').read_text()
NUM_INDEXED = 60


@pytest.fixture(scope='module')
def pictures() -> DocumentArray:
    return load_emoji('test', blobs=True)[: NUM_INDEXED + 10]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('search')


@pytest.fixture(scope='module')
def server(folder, pictures):
    source = FLOW.replace('keep_contents: false', 'keep_contents: true')
    with serve(source, folder, FINETUNER_TOKEN='') as running:
        docs = DocumentArray(pictures[:NUM_INDEXED], copy=True)
        answer = running.client().post(
            '/index', docs, request_size=16, results_in_order=True, prefetch=1
        )
        assert answer[:, 'id'] == docs[:, 'id']
        assert all(set(doc.non_empty_fields) <= {'id', 'tags'} for doc in answer)
        yield running


@pytest.fixture(scope='module')
def embeddings(server, pictures) -> np.ndarray:
    answer = server.client().post(
        '/encode', DocumentArray(pictures, copy=True), results_in_order=True
    )
    return answer.embeddings


def info(server) -> dict:
    return server.client().post('/index_info', parameters={})[0].tags


def test_both_protocols_find_what_an_exact_search_does(server, pictures, embeddings):
    queries = pictures[NUM_INDEXED:]
    distances, positions = search(embeddings[NUM_INDEXED:], embeddings[:NUM_INDEXED], 5)
    answer = server.client().post(
        '/search', DocumentArray(queries, copy=True), parameters={'limit': 5}, results_in_order=True
    )
    wanted = [[pictures[p].id for p in row] for row in positions.tolist()]
    assert [doc.matches[:, 'id'] for doc in answer] == wanted
    got = [[match.scores['cosine'].value for match in doc.matches] for doc in answer]
    np.testing.assert_allclose(got, distances, atol=1e-5)
    match = answer[0].matches[0]
    assert match.tags['finetuner_label'] == pictures[int(positions[0, 0])].tags['finetuner_label']
    assert not match.blob
    assert not answer[0].blob

    body = {
        'data': [{'blob': base64.b64encode(queries[0].blob).decode()}],
        'parameters': {'limit': 5},
    }
    (over_http,) = server.post('/search', body).json()['data']
    assert [each['id'] for each in over_http['matches']] == wanted[0]
    assert over_http['matches'][0]['scores']['cosine']['value'] == pytest.approx(
        got[0][0], abs=1e-5
    )


def test_a_filter_and_contents(server, pictures):
    label = pictures[3].tags['finetuner_label']
    (answer,) = server.client().post(
        '/search',
        DocumentArray(pictures[:1], copy=True),
        parameters={'filter': {'finetuner_label': label}, 'return_contents': True, 'limit': 50},
    )
    assert {match.tags['finetuner_label'] for match in answer.matches} == {label}
    by_id = {doc.id: doc for doc in pictures}
    assert all(match.blob == by_id[match.id].blob for match in answer.matches)
    assert answer.blob == pictures[0].blob


def test_a_document_that_cannot_be_read_is_told_and_skipped(server, pictures):
    before = info(server)['count']
    docs = DocumentArray(
        [Document(id='broken', blob=b'no picture'), Document(pictures[0], copy=True)]
    )
    for endpoint in ('/index', '/search'):
        broken, fine = server.client().post(endpoint, docs, results_in_order=True)
        assert 'finetuner_error' in broken.tags
        assert 'finetuner_error' not in fine.tags
        assert not broken.matches
    assert fine.matches[0].id == pictures[0].id
    assert info(server)['count'] == before


def test_rank_sorts_the_candidates_of_each_query(server, pictures, embeddings):
    query = Document(pictures[0], copy=True)
    query.matches = DocumentArray(
        [Document(id='broken', blob=b'no picture'), *DocumentArray(pictures[1:20], copy=True)]
    )
    (answer,) = server.client().post('/rank', DocumentArray([query]))
    positions = search(embeddings[:1], embeddings[1:20], 19)[1][0].tolist()
    assert answer.matches[:, 'id'] == [*(pictures[1 + p].id for p in positions), 'broken']
    assert 'finetuner_error' in answer.matches[-1].tags
    scores = [match.scores['cosine'].value for match in answer.matches[:-1]]
    assert scores == sorted(scores)
    assert not any(match.blob for match in answer.matches)
    (shortest,) = server.client().post('/rank', DocumentArray([query]), parameters={'limit': 2})
    assert shortest.matches[:, 'id'] == answer.matches[:2, 'id']


def test_embeddings_of_another_model_are_refused(server, pictures):
    docs = DocumentArray([Document(text='a text, by a model of texts')])
    assert info(server)['model'] == 'efficientnet-lite0'
    for endpoint in ('/index', '/search'):
        with pytest.raises(BadServer, match=r'of .+efficientnet-lite0.+of .+all-MiniLM-L6-v2'):
            server.client().post(endpoint, docs, parameters={'artifact': 'all-MiniLM-L6-v2'})


@pytest.mark.parametrize(
    ('endpoint', 'parameters', 'message'),
    [
        ('/search', {'limit': 0}, 'limit.+ is 0'),
        ('/search', {'limit': 2.5}, 'limit.+ is 2.5'),
        ('/search', {'limit': 100_000}, 'it takes 1 to 1000'),
        ('/search', {'limt': 3}, 'did you mean .+limit'),
        ('/search', {'filter': 'red'}, 'filter.+ is .+red'),
        ('/search', {'filter': {'a': {'b': 1}}}, 'it takes a text, a number'),
        ('/index', {'limit': 3}, 'unknown parameter .+limit'),
        ('/delete', {'ids': ['a'], 'all': True}, 'what is to be deleted?'),
        ('/delete', {'ids': 'a'}, 'it takes a list of texts'),
        ('/index_info', {'x': 1}, 'unknown parameter .+x'),
    ],
)
def test_parameters_are_checked(server, pictures, endpoint, parameters, message):
    docs = DocumentArray(pictures[:1], copy=True) if endpoint in ('/search', '/index') else None
    with pytest.raises(BadServer, match=message):
        server.client().post(endpoint, docs, parameters=parameters)


def test_deleted_documents_are_found_no_more(server, pictures):
    docs = DocumentArray(pictures[:3], copy=True)
    count = info(server)['count']
    (told,) = server.client().post('/delete', parameters={'ids': [docs[0].id, 'never was there']})
    assert told.tags == {'deleted': 1.0, 'count': count - 1}
    answer = server.post('/delete', {'data': [{'id': docs[1].id}]}).json()
    assert answer['data'][0]['tags']['deleted'] == 1
    found = server.client().post('/search', docs, results_in_order=True)
    assert docs[0].id not in found[0].matches[:, 'id']
    assert docs[1].id not in found[1].matches[:, 'id']
    assert found[2].matches[0].id == docs[2].id
    server.client().post('/index', DocumentArray(pictures[:2], copy=True))
    assert info(server)['count'] == count


def test_searching_needs_a_token_to_read_and_indexing_one_to_write(tmp_path, pictures):
    database = open_database(Settings.from_environment(tmp_path / 'home').database_url)
    reader, _ = TokenStore(database).create('alice', 'read')
    writer, _ = TokenStore(database).create('alice', 'write')
    database.close()
    picture = {'blob': base64.b64encode(pictures[0].blob).decode()}
    with serve(FLOW, tmp_path, FINETUNER_TOKEN='') as server:

        def ask(endpoint: str, token: str, **body) -> int:
            headers = {'Authorization': f'Bearer {token}'}
            return server.post(endpoint, body, headers=headers).status_code

        assert ask('/index', reader, data=[picture]) == 403
        assert ask('/index', writer, data=[picture]) == 200
        assert ask('/delete', reader, parameters={'all': True}) == 403
        query = {'id': 'q', **picture, 'matches': [picture]}
        for endpoint in ('/search', '/rank'):
            assert ask(endpoint, reader, data=[query]) == 200
        assert ask('/index_info', reader) == 200
        assert ask('/info', reader) == 200


def test_the_encoders_parameters_are_let_pass():
    known = set(encoder._PARAMETERS) - {'return_contents'}
    assert set(indexer.ENCODER_PARAMETERS) == known


def test_the_guide_finds_similar_pictures(tmp_path):
    with serve(FLOW, tmp_path, FINETUNER_TOKEN='') as server:
        done = subprocess.run(
            [sys.executable, 'examples/similar.py', f'--port={server.grpc_port}', '--concepts=20'],
            cwd=REPOSITORY,
            env={**os.environ, 'PYTHONPATH': str(REPOSITORY)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert '60 pictures in the index' in done.stdout
    (told,) = re.findall(r'the first 3 for (\d+) of 20 pictures', done.stdout)
    assert int(told) >= 15


def test_another_executor_can_stand_in_the_indexers_place(tmp_path, pictures, embeddings):
    start, uses = FLOW.split('  - name: indexer\n')
    assert 'executors/indexer' in uses
    own = f'  - name: indexer\n    uses: NumpyIndexer\n    py_modules: [{REPOSITORY}/examples/own_index.py]\n'
    with serve(start + own, tmp_path, FINETUNER_TOKEN='') as server:
        client = server.client()
        client.post('/index', DocumentArray(pictures[:20], copy=True))
        queries = DocumentArray(pictures[NUM_INDEXED : NUM_INDEXED + 3], copy=True)
        found = client.post('/search', queries, parameters={'limit': 5}, results_in_order=True)
    positions = search(embeddings[NUM_INDEXED : NUM_INDEXED + 3], embeddings[:20], 5)[1].tolist()
    assert [doc.matches[:, 'id'] for doc in found] == [
        [pictures[position].id for position in row] for row in positions
    ]


def test_what_was_indexed_is_there_after_a_restart(server, folder, tmp_path, pictures):
    told = info(server)
    assert (told['count'], told['dimension']) == (NUM_INDEXED, 1280)
    assert told['distance'] == 'cosine'
    with (
        pytest.raises(AssertionError, match='is open already'),
        serve(FLOW, tmp_path, FINETUNER_TOKEN='', FINETUNER_HOME=str(folder / 'home')),
    ):
        pass
    server.process.terminate()
    server.process.wait(30)
    with serve(FLOW, tmp_path, FINETUNER_TOKEN='', FINETUNER_HOME=str(folder / 'home')) as again:
        assert info(again)['count'] == NUM_INDEXED
        (answer,) = again.client().post('/search', DocumentArray(pictures[5:6], copy=True))
        assert answer.matches[0].id == pictures[5].id
