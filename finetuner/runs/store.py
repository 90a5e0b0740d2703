"""The run store: everything that is known of experiments and runs, in SQL.

Nothing here starts or ends a process; `runs.workspace` does, and tells the store.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from finetuner.config import RunConfig
from finetuner.excepts import ConfigError, ConflictError, NotFoundError, unknown_name
from finetuner.runs.aliases import Aliases
from finetuner.runs.records import (
    MAX_PAGE,
    ProcessMark,
    RunRecord,
    check_name,
    dataset_dict,
    experiment_dict,
    finite,
    new_experiment,
    now,
    run_record,
)
from finetuner.runs.states import CREATED, GOING, WAITING
from finetuner.runs.tables import DatasetRow, ExperimentRow, HoldingRow, RunRow
from finetuner.runs.transitions import RunTransitions, changed_rows
from finetuner.storage.database import Database


class RunStore(RunTransitions):
    """Experiments, runs, their logs, metrics and evaluations, and names of pushed data.

    Names belong to an owner, who sees no others; numbers of runs and ids of artifacts are known to
    whom the owner told them.

    Attributes:
        aliases: names for artifacts.

    Args:
        database: where all is kept.
        owner: whose names these are; '' is this machine's own user.
        only_public: see only what the owner shares, as others do.
    """

    def __init__(self, database: Database, owner: str = '', only_public: bool = False) -> None:
        super().__init__(database)
        self.owner = owner
        self._only_public = only_public
        self.aliases = Aliases(database, owner, only_public)

    # experiments

    def create_experiment(self, name: str, description: str) -> dict[str, Any]:
        """Create an experiment; ConflictError when the name is taken."""
        check_name('experiment', name)
        with _taken(f'experiment {name!r} is there already'), self._database.session() as session:
            experiment = new_experiment(name, description, self.owner)
            session.add(experiment)
            session.flush()
            return experiment_dict(experiment, 0)

    def get_experiment(self, name: str) -> dict[str, Any]:
        """An experiment by name; NotFoundError with the nearest names."""
        with self._database.reader() as session:
            found = session.execute(self._experiments().where(ExperimentRow.name == name)).first()
            if found is None:
                raise self._no_experiment(session, name)
            return experiment_dict(found[0], found[1])

    def list_experiments(self, page: int, size: int) -> list[dict[str, Any]]:
        """One page of experiments, newest first."""
        query = self._experiments().order_by(ExperimentRow.id.desc())
        with self._database.reader() as session:
            return [experiment_dict(*row) for row in session.execute(_page(query, page, size))]

    def experiment_names(self) -> list[str]:
        """Names of all experiments."""
        with self._database.reader() as session:
            return list(session.scalars(self._experiment_names().order_by(ExperimentRow.id)))

    def delete_experiment(self, name: str) -> None:
        """Delete an experiment without runs; ConflictError when it got one meanwhile."""
        has_runs = select(RunRow.id).where(RunRow.experiment_id == ExperimentRow.id).exists()
        mine = (ExperimentRow.owner == self.owner, ExperimentRow.name == name)
        empty = delete(ExperimentRow).where(*mine, ~has_runs)
        with self._database.session() as session:
            if changed_rows(session.execute(empty)) == 0:
                raise ConflictError(f'experiment {name!r} is gone already, or got a new run')

    # runs

    def check_run_name(self, experiment_name: str, run_name: str) -> None:
        """ConfigError when a name cannot be one, ConflictError when the run's is taken."""
        check_name('experiment', experiment_name)
        check_name('run', run_name)
        with self._database.reader() as session:
            if session.scalars(self._runs(experiment_name, run_name)).first() is not None:
                raise ConflictError(_run_taken(experiment_name, run_name))

    def create_run(
        self,
        config: RunConfig,
        run_name: str,
        launcher: ProcessMark,
        host: str,
        max_retries: int | None = None,
    ) -> RunRecord:
        """Create a run and, where it is missing, its experiment.

        Args:
            config: names the experiment.
            run_name: unique within it.
            launcher: the process that is about to start a worker for it.
            host: the machine both are on.
            max_retries: None for a run that its launcher starts; otherwise it waits in the queue,
                and is retried so often at most when its worker dies.

        Raises:
            ConflictError: the name is taken.
        """
        self.check_run_name(config.experiment_name, run_name)
        taken = _run_taken(config.experiment_name, run_name)
        with _taken(taken), self._database.session() as session:
            run = RunRow(
                experiment=self._made_experiment(session, config.experiment_name),
                name=run_name,
                status=CREATED,
                details='',
                description=config.description,
                config=finite(config.dict()),
                artifact_id=secrets.token_hex(12),
                owner=self.owner,
                public=config.public,
                created_at=now(),
                progress={},
                cancel_requested=False,
                host=host,
                launcher_pid=launcher.pid,
                launcher_mark=launcher.mark,
                queue=None if max_retries is None else WAITING,
                retries=0,
                max_retries=max_retries or 0,
                beats=0,
            )
            session.add(run)
            session.flush()
            return run_record(run)

    def get_run(self, experiment_name: str, run_name: str) -> RunRecord:
        """A run by name; NotFoundError with the nearest names."""
        with self._database.reader() as session:
            run = session.scalars(self._runs(experiment_name, run_name)).first()
            if run is not None:
                return run_record(run)
            by_experiment = self._runs(experiment_name).with_only_columns(RunRow.name)
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
        """The run that makes, or made, an artifact: the owner's, or one that is public."""
        query = select(RunRow).where(RunRow.artifact_id == artifact_id)
        if self._only_public:
            query = query.where(RunRow.public)
        query = query.where((RunRow.owner == self.owner) | RunRow.public)
        with self._database.reader() as session:
            run = session.scalars(query).first()
            return None if run is None else run_record(run)

    def list_shared(self, page: int, size: int) -> list[RunRecord]:
        """One page of all owners' public runs, newest first."""
        query = select(RunRow).where(RunRow.public).order_by(RunRow.id.desc())
        with self._database.reader() as session:
            return [run_record(run) for run in session.scalars(_page(query, page, size))]

    def set_public(self, run_id: int, public: bool) -> None:
        """Share a run, its log, metrics and artifact, with everybody who may log in, or stop that."""
        with self._database.session() as session:
            session.execute(update(RunRow).where(RunRow.id == run_id).values(public=public))

    def list_runs(self, experiment_name: str | None, page: int, size: int) -> list[RunRecord]:
        """One page of runs, newest first; NotFoundError for an unknown experiment."""
        query = _page(self._runs(experiment_name).order_by(RunRow.id.desc()), page, size)
        with self._database.reader() as session:
            if experiment_name is not None:
                self._check_experiment(session, experiment_name)
            return [run_record(run) for run in session.scalars(query)]

    def delete_run(self, run_id: int) -> bool:
        """Delete an ended run with all that was written about it; False when it is going."""
        with self._database.session() as session:
            ended = delete(RunRow).where(RunRow.id == run_id, RunRow.status.not_in(GOING))
            return changed_rows(session.execute(ended)) == 1

    @contextmanager
    def deletion(self, run: RunRecord) -> Iterator[None]:
        """Delete an ended run after the caller has deleted its files; nobody names it meanwhile.

        Raises:
            ConflictError: an alias of the owner names its artifact.
        """
        with self._database.session() as session:
            self.aliases.lock_artifact(session, run.artifact_id)
            self.aliases.refuse_named(session, [run.artifact_id])
            yield
            ended = RunRow.status.not_in(GOING)
            session.execute(delete(RunRow).where(RunRow.id == run.id, ended))

    def refuse_named(self, runs: Sequence[RunRecord]) -> None:
        """ConflictError when an alias of the owner names the artifact of one of these runs."""
        with self._database.reader() as session:
            self.aliases.refuse_named(session, [run.artifact_id for run in runs])

    # names of pushed data

    def hold(self, sha256: str) -> None:
        """Say that the owner has stored this data, and is about to use it."""
        with self._database.session() as session:
            self.lock_data(session, sha256)
            session.merge(HoldingRow(owner=self.owner, sha256=sha256, created_at=now()))

    def lock_data(self, session: Session, sha256: str) -> None:
        """Wait for whoever notes that data is needed, or looks whether it is."""
        self._database.lock(session, int(sha256[:15], 16))

    def holds(self, sha256: str) -> bool:
        """Whether the owner may read this data: stored it, or it is shared under a name."""
        if not self.owner:
            return True  # the machine's own user, whose disk it is
        shared = select(DatasetRow.sha256).where(DatasetRow.sha256 == sha256, DatasetRow.public)
        with self._database.reader() as session:
            if session.get(HoldingRow, (self.owner, sha256)) is not None:
                return True
            return session.scalars(shared).first() is not None

    def name_dataset(
        self, name: str, sha256: str, num_documents: int, num_bytes: int, public: bool = False
    ) -> None:
        """Give stored data a name; a name that is there moves to the new data."""
        check_name('data', name)
        row = DatasetRow(
            owner=self.owner,
            name=name,
            sha256=sha256,
            num_documents=num_documents,
            num_bytes=num_bytes,
            public=public,
            created_at=now(),
        )
        with self._database.session() as session:
            session.merge(row)

    def find_dataset(self, name: str) -> str:
        """The sha256 of the data of that name; NotFoundError with the nearest names."""
        with self._database.reader() as session:
            found = session.get(DatasetRow, (self.owner, name))
            if found is None:
                mine = select(DatasetRow.name).where(DatasetRow.owner == self.owner)
                raise NotFoundError(unknown_name('data', name, session.scalars(mine).all()))
            return found.sha256

    def list_datasets(self) -> list[dict[str, Any]]:
        """Named data of the owner, newest first."""
        query = select(DatasetRow).where(DatasetRow.owner == self.owner)
        with self._database.reader() as session:
            rows = session.scalars(query.order_by(DatasetRow.created_at.desc())).all()
        return [dataset_dict(row) for row in rows]

    def delete_dataset(self, name: str) -> None:
        """Forget a name; the data itself stays until nothing refers to it."""
        self.find_dataset(name)
        with self._database.session() as session:
            mine = delete(DatasetRow).where(DatasetRow.owner == self.owner, DatasetRow.name == name)
            session.execute(mine)

    def _made_experiment(self, session: Session, name: str) -> ExperimentRow:
        """The experiment of that name, made when it is missing, and not deleted meanwhile."""
        by_name = (
            select(ExperimentRow)
            .where(ExperimentRow.owner == self.owner, ExperimentRow.name == name)
            .with_for_update(read=True, key_share=True)
        )
        found = session.scalars(by_name).first()
        if found is not None:
            return found
        # another run may be the first of the experiment at the same time
        with suppress(IntegrityError), session.begin_nested():
            session.add(new_experiment(name, '', self.owner))
        found = session.scalars(by_name).first()
        if found is None:
            raise ConflictError(f'experiment {name!r} was deleted just now: try again')
        return found

    def _check_experiment(self, session: Session, name: str) -> None:
        if session.scalars(self._experiment_names().where(ExperimentRow.name == name)).first():
            return
        raise self._no_experiment(session, name)

    def _no_experiment(self, session: Session, name: str) -> NotFoundError:
        names = session.scalars(self._experiment_names().limit(1000)).all()
        return NotFoundError(unknown_name('experiment', name, names))

    def _experiment_names(self) -> Select[Any]:
        query = select(ExperimentRow.name).where(ExperimentRow.owner == self.owner)
        return query.where(_has_public_run()) if self._only_public else query

    def _experiments(self) -> Select[Any]:
        num_runs = select(func.count(RunRow.id)).where(RunRow.experiment_id == ExperimentRow.id)
        if self._only_public:
            num_runs = num_runs.where(RunRow.public)
        query = select(ExperimentRow, num_runs.scalar_subquery())
        query = query.where(ExperimentRow.owner == self.owner)
        return query.where(_has_public_run()) if self._only_public else query

    def _runs(self, experiment_name: str | None, run_name: str | None = None) -> Select[Any]:
        query = select(RunRow).join(RunRow.experiment).where(ExperimentRow.owner == self.owner)
        if self._only_public:
            query = query.where(RunRow.public)
        if experiment_name is not None:
            query = query.where(ExperimentRow.name == experiment_name)
        if run_name is not None:
            query = query.where(RunRow.name == run_name)
        return query


def _has_public_run() -> Any:
    of_it = (RunRow.experiment_id == ExperimentRow.id) & RunRow.public
    return select(RunRow.id).where(of_it).exists()


def _page(query: Select[Any], page: int, size: int) -> Select[Any]:
    if page < 1 or not 1 <= size <= MAX_PAGE:
        raise ConfigError(
            f'page {page} of size {size}: pages count from 1 and hold 1 to {MAX_PAGE} entries'
        )
    return query.limit(size).offset((page - 1) * size)


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
