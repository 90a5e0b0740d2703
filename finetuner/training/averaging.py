"""An average of the weights over training, which errs less than the weights of its last step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from finetuner.training.trainer import BaseCallback, Trainer


class WeightAveraging(BaseCallback):
    """Keeps an exponential moving average of the weights that are trained.

    From the last batch of an epoch until the next epoch begins the model holds the average, so that
    validation, evaluation, other callbacks and the artifact see it; training goes on with the
    weights as it left them. Buffers, such as the statistics of batch normalisation, are the
    model's own throughout. After Polyak and Juditsky, Acceleration of Stochastic Approximation by
    Averaging (1992).

    Name it before all callbacks that look at the weights.
    """

    def __init__(self, decay: float) -> None:
        """Say how long to remember.

        Args:
            decay: how much of the average stays at each step, above 0 and below 1.
        """
        self._update = get_ema_multi_avg_fn(decay)
        self._average: dict[str, Tensor] = {}
        # the weights that are trained, while the model holds the average
        self._trained: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Add the weights of this step; after the last of the epoch, show the average."""
        weights = _weights(trainer.model)
        if not self._average:
            self._average = _copied(weights)
        else:
            # what was loaded may be on another device
            self._average = {n: self._average[n].to(w.device) for n, w in weights.items()}
            self._update(list(self._average.values()), list(weights.values()), 0)
        if trainer.state.batch + 1 == trainer.state.num_batches:
            self._show_average(trainer)

    def on_val_end(self, trainer: Trainer) -> None:
        """Show the average, where the epoch had fewer batches than it said."""
        self._show_average(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Show the average, where the epoch had fewer batches than it said."""
        self._show_average(trainer)

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """Put the weights back that are trained."""
        if self._trained:
            _fill(trainer.model, self._trained)
            self._trained = {}

    def state_dict(self) -> dict[str, Any]:
        """The average and, where the model holds that, the weights that are trained."""
        return {'average': _copied(self._average), 'trained': _copied(self._trained)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, the model being in the state that it was in then."""
        self._average = _copied(state['average'])
        self._trained = _copied(state['trained'])

    def _show_average(self, trainer: Trainer) -> None:
        if self._average and not self._trained:
            self._trained = _copied(_weights(trainer.model))
            _fill(trainer.model, self._average)


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """What of a model is trained, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _fill(model: torch.nn.Module, values: Mapping[str, Tensor]) -> None:
    weights = _weights(model)
    for name, value in values.items():
        weights[name].copy_(value)
