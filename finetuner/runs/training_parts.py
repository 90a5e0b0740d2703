"""What the trainer of a run is made of: objective, optimizers, loaders, callbacks, step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuner.config import RunConfig
from finetuner.data.datasets import ClassDataset
from finetuner.data.labelled import PreprocessFn
from finetuner.data.loading import BatchLoader
from finetuner.data.neighbour_sampler import NeighbourClassSampler
from finetuner.data.numbering import NumberedBatches
from finetuner.data.samplers import SequentialSampler
from finetuner.excepts import ConfigError
from finetuner.models.backbones import TextImageBackbone
from finetuner.runs.closed_form import fit_alignment, fit_whitening, refit_alignment
from finetuner.runs.plan import Plan
from finetuner.training.averaging import WeightAveraging
from finetuner.training.hard_negatives import HardNegatives
from finetuner.training.losses import build_loss, build_miner, learns_class_weights
from finetuner.training.matryoshka import MatryoshkaObjective, build_for_lengths
from finetuner.training.objectives import Objective, build_objective, check_objective_runs
from finetuner.training.optimization import (
    LAYER_DECAY,
    build_model_optimizer,
    build_optimizer,
    build_schedule,
)
from finetuner.training.precision import check_precision
from finetuner.training.setup import Pipeline
from finetuner.training.step import StepOptions, check_closure
from finetuner.training.trainer import BaseCallback

if TYPE_CHECKING:
    import torch

_EMBED_BATCH_SIZE = 64
# loader processes cost more than they save on what is decoded in a second
_LEAST_ITEMS_FOR_WORKERS = 5_000


@dataclass(frozen=True)
class BuiltTraining:
    """Objective, optimizers and schedule: built once to check them and once to use them."""

    objective: Objective | MatryoshkaObjective
    optimizers: list[torch.optim.Optimizer]
    schedule: Any


def check_training(plan: Plan) -> None:
    """Check all that can be known of the training before there is a model.

    Raises:
        ConfigError: an option of a part is wrong, or parts do not go together.
    """
    import torch

    config = plan.config
    _check_hard_negatives(config, plan)
    _check_micro_batches(config, plan)
    has_gpu = config.device == 'cuda' and torch.cuda.is_available()
    check_precision(config.precision, 'cuda' if has_gpu else 'cpu')
    check_closure(step_options(plan, 1), config.optimizer == 'LBFGS')
    # a convolution, a matrix and vectors, as networks have them
    stand_in = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.Linear(2, 2))
    objective = build_training(plan, stand_in).objective
    if isinstance(objective, Objective):
        parts = iter([(plan.spec.dimension, objective)])
    else:
        parts = objective.by_length()
    for length, part in parts:
        check_objective_runs(part, plan.train.kind, length, plan.train.num_classes)


def build_training(plan: Plan, model: Any, batches_per_epoch: int = 1) -> BuiltTraining:
    """Build what computes the loss and what moves the weights.

    Args:
        plan: of the run.
        model: whose weights are moved.
        batches_per_epoch: for the schedule.

    Raises:
        ConfigError: an option of a part is wrong, or parts do not go together.
    """
    config = plan.config
    if config.loss is None or config.learning_rate is None:
        raise ValueError('the plan names a loss and a learning rate')
    if plan.validation is not None and learns_class_weights(config.loss, config.loss_options):
        raise ConfigError(
            f'loss {config.loss} learns weights for the classes of the training data, so it cannot '
            'judge validation data: leave out eval_data and val_split, or use EvaluationCallback'
        )
    objective = build_for_lengths(
        functools.partial(_build_objective, plan, config.loss),
        plan.spec.matryoshka_dims,
        plan.spec.dimension,
    )
    if config.optimizer == 'LBFGS' and config.loss == 'CrossBatchMemory':
        raise ConfigError(
            'optimizer LBFGS computes the loss several times a step, and CrossBatchMemory would '
            'remember the batch each time: take another optimizer, such as AdamW'
        )
    optimizers = [
        build_model_optimizer(
            config.optimizer, model, config.learning_rate, config.optimizer_options
        ),
        *_loss_optimizers(config, list(objective.parameters())),
    ]
    schedule = build_schedule(
        config.scheduler,
        optimizers[0],
        config.scheduler_options,
        config.epochs,
        batches_per_epoch,
    )
    return BuiltTraining(objective, optimizers, schedule)


def _build_objective(plan: Plan, loss_name: str, dimension: int) -> Objective:
    config = plan.config
    loss = build_loss(loss_name, config.loss_options, dimension, plan.train.num_classes)
    miner = build_miner(config.miner, config.miner_options)
    return build_objective(plan.train.kind, loss, miner, plan.batch.size)


def _loss_optimizers(
    config: RunConfig, weights: list[torch.nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """The optimizer of a loss with weights of its own, which it learns beside the model's."""
    if not weights:
        if config.loss_optimizer or config.loss_optimizer_options:
            raise ConfigError(
                f'loss {config.loss} has no parameters to optimize: leave out loss_optimizer and '
                'loss_optimizer_options'
            )
        return []
    named = config.loss_optimizer or config.optimizer
    if named == 'LBFGS':
        raise ConfigError(
            f'loss {config.loss} has weights of its own, which LBFGS cannot learn beside the '
            "model's: name another loss_optimizer, such as SGD"
        )
    options = config.loss_optimizer_options or (
        {} if config.loss_optimizer else config.optimizer_options
    )
    options = {name: value for name, value in options.items() if name != LAYER_DECAY}
    rate: Any = options.pop('lr', config.learning_rate)
    return [build_optimizer(named, weights, rate, options)]


def step_options(plan: Plan, batches_per_epoch: int) -> StepOptions:
    """What the steps of a run do beyond the plain one.

    Args:
        plan: of the run.
        batches_per_epoch: tells a short run from a long one.
    """
    config = plan.config
    return StepOptions(
        micro_batch_size=config.micro_batch_size,
        precision=config.precision,
        num_steps=config.epochs * batches_per_epoch,
        compile_model=config.compile_model,
    )


def with_own_callbacks(
    callbacks: list[BaseCallback],
    plan: Plan,
    model: Any,
    loader: BatchLoader,
    pipeline: Pipeline,
    read: PreprocessFn,
) -> list[BaseCallback]:
    """Put the callbacks that a run's config asks for around those that the user named.

    Args:
        callbacks: that look at weights, and choose them.
        plan: of the run.
        model: to be trained.
        loader: of the training data.
        pipeline: how Documents become inputs.
        read: how they do in training, before they are varied.
    """
    before: list[BaseCallback] = []
    if plan.config.ema_decay is not None:
        before.append(WeightAveraging(plan.config.ema_decay))
    batches = loader.batch_sampler
    sampler = batches.sampler if isinstance(batches, NumberedBatches) else None
    if isinstance(sampler, NeighbourClassSampler) and isinstance(plan.train, ClassDataset):
        build_loader = functools.partial(_class_loader, pipeline, read)
        before.append(HardNegatives(sampler, plan.train, build_loader, plan.config.seed))
    return [
        *fit_alignment(plan, model, pipeline),
        *before,
        *callbacks,
        *refit_alignment(plan, model, pipeline),
        *fit_whitening(plan, model, pipeline),
    ]


def _class_loader(pipeline: Pipeline, read: PreprocessFn, dataset: ClassDataset) -> BatchLoader:
    """Batches of items in order, as they are in training but not varied."""
    sampler = SequentialSampler(len(dataset), _EMBED_BATCH_SIZE)
    workers = pipeline.num_workers if len(dataset) > _LEAST_ITEMS_FOR_WORKERS else 0
    part = pipeline.ranks.part(whole_batches=True)
    return pipeline.loader(dataset, sampler, workers, pipeline.on_broken, read, part=part)


def freezes_batch_norm(config: RunConfig) -> bool:
    """Keep pretrained statistics, which small batches would ruin; an untrained net has none."""
    if config.freeze_batch_norm is not None:
        return config.freeze_batch_norm
    return config.model_options.get('weights') != 'none'


def _check_hard_negatives(config: RunConfig, plan: Plan) -> None:
    if not config.hard_negatives:
        return
    if not isinstance(plan.train, ClassDataset):
        raise ConfigError(
            'hard_negatives=True looks for classes that the model confuses, and data of kind '
            f'{plan.train.kind} has no classes: leave it out'
        )
    if config.sampler == 'random':
        raise ConfigError(
            "hard_negatives=True decides which classes stand in a batch, and sampler='random' "
            'leaves that to chance: leave one of them out'
        )


def _check_micro_batches(config: RunConfig, plan: Plan) -> None:
    """What the step would find as well, but not before the run has begun."""
    if config.micro_batch_size is None or config.micro_batch_size >= plan.batch.size:
        return
    whole = plan.backbone
    backbone = whole.picture if isinstance(whole, TextImageBackbone) else whole
    normalises = backbone.architecture == 'cnn' and not backbone.name.startswith('convnext')
    if normalises and not freezes_batch_norm(config):
        raise ConfigError(
            f'micro_batch_size: the batch normalisation of {backbone.name} would take the '
            'statistics of each micro-batch for those of the batch: pass freeze_batch_norm=True, '
            'or leave out micro_batch_size'
        )
