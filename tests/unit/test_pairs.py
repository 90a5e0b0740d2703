"""Query-document pairs: what is linked is one class, and no document has two labels."""

import numpy as np
import pytest
from docarray import Document
from hypothesis import given
from hypothesis import strategies as st

from finetuner.data.pairs import join_pairs
from finetuner.excepts import DataError


def texts(*pairs):
    return [(Document(text=one), Document(text=other)) for one, other in pairs]


def labels(docs):
    return {doc.text: doc.tags['finetuner_label'] for doc in docs}


def test_a_shared_document_joins_its_queries():
    docs = join_pairs(texts(('q1', 'd1'), ('q2', 'd2'), ('q3', 'd3'), ('q2', 'd1')))
    assert labels(docs) == {'q1': 0, 'd1': 0, 'q2': 0, 'd2': 0, 'q3': 1, 'd3': 1}
    assert [doc.text for doc in docs] == ['q1', 'd1', 'q2', 'd2', 'q3', 'd3']
    assert all(type(doc.tags['finetuner_label']) is int for doc in docs)


def test_a_pair_with_itself_is_a_class_of_its_own():
    assert labels(join_pairs(texts(('a', 'a'), ('b', 'c'), ('b', 'b')))) == {'a': 0, 'b': 1, 'c': 1}


def test_no_pairs_are_no_documents():
    assert join_pairs([]) == []


def test_what_was_given_is_left_alone():
    one, other = Document(text='a', tags={'x': 1}), Document(text='b')
    docs = join_pairs([(one, other)])
    assert one.tags == {'x': 1}
    assert not other.tags
    assert docs[0].tags == {'x': 1, 'finetuner_label': 0}


def test_contents_of_every_kind_are_compared_by_what_they_hold():
    pairs = [
        (Document(text='a.png'), Document(uri='a.png')),
        (Document(blob=b'x'), Document(blob=b'y')),
        (Document(blob=b'y'), Document(tensor=np.arange(3))),
        (Document(tensor=np.arange(3)), Document(tensor=np.arange(3.0))),
        (Document(tensor=np.zeros((2, 3))), Document(tensor=np.zeros((3, 2)))),
    ]
    docs = join_pairs(pairs)
    assert [doc.tags['finetuner_label'] for doc in docs] == [0, 0, 1, 1, 1, 1, 2, 2]


def test_a_document_without_content_is_named():
    with pytest.raises(DataError, match=r'pair 1: .* no content'):
        join_pairs([*texts(('a', 'b')), (Document(text='c'), Document())])


def naive_labels(pairs):
    """Merge sets until none overlap."""
    groups = []
    for pair in pairs:
        linked = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in linked]
        groups.append(set(pair).union(*linked))
    order = list(dict.fromkeys(text for pair in pairs for text in pair))
    groups.sort(key=lambda group: min(map(order.index, group)))
    return {text: number for number, group in enumerate(groups) for text in group}


@given(st.lists(st.tuples(*[st.sampled_from('abcdefghijkl')] * 2), max_size=15))
def test_labels_are_those_of_merging_sets(pairs):
    docs = join_pairs(texts(*pairs))
    assert labels(docs) == naive_labels(pairs)
    assert len(docs) == len({doc.text for doc in docs})
