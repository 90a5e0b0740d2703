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

MAX_PAIRS = 4_000


class AlignedHead(Protocol):
    """A module that is fitted at once, such as `finetuner.models.alignment.Alignment`."""

    def fit(self, embeddings: torch.Tensor, targets: torch.Tensor) -> None:
        """Fit to embeddings `[n, dimension]` and where they should be `[n, output_dim]`."""

    def register_forward_pre_hook(self, hook: Any) -> Any:
        """As of any torch module."""


class AlignmentFit(BaseCallback):
    """Fits an `Alignment` where training begins; from there on it is trained.

    Name it first, since others keep or measure the weights that training begins with.
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
        self._fit(trainer)

    def _fit(self, trainer: Trainer) -> None:
        pictures: list[torch.Tensor] = []
        hook = self._alignment.register_forward_pre_hook(lambda _, args: pictures.append(args[0]))
        try:
            both = embed_all(trainer.model, self._pairs, trainer.device)
        finally:
            hook.remove()
        texts = torch.from_numpy(both[0::2])
        self._alignment.fit(torch.cat([each.float().cpu() for each in pictures]), texts)
        logger.info('Pictures aligned with their texts, on %d pairs', len(texts))


class AlignmentRefit(AlignmentFit):
    """Fits an `Alignment` anew to what the towers give at the end.

    For few pairs: all of them can be fitted to, in pictures of the size that is embedded later,
    where training has seen smaller ones. Name it after the callbacks that choose weights.
    """

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Nothing is trained yet."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Fit to the embeddings of the texts as they are now."""
        self._fit(trainer)
        trainer.state.weights_revision += 1


def alignment_sample(dataset: TextImageDataset, seed: int) -> TextImageDataset:
    """Draw some pairs; all of them where they are few.

    Args:
        dataset: of training.
        seed: of the draw.
    """
    if dataset.num_documents <= MAX_PAIRS:
        return dataset
    drawn = np.random.default_rng(seed).choice(dataset.num_documents, MAX_PAIRS, replace=False)
    return dataset.subset(np.sort(drawn))
