"""Several processes train to the weights of one: with torchrun, and in runs of their own."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss

from tests.integration.rank_trainings import (
    GRADIENTS,
    TRAININGS,
    fit_own,
    gradients,
    network,
    shards_of,
    train,
    write_shards,
)

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]


def torchrun(num_processes, *arguments, timeout=600):
    """Run a module in so many processes, as torchrun starts them."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc-per-node', str(num_processes), '-m', *map(str, arguments)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope='module', params=[2, 3])
def trained(request, tmp_path_factory):
    """What came of each training in several processes."""
    folder = tmp_path_factory.mktemp(f'ranks{request.param}')
    write_shards(folder)
    torchrun(request.param, 'tests.integration.rank_trainings', folder)
    # of the streams, what a loop by hand in one process makes of the ranks' batches put together
    by_hand = train_by_hand(folder, request.param)
    return {'by hand': by_hand} | {
        path.stem: torch.load(path, weights_only=False) for path in folder.glob('*.pt')
    }


def train_by_hand(folder, num_ranks):
    model, loss = network(), NTXentLoss()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    streams = [shards_of(folder, rank, num_ranks, num_batches=4) for rank in range(num_ranks)]
    for _ in range(2):
        for parts in zip(*streams, strict=True):
            inputs, labels = (torch.cat(each) for each in zip(*parts, strict=True))
            optimizer.zero_grad()
            loss(model(inputs), labels).backward()
            optimizer.step()
    return model.state_dict()


@pytest.fixture(scope='module')
def alone():
    """What one process made of a training."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = train(TRAININGS[name])
        return copy.deepcopy(known[name])

    return of


@pytest.mark.parametrize('name', TRAININGS)
def test_several_processes_train_to_the_weights_of_one(name, trained, alone):
    expected, found = alone(name), trained[name]
    assert found['seen'] == expected['seen'], 'each item once, and no other'
    assert found['broken'] == expected['broken']
    if name == 'drawn triplets':
        # which are drawn is another matter; that all processes draw the same ones is not
        assert np.isfinite(found['losses']).all()
        return
    np.testing.assert_allclose(found['losses'], expected['losses'], atol=1e-5, rtol=1e-5)
    for part in ('weights', 'loss weights'):
        assert found[part].keys() == expected[part].keys()
        for key, value in expected[part].items():
            torch.testing.assert_close(found[part][key], value, atol=1e-5, rtol=0)
    assert found['metrics'].keys() == expected['metrics'].keys()
    for key, value in expected['metrics'].items():
        assert found['metrics'][key] == pytest.approx(value, abs=1e-5), key
    assert [stage for stage, _ in found['reports']] == [stage for stage, _ in expected['reports']]


@pytest.mark.parametrize(('name', 'num_rows'), GRADIENTS)
def test_gradients_are_those_of_one_process(name, num_rows, trained):
    found = trained[f'gradients {name} {num_rows}']
    for key, expected in gradients(name, num_rows).items():
        torch.testing.assert_close(found[key], expected, atol=1e-13, rtol=1e-11)


def test_a_script_of_ones_own_trains_in_several_processes(trained):
    expected = fit_own()
    for key, value in expected.items():
        torch.testing.assert_close(trained['own'][key], value, atol=1e-5, rtol=0)


def test_streams_of_all_processes_are_one_batch_and_all_end_with_its_weights(trained):
    streamed = [found for name, found in trained.items() if name.startswith('streamed ')]
    assert len(streamed) > 1
    for found in streamed:
        assert 'give ShardedBatches num_batches' in found['refused']
        for key, value in trained['by hand'].items():
            assert torch.equal(found['weights'][key], streamed[0]['weights'][key])
            torch.testing.assert_close(found['weights'][key], value, atol=1e-5, rtol=0)
