"""What goes into and comes out of the run store, and how it is made storable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.runs.states import GOING
from finetuner.runs.tables import DatasetRow, ExperimentRow, LogLineRow, RunRow

MAX_NAME = 200
MAX_PAGE = 100
MAX_LINE = 65_536
MAX_DETAILS = 2_000
ACTIVE = 'ACTIVE'


@dataclass(frozen=True)
class ProcessMark:
    """A process, told apart from a later one with the same id by its mark."""

    pid: int
    mark: str


@dataclass(frozen=True)
class RunRecord:
    """A run as the store had it at one moment; times are ISO strings in UTC."""

    id: int
    name: str
    experiment_name: str
    status: str
    details: str
    description: str
    config: dict[str, Any]
    artifact_id: str
    owner: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: dict[str, Any]
    cancel_requested: bool
    host: str
    launcher: ProcessMark
    worker: ProcessMark | None
    public: bool
    queue: str | None
    retries: int
    max_retries: int
    beats: int

    @property
    def is_going(self) -> bool:
        """Whether it has yet to end."""
        return self.status in GOING

    def shown(self) -> dict[str, Any]:
        """What users see of it."""
        names = (
            'name experiment_name status details description config artifact_id owner public '
            'created_at started_at finished_at progress'
        )
        return {name: getattr(self, name) for name in names.split()}


@dataclass(frozen=True)
class LogLine:
    """A line on its way into the log."""

    time: datetime
    level: str
    message: str


@dataclass(frozen=True)
class MetricValue:
    """A measured value on its way into the store; `step` is None for a whole epoch's."""

    step: int | None
    epoch: int
    name: str
    value: float


def run_record(run: RunRow) -> RunRecord:
    """The record of a row, read while its session is open."""
    worker = None
    if run.worker_pid is not None and run.worker_mark is not None:
        worker = ProcessMark(run.worker_pid, run.worker_mark)
    return RunRecord(
        id=run.id,
        name=run.name,
        experiment_name=run.experiment.name,
        status=run.status,
        details=run.details,
        description=run.description,
        config=run.config,
        artifact_id=run.artifact_id,
        owner=run.owner or None,
        created_at=run.created_at.isoformat(),
        started_at=_iso(run.started_at),
        finished_at=_iso(run.finished_at),
        progress=run.progress,
        cancel_requested=run.cancel_requested,
        host=run.host,
        launcher=ProcessMark(run.launcher_pid, run.launcher_mark),
        worker=worker,
        public=run.public,
        queue=run.queue,
        retries=run.retries,
        max_retries=run.max_retries,
        beats=run.beats,
    )


def experiment_dict(experiment: ExperimentRow, num_runs: int) -> dict[str, Any]:
    """What users see of an experiment."""
    return {
        'name': experiment.name,
        'status': ACTIVE,
        'description': experiment.description,
        'created_at': experiment.created_at.isoformat(),
        'owner': experiment.owner or None,
        'num_runs': num_runs,
    }


def dataset_dict(row: DatasetRow) -> dict[str, Any]:
    """What users see of named data."""
    return {
        'name': row.name,
        'data': f'sha256:{row.sha256}',
        'num_documents': row.num_documents,
        'num_bytes': row.num_bytes,
        'public': row.public,
        'created_at': row.created_at.isoformat(),
    }


def new_experiment(name: str, description: str, owner: str) -> ExperimentRow:
    """The row of an experiment made now."""
    return ExperimentRow(
        name=name,
        description=storable_text(description, MAX_LINE),
        owner=owner,
        created_at=now(),
    )


def log_rows(run_id: int, lines: Sequence[LogLine]) -> list[dict[str, Any]]:
    """Lines as values to insert."""
    return [
        {
            'run_id': run_id,
            'time': line.time,
            'level': line.level,
            'message': storable_text(line.message, MAX_LINE),
        }
        for line in lines
    ]


def metric_rows(run_id: int, metrics: Sequence[MetricValue]) -> list[dict[str, Any]]:
    """Measured values as values to insert."""
    return [
        {
            'run_id': run_id,
            'step': metric.step,
            'epoch': metric.epoch,
            'name': metric.name,
            'value': None if math.isnan(metric.value) else float(metric.value),
        }
        for metric in metrics
    ]


def line_text(line: LogLineRow) -> str:
    """A line as it is read: time in UTC, level, message."""
    return f'{line.time:%Y-%m-%d %H:%M:%S} {line.level:<8} {line.message}'


def check_name(kind: str, name: object) -> None:
    """ConfigError when something cannot be the name of an experiment, run or data set."""
    fits = isinstance(name, str) and 1 <= len(name) <= MAX_NAME
    # Not printable are control characters, lone surrogates and spaces other than ' '.
    if fits and str(name).isprintable() and str(name).strip() == name:
        return
    raise ConfigError(
        f'{name!r} cannot name {kind}: allowed are 1 to {MAX_NAME} printable characters, without '
        'spaces at the ends'
    )


def storable_text(text: str, most: int) -> str:
    """Text as any database takes it: without NUL and lone surrogates, not endlessly long."""
    text = text.replace('\0', '\N{REPLACEMENT CHARACTER}')
    text = text.encode('utf-8', 'replace').decode('utf-8')
    if len(text) > most:
        text = f'{text[:most]}... ({len(text) - most:,} more characters)'
    return text


def finite(value: Any) -> Any:
    """A JSON value as any database takes it: nan and infinity become null, numpy numbers plain."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, str):
        return storable_text(value, MAX_LINE)
    if value is None or isinstance(value, (bool, int)):
        return value
    number = value.item() if hasattr(value, 'item') else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(timezone.utc)


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
