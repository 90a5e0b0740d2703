"""What a step does beyond the plain one goes on, too, where a training was interrupted."""

from __future__ import annotations

import pytest
import torch

from finetuner.data.loading import build_dataset
from finetuner.data.neighbour_sampler import NeighbourClassSampler
from finetuner.data.samplers import SequentialSampler
from finetuner.training import precision as precision_module
from finetuner.training import step as step_module
from finetuner.training.averaging import WeightAveraging
from finetuner.training.callbacks import BestWeights
from finetuner.training.checkpointing import SUMMARY, Checkpoints
from finetuner.training.hard_negatives import HardNegatives
from finetuner.training.losses import build_loss
from finetuner.training.matryoshka import build_for_lengths
from finetuner.training.objectives import Objective
from finetuner.training.optimization import build_optimizer
from finetuner.training.setup import Pipeline
from finetuner.training.step import StepOptions
from finetuner.training.trainer import Trainer, seed_everything
from tests.conftest import make_vector_docs
from tests.unit.test_resume import KilledError, Killer, Seen, bits

DIMENSION, EPOCHS = 5, 4


def fit(directory=None, killer=None, options=None):
    """Train with everything at once, in a new trainer: weights, and what was seen."""
    seed_everything(0)
    dataset = build_dataset(make_vector_docs(num_classes=8, items_per_class=4))
    with Pipeline(None, seed=0) as pipeline:
        sampler = NeighbourClassSampler(dataset.labels, 8, 2, 0)
        loader = pipeline.loader(dataset, sampler)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, DIMENSION)
        )
        objective = build_for_lengths(
            lambda length: Objective(build_loss('ProxyNCALoss', None, length, 8)), (2,), DIMENSION
        )
        seen = Seen()
        callbacks = [
            WeightAveraging(0.8),
            HardNegatives(
                sampler,
                dataset,
                lambda part: pipeline.loader(part, SequentialSampler(len(part), 16)),
                0,
            ),
            BestWeights('train_loss', 'max'),
            seen,
            killer or Killer(),
        ]
        trainer = Trainer(
            model,
            objective,
            [
                build_optimizer('Adam', model.parameters(), 0.01),
                build_optimizer('SGD', objective.parameters(), 0.01),
            ],
            callbacks=callbacks,
            step_options=StepOptions(**(options or {'micro_batch_size': 3})),
        )
        # another process's generators stand anywhere
        if directory is not None and (directory / SUMMARY).exists():
            seed_everything(99)
        checkpoints = Checkpoints(directory, 1e-9) if directory is not None else None
        trainer.fit(loader, EPOCHS, None, checkpoints)
    return bits(model), bits(objective), seen.events, trainer


@pytest.mark.parametrize('event', ['on_train_batch_end', 'on_epoch_end', 'on_epoch_begin'])
@pytest.mark.parametrize('steps', [range(1, 17), [4], [8, 9], [15]], ids=str)
def test_it_ends_as_if_nothing_had_happened(tmp_path, steps, event):
    expected = fit()
    killed = 0
    for step in steps:
        try:
            fit(tmp_path, Killer(step, event))
        except KilledError:
            killed += 1
    assert killed or event != 'on_train_batch_end'
    found = fit(tmp_path)
    assert not killed or len(found[2]) < len(expected[2]), 'it did not go on but begin again'
    assert found[:2] == expected[:2]
    assert found[2] == expected[2][len(expected[2]) - len(found[2]) :]


def test_the_precision_that_was_found_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, 'find_bf16_units', lambda device: 'AMX')
    monkeypatch.setattr(precision_module, '_LEAST_GAIN', 0.0)
    with pytest.raises(KilledError):
        fit(tmp_path, Killer(5), {'precision': 'auto'})
    # another time fp32 might have seemed faster
    monkeypatch.setattr(precision_module, '_LEAST_GAIN', float('inf'))
    assert fit(tmp_path, None, {'precision': 'auto'})[3]._step.precision == 'bf16'
