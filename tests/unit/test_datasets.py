"""Datasets: labels counted in order of appearance, contents made at each access."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray

import finetuner
from finetuner.data import (
    ClassDataset,
    InstanceDataset,
    ScoredPairDataset,
    SessionDataset,
    TextImageDataset,
)
from finetuner.excepts import DataError
from tests.conftest import make_picture_docs


def class_data(*labels):
    return DocumentArray(
        [Document(text=f'text {i}', tags={'finetuner_label': v}) for i, v in enumerate(labels)]
    )


def test_labels_are_counted_in_order_of_appearance():
    dataset = ClassDataset(class_data('b', 7, 'b', True, 'a', 1.0, '1'))
    assert dataset.labels == [0, 1, 0, 2, 3, 2, 4]
    assert all(type(label) is int for label in dataset.labels)
    assert dataset.classes == ['b', 7, 1, 'a', '1']
    assert len(dataset) == 7
    assert dataset[1] == ('text 1', 1)
    assert dataset[-1] == ('text 6', 4)


def test_is_a_sequence_of_pairs():
    dataset = ClassDataset(class_data(5, 6))
    assert list(dataset) == [('text 0', 0), ('text 1', 1)]
    with pytest.raises(IndexError):
        dataset[2]
    with pytest.raises(IndexError):
        dataset[-3]


def test_empty():
    dataset = ClassDataset(DocumentArray())
    assert len(dataset) == 0
    assert dataset.labels == []


def test_missing_label_is_a_key_error_and_a_data_error():
    docs = DocumentArray([*class_data(1), Document(text='a'), *class_data(2), Document(text='b')])
    with pytest.raises(KeyError) as caught:
        ClassDataset(docs)
    message = str(caught.value)
    assert message.startswith('The tag `finetuner_label` is missing from Documents 1, 3: ')
    assert isinstance(caught.value, DataError)


def test_bad_label_names_its_position():
    with pytest.raises(DataError, match=r'^Document 1: label 5\.5'):
        ClassDataset(class_data(1, 5.5))


def test_content_without_preprocess_fn():
    array = np.ones((2, 2))
    contents = [{'text': 'a'}, {'tensor': array}, {'blob': b'a'}, {'blob': array}, {'uri': 'a.png'}]
    docs = [Document(tags={'finetuner_label': 1}, **content) for content in contents]
    found = [content for content, _ in ClassDataset(docs)]
    assert found[0] == 'a'
    assert found[1] is array
    assert found[2] == b'a'
    assert found[3] is array
    assert found[4] == 'a.png'


def test_preprocess_fn_is_called_at_each_access_and_not_before():
    calls = []

    def preprocess(doc):
        calls.append(doc.text)
        return len(calls)

    dataset = ClassDataset(class_data(1, 2), preprocess)
    assert calls == []
    assert [dataset[1], dataset[1], dataset[0]] == [(1, 1), (2, 1), (3, 0)]
    assert calls == ['text 1', 'text 1', 'text 0']


def test_what_preprocess_fn_sets_is_gone_at_the_next_access():
    """The published way to load a picture sets doc.tensor: all pictures would stay in memory."""
    docs = DocumentArray([Document(uri='a.png', blob=b'ab', tags={'finetuner_label': 1})])

    def load(doc):
        assert doc.tensor is None
        doc.tensor = np.frombuffer(doc.blob, np.uint8)
        doc.blob = None
        doc.tags['loaded'] = True
        return doc.tensor

    dataset = ClassDataset(docs, load)
    for _ in range(2):
        assert dataset[0][0].tolist() == [97, 98]
    assert docs[0].tensor is None
    assert docs[0].blob == b'ab'
    assert docs[0].tags == {'finetuner_label': 1}


def test_files_are_opened_only_when_asked_for(tmp_path):
    paths = [str(tmp_path / f'{number}') for number in range(2)]
    docs = DocumentArray([Document(uri=path, tags={'finetuner_label': 1}) for path in paths])
    dataset = ClassDataset(docs, lambda doc: os.path.getsize(doc.uri))
    (tmp_path / '0').write_bytes(b'abc')
    assert dataset[0] == (3, 0)
    with pytest.raises(FileNotFoundError):
        dataset[1]


def test_the_guide_runs_and_says_what_comes_out(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / 'docs' / 'data.md').read_text(encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    rows = []
    for number, doc in enumerate(make_picture_docs(2, 4)):
        (tmp_path / f'{number}.png').write_bytes(doc.blob)
        rows.append(f'{number}.png,{doc.tags["finetuner_label"]}\n')
    (tmp_path / 'shoes.csv').write_text(''.join(rows))
    for shard in range(2):
        lines = (f'{{"text": "{"a" * n}", "label": {n % 16}}}\n' for n in range(1, 129))
        (tmp_path / f'train-{shard}.jsonl').write_text(''.join(lines))
    names = {'finetuner': finetuner}
    for code in re.findall(r'```python\n(.*?)```', guide, re.DOTALL):
        exec(code, names)
        for expression, shown in re.findall(r'^(dataset\S+) +# (.*)$', code, re.MULTILINE):
            assert repr(eval(expression, names)) == shown
    assert sorted(next(iter(names['sampler']))) == [0, 1, 2, 3]
    assert len(names['digest']) == 64
    assert len(names['docs']) == len(rows)


# sessions, instances, pairs


def session_data(*sessions):
    docs = DocumentArray()
    for number, labels in enumerate(sessions):
        root = Document(text=f'root {number}')
        root.matches = [
            Document(text=f'match {number}.{i}', tags={'finetuner_label': label})
            for i, label in enumerate(labels)
        ]
        docs.append(root)
    return docs


def pair_data(*scores):
    return DocumentArray(
        Document(
            chunks=[Document(text=f'{i} a'), Document(text=f'{i} b')],
            tags={'finetuner_score': score},
        )
        for i, score in enumerate(scores)
    )


def text_image_data(num_pairs):
    docs = DocumentArray()
    for i in range(num_pairs):
        text = Document(text=f'text {i}', modality='text')
        docs.append(Document(chunks=[text, Document(uri=f'{i}.png', modality='image')]))
    return docs


# of each kind: its Documents, the contents and labels of its items, and its places
KINDS = {
    InstanceDataset: (
        lambda: DocumentArray([Document(text='a'), Document(text='b')]),
        ['a', 'b'],
        [0, 1],
        ['Document 0', 'Document 1'],
    ),
    SessionDataset: (
        lambda: session_data([-1, 1], [1]),
        ['root 0', 'match 0.0', 'match 0.1', 'root 1', 'match 1.0'],
        [(0, 0), (0, -1), (0, 1), (1, 0), (1, 1)],
        [
            'Document 0',
            'Document 0, match 0',
            'Document 0, match 1',
            'Document 1',
            'Document 1, match 0',
        ],
    ),
    ScoredPairDataset: (
        lambda: pair_data(1, 0.25),
        ['0 a', '0 b', '1 a', '1 b'],
        [1.0, 1.0, 0.25, 0.25],
        [f'Document {i}, chunk {chunk}' for i in range(2) for chunk in range(2)],
    ),
    TextImageDataset: (
        lambda: text_image_data(2),
        ['text 0', '0.png', 'text 1', '1.png'],
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [f'Document {i}, {modality}' for i in range(2) for modality in ('text', 'image')],
    ),
}
each_kind = pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)


@each_kind
def test_items_labels_and_places(kind):
    build, contents, labels, places = KINDS[kind]
    dataset = kind(build())
    assert len(dataset) == len(contents)
    assert dataset.labels == labels
    assert list(dataset) == list(zip(contents, labels, strict=True))
    assert [dataset.position_of(i) for i in range(len(dataset))] == places
    assert dataset[-1] == (contents[-1], labels[-1])
    with pytest.raises(IndexError):
        dataset[len(contents)]
    assert dataset.num_documents == 2


@each_kind
def test_labels_are_plain_outside_and_arrays_inside(kind):
    build, _, labels, _ = KINDS[kind]
    dataset = kind(build())
    flat = [value for label in dataset.labels for value in np.atleast_1d(label).tolist()]
    assert {type(value) for value in flat} == {float if kind is ScoredPairDataset else int}
    assert np.asarray(dataset.labels) is dataset.label_values
    shape = (len(labels), 2) if isinstance(labels[0], tuple) else (len(labels),)
    assert dataset.label_values.shape == shape
    assert dataset.label_values.dtype == (np.float32 if kind is ScoredPairDataset else np.int64)


@each_kind
def test_nothing_gives_nothing(kind):
    dataset = kind(DocumentArray())
    assert len(dataset) == dataset.num_documents == 0
    assert list(dataset) == []


@each_kind
def test_preprocess_fn_takes_what_holds_the_content(kind):
    build, contents, _, _ = KINDS[kind]
    docs = build()
    dataset = kind(docs, lambda doc: doc.tags.update(seen=True) or f'<{doc.text or doc.uri}>')
    assert [content for content, _ in dataset] == [f'<{content}>' for content in contents]
    assert all('seen' not in doc.tags for doc in docs.traverse_flat('r,c,m')), 'it took copies'
    other = dataset.with_preprocess(lambda doc: 0)
    assert other[0][0] == 0
    assert dataset[0][0] == f'<{contents[0]}>'


@each_kind
def test_a_part_is_labelled_anew_and_knows_where_it_came_from(kind):
    build, contents, labels, places = KINDS[kind]
    part = kind(build()).subset(np.array([1]))
    second = [i for i, place in enumerate(places) if place.startswith('Document 1')]
    assert [content for content, _ in part] == [contents[i] for i in second]
    assert [part.position_of(i) for i in range(len(part))] == [places[i] for i in second]
    assert part.num_documents == 1
    expected = [labels[i] for i in second]
    if kind is not ScoredPairDataset:
        expected = [0 if label == 1 else (0, label[1]) for label in expected]
    assert part.labels == expected


def test_a_part_of_class_data_has_the_classes_it_holds():
    dataset = ClassDataset(class_data('b', 7, 'b', 'a'))
    part = dataset.subset(np.array([3, 1, 3]))
    assert part.labels == [0, 1, 0]
    assert part.classes == ['a', 7]
    assert part.class_sizes.tolist() == [2, 1]
    again = part.subset(np.array([1]))
    assert (again.labels, again.classes) == ([0], [7])
    assert again[0][0] == dataset[1][0]


def test_what_is_of_no_use_without_a_broken_item():
    sessions = SessionDataset(session_data([1, -1], [1, -1], [1, -1]))
    # a root takes its session with it, a match only itself
    assert sessions.lost_documents([3, 1]) == {1}
    assert sessions.usable([0, 1, 2, 3, 4, 5], {3, 1}) == [0, 2]
    pairs = ScoredPairDataset(pair_data(0, 0.5, 1))
    assert pairs.lost_documents([3]) == {1}
    assert pairs.usable([4, 5, 2, 3], {3}) == [0, 1]
    alone = InstanceDataset(class_data(1, 1, 1))
    assert alone.usable([2, 2, 0, 0], {2}) == [2, 3]


def test_a_match_without_a_label_is_a_key_error():
    docs = session_data([1, -1], [1, -1])
    del docs[1].matches[1].tags['finetuner_label']
    with pytest.raises(KeyError, match=r'^The tag `finetuner_label` is missing from match 1 of'):
        SessionDataset(docs)


@pytest.mark.parametrize('label', [0, 2, '1', 1.5, None, float('nan')])
def test_match_labels_are_1_or_minus_1(label):
    with pytest.raises(DataError, match=r'^Document 1: label .* of a match is not 1 or -1'):
        SessionDataset(session_data([1, -1], [1, label]))


@pytest.mark.parametrize(('score', 'kept'), [(True, 1.0), (False, 0.0), (1, 1.0), (0.5, 0.5)])
def test_scores_as_http_sends_them(score, kept):
    assert ScoredPairDataset(pair_data(score)).labels == [kept, kept]


@pytest.mark.parametrize('label', [True, 1.0, 1])
def test_match_labels_as_http_and_protobuf_send_them(label):
    assert SessionDataset(session_data([label, -1.0])).labels == [(0, 0), (0, 1), (0, -1)]


@pytest.mark.parametrize('kind', [ScoredPairDataset, TextImageDataset])
def test_pairs_of_another_kind_are_refused(kind):
    with pytest.raises(DataError, match='these Documents are class data'):
        kind(class_data(1, 2))


def test_the_text_of_a_pair_comes_first_wherever_it_stands():
    docs = text_image_data(2)
    docs[0].chunks = docs[0].chunks[::-1]
    dataset = TextImageDataset(docs)
    assert [content for content, _ in dataset] == ['text 0', '0.png', 'text 1', '1.png']
    assert dataset.labels == [(0, 0), (0, 1), (1, 0), (1, 1)]
