"""What tailor makes: a backbone between what its inputs need and what its embeddings become."""

from __future__ import annotations

from typing import Any

import torch

from finetuner.models.backbones import PictureSpec


class PictureNormalizer(torch.nn.Module):
    """Turn uint8 pictures into what a backbone takes, inside the graph.

    Pictures enter as uint8 `[batch, height, width, 3]`, a quarter of float's memory traffic, and
    leave as float32 `[batch, 3, height, width]`, which in memory already is channels last.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: PictureSpec) -> None:
        """Keep mean and standard deviation, scaled to 0..255."""
        super().__init__()
        mean = torch.tensor(spec.mean, dtype=torch.float32).view(1, -1, 1, 1) * 255
        std = torch.tensor(spec.std, dtype=torch.float32).view(1, -1, 1, 1) * 255
        # they stand in the artifact's specification, so the state dict need not repeat them
        self.register_buffer('mean', mean, persistent=False)
        self.register_buffer('std', std, persistent=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Normalise `[batch, height, width, 3]` uint8 to `[batch, 3, height, width]` float32."""
        return (pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std


class EmbeddingModel(torch.nn.Module):
    """A backbone without its head that maps a batch of inputs to embeddings `[batch, dimension]`."""

    def __init__(
        self,
        backbone: torch.nn.Module,
        normalizer: torch.nn.Module | None = None,
        projection_head: torch.nn.Module | None = None,
        unit_length: bool = False,
    ) -> None:
        """Join the parts; a missing one is the identity.

        Args:
            backbone: maps inputs to embeddings.
            normalizer: of inputs, before the backbone.
            projection_head: after the backbone.
            unit_length: bring embeddings to length 1 at the end.
        """
        super().__init__()
        self.normalizer = normalizer or torch.nn.Identity()
        self.backbone = backbone
        self.projection_head = projection_head or torch.nn.Identity()
        self.unit_length = unit_length

    def forward(self, inputs: Any) -> torch.Tensor:
        """Embed a batch."""
        embeddings = self.projection_head(self.backbone(self.normalizer(inputs)))
        return torch.nn.functional.normalize(embeddings) if self.unit_length else embeddings


class Dense(torch.nn.Module):
    """A linear layer with an activation, as sentence-transformers stores it."""

    def __init__(self, linear: torch.nn.Linear, activation: torch.nn.Module | None = None) -> None:
        """Join the two."""
        super().__init__()
        self.linear = linear
        self.activation = activation or torch.nn.Identity()

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Map `[batch, in]` to `[batch, out]`."""
        return self.activation(self.linear(embeddings))


class UnitLength(torch.nn.Module):
    """Brings embeddings to length 1."""

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Map `[batch, dimension]` to the same shape."""
        return torch.nn.functional.normalize(embeddings)


def build_projection_head(dimension: int, output_dim: int) -> torch.nn.Linear:
    """A linear map without bias, orthogonal at first, so that it starts by keeping distances.

    A random orthogonal projection nearly preserves the geometry of the embeddings it is given
    (Johnson and Lindenstrauss, 1984), so training starts from what the backbone already knows.
    """
    head = torch.nn.Linear(dimension, output_dim, bias=False)
    torch.nn.init.orthogonal_(head.weight)
    return head
