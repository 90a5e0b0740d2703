"""What is written about runs as they go, and read again: logs, metrics, evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import delete, insert, select, update

from finetuner.excepts import NotFoundError
from finetuner.runs.records import (
    LogLine,
    MetricValue,
    ProcessMark,
    finite,
    line_text,
    log_rows,
    metric_rows,
)
from finetuner.runs.tables import EvaluationRow, LogLineRow, MetricRow, RunRow
from finetuner.storage.database import Database


class RunHistory:
    """Log lines, metrics and evaluations of runs.

    Args:
        database: where they are kept.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self,
        run_id: int,
        lines: Sequence[LogLine] = (),
        metrics: Sequence[MetricValue] = (),
        progress: dict[str, Any] | None = None,
        worker: ProcessMark | None = None,
        beats: bool = False,
    ) -> bool:
        """Write what a worker gathered since the last time, in one transaction.

        Args:
            run_id: the run.
            lines: of the log.
            metrics: measured.
            progress: in place of what was there; None leaves that.
            worker: who writes; nothing is written when another worker has the run by now.
            beats: whether to show that the worker lives.

        Returns:
            Whether the worker should end: someone asked for that, or another one has the run.

        Raises:
            NotFoundError: the run was deleted.
        """
        wanted = select(RunRow.cancel_requested, RunRow.worker_pid, RunRow.worker_mark)
        wanted = wanted.where(RunRow.id == run_id)
        writes = bool(lines or metrics or progress is not None or beats)
        with self._database.session() if writes else self._database.reader() as session:
            found = session.execute(wanted).first()
            if found is None:
                raise NotFoundError(f'run number {run_id} was deleted')
            cancel, pid, mark = found
            if worker is not None and (pid, mark) != (worker.pid, worker.mark):
                return True
            changes: dict[str, Any] = {} if progress is None else {'progress': finite(progress)}
            if beats:
                changes['beats'] = RunRow.beats + 1
            if changes:
                session.execute(update(RunRow).where(RunRow.id == run_id).values(changes))
            if lines:
                session.execute(insert(LogLineRow), log_rows(run_id, lines))
            if metrics:
                session.execute(insert(MetricRow), metric_rows(run_id, metrics))
            return cancel

    def forget_metrics(self, run_id: int, step: int, epoch: int) -> None:
        """Delete what was measured after a place that training goes on from.

        Args:
            run_id: the run.
            step: steps that are done; values of later ones go.
            epoch: whole epochs that are done; values of later ones go, those of steps aside.
        """
        later = (MetricRow.step > step) | (MetricRow.step.is_(None) & (MetricRow.epoch >= epoch))
        with self._database.session() as session:
            session.execute(delete(MetricRow).where(MetricRow.run_id == run_id, later))

    def set_evaluation(
        self, run_id: int, stage: str, what: Literal['metrics', 'examples'], values: dict[str, Any]
    ) -> None:
        """Keep what evaluation found at a stage; what was there of that kind is replaced."""
        with self._database.session() as session:
            row = session.get(EvaluationRow, (run_id, stage))
            if row is None:
                row = EvaluationRow(run_id=run_id, stage=stage)
                session.add(row)
            setattr(row, what, finite(values))

    def read_log_lines(self, run_id: int, after: int = 0, limit: int = -1) -> list[tuple[int, str]]:
        """Lines of a run's log after an id, in order, as `(id, 'time level message')`."""
        query = select(LogLineRow).where(LogLineRow.run_id == run_id, LogLineRow.id > after)
        query = query.order_by(LogLineRow.id)
        if limit >= 0:
            query = query.limit(limit)
        with self._database.reader() as session:
            return [(row.id, line_text(row)) for row in session.scalars(query)]

    def read_metrics(self, run_id: int, name: str | None = None) -> list[MetricValue]:
        """Values measured while training, in the order they were written."""
        query = select(MetricRow).where(MetricRow.run_id == run_id).order_by(MetricRow.id)
        if name is not None:
            query = query.where(MetricRow.name == name)
        with self._database.reader() as session:
            return [
                MetricValue(m.step, m.epoch, m.name, math.nan if m.value is None else m.value)
                for m in session.scalars(query)
            ]

    def read_evaluations(
        self, run_id: int, what: Literal['metrics', 'examples']
    ) -> dict[str, dict[str, Any]]:
        """What evaluation found, by stage, 'before' first."""
        query = select(EvaluationRow).where(EvaluationRow.run_id == run_id)
        with self._database.reader() as session:
            found = {row.stage: getattr(row, what) for row in session.scalars(query)}
        order = [*(s for s in ('before', 'after') if s in found), *sorted(found)]
        return {stage: found[stage] for stage in order if found[stage] is not None}
