"""Datasets: labels counted in order of appearance, contents made at each access."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.data import ClassDataset
from finetuner.excepts import DataError


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
    names = {}
    for code in re.findall(r'```python\n(.*?)```', guide, re.DOTALL):
        exec(code, names)
        for expression, shown in re.findall(r'^(dataset\S+) +# (.*)$', code, re.MULTILINE):
            assert repr(eval(expression, names)) == shown
    assert sorted(next(iter(names['sampler']))) == [0, 1, 2, 3]
    assert len(names['digest']) == 64
