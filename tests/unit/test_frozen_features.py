"""The frozen part computed once: the same weights as in the plain loop, and a reason where not."""

import logging

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.data.collation import stack_contents
from finetuner.data.loading import LoadingError, build_dataset, load_in_order
from finetuner.inference import load_engine
from finetuner.models.tailor import build_embedding_model, freeze_backbone
from finetuner.models.zoo import get_backbone
from finetuner.training import frozen_features
from finetuner.training.division import DivisionError, divide_model
from finetuner.training.frozen_features import build_frozen_features
from finetuner.training.setup import BatchShape, Pipeline
from tests.conftest import make_picture_docs, make_vector_docs
from tests.unit import test_runner, test_text_training
from tests.unit.tiny_encoder import write_tiny_encoder

FROZEN = {'freeze': True, 'freeze_batch_norm': True, 'epochs': 3, 'learning_rate': 1e-3}
EVALUATION = {'name': 'EvaluationCallback', 'options': {'query_data': 'query', 'limit': 3}}
COMPUTED = 'The frozen part of the model was computed for'
NOT_COMPUTED = 'The frozen part of the model is computed in each epoch: '


def both_ways(monkeypatch, caplog, execute, tmp_path, **parameters):
    """Train with the frozen part computed once, and without; weights and what was measured."""
    results = []
    for name in ('once', 'always'):
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger='finetuner'):
            caplog.clear()
            if name == 'always':
                patch.setattr(frozen_features, 'available_memory', lambda: 0)
            observer = execute(tmp_path / name, **FROZEN, **parameters)
        assert (COMPUTED in caplog.text) == (name == 'once')
        assert ('the values would take' in caplog.text) == (name == 'always')
        results.append((test_runner.weights_of(tmp_path / name), observer))
    return results


def assert_same_training(once, always, trained):
    (weights, observer), (plain_weights, plain_observer) = once, always
    for name, tensor in plain_weights.items():
        # the axes of a whitening may point either way
        if 'dense' in name:
            continue
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    assert any(trained(name) for name in weights)
    losses, plain = ([v['train_loss'] for _, v in o.epochs] for o in (observer, plain_observer))
    np.testing.assert_allclose(losses, plain, rtol=1e-3, atol=1e-5)
    assert len(set(losses)) == 3
    for (stage, found), (other, expected) in zip(
        observer.evaluations, plain_observer.evaluations, strict=True
    ):
        assert stage == other
        assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    'head',
    [
        {'output_dim': 8, 'whiten': False},
        {'whiten': False},
        {'output_dim': 8, 'whiten': True},
    ],
)
def test_pictures(monkeypatch, caplog, tmp_path, head):
    # the plain loop leaves out blocks at random, of the frozen part as well
    monkeypatch.setattr(
        'efficientnet_lite_pytorch.model.drop_connect', lambda inputs, p, training: inputs
    )
    once, always = both_ways(
        monkeypatch,
        caplog,
        test_runner.execute,
        tmp_path,
        model='efficientnet-lite0',
        model_options={'input_size': 32},
        loss='NTXentLoss',
        callbacks=[
            EVALUATION,
            {'name': 'BestModelCheckpoint', 'options': {'monitor': 'train_loss'}},
        ],
        val_split=0.34,
        **head,
    )
    last = '_conv_head' if head['whiten'] or len(head) == 1 else 'projection_head'
    assert_same_training(once, always, lambda name: last in name)
    assert [set(v) for _, v in once[1].epochs] == [set(v) for _, v in always[1].epochs]
    # the artifacts are of the whole model, and know the same neighbours
    products = []
    for name in ('once', 'always'):
        docs = make_picture_docs(seed=1)
        load_engine(tmp_path / name, is_onnx=True, device='cpu').encode_documents(docs)
        assert docs.embeddings.shape == (24, head.get('output_dim', 1280))
        products.append(docs.embeddings @ docs.embeddings.T)
    np.testing.assert_allclose(products[0], products[1], rtol=0.01, atol=0.01)


def test_texts(monkeypatch, caplog, tmp_path):
    encoder = write_tiny_encoder(tmp_path / 'encoder')
    # dropout would make the plain loop's embeddings differ from those of evaluation
    config = encoder / 'config.json'
    config.write_text(
        config.read_text()
        .replace('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 0.0')
        .replace('"attention_probs_dropout_prob": 0.1', '"attention_probs_dropout_prob": 0.0')
    )

    def execute(directory, epochs, learning_rate, **parameters):
        return test_text_training.execute(
            encoder,
            directory,
            test_text_training.labelled(),
            {'query': test_text_training.labelled()},
            epochs=epochs,
            learning_rate=learning_rate,
            callbacks=[EVALUATION],
            **parameters,
        )

    once, always = both_ways(monkeypatch, caplog, execute, tmp_path, output_dim=8)
    assert_same_training(once, always, lambda name: 'projection_head' in name)


def test_texts_without_a_head_are_computed_in_each_epoch(caplog, tmp_path):
    encoder = write_tiny_encoder(tmp_path / 'encoder')
    with caplog.at_level(logging.INFO, logger='finetuner'):
        test_text_training.execute(
            encoder, tmp_path / 'a', test_text_training.labelled(), freeze=True
        )
    assert f'{NOT_COMPUTED}torch.fx cannot follow the model' in caplog.text


@pytest.mark.parametrize(
    ('parameters', 'reason'),
    [
        ({'augmentation': 'light'}, "augmentation 'light' varies what it gets"),
        ({'freeze_batch_norm': False}, 'batch normalisation is not frozen'),
    ],
)
def test_what_varies_is_computed_in_each_epoch(caplog, tmp_path, parameters, reason):
    with caplog.at_level(logging.INFO, logger='finetuner'):
        test_runner.execute(
            tmp_path / 'a', **{**FROZEN, 'epochs': 1, 'output_dim': 8, **parameters}
        )
    assert f'{NOT_COMPUTED}' in caplog.text
    assert reason in caplog.text


def test_training_pictures_have_the_size_of_serving(caplog, tmp_path):
    options = {**test_runner.OPTIONS, 'input_size': 64, 'train_input_size': 32}
    with caplog.at_level(logging.INFO, logger='finetuner'):
        test_runner.execute(tmp_path / 'a', **FROZEN, model_options=options, output_dim=8)
    assert 'taken at 64 pixels and not at 32' in caplog.text


def test_broken_pictures_are_left_out_or_named(caplog, tmp_path, monkeypatch):
    docs = make_picture_docs()
    docs[9].blob = b'gone'
    with pytest.raises(LoadingError, match=r'^Document 9 cannot be preprocessed'):
        test_runner.execute(tmp_path / 'a', data={'train': docs}, **FROZEN, output_dim=8)
    # as if it had broken after the look at all of them
    monkeypatch.setattr('finetuner.runs.plan.MAX_CONTENTS_CHECKED', 2)
    with caplog.at_level(logging.INFO, logger='finetuner'):
        test_runner.execute(
            tmp_path / 'a', data={'train': docs}, **FROZEN, output_dim=8, on_broken='skip'
        )
    assert COMPUTED in caplog.text
    assert 'Left out: Document 9 cannot be preprocessed: ' in caplog.text
    assert 'preprocessed: Document 9 cannot' not in caplog.text
    assert '1 Documents were left out' in caplog.text


def test_values_are_computed_once(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    model[0].requires_grad_(False)
    count = 0

    def preprocess(doc):
        nonlocal count
        count += 1
        return doc.tensor

    dataset = build_dataset(make_vector_docs())
    features = build_frozen_features(model, Pipeline(preprocess), [dataset], 'cpu', True)
    pipeline = features.pipeline()
    loader = pipeline.training_loader(dataset, BatchShape(8, 2))
    read = count
    for _ in range(3):
        for inputs, _labels in loader:
            assert inputs.shape == (8, 5)
    part = pipeline.contents.prepared(dataset.subset(np.array([30, 2])), preprocess)
    assert count == read
    expected = model[0](torch.from_numpy(np.stack([dataset.document(i).tensor for i in (30, 2)])))
    torch.testing.assert_close(torch.stack([part[0][0], part[1][0]]), expected)
    assert features.trained(inputs).requires_grad


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('resnet18', {'weights': 'none', 'input_size': 64}),
        ('efficientnet-lite0', {'input_size': 64}),
        ('vit_b_16', {'weights': 'none'}),
        ('convnext_tiny', {'weights': 'none', 'input_size': 64}),
    ],
)
@pytest.mark.parametrize('output_dim', [None, 8])
def test_parts_make_the_whole(name, options, output_dim):
    if name == 'vit_b_16' and output_dim:
        pytest.skip('slow, and the same as the others')
    torch.manual_seed(0)
    model = build_embedding_model(get_backbone(name), options, output_dim, freeze=True).eval()
    divided = divide_model(model)
    size = options.get('input_size', 224)
    inputs = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    with torch.no_grad():
        values = divided.frozen(inputs)
        expected = model(inputs)
    given = values[0] if len(values) == 1 else dict(zip(divided.names, values, strict=True))
    found = divided.trained(given)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.sum().backward()
    learned = {id(p) for p in divided.trained.parameters() if p.grad is not None}
    assert learned == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(len(value) == 2 for value in values)


class _Told(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)
        self.first.requires_grad_(False)

    def forward(self, inputs):
        return torch.nn.functional.dropout(self.second(self.first(inputs)), training=self.training)


def test_models_that_cannot_be_divided(tiny_network):
    with pytest.raises(DivisionError, match='the first layers of the model are trained'):
        divide_model(tiny_network)
    tiny_network.requires_grad_(False)
    with pytest.raises(DivisionError, match='nothing of the model is trained'):
        divide_model(tiny_network)
    with pytest.raises(DivisionError, match='whether it is in training'):
        divide_model(_Told())


def test_the_training_mode_is_left_as_it_is():
    model = build_embedding_model(get_backbone('mobilenet_v3_small'), test_runner.OPTIONS, 8)
    freeze_backbone(model)
    model.train()
    divide_model(model)
    assert model.training


def test_contents_are_read_in_order_and_ahead():
    docs = DocumentArray(Document(text=f'{i}', tags={'finetuner_label': i % 2}) for i in range(7))
    dataset = build_dataset(docs, lambda doc: [int(doc.text)])
    assert [(i, c) for i, c, _ in load_in_order(dataset, 3)] == [
        ([0, 1, 2], [[0], [1], [2]]),
        ([3, 4, 5], [[3], [4], [5]]),
        ([6], [[6]]),
    ]
    assert stack_contents([[1], [2]]).shape == (2, 1)
    docs[4].text = 'x'

    def careful(doc):
        if doc.text == 'x':
            raise OSError('gone')
        return doc.text

    broken = dataset.with_preprocess(careful)
    with pytest.raises(LoadingError, match=r'^Document 4 cannot be preprocessed: OSError: gone'):
        list(load_in_order(broken, 3))
    read = list(load_in_order(broken, 3, 'skip'))
    assert read[1][:2] == ([3, 5], ['3', '5'])
    assert list(read[1][2]) == [4]
    assert list(load_in_order(dataset.subset(np.array([], dtype=np.int64)), 3)) == []
