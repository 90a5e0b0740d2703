"""How the work of embedding is spread over the cores of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from finetuner.cores import num_cores
from finetuner.engines import at_least_one

# Pictures in a batch, each of 64 tokens of text. On a CPU a batch that fits into the caches of one
# core takes the least time a Document (benchmarks/capacity.py); a GPU wants more at a time.
_CPU_BATCH = 8
_GPU_BATCH = 32


@dataclass(frozen=True)
class Capacity:
    """What is done at the same time.

    Attributes:
        batch_size: Documents embedded together.
        num_threads: of one batch; None leaves it to the engine.
        num_embedders: batches embedded at the same time.
        num_readers: Documents decoded or tokenised at the same time.
    """

    batch_size: int
    num_threads: int | None
    num_embedders: int
    num_readers: int


def plan_capacity(
    device: str, batch_size: int | None = None, num_threads: int | None = None
) -> Capacity:
    """Use all cores, each for a batch of its own.

    Several threads that share a batch wait for each other at every operator: on two cores they
    embedded fewer Documents than two threads with a batch each.

    Args:
        device: `cpu` or `cuda`, where one batch at a time is embedded.
        batch_size: None for what suits the device.
        num_threads: of one batch; None for one on a CPU. More answer a request by itself
            sooner, and fewer requests in all.

    Raises:
        ConfigError: a number is less than 1.
    """
    cores = num_cores()
    is_cpu = device == 'cpu'
    if batch_size is None:
        batch_size = _CPU_BATCH if is_cpu else _GPU_BATCH
    if num_threads is None:
        num_threads = 1 if is_cpu else None
    else:
        num_threads = at_least_one('num_threads', num_threads)
    num_embedders = max(1, cores // (num_threads or 1)) if is_cpu else 1
    return Capacity(at_least_one('batch_size', batch_size), num_threads, num_embedders, cores)
