"""Each argument of fit beyond the plain step has its effect in a run, or is refused at the door."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.artifact import load_artifact
from finetuner.data.neighbour_sampler import NeighbourClassSampler
from finetuner.evaluation import METRICS
from finetuner.excepts import ConfigError
from finetuner.inference import load_engine
from finetuner.models.embedding_model import EmbeddingModel
from finetuner.models.whitening import Whitening
from finetuner.training import step as step_module
from tests.conftest import make_picture_docs
from tests.unit.test_runner import EVALUATION, execute, validate, weights_of

PLAIN = {'freeze_batch_norm': True, 'precision': 'fp32'}


def losses(observer):
    return [values['loss'] for _, _, values in observer.steps]


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp('plain') / 'artifact'
    return directory, execute(directory, output_dim=8, **PLAIN)


@pytest.fixture
def batches(monkeypatch):
    """Rows of every batch that the model gets in training."""
    rows, forward = [], EmbeddingModel.forward

    def noting(self, inputs):
        if self.training:
            rows.append(len(inputs))
        return forward(self, inputs)

    monkeypatch.setattr(EmbeddingModel, 'forward', noting)
    return rows


def test_micro_batch_size(plain, tmp_path, batches):
    observer = execute(tmp_path / 'a', output_dim=8, micro_batch_size=5, **PLAIN)
    # after what is measured first: 2 epochs of 2 batches of 12, each embedded twice
    assert batches[-24:] == [5, 5, 2] * 2 * 4
    assert losses(observer) == pytest.approx(losses(plain[1]), rel=1e-3)
    expected = weights_of(plain[0])
    for name, tensor in weights_of(tmp_path / 'a').items():
        torch.testing.assert_close(tensor, expected[name], atol=5e-3, rtol=0)


def test_matryoshka_dims(tmp_path, caplog):
    callbacks = [
        EVALUATION,
        {'name': 'BestModelCheckpoint', 'options': {'monitor': 'recall_at_k_dim_2'}},
    ]
    with caplog.at_level(logging.INFO, logger='finetuner'):
        observer = execute(
            tmp_path / 'a', output_dim=8, matryoshka_dims=[4.0, 2], callbacks=callbacks, **PLAIN
        )
    found = load_artifact(tmp_path / 'a')
    assert found.spec.matryoshka_dims == (2, 4)
    assert 'The first 2, 4 values' in (tmp_path / 'a' / 'README.md').read_text()
    assert 'also cut to 2, 4' in caplog.text
    names = [*METRICS, *(f'{name}_dim_{length}' for length in (2, 4) for name in METRICS)]
    for stage, metrics in observer.evaluations[:2]:
        assert list(metrics) == [f'mobilenet_v3_small_{name}' for name in names], stage
    assert found.metrics['after'] == observer.evaluations[1][1]
    assert set(names) <= set(observer.epochs[0][1])
    assert json.loads((tmp_path / 'a' / 'artifact.json').read_text())['config'][
        'matryoshka_dims'
    ] == [2, 4]
    # training that goes on keeps the lengths
    child = execute(
        tmp_path / 'b', model_artifact=str(tmp_path / 'a'), model_options={}, epochs=1,
        callbacks=[EVALUATION], **PLAIN,
    )  # fmt: skip
    assert load_artifact(tmp_path / 'b').spec.matryoshka_dims == (2, 4)
    assert list(child.evaluations[0][1]) == [f'mobilenet_v3_small_{name}' for name in names]


def test_matryoshka_dims_change_what_is_learned(plain, tmp_path):
    observer = execute(tmp_path / 'a', output_dim=8, matryoshka_dims=[2], **PLAIN)
    assert losses(observer) != pytest.approx(losses(plain[1]), rel=1e-3)


@pytest.mark.parametrize('loss', ['ArcFaceLoss', 'CrossBatchMemory'])
def test_matryoshka_dims_with_losses_of_a_dimension(tmp_path, loss):
    options = {'loss': 'ContrastiveLoss', 'memory_size': 24} if loss != 'ArcFaceLoss' else {}
    parameters = {'loss': loss, 'loss_options': options, 'output_dim': 8, **PLAIN}
    validate(matryoshka_dims=[2, 4], **parameters)
    observer = execute(tmp_path / 'a', matryoshka_dims=[2, 4], **parameters)
    assert np.isfinite(losses(observer)).all()


def test_whitening_is_ordered_for_matryoshka_dims(tmp_path, monkeypatch):
    seen, fit = [], Whitening.fit

    def noting(self, *arguments):
        seen.append(self.ordered)
        fit(self, *arguments)

    monkeypatch.setattr(Whitening, 'fit', noting)
    execute(tmp_path / 'a', whiten=True, matryoshka_dims=[16], epochs=1, **PLAIN)
    execute(tmp_path / 'b', whiten=True, epochs=1, **PLAIN)
    assert seen == [True, True, False, False]
    load_engine(tmp_path / 'a', is_onnx=False, device='cpu')


def test_hard_negatives(tmp_path, caplog, monkeypatch):
    told, tell = [], NeighbourClassSampler.set_neighbours

    def noting(self, classes, neighbours):
        told.append((classes.tolist(), neighbours.shape))
        tell(self, classes, neighbours)

    monkeypatch.setattr(NeighbourClassSampler, 'set_neighbours', noting)
    with caplog.at_level(logging.INFO, logger='finetuner'):
        first = execute(tmp_path / 'a', hard_negatives=True, **PLAIN)
    # 6 classes, looked at before each of 2 epochs
    assert told == [([0, 1, 2, 3, 4, 5], (6, 5))] * 2
    assert 'nearest classes found among 6, from 24 of 24 Documents' in caplog.text
    assert ', hard negatives' in caplog.text
    again = execute(tmp_path / 'b', hard_negatives=True, **PLAIN)
    assert losses(again) == losses(first)
    assert losses(execute(tmp_path / 'c', **PLAIN)) != losses(first)


def test_ema_decay(plain, tmp_path):
    callbacks = [EVALUATION]
    observer = execute(tmp_path / 'a', output_dim=8, ema_decay=0.8, callbacks=callbacks, **PLAIN)
    # training goes on as without
    assert losses(observer) == losses(plain[1])
    averaged, last = weights_of(tmp_path / 'a'), weights_of(plain[0])
    assert not torch.equal(averaged['projection_head.weight'], last['projection_head.weight'])
    # what was evaluated is what is kept
    assert observer.evaluations[1][1] == {
        f'mobilenet_v3_small_{name}': value
        for name, value in observer.epochs[-1][1].items()
        if name in METRICS
    }


def test_precision(plain, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='finetuner'):
        observer = execute(tmp_path / 'a', output_dim=8, precision='bf16', freeze_batch_norm=True)
    assert 'Precision bf16: as asked for' in caplog.text
    assert losses(observer) != losses(plain[1])
    assert losses(observer) == pytest.approx(losses(plain[1]), rel=0.2)
    assert {t.dtype for t in weights_of(tmp_path / 'a').values() if t.is_floating_point()} == {
        torch.float32
    }


@pytest.mark.parametrize('units', [None, 'AMX'])
def test_precision_auto_says_what_it_takes(plain, tmp_path, caplog, monkeypatch, units):
    monkeypatch.setattr(step_module, 'find_bf16_units', lambda device: units)
    with caplog.at_level(logging.INFO, logger='finetuner'):
        observer = execute(tmp_path / 'a', output_dim=8, freeze_batch_norm=True)
    reason = '4 batches are too few to try' if units else 'this CPU has no bfloat16 units'
    assert f'Precision fp32: {reason}' in caplog.text
    assert losses(observer) == losses(plain[1])


def test_compile_model(plain, tmp_path, monkeypatch, caplog):
    compiled, real = [], torch.compile

    def eager(model, backend):
        compiled.append(backend)
        return real(model, backend='eager')

    monkeypatch.setattr(torch, 'compile', eager)
    with caplog.at_level(logging.INFO, logger='finetuner'):
        observer = execute(
            tmp_path / 'a', output_dim=8, compile_model=True, callbacks=[EVALUATION], **PLAIN
        )
    assert compiled == ['inductor']
    assert 'Model compiled' in caplog.text
    assert losses(observer) == pytest.approx(losses(plain[1]), rel=1e-4)
    assert set(weights_of(tmp_path / 'a')) == set(weights_of(plain[0]))
    assert b'_orig_mod' not in (tmp_path / 'a' / 'model.safetensors').read_bytes()


def scored_pairs():
    docs = DocumentArray()
    for position, blob in enumerate(make_picture_docs()[:, 'blob']):
        docs.append(Document(tags={'finetuner_score': position / 24}))
        docs[-1].chunks = [Document(blob=blob), Document(blob=blob)]
    return docs


@pytest.mark.parametrize(
    ('parameters', 'message'),
    [
        ({'micro_batch_size': 4}, 'batch normalisation of mobilenet_v3_small.*freeze_batch_norm'),
        ({'micro_batch_size': 4, 'optimizer': 'LBFGS', **PLAIN}, 'LBFGS computes the loss several'),
        ({'matryoshka_dims': [576]}, 'embeddings of length 576 cannot be cut to 576'),
        ({'matryoshka_dims': [4, 8], 'output_dim': 8}, 'cannot be cut to 8: name lengths from 1'),
        ({'matryoshka_dims': [4, 4]}, 'names a length twice'),
        (
            {'matryoshka_dims': [4], 'loss': 'ArcFaceLoss', 'optimizer': 'LBFGS'},
            'name another loss_optimizer',
        ),
        (
            {
                'matryoshka_dims': [4],
                'callbacks': [
                    EVALUATION,
                    {'name': 'EarlyStopping', 'options': {'monitor': 'recall_at_k_dim_5'}},
                ],
            },
            'recall_at_k_dim_5.*which nothing measures',
        ),
        ({'hard_negatives': True, 'sampler': 'random'}, "sampler='random' leaves that to chance"),
        ({'precision': 'fp16'}, "'fp16' needs a GPU.*'bf16', 'fp32'"),
    ],
)
def test_what_cannot_work_is_refused(parameters, message):
    data = {'callbacks.0.query_data': make_picture_docs(seed=1)}
    with pytest.raises(ConfigError, match=message):
        validate(data=data, **parameters)


def test_hard_negatives_need_classes():
    with pytest.raises(ConfigError, match='data of kind scored_pair has no classes'):
        validate(scored_pairs(), hard_negatives=True, loss='CosineSimilarityLoss')


def test_what_can_work_is_let_through():
    validate(micro_batch_size=12)
    validate(micro_batch_size=4, **PLAIN)
    validate(hard_negatives=True, ema_decay=0.9, precision='bf16', compile_model=True)
