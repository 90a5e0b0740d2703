"""What becomes of a run: each change in one statement, and only from the states it may come from.

A run is CREATED, then STARTED by a worker, then FINISHED or FAILED. A run of a server's queue waits
in between: as long as it is CREATED and WAITING it belongs to nobody, and whoever claims it has
TAKEN it. Should its worker end without a word, it is WAITING again, a set number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.engine import Result

from finetuner.runs.history import RunHistory
from finetuner.runs.records import (
    MAX_DETAILS,
    LogLine,
    ProcessMark,
    RunRecord,
    log_rows,
    now,
    run_record,
    storable_text,
)
from finetuner.runs.states import CREATED, FAILED, FINISHED, GOING, STARTED, TAKEN, WAITING
from finetuner.runs.tables import LogLineRow, RunRow

_WORKERLESS = {'worker_pid': None, 'worker_mark': None}


class RunTransitions(RunHistory):
    """Changes of runs' states, by their numbers."""

    def set_worker(self, run_id: int, worker: ProcessMark) -> None:
        """Say which process is about to do a run; one that has started has said so itself."""
        self._change(run_id, [CREATED], worker_pid=worker.pid, worker_mark=worker.mark)

    def mark_started(self, run_id: int, worker: ProcessMark) -> bool:
        """CREATED to STARTED; False when the run is in another state, or waits for another worker."""
        values = {
            'status': STARTED,
            'started_at': now(),
            'worker_pid': worker.pid,
            'worker_mark': worker.mark,
        }
        query = update(RunRow).where(RunRow.id == run_id, RunRow.status == CREATED)
        query = query.where(RunRow.queue.is_distinct_from(WAITING))
        with self._database.session() as session:
            return changed_rows(session.execute(query.values(values))) == 1

    def reopen(
        self, run_id: int, launcher: ProcessMark, host: str, queue: str | None = None
    ) -> bool:
        """FAILED to CREATED, for another worker; False when the run is in another state.

        Args:
            run_id: the run; its log, metrics and artifact id stay.
            launcher: the process that is about to start the worker.
            host: the machine both are on.
            queue: `WAITING` to have a server's worker take it.
        """
        return self._change(
            run_id,
            [FAILED],
            status=CREATED,
            details='',
            finished_at=None,
            cancel_requested=False,
            host=host,
            launcher_pid=launcher.pid,
            launcher_mark=launcher.mark,
            queue=queue,
            retries=0,
            **_WORKERLESS,
        )

    def mark_finished(self, run_id: int, worker: ProcessMark | None = None) -> bool:
        """STARTED to FINISHED; False when the run is in another state, or with another worker."""
        return self._change(
            run_id, [STARTED], worker=worker, status=FINISHED, finished_at=now(), queue=None
        )

    def mark_failed(
        self,
        run_id: int,
        details: str,
        only_from: Sequence[str] = GOING,
        seen: RunRecord | None = None,
        worker: ProcessMark | None = None,
    ) -> bool:
        """Any going state to FAILED, with the reason as the log's last line.

        Args:
            run_id: the run.
            details: the reason, in one line.
            only_from: states it may come from.
            seen: the run as it was looked at: another worker that has it by now is left alone.
            worker: says so itself; another one that has the run by now is left alone.

        Returns:
            False when the run is in another state, or with another worker; then nothing was
            changed.
        """
        details = storable_text(details, MAX_DETAILS)
        values = {'status': FAILED, 'details': details, 'finished_at': now(), 'queue': None}
        changed = _seen(update(RunRow).where(RunRow.id == run_id), seen, worker)
        changed = changed.where(RunRow.status.in_(only_from)).values(values)
        return self._change_and_log(changed, run_id, 'ERROR', f'The run failed: {details}')

    def request_cancel(self, run_id: int) -> bool:
        """Ask a going run's worker to end; False when the run has ended."""
        return self._change(run_id, GOING, cancel_requested=True)

    # the queue

    def claim(self, launcher: ProcessMark, host: str) -> RunRecord | None:
        """Take the run that has waited longest; None when none waits.

        Any number of servers may ask at once: each run goes to one of them.

        Args:
            launcher: the process that is about to start a worker for it.
            host: the machine it is on.
        """
        waiting = (
            select(RunRow)
            .where(RunRow.status == CREATED, RunRow.queue == WAITING)
            .order_by(RunRow.id)
            .limit(1)
            .with_for_update(of=RunRow, skip_locked=True)
        )
        with self._database.session() as session:
            run = session.scalars(waiting).first()
            if run is None:
                return None
            run.queue = TAKEN
            run.host = host
            run.launcher_pid, run.launcher_mark = launcher.pid, launcher.mark
            session.flush()
            return run_record(run)

    def requeue(
        self,
        run_id: int,
        reason: str,
        seen: RunRecord | None = None,
        worker: ProcessMark | None = None,
        is_retry: bool = True,
    ) -> bool:
        """Put a run that was taken back into the queue, to go on from its last checkpoint.

        Args:
            run_id: the run.
            reason: why, in one line, for the log.
            seen: see `mark_failed`.
            worker: see `mark_failed`.
            is_retry: whether that counts among the times it may be retried.

        Returns:
            False when it was in another state, with another worker, not taken, or cancelled.
        """
        changed = _seen(update(RunRow).where(RunRow.id == run_id), seen, worker).where(
            RunRow.status.in_(GOING), RunRow.queue == TAKEN, RunRow.cancel_requested.is_(False)
        )
        values = {
            'status': CREATED,
            'queue': WAITING,
            'retries': RunRow.retries + int(is_retry),
            **_WORKERLESS,
        }
        reason = storable_text(reason, MAX_DETAILS)
        return self._change_and_log(changed.values(values), run_id, 'WARNING', reason)

    def hand_on(self, run: RunRecord, worker: ProcessMark, reason: str) -> bool:
        """Give a run to the next worker of the same launcher, which goes on where the last one was.

        Args:
            run: as it was seen, with the worker that was lost.
            worker: the next.
            reason: why, in one line, for the log.

        Returns:
            False when it has ended, is cancelled, or is with another worker by now.
        """
        changed = _seen(update(RunRow).where(RunRow.id == run.id), run, None)
        changed = changed.where(RunRow.status.in_(GOING), RunRow.cancel_requested.is_(False))
        values = {
            'status': CREATED,
            'retries': RunRow.retries + 1,
            'worker_pid': worker.pid,
            'worker_mark': worker.mark,
        }
        reason = storable_text(reason, MAX_DETAILS)
        return self._change_and_log(changed.values(values), run.id, 'WARNING', reason)

    def list_taken(self) -> list[RunRecord]:
        """All runs that were taken from the queue and have not ended."""
        query = select(RunRow).where(RunRow.queue == TAKEN, RunRow.status.in_(GOING))
        with self._database.reader() as session:
            return [run_record(run) for run in session.scalars(query.order_by(RunRow.id))]

    def count_waiting(self, before: int | None = None) -> int:
        """How many runs wait, or how many wait longer than the run of this number."""
        query = select(func.count(RunRow.id))
        query = query.where(RunRow.status == CREATED, RunRow.queue == WAITING)
        if before is not None:
            query = query.where(RunRow.id < before)
        with self._database.reader() as session:
            return session.scalars(query).one()

    def _change(
        self,
        run_id: int,
        allowed_from: Sequence[str],
        worker: ProcessMark | None = None,
        **values: Any,
    ) -> bool:
        changed = update(RunRow).where(RunRow.id == run_id, RunRow.status.in_(allowed_from))
        changed = _seen(changed, None, worker)
        with self._database.session() as session:
            return changed_rows(session.execute(changed.values(values))) == 1

    def _change_and_log(self, changed: Any, run_id: int, level: str, message: str) -> bool:
        with self._database.session() as session:
            if changed_rows(session.execute(changed)) == 0:
                return False
            session.execute(insert(LogLineRow), log_rows(run_id, [LogLine(now(), level, message)]))
            return True


def _seen(query: Any, seen: RunRecord | None, worker: ProcessMark | None) -> Any:
    """Narrow a change to a run that is with the process that it was seen with."""
    if seen is not None:
        query = query.where(RunRow.launcher_mark == seen.launcher.mark)
        pid = None if seen.worker is None else seen.worker.pid
        mark = None if seen.worker is None else seen.worker.mark
        query = query.where(RunRow.worker_pid == pid, RunRow.worker_mark == mark)
    if worker is not None:
        query = query.where(RunRow.worker_pid == worker.pid, RunRow.worker_mark == worker.mark)
    return query


def changed_rows(result: Result[Any]) -> int:
    """How many rows a statement changed or deleted."""
    return int(result.rowcount)  # type: ignore[attr-defined]
