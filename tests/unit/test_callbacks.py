"""Callbacks at work: evaluation before and after, best weights kept, training ended in time."""

import copy
import math

import numpy as np
import pytest
import torch

from finetuner.data.loading import build_dataset
from finetuner.evaluation import METRICS, evaluate_embeddings
from finetuner.training.callbacks import (
    BestWeights,
    EvaluationOptions,
    RetrievalEvaluation,
    Stopping,
    embed_all,
)
from finetuner.training.losses import build_loss
from finetuner.training.optimization import build_optimizer
from finetuner.training.setup import BatchShape, Pipeline
from finetuner.training.trainer import BaseCallback, Trainer
from tests.conftest import make_vector_docs


class Scripted(BaseCallback):
    """Sets a metric to given values, epoch by epoch, and remembers each epoch's weights."""

    def __init__(self, name, values):
        self.name, self.values, self.weights = name, values, []

    def on_epoch_end(self, trainer):
        trainer.state.metrics[self.name] = self.values[trainer.state.epoch]
        self.weights.append(copy.deepcopy(trainer.model.state_dict()))


def train(model, callbacks, epochs=5, freeze_batch_norm=False):
    loader = Pipeline(None).training_loader(build_dataset(make_vector_docs()), BatchShape(16, 4))
    trainer = Trainer(
        model,
        build_loss('TripletMarginLoss', None, 5, 4),
        [build_optimizer('Adam', model.parameters(), 0.02)],
        callbacks=callbacks,
        freeze_batch_norm=freeze_batch_norm,
    )
    return trainer.fit(loader, epochs)


def same_weights(model, state):
    return all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ('monitor', 'mode', 'values', 'best'),
    [
        ('val_loss', 'auto', [3, 1, 2, 1, 4], 1),
        ('recall_at_k', 'auto', [0.1, 0.3, 0.2, 0.3, 0.1], 1),
        ('recall_at_k', 'min', [0.3, 0.1, 0.2, 0.05, 0.1], 3),
        ('val_loss', 'max', [3, 1, 2, 1, 4], 4),
        ('val_loss', 'auto', [math.nan, 3, math.nan, 4, math.nan], 1),
    ],
)
def test_the_best_weights_come_back(tiny_network, monitor, mode, values, best):
    script = Scripted(monitor, values)
    state = train(tiny_network, [script, BestWeights(monitor, mode)])
    assert state.weights_epoch == best
    assert same_weights(tiny_network, script.weights[best])
    others = [epoch for epoch in range(5) if epoch != best]
    assert not any(same_weights(tiny_network, script.weights[epoch]) for epoch in others)


@pytest.mark.parametrize(
    ('values', 'options', 'epochs'),
    [
        ([5, 4, 3, 2, 1, 0], {}, 6),
        ([5, 4, 4, 4, 1, 0], {}, 4),
        ([5, 6, 4, 5, 3, 4], {}, 6),
        ([5, 4, 4, 4, 4, 4], {'patience': 3}, 5),
        ([5, 4.5, 4.1, 3, 2, 1], {'min_delta': 1.0}, 3),
        ([5, 4, 3, 2, 1, 0], {'baseline': 2.5}, 2),
        ([2, 3, 1, 1.5, 1.2, 0], {'baseline': 2.5}, 5),
        ([math.nan] * 6, {}, 2),
    ],
)
def test_training_ends_after_epochs_without_improvement(tiny_network, values, options, epochs):
    arguments = {'patience': 2, 'min_delta': 0, 'baseline': None, **options}
    script = Scripted('val_loss', values)
    state = train(tiny_network, [script, Stopping('val_loss', 'auto', **arguments)], 6)
    assert len(script.weights) == epochs
    assert state.epoch == epochs - 1


def evaluation_of(queries, index, reports, examples=None, **options):
    pipeline = Pipeline(None)
    return RetrievalEvaluation(
        'tiny',
        pipeline.evaluation_set(build_dataset(queries), 8, 0),
        None if index is None else pipeline.evaluation_set(build_dataset(index), 8, 0),
        EvaluationOptions(limit=3, **options),
        lambda stage, metrics: reports.append((stage, metrics)),
        lambda stage, results: (examples if examples is not None else {}).update({stage: results}),
    )


def test_before_and_after_are_measured_with_those_weights(tiny_network):
    docs = make_vector_docs()
    queries, index = docs[::4], docs[1::4]
    untrained = copy.deepcopy(tiny_network)
    reports = []
    train(tiny_network, [evaluation_of(queries, index, reports)], 3)
    assert [stage for stage, _ in reports] == ['before', 'after', 'p_value']

    def expected(model):
        vectors = [
            embed_all(model, Pipeline(None).evaluation_set(build_dataset(side), 8, 0).loader, 'cpu')
            for side in (queries, index)
        ]
        labels = [[doc.tags['finetuner_label'] for doc in side] for side in (queries, index)]
        return evaluate_embeddings(vectors[0], labels[0], vectors[1], labels[1], limit=3)

    for (_, found), model in zip(reports[:2], (untrained, tiny_network), strict=True):
        for name, value in expected(model).items():
            assert found[f'tiny_{name}'] == pytest.approx(value), name
    assert set(reports[0][1]) == {f'tiny_{name}' for name in METRICS}


class Spoiler(BaseCallback):
    """Ruins the weights at the end of the epochs after the first."""

    def on_epoch_end(self, trainer):
        if trainer.state.epoch > 0:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(0)


def test_after_belongs_to_the_best_weights(tiny_network):
    docs = make_vector_docs()
    reports = []
    measured = evaluation_of(docs[::4], docs[1::4], reports)
    script = Scripted('unused', [0] * 3)
    state = train(
        tiny_network, [Spoiler(), measured, script, BestWeights('average_precision', 'auto')], 3
    )
    assert state.weights_epoch == 0
    assert same_weights(tiny_network, script.weights[0])
    fresh = []
    again = evaluation_of(docs[::4], docs[1::4], fresh)
    trainer = Trainer(
        tiny_network, torch.nn.Identity(), [build_optimizer('SGD', tiny_network.parameters(), 1)]
    )
    again.on_fit_begin(trainer)
    assert reports[1][0] == 'after'
    assert reports[1][1] == pytest.approx(fresh[0][1])


def test_metrics_of_each_epoch_are_there_to_be_monitored(tiny_network):
    docs = make_vector_docs()
    seen = []

    class Look(BaseCallback):
        def on_epoch_end(self, trainer):
            seen.append(dict(trainer.state.metrics))

    train(tiny_network, [evaluation_of(docs[::4], docs[1::4], []), Look()], 2)
    assert len(seen) == 2
    for metrics in seen:
        assert set(METRICS) < set(metrics)
        assert 0 <= metrics['recall_at_k'] <= 1


@pytest.mark.parametrize('exclude', [True, False])
def test_a_query_is_left_out_of_its_own_results(tiny_network, exclude):
    docs = make_vector_docs()
    reports, examples = [], {}
    callback = evaluation_of(docs, None, reports, examples, exclude_self=exclude, num_examples=4)
    train(tiny_network, [callback], 1)
    assert set(examples) == {'before', 'after'}
    assert len(examples['after']) == 4
    for query, results in examples['after'].items():
        assert len(results) == 3
        assert (results[0] == query) != exclude
        assert (query in results) != exclude
    # and out of the metrics: by hand, from all similarities
    vectors = embed_all(
        tiny_network, Pipeline(None).evaluation_set(build_dataset(docs), 8, 0).loader, 'cpu'
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    if exclude:
        np.fill_diagonal(similarity, -2)
    labels = np.array([doc.tags['finetuner_label'] for doc in docs])
    nearest = np.argsort(-similarity, axis=1)[:, :3]
    precision = np.mean(labels[nearest] == labels[:, None])
    assert reports[1][1]['tiny_precision_at_k'] == pytest.approx(precision)


@pytest.mark.parametrize('freeze', [True, False])
def test_evaluation_within_an_epoch_leaves_training_as_it_was(tiny_network, freeze):
    docs = make_vector_docs()
    plain = copy.deepcopy(tiny_network)
    train(plain, [], 2, freeze_batch_norm=freeze)
    evaluation = evaluation_of(docs, None, [], steps_per_interval=1)
    train(tiny_network, [evaluation], 2, freeze_batch_norm=freeze)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, tiny_network.state_dict()[name]), name


def test_embeddings_of_example_results_are_the_nearest(tiny_network):
    docs = make_vector_docs()
    examples = {}
    train(tiny_network, [evaluation_of(docs, None, [], examples, num_examples=3)], 1)
    vectors = embed_all(
        tiny_network, Pipeline(None).evaluation_set(build_dataset(docs), 8, 0).loader, 'cpu'
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    names = [f'Document {position} ({doc.id})' for position, doc in enumerate(docs)]
    for query in range(3):
        expected = [names[i] for i in np.argsort(-similarity[query])[:3]]
        assert examples['after'][names[query]] == expected
