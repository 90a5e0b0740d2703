"""Embeddings whose beginnings are embeddings, too: the loss of several lengths at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from finetuner.excepts import ConfigError
from finetuner.training.objectives import Objective


class MatryoshkaObjective(torch.nn.Module):
    """The mean of the losses of embeddings cut to several lengths.

    After Kusupati et al., Matryoshka Representation Learning (2022). Each length has an objective
    of its own, so that losses that learn weights or remember batches do so for each length.

    Args:
        objectives: by the length that each looks at: the first so many values of an embedding.
    """

    def __init__(self, objectives: Mapping[int, Objective]) -> None:
        super().__init__()
        self._objectives = torch.nn.ModuleDict(
            {str(length): objectives[length] for length in sorted(objectives)}
        )

    def by_length(self) -> Iterator[tuple[int, Objective]]:
        """Each length with its objective, the shortest first."""
        for length, objective in self._objectives.items():
            yield int(length), objective  # type: ignore[misc]

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            embeddings: `[batch, dimension]`, of the greatest length.
            labels: as the dataset gives them.

        Returns:
            A scalar.
        """
        losses = [
            objective(embeddings[:, :length], labels) for length, objective in self.by_length()
        ]
        return torch.stack(losses).mean()


def build_for_lengths(
    build: Callable[[int], Objective], lengths: Sequence[int], dimension: int
) -> Objective | MatryoshkaObjective:
    """Build an objective for whole embeddings or, where lengths are named, for those as well.

    Args:
        build: makes the objective of embeddings of a length.
        lengths: besides the whole.
        dimension: length of the whole.
    """
    if not lengths:
        return build(dimension)
    return MatryoshkaObjective({length: build(length) for length in (*lengths, dimension)})


def check_lengths(lengths: Sequence[int], dimension: int) -> tuple[int, ...]:
    """Check the lengths that embeddings shall be cut to.

    Args:
        lengths: as they were given.
        dimension: length of the whole embedding.

    Returns:
        The same in order.

    Raises:
        ConfigError: one comes twice, or none can be cut to it.
    """
    wrong = [length for length in lengths if not 1 <= length < dimension]
    if wrong:
        allowed = f'1 to {dimension - 1}' if dimension > 1 else 'none'
        raise ConfigError(
            f'matryoshka_dims: embeddings of length {dimension} cannot be cut to '
            f'{", ".join(map(str, wrong))}: name lengths from {allowed}; the whole counts anyway'
        )
    if len(set(lengths)) < len(lengths):
        raise ConfigError(f'matryoshka_dims {list(lengths)} names a length twice: leave one out')
    return tuple(sorted(lengths))


def metric_name(metric: str, length: int) -> str:
    """What a metric of embeddings cut to a length is called, such as `recall_at_k_dim_64`."""
    return f'{metric}_dim_{length}'


def cut(embeddings: np.ndarray, length: int) -> np.ndarray:
    """The first values of each embedding: `[n, length]` of `[n, dimension]`."""
    return np.ascontiguousarray(embeddings[:, :length])
