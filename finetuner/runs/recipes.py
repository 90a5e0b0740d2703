"""What a run does where its config leaves it open: recipes, each measured on real data.

Where the figures are from: `docs/training.md` and `benchmarks/`. A value that the config names is
left as it is, and what depends on it falls back to what is safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetuner.config import RunConfig
from finetuner.data.documents import DataKind
from finetuner.models.backbones import Backbone, Modality, PictureBackbone, TextImageBackbone
from finetuner.models.zoo import (
    DEFAULT_BACKBONE,
    DEFAULT_TEXT_BACKBONE,
    DEFAULT_TEXT_IMAGE_BACKBONE,
)
from finetuner.training.setup import DEFAULT_BATCH_SIZE

# safe with any loss, and slow
_LEARNING_RATE = 1e-4
# the recipes were measured on these; of others nothing is known, and most are larger
_MEASURED = (DEFAULT_BACKBONE, DEFAULT_TEXT_BACKBONE, DEFAULT_TEXT_IMAGE_BACKBONE)
_CAUTION = 0.3
_SETTLED = (
    'loss',
    'loss_options',
    'learning_rate',
    'scheduler',
    'scheduler_options',
    'batch_size',
    'num_items_per_class',
    'augmentation',
    'whiten',
    'model_options',
    'matryoshka_dims',
)
# of weights that were never trained
_LEARNING_RATE_UNTRAINED = 1e-3
# adapters begin at nothing: at the rate of the weights they hardly learn
_OF_ADAPTERS = 10


@dataclass(frozen=True)
class Recipe:
    """Values that belong together.

    Attributes:
        loss: name of the loss.
        loss_options: its arguments.
        learning_rate: the highest of the schedule.
        scheduler: see `fit`.
        scheduler_options: its arguments.
        train_input_size: of pictures, in pixels; None for the size they are embedded at.
        whiten: whether a whitening is fitted.
        augmentation: how contents are varied; None leaves it to the kind of data.
        batch_size: Documents in a batch at most.
    """

    loss: str
    learning_rate: float
    loss_options: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = 'cosine'
    scheduler_options: dict[str, Any] = field(default_factory=lambda: {'num_warmup_steps': 0.15})
    train_input_size: int | None = None
    whiten: bool = False
    augmentation: str | None = None
    batch_size: int = DEFAULT_BATCH_SIZE


_RECIPES: dict[tuple[Modality, DataKind], Recipe] = {
    ('image', 'class'): Recipe(
        'MultiSimilarityLoss',
        1e-3,
        loss_options={'alpha': 2, 'beta': 50, 'base': 0.5},
        train_input_size=128,
        whiten=True,
    ),
    ('image', 'session'): Recipe('TripletMarginLoss', 2e-4),
    ('image', 'instance'): Recipe('NTXentLoss', 1e-4),
    ('image', 'scored_pair'): Recipe('CosineSimilarityLoss', 1e-4),
    ('text-image', 'text_image_pair'): Recipe('CLIPLoss', 1e-4, train_input_size=128),
    ('text', 'class'): Recipe('NTXentLoss', 2e-4, augmentation='light', batch_size=192),
    ('text', 'session'): Recipe('TripletMarginLoss', 2e-5),
    ('text', 'instance'): Recipe('NTXentLoss', 2e-5),
    ('text', 'scored_pair'): Recipe('CosineSimilarityLoss', 2e-5),
}
# towers that were trained together already, at the temperature where their training ended
_CLIP = Recipe('CLIPLoss', 1e-5, loss_options={'temperature': 0.01})


def apply_recipe(
    config: RunConfig, backbone: Backbone, kind: DataKind, can_whiten: bool
) -> RunConfig:
    """Fill in what a config leaves open.

    Args:
        config: as the user gave it.
        backbone: the model.
        kind: of the training data.
        can_whiten: whether the data allows it.

    Returns:
        A config that names everything the recipe has a say in.
    """
    recipe = _RECIPES.get((backbone.modality, kind)) or Recipe('TripletMarginLoss', _LEARNING_RATE)
    untrained = config.model_options.get('weights') == 'none'
    goes_on = config.model_artifact is not None
    if isinstance(backbone, TextImageBackbone) and not backbone.joined:
        recipe = _CLIP
    values: dict[str, Any] = {}
    own_loss = config.loss is not None and config.loss != recipe.loss
    if config.loss is None:
        values['loss'] = recipe.loss
        values['loss_options'] = {**recipe.loss_options, **config.loss_options}
    if config.learning_rate is None:
        adapters = config.model_options.get('lora') is not None
        rate = _learning_rate(recipe, backbone, untrained, own_loss, adapters)
        values['learning_rate'] = rate
    if config.scheduler is None and not config.scheduler_options:
        values['scheduler'] = recipe.scheduler
        values['scheduler_options'] = recipe.scheduler_options
    # what is frozen is computed once, unless it varies
    if config.augmentation is None and recipe.augmentation and not (untrained or config.freeze):
        values['augmentation'] = recipe.augmentation
    if config.whiten is None:
        values['whiten'] = recipe.whiten and can_whiten and not (untrained or goes_on)
    sizes = {'input_size', 'train_input_size'} & set(config.model_options)
    pictures = backbone.picture if isinstance(backbone, TextImageBackbone) else backbone
    if (
        recipe.train_input_size
        and isinstance(pictures, PictureBackbone)
        and not (sizes or untrained or goes_on or pictures.fixed_input_size)
    ):
        values['model_options'] = {
            **config.model_options,
            'train_input_size': min(recipe.train_input_size, pictures.input_size),
        }
    return config.copy(update=values)


def most_in_a_batch(backbone: Backbone, kind: DataKind) -> int:
    """Documents in a batch at most, where the config leaves that open."""
    recipe = _RECIPES.get((backbone.modality, kind))
    return recipe.batch_size if recipe else DEFAULT_BATCH_SIZE


def _learning_rate(
    recipe: Recipe, backbone: Backbone, untrained: bool, own_loss: bool, has_adapters: bool
) -> float:
    if untrained:
        return _LEARNING_RATE_UNTRAINED
    if own_loss:
        return min(_LEARNING_RATE, recipe.learning_rate)
    rate = recipe.learning_rate * (1 if backbone.name in _MEASURED else _CAUTION)
    return rate * _OF_ADAPTERS if has_adapters else rate


def settled_values(config: RunConfig) -> dict[str, Any]:
    """The values of a filled-in config that a user may have left open, to be kept with the run."""
    return {name: getattr(config, name) for name in _SETTLED}
