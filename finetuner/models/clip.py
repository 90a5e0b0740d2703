"""The two towers of a CLIP of transformers, each a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuner.excepts import ConfigError
from finetuner.models.backbones import OWN_POOLER, PictureBackbone, PictureOptions, TextSpec
from finetuner.models.encoder_files import find_encoder
from finetuner.models.transformers_import import as_config_error, import_transformers, quiet

CONFIG = 'config.json'
_TEXT, _VISION = 'clip_text_model', 'clip_vision_model'


class ClipVision(torch.nn.Module):
    """The tower of pictures, its projection included."""

    def __init__(self, network: torch.nn.Module) -> None:
        """Keep the network, a `CLIPVisionModelWithProjection`."""
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        """Map `[batch, 3, size, size]` float32 to `[batch, dimension]`."""
        return self.network(pixel_values=pictures).image_embeds

    def save_config(self, folder: Path) -> None:
        """Write what is needed to build the network again."""
        config: Any = self.network.config
        config.save_pretrained(folder)


def build_clip_vision(backbone: PictureBackbone, options: PictureOptions) -> ClipVision:
    """Construct the tower of pictures of a CLIP, with the weights of its folder or none.

    Raises:
        ConfigError: the folder lacks files, or they do not fit.
    """
    transformers = import_transformers()
    folder = find_encoder(backbone.source)
    with quiet(transformers), as_config_error(folder.name):
        class_ = transformers.CLIPVisionModelWithProjection
        if options.weights == 'pretrained':
            return ClipVision(class_.from_pretrained(folder, dtype=torch.float32))
        return ClipVision(class_(_tower_config(folder, 'vision_config')))


def build_clip_text(folder: Path, pretrained: bool) -> torch.nn.Module:
    """Construct the tower of texts of a CLIP, which gives `text_embeds`.

    Args:
        folder: of the whole CLIP or of this tower.
        pretrained: whether the folder's weights are loaded.
    """
    class_ = import_transformers().CLIPTextModelWithProjection
    if pretrained:
        return class_.from_pretrained(folder, dtype=torch.float32)
    return class_(_tower_config(folder, 'text_config'))


def read_clip(folder: Path) -> tuple[int, int]:
    """The side of a CLIP's pictures in pixels, and the length of its embeddings.

    Args:
        folder: of the whole CLIP or of its tower of pictures.

    Raises:
        ConfigError: it has no config of a CLIP.
    """
    config = _tower_config(folder, 'vision_config')
    return int(config.image_size), int(config.projection_dim)


def clip_text_layout(config: Any) -> tuple[TextSpec, int, int] | None:
    """How texts enter a CLIP, the length of its embeddings, and the most tokens it takes.

    Args:
        config: of transformers.

    Returns:
        None for a config of anything else.
    """
    if config.model_type == 'clip':
        config = config.text_config
    if config.model_type != _TEXT:
        return None
    length = int(config.max_position_embeddings)
    return TextSpec(length, OWN_POOLER, normalize=True), int(config.projection_dim), length


def _tower_config(folder: Path, name: str) -> Any:
    transformers = import_transformers()
    with as_config_error(folder.name):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = getattr(config, name, config)
    if config.model_type not in (_TEXT, _VISION):
        raise ConfigError(f'model {folder.name!r} is a {config.model_type}, and no CLIP')
    return config
