"""A projection head in closed form: directions in which similar things differ count little."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetuner.models.embedding_model import Dense

_SHRINKAGE = 0.5
# keeps the slope of the square root finite at 0
_EPSILON = 1e-4


class Whitening(torch.nn.Module):
    """Within-class covariance normalisation (Hatch, Kajarekar and Stolcke, 2006).

    In the space it maps to, the embeddings of similar things scatter alike in all directions, so
    that directions in which similar things differ no longer drown those in which others do. The
    map is found at once, without gradients.

    Until it is fitted it passes on what it gets.

    Attributes:
        fitted: whether it has been.
        takes_roots: whether square roots of the values are taken first, their signs kept, which
            evens out how much single dimensions weigh (Perronnin et al., 2010); for convolutional
            networks, whose values are never negative and have a long tail.
        ordered: whether the first values it gives are those in which things differ most, so that
            the beginning of an embedding is a good embedding; set it before fitting. So they are,
            too, where it gives fewer values than it gets.
    """

    def __init__(
        self, dimension: int, output_dim: int | None = None, takes_roots: bool = False
    ) -> None:
        """Make room for the map.

        Args:
            dimension: of what it gets.
            output_dim: of what it gives; None for the same.
            takes_roots: see the class.
        """
        super().__init__()
        self.dense = Dense(torch.nn.Linear(dimension, output_dim or dimension))
        # found in closed form, and again at the end of training: nothing for an optimizer
        self.dense.requires_grad_(False)
        self.takes_roots = takes_roots
        self.ordered = False
        self.fitted = False

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map `[batch, dimension]` to `[batch, output_dim]`."""
        return self.dense(self._rooted(embeddings)) if self.fitted else embeddings

    def fit(self, embeddings: Tensor, groups: NDArray[np.integer]) -> None:
        """Find the map.

        Args:
            embeddings: `[n, dimension]` float, what the backbone gives.
            groups: `[n]` int; equal numbers stand for similar things. Not all differ.
        """
        values = self._rooted(embeddings.double().cpu()).numpy()
        values = values - (mean := values.mean(axis=0))
        within = _within_covariance(values, groups)
        # fewer things than dimensions say nothing of most directions: those keep their length
        within += np.eye(len(within)) * (_SHRINKAGE * np.trace(within) / len(within) + 1e-12)
        lengths, directions = np.linalg.eigh(within)
        matrix = (directions / np.sqrt(lengths)) @ directions.T
        linear = self.dense.linear
        if self.ordered or linear.out_features < linear.in_features:
            # of the whitened space, the directions in which things differ most, in that order
            whitened = values @ matrix
            _, axes = np.linalg.eigh(whitened.T @ whitened)
            matrix = matrix @ axes[:, : -linear.out_features - 1 : -1]
        # of length 1 on average, as losses and learning rates are used to
        matrix /= np.linalg.norm(values @ matrix, axis=1).mean() + 1e-12
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(matrix.T.copy()))
            linear.bias.copy_(torch.from_numpy(-mean @ matrix))
        self.fitted = True

    def _rooted(self, embeddings: Tensor) -> Tensor:
        return signed_roots(embeddings) if self.takes_roots else embeddings


def signed_roots(embeddings: Tensor) -> Tensor:
    """Square roots of the absolute values, with the signs they had."""
    return embeddings / torch.sqrt(embeddings.abs() + _EPSILON)


def _within_covariance(values: NDArray[np.float64], groups: NDArray[np.integer]) -> NDArray:
    """How values deviate from the mean of their group: `[dimension, dimension]`."""
    _, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, numbers, values)
    deviations = values - (sums / counts[:, None])[numbers]
    return deviations.T @ deviations / len(values)
