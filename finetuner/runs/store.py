"""The run store: everything that is known of experiments and runs, in SQL.

Nothing here starts or ends a process; `runs.workspace` does, and tells the store.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.engine import Result
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from finetuner.config import RunConfig
from finetuner.excepts import ConfigError, ConflictError, NotFoundError, unknown_name
from finetuner.runs.history import RunHistory
from finetuner.runs.records import (
    MAX_DETAILS,
    MAX_PAGE,
    LogLine,
    ProcessMark,
    RunRecord,
    check_name,
    experiment_dict,
    finite,
    log_rows,
    new_experiment,
    now,
    run_record,
    storable_text,
)
from finetuner.runs.states import CREATED, FAILED, FINISHED, GOING, STARTED
from finetuner.runs.tables import (
    DatasetRow,
    ExperimentRow,
    LogLineRow,
    RunRow,
)


class RunStore(RunHistory):
    """Experiments, runs, their logs, metrics and evaluations, and names of pushed data."""

    # experiments

    def create_experiment(self, name: str, description: str, owner: str | None) -> dict[str, Any]:
        """Create an experiment; ConflictError when the name is taken."""
        check_name('experiment', name)
        with _taken(f'experiment {name!r} is there already'), self._database.session() as session:
            experiment = new_experiment(name, description, owner)
            session.add(experiment)
            session.flush()
            return experiment_dict(experiment, 0)

    def get_experiment(self, name: str) -> dict[str, Any]:
        """An experiment by name; NotFoundError with the nearest names."""
        with self._database.reader() as session:
            found = session.execute(_experiments().where(ExperimentRow.name == name)).first()
            if found is None:
                raise _no_experiment(session, name)
            return experiment_dict(found[0], found[1])

    def list_experiments(self, page: int, size: int) -> list[dict[str, Any]]:
        """One page of experiments, newest first."""
        query = _experiments().order_by(ExperimentRow.id.desc())
        with self._database.reader() as session:
            return [experiment_dict(*row) for row in session.execute(_page(query, page, size))]

    def experiment_names(self) -> list[str]:
        """Names of all experiments."""
        with self._database.reader() as session:
            return list(session.scalars(select(ExperimentRow.name).order_by(ExperimentRow.id)))

    def delete_experiment(self, name: str) -> None:
        """Delete an experiment without runs; ConflictError when it got one meanwhile."""
        has_runs = select(RunRow.id).where(RunRow.experiment_id == ExperimentRow.id).exists()
        empty = delete(ExperimentRow).where(ExperimentRow.name == name, ~has_runs)
        with self._database.session() as session:
            if _count(session.execute(empty)) == 0:
                raise ConflictError(f'experiment {name!r} is gone already, or got a new run')

    # runs

    def check_run_name(self, experiment_name: str, run_name: str) -> None:
        """ConfigError when a name cannot be one, ConflictError when the run's is taken."""
        check_name('experiment', experiment_name)
        check_name('run', run_name)
        with self._database.reader() as session:
            if session.scalars(_runs(experiment_name, run_name)).first() is not None:
                raise ConflictError(_run_taken(experiment_name, run_name))

    def create_run(
        self,
        config: RunConfig,
        run_name: str,
        launcher: ProcessMark,
        host: str,
        owner: str | None = None,
    ) -> RunRecord:
        """Create a run and, where it is missing, its experiment.

        Args:
            config: names the experiment.
            run_name: unique within it.
            launcher: the process that is about to start a worker for it.
            host: the machine both are on.
            owner: whose run it is.

        Raises:
            ConflictError: the name is taken.
        """
        self.check_run_name(config.experiment_name, run_name)
        taken = _run_taken(config.experiment_name, run_name)
        with _taken(taken), self._database.session() as session:
            by_name = select(ExperimentRow).where(ExperimentRow.name == config.experiment_name)
            experiment = session.scalars(by_name).first()
            if experiment is None:
                experiment = new_experiment(config.experiment_name, '', owner)
            run = RunRow(
                experiment=experiment,
                name=run_name,
                status=CREATED,
                details='',
                description=config.description,
                config=finite(config.dict()),
                artifact_id=secrets.token_hex(12),
                owner=owner,
                created_at=now(),
                progress={},
                cancel_requested=False,
                host=host,
                launcher_pid=launcher.pid,
                launcher_mark=launcher.mark,
            )
            session.add(run)
            session.flush()
            return run_record(run)

    def get_run(self, experiment_name: str, run_name: str) -> RunRecord:
        """A run by name; NotFoundError with the nearest names."""
        with self._database.reader() as session:
            run = session.scalars(_runs(experiment_name, run_name)).first()
            if run is not None:
                return run_record(run)
            by_experiment = _runs(experiment_name).with_only_columns(RunRow.name)
            names = session.scalars(by_experiment.order_by(RunRow.id.desc()).limit(1000)).all()
            if not names:
                self._check_experiment(session, experiment_name)
            raise NotFoundError(
                f'in experiment {experiment_name!r}: {unknown_name("run", run_name, names)}'
            )

    def read_run(self, run_id: int) -> RunRecord:
        """A run by its row; NotFoundError when it was deleted."""
        with self._database.reader() as session:
            run = session.get(RunRow, run_id)
            if run is None:
                raise NotFoundError(f'run number {run_id} was deleted')
            return run_record(run)

    def find_by_artifact(self, artifact_id: str) -> RunRecord | None:
        """The run that makes, or made, an artifact."""
        with self._database.reader() as session:
            run = session.scalars(select(RunRow).where(RunRow.artifact_id == artifact_id)).first()
            return None if run is None else run_record(run)

    def list_runs(self, experiment_name: str | None, page: int, size: int) -> list[RunRecord]:
        """One page of runs, newest first; NotFoundError for an unknown experiment."""
        query = _page(_runs(experiment_name).order_by(RunRow.id.desc()), page, size)
        with self._database.reader() as session:
            if experiment_name is not None:
                self._check_experiment(session, experiment_name)
            return [run_record(run) for run in session.scalars(query)]

    def delete_run(self, run_id: int) -> bool:
        """Delete an ended run with all that was written about it; False when it is going."""
        with self._database.session() as session:
            ended = delete(RunRow).where(RunRow.id == run_id, RunRow.status.not_in(GOING))
            return _count(session.execute(ended)) == 1

    # what becomes of a run: each change only from the states it is allowed from

    def set_worker(self, run_id: int, worker: ProcessMark) -> None:
        """Say which process is about to do a run; one that has started has said so itself."""
        self._change(run_id, [CREATED], worker_pid=worker.pid, worker_mark=worker.mark)

    def mark_started(self, run_id: int, worker: ProcessMark) -> bool:
        """CREATED to STARTED; False when the run is in another state."""
        return self._change(
            run_id,
            [CREATED],
            status=STARTED,
            started_at=now(),
            worker_pid=worker.pid,
            worker_mark=worker.mark,
        )

    def reopen(self, run_id: int, launcher: ProcessMark, host: str) -> bool:
        """FAILED to CREATED, for another worker; False when the run is in another state.

        Args:
            run_id: the run; its log, metrics and artifact id stay.
            launcher: the process that is about to start the worker.
            host: the machine both are on.
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
            worker_pid=None,
            worker_mark=None,
        )

    def mark_finished(self, run_id: int) -> bool:
        """STARTED to FINISHED; False when the run is in another state."""
        return self._change(run_id, [STARTED], status=FINISHED, finished_at=now())

    def mark_failed(
        self,
        run_id: int,
        details: str,
        only_from: Sequence[str] = GOING,
        seen: RunRecord | None = None,
    ) -> bool:
        """Any going state to FAILED, with the reason as the log's last line.

        Args:
            run_id: the run.
            details: the reason, in one line.
            only_from: states it may come from.
            seen: the run as it was looked at: another worker that has it by now is left alone.

        Returns:
            False when the run is in another state, or with another worker; then nothing was
            changed.
        """
        details = storable_text(details, MAX_DETAILS)
        with self._database.session() as session:
            values = {'status': FAILED, 'details': details, 'finished_at': now()}
            changed = update(RunRow).where(RunRow.id == run_id, RunRow.status.in_(only_from))
            if seen is not None:
                pid = None if seen.worker is None else seen.worker.pid
                mark = None if seen.worker is None else seen.worker.mark
                changed = changed.where(RunRow.worker_pid == pid, RunRow.worker_mark == mark)
                changed = changed.where(RunRow.launcher_mark == seen.launcher.mark)
            if _count(session.execute(changed.values(values))) == 0:
                return False
            last = LogLine(now(), 'ERROR', f'The run failed: {details}')
            session.execute(insert(LogLineRow), log_rows(run_id, [last]))
            return True

    def request_cancel(self, run_id: int) -> bool:
        """Ask a going run's worker to end; False when the run has ended."""
        return self._change(run_id, GOING, cancel_requested=True)

    # names of pushed data

    def name_dataset(self, name: str, sha256: str, num_documents: int, num_bytes: int) -> None:
        """Give stored data a name; a name that is there moves to the new data."""
        check_name('data', name)
        with self._database.session() as session:
            session.merge(
                DatasetRow(
                    name=name,
                    sha256=sha256,
                    num_documents=num_documents,
                    num_bytes=num_bytes,
                    created_at=now(),
                )
            )

    def find_dataset(self, name: str) -> str:
        """The sha256 of the data of that name; NotFoundError with the nearest names."""
        with self._database.reader() as session:
            found = session.get(DatasetRow, name)
            if found is None:
                names = session.scalars(select(DatasetRow.name)).all()
                raise NotFoundError(unknown_name('data', name, names))
            return found.sha256

    def _change(self, run_id: int, allowed_from: Sequence[str], **values: Any) -> bool:
        changed = update(RunRow).where(RunRow.id == run_id, RunRow.status.in_(allowed_from))
        with self._database.session() as session:
            return _count(session.execute(changed.values(values))) == 1

    @staticmethod
    def _check_experiment(session: Session, name: str) -> None:
        if (
            session.scalars(select(ExperimentRow.id).where(ExperimentRow.name == name)).first()
            is None
        ):
            raise _no_experiment(session, name)


def _experiments() -> Select[Any]:
    num_runs = select(func.count(RunRow.id)).where(RunRow.experiment_id == ExperimentRow.id)
    return select(ExperimentRow, num_runs.scalar_subquery())


def _runs(experiment_name: str | None, run_name: str | None = None) -> Select[Any]:
    query = select(RunRow).join(RunRow.experiment)
    if experiment_name is not None:
        query = query.where(ExperimentRow.name == experiment_name)
    if run_name is not None:
        query = query.where(RunRow.name == run_name)
    return query


def _page(query: Select[Any], page: int, size: int) -> Select[Any]:
    if page < 1 or not 1 <= size <= MAX_PAGE:
        raise ConfigError(
            f'page {page} of size {size}: pages count from 1 and hold 1 to {MAX_PAGE} entries'
        )
    return query.limit(size).offset((page - 1) * size)


def _no_experiment(session: Session, name: str) -> NotFoundError:
    names = session.scalars(select(ExperimentRow.name).limit(1000)).all()
    return NotFoundError(unknown_name('experiment', name, names))


def _run_taken(experiment_name: str, run_name: str) -> str:
    return (
        f'run {run_name!r} is there already in experiment {experiment_name!r}: choose another '
        'run_name, leave it out, or delete that run'
    )


@contextmanager
def _taken(message: str) -> Iterator[None]:
    """Say what a broken uniqueness means."""
    try:
        yield
    except IntegrityError as error:
        raise ConflictError(message) from error


def _count(result: Result[Any]) -> int:
    return int(result.rowcount)  # type: ignore[attr-defined]
