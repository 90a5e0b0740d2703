"""Load engines: of artifacts, and of pretrained models as they come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.artifact import Artifact, ModelSpec, load_artifact
from finetuner.engines import (
    InferenceEngine,
    OnnxEngine,
    TextImageEngine,
    TorchEngine,
    at_least_one,
)
from finetuner.excepts import ArtifactError, ConfigError, unknown_name
from finetuner.inputs import build_reader
from finetuner.models.backbones import (
    TOWERS,
    Backbone,
    TextImageBackbone,
    TextImageOptions,
    TextImageSpec,
)
from finetuner.models.zoo import (
    backbone_tokenizer,
    get_backbone,
    input_spec,
    parse_options,
    tower_options,
)
from finetuner.onnx_export import export_to_bytes
from finetuner.uris import DEFAULT_POLICY, PicturePolicy

if TYPE_CHECKING:
    pass

__all__ = [
    'DEVICES',
    'PRECISIONS',
    'InferenceEngine',
    'OnnxEngine',
    'TextImageEngine',
    'TorchEngine',
    'build_engine',
    'load_engine',
]

DEVICES = ('cpu', 'cuda')
PRECISIONS = ('fp32',)


def load_engine(
    artifact: str | Path | Artifact,
    batch_size: int = 32,
    select_model: str | None = None,
    device: str | None = None,
    is_onnx: bool | None = None,
    num_threads: int | None = None,
    precision: str = 'fp32',
    policy: PicturePolicy = DEFAULT_POLICY,
) -> InferenceEngine:
    """Load an artifact for encoding.

    Args:
        artifact: its directory, its zip, or an artifact already loaded.
        batch_size: inputs embedded at a time unless told otherwise.
        select_model: of an artifact of texts and pictures, `clip-text` or `clip-vision`; None takes
            both, each for the contents that are its own.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        is_onnx: True for ONNX Runtime, False for torch; None takes ONNX Runtime on a CPU when the
            artifact has a graph, since it is several times faster there.
        num_threads: for one operator of ONNX Runtime, or for torch as a whole; None is its choice.
        precision: `fp32`.
        policy: which pictures are opened.

    Returns:
        An engine.

    Raises:
        ArtifactError: there is no artifact, it is damaged, or it has no ONNX graph.
        ConfigError: an argument is out of range.
    """
    _check_arguments(batch_size, device, num_threads, precision)
    opened = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
    device = device or _best_device()

    def load(of_one: Artifact) -> InferenceEngine:
        runs_onnx = is_onnx
        if runs_onnx is None:
            runs_onnx = device == 'cpu' and of_one.onnx_path is not None
        reader = of_one.build_reader(policy)
        if not runs_onnx:
            _set_torch_threads(num_threads)
            return TorchEngine(of_one.build_model(), of_one.spec, reader, device, batch_size)
        if of_one.onnx_path is None:
            raise ArtifactError(
                'the artifact has no ONNX graph: train with to_onnx=True, or pass is_onnx=False'
            )
        graph = of_one.onnx_path
        return OnnxEngine(graph, of_one.spec, reader, device, batch_size, num_threads)

    if not isinstance(opened.spec.inputs, TextImageSpec):
        _check_single(opened.spec.backbone, select_model)
        return load(opened)
    engines = {name: load(opened.tower(name)) for name in _selected(select_model)}
    return engines[select_model] if select_model else TextImageEngine(engines, opened.spec)


def build_engine(
    name: str,
    model_options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    device: str | None = None,
    is_onnx: bool | None = False,
    num_threads: int | None = None,
    policy: PicturePolicy = DEFAULT_POLICY,
    select_model: str | None = None,
) -> InferenceEngine:
    """Load a pretrained backbone for encoding, as it was before any fine-tuning.

    Args:
        name: of the backbone.
        model_options: its options.
        batch_size: inputs embedded at a time unless told otherwise.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        is_onnx: export it and run it in ONNX Runtime; None does so on a CPU.
        num_threads: see `load_engine`.
        policy: which pictures are opened.
        select_model: see `load_engine`.

    Returns:
        An engine.

    Raises:
        ConfigError: the name, an option or an argument is wrong, or weights cannot be had.
    """
    from finetuner.models.tailor import build_embedding_model

    _check_arguments(batch_size, device, num_threads, 'fp32')
    backbone = get_backbone(name)
    options = parse_options(backbone, model_options)
    device = device or _best_device()

    def build(single: Backbone, its_options: dict[str, Any]) -> InferenceEngine:
        inputs = input_spec(single, parse_options(single, its_options))
        spec = ModelSpec(single.name, single.dimension, inputs)
        model = build_embedding_model(single, its_options).eval()
        reader = build_reader(inputs, backbone_tokenizer(single), policy)
        if not (device == 'cpu' if is_onnx is None else is_onnx):
            _set_torch_threads(num_threads)
            return TorchEngine(model, spec, reader, device, batch_size)
        graph = export_to_bytes(model, reader.example())
        return OnnxEngine(graph, spec, reader, device, batch_size, num_threads)

    if not isinstance(backbone, TextImageBackbone) or not isinstance(options, TextImageOptions):
        _check_single(name, select_model)
        return build(backbone, dict(model_options or {}))
    chosen = _selected(select_model)
    _check_comparable(backbone)
    towers = dict(zip(TOWERS, tower_options(backbone, options), strict=True))
    engines = {tower: build(*towers[tower]) for tower in chosen}
    if select_model:
        return engines[select_model]
    inputs = input_spec(backbone, options)
    return TextImageEngine(engines, ModelSpec(backbone.name, backbone.dimension, inputs))


def _selected(select_model: str | None) -> tuple[str, ...]:
    if select_model not in (None, *TOWERS):
        raise ConfigError(unknown_name('select_model', str(select_model), TOWERS))
    return TOWERS if select_model is None else (select_model,)


def _check_comparable(backbone: TextImageBackbone) -> None:
    if backbone.joined:
        raise ConfigError(
            f'{backbone.name} is a text encoder and a picture backbone whose embeddings cannot be '
            f'compared before they are trained together: fit it first, or build '
            f'{backbone.text.name!r} or {backbone.picture.name!r} by itself'
        )


def _check_single(name: str, select_model: str | None) -> None:
    if select_model is not None:
        raise ConfigError(f'select_model={select_model!r}: {name} is a single model: leave it out')


def _check_arguments(
    batch_size: int,
    device: str | None,
    num_threads: int | None,
    precision: str,
) -> None:
    at_least_one('batch_size', batch_size)
    if num_threads is not None:
        at_least_one('num_threads', num_threads)
    if device is not None and device not in DEVICES:
        raise ConfigError(unknown_name('device', device, DEVICES))
    if precision not in PRECISIONS:
        raise ConfigError(unknown_name('precision', precision, PRECISIONS))


def _best_device() -> str:
    import torch

    return 'cuda' if torch.cuda.is_available() else 'cpu'


def _set_torch_threads(num_threads: int | None) -> None:
    if num_threads is not None:
        import torch

        torch.set_num_threads(int(num_threads))
