"""The vector index: exact as the reference, kept through any end, and clear about what it refuses."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from finetuner.excepts import ConfigError, ConflictError, DataError, ServerError, TooLargeError
from finetuner.search import search
from finetuner.vector_index import Item, VectorIndex, graph_keeper
from finetuner.vector_index import exact as exact_module
from finetuner.vector_index import rows as rows_module
from finetuner.vector_index.graph import Graph, build_graph, find_width
from tests.integration.serving import REPOSITORY


def vectors_of(count: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def items_of(count: int, start: int = 0, **fields) -> list[Item]:
    return [Item(str(number), **fields) for number in range(start, start + count)]


def clustered(count: int, dimension: int = 48, seed: int = 0) -> np.ndarray:
    """Vectors as embeddings are: of few true dimensions, with noise in all."""
    random = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(12, dimension))
    values = random.normal(size=(count, 12)) @ basis + 0.3 * random.normal(size=(count, dimension))
    return values.astype(np.float32)


def ids(hits) -> list[list[str]]:
    return [[hit.item.id for hit in each] for each in hits]


def reference_distances(queries, values, k, distance):
    if distance == 'inner_product':
        return np.sort(1 - queries.astype(np.float64) @ values.T.astype(np.float64), axis=1)[:, :k]
    return search(queries, values, k, distance)[0].numpy()


@pytest.fixture
def index(tmp_path):
    with VectorIndex(tmp_path / 'index') as opened:
        yield opened


# the same answers as the exact reference

numbers = st.floats(-1000, 1000, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 40),
    dimension=st.integers(1, 6),
    distance=st.sampled_from(['cosine', 'euclidean', 'inner_product']),
    limit=st.integers(1, 50),
)
def test_exact_searches_agree_with_the_reference(data, count, dimension, distance, limit):
    shape = arrays.arrays(np.float32, (count, dimension), elements=numbers)
    values, queries = data.draw(shape), data.draw(shape)[:3]
    values[:, 0] += (np.abs(values).sum(axis=1) == 0).astype(np.float32)
    queries[:, 0] += (np.abs(queries).sum(axis=1) == 0).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder, VectorIndex(folder, distance) as index:
        index.add(items_of(count), values)
        hits = index.search(queries, limit)
    k = min(limit, count)
    wanted = reference_distances(queries, values, k, distance)
    got = np.array([[hit.distance for hit in each] for each in hits])
    # both round to 2^-40 of the scale, of squares where the distance is euclidean
    longest = 1 + max(
        np.square(each.astype(np.float64)).sum(axis=1).max() for each in (queries, values)
    )
    scale = 1 if distance == 'cosine' else longest
    power = 2 if distance == 'euclidean' else 1
    np.testing.assert_allclose(got**power, wanted**power, rtol=1e-9, atol=scale * 2.0**-37)
    # each is told with its own distance, whichever of equal ones it is
    for query, each in zip(queries, hits, strict=True):
        rows = np.array([int(hit.item.id) for hit in each])
        assert len(set(rows)) == k
        own = exact_module.distances_to(query, values[rows], distance)
        np.testing.assert_array_equal(own, [hit.distance for hit in each])


def test_the_order_is_that_of_the_reference_with_equal_ones_as_they_were_added(index):
    values = np.repeat(vectors_of(50), 4, axis=0)[np.random.default_rng(1).permutation(200)]
    index.add(items_of(200), values)
    queries = vectors_of(20, seed=2)
    positions = search(queries, values, 30)[1].tolist()
    assert ids(index.search(queries, 30)) == [[str(p) for p in row] for row in positions]


def test_far_from_the_origin_float32_estimates_miss_nothing(tmp_path):
    values = (vectors_of(500) * 1e-2 + 1e4).astype(np.float32)
    with VectorIndex(tmp_path, 'euclidean') as index:
        index.add(items_of(500), values)
        found = ids(index.search(values[:20], 5))
    positions = search(values[:20], values, 5, 'euclidean')[1].tolist()
    assert found == [[str(p) for p in row] for row in positions]


# replacing, deleting, reopening


@pytest.mark.parametrize('distance', exact_module.DISTANCES)
@pytest.mark.parametrize(
    'rows',
    [
        np.arange(2000),
        np.arange(1, 1999, 3),
        np.arange(1500, 1600),
        np.arange(5, 2000, 40),
        np.array([3]),
        np.array([0, 1999]),
        np.arange(0),
    ],
    ids=['all', 'broad', 'a stretch', 'sparse', 'one', 'ends', 'none'],
)
def test_some_rows_are_searched_as_if_there_were_no_others(monkeypatch, rows, distance):
    monkeypatch.setattr(exact_module, '_GATHERED_NUMBERS', 100)
    vectors = exact_module.GrowingVectors(8)
    vectors.change(np.arange(2000), vectors_of(2000), np.empty(0, np.int64))
    queries = vectors_of(3, seed=1)
    for k in (1, 10, 5000):
        got = exact_module.nearest(vectors.now, queries, k, distance, rows)
        for query, (found, distances) in zip(queries, got, strict=True):
            wanted, those = exact_module.rank(vectors.now, rows, query, k, distance)
            np.testing.assert_array_equal(found, wanted)
            np.testing.assert_array_equal(distances, those)


@pytest.mark.parametrize(
    'rows',
    [np.arange(19_999), np.arange(12_000, 20_000), np.arange(0, 20_000, 9)],
    ids=['a broad filter', 'the latest', 'a narrow filter'],
)
def test_a_search_of_some_rows_copies_few_embeddings(monkeypatch, rows):
    monkeypatch.setattr(exact_module, '_GATHERED_NUMBERS', 64 * 256)
    vectors = exact_module.GrowingVectors(256)
    vectors.change(np.arange(20_000), vectors_of(20_000, 256), np.empty(0, np.int64))
    exact_module.nearest(vectors.now, vectors_of(1, 256), 10, 'cosine', rows)
    tracemalloc.start()
    try:
        exact_module.nearest(vectors.now, vectors_of(1, 256), 10, 'cosine', rows)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < vectors.now.values.nbytes / 20


class Model:
    """What an index should hold, in the simplest way: a dict in the order of adding."""

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray] = {}

    def add(self, names, values) -> None:
        for name, value in zip(names, values, strict=True):
            self.held.pop(name, None)
            self.held[name] = value

    def nearest(self, query, k):
        if not self.held:
            return []
        names = list(self.held)
        found = search(query[None], np.stack([self.held[name] for name in names]), k)[1][0]
        return [names[position] for position in found.tolist()]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_adds_replacements_deletes_and_reopenings_give_what_is_left(data):
    model, seed = Model(), data.draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    names = st.lists(st.sampled_from('abcdefghij'), min_size=1, max_size=8)
    with tempfile.TemporaryDirectory() as folder:
        index = VectorIndex(folder)
        for step in data.draw(st.lists(st.sampled_from('aaadr'), min_size=1, max_size=8)):
            if step == 'r':
                index.close()
                index = VectorIndex(folder)
                continue
            some = data.draw(names)
            if step == 'a':
                values = random.normal(size=(len(some), 4)).astype(np.float32)
                there = len(set(some) & set(model.held))
                assert index.add([Item(name) for name in some], values) == there
                # of an id given twice the last one stays, at its place
                last = {name: position for position, name in enumerate(some)}
                kept = sorted(last.values())
                model.add([some[p] for p in kept], values[kept])
            else:
                assert index.delete(some) == len(set(some) & set(model.held))
                for name in some:
                    model.held.pop(name, None)
            query = random.normal(size=4).astype(np.float32)
            assert len(index) == len(model.held)
            assert ids(index.search(query[None], 20)) == [model.nearest(query, 20)]
        index.close()


def test_a_replaced_document_is_found_at_its_new_place_with_its_new_tags(index):
    index.add([Item('a', 'old', 'u', {'n': 1})], [[1.0, 0.0]])
    assert index.add([Item('a', 'new', '', {'n': 2})], [[0.0, 1.0]]) == 1
    (hit,) = index.search([[0.0, 1.0]])[0]
    assert (hit.item.text, hit.item.uri, dict(hit.item.tags)) == ('new', '', {'n': 2})
    assert hit.distance == 0
    assert index.search([[1.0, 0.0]], where={'n': 1}) == [[]]


def test_many_deletes_shrink_memory_and_find_the_rest(index):
    values = vectors_of(5000)
    index.add(items_of(5000), values)
    before = index._held.vectors.now.nbytes
    index.delete([str(number) for number in range(4000)])
    assert index._held.vectors.now.nbytes < before / 3
    positions = search(values[:5], values[4000:], 3)[1].tolist()
    assert ids(index.search(values[:5], 3)) == [[str(4000 + p) for p in row] for row in positions]


def test_contents_are_kept_only_when_asked_for(tmp_path):
    item = Item('a', content=b'picture')
    with VectorIndex(tmp_path / 'with', keep_contents=True) as index:
        index.add([item], [[1.0]])
        assert index.search([[1.0]], with_contents=True)[0][0].item.content == b'picture'
        assert index.search([[1.0]])[0][0].item.content is None
    with VectorIndex(tmp_path / 'without') as index:
        index.add([item], [[1.0]])
        assert index.search([[1.0]], with_contents=True)[0][0].item.content is None


# filters


def test_filters_agree_with_the_reference(index):
    values, random = vectors_of(300), np.random.default_rng(3)
    tags = [
        {
            'kind': str(random.choice(['a', 'b'])),
            'size': float(random.integers(3)),
            'in': ['x', i % 2],
        }
        for i in range(300)
    ]
    index.add([Item(str(i), tags=t) for i, t in enumerate(tags)], values)
    cases = [
        ({'kind': 'a'}, lambda t: t['kind'] == 'a'),
        ({'size': 1}, lambda t: t['size'] == 1),
        ({'size': [0, 2.0]}, lambda t: t['size'] in (0, 2)),
        ({'kind': 'b', 'size': True}, lambda t: t['kind'] == 'b' and t['size'] == 1),
        ({'in': 'x', 'kind': 'a'}, lambda t: t['kind'] == 'a'),
        ({'in': 0}, lambda t: t['in'][1] == 0),
        ({'kind': 'c'}, lambda t: False),
        ({'nothing': 'a'}, lambda t: False),
        ({'size': '1'}, lambda t: False),
        ({'size': []}, lambda t: False),
    ]
    for where, fits in cases:
        left = [i for i, t in enumerate(tags) if fits(t)]
        wanted = [[] for _ in range(4)]
        if left:
            positions = search(values[:4], values[left], 7)[1].tolist()
            wanted = [[str(left[p]) for p in row] for row in positions]
        assert ids(index.search(values[:4], 7, where=where)) == wanted, where


def test_zero_is_one_value_with_either_sign(index):
    index.add([Item('minus', tags={'n': -0.0}), Item('plus', tags={'n': 0})], [[1, 0], [0, 1]])
    for zero in (0, 0.0, -0.0, False):
        assert ids(index.search([[1, 0]], where={'n': zero})) == [['minus', 'plus']]


def test_a_filter_by_an_object_is_refused(index):
    index.add(items_of(1), [[1.0]])
    with pytest.raises(ConfigError, match=r"'size' is .*: it takes a text, a number"):
        index.search([[1.0]], where={'size': {'less': 3}})


# what is refused, whole


@pytest.mark.parametrize(
    ('embeddings', 'model', 'error', 'message'),
    [
        ([[1, 2], [np.nan, 1]], 'm', DataError, 'Document 1 holds nan or infinity'),
        ([[1, 2], [np.inf, 1]], 'm', DataError, 'Document 1 holds nan or infinity'),
        ([[1, 2], [0, 0]], 'm', DataError, 'Document 1 is zero'),
        ([[1, 2], [1e-30, 0]], 'm', DataError, 'Document 1 is zero'),
        ([[1, 2], [1e30, 0]], 'm', DataError, 'Document 1 is longer than'),
        ([[1, 2], [1e300, 0]], 'm', DataError, 'Document 1 is longer than'),
        ([[1, 2, 3], [1, 2, 4]], 'm', ConflictError, '2 dimensions, these have 3'),
        ([[1, 2], [2, 1]], 'other', ConflictError, "'m', these are of 'other'"),
        ([[1, 2], [2]], 'm', DataError, 'not numbers of one shape'),
        ([['a', 2], [2, 3]], 'm', DataError, 'not numbers of one shape'),
        ([1, 2], 'm', DataError, r'the shape \[2\]'),
        ([[1, 2]], 'm', DataError, '2 Documents came with 1 embeddings'),
    ],
)
def test_a_bad_request_adds_nothing(index, embeddings, model, error, message):
    index.add([Item('0')], [[3.0, 4.0]], 'm')
    with pytest.raises(error, match=message):
        index.add([Item('1'), Item('2')], embeddings, model)
    assert len(index) == 1
    assert ids(index.search([[3.0, 4.0]], model='m')) == [['0']]


@pytest.mark.parametrize('id_', ['', 'x' * 10_000, '\ud800', None, 7])
def test_ids_that_are_none_add_nothing(index, id_):
    with pytest.raises(DataError, match=r'^(the|an) id'):
        index.add([Item('good'), Item(id_)], [[1.0], [1.0]])
    assert len(index) == 0


@pytest.mark.parametrize(
    'id_',
    ['a\0b', '\0', "'); DROP TABLE documents; --", '%', '_', 'x' * 4096, '🦉', ' ', '../../x'],
)
def test_strange_ids_are_only_ids(index, id_):
    index.add([Item('a'), Item(id_)], [[1.0, 0.0], [0.0, 1.0]])
    assert ids(index.search([[0.0, 1.0]], 1)) == [[id_]]
    assert index.delete([id_]) == 1
    assert ids(index.search([[0.0, 1.0]])) == [['a']]


def test_tags_that_are_no_json_add_nothing(index):
    for tags in ({'a': float('nan')}, {'a': object()}):
        with pytest.raises(DataError, match="the tags of 'bad' are no JSON"):
            index.add([Item('good'), Item('bad', tags=tags)], [[1.0], [1.0]])
    assert len(index) == 0


def test_searches_of_another_model_or_dimension_are_refused(index):
    index.add(items_of(1), [[1.0, 2.0]], 'm')
    with pytest.raises(ConflictError, match=r"'m', these are of 'x'.*index them again"):
        index.search([[1.0, 2.0]], model='x')
    with pytest.raises(ConflictError, match='2 dimensions, these have 1'):
        index.search([[1.0]], model='m')
    with pytest.raises(DataError, match='query 0 is zero'):
        index.search([[0.0, 0.0]])
    with pytest.raises(ConfigError, match='limit=0'):
        index.search([[1.0, 2.0]], limit=0)


def test_an_empty_index_takes_another_model(tmp_path):
    with VectorIndex(tmp_path) as index:
        index.add(items_of(2), vectors_of(2, 3), 'm')
        assert index.clear() == 2
        index.add(items_of(1), vectors_of(1, 5), 'other')
        index.delete(['0'])
        index.add(items_of(1), vectors_of(1, 4), 'third')
    with VectorIndex(tmp_path) as index:
        assert (index.state().dimension, index.state().model) == (4, 'third')


def test_the_limit_of_documents_counts_replaced_ones_once(tmp_path):
    with VectorIndex(tmp_path, max_documents=3) as index:
        index.add(items_of(3), vectors_of(3))
        index.add(items_of(3), vectors_of(3, seed=1))
        with pytest.raises(TooLargeError, match='would hold 4 Documents, and max_documents is 3'):
            index.add(items_of(2, start=2), vectors_of(2))
        assert len(index) == 3


def test_a_full_disk_adds_nothing(index):
    index.add(items_of(3), vectors_of(3))
    pages = index._rows._writer.execute('PRAGMA page_count').fetchone()[0]
    index._rows._writer.execute(f'PRAGMA max_page_count = {pages + 2}')
    with pytest.raises(ServerError, match='full'):
        index.add(items_of(5000, start=3), vectors_of(5000))
    assert len(index) == 3
    assert len(index.search(vectors_of(1), 5000)[0]) == 3
    index._rows._writer.execute('PRAGMA max_page_count = 1000000')
    index.add(items_of(10, start=3), vectors_of(10))
    assert len(index) == 13


# one process at a time, and files that are damaged


def test_a_second_writer_is_refused(index, tmp_path):
    code = (
        'import sys; from finetuner.vector_index import VectorIndex\n'
        'from finetuner.excepts import ConflictError\n'
        'try: VectorIndex(sys.argv[1])\n'
        'except ConflictError as error: print(error)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'index')],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert 'is open already, and one process at a time can have it' in done.stdout, done.stderr
    with pytest.raises(ConflictError, match='is open already'):
        VectorIndex(tmp_path / 'index')
    index.close()
    VectorIndex(tmp_path / 'index').close()


def test_another_distance_is_refused(tmp_path):
    VectorIndex(tmp_path).close()
    with pytest.raises(ConfigError, match="measures the distance 'cosine', not 'euclidean'"):
        VectorIndex(tmp_path, 'euclidean')
    with pytest.raises(ConfigError, match="unknown distance 'cos': did you mean 'cosine'"):
        VectorIndex(tmp_path, 'cos')


def _not_a_database(path):
    path.write_bytes(b'no database at all, and longer than its header would be' * 20)


def _cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit_of_an_embedding(path):
    raw = bytearray(path.read_bytes())
    raw[raw.index(np.float32(0.123456).tobytes())] ^= 1
    path.write_bytes(raw)


def _another_programs(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute('CREATE TABLE recipes (name TEXT)')


def _newer(path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE facts SET value = '9' WHERE name = 'version'")


@pytest.mark.parametrize(
    'damage',
    [_not_a_database, _cut_short, _flip_a_bit_of_an_embedding, _another_programs, _newer],
)
def test_damaged_files_are_refused_and_the_lock_is_let_go(tmp_path, damage):
    values = vectors_of(2000)
    values[7, 0] = 0.123456
    with VectorIndex(tmp_path) as index:
        index.add(items_of(2000), values)
    path = tmp_path / 'index.db'
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(ConfigError, match=r'cannot be opened|upgrade finetuner'):
        VectorIndex(tmp_path)
    path.write_bytes(whole)
    with VectorIndex(tmp_path) as index:
        assert len(index) == 2000


# ended at any moment

KILLED = """
import sys
import numpy as np
from finetuner.vector_index import Item, VectorIndex

index = VectorIndex(sys.argv[1], approximate_above=300, keep_contents=True)
start = len(index)
for batch in range(start, start + 10_000, 20):
    values = np.random.default_rng(batch).normal(size=(20, 16))
    items = [Item(str(batch + i), tags={'batch': batch}, content=bytes(500)) for i in range(20)]
    index.add(items, values)
    print(batch, flush=True)
"""


def test_kill_9_amid_adds_loses_nothing_that_was_answered(tmp_path):
    for answers in (1, 17, 40):
        process = subprocess.Popen(
            [sys.executable, '-c', KILLED, str(tmp_path / 'index')],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        answered = [int(process.stdout.readline()) for _ in range(answers)]
        process.send_signal(signal.SIGKILL)
        answered += [int(line) for line in process.stdout.read().split()]
        process.wait()
        with VectorIndex(tmp_path / 'index', keep_contents=True) as index:
            assert len(index) >= answered[-1] + 20
            assert len(index) % 20 == 0, 'nothing half-written'
            for batch in answered[:3] + answered[-3:]:
                values = np.random.default_rng(batch).normal(size=(20, 16))
                hits = index.search(values, 1, where={'batch': batch}, with_contents=True)
                assert ids(hits) == [[str(batch + i)] for i in range(20)]
                assert all(len(hit[0].item.content or b'') == 500 for hit in hits)


def test_searches_go_on_beside_adds_and_deletes(index):
    values = vectors_of(3000, 16)
    index.add(items_of(200), values[:200])
    failures, done = [], threading.Event()

    def look():
        while not done.is_set():
            try:
                for number, hits in zip(range(5), index.search(values[:5], 3), strict=True):
                    assert hits[0].item.id == str(number)
                    assert len(hits) == 3
                    assert [h.distance for h in hits] == sorted(h.distance for h in hits)
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(200, 3000, 50):
        index.add(items_of(50, start), values[start : start + 50])
        index.delete([str(number) for number in range(start - 40, start)])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize('at', ['between two tags', 'before the tags'])
def test_a_filter_finds_documents_while_they_are_replaced(index, monkeypatch, at):
    items, asked = [Item('a', tags={'color': 'red', 'size': 1})], []
    index.add(items, [[1, 0]])
    moment = {'between two tags': 2, 'before the tags': 1}[at]

    def replace_and_ask(name, value):
        asked.append(name)
        if len(asked) == moment:
            index.add(items, [[1, 0]])
        return wanted_term(name, value)

    wanted_term = rows_module._wanted_term
    monkeypatch.setattr(rows_module, '_wanted_term', replace_and_ask)
    assert ids(index.search([[1, 0]], where={'color': 'red', 'size': 1})) == [['a']]
    assert len(asked) > 2, 'it looked again'


def test_filtered_searches_miss_nothing_beside_a_writer(index):
    items, values = items_of(50, tags={'color': 'red'}), vectors_of(50)
    index.add(items, values)
    done = threading.Event()

    def write():
        while not done.is_set():
            index.add(items, values)

    thread = threading.Thread(target=write)
    thread.start()
    found = [len(index.search(values[:1], 50, where={'color': 'red'})[0]) for _ in range(100)]
    done.set()
    thread.join()
    assert set(found) == {50}


# the graph


def recall_of(hits, queries, values, k=10) -> float:
    true = search(queries, values, k)[1].tolist()
    shares = [
        len(set(found) & {str(p) for p in row}) / k
        for found, row in zip(ids(hits), true, strict=True)
    ]
    return float(np.mean(shares))


def test_the_graph_finds_what_an_exact_search_does_through_deletes_and_reopening(tmp_path):
    values, queries = clustered(6000), clustered(50, seed=7)
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        for start in range(0, 6000, 500):
            index.add(items_of(500, start), values[start : start + 500])
        assert index.settle()
        assert index.state().approximate
        assert recall_of(index.search(queries), queries, values) >= 0.95
        # what was added since is found without the graph, what was deleted is not
        index.add([Item('new')], queries[:1])
        assert ids(index.search(queries[:1], 1)) == [['new']]
        gone = [hit.item.id for hit in index.search(queries[:1], 200)[0]]
        index.delete(gone)
        (left,) = index.search(queries[:1], 10)
        assert len(left) == 10
        assert not {hit.item.id for hit in left} & set(gone)
        kept = sorted(set(range(6000)) - {int(name) for name in gone if name != 'new'})
        true = search(queries[:1], values[kept], 10)[1][0]
        assert [hit.item.id for hit in left] == [str(kept[p]) for p in true]
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        assert index.state().approximate, 'the graph is there at once'
        assert ids(index.search(queries[:1], 10)) == [[hit.item.id for hit in left]]


def test_distances_through_the_graph_are_the_exact_ones(tmp_path):
    values, queries = clustered(5000), clustered(20, seed=7)
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        index.add(items_of(5000), values)
        index.settle()
        assert index.state().approximate
        for query, hits in zip(queries, index.search(queries, 5), strict=True):
            own = exact_module.distances_to(
                query, values[[int(hit.item.id) for hit in hits]], 'cosine'
            )
            np.testing.assert_array_equal(own, [hit.distance for hit in hits])


@pytest.mark.parametrize('distance', ['cosine', 'euclidean', 'inner_product'])
def test_each_distance_has_its_graph(tmp_path, distance):
    values, queries = clustered(4000), clustered(40, seed=7)
    with VectorIndex(tmp_path, distance, approximate_above=1000, recall=0.9) as index:
        index.add(items_of(4000), values)
        index.settle()
        got = [[hit.distance for hit in hits] for hits in index.search(queries, 10)]
    wanted = reference_distances(queries, values, 10, distance)
    assert np.isclose(got, wanted, rtol=1e-9, atol=1e-6).mean() >= 0.85


def test_random_vectors_get_a_search_wide_enough(monkeypatch):
    # at 20,000 vectors comparing all is faster than so wide a search: have it search anyway
    monkeypatch.setattr(find_width, '__defaults__', (1,))
    values = vectors_of(20_000, 64)
    vectors = exact_module.GrowingVectors(64)
    vectors.change(np.arange(20_000), values, np.empty(0, np.int64))
    graph = build_graph(vectors.now, 'cosine', 0.98)
    assert len(graph) == 20_000
    assert graph.width
    queries = vectors_of(200, 64, seed=5)
    true = search(queries, values, 10)[1].numpy()
    found = [
        np.isin(row, graph.candidates(query, 10)).mean()
        for query, row in zip(queries, true, strict=True)
    ]
    assert np.mean(found) >= 0.95


def test_where_the_graph_is_no_faster_all_are_compared(tmp_path):
    values, queries = vectors_of(3000, 64), vectors_of(50, 64, seed=5)
    with VectorIndex(tmp_path, approximate_above=1000, recall=1.0) as index:
        index.add(items_of(3000), values)
        index.settle()
        assert not index.state().approximate
        assert recall_of(index.search(queries), queries, values) == 1


def test_a_damaged_graph_is_built_again(tmp_path, caplog):
    values = clustered(4000)
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        index.add(items_of(4000), values)
        index.settle()
    (path,) = tmp_path.glob('graph-*.faiss')
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    (tmp_path / 'graph-left-behind.part').write_bytes(b'half')
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        assert 'damaged or gone' in caplog.text
        assert ids(index.search(values[:3], 1)) == [['0'], ['1'], ['2']]
        index.settle()
        assert index.state().approximate
    assert len(list(tmp_path.glob('graph-*'))) == 1


def test_a_graph_that_could_not_be_built_is_tried_again_at_the_next_change(
    tmp_path, caplog, monkeypatch
):
    failures = [MemoryError('std::bad_alloc'), RuntimeError('of FAISS')]

    def build(*arguments):
        if failures:
            raise failures.pop(0)
        return build_graph(*arguments)

    monkeypatch.setattr(graph_keeper, 'build_graph', build)
    values = clustered(4000)
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        for start, error in ((0, 'bad_alloc'), (1500, 'of FAISS')):
            index.add(items_of(1500, start), values[start : start + 1500])
            assert index.settle()
            assert error in caplog.text
            assert not index.state().approximate
        index.add(items_of(1000, 3000), values[3000:])
        assert index.settle()
        assert index.state().approximate


def test_a_graph_that_cannot_be_kept_leaves_the_index_to_be_opened_again(tmp_path, monkeypatch):
    values = clustered(4000)
    index = VectorIndex(tmp_path, approximate_above=1000)
    with monkeypatch.context() as patched:
        patched.setattr(Graph, 'save', lambda *_: 1 / 0)
        index.add(items_of(4000), values)
        assert index.settle()
        assert index.state().approximate, 'it is used all the same'
        with pytest.raises(ZeroDivisionError):
            index.close()
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        assert len(index) == 4000


def test_an_index_emptied_while_it_had_a_graph_starts_anew(tmp_path):
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        index.add(items_of(4000), clustered(4000))
        index.clear()
        index.add(items_of(4000), clustered(4000, 24), 'other')
        index.settle()
        assert ids(index.search(clustered(4000, 24)[:2], 1)) == [['0'], ['1']]
    with VectorIndex(tmp_path, approximate_above=1000) as index:
        assert ids(index.search(clustered(4000, 24)[:2], 1)) == [['0'], ['1']]
