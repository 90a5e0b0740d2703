"""How many batches are embedded at a time, and of how many Documents."""

from __future__ import annotations

import pytest

from finetuner.encoding import capacity
from finetuner.encoding.capacity import plan_capacity
from finetuner.excepts import ConfigError


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(capacity, 'num_cores', lambda: 8)


def test_a_cpu_embeds_a_small_batch_on_each_core():
    plan = plan_capacity('cpu')
    assert (plan.num_embedders, plan.num_threads, plan.num_readers) == (8, 1, 8)
    assert plan.batch_size < plan_capacity('cuda').batch_size


def test_a_gpu_embeds_one_batch_at_a_time():
    plan = plan_capacity('cuda')
    assert (plan.num_embedders, plan.num_threads) == (1, None)


@pytest.mark.parametrize(('num_threads', 'num_embedders'), [(1, 8), (3, 2), (8, 1), (20, 1)])
def test_batches_leave_no_core_without_work(num_threads, num_embedders):
    plan = plan_capacity('cpu', 16, num_threads)
    assert (plan.num_threads, plan.num_embedders, plan.batch_size) == (
        num_threads,
        num_embedders,
        16,
    )


@pytest.mark.parametrize('arguments', [{'batch_size': 0}, {'num_threads': 0}, {'num_threads': 'x'}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        plan_capacity('cpu', **arguments)
