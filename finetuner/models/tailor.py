"""Make an embedding model of a backbone: head off, layers frozen, projection head on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuner.excepts import ConfigError, unknown_name
from finetuner.models.backbones import (
    Backbone,
    InputSpec,
    ModelOptions,
    PictureBackbone,
    PictureSpec,
    TextBackbone,
    TextSpec,
)
from finetuner.models.embedding_model import (
    Dense,
    EmbeddingModel,
    PictureNormalizer,
    build_projection_head,
)
from finetuner.models.pooling import build_picture_pooler
from finetuner.models.whitening import Whitening
from finetuner.models.zoo import input_spec, parse_options


@dataclass(frozen=True)
class Layer:
    """A module that ran, as `summary` saw it.

    Attributes:
        name: `linear_3`: its class and its place in the order of execution.
        module_name: its dotted name in the model.
        output_shape: with the batch as first dimension.
        num_parameters: its own, without those of modules inside it.
        trainable: whether any of them takes a gradient.
        is_embedding_layer: whether its output is `[batch, dimension]`, as it is or once flattened
            (a global pooling's is `[batch, dimension, 1, 1]`).
    """

    name: str
    module_name: str
    output_shape: tuple[int, ...]
    num_parameters: int
    trainable: bool
    is_embedding_layer: bool


def build_embedding_model(
    backbone: Backbone,
    model_options: dict[str, Any] | None = None,
    output_dim: int | None = None,
    freeze: bool = False,
    whitening: bool = False,
) -> EmbeddingModel:
    """Build a backbone of the zoo and make an embedding model of it.

    Args:
        backbone: entry of the zoo.
        model_options: its options, see `PictureOptions`.
        output_dim: length of the embedding; a projection head is attached when given.
        freeze: train the projection head only or, without one, the last layer with parameters.
        whitening: attach a `Whitening` after the backbone, to be fitted before training.

    Returns:
        A model taking pictures, uint8 `[batch, size, size, 3]`, or texts, `input_ids` and
        `attention_mask` of `[batch, length]` int64 each.

    Raises:
        ConfigError: an option is wrong, or the weights cannot be had.
    """
    options = parse_options(backbone, model_options)
    spec = input_spec(backbone, options)
    model = _build_parts(backbone, options, spec, output_dim, whitening)
    if freeze:
        freeze_backbone(model)
    return model


def _build_parts(
    backbone: Backbone,
    options: ModelOptions,
    spec: InputSpec,
    output_dim: int | None,
    whitening: bool,
) -> EmbeddingModel:
    if isinstance(backbone, TextBackbone) and isinstance(spec, TextSpec):
        from finetuner.models.encoder_files import find_encoder

        folder = find_encoder(backbone.source)
        pretrained = options.weights == 'pretrained'
        return build_text_model(folder, spec, output_dim, pretrained, whitening)
    if not isinstance(backbone, PictureBackbone) or not isinstance(spec, PictureSpec):
        raise TypeError(f'{backbone.name} is neither for pictures nor for texts')
    from finetuner.models import vision

    network = getattr(vision, backbone.builder)(backbone, options)
    for name in backbone.head:
        replace_module(network, name, torch.nn.Identity())
    if spec.pooler.name != 'mean' and backbone.pooling:
        replace_module(network, backbone.pooling, build_picture_pooler(spec.pooler))
    head: torch.nn.Module | None = None
    if output_dim and not whitening:
        head = build_projection_head(backbone.dimension, output_dim)
    elif whitening:
        roots = backbone.architecture == 'cnn'
        head = Whitening(backbone.dimension, output_dim, takes_roots=roots)
    model = EmbeddingModel(network, PictureNormalizer(spec), head)
    # convolutions of CPU and GPU alike run faster on channels-last weights
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_text_model(
    folder: Path,
    spec: TextSpec,
    output_dim: int | None = None,
    pretrained: bool = True,
    whitening: bool = False,
) -> EmbeddingModel:
    """Build the model of a folder with a text encoder.

    Args:
        folder: see `finetuner.models.text`.
        spec: how texts become its input.
        output_dim: length of the embedding; a projection head is attached when given.
        pretrained: whether the folder's weights are loaded.
        whitening: attach a `Whitening`, to be fitted before training; once saved it is one of the
            folder's dense layers.

    Raises:
        ConfigError: the folder's files are missing or do not fit.
    """
    from finetuner.models.text import build_text_encoder
    from finetuner.models.text_layout import read_layout

    layout = read_layout(folder)
    encoder, dense = build_text_encoder(layout, spec, pretrained)
    head: list[torch.nn.Module] = [*dense]
    if whitening:
        head.append(Whitening(layout.dimension, output_dim))
    elif output_dim:
        head.append(Dense(build_projection_head(layout.dimension, output_dim)))
    projection_head = torch.nn.Sequential(*head) if head else None
    return EmbeddingModel(encoder, projection_head=projection_head, unit_length=spec.normalize)


def freeze_backbone(model: EmbeddingModel) -> None:
    """Train the projection head alone or, where nothing of it is trained, the last layer."""
    head = model.projection_head.parameters()
    freeze_all_but_last(model.backbone, keep_last=not any(p.requires_grad for p in head))


def replace_module(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put `module` where the dotted `name` is."""
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)


def freeze_all_but_last(model: torch.nn.Module, keep_last: bool) -> None:
    """Stop gradients everywhere, but from the last layer on when `keep_last`.

    The last layer is the last with a matrix or convolution of weights; the scale and shift of a
    normalisation after it are trained with it.
    """
    model.requires_grad_(False)
    if not keep_last:
        return
    own = [list(module.parameters(recurse=False)) for module in model.modules()]
    last = max((i for i, ps in enumerate(own) if any(p.ndim > 1 for p in ps)), default=0)
    for parameters in own[last:]:
        for parameter in parameters:
            parameter.requires_grad_(True)


def freeze_layers(model: torch.nn.Module, names: Sequence[str], layers: list[Layer]) -> None:
    """Stop gradients in the named layers.

    Args:
        model: any module.
        names: names as `summary` gives them (`linear_1`) or dotted module names (`encoder.0`).
        layers: what `summary` gave for this model.

    Raises:
        ConfigError: a name is unknown.
    """
    module_names = {layer.name: layer.module_name for layer in layers}
    known = {*module_names, *(name for name, _ in model.named_modules() if name)}
    for name in names:
        if name not in known:
            raise ConfigError(unknown_name('layer', name, known))
        model.get_submodule(module_names.get(name, name)).requires_grad_(False)


def summary(
    model: torch.nn.Module, input_size: Sequence[int], input_dtype: str = 'float32'
) -> list[Layer]:
    """Run the model once on random input and list its modules in order of execution.

    Args:
        model: any module; it is left as it was.
        input_size: shape of one input, without the batch.
        input_dtype: name of a torch dtype.

    Raises:
        ConfigError: the model does not run on such an input.
    """
    layers: list[Layer] = []
    hooks = []
    for module_name, module in model.named_modules():
        if not module_name or isinstance(module, (torch.nn.Sequential, torch.nn.ModuleList)):
            continue

        def record(
            module: torch.nn.Module, _: Any, output: Any, module_name: str = module_name
        ) -> None:
            shape = tuple(output.shape) if torch.is_tensor(output) else ()
            own = list(module.parameters(recurse=False))
            layers.append(
                Layer(
                    name=f'{type(module).__name__.lower()}_{len(layers) + 1}',
                    module_name=module_name,
                    output_shape=shape,
                    num_parameters=sum(p.numel() for p in own),
                    trainable=any(p.requires_grad for p in own),
                    is_embedding_layer=len(shape) >= 2 and set(shape[2:]) <= {1},
                )
            )

        hooks.append(module.register_forward_hook(record))
    try:
        _run(model, _random_input(model, input_size, input_dtype), input_size)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def to_embedding_model(
    model: torch.nn.Module,
    input_size: Sequence[int] | None = None,
    input_dtype: str = 'float32',
    layer_name: str | None = None,
    freeze: bool | Sequence[str] = False,
    projection_head: torch.nn.Module | None = None,
    output_dim: int | None = None,
) -> torch.nn.Module:
    """Cut a model of one's own after a layer and, if wished, freeze it and attach a head.

    Modules that run after the chosen layer are replaced by identities; the cut model is then run
    and compared with what that layer gave in the whole model, so that a forward method that
    computes outside its modules is found out here and not in a ruined embedding.

    Args:
        model: any `torch.nn.Module`; a copy is changed, not the model itself.
        input_size: shape of one input, without the batch; needed to see the order of the layers.
        input_dtype: name of a torch dtype.
        layer_name: layer whose output is the embedding, by its name in `summary` or its dotted
            module name; None keeps the last one with a two-dimensional output.
        freeze: True freezes all but the projection head, a list freezes the layers it names.
        projection_head: module attached at the end; always trainable.
        output_dim: attaches a linear projection head of that length instead.

    Returns:
        The embedding model.

    Raises:
        ConfigError: an argument is wrong, or the model cannot be cut there.
    """
    if input_size is None:
        raise ConfigError('input_size is needed to make an embedding model: the shape of one input')
    if projection_head is not None and output_dim is not None:
        raise ConfigError('projection_head and output_dim exclude each other: give one of them')
    result = copy.deepcopy(model)
    layers = summary(result, input_size, input_dtype)
    chosen = _choose_layer(layers, layer_name)
    _cut_after(result, layers, chosen, _random_input(result, input_size, input_dtype), input_size)
    if freeze is True:
        result.requires_grad_(False)
    elif freeze:
        freeze_layers(result, freeze, layers)
    if output_dim is not None:
        projection_head = build_projection_head(chosen.output_shape[1], output_dim)
    if projection_head is None:
        return result
    return EmbeddingModel(result, projection_head=projection_head)


def _choose_layer(layers: list[Layer], layer_name: str | None) -> Layer:
    candidates = [layer for layer in layers if layer.is_embedding_layer]
    if not candidates:
        raise ConfigError(
            'no layer of this model gives a two-dimensional output [batch, dimension]'
        )
    if layer_name is None:
        return candidates[-1]
    for layer in candidates:
        if layer_name in (layer.name, layer.module_name):
            return layer
    raise ConfigError(unknown_name('layer', layer_name, [layer.name for layer in candidates]))


def _cut_after(
    model: torch.nn.Module,
    layers: list[Layer],
    chosen: Layer,
    probe: torch.Tensor,
    input_size: Sequence[int],
) -> None:
    """Replace every module that ran after `chosen` by an identity, and check the cut."""
    captured: list[torch.Tensor] = []
    hook = model.get_submodule(chosen.module_name).register_forward_hook(
        lambda _module, _inputs, output: captured.append(output)
    )
    _run(model, probe, input_size)
    hook.remove()
    around = chosen.module_name.split('.')
    ancestors = {'.'.join(around[: depth + 1]) for depth in range(len(around))}
    for layer in layers[layers.index(chosen) + 1 :]:
        # a module that holds the chosen one ends after it, but must stay
        if layer.module_name not in ancestors:
            replace_module(model, layer.module_name, torch.nn.Identity())
    output = _run(model, probe, input_size)
    if not torch.is_tensor(output) or not torch.equal(output, captured[-1].flatten(1)):
        raise ConfigError(
            f'the model cannot be cut after layer {chosen.name!r} ({chosen.module_name}): its '
            'forward method computes outside its modules after that layer, or runs a module both '
            'before and after it. Pass a model that ends there already, without to_embedding_model'
        )


def _random_input(
    model: torch.nn.Module, input_size: Sequence[int], input_dtype: str
) -> torch.Tensor:
    dtype = getattr(torch, input_dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f'input_dtype {input_dtype!r} is no torch dtype, such as float32 or int64'
        )
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        values = torch.rand(2, *input_size, generator=generator).to(dtype)
    else:
        values = torch.randint(0, 2, (2, *input_size), generator=generator).to(dtype)
    return values.to(device)


def _run(model: torch.nn.Module, probe: torch.Tensor, input_size: Sequence[int]) -> Any:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return model(probe)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f'the model does not run on an input of shape {tuple(probe.shape)} '
            f'(input_size={tuple(input_size)} and a batch of 2): {error}'
        ) from error
    finally:
        model.train(was_training)
