"""WiSE-FT: weights between those a model began with and those it was trained to."""

from __future__ import annotations

import logging
from typing import Any

import torch

from finetuner.training.trainer import BaseCallback, Trainer

logger = logging.getLogger('finetuner.training')


class WeightInterpolation(BaseCallback):
    """Keeps the weights that training begins with and mixes them with those it ends with.

    Name it after the callbacks that choose weights, and before those that fit something to them.
    """

    def __init__(self, alpha: float) -> None:
        """See `finetuner.callback.WiSEFTCallback`."""
        self._alpha = alpha
        self._initial: dict[str, torch.Tensor] = {}

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Copy the weights, unless training goes on from where it was interrupted."""
        if not self._initial:
            self._initial = {
                name: value.detach().cpu().clone()
                for name, value in trainer.model.state_dict().items()
                if torch.is_tensor(value) and value.is_floating_point()
            }

    def on_train_end(self, trainer: Trainer) -> None:
        """Mix them: all that are floats, running statistics too; counts stay as they are."""
        if self._alpha == 1:
            return
        trained = trainer.model.state_dict()
        mixed = {
            # a new tensor each: weights that are tied stand here under several names
            name: torch.lerp(first.to(trained[name]), trained[name], self._alpha)
            for name, first in self._initial.items()
            if name in trained and trained[name].shape == first.shape
        }
        if len(mixed) < len(self._initial):
            logger.warning(
                'WiSE-FT: %d of %d weights are no more what they were before training and are '
                'kept as trained',
                len(self._initial) - len(mixed),
                len(self._initial),
            )
        trainer.model.load_state_dict({**trained, **mixed})
        trainer.state.weights_revision += 1
        logger.info(
            'WiSE-FT: the weights are %.3g of those before training and %.3g of the trained ones',
            1 - self._alpha,
            self._alpha,
        )

    def state_dict(self) -> dict[str, Any]:
        """The weights that training began with."""
        return {'initial': self._initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._initial = dict(state['initial'])
