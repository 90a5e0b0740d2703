"""The client that submits and reads runs on this machine."""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from docarray import Document

from finetuner.config import Settings
from finetuner.local_artifacts import LocalArtifacts
from finetuner.logins import Login, read_login
from finetuner.names import random_run_name
from finetuner.protocol import Client
from finetuner.remote import RemoteClient
from finetuner.runs.states import ENDED
from finetuner.runs.submission import (
    NOT_STORED_YET,
    build_config,
    callback_parameters,
    collect_data,
    opened,
)

if TYPE_CHECKING:
    from finetuner.runs.records import RunRecord
    from finetuner.runs.workspace import Workspace

__all__ = ['Client', 'LocalClient', 'callback_parameters', 'get_client', 'opened']

POLL_SECONDS = 0.3


class LocalClient(LocalArtifacts):
    """A client on this machine's run store; runs are worker processes of their own.

    Args:
        settings: where runs, data and artifacts are kept.
        owner: whose runs these are; '' is this machine's own user.
        only_public: see only what the owner shares, as others do.
        worker_command: the program of a worker and its first arguments.
        max_retries: None starts a worker for each run at once; otherwise runs wait for a
            server's workers, and are retried so often when one dies.
    """

    def __init__(
        self,
        settings: Settings,
        owner: str = '',
        only_public: bool = False,
        worker_command: Sequence[str] | None = None,
        max_retries: int | None = None,
    ) -> None:
        from finetuner.runs.launching import ProcessLauncher
        from finetuner.runs.workspace import Workspace

        launcher = ProcessLauncher(settings, worker_command) if worker_command else None
        self._workspace: Workspace = Workspace(settings, owner, only_public, launcher)
        self._max_retries = max_retries

    def for_owner(self, owner: str, only_public: bool = False) -> LocalClient:
        """The same client for another owner, on the same connections.

        Args:
            owner: whose names are seen.
            only_public: see only what the owner shares, as others do.
        """
        twin = copy.copy(self)
        twin._workspace = self._workspace.for_owner(owner, only_public)
        return twin

    @property
    def workspace(self) -> Workspace:
        """Where this client keeps things, with all that can be done there."""
        return self._workspace

    @property
    def settings(self) -> Settings:
        """Where this client keeps things."""
        return self._workspace.settings

    def close(self) -> None:
        """Let go of the database; runs that are going go on."""
        self._workspace.close()

    # data

    def push_data(
        self, docs: Sequence[Document], name: str | None = None, public: bool = False
    ) -> str:
        """Store Documents by content, under a name too when one is given.

        Args:
            docs: what to store; relative paths in uris are stored as absolute ones.
            name: may be used in place of the reference; a name pushed again moves to the new data.
            public: whether other users of a server may read the data.

        Returns:
            `sha256:<hex>`, the reference.
        """
        return self._workspace.push_data(docs, name, public)

    def load_data(self, reference: str) -> Sequence[Document]:
        """Read stored Documents.

        Args:
            reference: `sha256:<hex>` or a pushed name.

        Raises:
            NotFoundError: nothing is stored there; the nearest names are given.
        """
        return self._workspace.load_data(reference)

    def list_data(self) -> list[dict]:
        """Named data, newest first: name, data, num_documents, num_bytes, public, created_at."""
        return self._workspace.runs.list_datasets()

    def forget_data(self, name: str) -> None:
        """Forget a name; runs that were trained on the data keep it."""
        self._workspace.runs.delete_dataset(name)

    # runs

    def fit(
        self, parameters: Mapping[str, Any], data: Mapping[str, Sequence[Document] | str]
    ) -> dict:
        """Validate, store the data, create the run and start its worker process.

        When any of it is wrong nothing is left behind: no run and no experiment.

        Args:
            parameters: the arguments of `finetuner.fit` as plain JSON values; callbacks as
                `[{'name': ..., 'options': {...}}]`.
            data: Documents, references or pushed names under the keys 'train_data', 'eval_data',
                'callbacks.<i>.query_data' and 'callbacks.<i>.index_data'.

        Returns:
            The run as `get_run` gives it, status CREATED.

        Raises:
            ConfigError: a parameter is unknown or out of range.
            DataError: the Documents cannot be trained or evaluated on.
            ConflictError: the run's name is taken.
            NotFoundError: no data or artifact of that name.
        """
        from finetuner.runs.recipes import settled_values
        from finetuner.runs.runner import validate_run

        given = collect_data(parameters, data)
        draft = build_config(parameters, dict.fromkeys(given, NOT_STORED_YET))
        self._workspace.launcher.check(draft)
        # a name stands for what it stands for now
        draft = self._workspace.settle_artifact(draft)
        run_name = draft.run_name or random_run_name()
        self._workspace.runs.check_run_name(draft.experiment_name, run_name)
        resolved = self._workspace.resolve_artifact(draft)
        given = {
            key: self._workspace.data_reference(value) if isinstance(value, str) else value
            for key, value in given.items()
        }
        documents = {
            key: self.load_data(value) if isinstance(value, str) else value
            for key, value in given.items()
        }
        settled = settled_values(validate_run(resolved, documents))
        references = {
            key: value if isinstance(value, str) else self._workspace.push_data(value)
            for key, value in given.items()
        }
        settled |= {'run_name': run_name, 'model_artifact': draft.model_artifact}
        config = build_config({**parameters, **settled}, references)
        return self._workspace.start_run(config, self._max_retries).shown()

    def get_run(self, experiment_name: str, run_name: str) -> dict:
        """Everything about a run but its log and metrics.

        Returns:
            name, experiment_name, status, details (why it failed), config, description,
            artifact_id, progress, owner and the ISO times created_at, started_at, finished_at.

        Raises:
            NotFoundError: no such run; the nearest names are given.
        """
        return self._record(experiment_name, run_name).shown()

    def list_runs(
        self, experiment_name: str | None = None, page: int = 1, size: int = 50
    ) -> list[dict]:
        """One page of runs, newest first.

        Args:
            experiment_name: only its runs; all runs when None.
            page: 1 is the first.
            size: runs on a page, 1 to 100.
        """
        records = self._workspace.runs.list_runs(experiment_name, page, size)
        return [self._workspace.settle(record).shown() for record in records]

    def delete_run(self, experiment_name: str, run_name: str) -> None:
        """Delete an ended run with its artifact, log and metrics.

        Raises:
            ConflictError: the run is still going, or an alias names its artifact.
        """
        self._workspace.delete_runs([self._record(experiment_name, run_name)])

    def delete_runs(self, experiment_name: str | None = None) -> None:
        """Delete all runs, of one experiment or of all, or none of them.

        Raises:
            ConflictError: a run is still going, or an alias names an artifact of theirs.
        """
        self._workspace.delete_runs(self._workspace.all_runs(experiment_name))

    def cancel_run(self, experiment_name: str, run_name: str) -> dict:
        """End a run that is going: SIGTERM to its worker, SIGKILL soon after.

        Returns:
            The run, FAILED with details 'cancelled', or FINISHED when it was quicker.

        Raises:
            ConflictError: the run has ended already.
        """
        return self._workspace.cancel(self._record(experiment_name, run_name)).shown()

    def resume_run(self, experiment_name: str, run_name: str) -> dict:
        """Go on with a run that failed, from its last checkpoint or, without one, from the start.

        Returns:
            The run, CREATED again; its log goes on.

        Raises:
            ConflictError: the run is going, or has finished.
        """
        record = self._record(experiment_name, run_name)
        is_queued = self._max_retries is not None
        return self._workspace.resume_run(record, is_queued).shown()

    def get_run_checkpoints(self, experiment_name: str, run_name: str) -> dict[int, str]:
        """Paths of the artifacts that `TrainingCheckpoint` keeps, by epoch from 1."""
        record = self._record(experiment_name, run_name)
        return {epoch: str(path) for epoch, path in self._workspace.kept_epochs(record).items()}

    def get_run_status(self, experiment_name: str, run_name: str) -> dict:
        """Status and, for a failed run, why, as `{'status': ..., 'details': ...}`."""
        record = self._record(experiment_name, run_name)
        return {'status': record.status, 'details': record.details}

    def get_run_logs(self, experiment_name: str, run_name: str) -> str:
        """All log lines so far, one a line, times in UTC."""
        return '\n'.join(line for _, line in self.read_run_logs(experiment_name, run_name))

    def read_run_logs(
        self, experiment_name: str, run_name: str, after: int = 0
    ) -> list[tuple[int, str]]:
        """Log lines with their ids.

        Args:
            experiment_name: the run's experiment.
            run_name: the run.
            after: the last id already read; only later lines are returned.
        """
        record = self._record(experiment_name, run_name)
        return self._workspace.runs.read_log_lines(record.id, after)

    def stream_run_logs(self, experiment_name: str, run_name: str) -> Iterator[str]:
        """Log lines as they come, from the first; a failed run's last line says why it failed."""
        after = 0
        while True:
            # The status is read before the lines: what an ended run logged is then all there.
            record = self._record(experiment_name, run_name)
            for line_id, line in self._workspace.runs.read_log_lines(record.id, after):
                after = line_id
                yield line
            if record.status in ENDED:
                return
            time.sleep(POLL_SECONDS)

    def get_run_metrics(self, experiment_name: str, run_name: str) -> dict[str, dict[str, float]]:
        """Evaluation metrics by stage: 'before' and 'after', as far as they are there."""
        record = self._record(experiment_name, run_name)
        return self._workspace.runs.read_evaluations(record.id, 'metrics')

    def get_run_examples(self, experiment_name: str, run_name: str) -> dict[str, dict[str, Any]]:
        """Results of example queries by stage: 'before' and 'after', as far as they are there."""
        record = self._record(experiment_name, run_name)
        return self._workspace.runs.read_evaluations(record.id, 'examples')

    def get_run_curves(self, experiment_name: str, run_name: str) -> dict[str, list[list[Any]]]:
        """Values measured while training: for each name a list of [step, epoch, value].

        Step is None for values of a whole epoch; a value that is no finite number is None.
        """
        record = self._record(experiment_name, run_name)
        curves: dict[str, list[list[Any]]] = {}
        for measured in self._workspace.runs.read_metrics(record.id):
            value = measured.value if math.isfinite(measured.value) else None
            curves.setdefault(measured.name, []).append([measured.step, measured.epoch, value])
        return curves

    def share_run(self, experiment_name: str, run_name: str, public: bool) -> dict:
        """Show a run, its log, metrics and artifact to all users of a server, or stop that."""
        record = self._record(experiment_name, run_name)
        self._workspace.runs.set_public(record.id, public)
        return self.get_run(experiment_name, run_name)

    # experiments

    def create_experiment(self, name: str, description: str = '') -> dict:
        """Create an experiment.

        Raises:
            ConflictError: the name is taken.
        """
        return self._workspace.runs.create_experiment(name, description)

    def get_experiment(self, name: str) -> dict:
        """Name, status, description, created_at, owner and num_runs of an experiment."""
        return self._workspace.runs.get_experiment(name)

    def list_experiments(self, page: int = 1, size: int = 50) -> list[dict]:
        """One page of experiments, newest first; size 1 to 100."""
        return self._workspace.runs.list_experiments(page, size)

    def delete_experiment(self, name: str) -> dict:
        """Delete an experiment and all its runs; returns what it was.

        Raises:
            ConflictError: one of its runs is still going, or an alias names an artifact of theirs.
        """
        experiment = self.get_experiment(name)
        self.delete_runs(name)
        self._workspace.runs.delete_experiment(name)
        return experiment

    def delete_experiments(self) -> list[dict]:
        """Delete all experiments and all runs; returns what they were.

        Raises:
            ConflictError: a run is still going, or an alias names an artifact.
        """
        self.delete_runs()
        return [self.delete_experiment(name) for name in self._workspace.runs.experiment_names()]

    def _record(self, experiment_name: str, run_name: str) -> RunRecord:
        record = self._workspace.runs.get_run(experiment_name, run_name)
        return self._workspace.settle(record)


_clients: dict[tuple[int, Settings, Login | None], Client] = {}
_clients_lock = threading.Lock()


def get_client(token: str | None = None) -> Client:
    """The client for what the environment says now; the same one as long as it says the same.

    After a login it is that of the server, otherwise that of this machine.

    Args:
        token: for the server, in place of that of the login; this machine needs none.
    """
    settings = Settings.from_environment()
    login = read_login(settings.home)
    if login is not None and token:
        login = replace(login, token=token)
    # By process too: a forked child must not use its parent's connections.
    key = (os.getpid(), settings, login)
    with _clients_lock:
        if key not in _clients:
            if login is None:
                _clients[key] = LocalClient(settings)
            else:
                _clients[key] = RemoteClient(login.host, login.token, settings)
        return _clients[key]
