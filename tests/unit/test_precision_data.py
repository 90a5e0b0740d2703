"""What the precisions of an artifact are measured on, where there is more than is needed."""

from collections import Counter

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.data.checks import build_named_dataset
from finetuner.runs import precision_data
from finetuner.runs.precision_data import Search, Side, _fewer

MOST = 100


@pytest.fixture(autouse=True)
def small_index(monkeypatch):
    monkeypatch.setattr(precision_data, '_MAX_INDEX', MOST)


def labelled(labels, ids='d'):
    docs = DocumentArray(
        Document(id=f'{ids}{number}', text=f't{number}', tags={'finetuner_label': label})
        for number, label in enumerate(labels)
    )
    return build_named_dataset(docs, 'index_data')


def labels_of(data):
    return Counter(data.classes[label] for label in data.labels)


def random_recall(queries, index):
    generator = np.random.default_rng(0)
    sides = [Side(data, range(len(data)), '') for data in (queries, index) if data is not None]
    search = Search(sides[0], sides[1] if index is not None else None, 20, 'cosine', True)
    return search.recall(
        [generator.normal(size=(len(side.places), 8)).astype(np.float32) for side in sides]
    )


def test_classes_larger_than_all_there_is_room_for_are_drawn_from():
    index = labelled([f'c{number % 3}' for number in range(900)])
    queries, fewer = _fewer(labelled(['c0', 'c1', 'c2'] * 5, 'q'), index, 0)
    assert len(queries) == 15
    assert labels_of(fewer) == {'c0': 33, 'c1': 33, 'c2': 33}
    # of one class alone, random vectors would find all
    assert random_recall(queries, fewer) < 0.5
    among, none = _fewer(index, None, 0)
    assert none is None
    assert labels_of(among) == {'c0': 33, 'c1': 33, 'c2': 33}
    assert random_recall(among, None) < 0.5


def test_what_small_classes_leave_large_ones_take():
    index = labelled(['a'] * 10 + ['b'] * 400 + ['c'] * 400)
    _, fewer = _fewer(labelled(['a', 'b', 'c'], 'q'), index, 0)
    assert labels_of(fewer) == {'a': 10, 'b': 45, 'c': 45}


@pytest.mark.parametrize('seed', range(5))
def test_only_classes_of_queries_are_drawn(seed):
    index = labelled([f'c{number % 50}' for number in range(500)])
    queries, fewer = _fewer(labelled(['c1', 'c2', 'absent'], 'q'), index, seed)
    assert labels_of(queries) == {'c1': 1, 'c2': 1}
    assert labels_of(fewer) == {'c1': 10, 'c2': 10}


def test_of_more_classes_than_there_is_room_for_some_are_drawn():
    index = labelled([f'c{number // 3}' for number in range(900)])
    queries, fewer = _fewer(index, index, 1)
    counts = labels_of(fewer)
    # none of which has nothing to find but itself
    assert set(counts.values()) == {2}
    assert len(fewer) == MOST
    assert set(labels_of(queries)) == set(counts)
    again = _fewer(index, index, 1)[1]
    assert [again.document(place).id for place in range(MOST)] == [
        fewer.document(place).id for place in range(MOST)
    ]
    assert 0 < random_recall(queries, fewer) < 1


def test_pairs_each_of_a_class_of_its_own_fill_the_index():
    index = labelled([f'c{number}' for number in range(900)])
    queries, fewer = _fewer(labelled([f'c{number}' for number in range(900)], 'q'), index, 0)
    assert (len(queries), len(fewer)) == (MOST, MOST)


def test_as_much_as_there_is_room_for_stays_as_it_is():
    index = labelled([f'c{number % 2}' for number in range(MOST)])
    queries = labelled(['c1'], 'q')
    assert _fewer(queries, index, 0) == (queries, index)


@pytest.mark.parametrize('size', [MOST, 5 * MOST])
def test_one_class_tells_nothing(size):
    index = labelled(['a'] * size)
    for queries, searched in ((index, None), (labelled(['a'], 'q'), index)):
        assert 'fewer than two classes' in _fewer(queries, searched, 0)


@pytest.mark.parametrize('size', [MOST, 5 * MOST])
def test_nor_do_queries_of_other_classes(size):
    found = _fewer(labelled(['c'], 'q'), labelled(['a', 'b'] * (size // 2)), 0)
    assert 'nothing to find' in found
