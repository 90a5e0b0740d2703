"""Optimizers and learning-rate schedules by name, with their options checked."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from finetuner.config import OPTIMIZERS, SCHEDULERS, explain, whole_number_fields
from finetuner.excepts import ConfigError, unknown_name

# an option of the model's optimizer that torch's do not have: see `layer_groups`
LAYER_DECAY = 'layer_wise_lr_decay'
# Those that torch has as one kernel. On a CPU that takes a third to a half of the time of the loop
# over parameters that torch takes otherwise (EfficientNet-Lite0, 147 tensors: Adam 7.6 ms and not
# 20.5, SGD 4.9 and not 8.3; foreach is no faster than the loop), and on GPUs it is the fastest too.
_FUSED = ('Adagrad', 'Adam', 'AdamW', 'SGD')
# options by which users choose an implementation themselves, or need one that can do more
_IMPLEMENTATIONS = {'fused', 'foreach', 'capturable', 'differentiable'}


def build_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter] | list[dict[str, Any]],
    learning_rate: float,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Construct an optimizer of torch.

    Args:
        name: its class name in `torch.optim`.
        parameters: what it optimizes.
        learning_rate: its `lr`.
        options: its other arguments.

    Raises:
        ConfigError: the name, an option or a value is not allowed, or nothing is left to train.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(unknown_name('optimizer', name, OPTIMIZERS))
    class_ = getattr(torch.optim, name)
    taken = [p for p in inspect.signature(class_).parameters if p not in ('params', 'lr')]
    for option in options or {}:
        if option == 'lr':
            raise ConfigError("option 'lr' of the optimizer: say it as learning_rate")
        if option == LAYER_DECAY:
            raise ConfigError(f'option {option!r} is for the model, whose layers it goes by')
        if option not in taken:
            known = [*taken, LAYER_DECAY]
            raise ConfigError(unknown_name(f'option of optimizer {name}', option, known))
    trained = list(parameters)
    if not trained:
        raise ConfigError('nothing is left to train: every parameter of the model is frozen')
    chosen = dict(options or {})
    if name in _FUSED and not chosen.keys() & _IMPLEMENTATIONS:
        chosen['fused'] = True
    try:
        return class_(trained, lr=learning_rate, **chosen)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f'optimizer {name} does not accept {dict(options or {})}: {error}'
        ) from error


def build_model_optimizer(
    name: str,
    model: torch.nn.Module,
    learning_rate: float,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Construct the optimizer of what is trainable in a model.

    Args:
        name: its class name in `torch.optim`.
        model: what it optimizes.
        learning_rate: its `lr`.
        options: its other arguments, and `layer_wise_lr_decay`, see `layer_groups`.

    Raises:
        ConfigError: the name, an option or a value is not allowed, or nothing is left to train.
    """
    given = dict(options or {})
    decay = given.pop(LAYER_DECAY, None)
    if decay is None:
        trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
    elif name == 'LBFGS':
        raise ConfigError(
            f'optimizer LBFGS has one learning rate for all layers: leave out {LAYER_DECAY}, or '
            'take another, such as AdamW'
        )
    else:
        trained = layer_groups(model, learning_rate, decay)
    return build_optimizer(name, trained, learning_rate, given)


def layer_groups(
    model: torch.nn.Module, learning_rate: float, decay: float
) -> list[dict[str, Any]]:
    """Give deeper layers lower learning rates.

    The blocks of a model are its largest row of modules with numbered names, such as
    `encoder.layer.0` or `layer1`. A block at distance d from the last one learns at
    `learning_rate * decay**d`. What comes before the first block, embeddings or a stem, is one
    further away than it; what comes after a block is as near as that block, so heads learn at the
    full rate.

    Args:
        model: any module; `named_parameters` must have its layers in their order.
        learning_rate: of the last block.
        decay: above 0, at most 1.

    Returns:
        Parameter groups of what is trainable, the nearest to the end first.

    Raises:
        ConfigError: the decay is out of range, or the model is no row of blocks.
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
        raise ConfigError(f'{LAYER_DECAY}={decay!r} is no number above 0 and at most 1')
    blocks = _find_blocks(model)
    if not blocks:
        raise ConfigError(
            f'{LAYER_DECAY} needs a model made of a row of numbered blocks, such as layer1 to '
            'layer4, and this one is not: leave it out'
        )
    groups: dict[int, list[torch.nn.Parameter]] = {}
    reached = -1
    for name, parameter in model.named_parameters():
        inside = next((i for i, block in enumerate(blocks) if name.startswith(f'{block}.')), None)
        reached = reached if inside is None else inside
        if parameter.requires_grad:
            groups.setdefault(len(blocks) - 1 - reached, []).append(parameter)
    return [
        {'params': groups[distance], 'lr': learning_rate * decay**distance}
        for distance in sorted(groups)
    ]


def _find_blocks(model: torch.nn.Module) -> list[str]:
    """Names of the blocks that hold most of a model, in order; none where they hold little."""
    rows: dict[tuple[str, str], list[tuple[int, str, int]]] = {}
    tables: dict[torch.Tensor, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            tables[module.weight] = module.weight.numel()
        for name, child in module.named_children():
            size = sum(parameter.numel() for parameter in child.parameters())
            numbered = re.fullmatch(r'(.*?)(\d+)', name)
            if numbered and size:
                place = (int(numbered[2]), f'{path}.{name}'.lstrip('.'), size)
                rows.setdefault((path, numbered[1]), []).append(place)
    largest = max(
        (row for row in rows.values() if len(row) > 1),
        key=lambda row: sum(size for _, _, size in row),
        default=[],
    )
    # Tables of embeddings may be larger than all blocks. Branches side by side may be numbered, too.
    total = sum(parameter.numel() for parameter in model.parameters()) - sum(tables.values())
    if sum(size for _, _, size in largest) < total / 2:
        return []
    return [name for _, name, _ in sorted(largest)]


class SchedulerOptions(BaseModel):
    """`scheduler_options`.

    Attributes:
        num_warmup_steps: steps over which the rate rises from 0; below 1, a share of all steps.
        num_training_steps: steps until the schedule ends; None takes those of the run.
        scheduler_step: whether a step is a batch or an epoch.
        num_cycles: waves of `cosine` (0.5: once from the top to 0) or restarts.
        power: exponent of `polynomial`.
    """

    num_warmup_steps: float = Field(0, ge=0)
    num_training_steps: int | None = Field(None, ge=1)
    scheduler_step: Literal['batch', 'epoch'] = 'batch'
    num_cycles: float | None = Field(None, gt=0)
    power: float = Field(1.0, gt=0)

    _whole_numbers = whole_number_fields('num_training_steps')

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'


@dataclass
class Schedule:
    """A scheduler and when to step it."""

    scheduler: torch.optim.lr_scheduler.LRScheduler
    step_on: Literal['batch', 'epoch']


def parse_scheduler_options(options: Mapping[str, Any] | None) -> SchedulerOptions:
    """Validate `scheduler_options`.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    for option in options or {}:
        if option not in SchedulerOptions.__fields__:
            raise ConfigError(
                unknown_name('option of the scheduler', option, SchedulerOptions.__fields__)
            )
    try:
        return SchedulerOptions(**(options or {}))
    except ValidationError as error:
        raise ConfigError(f'scheduler_options: {explain(error)}') from error


def build_schedule(
    name: str | None,
    optimizer: torch.optim.Optimizer,
    options: Mapping[str, Any] | None,
    num_epochs: int,
    batches_per_epoch: int,
) -> Schedule | None:
    """Construct a learning-rate schedule, or None for a constant rate.

    Args:
        name: one of `SCHEDULERS`.
        optimizer: whose rate it multiplies by a factor in 0..1.
        options: see `SchedulerOptions`.
        num_epochs: epochs of the run.
        batches_per_epoch: batches in each.

    Raises:
        ConfigError: the name or an option is not allowed.
    """
    if name is None:
        if options:
            raise ConfigError('scheduler_options are given but no scheduler: name one')
        return None
    if name not in SCHEDULERS:
        raise ConfigError(unknown_name('scheduler', name, SCHEDULERS))
    parsed = parse_scheduler_options(options)
    steps = num_epochs * (batches_per_epoch if parsed.scheduler_step == 'batch' else 1)
    total = parsed.num_training_steps or steps
    warmup = parsed.num_warmup_steps
    factor = schedule_factor(name, round(warmup * total if warmup < 1 else warmup), total, parsed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return Schedule(scheduler, parsed.scheduler_step)


def schedule_factor(
    name: str, num_warmup: int, num_total: int, options: SchedulerOptions
) -> Callable[[int], float]:
    """The factor of the learning rate at each step, for one of `SCHEDULERS`.

    It rises linearly to 1 over the warm-up (`constant` has none), then follows the named shape
    over what is left and stays at its end.
    """

    def shape(progress: float) -> float:
        if name in ('constant', 'constant_with_warmup'):
            return 1.0
        if name == 'linear':
            return 1.0 - progress
        if name == 'polynomial':
            return (1.0 - progress) ** options.power
        if name == 'cosine':
            cycles = options.num_cycles or 0.5
            return 0.5 * (1.0 + math.cos(2 * math.pi * cycles * progress))
        cycles = options.num_cycles or 1.0
        within = 1.0 if progress >= 1.0 else (cycles * progress) % 1.0
        return 0.5 * (1.0 + math.cos(math.pi * within))

    def factor(step: int) -> float:
        # the first step of a warm-up would do nothing at a rate of exactly 0
        if step < num_warmup and name != 'constant':
            return (step + 1) / (num_warmup + 1)
        return shape(min(1.0, (step - num_warmup) / max(1, num_total - num_warmup)))

    return factor
