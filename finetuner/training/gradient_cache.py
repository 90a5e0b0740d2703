"""Gradients of a batch larger than memory: the loss sees all of it, the model a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from finetuner.excepts import ConfigError, TrainingError


def cached_backward(
    embed: Callable[[Any], Tensor],
    inputs: Any,
    loss_fn: Callable[[Tensor], Tensor],
    micro_batch_size: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    first_with_graph: bool = False,
) -> Tensor:
    """Compute the loss of a batch and add its gradients to those of the parameters.

    After Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (2021):
    the batch is embedded in parts without a graph, the loss of all embeddings gives the gradient of
    each, and each part is embedded again, with a graph, to push its gradients through. The random
    numbers of the first time are drawn again in the second, so dropout is the same. The gradients
    are those of the whole batch, as long as items are embedded independently of one another.

    Args:
        embed: maps inputs to embeddings `[rows of embeddings, dimension]`, in order; an input may
            have several embeddings, one after the other.
        inputs: a tensor `[n, ...]`, or mappings and sequences of such, each of the same n.
        loss_fn: maps the embeddings of all to a scalar; its own parameters get gradients, too.
        micro_batch_size: inputs embedded at a time.
        scale: applied to the loss before gradients are taken.
        first_with_graph: embed with a graph at first, too, and throw it away: for a compiled model,
            whose code for the one and the other may draw random numbers in another order.

    Returns:
        The loss, a scalar, detached.

    Raises:
        TrainingError: the inputs have no rows to divide them by.
    """
    parts = list(split_rows(inputs, micro_batch_size))
    states, found = [], []
    for part in parts:
        states.append(_random_state())
        with torch.set_grad_enabled(first_with_graph):
            found.append(embed(part).detach())
    embeddings = torch.cat(found).requires_grad_()
    loss = loss_fn(embeddings)
    scale(loss).backward()
    if embeddings.grad is not None:
        afterwards = _random_state()
        gradients = embeddings.grad.split([len(each) for each in found])
        for part, state, gradient in zip(parts, states, gradients, strict=True):
            _set_random_state(state)
            embed(part).backward(gradient)
        _set_random_state(afterwards)
    return loss.detach()


def split_rows(inputs: Any, size: int) -> Iterator[Any]:
    """Divide a batch into parts of the same structure.

    Args:
        inputs: a tensor `[n, ...]`, or mappings and sequences of such, each of the same n.
        size: rows of a part at most.

    Raises:
        TrainingError: there are no tensors, or their numbers of rows differ.
    """
    rows = num_rows(inputs)
    for start in range(0, rows, size):
        yield _rows(inputs, slice(start, start + size))


def first_rows(inputs: Any, size: int) -> Any:
    """The first rows of a batch, at most so many; see `split_rows`."""
    num_rows(inputs)
    return _rows(inputs, slice(0, size))


def num_rows(inputs: Any) -> int:
    """How many inputs a batch holds; see `split_rows`."""
    counts = {len(leaf) if leaf.ndim else 0 for leaf in _leaves(inputs)}
    if len(counts) != 1:
        raise TrainingError(
            f'the inputs of a batch have {sorted(counts) or "no"} rows: micro_batch_size divides '
            'tensors, or mappings of tensors, that have a row for each Document'
        )
    return counts.pop()


def _leaves(inputs: Any) -> Iterator[Tensor]:
    if torch.is_tensor(inputs):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from _leaves(value)
    elif isinstance(inputs, (list, tuple)):
        for value in inputs:
            yield from _leaves(value)
    else:
        raise TrainingError(
            f'a batch holds {type(inputs).__name__}: micro_batch_size divides tensors, and '
            'mappings, lists and tuples of them'
        )


def _rows(inputs: Any, which: slice) -> Any:
    if torch.is_tensor(inputs):
        return inputs[which]
    if isinstance(inputs, Mapping):
        return {key: _rows(value, which) for key, value in inputs.items()}
    return type(inputs)(_rows(value, which) for value in inputs)


def check_independent(model: torch.nn.Module) -> None:
    """Check that a model, in the mode it is in, embeds each item independently of the others.

    Raises:
        ConfigError: its batch normalisation takes the statistics of a batch.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
            raise ConfigError(
                f'micro_batch_size: {name or "the model"} is a {type(module).__name__} that takes '
                'the statistics of each micro-batch for those of the batch: pass '
                'freeze_batch_norm=True, or leave out micro_batch_size'
            )


def _random_state() -> tuple[Tensor, Tensor | None]:
    """The state of torch's generators: of the CPU, and of the current GPU if any is in use."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if used else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
