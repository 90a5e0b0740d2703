"""What users of Finetuner 0.4.1's datasets and samplers rely on, under the names of `finetuner.data`.

Only what that package documents: not the order inside a batch, nor its random draws. Where ours
differs on purpose, a test at the end says how.
"""

from collections import Counter

import numpy as np
import pytest
from docarray import Document, DocumentArray
from torch.utils.data import DataLoader

from finetuner.data import (
    ClassDataset,
    ClassSampler,
    InstanceDataset,
    InstanceSampler,
    SessionDataset,
    SessionSampler,
)

TAG = 'finetuner_label'


def class_docs(*labels) -> DocumentArray:
    return DocumentArray(
        Document(text=f'{number}', tags={TAG: label}) for number, label in enumerate(labels)
    )


def session_docs(*sessions) -> DocumentArray:
    """One root for each list of match labels; texts are `'<session>'` and `'<session>.<match>'`."""
    docs = DocumentArray()
    for number, labels in enumerate(sessions):
        root = Document(text=str(number))
        root.matches = [
            Document(text=f'{number}.{place}', tags={TAG: label})
            for place, label in enumerate(labels)
        ]
        docs.append(root)
    return docs


def session_labels(*sizes) -> list[tuple[int, int]]:
    """Labels of sessions with a root and alternating matches, of these sizes in all."""
    return [
        (number, 0 if item == 0 else (1 if item % 2 else -1))
        for number, size in enumerate(sizes)
        for item in range(size)
    ]


# datasets


def test_class_dataset():
    dataset = ClassDataset(class_docs('cat', 'dog', 'cat', 3, 'dog'))
    assert len(dataset) == 5
    assert dataset.labels == [0, 1, 0, 2, 1], 'numbered from 0 in order of appearance'
    assert [dataset[i] for i in range(5)] == list(zip('01234', dataset.labels, strict=True))
    assert all(type(dataset[i][1]) is int for i in range(5))


def test_session_dataset():
    dataset = SessionDataset(session_docs([1, -1], [], [-1.0]))
    assert len(dataset) == 6
    assert dataset.labels == [(0, 0), (0, 1), (0, -1), (1, 0), (2, 0), (2, -1)]
    contents = [dataset[i][0] for i in range(6)]
    assert contents == ['0', '0.0', '0.1', '1', '2', '2.0']
    assert [dataset[i][1] for i in range(6)] == dataset.labels
    session, kind = dataset[5][1]
    assert (type(session), type(kind)) == (int, int)


def test_instance_dataset_needs_no_label():
    dataset = InstanceDataset(DocumentArray([Document(text=text) for text in 'abc']))
    assert len(dataset) == 3
    assert dataset.labels == [0, 1, 2]
    assert [dataset[i] for i in range(3)] == [('a', 0), ('b', 1), ('c', 2)]


@pytest.mark.parametrize(
    ('build', 'docs', 'contents'),
    [
        (ClassDataset, class_docs(1, 1), ['0!', '1!']),
        (InstanceDataset, class_docs(1, 1), ['0!', '1!']),
        (SessionDataset, session_docs([1], [-1]), ['0!', '0.0!', '1!', '1.0!']),
    ],
    ids=['class', 'instance', 'session'],
)
def test_preprocess_fn_takes_each_document_when_it_is_asked_for(build, docs, contents):
    seen = []

    def shout(doc: Document) -> str:
        seen.append(doc.text)
        return doc.text + '!'

    dataset = build(docs, preprocess_fn=shout)
    assert seen == []
    assert [dataset[i][0] for i in range(len(dataset))] == contents
    assert build(docs, shout)[0][0] == '0!', 'by position too'
    assert [build(docs)[i][0] + '!' for i in range(len(dataset))] == contents


@pytest.mark.parametrize('build', [ClassDataset, SessionDataset, InstanceDataset])
def test_an_empty_dataset_has_length_0(build):
    dataset = build(DocumentArray())
    assert len(dataset) == 0
    assert dataset.labels == []
    with pytest.raises(IndexError):
        dataset[0]


def test_a_missing_label_is_a_key_error():
    unlabelled = session_docs([1, -1], [1])
    unlabelled[1].matches[0].tags = {'other': 1}
    for build, docs in (
        (ClassDataset, DocumentArray([*class_docs(1), Document(text='b')])),
        (SessionDataset, unlabelled),
    ):
        with pytest.raises(KeyError) as caught:
            build(docs)
        assert str(caught.value).startswith(f'The tag `{TAG}`')
    assert len(InstanceDataset(unlabelled)) == 2


# samplers


@pytest.mark.parametrize('num_items_per_class', [2, 3, 4, 5, None])
def test_class_batches_hold_as_many_items_of_each_class(num_items_per_class):
    labels = [label for label in range(6) for _ in range(5)]
    sampler = ClassSampler(labels, 12, num_items_per_class)
    num_items = num_items_per_class or 2
    batches = list(sampler)
    assert len(batches) == len(sampler) > 0
    for batch in batches:
        counts = Counter(labels[item] for item in batch)
        assert len(counts) == 12 // num_items
        assert set(counts.values()) == {num_items}


def test_every_item_of_even_classes_comes_once_an_epoch():
    labels = [label for label in range(8) for _ in range(4)]
    sampler = ClassSampler(labels, batch_size=16, num_items_per_class=4)
    assert len(sampler) == 2
    epochs = [list(sampler) for _ in range(10)]
    for epoch in epochs:
        assert sorted(item for batch in epoch for item in batch) == list(range(32))
    assert len({str(epoch) for epoch in epochs}) > 1, 'batches are drawn anew'


def test_a_class_short_of_items_gives_some_of_them_twice():
    labels = [0] * 5 + [1] * 3
    for batches in (list(ClassSampler(labels, 8, 4)) for _ in range(10)):
        for batch in batches:
            assert Counter(labels[item] for item in batch) == {0: 4, 1: 4}
            assert set(batch) >= {5, 6, 7}


def test_classes_that_fill_no_batch_are_cut_off():
    labels = [0] * 2 + [1] * 2 + [2] * 2
    left_out = Counter()
    for _ in range(60):
        (batch,) = ClassSampler(labels, batch_size=4, num_items_per_class=2)
        left_out.update({0, 1, 2} - {labels[item] for item in batch})
    assert set(left_out) == {0, 1, 2}


@pytest.mark.parametrize('shuffle', [True, False])
def test_whole_sessions_fill_a_batch(shuffle):
    sampler = SessionSampler(session_labels(4, 4, 4, 4), batch_size=8, shuffle=shuffle)
    assert len(sampler) == 2
    whole = [list(range(first, first + 4)) for first in (0, 4, 8, 12)]
    batches = list(sampler)
    for batch in batches:
        assert batch[:4] in whole
        assert batch[4:] in whole
    assert sorted(item for batch in batches for item in batch) == list(range(16))
    if not shuffle:
        assert batches == [[*range(8)], [*range(8, 16)]]


def test_a_cut_session_comes_again_whole():
    first, second = SessionSampler(session_labels(4, 4), batch_size=6, shuffle=False)
    assert first[:5] == [0, 1, 2, 3, 4], 'its root is kept'
    assert len(first) == 6
    assert first[5] in (5, 6, 7)
    assert second == [4, 5, 6, 7], 'as the first of the next batch, with all its items'


def test_a_session_larger_than_a_batch_comes_once_with_its_root():
    sampler = SessionSampler(session_labels(3, 9, 2), batch_size=4, shuffle=False)
    taken = set()
    for _ in range(40):
        first, large, last = sampler
        assert first[:4] == [0, 1, 2, 3]
        assert (len(large), large[0]) == (4, 3)
        assert set(large[1:]) < set(range(4, 12))
        assert last == [12, 13]
        taken.update(large)
    assert taken == set(range(3, 12)), 'the rest is drawn'


@pytest.mark.parametrize('batch_size', [5, 8, 11, 100])
def test_session_batches_never_exceed_their_size_and_cover_all(batch_size):
    sizes = [4, 3, 5, 2, 4, 4, 3]
    labels = session_labels(*sizes)
    sampler = SessionSampler(labels, batch_size)
    for _ in range(10):
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert 0 < len(batches[-1]) <= batch_size
        whole = set()
        for batch in batches:
            per_session = Counter(labels[item][0] for item in batch)
            roots = {labels[item][0] for item in batch if labels[item][1] == 0}
            assert set(per_session) == roots
            whole.update(s for s, count in per_session.items() if count == sizes[s])
        assert whole == set(range(len(sizes)))


@pytest.mark.parametrize('views', [2, 3, 4])
def test_instance_batches_hold_each_instance_as_often_as_views_are_asked_for(views):
    sampler = InstanceSampler(10, batch_size=12, views_per_instance=views)
    epochs = [list(sampler) for _ in range(10)]
    for epoch in epochs:
        assert len(epoch) == len(sampler)
        assert all(len(batch) == 12 for batch in epoch[:-1])
        for batch in epoch:
            assert set(Counter(batch).values()) == {views}
    assert len({str(epoch) for epoch in epochs}) > 1
    if views != 4:  # 10 instances, 3 a batch: see the end of this file
        assert Counter(i for batch in epochs[0] for i in batch) == dict.fromkeys(range(10), views)


def test_two_views_are_the_default():
    (batch,) = InstanceSampler(3, 6)
    assert Counter(batch) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: ClassSampler([0, 1], 0), 'batch_size'),
        (lambda: ClassSampler([0, 1], -3), 'batch_size'),
        (lambda: ClassSampler([0, 1], 2, 0), 'num_items_per_class'),
        (lambda: ClassSampler([0, 1], 2, -1), 'num_items_per_class'),
        (lambda: SessionSampler(session_labels(2, 2), 0), 'batch_size'),
        (lambda: SessionSampler(session_labels(2, 2), -2), 'batch_size'),
        (lambda: InstanceSampler(4, 0), 'batch_size'),
        (lambda: InstanceSampler(4, 4, 1), 'views_per_instance'),
        (lambda: InstanceSampler(4, 4, 0), 'views_per_instance'),
        (lambda: InstanceSampler(4, 5, 2), 'batch_size must be divisible by views_per_instance'),
    ],
)
def test_bad_sizes_are_value_errors_that_name_the_argument(build, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        build()


# how they were put together: labels of a dataset to a sampler, both to torch's loader


@pytest.mark.parametrize(
    ('dataset', 'build', 'sizes'),
    [
        (
            ClassDataset(class_docs('a', 'b', 'a', 'b')),
            lambda dataset: ClassSampler(dataset.labels, 4, 2),
            [4],
        ),
        (
            SessionDataset(session_docs([1, -1], [1, -1])),
            lambda dataset: SessionSampler(dataset.labels, 3, shuffle=False),
            [3, 3],
        ),
        (
            InstanceDataset(class_docs(*range(4))),
            lambda dataset: InstanceSampler(len(dataset), 4, 2),
            [4, 4],
        ),
    ],
    ids=['class', 'session', 'instance'],
)
def test_torchs_own_loader_takes_them(dataset, build, sizes):
    loader = DataLoader(dataset, batch_sampler=build(dataset))
    for _ in range(2):
        batches = [list(contents) for contents, _ in loader]
        assert [len(batch) for batch in batches] == sizes
        drawn = {content for batch in batches for content in batch}
        assert drawn == {content for content, _ in dataset}
    assert np.asarray(dataset.labels).shape[0] == len(dataset)


# what is different, on purpose


def test_an_instance_alone_in_the_last_batch_is_left_out_of_that_epoch():
    """There it made a batch of nothing but itself, from which nothing can be learned."""
    left_out = Counter()
    sampler = InstanceSampler(10, batch_size=12, views_per_instance=4)
    for _ in range(60):
        drawn = Counter(item for batch in sampler for item in batch)
        assert len(drawn) == 9
        left_out.update(set(range(10)) - set(drawn))
    assert len(left_out) > 5


def test_more_items_of_a_class_than_a_batch_holds_are_refused():
    """There the sampler went on for ever, making batches of no class at all."""
    with pytest.raises(ValueError, match=r'num_items_per_class must be at most batch_size \(4\)'):
        ClassSampler([0, 0, 1, 1], batch_size=4, num_items_per_class=5)


def test_session_batches_of_one_are_refused():
    """There it drew root after root, each alone."""
    with pytest.raises(ValueError, match='batch_size must be a whole number of at least 2'):
        SessionSampler(session_labels(2, 2), batch_size=1)


def test_match_labels_other_than_1_and_minus_1_are_refused():
    with pytest.raises(ValueError, match='Document 1: label 2 of a match is not 1 or -1'):
        SessionDataset(session_docs([1], [2]))
