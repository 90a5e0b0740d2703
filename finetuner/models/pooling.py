"""From the embeddings of a text's tokens to one."""

from __future__ import annotations

import torch
from torch import Tensor

from finetuner.models.backbones import POOLERS


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
