"""Compiling: the same training, plain names in what is kept, and no silent way around it."""

from __future__ import annotations

import pytest
import torch

from finetuner.excepts import TrainingError
from finetuner.training.losses import build_loss
from finetuner.training.optimization import build_optimizer
from finetuner.training.step import StepOptions
from finetuner.training.trainer import Trainer

BATCH = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def counting(seen):
    """A backend that compiles nothing, but counts what it is given."""

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    return backend


def train(backend=None, dropout=0.0, **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 5)
    )
    if backend is not None:
        options |= {'compile_model': True, 'compile_backend': backend}
    optimizers = [build_optimizer('Adam', model.parameters(), 0.05)]
    loss = build_loss('NTXentLoss', None, 5, 4)
    trainer = Trainer(model, loss, optimizers, step_options=StepOptions(**options))
    trainer.fit([BATCH, BATCH], 2, [BATCH])
    return model


@pytest.mark.parametrize('options', [{}, {'micro_batch_size': 5}])
def test_it_trains_as_without_and_keeps_plain_names(options, caplog):
    seen = []
    with caplog.at_level('INFO', logger='finetuner'):
        compiled = train(counting(seen), 0.2, **options).state_dict()
    assert seen
    assert 'Model compiled: the first batch took' in caplog.text
    plain = train(None, 0.2, **options).state_dict()
    assert list(compiled) == list(plain)
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor)


def test_with_a_backward_graph_of_its_own():
    # the front half of the compiler that runs use, which by itself takes its time
    compiled = train('aot_eager').state_dict()
    for name, tensor in train().state_dict().items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_failing_compiler_ends_the_run():
    def backend(graph, inputs):
        raise RuntimeError('no compiler found')

    with pytest.raises(TrainingError, match=r'cannot be compiled here \(.*no compiler found'):
        train(backend)
