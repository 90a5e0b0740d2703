"""Fit the whitening of a model to its training data, before training and again after it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from finetuner.data.class_choice import choose_by_class
from finetuner.data.datasets import ClassDataset
from finetuner.training.callbacks import embed_all
from finetuner.training.trainer import BaseCallback, Trainer

logger = logging.getLogger('finetuner.training')

MAX_ITEMS = 4_000
_MAX_ITEMS_PER_CLASS = 8
_LEAST_ITEMS = 16


class ClosedFormHead(Protocol):
    """A module that is fitted at once, such as `finetuner.models.whitening.Whitening`."""

    def fit(self, embeddings: torch.Tensor, groups: NDArray[np.integer]) -> None:
        """Fit to `[n, dimension]` embeddings; equal groups `[n]` stand for similar things."""

    def register_forward_pre_hook(self, hook: Any) -> Any:
        """As of any torch module."""


class WhiteningFit(BaseCallback):
    """Fits a `Whitening` where training begins, and anew to the weights that are kept.

    Name it after the callbacks that choose weights.
    """

    def __init__(
        self,
        whitening: ClosedFormHead,
        first: Iterable[Any],
        last: Iterable[Any],
        groups: NDArray[np.integer],
    ) -> None:
        """Keep what to embed.

        Args:
            whitening: part of the model that is trained.
            first: yields (inputs, anything) as the model gets them in training.
            last: the same as it gets them afterwards.
            groups: of the items, in the order of both.
        """
        self._whitening = whitening
        self._first = first
        self._last = last
        self._groups = groups

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Give training a good place to begin."""
        self._fit(trainer, self._first)

    def on_train_end(self, trainer: Trainer) -> None:
        """Fit to what the backbone gives now."""
        self._fit(trainer, self._last)
        trainer.state.weights_revision += 1

    def _fit(self, trainer: Trainer, loader: Iterable[Any]) -> None:
        inputs: list[torch.Tensor] = []
        hook = self._whitening.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            embed_all(trainer.model, loader, trainer.device)
        finally:
            hook.remove()
        self._whitening.fit(torch.cat([each.float().cpu() for each in inputs]), self._groups)
        logger.info('Whitening fitted to %d Documents', len(self._groups))


def can_whiten(dataset: ClassDataset) -> bool:
    """Whether the data says how similar things differ: items enough that are not alone."""
    counts = dataset.class_sizes
    return int((counts[counts > 1] - 1).sum()) >= _LEAST_ITEMS


def whitening_sample(dataset: ClassDataset, seed: int) -> ClassDataset:
    """Draw some items of classes that have several; all of them where they are few.

    Args:
        dataset: of training.
        seed: of the draw.

    Returns:
        At most `MAX_ITEMS` items.
    """
    chosen = choose_by_class(
        np.asarray(dataset.labels),
        np.random.default_rng(seed),
        MAX_ITEMS,
        _MAX_ITEMS_PER_CLASS,
        least_items_per_class=2,
    )
    return dataset.subset(chosen)
