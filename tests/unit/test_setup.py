"""Descriptions become callbacks, Documents become loaders, and contradictions are told early."""

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.callback import BestModelCheckpoint, EarlyStopping, EvaluationCallback
from finetuner.data.loading import build_dataset
from finetuner.data.names import document_name
from finetuner.excepts import ConfigError, DataError
from finetuner.training.callback_building import build_callbacks, sample
from finetuner.training.callback_descriptions import parse_callback, prepare_callbacks
from finetuner.training.callbacks import BestWeights, RetrievalEvaluation, Stopping
from finetuner.training.setup import BatchShape, Pipeline, resolve_batch
from finetuner.training.trainer import BaseCallback
from tests.conftest import make_vector_docs


def class_docs(num_classes, items):
    return make_vector_docs(num_classes, items)


@pytest.mark.parametrize(
    ('num_classes', 'items', 'per_class', 'expected'),
    [(250, 4, 4, 128), (6, 4, 4, 24), (50, 2, 4, 100), (3, 100, 4, 12), (200, 2, 1, 128)],
)
def test_batch_size_follows_classes_and_items(num_classes, items, per_class, expected):
    dataset = build_dataset(class_docs(num_classes, items))
    shape = BatchShape(0, per_class)
    assert resolve_batch(shape, None, dataset) == BatchShape(expected, per_class)
    assert resolve_batch(shape, 7, dataset) == BatchShape(7, per_class)


def test_callbacks_by_name():
    made = parse_callback('EarlyStopping', {'monitor': 'train_loss', 'patience': 3}, {})
    assert made == EarlyStopping(monitor='train_loss', patience=3)
    docs = class_docs(2, 2)
    made = parse_callback(
        'EvaluationCallback', {'query_data': 'x', 'limit': 3}, {'query_data': docs}
    )
    assert made.query_data is docs
    assert made.limit == 3


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('EarlyStoping', {}, "unknown callback 'EarlyStoping': did you mean 'EarlyStopping'"),
        ('EarlyStopping', {'patiens': 2}, "did you mean 'patience'"),
        ('EarlyStopping', {'patience': 0}, 'patience'),
        ('EvaluationCallback', {}, 'query_data'),
        ('BaseCallback', {}, 'unknown callback'),
    ],
)
def test_wrong_callbacks(name, options, message):
    with pytest.raises(ConfigError, match=message):
        parse_callback(name, options, {})


@pytest.mark.parametrize('class_', [EarlyStopping, BestModelCheckpoint])
def test_what_is_monitored_must_be_measured_before(class_):
    evaluation = EvaluationCallback(class_docs(2, 3))
    with pytest.raises(ConfigError, match=r"monitors 'val_loss'.*give eval_data or val_split"):
        prepare_callbacks([class_()], False)
    with pytest.raises(ConfigError, match=r"'recall_at_k'.*put an EvaluationCallback before it"):
        prepare_callbacks([class_('recall_at_k'), evaluation], True)
    with pytest.raises(ConfigError, match=r'monitor one of .*recall_at_k'):
        prepare_callbacks([evaluation, class_('recal_at_k')], True)
    prepare_callbacks([class_()], True)
    prepare_callbacks([class_('train_loss')], False)
    prepare_callbacks([evaluation, class_('recall_at_k')], False)


def test_evaluation_data_is_checked():
    docs = class_docs(3, 2)
    with pytest.raises(DataError, match='query_data of the EvaluationCallback is empty'):
        prepare_callbacks([EvaluationCallback(DocumentArray())], False)
    with pytest.raises(DataError, match='index_data of the EvaluationCallback is empty'):
        prepare_callbacks([EvaluationCallback(docs, DocumentArray())], False)
    with pytest.raises(DataError, match=r'Documents 4, 5 .*no Document of index_data has'):
        prepare_callbacks([EvaluationCallback(docs, docs[:4])], False)
    unlabelled = DocumentArray([*docs, Document(tensor=np.ones(6))])
    with pytest.raises(DataError, match=r'index_data:.*6'):
        prepare_callbacks([EvaluationCallback(docs, unlabelled)], False)
    with pytest.raises(DataError, match=r'Document 4\b.*nothing but themselves'):
        prepare_callbacks([EvaluationCallback(docs[:5])], False)
    prepare_callbacks([EvaluationCallback(docs[:5], exclude_self=False)], False)
    with pytest.raises(ConfigError, match='single model'):
        prepare_callbacks([EvaluationCallback(docs, model='clip-text')], False)


def test_building_keeps_the_order_and_ones_own():
    own = BaseCallback()
    descriptions = [
        EvaluationCallback(class_docs(2, 3)),
        own,
        BestModelCheckpoint('recall_at_k'),
        EarlyStopping('recall_at_k'),
    ]
    prepared = prepare_callbacks(descriptions, False)
    built = build_callbacks(prepared, 'tiny', Pipeline(None), print, print)
    assert [type(c) for c in built] == [RetrievalEvaluation, BaseCallback, BestWeights, Stopping]
    assert built[1] is own


def test_evaluation_sets_keep_order_labels_and_ids():
    docs = DocumentArray(reversed(class_docs(3, 2)))
    for position, doc in enumerate(docs):
        doc.tags['finetuner_label'] = f'class {doc.tags["finetuner_label"]:.0f}'
        doc.tensor = np.full(2, position, np.float32)
    made = Pipeline(None).evaluation_set(build_dataset(docs), 4, 0)
    assert made.labels == [doc.tags['finetuner_label'] for doc in docs]
    assert made.ids == [doc.id for doc in docs]
    values = [row for inputs, _ in made.loader for row in inputs[:, 0].tolist()]
    assert values == [0, 1, 2, 3, 4, 5]


def test_names_of_documents():
    assert document_name(Document(text='a' * 100), 0) == 'a' * 80
    assert document_name(Document(uri='cat.png'), 0) == 'cat.png'
    assert document_name(Document(blob=b'x', tags={'file': 'dog.png'}), 0) == 'dog.png'
    assert document_name(Document(id='abc'), 5) == 'Document 5 (abc)'


def test_a_sample_is_seeded_and_in_order():
    dataset = build_dataset(class_docs(4, 10))

    def drawn(seed):
        part = sample(dataset, 12, seed=seed)
        return [int(part.position_of(index).split()[1]) for index in range(len(part))]

    assert drawn(3) == sorted(set(drawn(3)))
    assert len(drawn(3)) == 12
    assert drawn(3) != drawn(4)
    assert sample(dataset, None, 0) is dataset
    assert sample(dataset, 40, 0) is dataset
