"""Nothing that belongs together is on both sides of a split."""

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.data.loading import build_dataset
from finetuner.data.splitting import split_dataset
from finetuner.excepts import DataError


def labelled(text, label):
    return Document(text=text, tags={'finetuner_label': label})


def contents(dataset):
    return [dataset[index][0] for index in range(len(dataset))]


def test_classes_stay_whole_and_are_numbered_anew():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 4)).tolist()
    docs = DocumentArray(
        [labelled(f'{label} {i}', f'class {label}') for i, label in enumerate(labels)]
    )
    dataset = build_dataset(docs)
    train, held_out = split_dataset(dataset, 0.4, seed=0)
    assert (len(train.classes), len(held_out.classes)) == (6, 4)
    assert not set(train.classes) & set(held_out.classes)
    assert sorted(contents(train) + contents(held_out)) == sorted(doc.text for doc in docs)
    for side in (train, held_out):
        # numbered from 0 in order of appearance, as in a dataset of its own
        assert side.labels == list(
            build_dataset(DocumentArray(map(side.document, range(len(side))))).labels
        )
        for index in range(len(side)):
            content, label = side[index]
            assert side.classes[label] == f'class {content.split()[0]}'
            assert docs[int(side.position_of(index).split()[1])].text == content
        assert contents(side) == sorted(contents(side), key=lambda text: int(text.split()[1]))


def test_the_seed_decides():
    dataset = build_dataset(DocumentArray([labelled(str(i), i // 2) for i in range(40)]))
    first, again, other = (split_dataset(dataset, 0.25, seed)[1].classes for seed in (1, 1, 2))
    assert first == again != other


def session_of(number, num_matches):
    matches = [labelled(f'{number}.{m}', 1 if m % 2 else -1) for m in range(num_matches)]
    return Document(text=f'{number}.root', matches=matches)


def test_sessions_stay_whole():
    dataset = build_dataset(DocumentArray([session_of(i, 1 + i % 4) for i in range(20)]))
    for side in split_dataset(dataset, 0.3, seed=3):
        expected = -1
        for index in range(len(side)):
            content, (session, type_) = side[index]
            root = content.endswith('root')
            expected += root
            assert (session, type_ == 0) == (expected, root)
            assert side.position_of(index).split(',')[0] == f'Document {content.split(".")[0]}'
            if not root:
                match = int(content.split('.')[1])
                assert type_ == (1 if match % 2 else -1)
                assert side.position_of(index).endswith(f', match {match}')


def test_pairs_stay_whole():
    docs = DocumentArray(
        Document(
            chunks=[Document(text=f'{i}a'), Document(text=f'{i}b')],
            tags={'finetuner_score': i / 10},
        )
        for i in range(10)
    )
    for side in split_dataset(build_dataset(docs), 0.3, seed=3):
        for index in range(0, len(side), 2):
            (first, score), (second, same) = side[index], side[index + 1]
            assert first[:-1] == second[:-1] == str(round(score * 10))
            assert score == same
            assert (first[-1], second[-1]) == ('a', 'b')


def test_a_subset_of_a_subset():
    dataset = build_dataset(DocumentArray([session_of(i, 2) for i in range(8)]))
    part = dataset.subset(np.array([1, 3, 5, 7])).subset(np.array([2, 0]))
    assert contents(part) == ['5.root', '5.0', '5.1', '1.root', '1.0', '1.1']
    assert part.labels == [(0, 0), (0, -1), (0, 1), (1, 0), (1, -1), (1, 1)]
    assert part.position_of(4) == 'Document 1, match 0'


def test_too_few_to_split():
    dataset = build_dataset(DocumentArray([labelled(str(i), i // 4) for i in range(12)]))
    with pytest.raises(DataError, match='of 3 classes leaves 1 to train on'):
        split_dataset(dataset, 0.5, 0)
    dataset = build_dataset(DocumentArray([Document(text=str(i)) for i in range(3)]))
    with pytest.raises(DataError, match='of 3 Documents leaves 1 to train on'):
        split_dataset(dataset, 0.5, 0)
