"""Search, evaluation and mining shard by shard find what is found over everything at once."""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from typer.testing import CliRunner

from finetuner.bulk import (
    evaluate_shards,
    mine_negatives,
    open_encoded,
    search_plan,
    search_shards,
    take_column,
)
from finetuner.evaluation import evaluate_embeddings
from finetuner.excepts import ConfigError, DataError, NotFoundError
from finetuner.search import DISTANCES, Nearest, search
from tests.unit.encoded_cases import write_encoded


def vectors(count, dimension=16, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


@pytest.fixture(autouse=True)
def few_queries_at_once(monkeypatch):
    monkeypatch.setattr(search_plan, '_QUERIES_AT_ONCE', 64)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Queries and an index, their labels, and both encoded."""
    folder = tmp_path_factory.mktemp('encoded')
    query, index = vectors(150), vectors(700, seed=1)
    # equal ones in other shards, and one without a length
    index[300:340] = index[20:60]
    index[500] = 0
    labels = [f'class {n % 9}' for n in range(150)], [f'class {n % 11}' for n in range(700)]
    write_encoded(folder / 'query', query, labels[0], [f'q{n}' for n in range(150)])
    write_encoded(folder / 'index', index, labels[1], [f'i{n}' for n in range(700)], 90)
    return folder, query, index, labels


def equal(found, wanted):
    """The same neighbours; blocks that are cut elsewhere may round a distance to the next 2^-40."""
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('k', [1, 20, 1000])
def test_shards_find_what_everything_finds(data, distance, k):
    folder, query, index, _ = data
    wanted = search(query, index, k, distance)
    equal(search_shards(folder / 'query', folder / 'index', k, distance), wanted)
    equal(search_shards(query, open_encoded(folder / 'index'), k, distance), wanted)


@settings(max_examples=40, deadline=None)
@given(
    num_index=st.integers(1, 60),
    rows_per_shard=st.integers(1, 25),
    k=st.integers(1, 70),
    values=st.integers(1, 3),
    failed=st.sets(st.integers(0, 59), max_size=5),
    distance=st.sampled_from(DISTANCES),
    format_name=st.sampled_from(['parquet', 'numpy']),
    seed=st.integers(0, 5),
)
def test_any_shards(
    tmp_path_factory, num_index, rows_per_shard, k, values, failed, distance, format_name, seed
):
    """Points of a small lattice, of which many are as far away as others."""
    random = np.random.default_rng(seed)
    query = random.integers(-values, values + 1, (9, 3)).astype(np.float32)
    index = random.integers(-values, values + 1, (num_index, 3)).astype(np.float32)
    failed = {row for row in failed if row < num_index - 1}
    folder = tmp_path_factory.mktemp('x')
    write_encoded(folder, index, None, None, rows_per_shard, failed, format_name)
    there = np.delete(index, sorted(failed), axis=0)
    equal(search_shards(query, folder, k, distance), search(query, there, k, distance))


@pytest.mark.parametrize('distance', DISTANCES)
def test_rows_that_come_part_by_part(distance):
    query, index = vectors(30), vectors(200, seed=1)
    for cuts in ([], [1], [50, 50, 199], list(range(0, 200, 7))):
        nearest = Nearest(query, 12, distance, block_size=16)
        for part in np.split(index, cuts):
            if len(part):
                nearest.add(part)
        equal(nearest.found(), search(query, index, 12, distance))


@pytest.mark.parametrize('distance', DISTANCES)
def test_faiss_finds_the_same_to_float32(data, distance):
    folder, query, index, _ = data
    wanted = search(query, index, 5, distance)
    distances, positions = search_shards(
        folder / 'query', folder / 'index', 5, distance, engine='faiss'
    )
    np.testing.assert_allclose(distances, wanted[0], atol=3e-3 if distance == 'euclidean' else 1e-5)
    # of equal ones either may be first
    assert (positions == wanted[1]).double().mean() > 0.95
    flat = faiss.IndexFlatL2(16)
    flat.add(index)
    if distance == 'sqeuclidean':
        np.testing.assert_allclose(distances, flat.search(query, 5)[0], atol=1e-4)


def test_processes_find_the_same(data):
    folder, query, _, _ = data
    for engine in ('exact', 'faiss'):
        alone = search_shards(query, folder / 'index', 7, engine=engine)
        tasks = search_shards(query, folder / 'index', 7, engine=engine, num_workers=2)
        equal(tasks, alone)
    with pytest.raises(DataError, match='8 dimensions, index embeddings 16'):
        search_shards(query[:, :8], folder / 'index', 7, num_workers=2)


def same(metrics, wanted):
    assert metrics == wanted
    assert list(metrics) == list(wanted)


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('k', [5, 1000])
def test_metrics_are_those_of_everything(data, distance, k):
    folder, query, index, labels = data
    wanted = evaluate_embeddings(query, labels[0], index, labels[1], k, distance)
    same(evaluate_shards(folder / 'query', folder / 'index', k=k, distance=distance), wanted)
    wanted = evaluate_embeddings(index, labels[1], limit=k, distance=distance)
    same(evaluate_shards(folder / 'index', k=k, distance=distance), wanted)


def test_queries_of_the_index_do_not_find_themselves(data, tmp_path):
    folder, _, index, labels = data
    chosen = [5, 30, 310, 699]
    ids = [f'i{n}' for n in chosen] + ['other']
    rows = [*chosen, 8]
    query_labels = [labels[1][row] for row in rows]
    write_encoded(tmp_path / 'query', index[rows], query_labels, ids, 2)
    index_ids = [f'i{n}' for n in range(700)]
    for k in (3, 700):
        for exclude_self in (True, False):
            wanted = evaluate_embeddings(
                index[rows], query_labels, index, labels[1], k,
                exclude_self=exclude_self, query_ids=ids, index_ids=index_ids,
            )  # fmt: skip
            found = evaluate_shards(
                tmp_path / 'query', folder / 'index', k=k, exclude_self=exclude_self
            )
            same(found, wanted)


def test_ids_that_are_held_twice(tmp_path):
    points = vectors(6)
    write_encoded(tmp_path / 'index', points, [1] * 6, ['a', 'b', 'c', 'a', 'd', 'd'], 2)
    write_encoded(tmp_path / 'query', points[:1], [1], ['a'])
    write_encoded(tmp_path / 'other', points[:1], [1], ['b'])
    write_encoded(tmp_path / 'near', points[:1], [1], ['d'])
    for name, id_ in (('query', 'a'), ('near', 'd')):
        for num_workers in (1, 2):
            with pytest.raises(DataError, match=f"the id '{id_}' of a query is held by several"):
                evaluate_shards(tmp_path / name, tmp_path / 'index', k=2, num_workers=num_workers)
    assert evaluate_shards(tmp_path / 'other', tmp_path / 'index', k=2)['precision_at_k'] == 1


def test_labels_that_are_not_there(tmp_path):
    points = vectors(6)
    write_encoded(tmp_path / 'index', points, [1, 2, 3, 1, 2, None], rows_per_shard=4)
    write_encoded(tmp_path / 'query', points, [1, 2, 1, 1, 2, 9], [f'q{n}' for n in range(6)])
    with pytest.raises(DataError, match='index Document 5 has no label'):
        evaluate_shards(tmp_path / 'query', tmp_path / 'index')
    with pytest.raises(DataError, match='index Document 5 has no label'):
        mine_negatives(tmp_path / 'query', tmp_path / 'index', tmp_path / 'x.parquet')
    write_encoded(tmp_path / 'index', points, [1, 2, 3, 1, 2, 4], rows_per_shard=4)
    with pytest.raises(DataError, match='label 9 of query Document 5 is not in the index'):
        evaluate_shards(tmp_path / 'query', tmp_path / 'index')
    with pytest.raises(DataError, match=r'label 3 .*besides the query itself'):
        evaluate_shards(tmp_path / 'index')
    with pytest.raises(ConfigError, match=r"unknown column 'kind'.*keep=\['kind'\]"):
        evaluate_shards(tmp_path / 'query', tmp_path / 'index', label='kind')


def naive_negatives(query, query_labels, index, index_labels, k, skip, distance):
    distances, positions = search(query, index, len(index), distance)
    found = []
    for row, label in enumerate(query_labels):
        others = [
            (float(d), int(p))
            for d, p in zip(distances[row], positions[row], strict=True)
            if index_labels[p] != label
        ]
        found.append(others[skip : skip + k])
    return found


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize(('k', 'skip'), [(1, 0), (10, 3)])
def test_negatives_are_the_nearest_of_other_labels(data, tmp_path, distance, k, skip):
    folder, query, index, labels = data
    path = tmp_path / 'negatives.parquet'
    done = mine_negatives(
        folder / 'query', folder / 'index', path, k=k, skip=skip, distance=distance
    )
    assert (done.output, done.num_anchors, done.num_without) == (path, 150, 0)
    table = parquet.read_table(path).to_pydict()
    assert table['anchor_id'] == [f'q{n}' for n in range(150)]
    wanted = naive_negatives(query, labels[0], index, labels[1], k, skip, distance)
    assert table['negative_ids'] == [[f'i{p}' for _, p in row] for row in wanted]
    distances = [[d for d, _ in row] for row in wanted]
    np.testing.assert_allclose(table['distances'], distances, rtol=1e-9, atol=1e-11)


def test_negatives_among_the_anchors(tmp_path):
    points, labels = vectors(30), [n % 2 if n < 28 else 'odd' for n in range(30)]
    labels = list(map(str, labels))
    write_encoded(tmp_path / 'a', points, labels, rows_per_shard=7, failed={3, 29})
    done = mine_negatives(tmp_path / 'a', None, tmp_path / 'x.parquet', k=100)
    assert done.num_anchors == 28
    table = parquet.read_table(tmp_path / 'x.parquet').to_pydict()
    of = {f'row {n}': label for n, label in enumerate(labels) if n not in (3, 29)}
    counts = Counter(of.values())
    for anchor, negatives in zip(table['anchor_id'], table['negative_ids'], strict=True):
        assert {of[each] for each in negatives} == set(counts) - {of[anchor]}
        assert len(set(negatives)) == len(negatives) == 28 - counts[of[anchor]]
    write_encoded(tmp_path / 'same', points, ['x'] * 30)
    done = mine_negatives(tmp_path / 'same', None, tmp_path / 'y.parquet')
    assert (done.num_anchors, done.num_without) == (30, 30)


def test_what_is_not_there_or_out_of_range(data, tmp_path):
    folder, query, _, _ = data
    for options, words in (
        ({'k': 0}, 'k=0'),
        ({'distance': 'manhattan'}, 'unknown distance'),
        ({'engine': 'annoy'}, 'unknown engine'),
        ({'num_workers': 0}, 'num_workers=0'),
        ({'ray_address': 'http://x'}, 'no address of a Ray cluster'),
    ):
        with pytest.raises(ConfigError, match=words):
            search_shards(query, folder / 'index', **options)
    with pytest.raises(NotFoundError, match='manifest'):
        search_shards(query, tmp_path)
    with pytest.raises(DataError, match='there are no queries'):
        search_shards(query[:0], folder / 'index')
    write_encoded(tmp_path / 'none', vectors(2), failed={0, 1})
    with pytest.raises(DataError, match='holds no embeddings'):
        search_shards(query, tmp_path / 'none')
    with pytest.raises(ConfigError, match='cannot be written'):
        mine_negatives(folder / 'query', folder / 'index', tmp_path / 'no' / 'x.parquet')
    part = tmp_path / 'broken'
    write_encoded(part, vectors(50), rows_per_shard=20)
    file = part / 'part-00001.parquet'
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r'part-00001\.parquet.* is not what was written'):
        search_shards(query, part)


@pytest.mark.parametrize('format_name', ['parquet', 'numpy'])
def test_columns_at_some_rows(tmp_path, format_name):
    labels = list(range(100))
    write_encoded(
        tmp_path / 'x', vectors(100), labels, rows_per_shard=30, failed={0, 31, 99},
        format_name=format_name,
    )  # fmt: skip
    dataset = open_encoded(tmp_path / 'x')
    there = [label for label in labels if label not in (0, 31, 99)]
    positions = np.random.default_rng(0).integers(0, 97, (5, 7))
    found = take_column(dataset, positions, 'label')
    assert found.tolist() == [[there[p] for p in row] for row in positions]
    assert take_column(dataset, [96, 0], 'id').tolist() == ['row 98', 'row 1']


def test_the_guide_runs_as_it_is_written(data, tmp_path, monkeypatch):
    from finetuner.cli import app

    folder, _, _, _ = data
    (tmp_path / 'queries').symlink_to(folder / 'query')
    (tmp_path / 'out').symlink_to(folder / 'index')
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / 'docs' / 'evaluation.md').read_text(encoding='utf-8')
    section = guide[guide.index('## Over encoded data sets') :]
    (python,) = re.findall('```python\n(.*?)```', section, re.DOTALL)
    namespace = {}
    exec(python, namespace)
    assert namespace['ids'].shape == (150, 10)
    assert namespace['mined'].num_anchors == 150
    Path('negatives.parquet').unlink()
    (bash,) = re.findall('```bash\n(.*?)```', section, re.DOTALL)
    for line in bash.splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    assert Path('negatives.parquet').exists()


SCRIPT = """
import re, sys
from finetuner.bulk import search_shards
import numpy as np
search_shards(np.ones((50, 256), np.float32), sys.argv[1])
print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_flat(tmp_path):
    peaks = []
    for number in (10_000, 80_000):
        folder = tmp_path / str(number)
        write_encoded(folder, vectors(number, 256), rows_per_shard=5_000, format_name='numpy')
        environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, '-c', SCRIPT, str(folder)],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        peaks.append(int(done.stdout) / 1024)
    # of 70 MB more
    assert peaks[1] - peaks[0] < 15


def test_the_commands(data, tmp_path):
    from finetuner.cli import app

    folder, query, index, labels = data
    run = CliRunner().invoke
    done = run(app, ['evaluate', str(folder / 'query'), str(folder / 'index'), '-k', '5', '--json'])
    assert done.exit_code == 0, done.output
    import json

    wanted = evaluate_embeddings(query, labels[0], index, labels[1], 5)
    assert json.loads(done.stdout) == wanted
    path = tmp_path / 'x.parquet'
    done = run(app, ['mine', str(folder / 'query'), str(path), '--index', str(folder / 'index')])
    assert done.exit_code == 0, done.output
    assert re.search(r'150 anchors', done.output)
    assert parquet.read_metadata(path).num_rows == 150
    assert run(app, ['evaluate', str(tmp_path)]).exit_code != 0
