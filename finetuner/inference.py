"""Load engines: of artifacts, and of pretrained models as they come."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
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
from finetuner.inputs import InputReader, build_reader
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
from finetuner.openvino_engine import OpenvinoEngine, has_openvino
from finetuner.precision_record import (
    FP32,
    GRAPH_ENGINES,
    INT8,
    ONNX_ENGINE,
    OPENVINO_ENGINE,
    Candidate,
)
from finetuner.uris import DEFAULT_POLICY, PicturePolicy

if TYPE_CHECKING:
    from finetuner.models.embedding_model import EmbeddingModel

__all__ = [
    'DEVICES',
    'ENGINES',
    'PRECISIONS',
    'InferenceEngine',
    'OnnxEngine',
    'OpenvinoEngine',
    'TextImageEngine',
    'TorchEngine',
    'build_engine',
    'load_engine',
]

logger = logging.getLogger('finetuner.inference')

DEVICES = ('cpu', 'cuda')
ENGINES = ('auto', *GRAPH_ENGINES, 'torch', 'torch-compiled')
# of torch on a GPU
HALF_PRECISIONS = ('fp16', 'bf16')
PRECISIONS = ('auto', FP32, INT8, *HALF_PRECISIONS)


def load_engine(
    artifact: str | Path | Artifact,
    batch_size: int = 32,
    select_model: str | None = None,
    device: str | None = None,
    is_onnx: bool | None = None,
    num_threads: int | None = None,
    precision: str = 'auto',
    policy: PicturePolicy = DEFAULT_POLICY,
    engine: str = 'auto',
) -> InferenceEngine:
    """Load an artifact for encoding.

    Args:
        artifact: its directory, its zip, or an artifact already loaded.
        batch_size: inputs embedded at a time unless told otherwise.
        select_model: of an artifact of texts and pictures, `clip-text` or `clip-vision`; None takes
            both, each for the contents that are its own.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        is_onnx: True for an engine of ONNX graphs, False for torch; None takes the graph on a CPU
            when the artifact has one, since it is several times faster there.
        num_threads: for one operator of ONNX Runtime, for a batch in OpenVINO, or for torch as a
            whole; None is its choice.
        precision: `fp32`, `int8` (a graph that the run wrote), on a GPU `fp16` or `bf16`; `auto`
            takes what the artifact says of itself, `fp32` where that is nothing.
        policy: which pictures are opened.
        engine: `onnx`, `openvino`, `torch` or `torch-compiled`; `auto` takes the one that the
            artifact says was the fastest, if it is installed, and ONNX Runtime otherwise. Where
            the precision is `auto`, too, and the one to prefer cannot be loaded here, the next
            fastest is taken, and the log says so.

    Returns:
        An engine.

    Raises:
        ArtifactError: there is no artifact, it is damaged, or it has no graph of that precision.
        ConfigError: an argument is out of range.
    """
    _check_arguments(batch_size, device, num_threads)
    opened = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
    asked = _Asked.checked(engine, precision, is_onnx, device)

    def load(of_one: Artifact) -> InferenceEngine:
        *preferred, last = _resolve(asked, of_one)
        for candidate in preferred:
            try:
                return build(of_one, *candidate)
            except ArtifactError as error:
                logger.warning('%s in %s, the fastest, is left out: %s', *candidate, error)
        return build(of_one, *last)

    def build(of_one: Artifact, its_precision: str, runner: str) -> InferenceEngine:
        reader = of_one.build_reader(policy)
        if runner not in GRAPH_ENGINES:
            model = of_one.build_model()
            return _torch_engine(model, of_one.spec, reader, asked, batch_size, num_threads)
        graph = of_one.graph(its_precision)
        return _graph_engine(
            graph, of_one.spec, reader, runner, asked.device, batch_size, num_threads, its_precision
        )

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
    engine: str = 'auto',
    precision: str = 'fp32',
) -> InferenceEngine:
    """Load a pretrained backbone for encoding, as it was before any fine-tuning.

    Args:
        name: of the backbone.
        model_options: its options.
        batch_size: inputs embedded at a time unless told otherwise.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        is_onnx: export it and run it in ONNX Runtime; None does so on a CPU. False, the default,
            is what an `engine` of ONNX graphs overrules.
        num_threads: see `load_engine`.
        policy: which pictures are opened.
        select_model: see `load_engine`.
        engine: see `load_engine`; `auto` does as `is_onnx` says.
        precision: `fp32`, or `auto`, which is the same; on a GPU `fp16` or `bf16`. There is no
            int8: it is measured on the data of a run.

    Returns:
        An engine.

    Raises:
        ConfigError: the name, an option or an argument is wrong, or weights cannot be had.
    """
    from finetuner.models.tailor import build_embedding_model

    _check_arguments(batch_size, device, num_threads)
    if precision == INT8:
        raise ConfigError(
            f'{name} as it comes has no int8 graph: a run measures one and writes it into its '
            "artifact, with export_precision='int8' or 'auto'"
        )
    # the default says nothing against an engine that is named
    says = None if is_onnx is False and engine in GRAPH_ENGINES else is_onnx
    asked = _Asked.checked(engine, precision, says, device)
    backbone = get_backbone(name)
    options = parse_options(backbone, model_options)
    runner = _without_artifact(asked)

    def build(single: Backbone, its_options: dict[str, Any]) -> InferenceEngine:
        inputs = input_spec(single, parse_options(single, its_options))
        spec = ModelSpec(single.name, single.dimension, inputs)
        model = build_embedding_model(single, its_options).eval()
        reader = build_reader(inputs, backbone_tokenizer(single), policy)
        if runner not in GRAPH_ENGINES:
            return _torch_engine(model, spec, reader, asked, batch_size, num_threads)
        graph = export_to_bytes(model, reader.example())
        return _graph_engine(
            graph, spec, reader, runner, asked.device, batch_size, num_threads, FP32
        )

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


@dataclass(frozen=True)
class _Asked:
    """What was asked for, fit together.

    Attributes:
        engine: one of `ENGINES`.
        precision: one of `PRECISIONS`.
        is_onnx: as in `load_engine`.
        device: `cpu` or `cuda`.
    """

    engine: str
    precision: str
    is_onnx: bool | None
    device: str

    @classmethod
    def checked(
        cls, engine: str, precision: str, is_onnx: bool | None, device: str | None
    ) -> _Asked:
        """Refuse what cannot be together.

        Raises:
            ConfigError: an argument is unknown, or contradicts another; says which.
        """
        if engine not in ENGINES:
            raise ConfigError(unknown_name('engine', engine, ENGINES))
        if precision not in PRECISIONS:
            raise ConfigError(unknown_name('precision', precision, PRECISIONS))
        of_graphs = engine in GRAPH_ENGINES
        if is_onnx is not None and engine != 'auto' and bool(is_onnx) != of_graphs:
            raise ConfigError(
                f'engine={engine!r} and is_onnx={is_onnx!r} contradict each other: leave one out'
            )
        runs_torch = is_onnx is False or engine.startswith('torch')
        if device is None:
            device = 'cpu' if engine == OPENVINO_ENGINE or precision == INT8 else best_device()
        if precision == INT8 and runs_torch:
            raise ConfigError(
                "precision='int8' is that of a graph, which torch does not run: take "
                f'engine={ONNX_ENGINE!r} or {OPENVINO_ENGINE!r}'
            )
        if device != 'cpu' and (engine == OPENVINO_ENGINE or precision == INT8):
            what = 'int8' if precision == INT8 else OPENVINO_ENGINE
            raise ConfigError(f"{what} is for CPUs: take device='cpu', or another")
        if precision in HALF_PRECISIONS and (device == 'cpu' or of_graphs or is_onnx):
            raise ConfigError(
                f"precision={precision!r} is that of torch on a GPU: it needs device='cuda' and "
                "engine 'torch' or 'torch-compiled'; on a CPU take 'fp32' or 'int8'"
            )
        return cls(engine, precision, is_onnx, device)


def _resolve(asked: _Asked, artifact: Artifact) -> list[Candidate]:
    """Precisions and engines for an artifact: the one to take, and those to take in its place."""
    wants_graph = asked.engine in GRAPH_ENGINES or asked.precision == INT8 or bool(asked.is_onnx)
    if artifact.onnx_path is None:
        if wants_graph:
            raise ArtifactError(
                'the artifact has no ONNX graph: train with to_onnx=True, or pass is_onnx=False'
            )
        return [(FP32, _torch_name(asked))]
    if not wants_graph and (asked.engine != 'auto' or asked.is_onnx is False):
        return [(FP32, _torch_name(asked))]
    if asked.device != 'cpu':
        # whether ONNX Runtime has a GPU is another matter; torch has
        return [(FP32, ONNX_ENGINE if wants_graph else _torch_name(asked))]
    precision = None if asked.precision == 'auto' else asked.precision
    if asked.engine == 'auto':
        installed = GRAPH_ENGINES if has_openvino() else (ONNX_ENGINE,)
    else:
        installed = (asked.engine,)
    found = [(precision or FP32, ONNX_ENGINE)]
    if artifact.precision is not None:
        found = artifact.precision.engines_for(precision, installed)
    if asked.engine == 'auto' and precision is None:
        return found
    # what was asked for is not exchanged for something else
    return [(found[0][0], found[0][1] if asked.engine == 'auto' else asked.engine)]


def _without_artifact(asked: _Asked) -> str:
    """The engine for a model that nothing is known of."""
    if asked.engine != 'auto':
        return asked.engine
    on_graph = asked.device == 'cpu' if asked.is_onnx is None else asked.is_onnx
    return ONNX_ENGINE if on_graph else 'torch'


def _torch_name(asked: _Asked) -> str:
    return 'torch' if asked.engine == 'auto' else asked.engine


def _torch_engine(
    model: EmbeddingModel,
    spec: ModelSpec,
    reader: InputReader,
    asked: _Asked,
    batch_size: int,
    num_threads: int | None,
) -> TorchEngine:
    _set_torch_threads(num_threads)
    precision = asked.precision if asked.precision in HALF_PRECISIONS else FP32
    backend = 'inductor' if asked.engine == 'torch-compiled' else None
    return TorchEngine(model, spec, reader, asked.device, batch_size, precision, backend)


def _graph_engine(
    graph: Path | bytes,
    spec: ModelSpec,
    reader: InputReader,
    engine: str,
    device: str,
    batch_size: int,
    num_threads: int | None,
    precision: str,
) -> InferenceEngine:
    if engine == OPENVINO_ENGINE:
        return OpenvinoEngine(graph, spec, reader, batch_size, num_threads, precision)
    return OnnxEngine(graph, spec, reader, device, batch_size, num_threads, precision)


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
) -> None:
    at_least_one('batch_size', batch_size)
    if num_threads is not None:
        at_least_one('num_threads', num_threads)
    if device is not None and device not in DEVICES:
        raise ConfigError(unknown_name('device', device, DEVICES))


def best_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    import torch

    return 'cuda' if torch.cuda.is_available() else 'cpu'


def _set_torch_threads(num_threads: int | None) -> None:
    if num_threads is not None:
        import torch

        torch.set_num_threads(int(num_threads))
