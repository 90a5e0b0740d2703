"""Names for artifacts, `name@label`: those that were set, and `name@latest`, which nobody sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, select
from sqlalchemy.orm import Session

from finetuner.excepts import ConfigError, ConflictError, NotFoundError, unknown_name
from finetuner.names import is_alias
from finetuner.runs.records import check_name, now
from finetuner.runs.states import FINISHED
from finetuner.runs.tables import AliasRow, ExperimentRow, RunRow
from finetuner.storage.database import Database

LATEST = 'latest'
_MOST_NAMES = 1000


@dataclass(frozen=True)
class NamedArtifact:
    """What a name stands for; `run` and `experiment` are None for an artifact that no run made."""

    alias: str | None
    artifact_id: str
    run: str | None
    experiment: str | None
    updated_at: str | None


class Aliases:
    """The names that an owner has given to artifacts: of own runs, and of those that others share.

    Args:
        database: where they are kept.
        owner: whose names these are; '' is this machine's own user.
        only_public: see only names of what the owner shares, as others do.
    """

    def __init__(self, database: Database, owner: str = '', only_public: bool = False) -> None:
        self._database = database
        self._owner = owner
        self._only_public = only_public

    def find(self, alias: str) -> NamedArtifact:
        """What an alias stands for now, by one query over indexes.

        An artifact without a run is one that no run made, or whose run is gone: who asks decides.

        Raises:
            NotFoundError: nothing has that name; the nearest are given.
        """
        name, _, label = alias.rpartition('@')
        query = self._latest(name) if label == LATEST else self._set(name, label)
        with self._database.reader() as session:
            found = session.execute(query).first()
            if found is None:
                raise self._unknown(session, alias, name if label == LATEST else None)
            return _named(alias, *found)

    def list(self) -> Sequence[NamedArtifact]:
        """All aliases that were set, in the order of their names."""
        query = self._set().order_by(AliasRow.name, AliasRow.label)
        with self._database.reader() as session:
            return [_named(_alias(*row[:2]), *row[2:]) for row in session.execute(_keyed(query))]

    def list_of(self, artifact_id: str) -> Sequence[str]:
        """The aliases of an artifact, `name@latest` among them as long as it is the newest."""
        names = select(AliasRow.name, AliasRow.label).order_by(AliasRow.name, AliasRow.label)
        names = names.where(AliasRow.owner == self._owner, AliasRow.artifact_id == artifact_id)
        experiment = select(ExperimentRow.name).join(RunRow, self._is_of_experiment())
        experiment = experiment.where(RunRow.artifact_id == artifact_id)
        with self._database.reader() as session:
            found = [_alias(*row) for row in session.execute(names)]
            name = session.scalars(experiment).first()
            latest = None if name is None else session.execute(self._latest(name)).first()
        is_latest = latest is not None and latest[0] == artifact_id
        return [*found, _alias(str(name), LATEST)] if is_latest else found

    def set(self, alias: str, artifact_id: str, of_run: bool = True) -> NamedArtifact:
        """Have an alias stand for an artifact; one that is there moves.

        Args:
            alias: `name@label`.
            artifact_id: 24 hex characters.
            of_run: whether a run made it, which may be deleted meanwhile.

        Raises:
            ConfigError: it is no alias, or `latest`, which cannot be set.
            NotFoundError: the artifact is not there, or may not be read.
        """
        name, label = _checked(alias)
        row = AliasRow(
            owner=self._owner,
            name=name,
            label=label,
            artifact_id=artifact_id,
            updated_at=now(),
        )
        with self._database.session() as session:
            # two who move one alias at once; then whoever deletes the artifact's run
            digest = hashlib.sha256('\n'.join((self._owner, alias)).encode()).hexdigest()
            self._database.lock(session, int(digest[:15], 16))
            self.lock_artifact(session, artifact_id)
            there = select(RunRow.id).where(RunRow.artifact_id == artifact_id, self._is_readable())
            if of_run and session.scalars(there).first() is None:
                raise NotFoundError(f'there is no artifact {artifact_id!r}: its run was deleted')
            session.merge(row)
        return self.find(alias)

    def delete(self, alias: str) -> None:
        """Forget an alias; the artifact stays.

        Raises:
            ConfigError: it is `latest`, which nobody has set.
            NotFoundError: there is none of that name; the nearest are given.
        """
        name, label = _checked(alias)
        mine = and_(AliasRow.owner == self._owner, AliasRow.name == name, AliasRow.label == label)
        with self._database.session() as session:
            if session.scalars(select(AliasRow.artifact_id).where(mine)).first() is None:
                raise self._unknown(session, alias)
            session.execute(delete(AliasRow).where(mine))

    def lock_artifact(self, session: Session, artifact_id: str) -> None:
        """Until the session ends, nobody gives an artifact a name."""
        self._database.lock(session, int(artifact_id[:15], 16))

    def refuse_named(self, session: Session, ids: Sequence[str]) -> None:
        """Stop what would take artifacts away from the owner's aliases.

        Raises:
            ConflictError: some of them have a name; says which.
        """
        found: list[str] = []
        # a statement takes so many values, and not more
        for start in range(0, len(ids), _MOST_NAMES):
            named = select(AliasRow.name, AliasRow.label).where(
                AliasRow.owner == self._owner,
                AliasRow.artifact_id.in_(ids[start : start + _MOST_NAMES]),
            )
            found += [_alias(*row) for row in session.execute(named)]
        if found:
            shown = ', '.join(repr(alias) for alias in sorted(found)[:5])
            more = f' and {len(found) - 5} more' if len(found) > 5 else ''
            raise ConflictError(
                f'the model is still needed: it has the name {shown}{more}; move or delete the '
                'alias first, then delete the run'
            )

    def _unknown(self, session: Session, alias: str, experiment: str | None = None) -> Exception:
        """Why nothing has that name.

        Args:
            session: to look for others in.
            alias: what came.
            experiment: whose newest run was asked for.
        """
        experiments = select(ExperimentRow.name).where(ExperimentRow.owner == self._owner)
        its_own = experiments.where(ExperimentRow.name == experiment)
        # others hear nothing of an experiment that shares nothing
        asks_for_own = experiment is not None and not self._only_public
        if asks_for_own and session.scalars(its_own).first():
            return NotFoundError(
                f'there is no artifact {alias!r} yet: no run of experiment {experiment!r} has '
                'finished'
            )
        finished = experiments.join(RunRow, self._is_of_experiment()).distinct()
        known = [_alias(name, LATEST) for name in session.scalars(finished.limit(_MOST_NAMES))]
        known += [
            _alias(*row[:2]) for row in session.execute(_keyed(self._set()).limit(_MOST_NAMES))
        ]
        message = unknown_name('alias', alias, known)
        if not is_alias(alias):
            message += ' An artifact is named by its id, 24 hex characters, or as name@label.'
        return NotFoundError(message)

    def _set(self, name: str | None = None, label: str | None = None) -> Select[Any]:
        """Aliases that were set, with the runs whose artifacts they name and that may be read."""
        of_run = and_(RunRow.artifact_id == AliasRow.artifact_id, self._is_readable())
        query: Any = (
            select(AliasRow.artifact_id, RunRow.name, ExperimentRow.name, AliasRow.updated_at)
            .select_from(AliasRow)
            .join(RunRow, of_run, isouter=not self._only_public)
            .join(ExperimentRow, RunRow.experiment_id == ExperimentRow.id, isouter=True)
        )
        if name is not None:
            query = query.where(AliasRow.name == name, AliasRow.label == label)
        return query.where(AliasRow.owner == self._owner)

    def _latest(self, name: str) -> Select[Any]:
        """The newest finished run of an experiment of the owner."""
        query: Any = (
            select(RunRow.artifact_id, RunRow.name, ExperimentRow.name, RunRow.finished_at)
            .select_from(RunRow)
            .join(ExperimentRow, self._is_of_experiment())
        )
        query = query.where(ExperimentRow.owner == self._owner, ExperimentRow.name == name)
        return query.order_by(RunRow.finished_at.desc(), RunRow.id.desc()).limit(1)

    def _is_of_experiment(self) -> ColumnElement[bool]:
        return and_(RunRow.experiment_id == ExperimentRow.id, self._is_readable())

    def _is_readable(self) -> ColumnElement[bool]:
        readable = (
            RunRow.public if self._only_public else (RunRow.owner == self._owner) | RunRow.public
        )
        return and_(RunRow.status == FINISHED, readable)


def _checked(alias: str) -> tuple[str, str]:
    """Name and label of an alias that can be set or deleted."""
    name, _, label = alias.rpartition('@') if isinstance(alias, str) else ('', '', '')
    if not name or not label:
        raise ConfigError(
            f'{alias!r} is no alias: it is written name@label, such as emoji@production'
        )
    if label.lower() == LATEST:
        raise ConfigError(
            f'{alias!r} is not set or deleted by anybody: it is the newest finished run of '
            f'experiment {name!r}; choose another label, such as {_alias(name, "production")!r}'
        )
    check_name('the part of an alias before @', name)
    check_name('the part of an alias after @', label)
    return name, label


def _keyed(query: Select[Any]) -> Select[Any]:
    return query.with_only_columns(AliasRow.name, AliasRow.label, *query.selected_columns)


def _alias(name: str, label: str) -> str:
    return f'{name}@{label}'


def _named(
    alias: str, artifact_id: str, run: str | None, experiment: str | None, time: datetime | None
) -> NamedArtifact:
    updated_at = None if time is None else time.isoformat()
    return NamedArtifact(alias, artifact_id, run, experiment, updated_at)
