"""Artifacts: a fine-tuned model as a directory of plain files, each with its hash, no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from finetuner.excepts import ArtifactError, ConfigError
from finetuner.inputs import InputReader, ModelInputs, build_reader
from finetuner.model_spec import MANIFEST, ModelSpec, TrainingRecord, model_card
from finetuner.models.backbones import TOKENIZER, Backbone, TextSpec
from finetuner.models.zoo import get_backbone, text_backbone
from finetuner.onnx_export import export_onnx
from finetuner.storage.archives import unzip
from finetuner.uris import DEFAULT_POLICY, PicturePolicy

if TYPE_CHECKING:
    import torch

    from finetuner.inference import InferenceEngine
    from finetuner.models.embedding_model import EmbeddingModel

logger = logging.getLogger('finetuner.artifact')

SCHEMA_VERSION = 1
WEIGHTS = 'model.safetensors'
ONNX = 'model.onnx'
CARD = 'README.md'
_PACKAGES = (
    'finetuner',
    'torch',
    'torchvision',
    'transformers',
    'onnxruntime',
    'pytorch-metric-learning',
    'numpy',
)


class Artifact:
    """A verified artifact on disk."""

    def __init__(
        self, directory: Path, manifest: dict[str, Any], keep: tempfile.TemporaryDirectory | None
    ) -> None:
        """Use `load_artifact`; this only holds what it found."""
        self.directory = directory
        self.manifest = manifest
        self.spec = ModelSpec.from_json(manifest.get('model') or {})
        self._keep = keep  # an unzipped artifact lives as long as this object

    @property
    def onnx_path(self) -> Path | None:
        """The ONNX graph, None when it was not exported."""
        return self.directory / ONNX if ONNX in self.manifest['files'] else None

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Retrieval metrics by stage."""
        return self.manifest.get('metrics') or {}

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

        from finetuner.models.embedding_model import PictureNormalizer
        from finetuner.models.tailor import build_embedding_model, build_text_model
        from finetuner.models.whitening import Whitening

        inputs = self.spec.inputs
        if isinstance(inputs, TextSpec):
            # the directory is laid out as any folder of a text encoder is
            return build_text_model(self.directory, inputs)
        options = {'weights': 'none', 'input_size': inputs.input_size, **inputs.pooler.as_options()}
        model = build_embedding_model(
            self.backbone, options, self.spec.output_dim, whitening=self.spec.whitening
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
            return build_reader(self.spec.inputs, self.directory / TOKENIZER, policy)
        except ConfigError as error:
            raise ArtifactError(f'the artifact is damaged: {error}') from error

    @property
    def backbone(self) -> Backbone:
        """Its backbone: the zoo's entry, or its own directory where it holds all of a text encoder.

        Raises:
            ArtifactError: this version does not know it.
        """
        try:
            if isinstance(self.spec.inputs, TextSpec):
                return text_backbone(self.spec.backbone, str(self.directory))
            return get_backbone(self.spec.backbone)
        except ConfigError as error:
            raise ArtifactError(f'the artifact needs another backbone: {error}') from error


def save_artifact(
    directory: Path,
    model: EmbeddingModel,
    spec: ModelSpec,
    record: TrainingRecord | None = None,
    onnx_inputs: ModelInputs | None = None,
    onnx_required: bool = False,
) -> None:
    """Write a complete artifact; the manifest comes last, so a broken-off one is none.

    Args:
        directory: empty or not there yet.
        model: what to keep.
        spec: its description.
        record: where it comes from.
        onnx_inputs: a batch of real inputs; when given the model is also exported to ONNX and
            compared with torch on them.
        onnx_required: fail when the export does, instead of leaving the graph out.

    Raises:
        ArtifactError: the directory holds something already, or the required export failed.
    """
    from finetuner.models.lora import merge_lora

    if directory.exists() and any(directory.iterdir()):
        raise ArtifactError(f'{directory.name} is not empty: an artifact takes a new directory')
    directory.mkdir(parents=True, exist_ok=True)
    record = record or TrainingRecord()
    model = model.eval().cpu()
    # it opens without PEFT, and what is exported is what is saved
    merge_lora(model)
    _save_weights(model, spec, directory)
    if onnx_inputs is not None:
        try:
            export_onnx(model, directory / ONNX, onnx_inputs)
        except ArtifactError as error:
            if onnx_required:
                raise
            logger.warning('The artifact has no ONNX graph: %s', error)
    (directory / CARD).write_text(model_card(spec, record), encoding='utf-8')
    manifest = {
        'schema_version': SCHEMA_VERSION,
        'model': spec.to_json(),
        'config': record.config,
        'metrics': record.metrics,
        'parent': record.parent,
        'data': (record.config or {}).get('train_data'),
        'num_documents': record.num_documents,
        'versions': {'python': platform.python_version(), **_versions()},
        'files': {
            path.relative_to(directory).as_posix(): hash_file(path)
            for path in sorted(directory.rglob('*'))
            if path.is_file()
        },
    }
    partial = directory / f'.{MANIFEST}'
    with partial.open('w', encoding='utf-8') as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory / MANIFEST)


def _save_weights(model: EmbeddingModel, spec: ModelSpec, directory: Path) -> None:
    if isinstance(spec.inputs, TextSpec):
        from finetuner.models.text import save_text_model

        save_text_model(model, spec.inputs, directory)
        return
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / WEIGHTS)


def load_artifact(path: str | Path) -> Artifact:
    """Open an artifact and verify every file in it.

    Args:
        path: its directory, or a zip of it.

    Raises:
        ArtifactError: there is none, it is incomplete, it was changed after it was written, or
            the zip holds what does not belong there.
    """
    source = Path(path).expanduser()
    keep = None
    if source.is_file():
        keep = tempfile.TemporaryDirectory(prefix='finetuner-artifact-')
        directory = Path(keep.name)
        unzip(source, directory)
    elif source.is_dir():
        directory = source
    else:
        raise ArtifactError(
            f'no artifact at {str(path)!r}: give the artifact_id of a finished run, or the path '
            'of an artifact directory or its zip'
        )
    return Artifact(directory, _verify(directory), keep)


def _verify(directory: Path) -> dict[str, Any]:
    manifest_path = directory / MANIFEST
    if not manifest_path.is_file() or manifest_path.is_symlink():
        raise ArtifactError(f'{directory.name!r} is no artifact: it has no {MANIFEST}')
    try:
        manifest = json.loads(manifest_path.read_text(encoding='utf-8'))
        schema, files = manifest['schema_version'], dict(manifest['files'])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f'{MANIFEST} in {directory.name!r} cannot be read: {error!r}'
        ) from error
    if schema != SCHEMA_VERSION:
        raise ArtifactError(
            f'the artifact has schema version {schema!r}, this library reads {SCHEMA_VERSION}: '
            'update finetuner'
        )
    if WEIGHTS not in files:
        raise ArtifactError(f'{MANIFEST} in {directory.name!r} names no {WEIGHTS}')
    for name, expected in files.items():
        file = directory / name
        if not _is_plain_name(name) or file.is_symlink() or file.parent.is_symlink():
            raise ArtifactError(f'file {name!r} of the artifact is not a plain file of its own')
        if not file.is_file():
            raise ArtifactError(f'the artifact is incomplete: {name} is missing')
        if hash_file(file) != expected:
            raise ArtifactError(f'{name} was changed after the artifact was written: hash differs')
    return manifest


def _is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the artifact's folder, or in a folder right in it."""
    parts = PurePosixPath(name).parts
    whole = '/'.join(parts) == name and '\\' not in name
    return whole and 1 <= len(parts) <= 2 and '..' not in parts and not name.startswith('/')


def zip_artifact(directory: Path, path: Path) -> Path:
    """Zip a verified artifact; the zip appears under its name only when complete.

    Raises:
        ArtifactError: the directory is no intact artifact.
    """
    manifest = _verify(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    # weights hardly compress: storing them is many times faster
    with zipfile.ZipFile(partial, 'w', zipfile.ZIP_STORED) as archive:
        for name in (MANIFEST, *manifest['files']):
            archive.write(directory / name, f'{path.stem}/{name}')
    partial.rename(path)
    return path


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
    if network is None:
        raise ArtifactError('a model run by ONNX Runtime is not saved again: copy its artifact')
    save_artifact(path, network, model.spec)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
