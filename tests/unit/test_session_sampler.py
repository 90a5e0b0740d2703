"""SessionSampler: whole sessions, one cut at the end of a batch, the same number each epoch."""

import time
from collections import Counter

import numpy as np
import pytest

from finetuner.data.relation_samplers import SessionSampler


def labels_of(*sessions):
    """Labels of sessions given as their match labels: `labels_of([1, -1])` has one root first."""
    return [(number, kind) for number, matches in enumerate(sessions) for kind in [0, *matches]]


def test_sessions_that_fit_stand_whole_and_in_order():
    sampler = SessionSampler(labels_of([1, -1], [1, -1], [1], [1]), 6, shuffle=False)
    assert len(sampler) == 2
    assert list(sampler) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]


def test_a_cut_session_comes_again_whole():
    labels = labels_of([1, -1], [1, 1, -1, -1], [1])
    sampler = SessionSampler(labels, 6, shuffle=False, seed=0)
    for _ in range(20):
        first, second, third = sampler
        assert first[:4] == [0, 1, 2, 3], 'the first session, then the root of the cut one'
        assert len(first) == 6
        assert set(first[4:]) < {4, 5, 6, 7}
        assert second[:5] == [3, 4, 5, 6, 7]
        assert second[5:] == [8], 'the root of the next stands alone where one place is left'
        assert third == [8, 9]
    assert len(sampler) == 3


def test_a_session_larger_than_a_batch_is_sampled_and_keeps_its_root():
    labels = labels_of([1, -1] * 10, [1])
    sampler = SessionSampler(labels, 5, shuffle=False, seed=0)
    seen = Counter()
    for _ in range(200):
        large, small = sampler
        assert len(large) == len(set(large)) == 5
        assert large[0] == 0
        assert set(large) < set(range(21))
        assert small == [21, 22]
        seen.update(large[1:])
    assert set(seen) == set(range(1, 21)), 'which matches are taken is drawn'


def test_a_large_session_is_cut_before_it_fills_a_batch():
    labels = labels_of([1], [1, -1] * 10)
    first, second = SessionSampler(labels, 4, shuffle=False, seed=0)
    assert first[:3] == [0, 1, 2]
    assert second[0] == 2
    assert len(first) == len(second) == 4


def test_a_cut_keeps_both_kinds_where_it_can():
    rare = [-1] * 50 + [1]
    labels = labels_of(rare)
    kinds = [kind for _, kind in labels]
    for seed in range(30):
        (batch,) = SessionSampler(labels, 3, seed=seed)
        assert [kinds[item] for item in batch] == [0, -1, 1]
        (batch,) = SessionSampler(labels, 2, seed=seed)
        assert [kinds[item] for item in batch] == [0, 1]
    (batch,) = SessionSampler(labels_of([-1] * 9), 3, seed=0)
    assert len(set(batch)) == 3


def test_sessions_are_shuffled_but_not_without_shuffle():
    labels = labels_of(*[[1, -1]] * 50)
    shuffled = SessionSampler(labels, 6, seed=1)
    ordered = SessionSampler(labels, 6, shuffle=False)
    assert list(ordered) == list(ordered)
    assert next(iter(ordered)) == [0, 1, 2, 3, 4, 5]
    one, other = list(shuffled), list(shuffled)
    assert one != other
    assert sorted(item for batch in one for item in batch) == list(range(150))
    assert list(SessionSampler(labels, 6)) != list(SessionSampler(labels, 6))


def test_every_epoch_and_every_seed_has_the_same_number_of_batches():
    generator = np.random.default_rng(0)
    labels = labels_of(*[[1] * size for size in generator.integers(1, 29, 2_000)])
    lengths = {
        len(list(sampler))
        for sampler in [SessionSampler(labels, 32, seed=seed) for seed in range(3)]
        for _ in range(4)
    }
    assert lengths == {len(SessionSampler(labels, 32))}


def test_order_is_new_even_where_no_other_order_takes_as_many_batches(monkeypatch):
    """What is left when all tries fail: sessions of one size change places."""
    monkeypatch.setattr('finetuner.data.relation_samplers._TRIES', 0)
    generator = np.random.default_rng(0)
    labels = labels_of(*[[1] * size for size in generator.integers(1, 9, 100)])
    sampler = SessionSampler(labels, 16, seed=3)
    one, other = list(sampler), list(sampler)
    assert len(one) == len(other) == len(sampler)
    assert one != other
    assert {item for batch in one for item in batch} == set(range(len(labels)))
    roots = {item for item, (_, kind) in enumerate(labels) if kind == 0}
    sizes = [[item in roots for item in batch] for batch in (*one, *other)]
    assert sizes[: len(one)] == sizes[len(one) :], 'the sizes stay where they are'
    meetings = [
        {frozenset(labels[item][0] for item in batch) for batch in epoch} for epoch in (one, other)
    ]
    assert len(meetings[0] & meetings[1]) < len(one) / 4


def test_labels_as_tuples_arrays_and_any_numbers():
    labels = [(70, 0), (70, 1), (-3, 0), (-3, -1)]
    expected = [[0, 1], [2, 3]]
    for form in (labels, tuple(labels), np.array(labels), np.array(labels, dtype=np.int32)):
        assert list(SessionSampler(form, 2, shuffle=False)) == expected
    batch = next(iter(SessionSampler(np.array(labels), 3)))
    assert all(type(item) is int for item in batch)


@pytest.mark.parametrize('labels', [[], np.empty((0, 2), dtype=np.int64)])
def test_no_sessions_give_no_batch(labels):
    for shuffle in (True, False):
        sampler = SessionSampler(labels, 4, shuffle)
        assert len(sampler) == 0
        assert list(sampler) == []


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        ([(6, 0), (5, 0), (6, 1)], '^session 6: its items do not stand together'),
        ([(5, 0), (5, 1), (6, 1), (6, 0)], '^session 6: its root is not its first item'),
        ([(5, 0), (5, 1), (6, 1), (6, -1)], '^session 6: it has no root'),
        ([(5, 0), (5, 0), (5, 1)], '^session 5: it has 2 roots'),
        ([(5, 1), (5, 0), (5, 0)], '^session 5: it has 2 roots'),
        ([(5, 0), (5, 2)], '^session 5: item 1 has the label 2'),
        ([(5, 0), (5, -2)], '^session 5: item 1 has the label -2'),
        ([0, 1, 1], r'^labels must be pairs .* of shape \(3,\)'),
        ([(0, 0, 1)], r'^labels must be pairs .* of shape \(1, 3\)'),
        ([(0.0, 0.0), (0.0, 1.0)], '^labels must be pairs .* not float64'),
        ([('a', 0), ('a', 1)], '^labels must be pairs'),
    ],
)
def test_labels_that_are_no_sessions(labels, message):
    with pytest.raises(ValueError, match=message):
        SessionSampler(labels, 4)


@pytest.mark.parametrize('batch_size', [1, 0, -1, 2.5, True, None])
def test_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match=r'^batch_size must be a whole number of at least 2, not '):
        SessionSampler([(0, 0), (0, 1)], batch_size)


def test_a_million_items_take_seconds():
    sizes = np.random.default_rng(0).integers(2, 9, 200_000)
    labels = np.ones((sizes.sum(), 2), dtype=np.int64)
    labels[:, 0] = np.repeat(np.arange(len(sizes)), sizes)
    labels[np.cumsum(sizes) - sizes, 1] = 0
    start = time.perf_counter()
    sampler = SessionSampler(labels, 128)
    assert time.perf_counter() - start < 4
    assert sum(1 for _ in sampler) == len(sampler)
    assert time.perf_counter() - start < 12
