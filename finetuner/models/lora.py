"""Low-rank adapters of text encoders, through PEFT: attached for training, merged when saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from finetuner.excepts import ConfigError, unknown_name
from finetuner.models.backbones import Backbone, TextBackbone, TextOptions
from finetuner.models.text import TextEncoder, build_transformer
from finetuner.models.transformers_import import import_transformers
from finetuner.models.zoo import parse_options

if TYPE_CHECKING:
    from finetuner.models.embedding_model import EmbeddingModel
    from finetuner.models.options import LoraOptions


def import_peft() -> Any:
    """Import PEFT, which imports transformers.

    Raises:
        ConfigError: it is not installed.
    """
    import_transformers()
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != 'peft':
            raise
        raise ConfigError(
            'model_options lora needs the package peft: pip install finetuner[lora]'
        ) from error
    return peft


def check_lora(backbone: Backbone, model_options: Mapping[str, Any], freeze: bool) -> None:
    """Check the adapters that `model_options` ask for, if any, on an encoder without weights.

    Args:
        backbone: whose options they are.
        model_options: as the user gave them.
        freeze: whether all but the last layer shall be frozen.

    Raises:
        ConfigError: a layer is not there or cannot be adapted, PEFT is missing, or `freeze`
            contradicts.
    """
    options = _lora_options(backbone, model_options)
    if options is None or not isinstance(backbone, TextBackbone):
        return
    if freeze:
        raise ConfigError(
            'freeze=True trains the projection head or the last layer alone, and model_options '
            'lora adapters of the other layers: leave one of them out'
        )
    from finetuner.models.encoder_files import find_encoder
    from finetuner.models.text_layout import read_layout

    layout = read_layout(find_encoder(backbone.source))
    with torch.device('meta'):
        network = build_transformer(layout, pretrained=False)
    _attach(TextEncoder(network, None, layout.spec.pooler), options)


def attach_lora(
    model: EmbeddingModel, backbone: Backbone, model_options: Mapping[str, Any]
) -> None:
    """Attach the adapters that `model_options` ask for, if any.

    Of the encoder only they are trained then, and the layers after it as before. They change
    nothing at first (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021).

    Args:
        model: of this backbone; changed in place.
        backbone: whose options they are.
        model_options: as the user gave them.

    Raises:
        ConfigError: a layer is not there or cannot be adapted, or PEFT is missing.
    """
    options = _lora_options(backbone, model_options)
    if options is not None and isinstance(model.backbone, TextEncoder):
        _attach(model.backbone, options)


def merge_lora(model: torch.nn.Module) -> None:
    """Add what adapters learned to the weights they adapt, and take them out; without any, nothing.

    Args:
        model: changed in place; it gives the same embeddings afterwards.
    """
    adapted = [module for module in model.modules() if getattr(module, 'peft_config', None)]
    if not adapted:
        return
    from finetuner.models.tailor import replace_module

    layer = import_peft().tuners.tuners_utils.BaseTunerLayer
    for network in adapted:
        for name, module in list(network.named_modules()):
            if isinstance(module, layer):
                module.merge()
                replace_module(network, name, module.get_base_layer())
        del network.peft_config


def _lora_options(backbone: Backbone, model_options: Mapping[str, Any]) -> LoraOptions | None:
    options = parse_options(backbone, model_options)
    return options.lora if isinstance(options, TextOptions) else None


def _attach(encoder: TextEncoder, options: LoraOptions) -> None:
    network = encoder.transformer
    targets = options.target_modules
    if targets is not None:
        _check_targets(network, targets)
    peft = import_peft()
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules='all-linear' if targets is None else list(targets),
    )
    without_weights = next(network.parameters()).is_meta
    try:
        peft.inject_adapter_in_model(config, network, low_cpu_mem_usage=without_weights)
    except ValueError as error:
        reason = ' '.join(str(error).split())[:300]
        raise ConfigError(f'model_options lora: {reason}') from error


def _check_targets(network: torch.nn.Module, targets: tuple[str, ...]) -> None:
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f'.{target}') for name in names):
            linear = {
                name.rpartition('.')[2]
                for name, module in network.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            raise ConfigError(unknown_name('layer in target_modules', target, sorted(linear)))
