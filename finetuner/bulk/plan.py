"""Which rows of which input go into which shard: decided once, and kept beside the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuner.bulk.inputs import open_input
from finetuner.bulk.manifest import VERSION, MissingInput, from_json
from finetuner.bulk.rows import Columns
from finetuner.excepts import ConflictError, DataError

PLAN = 'plan.json'
_MEND = 'give another output, or restart (--restart), which does all of it again'


@dataclass(frozen=True)
class PlannedShard:
    """The rows of one shard.

    Attributes:
        shard: its number.
        source: the input file or folder.
        start: its first row there, from 0.
        stop: the row after its last.
        fingerprint: of the input.
    """

    shard: int
    source: str
    start: int
    stop: int
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """An input.

    Attributes:
        path: absolute.
        fingerprint: of it, as it was.
        num_rows: in it; None where it could not be read.
        reason: why it could not be read; else empty.
    """

    path: str
    fingerprint: str
    num_rows: int | None
    reason: str = ''


@dataclass(frozen=True)
class Plan:
    """All that is to be encoded.

    Attributes:
        job: the model and the options that change what is written.
        sources: the inputs, in order.
        shards: in order.
        version: of this description.
    """

    job: dict[str, Any]
    sources: tuple[Source, ...]
    shards: tuple[PlannedShard, ...]
    version: int = VERSION

    @property
    def num_rows(self) -> int:
        """Of all shards."""
        return sum(shard.stop - shard.start for shard in self.shards)

    @property
    def unreadable(self) -> list[MissingInput]:
        """Inputs that could not be opened."""
        return [MissingInput(s.path, None, None, s.reason) for s in self.sources if s.reason]


def job_hash(job: dict[str, Any]) -> str:
    """Of a job, 64 hex characters."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def load_plan(path: Path) -> Plan:
    """Read a plan back.

    Raises:
        DataError: the file is no plan.
    """
    return from_json(Plan, path, {'sources': Source, 'shards': PlannedShard})


def make_plan(
    paths: Sequence[Path],
    job: dict[str, Any],
    columns: Columns,
    rows_per_shard: int,
    known: Plan | None,
    on_source: Callable[[], None] = lambda: None,
) -> Plan:
    """Divide inputs into shards, or go on with a plan that fits them.

    Args:
        paths: of the inputs.
        job: what is to be done with them.
        columns: of the inputs.
        rows_per_shard: at most so many.
        known: what was planned before, if it was.
        on_source: called when an input has been looked at.

    Raises:
        ConfigError: an input has no such column.
        ConflictError: what was planned before was something else; says what.
        DataError: there is no row to encode.
    """
    if known is not None:
        _check_same(known, paths, job)
    before = {source.path: source for source in known.sources} if known else {}
    sources, fresh = [], []
    for path in paths:
        old = before.get(str(path))
        source = _looked_at(path, columns, old)
        if old is None or (old.reason and not source.reason):
            fresh.append(source)
        elif not old.reason and source.fingerprint != old.fingerprint:
            raise ConflictError(
                f'{str(path)!r} was changed since encoding began ({old.fingerprint}, now '
                f'{source.fingerprint}): {_MEND}'
            )
        sources.append(source)
        on_source()
    shards = list(known.shards) if known else []
    # a file that could not be read before comes last, so that those after it keep their numbers
    for source in fresh:
        for start in range(0, source.num_rows or 0, rows_per_shard):
            stop = min(start + rows_per_shard, source.num_rows or 0)
            shard = PlannedShard(len(shards), source.path, start, stop, source.fingerprint)
            shards.append(shard)
    if not shards:
        reasons = [source.reason for source in sources if source.reason]
        raise DataError(reasons[0] if reasons else 'the input holds no rows: nothing to encode')
    return Plan(job, tuple(sources), tuple(shards))


def _looked_at(path: Path, columns: Columns, old: Source | None) -> Source:
    source = open_input(path, columns)
    fingerprint = ''
    try:
        fingerprint = source.fingerprint()
        if old is not None and old.num_rows is not None and old.fingerprint == fingerprint:
            return old
        source.check_columns(columns)
        return Source(str(path), fingerprint, source.num_rows(columns))
    except DataError as error:
        return Source(str(path), fingerprint, None, str(error))


def _check_same(known: Plan, paths: Sequence[Path], job: dict[str, Any]) -> None:
    for name in job:
        if known.job.get(name) != job[name]:
            what = (
                'the model is another'
                if name == 'model_sha256'
                else f'{name} was {known.job.get(name)!r}, now {job[name]!r}'
            )
            raise ConflictError(f'the output was begun otherwise: {what}: {_MEND}')
    now, then = [str(path) for path in paths], [source.path for source in known.sources]
    for text, others, kind in ((now, then, 'is new'), (then, now, 'is missing')):
        for path in text:
            if path not in others:
                raise ConflictError(f'the input was another: {path!r} {kind}: {_MEND}')
    if now != then:
        raise ConflictError(f'the input was in another order: {_MEND}')
