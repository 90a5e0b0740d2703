"""The backbones one can name: what they are, what they take in, where their weights come from.

Nothing heavy is imported here: listing models costs nothing, building one imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from finetuner.config import explain
from finetuner.excepts import ConfigError, unknown_name
from finetuner.models.backbones import (
    PATCH_SIZE,
    Backbone,
    InputSpec,
    ModelOptions,
    PictureBackbone,
    PictureOptions,
    PictureSpec,
    TextBackbone,
    TextImageBackbone,
    TextImageOptions,
    TextImageSpec,
    TextOptions,
)
from finetuner.models.catalogue import (
    ALIASES,
    BACKBONES,
    DEFAULT_BACKBONE,
    DEFAULT_TEXT_BACKBONE,
    DEFAULT_TEXT_IMAGE_BACKBONE,
    JOINT,
    clip_backbone,
    join_backbones,
)
from finetuner.models.options import PicturePooler, check_option_names

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    'ALIASES',
    'BACKBONES',
    'DEFAULT_BACKBONE',
    'DEFAULT_TEXT_BACKBONE',
    'DEFAULT_TEXT_IMAGE_BACKBONE',
    'backbone_tokenizer',
    'encoder_backbone',
    'get_backbone',
    'input_spec',
    'parse_options',
    'tower_options',
    'weights_file',
]

_HUB_NAME = re.compile(r'[\w.-]+/[\w.-]+')


def get_backbone(name: str) -> Backbone:
    """Look a backbone up by its name or its Finetuner 0.8.1 display name.

    Args:
        name: of an entry of the zoo, the path of a folder with a text encoder or a CLIP, or the
            name of one on the Hugging Face hub, `organisation/model`; or of a text encoder and a
            picture backbone with a `+` between them, which joins the two.

    Raises:
        ConfigError: no backbone of that name; the nearest names are given.
    """
    backbone = BACKBONES.get(ALIASES.get(name, name))
    if backbone is not None:
        return backbone
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return encoder_backbone(folder.resolve().name, str(folder))
    if JOINT in name:
        return _joined_backbone(name)
    if name.startswith(('.', '~', '/', '\\')):
        raise ConfigError(f'there is no folder {str(folder)!r} that could hold a text encoder')
    if _HUB_NAME.fullmatch(name):
        return encoder_backbone(name, name)
    raise ConfigError(
        f'{unknown_name("model", name, (*BACKBONES, *ALIASES))} A text encoder or a CLIP may also '
        'be given by the path of its folder or its name on the Hugging Face hub, '
        'organisation/model'
    )


def _joined_backbone(name: str) -> TextImageBackbone:
    text, picture = (get_backbone(part) for part in name.split(JOINT, 1))
    if not isinstance(text, TextBackbone) or not isinstance(picture, PictureBackbone):
        raise ConfigError(
            f'model {name!r} joins {text.name} ({text.task}) and {picture.name} ({picture.task}): '
            f'name a text encoder first, then a picture backbone, such as '
            f'{DEFAULT_TEXT_IMAGE_BACKBONE}'
        )
    return join_backbones(text, picture)


def encoder_backbone(name: str, source: str) -> Backbone:
    """The entry of a text encoder or a CLIP that the zoo does not list.

    Args:
        name: what to call it: of a folder its last part, since the rest is private.
        source: where its files lie, as of `TextBackbone`.

    Raises:
        ConfigError: they cannot be had, or are of no such model.
    """
    from finetuner.models.encoder_files import find_encoder
    from finetuner.models.text_layout import read_json, read_layout

    folder = find_encoder(source)
    config = read_json(folder / 'config.json', {})
    if config.get('model_type') == 'clip':
        from finetuner.models.clip import read_clip

        size, dimension = read_clip(folder)
        return clip_backbone(name, source, dimension, size, 'CLIP of transformers')
    return TextBackbone(
        name=name,
        task='text-to-text',
        dimension=read_layout(folder).dimension,
        architecture='transformer',
        description='text encoder of transformers',
        weights='its folder, or none',
        source=source,
    )


def parse_options(backbone: Backbone, options: Mapping[str, Any] | None) -> ModelOptions:
    """Validate `model_options` of a backbone.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    given = dict(options or {})
    check_option_names(f'model {backbone.name}', given, backbone.options)
    try:
        parsed = backbone.options(**given)
    except ValidationError as error:
        raise ConfigError(f'model_options of {backbone.name}: {explain(error)}') from error
    if isinstance(backbone, PictureBackbone) and isinstance(parsed, PictureOptions):
        _check_picture_options(backbone, parsed)
    if isinstance(backbone, TextImageBackbone) and isinstance(parsed, TextImageOptions):
        for tower, of_tower in tower_options(backbone, parsed):
            parse_options(tower, of_tower)
    return parsed


def tower_options(
    backbone: TextImageBackbone, options: TextImageOptions
) -> tuple[tuple[Backbone, dict[str, Any]], ...]:
    """The two towers, that of texts first, each with the options that are its own."""
    given = options.dict(exclude_none=True)
    return tuple(
        (tower, {name: value for name, value in given.items() if name in tower.options.__fields__})
        for tower in (backbone.text, backbone.picture)
    )


def _check_picture_options(backbone: PictureBackbone, options: PictureOptions) -> None:
    if options.weights not in ('pretrained', 'none'):
        weights_file(options.weights, backbone.name)
    if options.pooler is not None and backbone.pooling is None:
        raise ConfigError(
            f'model_options of {backbone.name}: pooler {options.pooler!r} is for convolutional '
            'networks, and the embedding of a vision transformer is that of its class token: leave '
            'it out'
        )
    size = options.input_size or backbone.input_size
    if backbone.source and size != backbone.input_size:
        raise ConfigError(
            f'model_options of {backbone.name}: input_size {size} is not the {backbone.input_size} '
            'that it was trained on, and it has places for no others: leave it out'
        )
    if backbone.fixed_input_size and not backbone.source and size % PATCH_SIZE:
        raise ConfigError(
            f'model_options of {backbone.name}: input_size {size} is no multiple of {PATCH_SIZE}, '
            'the side of the patches it cuts pictures into'
        )
    if backbone.fixed_input_size and options.train_input_size not in (None, size):
        raise ConfigError(
            f'model_options of {backbone.name}: train_input_size must be input_size ({size}) or '
            'left out, since a transformer is built for one size'
        )


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


def input_spec(backbone: Backbone, options: ModelOptions) -> InputSpec:
    """How contents enter this backbone under these options.

    Raises:
        ConfigError: the files of a text encoder cannot be had, or an option goes beyond it.
    """
    if isinstance(backbone, PictureBackbone) and isinstance(options, PictureOptions):
        size, chosen = options.input_size or backbone.input_size, options.pooler_options
        given = {} if chosen is None else chosen.dict()
        pooler = PicturePooler(options.pooler or 'mean', **given)
        return PictureSpec(size, backbone.mean, backbone.std, pooler)
    if isinstance(backbone, TextBackbone) and isinstance(options, TextOptions):
        from finetuner.models.encoder_files import find_encoder
        from finetuner.models.text_layout import read_layout, text_spec

        return text_spec(read_layout(find_encoder(backbone.source)), options)
    if isinstance(backbone, TextImageBackbone) and isinstance(options, TextImageOptions):
        text, picture = (
            input_spec(tower, parse_options(tower, of_tower))
            for tower, of_tower in tower_options(backbone, options)
        )
        return TextImageSpec(text, picture)  # type: ignore[arg-type]
    raise TypeError(f'{type(options).__name__} are no options of {backbone.name}')


def backbone_tokenizer(backbone: Backbone) -> Tokenizer | None:
    """The tokenizer of a text backbone, None for others.

    Raises:
        ConfigError: its files cannot be had.
    """
    if isinstance(backbone, TextImageBackbone):
        backbone = backbone.text
    if not isinstance(backbone, TextBackbone):
        return None
    from finetuner.models.encoder_files import find_encoder
    from finetuner.models.text_layout import load_tokenizer

    return load_tokenizer(find_encoder(backbone.source)).backend_tokenizer
