"""Batches of shards: whole epochs, balanced classes, any number of processes, gone on with anywhere."""

import json
import random
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from docarray import Document
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from finetuner.data import ShardedBatches, ShardedDocuments
from finetuner.data.balancing import TooFewClassesError, balanced_batches
from finetuner.data.loaded_items import LoadingError
from finetuner.excepts import ConfigError, DataError


def number_of(doc):
    return np.array([float(doc.text)])


def write(folder, records, num_shards):
    for shard in range(num_shards):
        lines = ''.join(f'{json.dumps(record)}\n' for record in records[shard::num_shards])
        (folder / f'{shard}.jsonl').write_text(lines)
    return str(folder / '*.jsonl')


@pytest.fixture(scope='module')
def classes(tmp_path_factory):
    """97 rows of 12 classes in 7 shards."""
    records = [{'text': str(n), 'label': n % 12} for n in range(97)]
    return write(tmp_path_factory.mktemp('classes'), records, 7)


def batches_of(pattern, rank=0, num_ranks=1, seed=0, shuffle_buffer=40, **options):
    docs = ShardedDocuments(pattern, rank, num_ranks, seed, shuffle_buffer)
    options.setdefault('preprocess_fn', number_of)
    return ShardedBatches(docs, options.pop('batch_size', 8), **options)


def plain(batches):
    return [(inputs.flatten().int().tolist(), labels.tolist()) for inputs, labels in batches]


@pytest.mark.parametrize('num_ranks', [1, 3])
@pytest.mark.parametrize('num_workers', [0, 2])
def test_each_row_once_with_its_label(classes, num_ranks, num_workers):
    found = []
    for rank in range(num_ranks):
        batches = batches_of(classes, rank, num_ranks)
        loaders = [DataLoader(batches, None, num_workers=num_workers)]
        if num_ranks == 1:
            loaders.append(batches.loader(num_workers))
        epochs = [plain(loader) for loader in loaders]
        assert all(epoch == epochs[0] for epoch in epochs)
        found += epochs[0]
    assert all(len(inputs) <= 8 for inputs, _ in found)
    items = [item for batch in found for item in zip(*batch, strict=True)]
    assert sorted(items) == [(n, n % 12) for n in range(97)]


def test_epochs_follow_each_other(classes):
    batches = batches_of(classes)
    epochs = [plain(batches) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    for num_workers in (0, 2):
        loader = batches_of(classes).loader(num_workers)
        theirs = [plain(loader) for _ in range(2)]
        assert theirs[0] != theirs[1]
        assert theirs == epochs[:2] or num_workers
    again = batches_of(classes)
    again.epoch = 2
    assert plain(again) == epochs[2]


def test_short_batches_are_left_out_if_wanted(classes):
    assert [len(i) for i, _ in plain(batches_of(classes))] == [8] * 12 + [1]
    assert [len(i) for i, _ in plain(batches_of(classes, drop_last=True))] == [8] * 12


KINDS = {
    'instance': ([{'text': str(n)} for n in range(20)], 2),
    'session': (
        [{'text': str(n), 'matches': [
            {'text': str(n + 100 * m), 'label': 1 if m % 2 else -1} for m in range(1, 2 + n % 3)
        ]} for n in range(20)], None),
    'scored_pair': ([{'pair': [str(n), str(n + 100)], 'score': n / 20} for n in range(20)], 2),
    'text_image_pair': (
        [{'pair': [{'text': str(n % 7)}, {'uri': f'http://x/{n}.png'}]} for n in range(20)], 2),
}  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_other_kinds(tmp_path, kind):
    records, _ = KINDS[kind]
    pattern = write(tmp_path, records, 3)
    docs = [
        ShardedBatches(
            ShardedDocuments(pattern, rank, 2, 0, 5), 6,
            lambda doc: np.array([float(doc.text or doc.uri.split('/')[-1][:-4])]),
        )
        for rank in range(2)
    ]  # fmt: skip
    batches = [batch for each in docs for batch in each]
    values = [int(v) for inputs, _ in batches for v in inputs.flatten()]
    labels = torch.cat([labels for _, labels in batches])
    assert len(labels) == len(values)
    assert max(len(labels) for _, labels in batches) <= 6
    if kind == 'instance':
        assert Counter(values) == dict.fromkeys(range(20), 2)
        # another label for each, over both ranks
        assert Counter(Counter(labels.tolist()).values()) == {2: 20}
        assert len(set(zip(values, labels.tolist(), strict=True))) == 20
    elif kind == 'session':
        assert labels.shape[1] == 2
        sessions = zip(values, labels.tolist(), strict=True)
        roots = {session: value for value, (session, type_) in sessions if type_ == 0}
        assert sorted(roots.values()) == list(range(20))
        for value, (session, type_) in zip(values, labels.tolist(), strict=True):
            match = (value - roots[session]) // 100
            assert type_ == (0 if match == 0 else 1 if match % 2 else -1)
        assert len(values) == sum(1 + len(r['matches']) for r in records)
    elif kind == 'scored_pair':
        assert labels.dtype == torch.float32
        assert all(abs(v % 100 / 20 - s) < 1e-6 for v, s in zip(values, labels, strict=True))
    else:
        assert labels[:, 1].tolist() == [0, 1] * 20
        texts = dict(zip(values[::2], labels[::2, 0].tolist(), strict=True))
        # the same text has the same number at both ranks, and no other has
        assert len(set(texts.values())) == 7
        assert all(texts[image % 7] == n for image, n in zip(values[1::2], labels[1::2, 0].tolist(), strict=True))  # fmt: skip


def test_labels_mean_the_same_everywhere(tmp_path):
    records = [{'text': str(n), 'label': 'abcd'[n % 4]} for n in range(40)]
    pattern = write(tmp_path, records, 4)
    numbers = {}
    for rank in range(2):
        for inputs, labels in plain(batches_of(pattern, rank, 2)):
            for value, label in zip(inputs, labels, strict=True):
                assert numbers.setdefault('abcd'[value % 4], label) == label
                assert 0 <= label < 2**63
    assert len(set(numbers.values())) == 4
    known = batches_of(pattern, classes=['d', 'c', 'b', 'a'])
    for inputs, labels in plain(known):
        assert labels == [3 - value % 4 for value in inputs]
    with pytest.raises(DataError, match=r"line \d of '\d.jsonl': its label '.' is not in"):
        list(batches_of(pattern, classes=['a', 'b']))
    with pytest.raises(ConfigError, match='twice'):
        batches_of(pattern, classes=['a', 'a'])


@settings(max_examples=200, deadline=None)
@given(
    labels=st.lists(st.integers(0, 9), max_size=120),
    num_classes=st.integers(1, 5),
    num_items=st.integers(1, 4),
    more=st.integers(0, 30),
    seed=st.integers(0, 9),
)
def test_balanced_batches(labels, num_classes, num_items, more, seed):
    size = num_classes * num_items + more
    rows = [(label, (label, number)) for number, label in enumerate(labels)]
    draw = random.Random(seed).random
    batches, few = [], False
    try:
        for batch in balanced_batches(iter(rows), num_classes, num_items, size, draw):
            batches.append(batch)
    except TooFewClassesError as error:
        few = error.num_classes < num_classes
        if not few:
            raise
    for batch in batches:
        groups = [batch[n : n + num_items] for n in range(0, len(batch), num_items)]
        assert len(groups) == num_classes
        assert len({label for group in groups for label, _ in group}) == num_classes
        for group in groups:
            assert len({label for label, _ in group}) == 1
            # evenly made up
            counts = Counter(group).values()
            assert max(counts) - min(counts) <= 1
    items = Counter(item for batch in batches for item in set(batch))
    assert set(items.values()) <= {1}
    left = {label for label, item in rows if item not in items}
    if not few:
        # what remains fills no batch
        assert len(left) < num_classes


def test_balanced_batches_use_nearly_all(tmp_path):
    records = [{'text': str(n), 'label': n % 50} for n in range(2000)]
    pattern = write(tmp_path, records, 10)
    batches = batches_of(pattern, shuffle_buffer=400, batch_size=32, num_items_per_class=4)
    found = plain(batches)
    assert all(Counter(Counter(labels).values()) == {4: 8} for _, labels in found)
    used = Counter(chain(*(inputs for inputs, _ in found)))
    assert len(used) > 1950
    # few were made up: there is room to wait for others of the class
    assert used.total() - len(used) < 100
    assert plain(batches) != found


def test_classes_that_are_too_few_for_a_batch(tmp_path):
    records = [{'text': str(n), 'label': n // 100} for n in range(400)]
    (tmp_path / 'x.jsonl').write_text(''.join(f'{json.dumps(r)}\n' for r in records))
    batches = batches_of(tmp_path / 'x.jsonl', batch_size=8, num_items_per_class=2)
    with pytest.raises(DataError, match='40 rows hold 1 classes, and a batch takes 4'):
        list(batches)
    batches = batches_of(
        tmp_path / 'x.jsonl', batch_size=10, num_items_per_class=2, shuffle_buffer=500
    )
    with pytest.raises(DataError, match='all 400 rows of this process hold fewer classes'):
        list(batches)


def test_labels_in_turn_come_to_all_readers(tmp_path):
    """Each of the two processes gets rows of all classes, though there is one shard."""
    pattern = write(tmp_path, [{'text': str(n), 'label': n % 12} for n in range(600)], 1)
    batches = batches_of(pattern, batch_size=24, num_items_per_class=2, shuffle_buffer=300)
    assert len(plain(batches.loader(2))) >= 16


OPTIONS = {
    'in turn': {},
    'whole batches': {'drop_last': True, 'num_batches': 15},
    'balanced': {'num_items_per_class': 2},
    'balanced, so many': {'num_items_per_class': 2, 'num_batches': 17},
}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('num_ranks', [1, 2])
def test_what_follows_a_state_is_the_same(classes, options, num_ranks):
    def jittered(doc):
        return number_of(doc) + random.random() / 2 + np.random.rand() / 4

    def build():
        batches = batches_of(classes, 0, num_ranks, preprocess_fn=jittered, **options)
        batches.epoch = 1
        return batches

    def values(batches):
        return [(i.flatten().tolist(), labels.tolist()) for i, labels in batches]

    whole = build()
    expected = values(whole) + values(whole)
    for cut in range(0, len(expected) + 1, 3):
        first, taken = build(), []
        while len(taken) < cut:
            for batch in first:
                taken += values([batch])
                if len(taken) == cut:
                    break
        second = build()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = []
        while len(rest) < len(expected) - cut:
            rest += values(second)
        assert taken + rest[: len(expected) - cut] == expected


@pytest.mark.parametrize('options', [{}, {'num_batches': 9, 'drop_last': True}])
def test_a_loader_of_several_processes_goes_on(classes, options):
    def build():
        return batches_of(classes, batch_size=5, **options).loader(2)

    whole = build()
    expected = plain(whole) + plain(whole)
    for cut in (1, 8, 18, len(expected) // 2):
        first, taken = build(), []
        while len(taken) < cut:
            for batch in first:
                taken += plain([batch])
                if len(taken) == cut:
                    break
        second = build()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = plain(second)
        if len(taken) + len(rest) < len(expected):
            rest += plain(second)
        assert taken + rest == expected
    with pytest.raises(ConfigError, match='take as many'):
        batches_of(classes).loader(0).load_state_dict(first.state_dict())


@pytest.mark.parametrize('num_workers', [0, 2])
def test_all_ranks_make_as_many_steps(classes, num_workers):
    for rank in range(3):
        batches = batches_of(classes, rank, 3, num_batches=11, drop_last=True)
        loader = batches.loader(num_workers)
        assert len(batches) == len(loader) == 11
        for _ in range(2):
            assert [len(inputs) for inputs, _ in plain(loader)] == [8] * 11
    # 4.6 batches are there of each rank's rows: all of them come before any comes again
    batches = batches_of(classes, 0, 3, num_batches=11, drop_last=True)
    rows = list(chain(*(inputs for inputs, _ in plain(batches))))
    assert len(set(rows[: 8 * (len(set(rows)) // 8)])) == 8 * (len(set(rows)) // 8)


def test_no_batches_without_rows(tmp_path):
    pattern = write(tmp_path, [{'text': '1', 'label': 1}], 1)
    batches = batches_of(pattern, drop_last=True, num_batches=2)
    with pytest.raises(DataError, match='rank 0 of 1, process 0 of 1: its rows give no batch'):
        list(batches)
    with pytest.raises(TypeError, match='num_batches'):
        len(batches_of(pattern))


def failing(doc):
    if doc.text in ('5', '17'):
        raise OSError(f'cannot open {doc.text}')
    return number_of(doc)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_what_cannot_be_preprocessed(classes, num_workers, caplog):
    loader = batches_of(classes, preprocess_fn=failing).loader(num_workers)
    words = r"^line \d+ of '\d\.jsonl' cannot be preprocessed: OSError: cannot open \d+$"
    with pytest.raises(LoadingError, match=words):
        list(loader)
    loader = batches_of(classes, preprocess_fn=failing, on_broken='skip').loader(num_workers)
    values = list(chain(*(inputs for inputs, _ in plain(loader))))
    assert sorted(values) == [n for n in range(97) if n not in (5, 17)]
    if not num_workers:
        assert 'cannot open 17' in caplog.text

    def mistaken(doc):
        raise KeyError('x')

    with pytest.raises(LoadingError, match="KeyError: 'x'"):
        list(batches_of(classes, preprocess_fn=mistaken, on_broken='skip'))


def test_what_is_left_of_sessions_and_pairs(tmp_path):
    for kind in ('scored_pair', 'session'):
        folder = tmp_path / kind
        folder.mkdir()
        pattern = write(folder, KINDS[kind][0], 2)

        def fails(doc):
            # a chunk of a pair; the root of one session, the matches of another
            if doc.text in ('105', '4') or doc.text.endswith('08'):
                raise OSError(doc.text)
            return number_of(doc)

        batches = batches_of(pattern, preprocess_fn=fails, on_broken='skip')
        values = set(chain(*(i.flatten().int().tolist() for i, _ in batches)))
        assert 4 not in values
        assert 105 not in values
        assert (5 in values) == (kind == 'session')
        assert not {104, 204, 304} & values
        assert (8 in values) == (kind == 'session')


def test_mixtures_and_rules_of_kinds(tmp_path):
    def read(*records, **options):
        (tmp_path / 'x.jsonl').write_text(''.join(f'{json.dumps(r)}\n' for r in records))
        options.setdefault('batch_size', 4)
        docs = ShardedDocuments(tmp_path / 'x.jsonl', 0, 1)
        return list(ShardedBatches(docs, preprocess_fn=lambda doc: 1, **options))

    words = r"line \d of 'x\.jsonl': it is of .*, unlike those before it"
    with pytest.raises(DataError, match=words):
        read({'text': 'a', 'label': 1}, {'text': 'b'})
    matches = [{'text': 'b', 'label': 1}, {'text': 'c', 'label': -1}]
    with pytest.raises(DataError, match='it is 3 items, and a batch has 2'):
        read({'text': 'a', 'matches': matches}, batch_size=2)
    with pytest.raises(DataError, match='a match has the label 5'):
        read({'text': 'a', 'matches': [{'text': 'b', 'label': 5}]})
    with pytest.raises(ConfigError, match='is for class data'):
        read({'text': 'a'}, num_items_per_class=2)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'batch_size': 0}, 'batch_size'),
        ({'num_batches': -1}, 'num_batches'),
        ({'num_items_per_class': 9}, 'more than batch_size'),
        ({'num_items_per_class': 2, 'shuffle_buffer': 7}, 'make it larger'),
        ({'on_broken': 'x'}, 'not stop or skip'),
        ({'views_per_instance': 0}, 'views_per_instance'),
    ],
)
def test_arguments_out_of_range(classes, options, words):
    with pytest.raises(ValueError, match=words):
        batches_of(classes, **options)


def test_it_trains(classes):
    """A loop as users write it: the embeddings of a class come to lie together."""
    from pytorch_metric_learning.losses import SupConLoss

    torch.manual_seed(0)
    model = torch.nn.Embedding(97, 8)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    loss_fn = SupConLoss()
    batches = batches_of(classes, batch_size=24, num_items_per_class=4, shuffle_buffer=90)
    losses = []
    for _ in range(8):
        for inputs, labels in batches:
            loss = loss_fn(model(inputs.long().flatten()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    assert len(list(islice(batches, 2))) == 2
    assert isinstance(next(iter(batches.documents)), Document)
