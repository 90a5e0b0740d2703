"""One shard: its rows are read, embedded and written, then its manifest."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docarray import Document

from finetuner import excepts
from finetuner.bulk.inputs import InputFile, open_input
from finetuner.bulk.manifest import FailedRow, ShardManifest, as_json, shard_name
from finetuner.bulk.options import BulkOptions
from finetuner.bulk.output import described, write_file
from finetuner.bulk.plan import PLAN, PlannedShard, job_hash
from finetuner.bulk.rows import Columns, Row
from finetuner.bulk.writing import file_names, open_writer
from finetuner.excepts import ArtifactError, ConfigError, DataError, FinetunerError

if TYPE_CHECKING:
    from finetuner.engines import InferenceEngine


@dataclass(frozen=True)
class ShardResult:
    """What came of a shard; small, for it travels.

    Attributes:
        shard: its number.
        num_rows: in it.
        num_failed: of them.
        made_by: engine, precision and dimension, which are the same for all shards.
        missing: why there is no such shard, though there may be others; else empty.
        fatal: class and message of an error that no shard would get around; else empty.
    """

    shard: int
    num_rows: int = 0
    num_failed: int = 0
    made_by: str = ''
    missing: str = ''
    fatal: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise what is fatal."""
        if self.fatal:
            kind, message = self.fatal
            raise getattr(excepts, kind)(message)


class ShardEncoder:
    """Encodes shards, one after the other, with one engine that is loaded for the first.

    It pickles without the engine, so that it can travel to the process that encodes.
    """

    def __init__(
        self,
        options: BulkOptions,
        job: dict[str, Any],
        num_threads: int | None,
        elsewhere: bool = False,
    ) -> None:
        """Load nothing yet.

        Args:
            options: what was asked for.
            job: what they come to, as the plan has it.
            num_threads: of the engine; None for its own choice.
            elsewhere: it may run on another machine, so look whether all it needs is there.
        """
        self._options = options
        self._job = job
        self._num_threads = num_threads
        self._elsewhere = elsewhere
        self._engine: InferenceEngine | None = None
        self._input: InputFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is loaded."""
        return {**self.__dict__, '_engine': None, '_input': None}

    def __call__(self, shard: PlannedShard) -> ShardResult:
        """Encode a shard.

        Args:
            shard: what it holds.

        Returns:
            What came of it: errors are told, not raised, since this may be another process.
        """
        try:
            if self._elsewhere:
                self._check_place(shard)
            self._engine = self._engine or self._loaded()
        except FinetunerError as error:
            return ShardResult(shard.shard, fatal=(type(error).__name__, str(error)))
        try:
            manifest = self._encoded(shard, self._engine)
        except DataError as error:
            return ShardResult(shard.shard, missing=str(error))
        except OSError as error:
            # those of inputs are DataErrors
            reason = f'{str(self._options.output)!r} cannot be written to: {error}'
            return ShardResult(shard.shard, fatal=('ConfigError', reason))
        counts = manifest.num_rows, manifest.num_failed
        return ShardResult(shard.shard, *counts, made_by=manifest.made_by)

    def _check_place(self, shard: PlannedShard) -> None:
        """Refuse a machine that has not what the driver has."""
        options, where = self._options, f'on the node {_node()}'
        hint = 'every node needs the same files under the same paths, such as a shared file system'
        if not (options.output / PLAN).is_file():
            raise ConfigError(f'the output {str(options.output)!r} is not there {where}: {hint}')
        if options.artifact is not None and not options.artifact.exists():
            raise ConfigError(
                f'the artifact {str(options.artifact)!r} is not there {where}: {hint}'
            )
        if not Path(shard.source).exists():
            raise ConfigError(f'the input {shard.source!r} is not there {where}: {hint}')

    def _loaded(self) -> InferenceEngine:
        from finetuner.inference import build_engine, load_engine

        options = self._options
        if options.model_sha256() != self._job['model_sha256']:
            raise ArtifactError(f'{str(options.artifact)!r} was changed since encoding began')
        if options.artifact is None:
            return build_engine(
                str(options.model),
                options.model_options,
                options.batch_size,
                options.device,
                is_onnx=None if options.engine == 'auto' else False,
                num_threads=self._num_threads,
                select_model=options.select_model,
                engine=options.engine,
                precision=options.precision,
            )
        return load_engine(
            options.artifact,
            options.batch_size,
            options.select_model,
            options.device,
            num_threads=self._num_threads,
            precision=options.precision,
            engine=options.engine,
        )

    def _encoded(self, shard: PlannedShard, engine: InferenceEngine) -> ShardManifest:
        options = self._options
        columns = columns_of(options, engine.spec.inputs.modality)
        source = self._opened(shard, columns)
        name = shard_name(shard.shard)
        paths = [options.output / file for file in file_names(name, options.format)]
        types = source.kept_types(options.keep) if options.format == 'parquet' else []
        # that of a shard that is done again is of other files
        manifest_path = options.output / f'{name}.json'
        manifest_path.unlink(missing_ok=True)
        num_rows = shard.stop - shard.start
        failed: list[FailedRow] = []
        with open_writer(paths, engine.dimension, num_rows, options.keep, types) as writer:
            number = shard.start
            for row, found in self._embedded(shard, source, columns, engine):
                if isinstance(found, str):
                    failed.append(FailedRow(number, row.id, found))
                    writer.add(row, None)
                else:
                    writer.add(row, found)
                number += 1
            if number != shard.stop:
                raise DataError(
                    f'{shard.source!r} ends after {number} rows, and had more when encoding began'
                )
        manifest = ShardManifest(
            shard=shard.shard,
            job=job_hash(self._job),
            source=shard.source,
            start=shard.start,
            stop=shard.stop,
            fingerprint=shard.fingerprint,
            files=tuple(described(path) for path in paths),
            num_rows=num_rows,
            num_failed=len(failed),
            failed=tuple(failed),
            dimension=engine.dimension,
            engine=engine.engine,
            precision=engine.precision,
        )
        write_file(manifest_path, as_json(manifest))
        return manifest

    def _embedded(
        self, shard: PlannedShard, source: InputFile, columns: Columns, engine: InferenceEngine
    ) -> Iterator[tuple[Row, Any]]:
        """Rows in order, with the embedding of each, or why it has none."""
        waiting: collections.deque[Row] = collections.deque()

        def docs() -> Iterator[Document]:
            for row in source.rows(shard.start, shard.stop, columns):
                waiting.append(row)
                yield row.doc

        positions = itertools.count(shard.start)
        for lot in engine.embed_documents(docs(), self._options.batch_size, positions):
            for found in lot:
                row = waiting.popleft()
                yield row, (row.error or str(found)) if isinstance(found, Exception) else found

    def _opened(self, shard: PlannedShard, columns: Columns) -> InputFile:
        """The input of a shard: that of the last one, where it is the same."""
        if self._input is None or str(self._input.path) != shard.source:
            self._input = open_input(Path(shard.source), columns)
        if self._input.fingerprint() != shard.fingerprint:
            raise DataError(f'{shard.source!r} was changed since encoding began')
        return self._input


def columns_of(options: BulkOptions, modality: str = 'text-image') -> Columns:
    """Which columns are meant, by the options and what the model embeds."""
    return Columns(options.content, options.id, options.keep, modality)


def _node() -> str:
    import socket

    return socket.gethostname()
