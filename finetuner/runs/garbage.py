"""Deletes what nothing refers to any more: data without a name or a run, and unfinished work.

Whoever stores data notes that before, in the database, and this deletes data in the transaction in
which it has seen that no one needs it: so data that is about to be used is not deleted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from finetuner.excepts import ConfigError
from finetuner.runs.records import now
from finetuner.runs.submission import REFERENCE
from finetuner.runs.tables import DatasetRow, HoldingRow, RunRow
from finetuner.runs.workspace import Workspace
from finetuner.storage.leftovers import KEPT_SECONDS, delete_path, left_over

_DATA = re.compile(r'([0-9a-f]{64})\.docs')
# what is being written has these names until it is whole
_UNFINISHED = ('.push-*', '.staging-*')


@dataclass
class Garbage:
    """What was, or would be, deleted.

    Attributes:
        data: hashes of data.
        unfinished: paths of what a process left that was killed.
        num_bytes: of all that.
    """

    data: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    num_bytes: int = 0


def collect_garbage(
    workspace: Workspace, seconds: float = KEPT_SECONDS, only_look: bool = False
) -> Garbage:
    """Delete data that no name and no run refers to, and what killed processes left.

    Runs, named data and artifacts are never touched.

    Args:
        workspace: any owner's; all owners' data is looked at.
        seconds: what is newer stays.
        only_look: delete nothing.

    Returns:
        What was deleted, or would be.

    Raises:
        ConfigError: seconds is negative.
    """
    if not seconds >= 0:
        raise ConfigError(f'seconds is {seconds}: it takes 0 or more')
    found = Garbage()
    for sha256 in list(_stored(workspace)):
        _delete_data(workspace, sha256, seconds, only_look, found)
    for path, num_bytes in left_over(_unfinished(workspace.settings.home), seconds):
        found.unfinished.append(str(path))
        found.num_bytes += num_bytes
        if not only_look:
            delete_path(path)
    return found


def _stored(workspace: Workspace) -> Iterator[str]:
    for name in workspace.data.list_names():
        match = _DATA.fullmatch(name)
        if match:
            yield match[1]


def _delete_data(
    workspace: Workspace, sha256: str, seconds: float, only_look: bool, found: Garbage
) -> None:
    key = f'{sha256}.docs'
    # a writing transaction: nobody can note that the data is needed until it has ended
    with workspace.database.session() as session:
        workspace.runs.lock_data(session, sha256)
        oldest = now() - timedelta(seconds=seconds)
        fresh = select(HoldingRow.sha256).where(
            HoldingRow.sha256 == sha256, HoldingRow.created_at > oldest
        )
        if session.scalars(fresh).first() or _is_needed(session, sha256):
            return
        if workspace.data.seconds_since_change(key) < seconds:
            return
        found.data.append(sha256)
        found.num_bytes += workspace.data.size(key)
        if not only_look:
            session.execute(delete(HoldingRow).where(HoldingRow.sha256 == sha256))
            workspace.data.delete(key)


def _is_needed(session: Session, sha256: str) -> bool:
    named = select(DatasetRow.name).where(DatasetRow.sha256 == sha256)
    if session.scalars(named).first():
        return True
    return any(sha256 in _references(config) for config in session.scalars(select(RunRow.config)))


def _references(config: object) -> set[str]:
    return set(REFERENCE.findall(str(config)))


def _unfinished(home: Path) -> Iterator[Path]:
    for folder in (home, home / 'data', home / 'artifacts', home / 'cache', home / 'fetched'):
        for pattern in _UNFINISHED:
            yield from folder.glob(pattern)
