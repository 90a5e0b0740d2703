"""From the embeddings of a text's tokens, or of a picture's positions, to one."""

from __future__ import annotations

import torch
from torch import Tensor

from finetuner.models.backbones import POOLERS
from finetuner.models.options import PICTURE_POOLERS, PicturePooler


def pool_tokens(tokens: Tensor, mask: Tensor, pooler: str) -> Tensor:
    """Make one embedding of those of the tokens, padding left aside.

    Args:
        tokens: `[batch, length, dimension]` float.
        mask: `[batch, length]`, 1 for a token and 0 for padding; at least one token each.
        pooler: `mean`, `cls` (the first token's) or `max` (in each dimension).

    Returns:
        `[batch, dimension]`.

    Raises:
        ValueError: there is no such pooler.
    """
    if pooler == 'cls':
        return tokens[:, 0]
    kept = mask.unsqueeze(-1)
    if pooler == 'mean':
        weights = kept.to(tokens.dtype)
        return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
    if pooler == 'max':
        return tokens.masked_fill(kept == 0, torch.finfo(tokens.dtype).min).amax(dim=1)
    raise ValueError(f'pooler {pooler!r} is not one of {", ".join(POOLERS)}')


class GeneralizedMean(torch.nn.Module):
    """The generalised mean of each channel over all positions (GeM).

    `(mean of x**p) ** (1 / p)`: the mean for p = 1, the maximum for a p without end (Radenovic,
    Tolias and Chum, Fine-tuning CNN Image Retrieval with No Human Annotation, 2018).
    """

    p: Tensor

    def __init__(self, p: float = 3.0, eps: float = 1e-6, trainable: bool = True) -> None:
        """Keep the exponent.

        Args:
            p: that training begins with.
            eps: what smaller values, negative ones among them, count as.
            trainable: whether `p` is learned.
        """
        super().__init__()
        self.eps = eps
        exponent = torch.tensor(float(p))
        if trainable:
            self.p = torch.nn.Parameter(exponent)
        else:
            self.register_buffer('p', exponent)

    def forward(self, positions: Tensor) -> Tensor:
        """Map `[batch, channels, height, width]` float to `[batch, channels, 1, 1]`."""
        # in half precision hardly any digit of the exponent's gradient would be left
        dtype = torch.promote_types(positions.dtype, self.p.dtype)
        values = positions.to(dtype).clamp(min=self.eps)
        # Powers of a share of the largest neither overflow nor vanish, however large p is. The
        # result does not depend on what is divided by, so no gradient has to go that way.
        largest = values.detach().amax((-2, -1), keepdim=True)
        powers = (values / largest).pow(self.p).mean((-2, -1), keepdim=True)
        return powers.pow(1 / self.p) * largest


def build_picture_pooler(pooler: PicturePooler) -> torch.nn.Module:
    """The module that stands in for the pooling of a convolutional network.

    Args:
        pooler: which.

    Raises:
        ValueError: there is no such pooler.
    """
    if pooler.name == 'gem':
        return GeneralizedMean(pooler.p, pooler.eps, pooler.trainable)
    if pooler.name == 'max':
        return torch.nn.AdaptiveMaxPool2d(1)
    if pooler.name == 'mean':
        return torch.nn.AdaptiveAvgPool2d(1)
    raise ValueError(f'pooler {pooler.name!r} is not one of {", ".join(PICTURE_POOLERS)}')
