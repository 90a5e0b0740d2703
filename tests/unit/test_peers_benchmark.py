"""What the peers' table says of a run's log and of embeddings, without training anything."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks; what that brings in is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, 'path', [str(BENCHMARKS), str(BENCHMARKS / 'peers'), *sys.path])
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], '__file__', '')):
            del sys.modules[name]


LOG = [
    (100.0, 'Training on 1000 Documents (class): ...'),
    (130.0, 'Evaluation, before training: precision_at_k 0.5, recall_at_k 0.500'),
    (135.0, 'Whitening fitted to 1000 Documents'),
    (140.0, 'Training [1/2] batch 3/7: loss 0.5, 60 Documents/s, 20 s left'),
    (180.0, 'Evaluation, epoch 1: precision_at_k 0.6, recall_at_k 0.612'),
    (180.0, 'Epoch 1/2 done in 45.0 s: train_loss 0.5, 89.6 Documents/s'),
    (220.0, 'Evaluation, epoch 2: precision_at_k 0.7, recall_at_k 0.705'),
    (221.0, 'Epoch 2/2 done in 41.0 s: train_loss 0.4, 89.6 Documents/s'),
    (231.0, 'Whitening fitted to 1000 Documents'),
    (261.0, 'Evaluation, after training: recall_at_k 0.711'),
    (261.5, 'Writing the artifact'),
]


def test_evaluation_is_taken_off_the_times_of_a_run(load):
    times = load('ours').read_times(LOG, [896, 896], 'recall_at_k')
    assert times.epoch_seconds == pytest.approx([10, 10])
    # before 30, after the epochs 35 and 30, at the end 30
    assert times.paused_seconds == pytest.approx(125)
    assert times.train_seconds == pytest.approx(161.5 - 125)
    assert [value for _, value in times.curve] == [0.612, 0.705]
    assert [seconds for seconds, _ in times.curve] == pytest.approx([15, 26])


def test_a_run_without_evaluation_has_all_its_seconds(load):
    lines = [line for line in LOG if not line[1].startswith('Evaluation')]
    times = load('ours').read_times(lines, [896, 896], 'recall_at_k')
    assert (times.paused_seconds, times.train_seconds, times.curve) == (0, 161.5, [])


def test_a_log_of_another_shape_is_refused(load):
    with pytest.raises(ValueError, match='lines'):
        load('ours').read_times(LOG[:-1], [896, 896], 'recall_at_k')


def test_the_best_way_of_embedding_counts_for_a_peer_and_cosine_for_ours(load, tmp_path):
    peers = _driver(load)
    task = load('contestant').Task(
        'pictures',
        train=[],
        query=[('a', 0), ('b', 1)],
        index=[('c', 0), ('d', 1)],
        epochs=1,
        batch_size=2,
        items_per_class=1,
        train_size=1,
        embed_sizes=[],
        num_workers=0,
        seed=0,
    )
    # of one direction: only their lengths tell them apart
    lengths = np.array([[1.0, 0], [5.0, 0]])
    load('contestant').write_embeddings(tmp_path, 'encode', lengths, lengths)
    ours, peer = peers.CONTESTANTS['defaults'], peers.CONTESTANTS['pml']
    peers.METRICS['pictures'] = ('recall_at_k', 1, 'recall@1')
    assert peers.best_score(peer, task, tmp_path) == (1.0, 'encode, euclidean')
    assert peers.best_score(ours, task, tmp_path) == (0.5, 'encode, cosine')


def _driver(load):
    """`peers.py`, which a folder of the same name stands beside."""
    spec = importlib.util.spec_from_file_location('peers_driver', BENCHMARKS / 'peers.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['peers_driver'] = module
    spec.loader.exec_module(module)
    return module


def _measured(load, train_seconds, score, curve=()):
    result = load('contestant').Result(
        train_seconds=train_seconds,
        epoch_seconds=[train_seconds / 2] * 2,
        num_items=1000,
        saved_at=0.0,
        threads=2,
        versions={},
        curve=list(curve),
    )
    return load('peer_table').Measured(result, score, 'encode, cosine', train_seconds + 5)


def test_the_table_marks_where_a_peer_is_not_behind(load, capsys):
    table = load('peer_table')
    ours = table.Standing('ours', True, True, [_measured(load, 50, 0.7, [(20, 0.5), (40, 0.65)])])
    slow = table.Standing('slow', False, False, [_measured(load, 90, 0.6)])
    good = table.Standing('good', False, False, [_measured(load, 90, 0.8)])
    quick = table.Standing('quick', False, False, [_measured(load, 30, 0.6)])
    table.print_table('title', 'recall@3', [ours, slow, good, quick])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert '*' not in lines['ours']
    assert '*' not in lines['slow']
    assert lines['slow'].split()[1:6] == ['11.1', '90.0', '95.0', '0.600', '40.0']
    assert lines['good'].split()[4:6] == ['0.800*', 'never*']
    assert lines['quick'].split()[1:6] == ['33.3*', '30.0*', '35.0*', '0.600', '40.0*']


def test_speed_and_time_are_medians_and_the_metric_a_mean(load):
    standing = load('peer_table').Standing('x', False, False)
    standing.measured += [_measured(load, s, m) for s, m in ((10, 0.1), (100, 0.2), (20, 0.6))]
    assert standing.train_seconds == 20
    assert standing.items_per_second == 50
    assert standing.score == pytest.approx(0.3)


def test_a_task_survives_its_file(load, tmp_path):
    driver = _driver(load)
    task = replace(driver.build_task('texts', epochs=2, num_concepts=3), seed=7)
    task.write(tmp_path)
    again = driver.Task.read(tmp_path)
    assert task.is_in(tmp_path)
    assert not replace(task, seed=8).is_in(tmp_path)
    assert [tuple(item) for item in again.train] == task.train
    assert (len(task.train), len(task.query), len(task.index)) == (6, 3, 3)
    assert replace(again, train=[], query=[], index=[]) == replace(
        task, train=[], query=[], index=[]
    )
