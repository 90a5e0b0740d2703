"""What holds for every sampler, for any data: sizes, coverage, seeds, epochs, lengths."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuner.data.length_sampler import LengthBucketSampler
from finetuner.data.relation_samplers import InstanceSampler, PairSampler, SessionSampler
from finetuner.data.samplers import (
    ClassSampler,
    RandomSampler,
    SequentialSampler,
)

SEEDS = st.integers(0, 2**63 - 1)
BATCH_SIZES = st.integers(1, 40)
# of one class or many, alike in size or not
CLASSES = st.integers(1, 12).flatmap(lambda most: st.lists(st.integers(0, most - 1), max_size=80))
LENGTHS = st.integers(0, 40).flatmap(lambda most: st.lists(st.integers(0, most), max_size=60))
MATCHES = st.lists(st.sampled_from([1, -1]), max_size=12)
SESSIONS = st.lists(MATCHES, max_size=25).map(
    lambda sessions: [
        (7 * number - 20, kind) for number, matches in enumerate(sessions) for kind in [0, *matches]
    ]
)


@st.composite
def class_builders(draw):
    num_items = draw(st.none() | st.integers(1, 6))
    batch_size = draw(st.integers(num_items or 1, 40))
    labels = draw(CLASSES)
    return lambda seed: ClassSampler(labels, batch_size, num_items, seed=seed)


@st.composite
def instance_builders(draw):
    views, in_batch = draw(st.integers(2, 4)), draw(st.integers(1, 12))
    num_instances = draw(st.integers(0, 60))
    return lambda seed: InstanceSampler(num_instances, views * in_batch, views, seed=seed)


@st.composite
def session_builders(draw):
    labels, batch_size, shuffle = draw(SESSIONS), draw(st.integers(2, 30)), draw(st.booleans())
    return lambda seed: SessionSampler(labels, batch_size, shuffle, seed=seed)


@st.composite
def length_builders(draw):
    lengths, batch_size = draw(LENGTHS), draw(BATCH_SIZES)
    max_tokens, shuffle = draw(st.none() | st.integers(1, 200)), draw(st.booleans())
    return lambda seed: LengthBucketSampler(lengths, batch_size, max_tokens, shuffle, seed=seed)


def simple_builders(sampler, least=1):
    return st.tuples(st.integers(0, 80), st.integers(least, 40)).map(
        lambda sizes: lambda seed: sampler(*sizes, seed=seed)
    )


BUILDERS = {
    'class': class_builders(),
    'random': simple_builders(RandomSampler),
    'instance': instance_builders(),
    'pair': simple_builders(PairSampler, least=2),
    'session': session_builders(),
    'length': length_builders(),
}
EVERY_SAMPLER = pytest.mark.parametrize('kind', BUILDERS)
FEW = settings(max_examples=60, deadline=None)
MANY = settings(max_examples=250, deadline=None)


@EVERY_SAMPLER
@FEW
@given(data=st.data(), seed=SEEDS)
def test_length_is_what_each_epoch_yields(kind, data, seed):
    sampler = data.draw(BUILDERS[kind])(seed)
    length = len(sampler)
    for epoch in range(4):
        assert sampler.epoch == epoch
        batches = list(sampler)
        assert len(batches) == length == len(sampler)
        for batch in batches:
            assert batch, 'a batch is empty'
            assert all(type(item) is int for item in batch)


@EVERY_SAMPLER
@FEW
@given(data=st.data(), seed=SEEDS, epoch=st.integers(0, 3))
def test_a_seed_fixes_every_epoch_wherever_one_begins(kind, data, seed, epoch):
    build = data.draw(BUILDERS[kind])
    one, other, resumed = build(seed), build(seed), build(seed)
    epochs = [list(one) for _ in range(5)]
    assert epochs == [list(other) for _ in range(5)]
    resumed.epoch = epoch
    assert [list(resumed) for _ in range(epoch, 5)] == epochs[epoch:]


LARGE = {
    'class': lambda seed: ClassSampler(list(range(50)) * 8, 40, 4, seed=seed),
    'random': lambda seed: RandomSampler(300, 20, seed=seed),
    'instance': lambda seed: InstanceSampler(300, 20, seed=seed),
    'pair': lambda seed: PairSampler(300, 20, seed=seed),
    'session': lambda seed: SessionSampler(
        [(item // 5, [0, 1, 1, -1, -1][item % 5]) for item in range(400)], 18, seed=seed
    ),
    'session in order': lambda seed: SessionSampler(
        [(item // 5, [0, 1, 1, -1, -1][item % 5]) for item in range(400)], 18, False, seed=seed
    ),
    'length': lambda seed: LengthBucketSampler([item % 7 for item in range(300)], 20, seed=seed),
}


@pytest.mark.parametrize('kind', LARGE)
@FEW
@given(seeds=st.lists(SEEDS, min_size=2, max_size=2, unique=True))
def test_seeds_and_epochs_differ(kind, seeds):
    one, other = (LARGE[kind](seed) for seed in seeds)
    first = list(one)
    assert first != list(other)
    assert first != list(one)


@MANY
@given(labels=CLASSES, num_items=st.integers(1, 5), num_classes=st.integers(1, 6), seed=SEEDS)
def test_class_batches_are_balanced(labels, num_items, num_classes, seed):
    sampler = ClassSampler(labels, num_items * num_classes, num_items, seed=seed)
    counts = Counter(labels)
    groups = {label: -(-count // num_items) for label, count in counts.items()}
    used_groups, used_items = Counter(), set()
    for batch in sampler:
        in_batch = Counter(labels[item] for item in batch)
        assert len(in_batch) == num_classes
        assert set(in_batch.values()) == {num_items}
        used_groups.update(in_batch.keys())
        used_items.update(batch)
    left_out = {labels[item] for item in set(range(len(labels))) - used_items}
    assert all(used_groups[label] < groups[label] for label in left_out)
    if num_classes == 1:
        assert not left_out, 'nothing has to be dropped'


@MANY
@given(num_items=st.integers(0, 100), batch_size=BATCH_SIZES, seed=SEEDS)
def test_random_covers_all_but_one_alone(num_items, batch_size, seed):
    batches = list(RandomSampler(num_items, batch_size, seed=seed))
    items = Counter(item for batch in batches for item in batch)
    alone = batch_size > 1 and num_items > 1 and num_items % batch_size == 1
    assert set(items) <= set(range(num_items))
    assert set(items.values()) <= {1}
    assert len(items) == num_items - alone
    assert all(len(batch) == batch_size for batch in batches[:-1])


@FEW
@given(num_items=st.integers(0, 100), batch_size=BATCH_SIZES)
def test_sequential_is_every_item_in_order(num_items, batch_size):
    sampler = SequentialSampler(num_items, batch_size)
    batches = list(sampler)
    assert [item for batch in batches for item in batch] == list(range(num_items))
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@MANY
@given(
    num_instances=st.integers(0, 80),
    in_batch=st.integers(1, 12),
    views=st.integers(2, 5),
    seed=SEEDS,
)
def test_instances_come_once_with_all_views_adjacent(num_instances, in_batch, views, seed):
    batches = list(InstanceSampler(num_instances, in_batch * views, views, seed=seed))
    instances = []
    for batch in batches:
        assert len(batch) % views == 0
        drawn = batch[::views]
        assert batch == [item for item in drawn for _ in range(views)]
        instances += drawn
    assert all(len(batch) == in_batch * views for batch in batches[:-1])
    alone = in_batch > 1 and num_instances > 1 and num_instances % in_batch == 1
    assert len(set(instances)) == len(instances) == num_instances - alone
    assert set(instances) <= set(range(num_instances))


@MANY
@given(num_pairs=st.integers(0, 80), batch_size=st.integers(2, 40), seed=SEEDS)
def test_pairs_come_once_and_whole(num_pairs, batch_size, seed):
    batches = list(PairSampler(num_pairs, batch_size, seed=seed))
    for batch in batches:
        assert all(left % 2 == 0 for left in batch[::2])
        assert [left + 1 for left in batch[::2]] == batch[1::2]
    assert sorted(item for batch in batches for item in batch) == list(range(2 * num_pairs))
    assert all(len(batch) == batch_size // 2 * 2 for batch in batches[:-1])
    assert all(len(batch) <= batch_size for batch in batches)


def naive_buckets(lengths, batch_size, max_tokens):
    """The lengths in each batch, longest first: add an item while it fits."""
    batches = []
    for length in sorted(lengths, reverse=True):
        batch = batches[-1] if batches else None
        tokens = batch and max(batch[0], 1) * (len(batch) + 1)
        full = not batch or len(batch) == batch_size or (max_tokens and tokens > max_tokens)
        if full:
            batches.append([length])
        else:
            batch.append(length)
    return batches


@MANY
@given(
    lengths=LENGTHS, batch_size=BATCH_SIZES, max_tokens=st.none() | st.integers(1, 200), seed=SEEDS
)
def test_length_buckets_are_those_of_a_plain_loop(lengths, batch_size, max_tokens, seed):
    expected = naive_buckets(lengths, batch_size, max_tokens)
    ordered = list(LengthBucketSampler(lengths, batch_size, max_tokens, shuffle=False))
    assert [[lengths[item] for item in batch] for batch in ordered] == expected
    shuffled = list(LengthBucketSampler(lengths, batch_size, max_tokens, seed=seed))
    for batches in (ordered, shuffled):
        assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
    drawn = sorted(sorted((lengths[item] for item in batch), reverse=True) for batch in shuffled)
    assert drawn == sorted(expected)
    for batch in shuffled:
        longest = max(lengths[item] for item in batch)
        assert len(batch) <= batch_size
        assert len(batch) == 1 or not max_tokens or longest * len(batch) <= max_tokens


def grouped(labels):
    """The sessions as lists of items."""
    sessions = {}
    for item, (session, _) in enumerate(labels):
        sessions.setdefault(session, []).append(item)
    return sessions


def naive_session_batches(sessions, batch_size, draw=random.sample):
    """One epoch over sessions in this order, added one by one."""
    batches, batch = [], []
    waiting = list(sessions)
    while waiting:
        session = waiting[0]
        places = batch_size - len(batch)
        whole = len(session) <= places
        batch += session if whole else [session[0], *draw(session[1:], places - 1)]
        if whole or len(batch) == batch_size == places:
            waiting.pop(0)
        if len(batch) == batch_size:
            batches.append(batch)
            batch = []
    return batches + [batch] * bool(batch)


@MANY
@given(labels=SESSIONS, batch_size=st.integers(2, 30), seed=SEEDS)
def test_session_batches_in_order_are_those_of_a_plain_loop(labels, batch_size, seed):
    """All but which matches a cut takes, of which only their number is sure."""
    sampler = SessionSampler(labels, batch_size, shuffle=False, seed=seed)
    expected = naive_session_batches(list(grouped(labels).values()), batch_size)
    found = list(sampler)
    assert len(found) == len(sampler) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert [labels[item][0] for item in batch] == [labels[item][0] for item in other]


@MANY
@given(labels=SESSIONS, batch_size=st.integers(2, 30), shuffle=st.booleans(), seed=SEEDS)
def test_sessions_are_never_mixed_up(labels, batch_size, shuffle, seed):
    sessions = grouped(labels)
    batches = list(SessionSampler(labels, batch_size, shuffle, seed=seed))
    whole = Counter()
    order = []
    for number, batch in enumerate(batches):
        assert len(set(batch)) == len(batch), 'an item stands twice in a batch'
        assert len(batch) == batch_size or number == len(batches) - 1
        in_batch = {}
        for item in batch:
            in_batch.setdefault(labels[item][0], []).append(item)
        assert [item for items in in_batch.values() for item in items] == batch, 'not side by side'
        for session, items in in_batch.items():
            assert labels[items[0]][1] == 0, 'the root is not first'
            if order[-1:] != [session]:
                order.append(session)
            if len(items) == len(sessions[session]):
                whole[session] += 1
                continue
            is_last = session == next(reversed(in_batch))
            assert is_last, 'a session is cut before the end of a batch'
            check_cut(labels, items, sessions[session])
            if len(in_batch) > 1:
                assert labels[batches[number + 1][0]][0] == session, 'it does not come again'
    assert sorted(order) == sorted(sessions), 'a session is left out or comes twice'
    for session, items in sessions.items():
        assert whole[session] == (len(items) <= batch_size)


def check_cut(labels, items, session):
    """A cut has both kinds of matches where it has places for both, a positive for one."""
    kinds, there = ({labels[item][1] for item in some[1:]} for some in (items, session))
    if len(items) == 2 and 1 in there:
        assert kinds == {1}
    elif len(items) > 2:
        assert kinds == there


@FEW
@given(labels=SESSIONS, batch_size=st.integers(2, 30), seed=SEEDS)
def test_shuffled_sessions_are_a_plain_loop_over_some_order(labels, batch_size, seed):
    sessions = grouped(labels)
    batches = list(SessionSampler(labels, batch_size, seed=seed))
    order = list(dict.fromkeys(labels[item][0] for batch in batches for item in batch))
    expected = naive_session_batches([sessions[session] for session in order], batch_size)
    assert [[labels[item][0] for item in batch] for batch in batches] == [
        [labels[item][0] for item in batch] for batch in expected
    ]


@FEW
@given(labels=SESSIONS, batch_size=st.integers(2, 30), seeds=st.lists(SEEDS, max_size=3))
def test_session_count_does_not_depend_on_the_seed(labels, batch_size, seeds):
    lengths = {
        len(SessionSampler(np.array(labels).reshape(-1, 2), batch_size, seed=seed))
        for seed in seeds
    }
    assert len(lengths) <= 1
