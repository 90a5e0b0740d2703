"""What `finetuner.encode_dataset` is asked for, checked at the door."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetuner.artifact_files import hash_file
from finetuner.bulk.manifest import EMBEDDING, FORMATS, ID
from finetuner.bulk.output import import_parquet
from finetuner.config import whole_number
from finetuner.excepts import ArtifactError, ConfigError, unknown_name
from finetuner.model_spec import MANIFEST

_MANY_WORKERS = 4096


@dataclass(frozen=True)
class BulkOptions:
    """How a data set is encoded.

    Attributes:
        output: the folder of the shards.
        artifact: directory or zip of the fine-tuned model; or None.
        model: name of a pretrained model; or None.
        model_name: what the user called either.
        model_options: of the pretrained model.
        content: column of the contents; None for the one with a usual name.
        id: column of the ids; None for `id` where there is one.
        keep: columns that are copied.
        format: one of `FORMATS`.
        rows_per_shard: at most so many rows in a shard.
        batch_size: as of `finetuner.encode`.
        select_model: of a model of texts and pictures, one of the two.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        engine: as of `finetuner.inference.load_engine`.
        precision: as there.
        num_workers: processes that encode; 1 is this one.
        num_threads: of each; None divides the cores.
        max_failed: so many rows may fail: a number, or a share of all below 1; None: all may.
        restart: throw away what the output holds.
        ray_address: of a Ray cluster that does the work; None for this machine.
    """

    output: Path
    artifact: Path | None = None
    model: str | None = None
    model_name: str = ''
    model_options: dict[str, Any] | None = None
    content: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    format: str = 'parquet'
    rows_per_shard: int = 10_000
    batch_size: int = 32
    select_model: str | None = None
    device: str | None = None
    engine: str = 'auto'
    precision: str = 'auto'
    num_workers: int = 1
    num_threads: int | None = None
    max_failed: float | None = None
    restart: bool = False
    ray_address: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be right.

        Raises:
            ConfigError: an option is unknown, out of range, or contradicts another.
        """
        from finetuner.precision_record import GRAPH_ENGINES

        if (self.artifact is None) == (self.model is None):
            raise ConfigError(
                'give one of artifact, a fine-tuned model, and model, a pretrained one as it comes'
            )
        if self.model is None and self.model_options:
            raise ConfigError('model_options are those of a pretrained model: leave them out')
        if self.format not in FORMATS:
            raise ConfigError(unknown_name('format', self.format, FORMATS))
        if self.format == 'parquet':
            import_parquet("format='parquet'")
        for name in ('rows_per_shard', 'batch_size', 'num_workers'):
            _require_count(name, getattr(self, name))
        if self.num_workers > _MANY_WORKERS:
            raise ConfigError(f'num_workers={self.num_workers} is more than {_MANY_WORKERS}')
        if self.num_threads is not None:
            _require_count('num_threads', self.num_threads)
        names = ('auto', *GRAPH_ENGINES, 'torch', 'torch-compiled')
        if self.engine not in names:
            raise ConfigError(unknown_name('engine', self.engine, names))
        if self.max_failed is not None and not self.max_failed >= 0:
            raise ConfigError(
                f'max_failed={self.max_failed} is neither a number of rows nor a share from 0 to 1'
            )
        self._check_keep()
        self._check_address()

    def _check_keep(self) -> None:
        for name in self.keep:
            if name in (ID, EMBEDDING, 'failed'):
                raise ConfigError(
                    f'the column {name!r} cannot be kept: the output has one of that name itself'
                )
        if len(set(self.keep)) < len(self.keep):
            raise ConfigError(f'keep={list(self.keep)} names a column twice')

    def _check_address(self) -> None:
        if self.ray_address is None:
            return
        from finetuner.ray_cluster import check_driver_address, check_jobs_address

        if self.by_job:
            check_jobs_address(self.ray_address)
        else:
            check_driver_address(self.ray_address)

    @property
    def by_job(self) -> bool:
        """Whether the address is one that takes jobs."""
        return (self.ray_address or '').startswith(('http:', 'https:'))

    def most_failed(self, num_rows: int) -> float:
        """How many of so many rows may fail."""
        if self.max_failed is None:
            return float('inf')
        return self.max_failed * num_rows if self.max_failed < 1 else self.max_failed

    def job(self) -> dict[str, Any]:
        """What changes what is written: it is the same when encoding goes on.

        Raises:
            ArtifactError: there is no such artifact.
        """
        return {
            'model_sha256': self.model_sha256(),
            'content': self.content,
            'id': self.id,
            'keep': list(self.keep),
            'format': self.format,
            'rows_per_shard': self.rows_per_shard,
            'batch_size': self.batch_size,
            'select_model': self.select_model,
            'device': self.device,
            'engine': self.engine,
            'precision': self.precision,
        }

    def model_sha256(self) -> str:
        """Of the artifact's `artifact.json`, which has the hashes of all its files.

        Of a pretrained model: of its name and its options.

        Raises:
            ArtifactError: there is no such artifact.
        """
        if self.artifact is None:
            named = json.dumps(
                [self.model, self.model_options or {}, _state_of_files(str(self.model))],
                sort_keys=True,
            )
            return hashlib.sha256(named.encode()).hexdigest()
        path = self.artifact
        try:
            if path.is_dir():
                return hash_file(path / MANIFEST)
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if PurePosixPath(n).name == MANIFEST]
                # that of the whole, not of a tower
                name = min(names, key=lambda name: name.count('/'))
                return hashlib.sha256(archive.read(name)).hexdigest()
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise ArtifactError(
                f'{str(path)!r} is no artifact: there is no {MANIFEST} in it'
            ) from error


def _state_of_files(name: str) -> list[list[Any]]:
    """Sizes and times of the files of a model that is given by its folder; of others nothing."""
    folder = Path(name).expanduser()
    files = sorted(path for path in folder.rglob('*') if path.is_file()) if folder.is_dir() else []
    states = [(path, path.stat()) for path in files]
    return [[p.relative_to(folder).as_posix(), s.st_size, s.st_mtime_ns] for p, s in states]


def _require_count(name: str, value: Any) -> None:
    try:
        whole = whole_number(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{name}: {error}') from error
    if whole < 1:
        raise ConfigError(f'{name}={value} is less than 1')
