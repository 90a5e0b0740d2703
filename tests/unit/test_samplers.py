"""Samplers: what holds for every batch and every epoch, over many random sets of labels."""

import time
from collections import Counter

import numpy as np
import pytest

from finetuner.data import ClassSampler, LengthBucketSampler
from finetuner.data.relation_samplers import InstanceSampler, PairSampler
from finetuner.data.samplers import RandomSampler, SequentialSampler


def most_batches(groups, num_classes):
    """Naive: give out groups, always to the classes that have most left."""
    left = Counter(groups)
    batches = 0
    while sum(count > 0 for count in left.values()) >= num_classes:
        for label, _ in left.most_common(num_classes):
            left[label] -= 1
        batches += 1
    return batches


def random_labels(generator):
    """Labels of few or many classes, alike or very different in size."""
    num_classes = int(generator.integers(1, 30))
    weights = generator.dirichlet(np.full(num_classes, generator.choice([0.2, 1.0, 100.0])))
    return generator.choice(num_classes, size=int(generator.integers(1, 300)), p=weights).tolist()


def check_epoch(labels, batches, num_classes, num_items):
    """Check all that is promised of one epoch."""
    sizes = Counter(labels)
    groups = {label: -(-size // num_items) for label, size in sizes.items()}
    used_groups = Counter()
    used_items = Counter()
    for batch in batches:
        assert len(batch) == num_classes * num_items
        in_batch = [batch[start : start + num_items] for start in range(0, len(batch), num_items)]
        group_labels = [{labels[item] for item in group} for group in in_batch]
        assert all(len(group) == 1 for group in group_labels), 'a group mixes classes'
        names = [group.pop() for group in group_labels]
        assert len(set(names)) == num_classes, 'a class stands twice in a batch'
        for name, group in zip(names, in_batch, strict=True):
            fair = -(-num_items // sizes[name])
            assert max(Counter(group).values()) <= fair, 'an item is repeated needlessly'
        used_groups.update(names)
        used_items.update(item for batch_group in in_batch for item in batch_group)
    assert len(batches) == most_batches(groups, num_classes)
    for label, size in sizes.items():
        assert used_groups[label] <= groups[label]
        items = [used_items[item] for item in range(len(labels)) if labels[item] == label]
        if used_groups[label] == groups[label]:
            assert min(items) >= 1, 'an item of a class used up is left out'
            assert sum(items) == groups[label] * num_items
            assert sum(items) - size < num_items, 'more repeated than a group needed'
        elif sum(items) <= size:
            assert max(items, default=0) <= 1, 'an item is repeated though others are left'
    dropped = sum(groups[label] - used_groups[label] for label in sizes)
    held_back = [label for label in sizes if used_groups[label] < groups[label]]
    assert dropped < num_classes or all(
        used_groups[label] >= len(batches) - num_classes for label in held_back
    )


@pytest.mark.parametrize('seed', range(150))
def test_every_epoch_keeps_its_promises(seed):
    generator = np.random.default_rng(seed)
    labels = random_labels(generator)
    num_items = int(generator.integers(1, 6))
    num_classes = int(generator.integers(1, 8))
    batch_size = num_classes * num_items + int(generator.integers(0, num_items))
    sampler = ClassSampler(labels, batch_size, num_items, seed=seed)
    for _ in range(2):
        length = len(sampler)
        batches = list(sampler)
        assert len(batches) == length
        check_epoch(labels, batches, num_classes, num_items)


def test_everything_is_used_exactly_once_where_counts_allow():
    labels = [label for label in range(250) for _ in range(4)]
    sampler = ClassSampler(labels, batch_size=100, num_items_per_class=4)
    assert len(sampler) == 10
    for _ in range(3):
        items = [item for batch in sampler for item in batch]
        assert sorted(items) == list(range(1000))


def test_default_items_per_class():
    labels = [0, 1, 2, 3] * 6
    assert len(ClassSampler(labels, 8)) == 3
    counts = Counter(labels[item] for item in next(iter(ClassSampler(labels, 8))))
    assert counts == {0: 2, 1: 2, 2: 2, 3: 2}
    many = list(range(100)) * 2
    assert len(next(iter(ClassSampler(many, 10)))) == 10


def test_short_groups_are_made_up_from_their_class():
    batches = list(ClassSampler([1, 1, 1, 2, 2], 6, 3))
    assert len(batches) == 1
    counts = Counter(batches[0])
    assert set(counts) == {0, 1, 2, 3, 4}
    assert sorted(counts.values()) == [1, 1, 1, 1, 2]
    (batch,) = ClassSampler([7, 8], 8, 4)
    assert Counter(batch) == {0: 4, 1: 4}


def test_classes_that_cannot_fill_a_batch_are_dropped_and_not_always_the_same():
    labels = [0, 0, 1, 1, 2, 2]
    sampler = ClassSampler(labels, 4, 2, seed=0)
    assert len(sampler) == 1
    left_out = set()
    for _ in range(30):
        (batch,) = sampler
        left_out |= set(labels) - {labels[item] for item in batch}
    assert left_out == {0, 1, 2}


def test_big_class_is_spread_over_as_many_batches_as_possible():
    labels = [0] * 8 + [1, 2, 3, 4] * 2
    sampler = ClassSampler(labels, 4, 2)
    assert len(sampler) == 4
    for batch in sampler:
        assert 0 in {labels[item] for item in batch}


def test_too_few_classes_give_no_batch():
    assert list(ClassSampler([1, 1, 1, 1], 4, 2)) == []
    assert len(ClassSampler([], 4, 2)) == 0
    assert list(ClassSampler([], 4)) == []


def test_which_classes_meet_is_shuffled_when_classes_have_many_groups():
    """With 10 classes, 5 in a batch, dealing alone would let the same five meet all the time."""
    labels = list(range(10)) * 100
    sampler = ClassSampler(labels, 5, 1, seed=3)
    meetings = {frozenset(labels[item] for item in batch) for batch in sampler}
    assert len(meetings) > 80  # of 252 possible, in 200 batches: 138 expected


def test_epochs_differ_and_seed_reproduces_them():
    labels = [label for label in range(20) for _ in range(8)]
    one, other = (ClassSampler(labels, 16, 4, seed=5) for _ in range(2))
    epochs = [list(one) for _ in range(3)]
    assert epochs == [list(other) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(ClassSampler(labels, 16, 4, seed=6)) != epochs[0]
    assert list(ClassSampler(labels, 16, 4)) != list(ClassSampler(labels, 16, 4))


@pytest.mark.parametrize(
    'build',
    [lambda: ClassSampler([0, 0, 1, 1] * 5, 4, 2, seed=5), lambda: RandomSampler(50, 8, seed=5)],
)
def test_an_epoch_can_be_restarted(build):
    sampler = build()
    epochs = [list(sampler) for _ in range(4)]
    assert sampler.epoch == 4
    resumed = build()
    resumed.epoch = 2
    assert [list(resumed), list(resumed)] == epochs[2:]
    broken_off = build()
    next(iter(broken_off))
    assert list(broken_off) == epochs[1]


def test_batches_are_lists_of_ints():
    batch = next(iter(ClassSampler(np.array([0, 0, 1, 1]), 4, 2)))
    assert type(batch) is list
    assert all(type(item) is int for item in batch)
    assert all(type(item) is int for item in next(iter(RandomSampler(4, 2))))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((0, None), 'batch_size'),
        ((-1, 1), 'batch_size'),
        ((2.5, 1), 'batch_size'),
        ((True, 1), 'batch_size'),
        ((4, 0), 'num_items_per_class'),
        ((4, -2), 'num_items_per_class'),
        ((4, 1.5), 'num_items_per_class'),
        ((4, 5), r'num_items_per_class must be at most batch_size \(4\), not 5'),
    ],
)
def test_bad_sizes_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        ClassSampler([0, 1, 0, 1], *arguments)


def test_bad_seed():
    with pytest.raises(ValueError, match='seed'):
        ClassSampler([0, 1], 2, 1, seed=-1)


def test_a_million_labels_take_no_longer_than_a_few_seconds():
    labels = np.random.default_rng(0).integers(0, 250_000, 1_000_000)
    start = time.perf_counter()
    sampler = ClassSampler(labels, 128, 4)
    assert sum(1 for _ in sampler) == len(sampler)
    assert time.perf_counter() - start < 10


def test_random_sampler_uses_each_item_once():
    sampler = RandomSampler(10, 4, seed=1)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert len(sampler) == 3
    items = [item for batch in batches for item in batch]
    assert sorted(items) == list(range(10))
    assert items != list(range(10))
    assert list(sampler) != batches


def test_random_sampler_leaves_no_item_alone():
    sampler = RandomSampler(9, 4, seed=1)
    assert len(sampler) == 2
    assert [len(batch) for batch in sampler] == [4, 4]
    left_out = {(set(range(9)) - {i for batch in sampler for i in batch}).pop() for _ in range(60)}
    assert len(left_out) > 5
    assert [len(batch) for batch in RandomSampler(3, 1)] == [1, 1, 1]
    assert [len(batch) for batch in RandomSampler(1, 4)] == [1]
    assert list(RandomSampler(0, 4)) == []


def test_sequential_sampler_keeps_order():
    sampler = SequentialSampler(5, 2)
    assert list(sampler) == list(sampler) == [[0, 1], [2, 3], [4]]
    assert len(sampler) == 3
    with pytest.raises(ValueError, match='batch_size'):
        SequentialSampler(5, 0)


def test_instance_sampler_puts_the_views_of_an_instance_side_by_side():
    sampler = InstanceSampler(5, 6, 3, seed=2)
    assert len(sampler) == 2, 'the fifth would stand alone'
    for _ in range(3):
        for batch in sampler:
            one, other = batch[0], batch[3]
            assert batch == [one] * 3 + [other] * 3
            assert one != other
    left_out = {(set(range(5)) - {i for batch in sampler for i in batch}).pop() for _ in range(60)}
    assert left_out == set(range(5))


def test_instance_sampler_in_small():
    assert sorted(map(tuple, InstanceSampler(3, 2))) == [(0, 0), (1, 1), (2, 2)]
    assert list(InstanceSampler(1, 8)) == [[0, 0]]
    assert list(InstanceSampler(0, 8)) == []
    assert len(InstanceSampler(10, 8)) == 3


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((-1, 4), 'num_instances must be a whole number of at least 0, not -1'),
        ((4, 0), 'batch_size'),
        ((4, -2), 'batch_size'),
        ((4, 4.0), 'batch_size'),
        ((4, 4, 1), 'views_per_instance must be a whole number of at least 2, not 1'),
        ((4, 4, 0), 'views_per_instance'),
        ((4, 5), r'batch_size must be divisible by views_per_instance \(2\), not 5'),
        ((4, 2, 4), r'batch_size must be divisible by views_per_instance \(4\), not 2'),
    ],
)
def test_instance_sampler_names_the_bad_size(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        InstanceSampler(*arguments)


def test_pair_sampler_keeps_pairs_whole():
    for batch_size in (4, 5):
        sampler = PairSampler(5, batch_size, seed=0)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [4, 4, 2]
        pairs = [tuple(batch[at : at + 2]) for batch in batches for at in range(0, len(batch), 2)]
        assert sorted(pairs) == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        assert list(sampler) != batches
    assert list(PairSampler(0, 4)) == []
    for bad in (1, 0, -4, 3.0):
        with pytest.raises(ValueError, match='batch_size must be a whole number of at least 2'):
            PairSampler(5, bad)
    with pytest.raises(ValueError, match='num_pairs'):
        PairSampler(-1, 4)


def test_length_buckets():
    lengths = np.array([3, 9, 1, 9, 4, 30, 2])
    sampler = LengthBucketSampler(lengths, 3, shuffle=False)
    assert list(sampler) == [[5, 1, 3], [4, 0, 6], [2]]
    limited = LengthBucketSampler(lengths, 3, max_tokens=18, shuffle=False)
    assert list(limited) == [[5], [1, 3], [4, 0, 6], [2]]
    assert len(limited) == 4
    shuffled = LengthBucketSampler(lengths, 3, max_tokens=18, seed=4)
    drawn = {tuple(map(tuple, shuffled)) for _ in range(50)}
    assert len(drawn) > 20
    assert all(
        {frozenset(b) for b in batches} == {frozenset(b) for b in limited} for batches in drawn
    )
    assert len(drawn & {tuple(map(tuple, limited))}) <= 1


def test_length_buckets_shuffle_items_of_one_length():
    sampler = LengthBucketSampler([5] * 100, 10, seed=0)
    meetings = {frozenset(batch) for _ in range(5) for batch in sampler}
    assert len(meetings) == 50


def test_length_buckets_of_nothing_and_of_no_length():
    assert list(LengthBucketSampler([], 4)) == []
    assert len(LengthBucketSampler([], 4, 10)) == 0
    assert [len(batch) for batch in LengthBucketSampler([0, 0, 0], 2, max_tokens=1)] == [1, 1, 1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (([1], 0), 'batch_size'),
        (([1], 4, 0), 'max_tokens'),
        (([1], 4, 2.5), 'max_tokens'),
        (([1, 2, -3], 4), r'lengths\[2\] must be 0 or more, not -3'),
        (([1.5], 4), 'lengths must be one whole number an item, not float64'),
        (([[1]], 4), r'lengths must be one whole number an item, .* of shape \(1, 1\)'),
        ((['a'], 4), 'lengths must be one whole number an item'),
    ],
)
def test_length_buckets_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        LengthBucketSampler(*arguments)


def test_a_million_of_everything_takes_seconds():
    lengths = np.random.default_rng(0).integers(1, 512, 1_000_000)
    start = time.perf_counter()
    for sampler in (
        InstanceSampler(1_000_000, 128),
        PairSampler(1_000_000, 128),
        LengthBucketSampler(lengths, 128, max_tokens=4_096),
    ):
        assert sum(1 for _ in sampler) == len(sampler)
    assert time.perf_counter() - start < 10
