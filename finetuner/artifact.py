"""Artifacts: a fine-tuned model as a directory of plain files, each with its hash, no pickle."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.artifact_check import check_files
from finetuner.artifact_files import (
    WEIGHTS,
    hash_file,
    read_manifest,
    verify_files,
    write_manifest,
    zip_artifact,
)
from finetuner.excepts import ArtifactError, ConfigError
from finetuner.inputs import InputReader, ModelInputs, build_reader
from finetuner.model_spec import ModelSpec, TrainingRecord, model_card
from finetuner.models.backbones import (
    TEXT_TOWER,
    TOKENIZER,
    TOWERS,
    Backbone,
    TextImageBackbone,
    TextImageSpec,
    TextSpec,
)
from finetuner.models.catalogue import clip_vision_backbone, towers_backbone
from finetuner.models.zoo import encoder_backbone, get_backbone
from finetuner.onnx_export import export_onnx
from finetuner.precision_record import INT8, PrecisionRecord
from finetuner.storage.archives import unzip
from finetuner.uris import DEFAULT_POLICY, PicturePolicy

if TYPE_CHECKING:
    import torch

    from finetuner.inference import InferenceEngine
    from finetuner.models.embedding_model import EmbeddingModel
    from finetuner.models.text_image import TextImageModel

# from where the graph of each model lies and what it is, `''` being the only one, to what is taken
ChoosePrecision = Callable[[Mapping[str, tuple[Path, ModelSpec]]], Mapping[str, PrecisionRecord]]

__all__ = [
    'Artifact',
    'ModelSpec',
    'TrainingRecord',
    'hash_file',
    'load_artifact',
    'save_artifact',
    'save_model',
    'zip_artifact',
]

logger = logging.getLogger('finetuner.artifact')

ONNX = 'model.onnx'
INT8_ONNX = 'model.int8.onnx'
CARD = 'README.md'
# of a tower that transformers builds
CONFIG = 'config.json'


class Artifact:
    """A verified artifact on disk."""

    def __init__(
        self, directory: Path, manifest: dict[str, Any], keep: tempfile.TemporaryDirectory | None
    ) -> None:
        """Use `load_artifact`; this only holds what it found."""
        self.directory = directory
        self.manifest = manifest
        self.spec = ModelSpec.from_json(manifest.get('model') or {})
        self.precision = PrecisionRecord.from_json(manifest.get('precision'))
        if self.precision and self.precision.needs_int8 and INT8_ONNX not in manifest['files']:
            raise ArtifactError(f'the artifact is incomplete: {INT8_ONNX} is missing')
        self._keep = keep  # an unzipped artifact lives as long as this object

    def tower(self, name: str) -> Artifact:
        """One of the two models of an artifact of texts and pictures.

        Args:
            name: one of `TOWERS`.

        Raises:
            ArtifactError: its description is missing, or names files that the artifact does not.
        """
        manifest = read_manifest(self.directory / name)
        unknown = [file for file in manifest['files'] if f'{name}/{file}' not in self._files]
        if unknown:
            # only of those of the whole were the hashes compared
            raise ArtifactError(f'{name} names {unknown[0]!r}, which the artifact does not')
        return Artifact(self.directory / name, manifest, self._keep)

    @property
    def _files(self) -> dict[str, str]:
        return self.manifest['files']

    @property
    def onnx_path(self) -> Path | None:
        """The ONNX graph, None when it was not exported."""
        return self.directory / ONNX if ONNX in self._files else None

    def graph(self, precision: str) -> Path:
        """The exported graph.

        Args:
            precision: of `fp32` and `int8`.

        Raises:
            ArtifactError: there is none of that precision; says how to get it.
        """
        name = INT8_ONNX if precision == INT8 else ONNX
        if name in self.manifest['files']:
            return self.directory / name
        if precision == INT8:
            lost = ''
            if self.precision and self.precision.asked == 'auto':
                lost = f' ({self.precision.reason})'
            raise ArtifactError(
                f"the artifact has no int8 graph{lost}: train with export_precision='int8', or "
                "take precision='auto' or 'fp32'"
            )
        raise ArtifactError(
            'the artifact has no ONNX graph: train with to_onnx=True, or pass is_onnx=False'
        )

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Retrieval metrics by stage."""
        return self.manifest.get('metrics') or {}

    def build_towers(self) -> TextImageModel:
        """Build both models of an artifact of texts and pictures, in evaluation mode.

        Raises:
            ArtifactError: the weights do not fit the description.
        """
        from finetuner.models.text_image import TextImageModel

        return TextImageModel(*(self.tower(name).build_model() for name in TOWERS)).eval()

    def build_model(self) -> EmbeddingModel:
        """Build the embedding model with the artifact's weights, in evaluation mode.

        Raises:
            ArtifactError: the weights do not fit the description.
        """
        from safetensors import SafetensorError

        try:
            model = self._build()
        except (ConfigError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(f'the weights in {WEIGHTS} do not fit: {error}') from error
        return model.eval()

    def _build(self) -> EmbeddingModel:
        from safetensors.torch import load_file

        from finetuner.models.alignment import Alignment
        from finetuner.models.embedding_model import PictureNormalizer
        from finetuner.models.tailor import build_embedding_model, build_text_model
        from finetuner.models.whitening import Whitening

        inputs = self.spec.inputs
        if isinstance(inputs, TextImageSpec):
            raise TypeError('build_towers builds the models of this artifact')
        if isinstance(inputs, TextSpec):
            # the directory is laid out as any folder of a text encoder is
            return build_text_model(self.directory, inputs)
        options = {'weights': 'none', 'input_size': inputs.input_size, **inputs.pooler.as_options()}
        model = build_embedding_model(
            self.backbone, options, self.spec.output_dim, whitening=self.spec.whitening
        )
        if self.spec.alignment:
            roots = self.backbone.architecture == 'cnn'
            model.projection_head = Alignment(
                self.backbone.dimension, self.spec.dimension, takes_roots=roots
            )
        for module in model.modules():
            if isinstance(module, Whitening):
                module.fitted = True
        # as it was trained, whatever the zoo's entry says by now
        model.normalizer = PictureNormalizer(inputs)
        model.load_state_dict(load_file(self.directory / WEIGHTS))
        return model

    def build_reader(self, policy: PicturePolicy = DEFAULT_POLICY) -> InputReader:
        """What makes the model's input of Documents.

        Args:
            policy: which pictures are opened.

        Raises:
            ArtifactError: its tokenizer cannot be read.
        """
        try:
            of_text = TEXT_TOWER if isinstance(self.spec.inputs, TextImageSpec) else ''
            return build_reader(self.spec.inputs, self.directory / of_text / TOKENIZER, policy)
        except ConfigError as error:
            raise ArtifactError(f'the artifact is damaged: {error}') from error

    @property
    def backbone(self) -> Backbone:
        """Its backbone: the zoo's entry, or its own directory where it holds all of a text encoder.

        Raises:
            ArtifactError: this version does not know it.
        """
        inputs, name = self.spec.inputs, self.spec.backbone
        try:
            if isinstance(inputs, TextImageSpec):
                text, vision = (self.tower(tower) for tower in TOWERS)
                joined = vision.spec.alignment
                return towers_backbone(name, text.backbone, vision.backbone, joined)
            if isinstance(inputs, TextSpec):
                return encoder_backbone(name, str(self.directory))
            if (self.directory / CONFIG).is_file():
                return clip_vision_backbone(
                    name, str(self.directory), self.spec.dimension, inputs.input_size
                )
            return get_backbone(name)
        except ConfigError as error:
            raise ArtifactError(f'the artifact needs another backbone: {error}') from error


def save_artifact(
    directory: Path,
    model: EmbeddingModel | TextImageModel,
    spec: ModelSpec,
    record: TrainingRecord | None = None,
    onnx_inputs: ModelInputs | None = None,
    onnx_required: bool = False,
    backbone: Backbone | None = None,
    choose_precision: ChoosePrecision | None = None,
) -> None:
    """Write a complete artifact; the manifest comes last, so a broken-off one is none.

    Args:
        directory: empty or not there yet.
        model: what to keep.
        spec: its description.
        record: where it comes from.
        onnx_inputs: a batch of real inputs; when given the model is also exported to ONNX and
            compared with torch on them. Of two towers, a batch under the name of each.
        onnx_required: fail when the export does, instead of leaving the graph out.
        backbone: of two towers: that of the model.
        choose_precision: adds graphs of other precisions, and says which is to be taken.

    Raises:
        ArtifactError: the directory holds something already, or the required export failed.
    """
    from finetuner.models.lora import merge_lora

    if directory.exists() and any(directory.iterdir()):
        raise ArtifactError(f'{directory.name} is not empty: an artifact takes a new directory')
    record = record or TrainingRecord()
    model = model.eval().cpu()
    # it opens without PEFT, and what is exported is what is saved
    merge_lora(model)
    towers: dict[str, ModelSpec] = {}
    models: dict[str, Any] = {'': model}
    inputs: Any = {'': onnx_inputs}
    if isinstance(backbone, TextImageBackbone):
        towers = spec.tower_specs(backbone)
        models, inputs = dict(model.towers.items()), onnx_inputs or {}  # type: ignore[union-attr, operator]
    elif isinstance(spec.inputs, TextImageSpec):
        raise TypeError('the backbone says what the towers of a model of texts and pictures are')
    specs = towers or {'': spec}
    for name, its_spec in specs.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        _save_weights(models[name], its_spec, directory / name)
        if inputs.get(name) is not None:
            _export(models[name], directory / name, inputs[name], onnx_required)
    chosen: Mapping[str, PrecisionRecord] = {}
    if choose_precision is not None:
        chosen = choose_precision({name: (directory / name, each) for name, each in specs.items()})
    for name, its_spec in {**towers, '': spec}.items():
        place, precision = directory / name, chosen.get(name)
        (place / CARD).write_text(model_card(its_spec, record, precision), encoding='utf-8')
        write_manifest(place, its_spec, record, precision)


def _export(
    model: torch.nn.Module, directory: Path, inputs: ModelInputs, is_required: bool
) -> None:
    try:
        export_onnx(model, directory / ONNX, inputs)
    except ArtifactError as error:
        if is_required:
            raise
        logger.warning('The artifact has no ONNX graph: %s', error)


def _save_weights(model: EmbeddingModel, spec: ModelSpec, directory: Path) -> None:
    if isinstance(spec.inputs, TextSpec):
        from finetuner.models.text import save_text_model

        save_text_model(model, spec.inputs, directory)
        return
    from safetensors.torch import save_file

    from finetuner.models.clip import ClipVision

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / WEIGHTS)
    backbone = getattr(model, 'backbone', None)
    if isinstance(backbone, ClipVision):
        backbone.save_config(directory)


def load_artifact(path: str | Path) -> Artifact:
    """Open an artifact and verify every file in it.

    Args:
        path: its directory, or a zip of it.

    Raises:
        ArtifactError: there is none, it is incomplete, it was changed after it was written, or
            the zip holds what does not belong there.
    """
    source = Path(path).expanduser()
    if source.is_file():
        keep = tempfile.TemporaryDirectory(prefix='finetuner-artifact-')
        try:
            unzip(source, Path(keep.name))
            return _verified(Path(keep.name), keep)
        except BaseException:
            # now, and not when nobody looks at the error any more
            keep.cleanup()
            raise
    if not source.is_dir():
        raise ArtifactError(
            f'no artifact at {str(path)!r}: give the artifact_id of a finished run, or the path '
            'of an artifact directory or its zip'
        )
    return _verified(source, None)


def _verified(directory: Path, keep: tempfile.TemporaryDirectory | None) -> Artifact:
    manifest = verify_files(directory)
    check_files(directory, manifest['files'])
    return Artifact(directory, manifest, keep)


def save_model(model: torch.nn.Module | InferenceEngine, path: Path) -> None:
    """Save a module's state dict as safetensors, or a picture model as an artifact directory.

    Args:
        model: a torch module, or a `TorchEngine`.
        path: the file or directory.

    Raises:
        ArtifactError: the directory is not empty, or the engine has no torch model to save.
    """
    import torch
    from safetensors.torch import save_model as save_module

    if isinstance(model, torch.nn.Module):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'.{path.name}.{os.getpid()}')
        save_module(model, str(partial))
        partial.rename(path)
        return
    network = getattr(model, 'model', None)
    if isinstance(model.spec.inputs, TextImageSpec):
        raise ArtifactError(
            f'{model.name} has two models: save each by itself, as get_model and build_model give '
            "it with select_model='clip-text' or 'clip-vision'"
        )
    if network is None:
        raise ArtifactError('a model run by ONNX Runtime is not saved again: copy its artifact')
    save_artifact(path, network, model.spec)
