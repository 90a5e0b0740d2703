"""A run that goes on from a checkpoint keeps to what it chose when it began."""

import json

import pytest
import torch

from finetuner.runs.choices import open_choices
from finetuner.runs.run_files import checkpoint_directory
from finetuner.runs.runner import execute_run
from finetuner.training import frozen_features, step_cost
from finetuner.training.checkpointing import SUMMARY
from tests.conftest import make_picture_docs
from tests.unit.test_runner import GoingObserver, config, weights_of

IN_PARTS = {'freeze_batch_norm': True}
FROZEN = {'freeze_batch_norm': True, 'freeze': True, 'output_dim': 8}


class KilledError(BaseException):
    """Stands for the end of the process."""


class Killer(GoingObserver):
    """Ends the run at a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def step_metrics(self, step, epoch, values):
        super().step_metrics(step, epoch, values)
        if step == self.step:
            raise KilledError


def run(tmp_path, name, kill_at=None, **parameters):
    """A run of six steps with a checkpoint after each; its observer and what it chose."""
    given = config(epochs=3, checkpoint_seconds=1e-9, **parameters)
    observer = Killer(kill_at)
    files = tmp_path / name
    try:
        execute_run(
            given, lambda key: make_picture_docs(), tmp_path / f'{name}-artifact', observer, files
        )
    except KilledError:
        assert kill_at is not None
    choices = json.loads((checkpoint_directory(files) / 'choices.json').read_text())
    return observer, choices


def assert_the_same(tmp_path, one, other):
    found, expected = (weights_of(tmp_path / f'{name}-artifact') for name in (one, other))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_batch_goes_on_in_the_same_parts(tmp_path, monkeypatch):
    for fitting, size, name in [(7, 4, 'left alone'), (1000, 0, 'whole')]:
        monkeypatch.setattr(step_cost, 'items_in_memory', lambda *_, count=fitting: count)
        assert run(tmp_path, name, **IN_PARTS)[1] == {'micro_batch_size': {'size': size}}
    # it makes a difference
    parts, whole = (weights_of(tmp_path / f'{name}-artifact') for name in ('left alone', 'whole'))
    assert any(not torch.equal(parts[name], tensor) for name, tensor in whole.items())
    monkeypatch.setattr(step_cost, 'items_in_memory', lambda *_: 7)
    run(tmp_path, 'killed', 4, **IN_PARTS)
    monkeypatch.setattr(step_cost, 'items_in_memory', lambda *_: 1000)
    observer, choices = run(tmp_path, 'killed', **IN_PARTS)
    assert observer.places == [(3, 1)]
    assert choices == {'micro_batch_size': {'size': 4}}
    assert_the_same(tmp_path, 'killed', 'left alone')


@pytest.mark.parametrize(('before', 'after', 'ahead'), [(2**40, 0, 1), (0, 2**40, 0)])
def test_the_same_part_of_a_frozen_model_is_trained(tmp_path, monkeypatch, before, after, ahead):
    monkeypatch.setattr(frozen_features, 'available_memory', lambda: before)
    run(tmp_path, 'left alone', **FROZEN)
    run(tmp_path, 'killed', 4, **FROZEN)
    monkeypatch.setattr(frozen_features, 'available_memory', lambda: after)
    observer, choices = run(tmp_path, 'killed', **FROZEN)
    assert observer.places == [(3, 1)]
    assert choices['frozen_part'] == {'ahead': ahead}
    assert_the_same(tmp_path, 'killed', 'left alone')


def test_a_run_without_a_checkpoint_chooses_anew(tmp_path):
    choices = open_choices(tmp_path / 'checkpoint')
    choices.remember('micro_batch_size', {'size': 4})
    assert open_choices(tmp_path / 'checkpoint').recall('micro_batch_size') is None
    choices.remember('micro_batch_size', {'size': 2})
    (tmp_path / 'checkpoint' / SUMMARY).write_text('{}')
    assert open_choices(tmp_path / 'checkpoint').recall('micro_batch_size') == {'size': 2}


def test_where_nothing_can_be_written_it_goes_on(tmp_path, caplog):
    (tmp_path / 'checkpoint').write_text('no directory')
    choices = open_choices(tmp_path / 'checkpoint')
    assert 'What the run chooses is not remembered' in caplog.text
    choices.remember('micro_batch_size', {'size': 4})
    assert choices.recall('micro_batch_size') is None
