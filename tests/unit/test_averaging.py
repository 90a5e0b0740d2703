"""Averaged weights: the average is right, whoever looks sees it, and training does not."""

from __future__ import annotations

import copy

import pytest
import torch

from finetuner.data.loading import build_dataset
from finetuner.training.averaging import WeightAveraging
from finetuner.training.callbacks import BestWeights
from finetuner.training.losses import build_loss
from finetuner.training.optimization import build_optimizer
from finetuner.training.setup import BatchShape, Pipeline
from finetuner.training.trainer import BaseCallback, Trainer
from tests.conftest import make_vector_docs

DECAY = 0.7


class Recorder(BaseCallback):
    """Keeps the weights it sees at each event."""

    def __init__(self):
        self.seen = {}

    def _keep(self, event, trainer):
        self.seen.setdefault(event, []).append(copy.deepcopy(trainer.model.state_dict()))

    def on_epoch_begin(self, trainer):
        self._keep('epoch_begin', trainer)

    def on_train_batch_end(self, trainer):
        self._keep('batch', trainer)

    def on_val_end(self, trainer):
        self._keep('val', trainer)

    def on_epoch_end(self, trainer):
        self._keep('epoch_end', trainer)


def loader_of(num_batches=2):
    docs = make_vector_docs(items_per_class=4 * num_batches)
    return Pipeline(None).training_loader(build_dataset(docs), BatchShape(16, 4))


def train(model, callbacks, epochs=3, loader=None, validation=None):
    optimizer = build_optimizer('Adam', [p for p in model.parameters() if p.requires_grad], 0.02)
    trainer = Trainer(
        model, build_loss('TripletMarginLoss', None, 5, 4), [optimizer], callbacks=callbacks
    )
    trainer.fit(loader or loader_of(), epochs, validation)
    return trainer


def same(state, other):
    return all(torch.equal(state[name], tensor) for name, tensor in other.items())


def average_of(states, decay=DECAY):
    """By hand: buffers are the last ones."""
    average = {name: tensor.clone() for name, tensor in states[0].items()}
    for state in states[1:]:
        for name, tensor in state.items():
            if 'running' in name or 'num_batches' in name:
                average[name] = tensor
            else:
                average[name] = decay * average[name] + (1 - decay) * tensor
    return average


def assert_close(state, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, msg=name)


@pytest.mark.parametrize('validates', [True, False])
def test_epochs_end_with_the_average_and_training_goes_on_without(tiny_network, validates):
    plain, averaged = copy.deepcopy(tiny_network), tiny_network
    by_hand, seen = Recorder(), Recorder()
    train(plain, [by_hand])
    validation = list(loader_of()) if validates else None
    train(averaged, [WeightAveraging(DECAY), seen], validation=validation)
    steps = by_hand.seen['batch']
    assert len(steps) == 6
    for epoch in range(3):
        expected = average_of(steps[: 2 * epoch + 2])
        assert_close(seen.seen['epoch_end'][epoch], expected)
        if validates:
            assert_close(seen.seen['val'][epoch], expected)
        # within the epoch, and where the next one begins, it is as without averaging
        assert same(seen.seen['batch'][2 * epoch], steps[2 * epoch])
        assert same(seen.seen['epoch_begin'][epoch], by_hand.seen['epoch_begin'][epoch])
    assert_close(averaged.state_dict(), average_of(steps))


def test_an_epoch_may_have_fewer_batches_than_it_says(tiny_network):
    class Short:
        def __len__(self):
            return 9

        def __iter__(self):
            return iter(batches)

    batches = list(loader_of())
    plain, averaged, by_hand = copy.deepcopy(tiny_network), tiny_network, Recorder()
    train(plain, [by_hand], loader=Short())
    train(averaged, [WeightAveraging(DECAY)], loader=Short())
    assert_close(averaged.state_dict(), average_of(by_hand.seen['batch']))


def test_the_best_weights_are_averages(tiny_network):
    class Scripted(BaseCallback):
        def on_epoch_end(self, trainer):
            trainer.state.metrics['recall_at_k'] = [0.1, 0.3, 0.2][trainer.state.epoch]

    seen = Recorder()
    best = BestWeights('recall_at_k', 'max')
    train(tiny_network, [WeightAveraging(DECAY), seen, Scripted(), best])
    assert same(tiny_network.state_dict(), seen.seen['epoch_end'][1])


def test_frozen_weights_are_left_alone(tiny_network):
    tiny_network[0].requires_grad_(False)
    before = tiny_network[0].weight.clone()
    callback = WeightAveraging(DECAY)
    train(tiny_network, [callback])
    assert torch.equal(before, tiny_network[0].weight)
    assert not [name for name in callback.state_dict()['average'] if name.startswith('0.')]


def test_its_state_goes_on_where_it_was(tiny_network):
    whole, recorder = copy.deepcopy(tiny_network), Recorder()
    train(whole, [WeightAveraging(DECAY), recorder], epochs=2)

    halves, first = tiny_network, WeightAveraging(DECAY)
    train(halves, [first], epochs=1)
    state = first.state_dict()
    # what is kept is not what goes on changing
    kept = copy.deepcopy(state)
    second = WeightAveraging(DECAY)
    second.load_state_dict(state)

    class NewOptimizer(BaseCallback):
        """Checks what the next epoch begins with."""

        def on_epoch_begin(self, trainer):
            expected = recorder.seen['epoch_begin'][1]
            assert same(trainer.model.state_dict(), expected)

    train(halves, [second, NewOptimizer()], epochs=1)
    for part in ('average', 'trained'):
        assert same(state[part], kept[part])
