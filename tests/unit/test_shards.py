"""Shards streamed by rank: each row once an epoch, in an order that a seed says and nothing else."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from docarray import Document
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from finetuner.data import save_documents
from finetuner.data.shards import ShardedDocuments, uniform
from finetuner.excepts import ConfigError, DataError
from tests.unit.test_webdataset import shard

ENDINGS = ('parquet', 'jsonl', 'tar', 'docs')


def write(folder, sizes, ending='jsonl', group_size=3):
    """Shards of so many texts each, which are counted through all of them."""
    paths, first = [], 0
    for number, size in enumerate(sizes):
        path = folder / f'{number:03}.{ending}'
        texts = [str(first + each) for each in range(size)]
        first += size
        if ending == 'parquet':
            table = pa.table({'text': pa.array(texts, pa.string())})
            parquet.write_table(table, path, row_group_size=group_size)
        elif ending == 'jsonl':
            path.write_text(''.join(f'{json.dumps({"text": text})}\n\n' for text in texts))
        elif ending == 'tar':
            shard(path, *((f'{text}.txt', text) for text in texts))
        else:
            save_documents([Document(text=text) for text in texts], path)
        paths.append(path)
    return paths


def taken(docs):
    return [int(doc.text) for doc in docs]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Shards of the same 60 rows, some of them empty, in each form."""
    made = {}
    for ending in ENDINGS:
        folder = tmp_path_factory.mktemp(ending)
        made[ending] = write(folder, [0, 7, 20, 1, 0, 12, 20], ending)
    return made


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    ending=st.sampled_from(['parquet', 'jsonl']),
    num_ranks=st.integers(1, 5),
    num_readers=st.integers(1, 3),
    buffer=st.integers(1, 12),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)
def test_each_row_comes_to_one_reader_once(
    tmp_path_factory, sizes, ending, num_ranks, num_readers, buffer, shuffle, seed
):
    paths = write(tmp_path_factory.mktemp('x'), sizes, ending, group_size=4)
    rows = []
    for rank in range(num_ranks):
        docs = ShardedDocuments(paths, rank, num_ranks, seed, buffer, shuffle)
        shares = [
            taken(doc for _, doc in docs.read_epoch(2, reader, num_readers))
            for reader in range(num_readers)
        ]
        docs.epoch = 2
        own = list(chain(*shares))
        assert sorted(own) == sorted(taken(docs))
        rows += own
    assert sorted(rows) == list(range(sum(sizes)))


@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize('num_ranks', [1, 3, 8])
def test_of_each_form(folders, ending, num_ranks):
    of_ranks = [
        taken(ShardedDocuments(folders[ending], rank, num_ranks)) for rank in range(num_ranks)
    ]
    assert sorted(chain(*of_ranks)) == list(range(60))


def test_orders_differ_by_epoch_and_seed_and_by_nothing_else(folders):
    def epochs(seed):
        docs = ShardedDocuments(folders['jsonl'], 0, 1, seed, 10)
        return [tuple(taken(docs)) for _ in range(3)]

    assert epochs(1) == epochs(1)
    assert len({*epochs(1), *epochs(2), tuple(range(60))}) == 7
    later = ShardedDocuments(folders['jsonl'], 0, 1, 1, 10)
    later.epoch = 2
    assert tuple(taken(later)) == epochs(1)[2]


def test_in_order_without_shuffling(folders):
    for ending in ENDINGS:
        docs = ShardedDocuments(folders[ending], 0, 1, shuffle=False)
        assert taken(docs) == taken(docs) == list(range(60))


def displacement(order):
    """How far rows are from where they would be without shuffling, a random order being 1."""
    return np.abs(np.asarray(order) - np.arange(len(order))).mean() / (len(order) / 3)


def neighbours_of_one_shard(order, size):
    shards = np.asarray(order) // size
    return (shards[1:] == shards[:-1]).mean()


def test_the_buffer_mixes_shards(tmp_path):
    paths = write(tmp_path, [50] * 40)
    orders = {
        buffer: taken(ShardedDocuments(paths, 0, 1, 0, buffer)) for buffer in (1, 50, 500, 2000)
    }
    mixed = [neighbours_of_one_shard(order, 50) for order in orders.values()]
    # the whole order is that of the shards, which is shuffled too
    assert mixed[0] > 0.9
    assert mixed[0] > mixed[1] > mixed[2] > mixed[3]
    assert mixed[3] < 0.05
    assert all(displacement(order) > 0.6 for order in orders.values())
    # a whole permutation: no place is left to those that begin
    assert 0.85 < displacement(orders[2000]) < 1.15


def test_each_row_may_come_anywhere(tmp_path):
    paths = write(tmp_path, [2, 2, 2])
    docs = ShardedDocuments(paths, 0, 1, 0, 6)
    orders = Counter(tuple(taken(docs)) for _ in range(3000))
    # 720 orders, 4.2 of each: chi-squared with 719 degrees of freedom, 5 standard deviations wide
    expected = 3000 / 720
    chi = sum((orders.get(o, 0) - expected) ** 2 for o in orders) / expected
    chi += (720 - len(orders)) * expected
    assert abs(chi - 719) < 5 * (2 * 719) ** 0.5


@settings(max_examples=60, deadline=None)
@given(
    ending=st.sampled_from(ENDINGS),
    num_ranks=st.integers(1, 9),
    buffer=st.integers(1, 70),
    cut=st.integers(0, 62),
    data=st.data(),
)
def test_what_follows_a_state_is_the_same(folders, ending, num_ranks, buffer, cut, data):
    rank = data.draw(st.integers(0, num_ranks - 1))
    arguments = (folders[ending], rank, num_ranks, 5, buffer)
    whole = ShardedDocuments(*arguments)
    whole.epoch = 1
    expected = taken(whole) + taken(whole)
    first = ShardedDocuments(*arguments)
    first.epoch = 1
    rows = []
    for doc in first:
        if len(rows) == cut:
            break
        rows.append(int(doc.text))
        state = json.loads(json.dumps(first.state_dict()))
    else:
        state = first.state_dict()
    if not rows:
        state = {'epoch': 1, 'num_taken': 0}
    second = ShardedDocuments(*arguments)
    second.load_state_dict(state)
    while len(rows) < len(expected):
        rows += taken(second)
    assert rows[: len(expected)] == expected


def test_going_on_reads_little_again(tmp_path):
    paths = write(tmp_path, [200] * 20, 'jsonl')
    docs = ShardedDocuments(paths, 0, 1, 0, 50)
    read = []
    for each in docs._shards:
        rows = each.rows
        each.rows = lambda *args, rows=rows: (read.append(row) or row for row in rows(*args))
    docs.load_state_dict({'epoch': 0, 'num_taken': 3500})
    assert len(taken(docs)) == 500
    # the rest, and what of the buffer lies in shards before
    assert len(read) < 800


def test_the_environment_says_the_rank(folders, monkeypatch):
    docs = ShardedDocuments(folders['jsonl'])
    assert (docs.rank, docs.num_ranks) == (0, 1)
    monkeypatch.setenv('RANK', '2')
    monkeypatch.setenv('WORLD_SIZE', '3')
    docs = ShardedDocuments(folders['jsonl'])
    assert (docs.rank, docs.num_ranks) == (2, 3)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ConfigError, match='RANK=2: with WORLD_SIZE=2 it is from 0 to 1'):
        ShardedDocuments(folders['jsonl'])
    monkeypatch.setenv('RANK', 'first')
    with pytest.raises(ConfigError, match="RANK='first' of the environment"):
        ShardedDocuments(folders['jsonl'])


def test_torch_says_the_rank(folders, tmp_path, monkeypatch):
    from torch import distributed

    monkeypatch.setenv('RANK', '7')
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path / "meeting"}', rank=0, world_size=1
    )
    try:
        docs = ShardedDocuments(folders['jsonl'])
        assert (docs.rank, docs.num_ranks) == (0, 1)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'rank': 0}, 'give both'),
        ({'rank': 2, 'num_ranks': 2}, 'from 0 to 1'),
        ({'rank': -1, 'num_ranks': 2}, 'rank=-1'),
        ({'seed': -1}, 'seed=-1'),
        ({'seed': 1.5}, 'seed=1.5'),
        ({'shuffle_buffer': 0}, 'shuffle_buffer=0'),
        ({'label': 'x'}, 'WebDataset'),
    ],
)
def test_arguments_out_of_range(folders, options, words):
    with pytest.raises(ConfigError, match=words):
        ShardedDocuments(folders['jsonl'], **options)


def test_rows_that_are_none_are_named(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"texts": "b"}')
    with pytest.raises(DataError, match=r"line 2 of 'a.jsonl'"):
        list(ShardedDocuments(tmp_path / '*.jsonl', shuffle=False))
    (tmp_path / 'a.jsonl').write_text('{"query": "a", "document": "b"}')
    with pytest.raises(DataError, match=r"line 1 of 'a.jsonl': a query .*open_documents"):
        list(ShardedDocuments(tmp_path / 'a.jsonl'))


def test_numbers_drawn_are_those_of_the_key():
    drawn = uniform((1, 2, 3))
    again = uniform((1, 2, 3))
    numbers = [drawn() for _ in range(1000)]
    assert numbers == [again() for _ in range(1000)]
    assert numbers[0] != uniform((1, 2, 4))()
    assert abs(np.mean(numbers) - 0.5) < 0.05


SCRIPT = """
import re, sys
from finetuner.data.shards import ShardedDocuments
docs = ShardedDocuments(sys.argv[1], shuffle_buffer=100)
assert sum(len(doc.text) for doc in docs) > 0
print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('ending', ['parquet', 'tar'])
def test_memory_is_flat(tmp_path, ending):
    """A file of four times the rows takes as much memory."""
    peaks = []
    for times in (1, 4):
        path = tmp_path / f'{times}.{ending}'
        texts = [f'{number:06}' + 'x' * 20_000 for number in range(2000 * times)]
        if ending == 'parquet':
            parquet.write_table(pa.table({'text': texts}), path, compression='none')
        else:
            shard(path, *((f'{n}.txt', text) for n, text in enumerate(texts)))
        environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, '-c', SCRIPT, str(path)],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        peaks.append(int(done.stdout) / 1024)
    # of 120 MB more
    assert peaks[1] - peaks[0] < 30
