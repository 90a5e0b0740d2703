"""The zoo in plain values: what each model is, and the options it takes."""

from __future__ import annotations

from typing import Any

from finetuner.excepts import ConfigError, unknown_name
from finetuner.models.backbones import Backbone
from finetuner.models.options import describe_options
from finetuner.models.zoo import BACKBONES


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """All there is to say of a backbone.

    Args:
        backbone: of the zoo, or a text encoder of one's own.

    Returns:
        `name`, `task`, `output_dim`, `input_size` (of pictures, in pixels; None for others),
        `architecture`, `description`, `weights`, and `options`, see `describe_options`.
    """
    return {
        'name': backbone.name,
        'task': backbone.task,
        'output_dim': backbone.dimension,
        'input_size': getattr(backbone, 'input_size', None),
        'architecture': backbone.architecture,
        'description': backbone.description,
        'weights': backbone.weights,
        'options': describe_options(backbone.options, backbone.left_out_options),
    }


def describe_backbones(task: str | None = None) -> list[dict[str, Any]]:
    """Describe the backbones of the zoo; see `describe_backbone`.

    Args:
        task: only those for it, such as `image-to-image`.

    Raises:
        ConfigError: there is no such task.
    """
    tasks = {backbone.task for backbone in BACKBONES.values()}
    if task is not None and task not in tasks:
        raise ConfigError(unknown_name('task', task, sorted(tasks)))
    chosen = (b for b in BACKBONES.values() if task in (None, b.task))
    return [describe_backbone(backbone) for backbone in chosen]
