"""Embeddings that can be cut: the loss, the metrics and the record of several lengths."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from finetuner.data.loading import build_dataset
from finetuner.evaluation import METRICS, evaluate_embeddings
from finetuner.excepts import ArtifactError, ConfigError
from finetuner.model_spec import ModelSpec, TrainingRecord, model_card
from finetuner.models.whitening import Whitening
from finetuner.significance import change_text
from finetuner.training.callbacks import EvaluationOptions, RetrievalEvaluation, embed_all
from finetuner.training.losses import build_loss, build_miner
from finetuner.training.matryoshka import (
    MatryoshkaObjective,
    build_for_lengths,
    check_lengths,
    metric_name,
)
from finetuner.training.objectives import Objective, ScoredPairObjective
from finetuner.training.optimization import build_optimizer
from finetuner.training.setup import BatchShape, Pipeline
from finetuner.training.trainer import Trainer
from tests.conftest import make_vector_docs
from tests.unit.test_whitening import clouds, fitted, r_precision
from tests.unit.tiny_artifacts import make_spec

DIMENSION, LENGTHS = 8, (2, 4)
EMBEDDINGS = torch.randn(12, DIMENSION, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def built(name, options=None, miner=None):
    def build(length):
        torch.manual_seed(length)
        return Objective(build_loss(name, options, length, 3), build_miner(miner, None))

    return build


@pytest.mark.parametrize(
    ('name', 'miner'),
    [
        ('NTXentLoss', None),
        ('TripletMarginLoss', 'BatchHardMiner'),
        # with weights for each class and dimension
        ('ArcFaceLoss', None),
        ('ProxyAnchorLoss', None),
        ('ManifoldLoss', None),
        ('VICRegLoss', None),
    ],
)
def test_the_loss_is_the_mean_over_the_lengths(name, miner):
    objective = build_for_lengths(built(name, None, miner), LENGTHS, DIMENSION)
    torch.manual_seed(1)
    found = objective(EMBEDDINGS, LABELS)
    torch.manual_seed(1)
    losses = [
        built(name, None, miner)(length)(EMBEDDINGS[:, :length], LABELS)
        for length in (*LENGTHS, DIMENSION)
    ]
    torch.testing.assert_close(found, sum(losses) / 3)


def test_without_lengths_it_is_the_plain_objective():
    objective = build_for_lengths(built('NTXentLoss'), (), DIMENSION)
    assert isinstance(objective, Objective)


def test_scored_pairs():
    scores = torch.linspace(0, 1, 6).repeat_interleave(2)
    loss = build_loss('CosineSimilarityLoss', None, DIMENSION, 1)
    objective = build_for_lengths(lambda _: ScoredPairObjective(loss), (3,), DIMENSION)
    pairs = EMBEDDINGS[0::2], EMBEDDINGS[1::2]
    expected = [
        ((torch.cosine_similarity(*(side[:, :d] for side in pairs)) - scores[::2]) ** 2).mean()
        for d in (3, DIMENSION)
    ]
    torch.testing.assert_close(objective(EMBEDDINGS, scores), sum(expected) / 2)


def test_each_length_learns_and_remembers_for_itself():
    objective = build_for_lengths(built('ArcFaceLoss'), LENGTHS, DIMENSION)
    assert sorted(p.shape[0] for p in objective.parameters()) == [2, 4, 8]
    memory = {'loss': 'ContrastiveLoss', 'memory_size': 24}
    objective = build_for_lengths(built('CrossBatchMemory', memory), LENGTHS, DIMENSION)
    alone = objective(EMBEDDINGS, LABELS)
    objective(EMBEDDINGS.flip(1).requires_grad_(), LABELS)
    assert objective(EMBEDDINGS.clone().requires_grad_(), LABELS) != alone
    widths = [part.loss.embedding_memory.shape[1] for _, part in objective.by_length()]
    assert widths == [2, 4, 8]


@pytest.mark.parametrize(
    ('lengths', 'message'),
    [
        ((2, 8), 'embeddings of length 8 cannot be cut to 8: name lengths from 1 to 7'),
        ((0, 2, 9), 'cannot be cut to 0, 9'),
        ((2, 4, 2), 'names a length twice'),
    ],
)
def test_wrong_lengths(lengths, message):
    with pytest.raises(ConfigError, match=message):
        check_lengths(lengths, DIMENSION)


def test_lengths_are_put_in_order():
    assert check_lengths([4, 1, 7], DIMENSION) == (1, 4, 7)


def trained_on(lengths, evaluation=()):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, DIMENSION)
    )
    dataset = build_dataset(make_vector_docs(6, 8, 6, seed=3))
    loader = Pipeline(None, seed=0).training_loader(dataset, BatchShape(24, 4))
    objective = build_for_lengths(built('NTXentLoss'), lengths, DIMENSION)
    optimizers = [build_optimizer('Adam', model.parameters(), 0.01)]
    Trainer(model, objective, optimizers, callbacks=evaluation).fit(loader, 10)
    return model


def test_cut_embeddings_find_more_when_trained_to():
    random = np.random.default_rng(9)
    docs = make_vector_docs(6, 8, 6, seed=3)
    contents = docs.tensors + 0.3 * random.normal(size=docs.tensors.shape)
    labels = np.array(docs[:, 'tags__finetuner_label'])

    def found_at(model, length):
        return r_precision(model(torch.from_numpy(contents).float())[:, :length].detach(), labels)

    plain, cut = trained_on(()), trained_on((2,))
    assert found_at(cut, 2) > found_at(plain, 2) + 0.2
    assert found_at(cut, DIMENSION) > found_at(plain, DIMENSION) - 0.05


def test_metrics_are_reported_for_each_length(caplog):
    docs = make_vector_docs(seed=1)
    dataset = build_dataset(docs)
    reports = []
    evaluation = RetrievalEvaluation(
        'tiny',
        Pipeline(None).evaluation_set(dataset, 8, 0),
        None,
        EvaluationOptions(limit=3, lengths=LENGTHS),
        lambda stage, metrics: reports.append((stage, metrics)),
        lambda *_: None,
    )
    epochs = []

    class Watch(type(evaluation).__mro__[1]):
        def on_epoch_end(self, trainer):
            epochs.append(set(trainer.state.metrics))

    with caplog.at_level('INFO', logger='finetuner'):
        model = trained_on(LENGTHS, [evaluation, Watch()])
    assert [stage for stage, _ in reports] == ['before', 'after', 'p_value']
    names = [*METRICS, *(f'{name}_dim_{length}' for length in LENGTHS for name in METRICS)]
    # tables show them in this order: the whole first
    assert [list(values) for _, values in reports] == [[f'tiny_{name}' for name in names]] * 3
    assert set(names) <= epochs[0]
    loader = Pipeline(None).evaluation_set(dataset, 8, 0).loader
    embeddings, labels = embed_all(model, loader, 'cpu'), [d.tags['finetuner_label'] for d in docs]
    for length in LENGTHS:
        expected = evaluate_embeddings(
            embeddings[:, :length], labels, embeddings[:, :length], labels, limit=3,
            query_ids=list(docs[:, 'id']), index_ids=list(docs[:, 'id']),
        )  # fmt: skip
        for name, value in expected.items():
            assert reports[1][1][f'tiny_{metric_name(name, length)}'] == pytest.approx(value)
    assert 'after training at 2 dimensions: precision_at_k' in caplog.text
    (change,) = (m for m in caplog.messages if m.startswith('Change over 32 queries at 4 dim'))
    shown = [reports[place][1]['tiny_recall_at_k_dim_4'] for place in range(3)]
    assert f'recall_at_k {change_text(*shown)}' in change
    assert '_dim_' not in change


def test_whitening_can_put_first_what_tells_most():
    values, labels = clouds()
    num = 200
    ordered, plain = Whitening(values.shape[1]), fitted(values[:num], labels[:num])
    ordered.ordered = True
    ordered.fit(values[:num], labels[:num])
    others, of_others = values[num:], labels[num:]
    # two directions tell the classes apart: so do the first two values, and no others
    cut = [module(others)[:, :2] for module in (ordered, plain)]
    assert r_precision(cut[0], of_others) > 1.2 * r_precision(cut[1], of_others)
    assert r_precision(ordered(others)[:, -2:], of_others) < 0.1
    # a rotation changes no distance
    torch.testing.assert_close(
        torch.cdist(ordered(others), ordered(others)),
        torch.cdist(plain(others), plain(others)),
        atol=1e-3,
        rtol=1e-3,
    )
    spread = ordered(values[:num]).var(dim=0)
    assert torch.equal(spread, spread.sort(descending=True).values)
    assert spread[:2].min() > 2 * spread[2:].max()


def test_an_artifact_says_its_lengths():
    spec = dataclasses.replace(make_spec(), matryoshka_dims=LENGTHS)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert 'The first 2, 4 values of an embedding are' in model_card(spec, TrainingRecord())
    older = make_spec().to_json()
    del older['matryoshka_dims']
    assert ModelSpec.from_json(older).matryoshka_dims == ()
    assert 'The first' not in model_card(make_spec(), TrainingRecord())
    with pytest.raises(ArtifactError, match='matryoshka_dims are out of range'):
        ModelSpec.from_json({**spec.to_json(), 'matryoshka_dims': [16]})


def test_lengths_stand_in_order():
    objective = MatryoshkaObjective({4: built('NTXentLoss')(4), 2: built('NTXentLoss')(2)})
    assert [length for length, _ in objective.by_length()] == [2, 4]
