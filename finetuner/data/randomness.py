"""Random numbers that depend on a place in training and on nothing else, and all that is drawn from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Where the generators of Python, NumPy and torch stand, as plain values and tensors."""
    numpy: Any = np.random.get_state(legacy=True)
    name, keys, *others = numpy
    state: dict[str, Any] = {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), *others),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where they stood.

    Args:
        state: as `random_state` gave it; without 'cuda' generators of GPUs are left as they are.
    """
    random.setstate(state['python'])
    name, keys, *others = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state['cuda'])


@contextmanager
def drawing_from(key: Sequence[int]) -> Iterator[None]:
    """Draw random numbers on the CPU from a key within the block; they go on as before after it.

    Args:
        key: whole numbers of 0 or more, such as (seed, epoch, number of the batch).
    """
    # the GPU's generators are left alone: nothing of a batch is drawn there
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
