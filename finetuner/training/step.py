"""One step of training: a batch is embedded, its loss computed, and the weights are moved."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetuner.excepts import ConfigError, TrainingError
from finetuner.training.gradient_cache import (
    cached_backward,
    check_independent,
    first_rows,
    num_rows,
    split_rows,
)
from finetuner.training.precision import (
    DTYPES,
    Precision,
    check_precision,
    choose_precision,
    faster_precision,
    find_bf16_units,
    leaving_no_trace,
)
from finetuner.training.ranks import ALONE, Ranks

logger = logging.getLogger('finetuner.training')

_NUM_ROWS_TIMED = 32
_LONGEST_REASON = 300


@dataclass(frozen=True)
class StepOptions:
    """What a step does beyond the plain one.

    Attributes:
        micro_batch_size: inputs embedded at a time, see `cached_backward`; None for all at once.
        precision: of the embedding, `fp32`, `bf16` or `fp16`; weights and losses are float32
            either way. `auto` decides by the device, and by trying where that does not tell.
        num_steps: planned; a short run tries nothing out.
        compile_model: compile the model for training.
        compile_backend: of `torch.compile`.
    """

    micro_batch_size: int | None = None
    precision: str = 'fp32'
    num_steps: int | None = None
    compile_model: bool = False
    compile_backend: str = 'inductor'


class TrainingStep:
    """Steps of all optimizers on one batch after the other.

    Attributes:
        precision: that the model is run in; None until it was tried out.
        num_items: of the last batch, in all ranks together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        options: StepOptions,
        needs_closure: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """Decide how to step.

        Args:
            model: maps inputs to embeddings `[batch, dimension]`.
            objective: called with embeddings and labels, gives the loss.
            optimizers: of the model and, second, of the objective's own parameters.
            device: where both are.
            options: beyond the plain step.
            needs_closure: whether the first optimizer computes the loss several times a step.
            ranks: the processes of the training, each of which embeds a part of a batch.

        Raises:
            ConfigError: the options do not go with the device or the optimizer.
        """
        check_precision(options.precision, device.type)
        check_closure(options, needs_closure)
        self._model = model
        self._objective = objective
        self._optimizers = list(optimizers)
        self._device = device
        self._options = options
        self._needs_closure = needs_closure
        self._ranks = ranks
        self._num_steps = 0
        self.num_items = 0
        self._compiled: Any = None
        if options.compile_model:
            self._compiled = torch.compile(model, backend=options.compile_backend)
        choice = choose_precision(
            options.precision, device.type, options.num_steps, find_bf16_units(device.type)
        )
        self.precision = choice.precision
        if choice.precision is not None and options.precision != 'fp32':
            logger.info('Precision %s: %s', choice.precision, choice.reason)
        self._reason = choice.reason
        # only fp16 has so narrow a range that gradients must be scaled; otherwise it does nothing
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.precision == 'fp16')

    def __call__(self, inputs: Any, labels: Tensor) -> float | None:
        """Step once.

        Args:
            inputs: what the model takes; None where this rank's part of the batch is empty.
            labels: `[batch]` or `[batch, 2]`, of the same part.

        Returns:
            The loss of the batch, before the step; None, and no step, for one of several ranks
            that has less than two items in all of them.

        Raises:
            ConfigError: the model cannot be run on parts of a batch.
            TrainingError: the inputs cannot be divided, or the model not compiled.
        """
        inputs, labels = to_device(inputs, self._device), labels.to(self._device)
        self.num_items = self._ranks.total(len(labels), self._device)
        if self._ranks.size > 1 and self.num_items < 2:
            return None
        if self.precision is None:
            tried = self._try_precisions(inputs) if self._ranks.is_first else None
            self.precision = self._ranks.of_first(tried)
        if self._divides(inputs):
            check_independent(self._model)
        if self._num_steps or self._compiled is None:
            loss = self._step(inputs, labels)
        else:
            loss = self._first_compiled_step(inputs, labels)
        self._num_steps += 1
        return loss

    def compute_loss(self, inputs: Any, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar; for validation, where gradients are off."""
        inputs, labels = to_device(inputs, self._device), labels.to(self._device)
        if not self._divides(inputs):
            return self._loss(self._embed_part(inputs), labels)
        parts = split_rows(inputs, self._options.micro_batch_size or len(labels))
        return self._loss(torch.cat([self._embed(part) for part in parts]), labels)

    def _loss(self, embeddings: Tensor | None, labels: Tensor) -> Tensor:
        """The loss of the whole batch, of which this rank has embedded its part."""
        if self._ranks.size > 1:
            embeddings, labels = self._ranks.gather_batch(embeddings, labels)
        with self._ranks.equal_draws(self._num_steps):
            return self._objective(embeddings, labels)

    def state_dict(self) -> dict[str, Any]:
        """What a later step depends on, in tensors and plain values."""
        return {'precision': self.precision, 'scaler': self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.precision = state['precision']
        self._scaler.load_state_dict(dict(state['scaler']))

    def _step(self, inputs: Any, labels: Tensor) -> float:
        if self._needs_closure:
            seen: list[float] = []

            def closure() -> Tensor:
                loss = self._backward(inputs, labels)
                seen.append(float(loss.detach()))
                return loss

            # accelerate's wrapper keeps to itself what the step returns: its first loss
            self._optimizers[0].step(closure)  # type: ignore[arg-type]
            for optimizer in self._optimizers[1:]:
                optimizer.step()
            return seen[0]
        loss = self._backward(inputs, labels)
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        return float(loss.detach())

    def _backward(self, inputs: Any, labels: Tensor) -> Tensor:
        """The loss of a batch, its gradients left in the parameters."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        size = self._options.micro_batch_size
        if size is not None and self._divides(inputs):
            loss = cached_backward(
                self._embed,
                inputs,
                lambda embeddings: self._loss(embeddings, labels),
                size,
                self._scaler.scale,
                first_with_graph=self._compiled is not None,
            )
        else:
            loss = self._loss(self._embed_part(inputs), labels)
            # a loss of no tuples at all may know nothing of this rank's embeddings
            if self._ranks.size == 1 or loss.requires_grad:
                self._scaler.scale(loss).backward()
        self._ranks.add_gradients(self._model.parameters())
        self._ranks.add_gradients(self._objective.parameters(), average=True)
        return loss

    def _divides(self, inputs: Any) -> bool:
        size = self._options.micro_batch_size
        return size is not None and inputs is not None and num_rows(inputs) > size

    def _embed_part(self, inputs: Any) -> Tensor | None:
        return None if inputs is None else self._embed(inputs)

    def _embed(self, inputs: Any) -> Tensor:
        # compiled code is for one mode of the model: validation is not worth compiling it again
        compiled = self._compiled is not None and self._model.training
        return self._run(self._compiled if compiled else self._model, inputs, self.precision)

    def _run(self, model: Any, inputs: Any, precision: Precision | None) -> Tensor:
        dtype = DTYPES.get(precision or 'fp32')
        cast = torch.autocast(self._device.type, dtype) if dtype else contextlib.nullcontext()
        with cast:
            embeddings = model(inputs)
        return embeddings.float() if embeddings.dtype in DTYPES.values() else embeddings

    def _try_precisions(self, inputs: Any) -> Precision:
        """Run part of a batch through the model, forwards and backwards, in each precision."""
        if inputs is None:
            return 'fp32'
        part = first_rows(inputs, _NUM_ROWS_TIMED)

        def run(precision: Precision) -> None:
            self._run(self._model, part, precision).sum().backward()

        with leaving_no_trace(self._model):
            precision, gain = faster_precision(run)
        logger.info('Precision %s: %s, and bf16 is %.1fx as fast', precision, self._reason, gain)
        return precision

    def _first_compiled_step(self, inputs: Any, labels: Tensor) -> float:
        # here, for it takes a second to import, and most runs compile nothing
        from torch._dynamo.exc import TorchDynamoException

        logger.info('Compiling the model: the first batch takes as long as that')
        began = time.perf_counter()
        try:
            loss = self._step(inputs, labels)
        except TorchDynamoException as error:
            reason = ' '.join(str(error).split())[:_LONGEST_REASON]
            raise TrainingError(
                f'compile_model=True: the model cannot be compiled here ({reason}): leave '
                'compile_model out'
            ) from error
        logger.info('Model compiled: the first batch took %.0f s', time.perf_counter() - began)
        return loss


def check_closure(options: StepOptions, needs_closure: bool) -> None:
    """Check what does not go with an optimizer that computes the loss several times a step.

    Raises:
        ConfigError: micro-batches or fp16 are asked for with L-BFGS.
    """
    if not needs_closure:
        return
    if options.micro_batch_size is not None:
        raise ConfigError(
            'optimizer LBFGS computes the loss several times a step, each of which micro_batch_size '
            'would make two: leave one out, or take another optimizer, such as AdamW'
        )
    if options.precision == 'fp16':
        raise ConfigError(
            "optimizer LBFGS does not go with precision 'fp16', whose gradients are scaled: take "
            "'bf16' or 'fp32', or another optimizer, such as AdamW"
        )


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move a tensor, or the tensors in a list or mapping, to a device."""
    if torch.is_tensor(inputs):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs
