"""Precision: the rule by which it is chosen, what runs in it, and that trying it leaves no trace."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from finetuner.excepts import ConfigError
from finetuner.training import precision as precision_module
from finetuner.training import step as step_module
from finetuner.training.losses import build_loss
from finetuner.training.optimization import build_optimizer
from finetuner.training.precision import (
    LEAST_STEPS_TIMED,
    check_precision,
    choose_precision,
    faster_precision,
    find_bf16_units,
    leaving_no_trace,
)
from finetuner.training.step import StepOptions, TrainingStep
from finetuner.training.trainer import Trainer

MANY, FEW = LEAST_STEPS_TIMED, LEAST_STEPS_TIMED - 1


@pytest.mark.parametrize(
    ('asked', 'device', 'num_steps', 'units', 'chosen', 'reason'),
    [
        ('fp32', 'cuda', MANY, 'bfloat16 units', 'fp32', 'as asked for'),
        ('bf16', 'cpu', FEW, None, 'bf16', 'as asked for'),
        ('fp16', 'cuda', MANY, None, 'fp16', 'as asked for'),
        ('auto', 'cuda', FEW, 'bfloat16 units', 'bf16', 'this GPU has bfloat16 units'),
        ('auto', 'cuda', MANY, None, 'fp32', 'this GPU has no bfloat16 units'),
        ('auto', 'cpu', MANY, None, 'fp32', 'this CPU has no bfloat16 units'),
        ('auto', 'cpu', FEW, 'AMX', 'fp32', '99 batches are too few to try out what is faster'),
        ('auto', 'cpu', MANY, 'AMX', None, 'this CPU has AMX units'),
        ('auto', 'cpu', None, 'AVX512-BF16', None, 'this CPU has AVX512-BF16 units'),
    ],
)
def test_the_rule(asked, device, num_steps, units, chosen, reason):
    choice = choose_precision(asked, device, num_steps, units)
    assert (choice.precision, choice.reason) == (chosen, reason)


@pytest.mark.parametrize(
    ('flags', 'units'),
    [
        ({}, None),
        ({'avx512_bf16': False, 'amx_bf16': False, 'avx512_f': True}, None),
        ({'avx512_bf16': True}, 'AVX512-BF16'),
        ({'avx512_bf16': True, 'amx_bf16': True}, 'AMX'),
    ],
)
def test_units_of_a_cpu(monkeypatch, flags, units):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: flags)
    assert find_bf16_units('cpu') == units


def test_units_of_this_cpu_are_found_by_the_names_torch_has():
    assert set(precision_module._CPU_UNITS) <= set(torch.cpu.get_capabilities()) or (
        torch.cpu.get_capabilities()['architecture'] != 'x86_64'
    )


def test_fp16_needs_a_gpu(monkeypatch):
    with pytest.raises(ConfigError, match=r"'fp16' needs a GPU.*'bf16', 'fp32'"):
        check_precision('fp16', 'cpu')
    check_precision('fp16', 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: False)
    with pytest.raises(ConfigError, match=r"'bf16' needs a newer GPU.*'fp16'"):
        check_precision('bf16', 'cuda')
    check_precision('bf16', 'cpu')


@pytest.mark.parametrize(
    ('seconds', 'chosen', 'num_runs'),
    [
        ({'fp32': 0.02, 'bf16': 0.005}, 'bf16', 8),
        ({'fp32': 0.01, 'bf16': 0.03}, 'fp32', 4),
        ({'fp32': 0.02, 'bf16': 0.019}, 'fp32', None),
    ],
)
def test_the_faster_is_taken_where_it_is_clearly_so(seconds, chosen, num_runs):
    runs = []

    def run(precision):
        runs.append(precision)
        time.sleep(seconds[precision])

    precision, gain = faster_precision(run)
    assert precision == chosen
    assert (gain > 1) == (seconds['fp32'] > seconds['bf16']) or num_runs is None
    assert runs[:4] == ['fp32', 'bf16'] * 2
    assert num_runs is None or len(runs) == num_runs


def test_practice_does_not_count():
    runs = []

    def run(precision):
        runs.append(precision)
        time.sleep(0.1 if len(runs) == 2 else 0.005 if precision == 'bf16' else 0.02)

    assert faster_precision(run)[0] == 'bf16'


def test_no_trace_is_left(tiny_network):
    model = torch.nn.Sequential(tiny_network, torch.nn.Dropout(0.5)).train()
    model(torch.randn(8, 6)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with leaving_no_trace(model):
        model(torch.randn(8, 6)).sum().backward()
        assert not torch.equal(model[0][1].running_mean, before['0.1.running_mean'])
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


class Casting(torch.nn.Module):
    """Notes the precision that its layer computes in."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(6, 5), torch.nn.Dropout(0.2)
        self.dtypes = []

    def forward(self, inputs):
        embeddings = self.linear(self.dropout(inputs))
        self.dtypes.append(embeddings.dtype)
        return embeddings


class Noting(torch.nn.Module):
    """A loss that notes in what it gets embeddings."""

    def __init__(self):
        super().__init__()
        self.loss, self.dtypes = build_loss('NTXentLoss', None, 5, 4), []

    def forward(self, embeddings, labels):
        self.dtypes.append(embeddings.dtype)
        return self.loss(embeddings, labels)


BATCH = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def train(epochs=2, validation=None, **options):
    torch.manual_seed(0)
    model, loss = Casting(), Noting()
    optimizers = [build_optimizer('Adam', model.parameters(), 0.05)]
    trainer = Trainer(model, loss, optimizers, step_options=StepOptions(**options))
    trainer.fit([BATCH], epochs, validation)
    return model, loss, trainer


def test_only_the_model_runs_in_half_precision():
    model, loss, _ = train(precision='bf16', validation=[BATCH])
    assert set(model.dtypes) == {torch.bfloat16}
    assert set(loss.dtypes) == {torch.float32}
    assert model.linear.weight.dtype == torch.float32
    plain, _, _ = train(precision='fp32')
    assert set(plain.dtypes) == {torch.float32}
    assert not torch.equal(plain.linear.weight, model.linear.weight)
    # near each other nevertheless
    torch.testing.assert_close(plain.linear.weight, model.linear.weight, atol=0.05, rtol=0)


def test_parts_of_a_batch_run_in_it_too():
    model, _, _ = train(precision='bf16', micro_batch_size=5)
    assert set(model.dtypes) == {torch.bfloat16}


def test_fp16_scales_its_gradients(monkeypatch):
    # a CPU can do it, slowly; here it stands in for a GPU
    monkeypatch.setattr(step_module, 'check_precision', lambda *_: None)
    model, loss, trainer = train(precision='fp16', epochs=1)
    assert set(model.dtypes) == {torch.float16}
    assert set(loss.dtypes) == {torch.float32}
    before = loss(train(precision='fp32', epochs=0)[0](BATCH[0]), BATCH[1])
    state = trainer._step.state_dict()
    assert state['precision'] == 'fp16'
    # a scale too large for the first gradients is made smaller, and the step left out
    learned, loss, trainer = train(precision='fp16', epochs=30)
    assert 1 < trainer._step.state_dict()['scaler']['scale'] <= state['scaler']['scale']
    assert loss(learned(BATCH[0]), BATCH[1]) < 0.8 * before


@pytest.mark.parametrize('faster', ['fp32', 'bf16'])
def test_trying_out_changes_nothing_but_the_precision(monkeypatch, caplog, faster):
    monkeypatch.setattr(step_module, 'find_bf16_units', lambda device: 'AMX')
    least = 0.0 if faster == 'bf16' else float('inf')
    monkeypatch.setattr(precision_module, '_LEAST_GAIN', least)
    with caplog.at_level('INFO', logger='finetuner'):
        model, loss, trainer = train(precision='auto')
    assert trainer._step.precision == faster
    assert f'Precision {faster}: this CPU has AMX units, and bf16 is ' in caplog.text
    assert len(loss.dtypes) == 2
    asked, _, _ = train(precision=faster)
    assert torch.equal(asked.linear.weight, model.linear.weight)
    assert model.dtypes[-2:] == asked.dtypes
    assert {torch.float32, torch.bfloat16} == set(model.dtypes)


def test_the_log_says_what_was_chosen(monkeypatch, caplog):
    monkeypatch.setattr(step_module, 'find_bf16_units', lambda device: None)
    with caplog.at_level('INFO', logger='finetuner'):
        train(precision='auto')
    assert 'Precision fp32: this CPU has no bfloat16 units' in caplog.text


def test_what_was_chosen_goes_on(monkeypatch):
    monkeypatch.setattr(step_module, 'find_bf16_units', lambda device: 'AMX')
    monkeypatch.setattr(precision_module, '_LEAST_GAIN', 0.0)
    _, _, trainer = train(precision='auto')
    step = TrainingStep(Casting(), Noting(), [], torch.device('cpu'), StepOptions(precision='auto'))
    assert step.precision is None
    step.load_state_dict(trainer._step.state_dict())
    assert step.precision == 'bf16'


def test_lbfgs_does_not_go_with_fp16(monkeypatch):
    monkeypatch.setattr(step_module, 'check_precision', lambda *_: None)
    model = Casting()
    optimizers = [build_optimizer('LBFGS', model.parameters(), 0.05)]
    with pytest.raises(ConfigError, match="LBFGS does not go with precision 'fp16'"):
        Trainer(model, Noting(), optimizers, step_options=StepOptions(precision='fp16'))
