"""Encode a data set: plan it, do the shards that are not there yet, describe the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuner.bulk.inputs import find_inputs
from finetuner.bulk.manifest import (
    MANIFEST,
    Manifest,
    MissingInput,
    ShardManifest,
    ShardRecord,
    as_json,
    from_json,
    shard_name,
)
from finetuner.bulk.options import BulkOptions
from finetuner.bulk.output import claimed, is_as_described, write_file
from finetuner.bulk.plan import PLAN, Plan, job_hash, load_plan, make_plan
from finetuner.bulk.shard_encoding import ShardResult, columns_of
from finetuner.bulk.workers import run_shards
from finetuner.excepts import ConflictError, DataError

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class EncodedSummary:
    """What `finetuner.encode_dataset` did.

    Attributes:
        output: the folder.
        num_rows: of all shards, failed ones too.
        num_failed: rows without an embedding; the manifests of the shards list them.
        num_shards: that are there.
        num_reused: of them, those that were there before.
        seconds: that it took.
        rows_per_second: of the rows that were done now.
        missing: inputs, or rows of them, that could not be read.
    """

    output: Path
    num_rows: int
    num_failed: int
    num_shards: int
    num_reused: int
    seconds: float
    rows_per_second: float
    missing: tuple[MissingInput, ...]


@dataclass(frozen=True)
class BulkProgress:
    """How far it is.

    Attributes:
        num_rows: in all, those done before too.
        done_rows: of them.
        failed_rows: of those done.
    """

    num_rows: int
    done_rows: int
    failed_rows: int


def encode_files(
    inputs: Sequence[str],
    options: BulkOptions,
    on_progress: Callable[[BulkProgress], None] = lambda progress: None,
) -> EncodedSummary:
    """Encode a data set; see `finetuner.encode_dataset`.

    Args:
        inputs: files, folders and patterns.
        options: how.
        on_progress: called at the start and after each shard.
    """
    begun = time.monotonic()
    job = options.job()
    paths = find_inputs(inputs)
    folder = options.output
    with claimed(folder):
        if options.restart:
            _clear(folder)
        plan = _planned(paths, options, job)
        standing = _standing(plan, options)
        counts = _Counts(plan, options, standing)
        on_progress(counts.progress())
        counts.check()
        left = [shard for shard in plan.shards if shard.shard not in standing]
        if left:
            # it is written again when all is there again
            (folder / MANIFEST).unlink(missing_ok=True)
            with closing(run_shards(left, options, job)) as results:
                for result in results:
                    counts.add(result)
                    on_progress(counts.progress())
                    counts.check()
        seconds = time.monotonic() - begun
        manifest = _whole(plan, options, counts.missing, seconds)
        if left or not (folder / MANIFEST).is_file():
            write_file(folder / MANIFEST, as_json(manifest))
    done = counts.done_now
    return EncodedSummary(
        output=folder,
        num_rows=manifest.num_rows,
        num_failed=manifest.num_failed,
        num_shards=len(manifest.shards),
        num_reused=len(standing),
        seconds=seconds,
        rows_per_second=done / seconds,
        missing=manifest.missing,
    )


class _Counts:
    """Rows that are done, rows that failed, and shards that cannot be had."""

    def __init__(
        self, plan: Plan, options: BulkOptions, standing: dict[int, ShardManifest]
    ) -> None:
        self._plan = plan
        self._options = options
        self._before = sum(shard.num_rows for shard in standing.values())
        self._failed = sum(shard.num_failed for shard in standing.values())
        self._made_by = {shard.made_by: number for number, shard in standing.items()}
        self.done_now = 0
        self.missing: dict[int, str] = {}
        self._check_alike()

    def add(self, result: ShardResult) -> None:
        result.check()
        if result.missing:
            self.missing[result.shard] = result.missing
            return
        self._made_by.setdefault(result.made_by, result.shard)
        self._check_alike()
        self.done_now += result.num_rows
        self._failed += result.num_failed

    def _check_alike(self) -> None:
        if len(self._made_by) > 1:
            engines = ', '.join(f'{what} (shard {n})' for what, n in self._made_by.items())
            raise ConflictError(
                f'shards were made by different engines: {engines}. Machines have different ones '
                'installed: name one with engine and precision, and restart (--restart)'
            )

    def progress(self) -> BulkProgress:
        return BulkProgress(self._plan.num_rows, self._before + self.done_now, self._failed)

    def check(self) -> None:
        """Stop where more failed than may.

        Raises:
            DataError: more did.
        """
        if self._failed > self._options.most_failed(self._plan.num_rows):
            raise DataError(
                f'{self._failed:,} of {self._plan.num_rows:,} rows failed, more than '
                f'max_failed={self._options.max_failed:g} allows: the part-*.json in '
                f'{str(self._options.output)!r} say which and why. Mend them, or allow more: what is '
                'done is kept'
            )


def _planned(paths: Sequence[Path], options: BulkOptions, job: dict[str, Any]) -> Plan:
    path = options.output / PLAN
    known = load_plan(path) if path.exists() else None
    if known is None:
        _check_empty(options.output)
    plan = make_plan(paths, job, columns_of(options), options.rows_per_shard, known)
    if plan != known:
        write_file(path, as_json(plan))
    return plan


def _check_empty(folder: Path) -> None:
    """Refuse a folder with shards of somebody else, whose names would be taken."""
    others = sorted(path.name for path in _outputs(folder))
    if others:
        raise ConflictError(
            f'{str(folder)!r} holds {", ".join(others[:_NAMES_SHOWN])}, and no {PLAN} that says where '
            'from: give another output'
        )


def _outputs(folder: Path) -> list[Path]:
    return [*folder.glob('part-*'), *folder.glob(MANIFEST)]


def _clear(folder: Path) -> None:
    if not (folder / PLAN).exists():
        return
    # the plan is last: without it nobody knows that the rest was ours
    for path in [*_outputs(folder), folder / PLAN]:
        path.unlink(missing_ok=True)


def _standing(plan: Plan, options: BulkOptions) -> dict[int, ShardManifest]:
    """The shards that are there as they were written, by their numbers."""
    found, job = {}, job_hash(plan.job)
    for shard in plan.shards:
        path = options.output / f'{shard_name(shard.shard)}.json'
        if not path.is_file():
            continue
        try:
            known = from_json(ShardManifest, path)
        except DataError:
            # it is written again
            continue
        is_same = (known.job, known.source, known.start, known.stop, known.fingerprint) == (
            job,
            shard.source,
            shard.start,
            shard.stop,
            shard.fingerprint,
        )
        if is_same and all(is_as_described(options.output / f.name, f) for f in known.files):
            found[shard.shard] = known
    return found


def _whole(plan: Plan, options: BulkOptions, missing: dict[int, str], seconds: float) -> Manifest:
    shards: list[ShardRecord] = []
    dimension, engine, precision = 0, '', ''
    lost = list(plan.unreadable)
    for shard in plan.shards:
        if shard.shard in missing:
            reason = missing[shard.shard]
            lost.append(MissingInput(shard.source, shard.start, shard.stop, reason))
            continue
        known = from_json(ShardManifest, options.output / f'{shard_name(shard.shard)}.json')
        dimension, engine, precision = known.dimension, known.engine, known.precision
        shards.append(
            ShardRecord(
                known.shard,
                known.source,
                known.start,
                known.stop,
                known.files,
                known.num_rows,
                known.num_failed,
            )
        )
    return Manifest(
        model=options.model_name,
        model_sha256=plan.job['model_sha256'],
        dimension=dimension,
        engine=engine,
        precision=precision,
        format=options.format,
        options=plan.job,
        shards=tuple(shards),
        missing=tuple(lost),
        num_rows=sum(shard.num_rows for shard in shards),
        num_failed=sum(shard.num_failed for shard in shards),
        seconds=round(seconds, 3),
    )
