"""What a training step costs: memory kept for the backward pass, and time, found by trial."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetuner.data.memory import available_memory

# Of the memory there is, what a step may take. What the backward pass takes beside what was kept
# for it is less than what it gives back: the estimate is above what a step really takes.
_SHARE_OF_MEMORY = 0.8
# gradients, two averages of the optimizer, and one for what it does in between
_COPIES_OF_WEIGHTS = 4


@dataclass(frozen=True)
class StepCost:
    """What each item of a batch costs.

    Attributes:
        item_seconds: for the forward and the backward pass.
        item_bytes: of memory while they go on; 0 where that was not asked.
    """

    item_seconds: float
    item_bytes: float = 0.0


def measure_step(
    model: torch.nn.Module, inputs: Any, freeze_batch_norm: bool, dtype: torch.dtype | None = None
) -> StepCost:
    """Run a small batch forward and backward, and count what is kept between the two.

    Half of the batch comes first: what does not grow with the batch falls out. The model is left
    as it was: weights, gradients, statistics, random numbers.

    Args:
        model: maps inputs to embeddings.
        inputs: a batch of at least two, on the model's device: a tensor or several by name.
        freeze_batch_norm: whether batch normalisation keeps its statistics in training.
        dtype: what is computed in, where that is not float32.
    """
    count = num_items(inputs)
    half = _resized(inputs, count // 2)
    with _as_in_training(model, freeze_batch_norm):
        # the first pass also loads and chooses what computes
        first, _ = _kept_bytes(model, half, dtype)
        whole, seconds = _kept_bytes(model, inputs, dtype)
    grown = max(0, whole - first) / (count - count // 2)
    return StepCost(seconds / count, grown)


def items_in_memory(model: torch.nn.Module, item_bytes: float) -> int:
    """How many items a step can take in the memory that this process may still have; at least 1.

    Args:
        model: with the weights that are trained.
        item_bytes: as `measure_step` finds them.
    """
    allowed = _SHARE_OF_MEMORY * available_memory() - _COPIES_OF_WEIGHTS * _trained_bytes(model)
    return max(1, int(allowed // max(1.0, item_bytes)))


def try_batch(
    model: torch.nn.Module,
    inputs: Any,
    size: int,
    freeze_batch_norm: bool,
    dtype: torch.dtype | None = None,
) -> tuple[int, StepCost]:
    """Run batches forward and backward, each half of the one before, until one fits in memory.

    Args:
        model: on a GPU, as are the inputs.
        inputs: some, which are repeated for larger batches.
        size: items of the first batch.
        freeze_batch_norm: whether batch normalisation keeps its statistics in training.
        dtype: what is computed in, where that is not float32.

    Returns:
        How many items fit, 1 also when not even one does, and the time that they took.
    """
    with _as_in_training(model, freeze_batch_norm):
        while True:
            seconds = _try_seconds(model, _resized(inputs, size), dtype)
            if seconds is not None:
                return size, StepCost(seconds / size)
            model.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size == 1:
                return 1, StepCost(0.0)
            size //= 2


def num_items(inputs: Any) -> int:
    """Items in a batch: a tensor, or several by name."""
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


def _resized(inputs: Any, size: int) -> Any:
    """So many items: the first of them, again and again where there are fewer."""
    if isinstance(inputs, Mapping):
        return {name: _resized(value, size) for name, value in inputs.items()}
    return inputs[torch.arange(size, device=inputs.device) % len(inputs)]


def _of(inputs: Any) -> torch.device:
    return (next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs).device


def _trained_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def _as_in_training(model: torch.nn.Module, freeze_batch_norm: bool) -> Iterator[None]:
    """Put the model in training mode, and back as it was at the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.train()
        for module, _ in modes:
            if freeze_batch_norm and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for module, mode in modes:
                module.training = mode
            for buffer, before in buffers:
                buffer.copy_(before)


def _kept_bytes(
    model: torch.nn.Module, inputs: Any, dtype: torch.dtype | None
) -> tuple[int, float]:
    """Bytes that a forward pass keeps for the backward pass, weights not counted; and the time."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = _loss(model, inputs, dtype)
    loss.backward()
    return sum(kept.values()), time.perf_counter() - began


def _try_seconds(model: torch.nn.Module, inputs: Any, dtype: torch.dtype | None) -> float | None:
    """Time of a step, the second; None where memory does not hold it."""
    try:
        # the optimizer's averages come to the gradients in the first step
        room = torch.empty(2 * _trained_bytes(model), dtype=torch.uint8, device=_of(inputs))
        for _ in range(2):
            began = time.perf_counter()
            _loss(model, inputs, dtype).backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        del room
        return time.perf_counter() - began
    except torch.OutOfMemoryError:
        return None


def _loss(model: torch.nn.Module, inputs: Any, dtype: torch.dtype | None) -> torch.Tensor:
    with torch.autocast(_of(inputs).type, dtype=dtype, enabled=dtype is not None):
        return model(inputs).float().square().mean()
