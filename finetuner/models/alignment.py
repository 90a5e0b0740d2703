"""A projection head in closed form: from what a picture backbone gives to where texts are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetuner.models.whitening import signed_roots

_RIDGE = 1.0


class Alignment(torch.nn.Module):
    """A linear map from the embeddings of one backbone to those of another.

    Ridge regression finds where training may begin (as in linear cross-modal maps: Merullo et al.,
    Linearly Mapping from Image to Text Space, 2023); from there it is trained like any layer.

    Attributes:
        takes_roots: see `finetuner.models.whitening.Whitening`.
    """

    def __init__(self, dimension: int, output_dim: int, takes_roots: bool = False) -> None:
        """Make room for the map.

        Args:
            dimension: of what it gets.
            output_dim: of what it gives.
            takes_roots: see the class.
        """
        super().__init__()
        self.linear = torch.nn.Linear(dimension, output_dim)
        self.takes_roots = takes_roots

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map `[batch, dimension]` to `[batch, output_dim]`."""
        return self.linear(signed_roots(embeddings) if self.takes_roots else embeddings)

    def fit(self, embeddings: Tensor, targets: Tensor) -> None:
        """Find the map by ridge regression.

        Args:
            embeddings: `[n, dimension]`, what the backbone gives.
            targets: `[n, output_dim]`, where each of them should be.
        """
        doubles = embeddings.double().cpu()
        sources = (signed_roots(doubles) if self.takes_roots else doubles).numpy()
        aims = targets.double().cpu().numpy()
        mean, aim = sources.mean(axis=0), aims.mean(axis=0)
        centred = sources - mean
        covariance = centred.T @ centred
        # as much as the mean variance, since there may be fewer pairs than dimensions
        ridge = _RIDGE * np.trace(covariance) / len(covariance) + 1e-12
        matrix = np.linalg.solve(
            covariance + ridge * np.eye(len(covariance)), centred.T @ (aims - aim)
        )
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(matrix.T.copy()))
            self.linear.bias.copy_(torch.from_numpy(aim - mean @ matrix))
