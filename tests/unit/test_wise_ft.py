"""WiSE-FT: the weights at the end lie where they should between the first and the trained ones."""

import copy

import numpy as np
import pytest
import torch

import finetuner
from finetuner.artifact import load_artifact
from finetuner.callback import BestModelCheckpoint, WiSEFTCallback
from finetuner.excepts import ConfigError
from finetuner.models.whitening import Whitening
from finetuner.training.callback_building import build_callbacks
from finetuner.training.setup import Pipeline
from finetuner.training.trainer import BaseCallback, Trainer
from finetuner.training.whitening import WhiteningFit
from finetuner.training.wise_ft import WeightInterpolation
from tests.conftest import make_picture_docs, make_vector_docs
from tests.unit.test_runner import EVALUATION, execute


class Trail(BaseCallback):
    """Remembers the weights after each epoch."""

    def __init__(self):
        self.weights = []

    def on_epoch_end(self, trainer):
        self.weights.append(copy.deepcopy(trainer.model.state_dict()))


def between(first, last, alpha):
    return {
        name: (1 - alpha) * first[name] + alpha * last[name]
        if first[name].is_floating_point()
        else last[name]
        for name in first
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def fit(model, *callbacks, epochs=3):
    docs = make_vector_docs()
    return finetuner.fit(
        model, docs, make_vector_docs(seed=2), epochs=epochs, batch_size=16, num_items_per_class=4,
        learning_rate=0.05, callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize('alpha', [0, 0.3, 0.8, 1])
def test_weights_and_running_statistics_are_mixed(tiny_network, alpha):
    first, trail = copy.deepcopy(tiny_network.state_dict()), Trail()
    fit(tiny_network, WiSEFTCallback(alpha), trail)
    last, found = trail.weights[-1], tiny_network.state_dict()
    assert_same(found, between(first, last, alpha))
    assert not torch.equal(first['1.running_mean'], last['1.running_mean'])
    assert found['1.num_batches_tracked'] == last['1.num_batches_tracked'] == 6
    if alpha in (0, 1):
        exactly = (first, last)[alpha]
        assert all(torch.equal(found[n], exactly[n]) for n in found if 'batches' not in n)


@pytest.mark.parametrize('wise_ft_first', [False, True])
def test_the_best_weights_are_mixed_wherever_it_is_named(tiny_network, wise_ft_first):
    first, trail = copy.deepcopy(tiny_network.state_dict()), Trail()
    # the loss falls: by `max` the first epoch is the best
    both = [BestModelCheckpoint('train_loss', 'max'), WiSEFTCallback(0.5)]
    fit(tiny_network, *(reversed(both) if wise_ft_first else both), trail)
    assert_same(tiny_network.state_dict(), between(first, trail.weights[0], 0.5))


def test_tied_weights_are_mixed_once():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))
    model[2].weight = model[0].weight
    first, trail = copy.deepcopy(model.state_dict()), Trail()
    fit(model, trail, WiSEFTCallback(0.25))
    assert_same(model.state_dict(), between(first, trail.weights[-1], 0.25))
    assert model[2].weight is model[0].weight


def test_whitening_is_fitted_to_the_mixed_weights():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), Whitening(4))
    docs = make_vector_docs()
    inputs = torch.from_numpy(np.stack([doc.tensor for doc in docs]))
    groups = np.array([doc.tags['finetuner_label'] for doc in docs], dtype=int)
    loader = [(inputs, torch.from_numpy(groups))]
    callbacks = [WeightInterpolation(0.5), WhiteningFit(model[1], loader, loader, groups)]
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.5)
    loss = torch.nn.CrossEntropyLoss()
    first, trail = copy.deepcopy(model[0].state_dict()), Trail()
    trainer = Trainer(model, loss, [optimizer], callbacks=[trail, *callbacks])
    trainer.fit(loader, 3)
    last = {name: trail.weights[-1][f'0.{name}'] for name in first}
    assert_same(model[0].state_dict(), between(first, last, 0.5))
    expected = Whitening(4)
    with torch.no_grad():
        expected.fit(model[0](inputs), groups)
    assert_same(model[1].state_dict(), expected.state_dict())
    assert trainer.state.weights_revision == 2


def test_the_first_weights_survive_an_interruption(tiny_network):
    first = copy.deepcopy(tiny_network.state_dict())
    interrupted, again = WeightInterpolation(0), WeightInterpolation(0)
    trainer = Trainer(
        tiny_network, torch.nn.Identity(), [torch.optim.SGD(tiny_network.parameters())]
    )
    interrupted.on_fit_begin(trainer)
    for parameter in tiny_network.parameters():
        parameter.data += 1
    again.load_state_dict(interrupted.state_dict())
    again.on_fit_begin(trainer)
    again.on_train_end(trainer)
    assert_same(tiny_network.state_dict(), first)


def test_in_a_run_the_mixed_weights_are_measured_and_kept(tmp_path):
    """By name, as requests give it; with alpha 0 nothing is left of the training."""
    wise_ft = {'name': 'WiSEFTCallback', 'options': {'alpha': 0.0}}
    given = {'output_dim': 8, 'epochs': 1}
    observer = execute(tmp_path / 'a', callbacks=[wise_ft, EVALUATION], **given)
    (_, before), (_, after), (_, p_values) = observer.evaluations
    assert after == before
    assert set(p_values.values()) == {1.0}
    data = {'train': make_picture_docs(seed=5)}
    execute(tmp_path / 'b', data=data, callbacks=[wise_ft], **given)
    models = [load_artifact(tmp_path / name).build_model().state_dict() for name in 'ab']
    assert_same(*models)


@pytest.mark.parametrize('alpha', [-0.1, 1.1, 'half', True, float('nan')])
def test_alpha_is_checked(alpha):
    with pytest.raises(ConfigError, match='alpha'):
        WiSEFTCallback(alpha)


def test_it_is_built():
    (built,) = build_callbacks([WiSEFTCallback()], 'tiny', Pipeline(None), print, print)
    assert isinstance(built, WeightInterpolation)
    assert built._alpha == 0.4
