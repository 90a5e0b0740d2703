"""Where training of two towers begins: pictures brought to where their texts are."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch

from finetuner.data.datasets import TextImageDataset
from finetuner.training.callbacks import embed_all
from finetuner.training.trainer import BaseCallback, Trainer

logger = logging.getLogger('finetuner.training')

_MAX_PAIRS = 4_000


class AlignedHead(Protocol):
    """A module that is fitted at once, such as `finetuner.models.alignment.Alignment`."""

    def fit(self, embeddings: torch.Tensor, targets: torch.Tensor) -> None:
        """Fit to embeddings `[n, dimension]` and where they should be `[n, output_dim]`."""

    def register_forward_pre_hook(self, hook: Any) -> Any:
        """As of any torch module."""


class AlignmentFit(BaseCallback):
    """Fits an `Alignment` where training begins; from there on it is trained.

    Name it before the callbacks that evaluate, so that they see where training begins.
    """

    def __init__(self, alignment: AlignedHead, pairs: Iterable[Any]) -> None:
        """Keep what to embed.

        Args:
            alignment: part of the model that is trained, which gives of each pair two rows, that
                of the text first.
            pairs: yields (inputs, anything) of whole pairs.
        """
        self._alignment = alignment
        self._pairs = pairs

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Fit to the embeddings of the texts."""
        pictures: list[torch.Tensor] = []
        hook = self._alignment.register_forward_pre_hook(lambda _, args: pictures.append(args[0]))
        try:
            both = embed_all(trainer.model, self._pairs, trainer.device)
        finally:
            hook.remove()
        texts = torch.from_numpy(both[0::2])
        self._alignment.fit(torch.cat([each.float().cpu() for each in pictures]), texts)
        trainer.state.weights_revision += 1
        logger.info('Pictures aligned with their texts, on %d pairs', len(texts))


def alignment_sample(dataset: TextImageDataset, seed: int) -> TextImageDataset:
    """Draw some pairs; all of them where they are few.

    Args:
        dataset: of training.
        seed: of the draw.
    """
    if dataset.num_documents <= _MAX_PAIRS:
        return dataset
    drawn = np.random.default_rng(seed).choice(dataset.num_documents, _MAX_PAIRS, replace=False)
    return dataset.subset(np.sort(drawn))
