"""Optimizers and schedules by name: against torch, against hand-computed rates."""

import math

import pytest
import torch

from finetuner.config import OPTIMIZERS, SCHEDULERS
from finetuner.excepts import ConfigError
from finetuner.training.optimization import build_optimizer, build_schedule


def matrix():
    return torch.nn.Parameter(torch.ones(3, 2))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_lowers_a_square(name):
    parameter = matrix()
    optimizer = build_optimizer(name, [parameter], 0.01)
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]['lr'] == 0.01

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert 0 < float(parameter.detach().square().sum()) < 6


def test_options_reach_the_optimizer():
    options = {'momentum': 0.5, 'nesterov': True}
    group = build_optimizer('SGD', [matrix()], 0.1, options).param_groups[0]
    assert (group['momentum'], group['nesterov']) == (0.5, True)
    # JSON has lists where torch has tuples
    betas = build_optimizer('AdamW', [matrix()], 0.1, {'betas': [0.8, 0.9]}).param_groups[0][
        'betas'
    ]
    assert tuple(betas) == (0.8, 0.9)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('Adamm', None, "unknown optimizer 'Adamm': did you mean 'Adam'"),
        ('adam', None, "did you mean 'Adam'"),
        ('Optimizer', None, 'unknown optimizer'),
        ('SGD', {'momentun': 1}, "unknown option of optimizer SGD 'momentun': did you mean 'momen"),
        ('SGD', {'lr': 1}, 'say it as learning_rate'),
        ('SGD', {'momentum': -1}, 'SGD does not accept.*[Mm]omentum'),
        ('SGD', {'momentum': 'x'}, 'SGD does not accept'),
        ('SGD', {'params': []}, 'unknown option'),
    ],
)
def test_wrong_optimizers(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(name, [matrix()], 0.1, options)


def test_nothing_left_to_train():
    with pytest.raises(ConfigError, match='nothing is left to train'):
        build_optimizer('Adam', [], 0.1)


def rates(name, options, num_epochs=2, batches=5, steps=None):
    """The learning rate at each step of a run, from a base rate of 1."""
    optimizer = torch.optim.SGD([matrix()], lr=1.0)
    schedule = build_schedule(name, optimizer, options, num_epochs, batches)
    found = []
    for _ in range(steps or num_epochs * batches):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.scheduler.step()
    return found


def test_linear():
    assert rates('linear', {}) == pytest.approx([1 - step / 10 for step in range(10)])


def test_linear_with_warm_up():
    # two steps up, in thirds, then eight down
    expected = [1 / 3, 2 / 3] + [1 - step / 8 for step in range(8)]
    assert rates('linear', {'num_warmup_steps': 2}) == pytest.approx(expected)
    assert rates('linear', {'num_warmup_steps': 0.2}) == pytest.approx(expected)


def test_cosine():
    expected = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert rates('cosine', {}) == pytest.approx(expected)
    wave = [(1 + math.cos(2 * math.pi * step / 10)) / 2 for step in range(10)]
    assert rates('cosine', {'num_cycles': 1}) == pytest.approx(wave)


def test_cosine_with_restarts():
    once = [(1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert rates('cosine_with_restarts', {'num_cycles': 2}) == pytest.approx(once * 2)


def test_polynomial():
    expected = [(1 - step / 10) ** 2 for step in range(10)]
    assert rates('polynomial', {'power': 2}) == pytest.approx(expected)


def test_constant():
    assert rates('constant', {'num_warmup_steps': 5}) == [1] * 10
    warm = rates('constant_with_warmup', {'num_warmup_steps': 3})
    assert warm == pytest.approx([0.25, 0.5, 0.75] + [1] * 7)


def test_after_its_end_a_schedule_stays_there():
    found = rates('linear', {'num_training_steps': 4}, steps=7)
    assert found == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0, 0])
    assert rates('cosine_with_restarts', {'num_training_steps': 2, 'num_cycles': 2}, steps=4)[
        2:
    ] == pytest.approx([0, 0])


def test_steps_of_epochs():
    optimizer = torch.optim.SGD([matrix()], lr=1.0)
    schedule = build_schedule('linear', optimizer, {'scheduler_step': 'epoch'}, 4, 100)
    assert schedule.step_on == 'epoch'
    optimizer.step()
    schedule.scheduler.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.75)


@pytest.mark.parametrize('name', SCHEDULERS)
@pytest.mark.parametrize('warmup', [0, 0.3, 3, 50])
def test_the_factor_stays_between_0_and_1(name, warmup):
    found = rates(name, {'num_warmup_steps': warmup}, steps=14)
    assert all(0 <= rate <= 1 for rate in found)
    assert found[0] > 0


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('cosin', {}, "unknown scheduler 'cosin': did you mean 'cosine'"),
        ('linear', {'warmup': 3}, "unknown option of the scheduler 'warmup'"),
        ('linear', {'num_warmup_step': 3}, "did you mean 'num_warmup_steps'"),
        ('linear', {'num_warmup_steps': -1}, 'num_warmup_steps'),
        ('linear', {'num_training_steps': 2.5}, 'num_training_steps: 2.5 is not a whole number'),
        ('linear', {'num_training_steps': 0}, 'num_training_steps'),
        ('linear', {'scheduler_step': 'step'}, 'allowed: batch, epoch'),
        ('polynomial', {'power': 0}, 'power'),
        (None, {'power': 2}, 'no scheduler: name one'),
    ],
)
def test_wrong_schedules(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_schedule(name, torch.optim.SGD([matrix()], lr=1.0), options, 2, 5)


def test_no_schedule():
    assert build_schedule(None, torch.optim.SGD([matrix()], lr=1.0), None, 2, 5) is None


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_fused_where_torch_has_it_and_no_one_chose(name):
    group = build_optimizer(name, [matrix()], 0.01).param_groups[0]
    assert bool(group.get('fused')) == (name in ('Adagrad', 'Adam', 'AdamW', 'SGD'))


@pytest.mark.parametrize('options', [{'foreach': True}, {'fused': False}, {'differentiable': True}])
def test_a_chosen_implementation_is_taken(options):
    group = build_optimizer('Adam', [matrix()], 0.01, options).param_groups[0]
    assert not group['fused']
    assert all(group[name] == value for name, value in options.items())


@pytest.mark.parametrize('name', ['Adagrad', 'Adam', 'AdamW', 'SGD'])
def test_fused_steps_are_those_of_the_loop(name):
    torch.manual_seed(0)
    start, gradients = torch.randn(50, 7), torch.randn(4, 50, 7)
    ends = []
    for options in ({}, {}, {'fused': False}):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = build_optimizer(name, [parameter], 0.1, options)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])
