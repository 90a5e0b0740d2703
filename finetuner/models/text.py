"""Text encoders of transformers: built from folders, and written to such that others open too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuner.excepts import ConfigError
from finetuner.models.backbones import OWN_POOLER, TextSpec
from finetuner.models.clip import build_clip_text
from finetuner.models.embedding_model import Dense, EmbeddingModel, UnitLength
from finetuner.models.pooling import pool_tokens
from finetuner.models.text_layout import (
    DENSE,
    LENGTHS,
    MODULES,
    NORMALIZE,
    POOLING,
    TRANSFORMER,
    TextLayout,
    load_config,
    load_tokenizer,
    read_json,
)
from finetuner.models.transformers_import import as_config_error, import_transformers, quiet
from finetuner.models.vision import read_state_dict

# as every release of sentence-transformers reads them
_TYPES = 'sentence_transformers.models.'
_ACTIVATIONS = {
    'torch.nn.modules.linear.Identity': torch.nn.Identity,
    'torch.nn.modules.activation.Tanh': torch.nn.Tanh,
    'torch.nn.modules.activation.ReLU': torch.nn.ReLU,
    'torch.nn.modules.activation.GELU': torch.nn.GELU,
}


# of a training batch, texts of like length go through the transformer together: less padding
_ROWS_AT_ONCE = 16


class TextEncoder(torch.nn.Module):
    """A transformer and the pooling of its last layer."""

    def __init__(self, transformer: torch.nn.Module, tokenizer: Any, pooler: str) -> None:
        """Keep the parts.

        Args:
            transformer: of the transformers library.
            tokenizer: its tokenizer, of the transformers library.
            pooler: see `pool_tokens`; `OWN_POOLER` takes what the transformer makes of a text.
        """
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.pooler = pooler
        # A head for classification, which nothing here runs or trains; it is kept, out of sight of
        # `parameters`, for those who will miss it in the folder that this model is saved to.
        self._unused = (getattr(transformer, 'pooler', None),)
        if self._unused[0] is not None:
            transformer.pooler = None  # type: ignore[assignment]

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embed a batch.

        Args:
            inputs: `input_ids` and `attention_mask`, both `[batch, length]` int64.

        Returns:
            `[batch, dimension]`.
        """
        token_ids, mask = inputs['input_ids'], inputs['attention_mask']
        # in evaluation texts of like length stand together already
        by_length = self.training and mask.device.type == 'cpu' and len(mask) > _ROWS_AT_ONCE
        if not by_length or torch.compiler.is_compiling():
            return self._embed(token_ids, mask)
        lengths = mask.sum(dim=1)
        order = lengths.argsort(stable=True)
        parts = []
        for rows in order.split(_ROWS_AT_ONCE):
            longest = int(lengths[rows].max())
            parts.append(self._embed(token_ids[rows, :longest], mask[rows, :longest]))
        return torch.cat(parts)[order.argsort()]

    def _embed(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        states = self.transformer(input_ids=token_ids, attention_mask=mask)
        if self.pooler == OWN_POOLER:
            return states.text_embeds
        return pool_tokens(states.last_hidden_state, mask, self.pooler)

    def save_transformer(self, folder: Path) -> None:
        """Write the transformer as the transformers library does."""
        transformer: Any = self.transformer
        if self._unused[0] is not None:
            transformer.pooler = self._unused[0]
        try:
            transformer.save_pretrained(folder)
        finally:
            if self._unused[0] is not None:
                transformer.pooler = None


def build_text_encoder(
    layout: TextLayout, spec: TextSpec, pretrained: bool = True
) -> tuple[TextEncoder, list[torch.nn.Module]]:
    """Construct a transformer with its pooling, and the layers that come after it.

    Args:
        layout: of its folder.
        spec: says how to pool.
        pretrained: whether weights are loaded from the folder; random ones otherwise.

    Raises:
        ConfigError: the folder lacks weights or a tokenizer, or they do not fit.
    """
    tokenizer = load_tokenizer(layout.folder)
    network = build_transformer(layout, pretrained)
    # as it stays in the folder that this model is saved to
    tokenizer.model_max_length = spec.max_length
    return TextEncoder(network, tokenizer, spec.pooler), [
        UnitLength() if place is None else _load_dense(place) for place in layout.head
    ]


def build_transformer(layout: TextLayout, pretrained: bool = True) -> Any:
    """Construct the transformer of a folder.

    Args:
        layout: of its folder.
        pretrained: whether weights are loaded from the folder; random ones otherwise.

    Raises:
        ConfigError: the folder lacks weights, or they do not fit.
    """
    transformers = import_transformers()
    config = load_config(layout.transformer)
    if layout.spec.pooler == OWN_POOLER:
        with quiet(transformers), as_config_error(layout.folder.name):
            return build_clip_text(layout.transformer, pretrained)
    known = type(config) in transformers.AutoModelForTextEncoding._model_mapping
    auto = transformers.AutoModelForTextEncoding if known else transformers.AutoModel
    with quiet(transformers), as_config_error(layout.folder.name):
        if pretrained:
            return auto.from_pretrained(
                layout.transformer, dtype=torch.float32, trust_remote_code=False
            )
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)


def save_text_model(model: EmbeddingModel, spec: TextSpec, folder: Path) -> None:
    """Write a text model as a folder that this module and sentence-transformers can open.

    Args:
        model: its backbone is a `TextEncoder`, its projection head is made of `Dense` layers.
        spec: how texts become its input.
        folder: exists; files of these names are overwritten.
    """
    from safetensors.torch import save_file

    encoder: Any = model.backbone
    transformers = import_transformers()
    with quiet(transformers):
        encoder.save_transformer(folder)
        encoder.tokenizer.save_pretrained(folder)
    if spec.pooler == OWN_POOLER:
        # a folder of transformers says all there is
        return
    modules = [(TRANSFORMER, ''), (POOLING, '1_Pooling')]
    dimension = int(encoder.transformer.config.hidden_size)
    _write_json(folder / '1_Pooling' / 'config.json', _pooling_config(spec.pooler, dimension))
    for dense in model.projection_head.modules():
        if isinstance(dense, UnitLength):
            modules.append((NORMALIZE, f'{len(modules)}_Normalize'))
        elif isinstance(dense, Dense):
            name = f'{len(modules)}_Dense'
            modules.append((DENSE, name))
            _write_json(folder / name / 'config.json', _dense_config(dense))
            state = {f'linear.{key}': t for key, t in dense.linear.state_dict().items()}
            save_file(state, folder / name / 'model.safetensors')
    if spec.normalize:
        modules.append((NORMALIZE, f'{len(modules)}_Normalize'))
    _write_json(folder / LENGTHS, {'max_seq_length': spec.max_length, 'do_lower_case': False})
    _write_json(
        folder / 'config_sentence_transformers.json',
        {'__version__': {}, 'prompts': {}, 'default_prompt_name': None},
    )
    _write_json(
        folder / MODULES,
        [
            {'idx': i, 'name': str(i), 'path': path, 'type': f'{_TYPES}{kind}'}
            for i, (kind, path) in enumerate(modules)
        ],
    )


def _pooling_config(pooler: str, dimension: int) -> dict[str, Any]:
    flags = {'mean': 'mean_tokens', 'cls': 'cls_token', 'max': 'max_tokens'}
    return {
        'word_embedding_dimension': dimension,
        **{f'pooling_mode_{flag}': name == pooler for name, flag in flags.items()},
    }


def _dense_config(dense: Dense) -> dict[str, Any]:
    activation = type(dense.activation)
    return {
        'in_features': dense.linear.in_features,
        'out_features': dense.linear.out_features,
        'bias': dense.linear.bias is not None,
        'activation_function': f'{activation.__module__}.{activation.__name__}',
    }


def _load_dense(folder: Path) -> Dense:
    config = read_json(folder / 'config.json')
    name = config.get('activation_function', 'torch.nn.modules.activation.Tanh')
    if name not in _ACTIVATIONS:
        raise ConfigError(f'{folder.name}: activation {name!r} is not known here')
    linear = torch.nn.Linear(config['in_features'], config['out_features'], config['bias'])
    weights = next(
        (f for n in ('model.safetensors', 'pytorch_model.bin') if (f := folder / n).is_file()), None
    )
    if weights is None:
        raise ConfigError(f'{folder.name} has no weights: model.safetensors is missing')
    state = read_state_dict(str(weights), folder.name)
    linear.load_state_dict({key.removeprefix('linear.'): t for key, t in state.items()})
    return Dense(linear, _ACTIVATIONS[name]())


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
