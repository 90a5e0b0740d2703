"""Which numbers a model is trained with: 32 bits, or half of them where a device is made for that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from finetuner.excepts import ConfigError

logger = logging.getLogger('finetuner.training')

Precision = Literal['fp32', 'bf16', 'fp16']
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}

# what trying out costs, some two batches, is not earned back by runs of fewer
LEAST_STEPS_TIMED = 100
_NUM_ROUNDS = 3
# less of a gain than this is not told from the mood of the machine, nor worth the digits
_LEAST_GAIN = 1.25
_CPU_UNITS = {'amx_bf16': 'AMX', 'avx512_bf16': 'AVX512-BF16'}


@dataclass(frozen=True)
class Choice:
    """What is known of the precision before anything is tried.

    Attributes:
        precision: None where bf16 and fp32 are to be timed against each other.
        reason: for the log.
    """

    precision: Precision | None
    reason: str


def check_precision(asked: str, device: str) -> None:
    """Check that a device can do what is asked for.

    Args:
        asked: `auto`, `fp32`, `bf16` or `fp16`.
        device: `cpu` or `cuda`, as it is there.

    Raises:
        ConfigError: it cannot; names what it can.
    """
    if asked == 'fp16' and device != 'cuda':
        raise ConfigError(
            "precision 'fp16' needs a GPU, and this run is on the CPU: take 'bf16', 'fp32' or 'auto'"
        )
    if asked == 'bf16' and device == 'cuda' and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "precision 'bf16' needs a newer GPU than this one: take 'fp16', 'fp32' or 'auto'"
        )


def choose_precision(
    asked: str, device: str, num_steps: int | None, bf16_units: str | None
) -> Choice:
    """Decide on a precision as far as it can be done without trying.

    Args:
        asked: `auto`, or the precision itself.
        device: `cpu` or `cuda`, as it is there.
        num_steps: of the run; None if that is not known.
        bf16_units: what the device computes bfloat16 with, as `find_bf16_units` gives it.
    """
    if asked != 'auto':
        return Choice(asked, 'as asked for')  # type: ignore[arg-type]
    if device == 'cuda':
        if bf16_units:
            return Choice('bf16', f'this GPU has {bf16_units}')
        return Choice('fp32', 'this GPU has no bfloat16 units')
    if not bf16_units:
        return Choice('fp32', 'this CPU has no bfloat16 units')
    if num_steps is not None and num_steps < LEAST_STEPS_TIMED:
        return Choice('fp32', f'{num_steps} batches are too few to try out what is faster')
    return Choice(None, f'this CPU has {bf16_units} units')


def find_bf16_units(device: str) -> str | None:
    """What a device computes bfloat16 with, None where it only imitates that."""
    if device == 'cuda':
        # the answer without emulation, which is slow
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return 'bfloat16 units' if supported else None
    found = torch.cpu.get_capabilities()
    return next((name for flag, name in _CPU_UNITS.items() if found.get(flag)), None)


def faster_precision(run: Callable[[Precision], Any]) -> tuple[Precision, float]:
    """Time fp32 and bf16 in turns, after one go each for practice.

    Args:
        run: does a piece of the work in a precision.

    Returns:
        bf16 where it is clearly faster, else fp32; and how many times as fast bf16 was.
    """
    seconds: dict[Precision, list[float]] = {'fp32': [], 'bf16': []}
    for number in range(1 + _NUM_ROUNDS):
        for precision, measured in seconds.items():
            began = time.perf_counter()
            run(precision)
            if number:
                measured.append(time.perf_counter() - began)
        gain = min(seconds['fp32'], default=1.0) / min(seconds['bf16'], default=1.0)
        if gain < 1:
            # the first round says it already, as it does on most machines
            break
    return ('bf16' if gain >= _LEAST_GAIN else 'fp32'), gain


@contextmanager
def leaving_no_trace(model: torch.nn.Module) -> Iterator[None]:
    """Put a model's buffers and gradients, and the CPU's random numbers, back at the end."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
