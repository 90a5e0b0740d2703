"""Train a model of one's own in one's own process: Finetuner 0.4's `fit(model, ...)`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from docarray import Document

from finetuner.callback import CallbackDescription
from finetuner.console import console, print_changes, print_metrics
from finetuner.data.labelled import PreprocessFn
from finetuner.data.loading import CollateFn, OnBroken
from finetuner.data.sharded_batches import ShardedBatches
from finetuner.excepts import ConfigError, DataError
from finetuner.significance import Stage
from finetuner.training.callback_building import LoggedRun, build_callbacks, without_reports
from finetuner.training.callback_descriptions import prepare_callbacks
from finetuner.training.callbacks import ReportMetrics
from finetuner.training.module_sources import HeldSource, open_source
from finetuner.training.objectives import build_objective
from finetuner.training.optimization import Schedule, build_optimizer
from finetuner.training.progress import ProgressBar
from finetuner.training.ranks import join_ranks
from finetuner.training.setup import Pipeline
from finetuner.training.step import to_device
from finetuner.training.trainer import (
    BaseCallback,
    Trainer,
    resolve_device,
    seed_everything,
)

logger = logging.getLogger('finetuner.training')

Optimizer = torch.optim.Optimizer
Scheduler = torch.optim.lr_scheduler.LRScheduler
ConfigureOptimizer = Callable[[torch.nn.Module], Optimizer | tuple[Optimizer, Scheduler]]


@dataclass(frozen=True)
class ModuleFitOptions:
    """The arguments of `finetuner.fit(model=<nn.Module>, ...)` that say how to train."""

    epochs: int = 10
    batch_size: int | None = None
    loss: str | torch.nn.Module = 'SiameseLoss'
    configure_optimizer: ConfigureOptimizer | None = None
    learning_rate: float = 1e-3
    scheduler_step: Literal['batch', 'epoch'] = 'batch'
    device: str = 'cpu'
    preprocess_fn: PreprocessFn | None = None
    collate_fn: CollateFn | None = None
    num_items_per_class: int | None = None
    callbacks: Sequence[CallbackDescription | BaseCallback] = ()
    num_workers: int = 0
    freeze_batch_norm: bool = False
    views_per_instance: int = 2
    on_broken: OnBroken = 'stop'
    seed: int = 0

    def check(self) -> None:
        """Check what types do not say.

        Raises:
            ConfigError: a number is out of range or a name unknown.
        """
        for name in ('epochs', 'batch_size'):
            value = getattr(self, name)
            if name == 'batch_size' and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f'{name}: {value!r} is not a whole number of at least 1')
        if not self.learning_rate > 0:
            raise ConfigError(f'learning_rate: {self.learning_rate!r} is not more than 0')
        if self.scheduler_step not in ('batch', 'epoch'):
            raise ConfigError(f'scheduler_step: {self.scheduler_step!r} is not batch or epoch')
        if self.on_broken not in ('stop', 'skip'):
            raise ConfigError(f'on_broken: {self.on_broken!r} is not stop or skip')
        views = self.views_per_instance
        if isinstance(views, bool) or not isinstance(views, int) or views < 2:
            raise ConfigError(f'views_per_instance: {views!r} is not a whole number of 2 or more')
        if self.device not in ('cpu', 'cuda'):
            raise ConfigError(f'device: {self.device!r} is not cpu or cuda')


def fit_module(
    model: torch.nn.Module,
    train_data: Sequence[Document] | ShardedBatches,
    eval_data: Sequence[Document] | None,
    options: ModuleFitOptions,
) -> None:
    """Train an embedding model in place.

    In a script that torchrun started several times, its processes train together: each embeds its
    part of every batch, and all end with the same weights.

    Args:
        model: maps a batch, as `collate_fn` makes it, to embeddings `[batch, dimension]`.
        train_data: Documents of any kind that can be trained on, or a stream of batches; each process
            makes those of its own rank, which together are the batch, and `preprocess_fn`,
            `collate_fn` and what says how batches are made are the stream's.
        eval_data: of the same kind, for the validation loss.
        options: how.

    Raises:
        ConfigError: an option is wrong, or the model does not give embeddings.
        DataError: the Documents cannot be trained on.
        TrainingError: the loss became infinite or not a number.
    """
    options.check()
    seed_everything(options.seed)
    train, options = open_source(train_data, options)
    validation = None
    if eval_data is not None:
        # validation data is usually the smaller: that is no reason to refuse it
        least = replace(options, batch_size=min(train.shape.size, max(1, len(eval_data))))
        validation = HeldSource(eval_data, least, 'eval_data')
        if validation.kind != train.kind:
            raise DataError(f'eval_data is of kind {validation.kind}, train_data of {train.kind}')
    prepared = prepare_callbacks(options.callbacks, validation is not None)
    device = resolve_device(options.device)
    # those that torchrun started with this one, if it was torchrun
    ranks = join_ranks(device)
    train.check_ranks(ranks)
    pipeline = Pipeline(
        options.preprocess_fn,
        options.collate_fn,
        options.num_workers,
        options.seed,
        options.on_broken,
        ranks=ranks,
    )
    with pipeline, ProgressBar(console) as bar:
        train_loader = train.loader(pipeline)
        val_loader = None if validation is None else validation.loader(pipeline)
        dimension = _probe_dimension(model, train.two(pipeline), device)
        loss = options.loss
        if isinstance(loss, str):
            loss = train.loss(loss, dimension)
        objective = build_objective(train.kind, loss)
        optimizers, schedule = _optimizers(model, loss, options)
        caption = type(model).__name__.lower()
        name = f'{caption}-{time.strftime("%Y%m%d-%H%M%S")}'
        logged = LoggedRun('module', name, train=train.dataset)
        if not ranks.is_first:
            prepared = without_reports(prepared)
        report = _printer() if ranks.is_first else _no_report
        callbacks = build_callbacks(prepared, caption, pipeline, report, _no_examples, logged)
        trainer = Trainer(
            model,
            objective,
            optimizers,
            schedule=schedule,
            callbacks=[*callbacks, bar] if ranks.is_first else callbacks,
            device=device,
            freeze_batch_norm=options.freeze_batch_norm,
            ranks=ranks,
        )
        trainer.fit(train_loader, options.epochs, val_loader)
        train.finish(train_loader, ranks)


def _printer() -> ReportMetrics:
    """What prints metrics as they come; p-values with the metrics that came before them."""
    seen: dict[str, dict[str, float]] = {'before': {}, 'after': {}}

    def report(stage: Stage, values: dict[str, float]) -> None:
        if stage == 'p_value':
            print_changes(seen['before'], seen['after'], values)
        else:
            seen[stage].update(values)
            print_metrics(stage, values)

    return report


def _no_report(stage: Stage, values: dict[str, float]) -> None:
    """Of several processes the first one prints."""


def _no_examples(stage: str, results: dict[str, list[str]]) -> None:
    """Example results are kept for runs; here the user has the model at hand."""


def _probe_dimension(model: torch.nn.Module, inputs: Any, device: str) -> int:
    """Embed two items to see what the model gives, before training starts."""
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
