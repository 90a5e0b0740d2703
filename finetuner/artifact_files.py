"""The files of an artifact: verified by their hashes, and zipped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from finetuner.excepts import ArtifactError
from finetuner.model_spec import MANIFEST, ModelSpec, TrainingRecord
from finetuner.precision_record import PrecisionRecord
from finetuner.storage.archives import MAX_DEPTH

SCHEMA_VERSION = 1
_CHUNK_BYTES = 1 << 20
WEIGHTS = 'model.safetensors'
_PACKAGES = (
    'finetuner',
    'torch',
    'torchvision',
    'transformers',
    'onnxruntime',
    'openvino',
    'pytorch-metric-learning',
    'numpy',
)


def verify_files(directory: Path) -> dict[str, Any]:
    """Compare every file of an artifact with its hash.

    Args:
        directory: of the artifact.

    Returns:
        Its manifest.

    Raises:
        ArtifactError: it is incomplete, was changed, or names what does not belong there.
    """
    manifest = read_manifest(directory)
    files = manifest['files']
    if not any(name.rpartition('/')[2] == WEIGHTS for name in files):
        raise ArtifactError(f'{MANIFEST} in {directory.name!r} names no {WEIGHTS}')
    for name, expected in files.items():
        file = directory / name
        folders = [directory / part for part in PurePosixPath(name).parents][:-1]
        if not _is_plain_name(name) or any(place.is_symlink() for place in (file, *folders)):
            raise ArtifactError(f'file {name!r} of the artifact is not a plain file of its own')
        if not file.is_file():
            raise ArtifactError(f'the artifact is incomplete: {name} is missing')
        if hash_file(file) != expected:
            raise ArtifactError(f'{name} was changed after the artifact was written: hash differs')
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read what an artifact says of itself, its files unseen.

    Raises:
        ArtifactError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(f'{directory.name!r} is no artifact: it has no {MANIFEST}')
    try:
        text = path.read_text(encoding='utf-8')
        manifest = json.loads(text, object_pairs_hook=_without_doubles)
        schema, manifest['files'] = manifest['schema_version'], dict(manifest['files'])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f'{MANIFEST} in {directory.name!r} cannot be read: {error!r}'
        ) from error
    if schema != SCHEMA_VERSION:
        raise ArtifactError(
            f'the artifact has schema version {schema!r}, this library reads {SCHEMA_VERSION}: '
            'update finetuner'
        )
    return manifest


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; which of two values under one name counts depends on who reads it."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError('a name stands twice in one object')
    return values


def write_manifest(
    directory: Path, spec: ModelSpec, record: TrainingRecord, precision: PrecisionRecord | None
) -> None:
    """Say what an artifact is, and name every file in it with its hash.

    Args:
        directory: of the artifact, with all its other files.
        spec: what the model is.
        record: where it comes from.
        precision: that it is to run in; None says nothing of it.
    """
    manifest = {
        'schema_version': SCHEMA_VERSION,
        'model': spec.to_json(),
        'config': record.config,
        'metrics': record.metrics,
        'precision': precision and precision.to_json(),
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


def _is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the artifact, two folders deep at most: `tower/module/`."""
    parts = PurePosixPath(name).parts
    whole = '/'.join(parts) == name and '\\' not in name
    return (
        whole
        and 1 <= len(parts) <= MAX_DEPTH + 1
        and '..' not in parts
        and not name.startswith('/')
    )


def zip_artifact(directory: Path, path: Path) -> Path:
    """Zip a verified artifact; the zip appears under its name only when complete.

    Raises:
        ArtifactError: the directory is no intact artifact.
    """
    manifest = verify_files(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    # weights hardly compress: storing them is many times faster
    with zipfile.ZipFile(partial, 'w', zipfile.ZIP_STORED) as archive:
        for name in (MANIFEST, *manifest['files']):
            archive.write(directory / name, f'{path.stem}/{name}')
    partial.rename(path)
    return path


def archive_name(run_name: str, artifact_id: str) -> str:
    """File name of the zip of a run's artifact: its name, without what no file name should have."""
    name = re.sub(r'[^\w.\- ]', '_', run_name).lstrip('.') or artifact_id
    return f'{name}.zip'


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open('rb', buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
