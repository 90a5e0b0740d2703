"""What a step costs: against figures counted by hand, and with the model left as it was."""

import copy

import pytest
import torch

from finetuner.training import step_cost
from finetuner.training.step_cost import StepCost, items_in_memory, measure_step, try_batch

PLAIN = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))


def test_what_is_kept_is_counted():
    # what the first layer takes, what the second takes (the ReLU keeps the same), and the embedding
    cost = measure_step(PLAIN, torch.randn(8, 6), True)
    assert cost.item_bytes == (6 + 16 + 5) * 4
    assert cost.item_seconds > 0
    assert measure_step(PLAIN, torch.randn(3, 6), True).item_bytes == (6 + 16 + 5) * 4


def test_what_is_frozen_keeps_nothing():
    model = copy.deepcopy(PLAIN)
    model[0].requires_grad_(False)
    assert measure_step(model, torch.randn(8, 6), True).item_bytes == (16 + 5) * 4


class _Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = copy.deepcopy(PLAIN)

    def forward(self, inputs):
        return self.layers(inputs['x']) * inputs['mask'][:, :1]


def test_inputs_by_name():
    inputs = {'x': torch.randn(8, 6), 'mask': torch.ones(8, 6)}
    assert measure_step(_Named(), inputs, True).item_bytes >= (6 + 16 + 5) * 4


@pytest.mark.parametrize('freeze_batch_norm', [True, False])
def test_the_model_is_left_as_it_was(tiny_network, freeze_batch_norm):
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), *tiny_network)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    inputs = torch.randn(8, 6)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    measure_step(model, inputs, freeze_batch_norm)
    try_batch(model, inputs, 20, freeze_batch_norm)
    assert torch.equal(torch.rand(2), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


class _Small(torch.nn.Module):
    """A network for which memory ends at so many items."""

    def __init__(self, most):
        super().__init__()
        self.layers, self.most, self.tried = copy.deepcopy(PLAIN), most, []

    def forward(self, inputs):
        self.tried.append(len(inputs))
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return self.layers(inputs)


@pytest.mark.parametrize(
    ('most', 'fitting', 'tried'),
    [(200, 100, [100]), (99, 50, [100, 50]), (7, 6, [100, 50, 25, 12, 6]), (1, 1, None)],
)
def test_batches_are_halved_until_one_fits(most, fitting, tried):
    model = _Small(most)
    found, cost = try_batch(model, torch.randn(4, 6), 100, True)
    assert found == fitting
    assert cost.item_seconds > 0
    if tried:
        assert list(dict.fromkeys(model.tried)) == tried


def test_no_batch_may_fit():
    assert try_batch(_Small(0), torch.randn(4, 6), 8, True) == (1, StepCost(0.0))


def test_other_failures_are_not_hidden():
    with pytest.raises(RuntimeError, match='mat1 and mat2'):
        try_batch(PLAIN, torch.randn(4, 7), 8, True)


def test_items_in_memory(monkeypatch):
    weights = sum(p.numel() for p in PLAIN.parameters()) * 4
    monkeypatch.setattr(step_cost, 'available_memory', lambda: (100_000 + 4 * weights) / 0.8)
    assert items_in_memory(PLAIN, 1000) in (99, 100)
    monkeypatch.setattr(step_cost, 'available_memory', lambda: 0)
    assert items_in_memory(PLAIN, 1000) == 1
