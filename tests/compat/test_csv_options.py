"""CSV files as Finetuner 0.8.1 took them: its `CSVOptions`, and `csv_options` of `fit`."""

import csv
import dataclasses
import inspect

import numpy as np
import pytest
import torch

import finetuner
from finetuner import fit
from finetuner.callback import EvaluationCallback
from finetuner.client import callback_parameters
from finetuner.data import CSVOptions, open_documents
from finetuner.excepts import ConfigError

PUBLISHED = [
    ('size', None),
    ('sampling_rate', None),
    ('dialect', 'auto'),
    ('encoding', 'utf-8'),
    ('is_labeled', False),
    ('convert_to_blob', True),
    ('create_point_clouds', True),
    ('point_cloud_size', 2048),
]
# of two topics, told apart by their letters
TEXTS = {'sea': ['salt wave', 'wave salt sail', 'sail salt'], 'hay': ['cow gum', 'gum oxen', 'ox']}


def letters(doc) -> np.ndarray:
    return np.array([doc.text.count(chr(ord('a') + i)) for i in range(26)], dtype=np.float32)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(26, 4)


def write(path, rows, dialect='excel', encoding='utf-8'):
    with path.open('w', encoding=encoding, newline='') as file:
        csv.writer(file, dialect).writerows(rows)
    return str(path)


@pytest.fixture
def labelled(tmp_path):
    rows = [(text, topic) for topic, texts in TEXTS.items() for text in texts]
    return write(tmp_path / 'labelled.csv', rows)


def test_fields_order_and_defaults():
    assert dataclasses.is_dataclass(CSVOptions)
    assert [(field.name, field.default) for field in dataclasses.fields(CSVOptions)] == PUBLISHED
    given = (10, 0.5, 'excel-tab', 'latin-1', True, False, False, 64)
    assert dataclasses.astuple(CSVOptions(*given)) == given


def test_fit_takes_them_where_it_took_them():
    parameters = inspect.signature(finetuner.fit).parameters
    names = list(parameters)
    assert parameters['csv_options'].default is None
    assert names[names.index('to_onnx') + 1 :][:2] == ['csv_options', 'public']
    for function in (finetuner.create_run, finetuner.create_training_run):
        assert inspect.signature(function).parameters['csv_options'].default is None


@pytest.mark.parametrize('dialect', ['auto', *csv.list_dialects(), csv.get_dialect('unix')])
def test_dialects_of_the_csv_module(tmp_path, dialect):
    written = 'unix' if dialect == 'auto' else dialect
    path = write(tmp_path / 'x.csv', [('a, "quoted"', 'x'), ('line\nbreak', 'y')], written)
    docs = open_documents(path, CSVOptions(dialect=dialect, is_labeled=True))
    assert [doc.text for doc in docs] == ['a, "quoted"', 'line\nbreak']
    assert [doc.tags['finetuner_label'] for doc in docs] == ['x', 'y']


def test_options_are_used_for_many_files_and_stay_as_they_are(tmp_path):
    """There the dialect found in the first file was written into them, and used for the next."""
    options = CSVOptions(is_labeled=True)
    for dialect in ('excel', 'excel-tab'):
        path = write(tmp_path / f'{dialect}.csv', [('a b', 'x'), ('c d', 'y')], dialect)
        assert [doc.text for doc in open_documents(path, options)] == ['a b', 'c d']
    assert options == CSVOptions(is_labeled=True)


def test_without_labels_the_second_column_is_similar_to_the_first(tmp_path):
    path = write(tmp_path / 'pairs.csv', [('a', 'b'), ('c', 'd'), ('a', 'e')])
    docs = open_documents(path)
    label_of = {doc.text: doc.tags['finetuner_label'] for doc in docs}
    assert label_of['a'] == label_of['b'] == label_of['e']
    assert label_of['c'] == label_of['d'] != label_of['a']
    assert len(docs) == len(label_of) == 5


def test_size_and_sampling_rate(tmp_path):
    path = write(tmp_path / 'many.csv', [(f'text {i}', i % 2) for i in range(400)])
    assert len(open_documents(path, CSVOptions(size=7, is_labeled=True))) == 7
    assert len(open_documents(path, CSVOptions(sampling_rate=1.0, is_labeled=True))) == 400
    half = open_documents(path, CSVOptions(sampling_rate=0.5, is_labeled=True))
    assert 120 < len(half) < 280


def test_encoding(tmp_path):
    path = write(tmp_path / 'x.csv', [('Größe', 'ä'), ('Maß', 'ö')], encoding='latin-1')
    docs = open_documents(path, CSVOptions(encoding='latin-1', is_labeled=True))
    assert [doc.text for doc in docs] == ['Größe', 'Maß']


def test_fit_on_a_labelled_csv(labelled):
    model = network()
    tuned = fit(
        model,
        labelled,
        eval_data=labelled,
        csv_options=CSVOptions(is_labeled=True),
        preprocess_fn=letters,
        loss='TripletMarginLoss',
        epochs=30,
        learning_rate=0.02,
    )
    docs = finetuner.DocumentArray(open_documents(labelled, CSVOptions(is_labeled=True)))
    finetuner.embed(docs, tuned, preprocess_fn=letters)
    distances = np.linalg.norm(docs.embeddings[:, None] - docs.embeddings[None], axis=2)
    topics = np.array(docs[:, 'tags__finetuner_label'])
    same = topics[:, None] == topics
    assert distances[same].max() < distances[~same].min()


def test_fit_on_pairs_needs_no_options(tmp_path):
    rows = [(texts[0], text) for texts in TEXTS.values() for text in texts[1:]]
    path = write(tmp_path / 'pairs.csv', rows)
    model = network()
    before = model.weight.detach().clone()
    assert fit(model, path, preprocess_fn=letters, epochs=1) is model
    assert not torch.equal(before, model.weight)


def test_evaluation_data_is_read_with_the_same_options(labelled):
    callback = EvaluationCallback(query_data=labelled, index_data='pushed')
    options = CSVOptions(is_labeled=True, size=2)
    configs, data = callback_parameters([callback], options)
    assert [doc.text for doc in data['callbacks.0.query_data']] == TEXTS['sea'][:2]
    assert configs[0]['options']['index_data'] == 'pushed'


@pytest.mark.parametrize('model', ['mobilenet_v3_small', None], ids=['backbone', 'module'])
def test_options_that_are_none_are_refused(labelled, model):
    with pytest.raises(ConfigError, match='csv_options is a dict, not CSVOptions'):
        fit(model or network(), labelled, csv_options={'is_labeled': True})
    with pytest.raises(ConfigError, match="unknown CSV dialect 'exel': did you mean 'excel'"):
        fit(model or network(), labelled, csv_options=CSVOptions(dialect='exel'))
