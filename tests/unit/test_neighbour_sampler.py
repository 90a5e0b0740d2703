"""Batches of neighbouring classes: near ones together, and all else as ClassSampler has it."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from finetuner.data.neighbour_sampler import NeighbourClassSampler
from finetuner.data.samplers import ClassSampler


def circle(num_classes, num_neighbours):
    """Classes on a circle: the nearest to each are those beside it."""
    steps = [step for far in range(1, num_classes) for step in (far, -far)][:num_neighbours]
    return (np.arange(num_classes)[:, None] + np.array(steps)) % num_classes


def sampler_of(labels, batch_size, items=None, seed=0, neighbours=None):
    sampler = NeighbourClassSampler(labels, batch_size, items, seed)
    if neighbours is not None:
        sampler.set_neighbours(np.arange(len(neighbours)), neighbours)
    return sampler


def spread(labels, batches):
    """Mean over batches of how far apart on the circle their classes lie."""
    labels = np.asarray(labels)
    num_classes = labels.max() + 1
    spans = []
    for batch in batches:
        classes = np.unique(labels[batch])
        gaps = np.diff(np.append(classes, classes[0] + num_classes))
        spans.append(num_classes - gaps.max())
    return np.mean(spans)


def test_each_class_comes_once_with_its_neighbours():
    labels = np.repeat(np.arange(60), 4)
    sampler = sampler_of(labels, 24, 4, neighbours=circle(60, 20))
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10
    assert sorted(np.concatenate(batches).tolist()) == list(range(240))
    for batch in batches:
        assert set(collections.Counter(labels[batch]).values()) == {4}
    at_random = spread(labels, list(ClassSampler(labels, 24, 4, seed=0)))
    # the last batches take what is left over
    assert spread(labels, batches) < 0.5 * at_random


def test_the_first_batch_is_a_class_and_its_nearest():
    labels = np.repeat(np.arange(60), 2)
    sampler = sampler_of(labels, 10, 2, neighbours=circle(60, 20))
    spans = [np.unique(labels[batch]) for batch in sampler]
    whole = [classes for classes in spans if (np.diff(classes) == 1).all()]
    assert len(whole) >= 5


@pytest.mark.parametrize('seed', range(6))
def test_the_rules_of_the_class_sampler_hold_for_uneven_classes(seed):
    random = np.random.default_rng(seed)
    num_classes = int(random.integers(3, 30))
    labels = np.repeat(np.arange(num_classes), random.integers(1, 25, num_classes))
    labels = random.permutation(labels)
    items = int(random.integers(1, 5))
    batch_size = items * int(random.integers(1, num_classes + 1))
    near = np.stack([random.permutation(num_classes)[:5] for _ in range(num_classes)])
    sampler = sampler_of(labels, batch_size, items, seed, near[:, : num_classes - 1])
    plain = ClassSampler(labels, batch_size, items, seed)
    for _ in range(3):
        batches, others = list(sampler), list(plain)
        assert len(batches) == len(sampler) == len(others)
        for batch in batches:
            counts = collections.Counter(labels[batch].tolist())
            assert set(counts.values()) == {items}
            assert len(batch) == batch_size
        # each class as often, as far as none had to be dropped
        groups = [collections.Counter(labels[np.concatenate(b)]) for b in (batches, others)]
        assert sum(groups[0].values()) == sum(groups[1].values())


def test_seed_and_epoch_decide():
    labels = np.repeat(np.arange(40), 3)
    near = circle(40, 10)
    first, second = list(sampler := sampler_of(labels, 15, 3, 5, near)), list(sampler)
    assert first != second
    assert list(sampler_of(labels, 15, 3, 5, near)) == first
    assert list(sampler_of(labels, 15, 3, 6, near)) != first
    later = sampler_of(labels, 15, 3, 5, near)
    later.epoch = 1
    assert list(later) == second


def test_without_neighbours_it_is_a_class_sampler():
    labels = np.repeat(np.arange(12), 5)
    assert list(sampler_of(labels, 12, 3)) == list(ClassSampler(labels, 12, 3, 0))


def test_classes_of_which_nothing_is_known_come_as_well():
    labels = np.repeat(np.arange(20), 2)
    sampler = NeighbourClassSampler(labels, 8, 2, 0)
    sampler.set_neighbours(np.array([3, 4]), np.array([[4, 5], [3, 5]]))
    assert sorted(np.concatenate(list(sampler)).tolist()) == list(range(40))


@pytest.mark.parametrize(
    ('classes', 'neighbours', 'message'),
    [
        ([0, 1], [[1]], 'not a row for each of 2'),
        ([0], [[20]], 'from 0 to 19'),
        ([-1], [[2]], 'from 0 to 19'),
    ],
)
def test_wrong_neighbours(classes, neighbours, message):
    sampler = NeighbourClassSampler(np.repeat(np.arange(20), 2), 8, 2, 0)
    with pytest.raises(ValueError, match=message):
        sampler.set_neighbours(np.array(classes), np.array(neighbours))


def test_how_many_neighbours_are_of_use():
    assert NeighbourClassSampler(np.repeat(np.arange(200), 2), 16, 4).num_neighbours == 16
    assert NeighbourClassSampler(np.repeat(np.arange(6), 2), 16, 4).num_neighbours == 5
