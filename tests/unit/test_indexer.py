"""IndexExecutor without a Flow: what it stores, gives back and refuses, with embeddings made by hand."""

from __future__ import annotations

import asyncio
import runpy
import threading

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.excepts import ConfigError, ConflictError, DataError, TooLargeError
from finetuner.server.indexer import IndexExecutor, embedding_model
from finetuner.server.ranking import rank_matches
from finetuner.server.tags import MODEL_TAG
from tests.integration.serving import REPOSITORY


@pytest.fixture
def executor():
    opened = IndexExecutor()
    yield opened
    opened.close()


def ask(endpoint, docs=(), **parameters) -> DocumentArray:
    return asyncio.run(endpoint(docs=DocumentArray(docs), parameters=parameters))


def doc(id_: str, *embedding: float, model: str | None = None, **fields) -> Document:
    made = Document(id=id_, **fields)
    if embedding:
        made.embedding = np.array(embedding, np.float32)
    if model:
        made.tags[MODEL_TAG] = model
    return made


def test_the_first_model_told_is_the_only_one_until_all_is_deleted(executor):
    (told,) = ask(executor.index, [doc('a', 1, 0, model='one')])
    assert told.tags == {}, 'what the Executors tell each other is for them'
    for endpoint in (executor.index, executor.search):
        with pytest.raises(ConflictError, match=r"of 'one', these are of 'other'.*all: true"):
            ask(endpoint, [doc('b', 1, 0, model='other')])
    assert ask(executor.index_info)[0].tags['model'] == 'one'
    assert ask(executor.delete, all=True)[0].tags == {'deleted': 1, 'count': 0}
    ask(executor.index, [doc('b', 1, 0, 0, model='other')])
    tags = ask(executor.index_info)[0].tags
    assert (tags['model'], tags['dimension'], tags['count']) == ('other', 3, 1)
    (found,) = ask(executor.search, [doc('q', 1, 0, 0, model='other')])
    assert found.tags == {}
    assert found.matches[0].tags == {}


def test_one_request_is_of_one_model():
    docs = DocumentArray([doc('a', 1, model='x'), doc('b', 1, model='y')])
    with pytest.raises(ConflictError, match='several models: x, y'):
        embedding_model(docs)
    assert embedding_model(docs[:1]) == 'x'
    assert embedding_model(DocumentArray([doc('a', 1)])) is None


def test_a_request_with_one_bad_embedding_adds_nothing(executor):
    with pytest.raises(DataError, match='Document 1 is zero'):
        ask(executor.index, [doc('a', 1, 0), doc('b', 0, 0)])
    with pytest.raises(DataError, match='not numbers of one shape'):
        ask(executor.index, [doc('a', 1, 0), doc('b', 1, 0, 0)])
    assert ask(executor.index_info)[0].tags['count'] == 0


def test_documents_without_embedding_are_told_and_skipped(executor):
    told = ask(executor.index, [doc('a', 1, 0), doc('b', text='b')])
    assert 'it has no embedding' in told[1].tags['finetuner_error']
    assert told[1].text == ''
    query = doc('q', text='q')
    query.matches = DocumentArray([doc('mine', text='mine')])
    told = ask(executor.search, [query, doc('p', 1, 0)])
    assert len(told[0].matches) == 0
    assert told[1].matches[:, 'id'] == ['a']
    with pytest.raises(DataError, match='no Document has an embedding'):
        ask(executor.index, [doc('b', text='b')])
    assert len(ask(executor.search, [])) == 0


def test_what_a_match_gives_back(executor):
    stored = doc('a', 1, 0, text='words', uri='file:///a.png', tags={'n': 1, 'in': ['x']})
    picture = doc('b', 0, 1, blob=b'picture', uri='data:image/png;base64,AAAA')
    ask(executor.index, [stored, picture])
    (found,) = ask(executor.search, [doc('q', 1, 0, blob=b'query')], return_contents=True)
    first, second = found.matches
    assert (first.text, first.uri, first.tags) == ('words', 'file:///a.png', {'n': 1, 'in': ['x']})
    assert first.scores['cosine'].value == 0
    assert second.scores['cosine'].value == 1
    assert (second.blob, second.uri) == (b'', ''), 'not kept'
    assert found.blob == b'query'


def test_more_matches_than_one_request_gets_are_refused(executor):
    ask(executor.index, [doc('a', 1, 0)])
    queries = [doc(str(number), 1, 0) for number in range(101)]
    with pytest.raises(TooLargeError, match=r'101 queries with limit 1,000 .* at most 100,000'):
        ask(executor.search, queries, limit=1000)
    assert all(each.matches[:, 'id'] == ['a'] for each in ask(executor.search, queries, limit=990))
    many = DocumentArray.empty(10_001)
    with pytest.raises(TooLargeError, match=r'limit 10 ask for 100,010'):
        ask(executor.search, many)


def test_matches_are_made_beside_the_loop_that_answers_others(executor, monkeypatch):
    made, make = [], executor._match

    def watched(hit):
        made.append(threading.current_thread())
        return make(hit)

    monkeypatch.setattr(executor, '_match', watched)
    ask(executor.index, [doc('a', 1, 0), doc('b', 0, 1)])
    (found,) = ask(executor.search, [doc('q', 1, 0)])
    assert found.matches[:, 'id'] == ['a', 'b']
    assert len(made) == 2
    assert threading.current_thread() not in made


def test_contents_come_back_where_they_are_kept(tmp_path):
    executor = IndexExecutor(directory=str(tmp_path / 'kept'), keep_contents=True)
    picture = doc('b', 0, 1, blob=b'picture', uri='data:image/png;base64,AAAA', mime_type='a/b')
    numbers = doc('c', 1, 1, tensor=np.arange(6).reshape(2, 3))
    parts = doc('d', 1, 0, chunks=[Document(text='part')])
    ask(executor.index, [picture, numbers, parts])
    (found,) = ask(executor.search, [doc('q', 0, 1)], return_contents=True)
    by_id = {match.id: match for match in found.matches}
    assert by_id['b'].blob == b'picture'
    assert (by_id['b'].uri, by_id['b'].mime_type) == ('data:image/png;base64,AAAA', 'a/b')
    np.testing.assert_array_equal(by_id['c'].tensor, np.arange(6).reshape(2, 3))
    assert by_id['d'].chunks[0].text == 'part'
    (found,) = ask(executor.search, [doc('q', 0, 1)])
    assert not any(match.blob or match.chunks for match in found.matches)
    executor.close()


def test_ranking_agrees_with_docarrays_match():
    random = np.random.default_rng(0)
    query = doc('q', *random.normal(size=8))
    candidates = DocumentArray([doc(str(i), *random.normal(size=8)) for i in range(30)])
    theirs = DocumentArray([Document(query, copy=True)])
    theirs.match(candidates, metric='cosine', limit=30)
    query.matches = candidates
    rank_matches(query, 'cosine')
    assert query.matches[:, 'id'] == theirs[0].matches[:, 'id']
    ours = [match.scores['cosine'].value for match in query.matches]
    wanted = [match.scores['cosine'].value for match in theirs[0].matches]
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_candidates_that_cannot_be_compared_come_last():
    query = doc('q', 1, 0)
    query.matches = DocumentArray(
        [doc('none'), doc('zero', 0, 0), doc('far', -1, 0), doc('long', 1, 0, 0), doc('near', 1, 0)]
    )
    rank_matches(query, 'cosine')
    assert query.matches[:, 'id'] == ['near', 'far', 'none', 'zero', 'long']
    reasons = [match.tags['finetuner_error'] for match in query.matches[2:]]
    assert 'no embedding' in reasons[0]
    assert 'is zero' in reasons[1]
    assert 'has 3 dimensions' in reasons[2]


@pytest.mark.parametrize('name', ['', '../up', 'a/b', '.hidden', 'x' * 65, 7])
def test_the_name_names_a_folder_below_the_home(name):
    with pytest.raises(ConfigError, match='it takes 1 to 64 letters'):
        IndexExecutor(name=name)


def test_the_index_lies_in_the_home(executor, finetuner_home):
    assert (finetuner_home / 'indexes' / 'default' / 'index.db').is_file()
    with pytest.raises(ConflictError, match='is open already'):
        IndexExecutor()
    IndexExecutor(name='another').close()


def test_the_docs_show_the_example_as_it_is():
    source = (REPOSITORY / 'examples' / 'own_index.py').read_text()
    code = source[source.index('import numpy') :]
    assert f'```python\n{code}```' in (REPOSITORY / 'docs' / 'search.md').read_text()


def test_the_example_answers_before_anything_is_indexed():
    own = runpy.run_path(str(REPOSITORY / 'examples' / 'own_index.py'))['NumpyIndexer']()
    (found,) = own.search(DocumentArray([doc('q', 3, 4)]), parameters={})
    assert len(found.matches) == 0
    own.index(DocumentArray([doc('a', 0, 2), doc('b', 6, 8)]))
    (found,) = own.search(DocumentArray([doc('q', 3, 4)]), parameters={'limit': 1})
    assert found.matches[:, 'id'] == ['b']
    np.testing.assert_allclose(found.matches[0].scores['cosine'].value, 0, atol=1e-6)
