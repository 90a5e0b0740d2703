"""Train a model of one's own in one's own process: Finetuner 0.4's `fit(model, ...)`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from docarray import DocumentArray

from finetuner.console import console, print_metrics
from finetuner.data.contents import read_label
from finetuner.data.datasets import PreprocessFn
from finetuner.data.documents import check_class_data
from finetuner.data.loading import CollateFn
from finetuner.excepts import ConfigError, DataError
from finetuner.training.losses import build_loss
from finetuner.training.optimization import Schedule, build_optimizer
from finetuner.training.progress import ProgressBar
from finetuner.training.setup import (
    Description,
    Pipeline,
    build_callbacks,
    check_callbacks,
)
from finetuner.training.trainer import (
    BaseCallback,
    Trainer,
    resolve_device,
    seed_everything,
    to_device,
)

logger = logging.getLogger('finetuner.training')

Optimizer = torch.optim.Optimizer
Scheduler = torch.optim.lr_scheduler.LRScheduler
ConfigureOptimizer = Callable[[torch.nn.Module], Optimizer | tuple[Optimizer, Scheduler]]


@dataclass(frozen=True)
class ModuleFitOptions:
    """The arguments of `finetuner.fit(model=<nn.Module>, ...)` that say how to train."""

    epochs: int = 10
    batch_size: int = 256
    loss: str | torch.nn.Module = 'SiameseLoss'
    configure_optimizer: ConfigureOptimizer | None = None
    learning_rate: float = 1e-3
    scheduler_step: Literal['batch', 'epoch'] = 'batch'
    device: str = 'cpu'
    preprocess_fn: PreprocessFn | None = None
    collate_fn: CollateFn | None = None
    num_items_per_class: int | None = None
    callbacks: Sequence[Description | BaseCallback] = ()
    num_workers: int = 0
    freeze_batch_norm: bool = False
    seed: int = 0

    def check(self) -> None:
        """Check what types do not say.

        Raises:
            ConfigError: a number is out of range or a name unknown.
        """
        for name in ('epochs', 'batch_size'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f'{name}: {value!r} is not a whole number of at least 1')
        if not self.learning_rate > 0:
            raise ConfigError(f'learning_rate: {self.learning_rate!r} is not more than 0')
        if self.scheduler_step not in ('batch', 'epoch'):
            raise ConfigError(f'scheduler_step: {self.scheduler_step!r} is not batch or epoch')
        if self.device not in ('cpu', 'cuda'):
            raise ConfigError(f'device: {self.device!r} is not cpu or cuda')


def fit_module(
    model: torch.nn.Module,
    train_data: DocumentArray,
    eval_data: DocumentArray | None,
    options: ModuleFitOptions,
) -> None:
    """Train an embedding model in place.

    Args:
        model: maps a batch, as `collate_fn` makes it, to embeddings `[batch, dimension]`.
        train_data: class data.
        eval_data: class data for the validation loss.
        options: how.

    Raises:
        ConfigError: an option is wrong, or the model does not give embeddings.
        DataError: the Documents cannot be trained on.
        TrainingError: the loss became infinite or not a number.
    """
    options.check()
    seed_everything(options.seed)
    _check_data(train_data, options.batch_size, options, 'train_data')
    eval_batch_size = options.batch_size
    if eval_data is not None:
        # validation data is usually the smaller: that is no reason to refuse it
        eval_batch_size = min(eval_batch_size, max(1, len(eval_data)))
        _check_data(eval_data, eval_batch_size, options, 'eval_data')
    check_callbacks(
        [c for c in options.callbacks if not isinstance(c, BaseCallback)], eval_data is not None
    )
    device = resolve_device(options.device)
    pipeline = Pipeline(
        options.preprocess_fn, options.collate_fn, options.num_workers, options.seed
    )
    with pipeline, ProgressBar(console) as bar:
        items = options.num_items_per_class
        train_loader = pipeline.training_loader(train_data, options.batch_size, items, 'class')
        val_loader = None
        if eval_data is not None:
            val_loader = pipeline.training_loader(eval_data, eval_batch_size, items, 'class')
        dimension = _probe_dimension(model, pipeline, train_data, device)
        loss = options.loss
        if isinstance(loss, str):
            num_classes = len({read_label(doc) for doc in train_data})
            loss = build_loss(loss, None, dimension, num_classes)
        optimizers, schedule = _optimizers(model, loss, options)
        caption = type(model).__name__.lower()
        callbacks = build_callbacks(
            options.callbacks, caption, pipeline, print_metrics, _no_examples
        )
        trainer = Trainer(
            model,
            loss,
            optimizers,
            schedule=schedule,
            callbacks=[*callbacks, bar],
            device=device,
            freeze_batch_norm=options.freeze_batch_norm,
        )
        trainer.fit(train_loader, options.epochs, val_loader)


def _no_examples(stage: str, results: dict[str, list[str]]) -> None:
    """Example results are kept for runs; here the user has the model at hand."""


def _check_data(docs: DocumentArray, batch_size: int, options: ModuleFitOptions, name: str) -> None:
    try:
        check_class_data(docs, batch_size, options.num_items_per_class)
    except DataError as error:
        raise DataError(f'{name}: {error}') from error


def _probe_dimension(
    model: torch.nn.Module, pipeline: Pipeline, docs: DocumentArray, device: str
) -> int:
    """Embed two Documents to see what the model gives, before training starts."""
    probe = pipeline.evaluation_set(docs[:2], batch_size=2, workers=0)
    inputs, _ = next(iter(probe.loader))
    model.to(device)
    was_training = model.training
    model.eval()
    try:
        # not inference_mode: a lazy module makes its parameters here, and they must be trainable
        with torch.no_grad():
            output = model(to_device(inputs, torch.device(device)))
    except (RuntimeError, TypeError, ValueError) as error:
        shape = tuple(inputs.shape) if torch.is_tensor(inputs) else type(inputs).__name__
        raise ConfigError(
            f'the model does not take what preprocess_fn and collate_fn make of the Documents '
            f'({shape}): {error}'
        ) from error
    finally:
        model.train(was_training)
    if not torch.is_tensor(output) or output.ndim != 2:
        shape = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
        raise ConfigError(
            f'the model gives {shape} for two Documents, not embeddings [2, dimension]: pass '
            'to_embedding_model=True with input_size, or a model that ends in one vector each'
        )
    return output.shape[1]


def _optimizers(
    model: torch.nn.Module, loss: torch.nn.Module, options: ModuleFitOptions
) -> tuple[list[Optimizer], Schedule | None]:
    schedule = None
    if options.configure_optimizer is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers = [build_optimizer('Adam', trained, options.learning_rate)]
    else:
        configured: Any = options.configure_optimizer(model)
        if isinstance(configured, tuple):
            configured, scheduler = configured
            schedule = Schedule(scheduler, options.scheduler_step)
        if not isinstance(configured, Optimizer):
            raise ConfigError(
                f'configure_optimizer gave {type(configured).__name__}: it returns an optimizer, '
                'or an optimizer and a scheduler'
            )
        optimizers = [configured]
    if list(loss.parameters()):
        optimizers.append(build_optimizer('Adam', loss.parameters(), options.learning_rate))
    return optimizers, schedule
