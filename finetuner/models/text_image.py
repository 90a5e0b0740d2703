"""Models of two towers: one embeds texts, the other pictures, into one space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetuner.models.alignment import Alignment
from finetuner.models.backbones import (
    TEXT_TOWER,
    TOWERS,
    VISION_TOWER,
    TextImageBackbone,
    TextImageOptions,
    check_output_dim,
)
from finetuner.models.embedding_model import EmbeddingModel
from finetuner.models.tailor import build_embedding_model
from finetuner.models.zoo import parse_options, tower_options


class TextImageModel(torch.nn.Module):
    """Two embedding models whose embeddings are compared with each other.

    Attributes:
        towers: an `EmbeddingModel` under each of `TOWERS`.
    """

    def __init__(self, text: EmbeddingModel, vision: EmbeddingModel) -> None:
        """Join the two."""
        super().__init__()
        self.towers = torch.nn.ModuleDict({TEXT_TOWER: text, VISION_TOWER: vision})

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Embed pairs, or texts or pictures alone.

        Args:
            inputs: under each of `TOWERS` what that tower takes, `[num_pairs, ...]` each; under one
                of them alone for what is no pairs.

        Returns:
            `[2 * num_pairs, dimension]`, a text and its picture by turns; or `[num, dimension]`.
        """
        found = [self.towers[name](inputs[name]) for name in TOWERS if name in inputs]
        return found[0] if len(found) == 1 else torch.stack(found, dim=1).flatten(0, 1)


def build_text_image_model(
    backbone: TextImageBackbone,
    model_options: dict[str, Any] | None = None,
    output_dim: int | None = None,
) -> TextImageModel:
    """Build both towers; where they were not trained together, with heads that join them.

    Args:
        backbone: entry of the zoo.
        model_options: see `TextImageOptions`.
        output_dim: length of the embeddings; None takes that of the texts'.

    Raises:
        ConfigError: an option is wrong, or weights cannot be had.
    """
    options = parse_options(backbone, model_options)
    if not isinstance(options, TextImageOptions):
        raise TypeError(f'{type(options).__name__} are no options of {backbone.name}')
    check_output_dim(backbone, output_dim)
    (text, text_options), (picture, picture_options) = tower_options(backbone, options)
    text_model = build_embedding_model(text, text_options, output_dim)
    vision_model = build_embedding_model(picture, picture_options)
    if backbone.joined:
        vision_model.projection_head = build_alignment(backbone, output_dim)
    return TextImageModel(text_model, vision_model)


def build_alignment(backbone: TextImageBackbone, output_dim: int | None = None) -> Alignment:
    """The head that takes embeddings of pictures to where those of texts are."""
    picture = backbone.picture
    takes_roots = picture.architecture == 'cnn'
    return Alignment(picture.dimension, output_dim or backbone.dimension, takes_roots)
