"""What is written beside the embeddings: of each shard what it holds, and of all what they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetuner.excepts import DataError

VERSION = 1
MANIFEST = 'manifest.json'
FORMATS = ('parquet', 'numpy')
# the columns of a shard in Parquet that are always there
ID, EMBEDDING = 'id', 'embedding'

_T = TypeVar('_T')


def shard_name(number: int) -> str:
    """What the files of a shard begin with."""
    return f'part-{number:05d}'


@dataclass(frozen=True)
class OutputFile:
    """A file of a shard.

    Attributes:
        name: within the output.
        num_bytes: how long it is.
        sha256: of its bytes, 64 hex characters.
    """

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class FailedRow:
    """A row that has no embedding.

    Attributes:
        row: its place in the input file, from 0.
        id: its id.
        reason: why.
    """

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class ShardManifest:
    """A shard that is whole.

    Attributes:
        shard: its number.
        job: hash of what it was made with: the model and the options that change what is written.
        source: the input file or folder.
        start: its first row there, from 0.
        stop: the row after its last.
        fingerprint: of the input, as it was.
        files: what was written.
        num_rows: in them, failed ones too.
        num_failed: rows without an embedding.
        failed: those rows.
        dimension: of an embedding.
        engine: that embedded, such as `onnx`.
        precision: that it computed in, such as `fp32`.
    """

    shard: int
    job: str
    source: str
    start: int
    stop: int
    fingerprint: str
    files: tuple[OutputFile, ...]
    num_rows: int
    num_failed: int
    failed: tuple[FailedRow, ...]
    dimension: int
    engine: str
    precision: str

    @property
    def made_by(self) -> str:
        """What is the same for all shards of an output."""
        return f'{self.engine} {self.precision} of {self.dimension} numbers'


@dataclass(frozen=True)
class ShardRecord:
    """A shard as the manifest of the whole lists it; its own has the failed rows."""

    shard: int
    source: str
    start: int
    stop: int
    files: tuple[OutputFile, ...]
    num_rows: int
    num_failed: int


@dataclass(frozen=True)
class MissingInput:
    """An input, or rows of one, that could not be read.

    Attributes:
        source: the file or folder.
        start: the first row; None where it could not even be opened.
        stop: the row after the last, or None.
        reason: why.
    """

    source: str
    start: int | None
    stop: int | None
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The whole output.

    Attributes:
        model: the artifact's id or path, or the name of the pretrained model.
        model_sha256: of the artifact's `artifact.json`, or of the pretrained model's name and options.
        dimension: of an embedding.
        engine: that embedded.
        precision: that it computed in.
        format: one of `FORMATS`.
        options: those that change what is written.
        shards: in order.
        missing: what has no shard.
        num_rows: of all shards, failed ones too.
        num_failed: of all shards.
        seconds: that the last call took.
        version: of this description.
    """

    model: str
    model_sha256: str
    dimension: int
    engine: str
    precision: str
    format: str
    options: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    missing: tuple[MissingInput, ...]
    num_rows: int
    num_failed: int
    seconds: float
    version: int = VERSION


def as_json(described: Any) -> bytes:
    """A description as the bytes of its file: the same for the same, in every process."""
    plain = dataclasses.asdict(described)
    return (json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + '\n').encode()


def from_json(kind: type[_T], path: Path, parts: Mapping[str, type] | None = None) -> _T:
    """Read a description back.

    Args:
        kind: a dataclass.
        path: of its file.
        parts: dataclasses of which fields are lists; None for those of the manifests above.

    Raises:
        DataError: the file is no such description.
        OSError: it cannot be read.
    """
    try:
        return _built(kind, json.loads(path.read_bytes()), _PARTS if parts is None else parts)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f'{str(path)!r} is no description of encoded data, or a damaged one: {error}'
        ) from error


_PARTS = {'files': OutputFile, 'failed': FailedRow, 'shards': ShardRecord, 'missing': MissingInput}


def _built(kind: type[_T], values: Mapping[str, Any], parts: Mapping[str, type]) -> _T:
    named = dict(values)
    if named.get('version', VERSION) != VERSION:
        raise ValueError(f'it is of version {named["version"]}, and this Finetuner reads {VERSION}')
    for name, part in parts.items():
        if isinstance(named.get(name), list):
            named[name] = tuple(_built(part, each, parts) for each in named[name])
    return kind(**named)
