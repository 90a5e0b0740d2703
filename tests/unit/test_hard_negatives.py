"""Hard negatives: the nearest classes are found in the model's own embeddings, epoch by epoch."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from finetuner.data.datasets import ClassDataset
from finetuner.data.neighbour_sampler import NeighbourClassSampler
from finetuner.data.samplers import SequentialSampler
from finetuner.training import hard_negatives
from finetuner.training.hard_negatives import HardNegatives, nearest_classes
from finetuner.training.losses import build_loss
from finetuner.training.optimization import build_optimizer
from finetuner.training.setup import Pipeline
from finetuner.training.trainer import Trainer, TrainerState
from tests.conftest import make_vector_docs

NUM_CLASSES, ITEMS, DIMENSION = 12, 6, 6


def test_the_nearest_classes_are_those_of_the_mean_embeddings():
    random = np.random.default_rng(0)
    labels = random.integers(0, 9, 100) * 3
    embeddings = random.normal(size=(100, 5)) * random.uniform(0.1, 9, (100, 1))
    classes, neighbours = nearest_classes(embeddings, labels, 4)
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    means = {label: units[labels == label].mean(axis=0) for label in set(labels.tolist())}
    assert classes.tolist() == sorted(means)

    def cosine(one, other):
        lengths = np.linalg.norm(means[one]) * np.linalg.norm(means[other])
        return means[one] @ means[other] / lengths

    for label, found in zip(classes.tolist(), neighbours.tolist(), strict=True):
        others = sorted(set(means) - {label}, key=functools.partial(cosine, label), reverse=True)
        assert found == others[:4]


@pytest.mark.parametrize('labels', [[3, 3, 3], [1, 2, 2]])
def test_there_may_be_nobody_near(labels):
    classes, neighbours = nearest_classes(np.eye(3), np.array(labels), 5)
    assert neighbours.shape == (len(classes), len(classes) - 1)


def dataset_of():
    return ClassDataset(make_vector_docs(NUM_CLASSES, ITEMS, DIMENSION))


def build(dataset, seed=0, batch_size=8, preprocess_fn=None):
    sampler = NeighbourClassSampler(dataset.labels, batch_size, 2, seed)
    pipeline, opened = Pipeline(preprocess_fn, seed=seed), []

    def build_loader(part):
        opened.append([part.document(i).id for i in range(len(part))])
        return pipeline.loader(part, SequentialSampler(len(part), 16), on_broken='skip')

    return HardNegatives(sampler, dataset, build_loader, seed), sampler, pipeline, opened


def trainer_of(model, callbacks):
    optimizers = [build_optimizer('SGD', model.parameters(), 0.5)]
    loss = build_loss('TripletMarginLoss', None, DIMENSION, NUM_CLASSES)
    return Trainer(model, loss, optimizers, callbacks=callbacks)


def test_each_epoch_looks_anew_at_what_the_model_gives():
    dataset = dataset_of()
    callback, sampler, pipeline, opened = build(dataset)
    told = []
    sampler.set_neighbours = lambda *given: told.append(given)
    torch.manual_seed(0)
    model = torch.nn.Linear(DIMENSION, DIMENSION)
    before = torch.nn.Linear(DIMENSION, DIMENSION)
    before.load_state_dict(model.state_dict())
    trainer_of(model, [callback]).fit(pipeline.loader(dataset, sampler), 3)
    assert len(told) == len(opened) == 3
    assert all(ids == [dataset.document(i).id for i in range(len(dataset))] for ids in opened)
    contents = torch.from_numpy(np.stack([content for content, _ in dataset]))
    expected = nearest_classes(
        before(contents).detach().numpy(), np.asarray(dataset.labels), sampler.num_neighbours
    )
    for found, wanted in zip(told[0], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert not np.array_equal(told[0][1], told[2][1])


def test_of_much_data_some_is_looked_at_and_labels_stay_right(monkeypatch, caplog):
    monkeypatch.setattr(hard_negatives, 'MAX_ITEMS', 20)
    monkeypatch.setattr(hard_negatives, '_MAX_ITEMS_PER_CLASS', 4)
    dataset = dataset_of()
    callback, sampler, pipeline, opened = build(dataset)
    told = []
    sampler.set_neighbours = lambda *given: told.append(given)
    model = torch.nn.Linear(DIMENSION, DIMENSION)
    with caplog.at_level('INFO', logger='finetuner'):
        trainer_of(model, [callback]).fit(pipeline.loader(dataset, sampler), 2)
    assert [len(ids) for ids in opened] == [20, 20]
    assert opened[0] != opened[1]
    for (classes, neighbours), ids in zip(told, opened, strict=True):
        # make_vector_docs numbers ids by class
        looked_at = sorted({int(doc_id.split('-')[1]) for doc_id in ids})
        assert classes.tolist() == looked_at
        assert set(neighbours.ravel().tolist()) <= set(looked_at)
    assert f'among 5, from 20 of {NUM_CLASSES * ITEMS} Documents' in caplog.text
    again, _, _, same = build(dataset)
    trainer_of(torch.nn.Linear(DIMENSION, DIMENSION), [again]).fit(
        pipeline.loader(dataset, sampler), 2
    )
    assert same == opened


def test_documents_that_cannot_be_loaded_do_not_shift_the_others():
    def read(doc):
        if doc.id.endswith('-0-1') or '-3-' in doc.id:
            raise OSError('damaged')
        return doc.tensor

    dataset = dataset_of()
    callback, sampler, _, _ = build(dataset, preprocess_fn=read)
    told = []
    sampler.set_neighbours = lambda *given: told.append(given)
    model = torch.nn.Linear(DIMENSION, DIMENSION)
    trainer = trainer_of(model, [])
    trainer.state = TrainerState(epoch=0)
    callback.on_epoch_begin(trainer)
    labels = np.asarray(dataset.labels)
    usable = (labels != 3) & (np.arange(len(labels)) != 1)
    contents = torch.from_numpy(np.stack([content for content, _ in dataset]))[usable]
    expected = nearest_classes(
        model(contents).detach().numpy(), labels[usable], sampler.num_neighbours
    )
    assert 3 not in expected[0]
    for found, wanted in zip(told[0], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_its_state_goes_on_within_the_epoch():
    dataset = dataset_of()
    callback, sampler, pipeline, _ = build(dataset)
    trainer = trainer_of(torch.nn.Linear(DIMENSION, DIMENSION), [callback])
    trainer.fit(pipeline.loader(dataset, sampler), 2)
    state = callback.state_dict()
    assert state['epoch'] == 1
    assert all(torch.is_tensor(state[name]) for name in ('classes', 'neighbours'))
    fresh, other, _, opened = build(dataset)
    fresh.load_state_dict(state)
    other.epoch = sampler.epoch = 1
    # the weights have changed since the epoch began: it must not look again
    trainer.state = TrainerState(epoch=1)
    fresh.on_epoch_begin(trainer)
    assert not opened
    assert list(other) == list(sampler)
    trainer.state.epoch = 2
    fresh.on_epoch_begin(trainer)
    assert len(opened) == 1


def test_training_draws_the_same_numbers_with_it_and_without():
    dataset = dataset_of()

    def draws(with_it):
        callback, sampler, pipeline, _ = build(dataset)
        seen = []

        class Noticing(torch.nn.Linear):
            def forward(self, inputs):
                if self.training:
                    seen.append(torch.rand(2))
                return super().forward(inputs)

        torch.manual_seed(4)
        model = Noticing(DIMENSION, DIMENSION)
        trainer_of(model, [callback] if with_it else []).fit(pipeline.loader(dataset, sampler), 2)
        return torch.cat(seen)

    assert torch.equal(draws(True), draws(False))
