"""A run store with the files and processes that belong to it: what clients and workers stand on."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from docarray import Document

from finetuner.artifact_files import archive_name
from finetuner.config import RunConfig, Settings
from finetuner.data.contents import with_absolute_uris
from finetuner.data.stored.files import StoredDocuments
from finetuner.data.stored.storing import save_documents
from finetuner.excepts import ConflictError, DataError, FinetunerError, NotFoundError, ServerError
from finetuner.names import ARTIFACT_ID, is_alias, random_run_name
from finetuner.runs import processes, run_files
from finetuner.runs.aliases import NamedArtifact
from finetuner.runs.launching import Launcher, build_launcher
from finetuner.runs.records import RunRecord
from finetuner.runs.states import CREATED, FINISHED, GOING, TAKEN, WAITING
from finetuner.runs.store import RunStore
from finetuner.runs.submission import REFERENCE
from finetuner.storage.database import make_private_directory, open_database
from finetuner.storage.files import FileStore
from finetuner.training.epoch_directories import kept_epochs

if TYPE_CHECKING:
    from finetuner.storage.database import Database

logger = logging.getLogger('finetuner.runs')

CANCELLED = 'cancelled'
# between asking a worker to end and ending it: a cancelled run is gone within two seconds
CANCEL_SECONDS = 1.2


class Workspace:
    """Everything behind a `Settings`, opened when first needed.

    Args:
        settings: where runs, data and artifacts are kept.
        owner: whose names are seen; '' is this machine's own user.
        only_public: see only what the owner shares, as others do.
        launcher: starts workers; None takes what the settings say.
    """

    def __init__(
        self,
        settings: Settings,
        owner: str = '',
        only_public: bool = False,
        launcher: Launcher | None = None,
    ) -> None:
        self.settings = settings
        self.owner = owner
        self.launcher: Launcher = launcher or build_launcher(settings)
        self._only_public = only_public

    @cached_property
    def database(self) -> Database:
        """The database of the run store."""
        return open_database(self.settings.database_url)

    @cached_property
    def runs(self) -> RunStore:
        """The run store."""
        return RunStore(self.database, self.owner, self._only_public)

    @cached_property
    def artifacts(self) -> FileStore:
        """Artifacts, directories by their ids."""
        return FileStore(self.settings.artifacts_url, self.settings.home / 'cache')

    @cached_property
    def data(self) -> FileStore:
        """Pushed data, files by their hashes; beside the artifacts."""
        if self.artifacts.is_local:
            return FileStore(self.settings.home / 'data')
        url = self.settings.artifacts_url.rstrip('/') + '/data'
        return FileStore(url, self.settings.home / 'cache')

    def for_owner(self, owner: str, only_public: bool = False) -> Workspace:
        """The same place as another owner sees it, on the same connections."""
        self.database  # noqa: B018 - opened once, here
        twin = copy.copy(self)
        twin.owner, twin._only_public = owner, only_public
        twin.__dict__.pop('runs', None)
        return twin

    def close(self) -> None:
        """Close the database; a later call opens it again."""
        if 'database' in self.__dict__:
            self.database.close()
            del self.__dict__['database']
            self.__dict__.pop('runs', None)

    # data

    def push_data(
        self, docs: Sequence[Document], name: str | None = None, public: bool = False
    ) -> str:
        """Store Documents by content and, when given one, under a name; returns `sha256:<hex>`."""
        absolute = (with_absolute_uris(doc) for doc in docs)
        make_private_directory(self.settings.home)
        with tempfile.TemporaryDirectory(prefix='.push-', dir=self.settings.home) as directory:
            path = Path(directory) / 'documents'
            sha256 = save_documents(absolute, path)
            num_bytes = path.stat().st_size
            self.adopt_data(path, sha256)
        if name is not None:
            self.runs.name_dataset(name, sha256, len(docs), num_bytes, public)
        return f'sha256:{sha256}'

    def has_data(self, sha256: str) -> bool:
        """Whether the owner may read data of this hash, and it is there, and will be for a while."""
        if not self.runs.holds(sha256) or not self.data.exists(f'{sha256}.docs'):
            return False
        self.runs.hold(sha256)
        return self.data.exists(f'{sha256}.docs')

    def adopt_data(self, path: Path, sha256: str) -> None:
        """Store a file of Documents whose hash was checked; the file may be gone afterwards."""
        # noted first: what is noted is not collected as garbage between the look and its use
        self.runs.hold(sha256)
        if not self.data.exists(f'{sha256}.docs'):
            self.data.put_file(path, f'{sha256}.docs', move=True)

    def name_data(self, name: str, reference: str, public: bool = False) -> None:
        """Give stored data a name; NotFoundError when nothing is stored there."""
        docs = self.load_data(reference)
        sha256 = Path(docs.path).stem
        num_bytes = Path(docs.path).stat().st_size
        self.runs.name_dataset(name, sha256, len(docs), num_bytes, public)

    def data_reference(self, reference: str) -> str:
        """`sha256:<hex>` of a reference or name; NotFoundError with the nearest names."""
        match = REFERENCE.fullmatch(reference)
        return reference if match else f'sha256:{self.runs.find_dataset(reference)}'

    def load_data(self, reference: str) -> StoredDocuments:
        """Open stored Documents by `sha256:<hex>` or name; NotFoundError with nearest names."""
        match = REFERENCE.fullmatch(reference)
        sha256 = match[1] if match else self.runs.find_dataset(reference)
        key = f'{sha256}.docs'
        if not self.data.exists(key) or not self.runs.holds(sha256):
            raise NotFoundError(f'no data is stored under {reference!r}: push it (again)')
        if self.data.sha256(key) != sha256:
            raise DataError(
                f'the data {reference!r} was changed after it was stored: push it again'
            )
        return StoredDocuments(self.data.local_path(key))

    # artifacts

    def find_artifact(self, artifact_id: str) -> Path:
        """Local directory of an artifact; NotFoundError says why there is none."""
        self._check_artifact(artifact_id)
        return self.artifacts.local_path(artifact_id)

    def _check_artifact(self, artifact_id: str) -> RunRecord | None:
        """The run of an artifact that is there, None where no run made it."""
        if not ARTIFACT_ID.fullmatch(artifact_id):
            raise NotFoundError(
                f'{artifact_id!r} is no artifact: an artifact_id is 24 hex characters, '
                'run.artifact_id has it'
            )
        run = self.runs.find_by_artifact(artifact_id)
        # the machine's own user may have brought artifacts here that no run made
        if (run is not None or not self.owner) and self.artifacts.exists(artifact_id):
            return run
        if run is None:
            raise NotFoundError(
                f'there is no artifact {artifact_id!r} at {self.settings.artifacts_url}: its run '
                'was deleted, or it lies under another FINETUNER_HOME'
            )
        run = self.settle(run)
        reason = f': {run.details}' if run.details else ''
        raise NotFoundError(
            f'there is no artifact {artifact_id!r}: its run {run.name!r} is {run.status}{reason}'
        )

    def name_artifact(self, name: str) -> NamedArtifact:
        """What an alias stands for now, or an id itself; NotFoundError with the nearest aliases."""
        if ARTIFACT_ID.fullmatch(name):
            run = self.runs.find_by_artifact(name)
            if run is None or run.status != FINISHED:
                run = self._check_artifact(name)
            if run is None:
                return NamedArtifact(None, name, None, None, None)
            return NamedArtifact(None, name, run.name, run.experiment_name, run.finished_at)
        found = self.runs.aliases.find(name)
        if found.run is None and (self.owner or not self.artifacts.exists(found.artifact_id)):
            raise NotFoundError(
                f'{name!r} stands for the artifact {found.artifact_id!r}, which is gone, or is not '
                'shared any more: set it anew, or delete it'
            )
        return found

    def set_alias(self, alias: str, artifact: str) -> NamedArtifact:
        """Have an alias stand for an artifact, given by its id or by another alias."""
        found = self.name_artifact(artifact)
        return self.runs.aliases.set(alias, found.artifact_id, of_run=found.run is not None)

    def settle_artifact(self, config: RunConfig) -> RunConfig:
        """The config with the artifact that an alias stands for now in place of the alias."""
        name = config.model_artifact
        # an alias may be longer than any path, which pathlib's look at it would not take
        if name is None or not is_alias(name) or os.path.exists(Path(name).expanduser()):
            return config
        return config.copy(update={'model_artifact': self.name_artifact(name).artifact_id})

    def resolve_artifact(self, config: RunConfig) -> RunConfig:
        """The config with the path of the artifact it goes on from in place of its id."""
        if config.model_artifact is None:
            return config
        path = Path(config.model_artifact).expanduser()
        if not path.exists():
            path = self.find_artifact(config.model_artifact)
        return config.copy(update={'model_artifact': str(path.absolute())})

    def zip_artifact(self, artifact_id: str, directory: Path, run_name: str) -> str:
        """Write an artifact as `<directory>/<run_name>.zip`; returns its path."""
        from finetuner.artifact import zip_artifact

        source = self.find_artifact(artifact_id)
        return str(zip_artifact(source, directory / archive_name(run_name, artifact_id)))

    # runs

    def start_run(self, config: RunConfig, max_retries: int | None = None) -> RunRecord:
        """Create a run and start its worker; when that cannot be started there is no run.

        Args:
            config: validated; a name is made up when it has none.
            max_retries: None to start a worker now; otherwise the run waits for a server's, and
                another worker goes on with it when one dies, so many times.
        """
        if config.run_name is None:
            config = config.copy(update={'run_name': random_run_name()})
        name = str(config.run_name)
        run = self.runs.create_run(
            config, name, processes.this_process(), self.launcher.host, max_retries
        )
        if max_retries is not None:
            return run
        try:
            self.launch(run.id)
        except (OSError, FinetunerError):
            self.runs.delete_run(run.id)
            raise
        return run

    def resume_run(self, run: RunRecord, is_queued: bool = False) -> RunRecord:
        """Have another worker go on with a run that failed, whatever it failed of.

        It goes on from the run's last checkpoint, or begins anew where there is none: a run that
        failed before its first, or whose directory is on another machine.

        Args:
            run: as the store has it.
            is_queued: whether it waits for a server's worker.

        Raises:
            ConflictError: the run is going, or has finished.
        """
        run = self.settle(run)
        queue = WAITING if is_queued else None
        if not self.runs.reopen(run.id, processes.this_process(), self.launcher.host, queue):
            status = self.runs.read_run(run.id).status
            raise ConflictError(
                f'run {run.name!r} is {status}: only a FAILED run can be resumed'
                + ('' if status in GOING else '; fit(model_artifact=...) goes on from its model')
            )
        return self.runs.read_run(run.id) if is_queued else self.launch(run.id)

    def kept_epochs(self, run: RunRecord) -> dict[int, Path]:
        """The artifacts that `TrainingCheckpoint` keeps of a run, by epoch from 1."""
        files = processes.run_directory(self.settings, run.id)
        return kept_epochs(run_files.epochs_directory(files))

    def launch(self, run_id: int) -> RunRecord:
        """Start a worker for a run that is CREATED; if that fails, an error, and the run FAILED."""
        try:
            worker = self.launcher.launch(run_id)
        except (OSError, FinetunerError) as error:
            reason = f'its worker could not be started: {error}'
            # a cluster that does not answer now may do so later
            waits = isinstance(error, ServerError)
            if not waits or not self.runs.requeue(run_id, reason, is_retry=False):
                self.runs.mark_failed(run_id, reason)
            raise
        self.runs.set_worker(run_id, worker)
        return self.runs.read_run(run_id)

    def settle(self, run: RunRecord) -> RunRecord:
        """A run as it is now: one whose process is gone without a word becomes FAILED.

        One of a server's queue goes back into the queue instead, as often as it may be retried.
        Only processes of this machine can be looked at; runs of others are left as they are.
        """
        if not run.is_going or run.queue == WAITING or run.host != self.launcher.host:
            return run
        try:
            if self.launcher.is_alive(run.worker or run.launcher):
                return run
        except ServerError as error:
            logger.warning('run %r is shown as it was last known: %s', run.name, error)
            return run
        # The process may have written its end between the two looks.
        run = self.runs.read_run(run.id)
        if run.is_going and run.queue != WAITING:
            if not self.launcher.is_alive(run.worker or run.launcher):
                self.bury(run)
            run = self.runs.read_run(run.id)
        return run

    def cancel(self, run: RunRecord) -> RunRecord:
        """End a going run; ConflictError when it has ended already."""
        if not self.runs.request_cancel(run.id):
            raise ConflictError(f'run {run.name!r} has ended already: it is {run.status}')
        run = self.runs.read_run(run.id)
        if run.worker is None:
            # No worker is known yet; one that is just starting finds the run ended and goes.
            self.runs.mark_failed(run.id, CANCELLED, only_from=[CREATED])
        elif run.host == self.launcher.host:
            self.launcher.end(run.worker, CANCEL_SECONDS)
            if self.runs.mark_failed(run.id, CANCELLED):
                self.artifacts.delete(run.artifact_id)
        return self.runs.read_run(run.id)

    def all_runs(self, experiment_name: str | None) -> list[RunRecord]:
        """All runs, of one experiment or of all, newest first."""
        runs: list[RunRecord] = []
        page = 1
        while found := self.runs.list_runs(experiment_name, page, 100):
            runs += found
            page += 1
        return runs

    def delete_runs(self, runs: Iterable[RunRecord]) -> None:
        """Delete runs with their artifacts.

        Raises:
            ConflictError: one is going, or its artifact has a name; then none is deleted.
        """
        settled = [self.settle(run) for run in runs]
        going = [run for run in settled if run.is_going]
        if going:
            names = ', '.join(repr(run.name) for run in going[:3])
            raise ConflictError(
                f'{names} {"is" if len(going) == 1 else "are"} still going: cancel first, '
                'then delete'
            )
        self.runs.refuse_named(settled)
        for run in settled:
            with self.runs.deletion(run):
                self.artifacts.delete(run.artifact_id)
            directory = processes.run_directory(self.settings, run.id)
            shutil.rmtree(directory, ignore_errors=True)

    def bury(self, run: RunRecord) -> None:
        """Write down that a run's process has ended without a word, and what follows from it."""
        if run.cancel_requested:
            details = CANCELLED
        elif run.worker is None:
            details = f'process {run.launcher.pid} ended before it had started a worker for the run'
        else:
            here = run.host == self.launcher.host
            who = self.launcher.name_of(run.worker) if here else f'worker on {run.host}'
            details = f'the {who} ended without finishing'
            if here:
                details += self.launcher.last_words(run.worker, run.id)
        if run.queue == TAKEN and not run.cancel_requested:
            is_retry = run.worker is not None
            if not is_retry or run.retries < run.max_retries:
                count = f', retry {run.retries + 1} of {run.max_retries}' if is_retry else ''
                self.runs.requeue(
                    run.id, f'{details}; the run goes on{count}', seen=run, is_retry=is_retry
                )
                return
            details += f'; so did {run.retries} before it'
        if self.runs.mark_failed(run.id, details, seen=run):
            self.artifacts.delete(run.artifact_id)
