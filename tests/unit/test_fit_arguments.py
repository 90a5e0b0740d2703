"""Every argument of both `fit`s does what it says, on real runs; a new one cannot come without."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from finetuner.fitting import fit_backbone, fit_own_model

pytest.register_assert_rewrite(
    'tests.unit.fit_backbone_cases', 'tests.unit.fit_module_cases', 'tests.unit.fit_training_cases'
)
from tests.unit import fit_backbone_cases, fit_module_cases, fit_training_cases  # noqa: E402, F401
from tests.unit.fit_harness import World  # noqa: E402

# arguments whose effect a module of their own shows
ELSEWHERE = {
    'micro_batch_size': 'test_gradient_cache.py',
    'matryoshka_dims': 'test_matryoshka.py',
    'hard_negatives': 'test_hard_negatives.py',
    'ema_decay': 'test_averaging.py',
    'precision': 'test_precision.py',
    'compile_model': 'test_precision.py',
    'checkpoint_seconds': 'test_checkpointing.py',
    'export_precision': 'test_export_precision.py',
    'max_recall_loss': 'test_export_precision.py',
    'num_processes': '../integration/test_parallel_runs.py',
    'num_nodes': '../integration/test_ray_runs.py',
}
OF_BACKBONE = list(inspect.signature(fit_backbone).parameters)
OF_MODULE = list(inspect.signature(fit_own_model).parameters)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp('world'))


@pytest.mark.parametrize('name', OF_BACKBONE)
def test_argument_of_fit_with_a_name(name, world):
    if name in ELSEWHERE:
        assert (Path(__file__).parent / ELSEWHERE[name]).is_file()
        return
    assert name in fit_backbone_cases.CASES, f'no case shows the effect of {name}'
    fit_backbone_cases.CASES[name](world)


@pytest.mark.parametrize('name', OF_MODULE)
def test_argument_of_fit_with_a_module(name, tmp_path):
    assert name in fit_module_cases.CASES, f'no case shows the effect of {name}'
    fit_module_cases.CASES[name](tmp_path)


def test_no_case_is_of_an_argument_that_is_not_there():
    assert set(fit_backbone_cases.CASES) | set(ELSEWHERE) == set(OF_BACKBONE)
    assert not set(fit_backbone_cases.CASES) & set(ELSEWHERE)
    assert set(fit_module_cases.CASES) == set(OF_MODULE)
