"""Workers on a Ray cluster: a run is a job there, which asks for a place for each of its processes.

The server needs no more of the cluster than the address of its jobs API. The job's own process lives
on the head; it starts the run's processes on nodes that have what they were said to need, and starts
them anew when a node is lost (`finetuner.runs.ray_job`).
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetuner.config import RaySettings, RunConfig, Settings
from finetuner.excepts import ConfigError, ServerError
from finetuner.ray_cluster import (
    check_jobs_address,
    job_command,
    jobs_client,
    submit_job,
)
from finetuner.runs import processes
from finetuner.runs.launching import WorkerLimits
from finetuner.runs.records import ProcessMark
from finetuner.storage.database import make_private_directory

LAUNCH_FILE = 'launch.json'
# a job is known by `ray:<its id>`, and each of its attempts by a number beside that
_MARK = 'ray:'
_NUM_LINES = 5


@dataclass(frozen=True)
class Launch:
    """What the process of a job is told, in a file of the run that only its owner reads.

    Attributes:
        run_id: of the run.
        home: as in `Settings`, and the next two; all nodes have to see them.
        database_url: may hold a password, which a job's environment would show.
        artifacts_url: of the artifacts.
        submission: Ray's id of the job.
        ray: what each process gets.
        limits: of each process.
    """

    run_id: int
    home: str
    database_url: str
    artifacts_url: str
    submission: str
    ray: RaySettings
    limits: WorkerLimits

    @property
    def settings(self) -> Settings:
        """Of the run store, with no launcher of its own."""
        return Settings(Path(self.home), self.database_url, self.artifacts_url)

    @property
    def directory(self) -> Path:
        """Of the run."""
        return processes.run_directory(self.settings, self.run_id)

    def mark(self, attempt: int) -> ProcessMark:
        """The worker of an attempt, from 0."""
        return ProcessMark(attempt, _MARK + self.submission)

    def write(self) -> None:
        """Write the file; OSError when it cannot be written."""
        make_private_directory(self.directory)
        path = self.directory / LAUNCH_FILE
        unfinished = path.with_name(f'.{LAUNCH_FILE}')
        unfinished.unlink(missing_ok=True)
        with os.fdopen(
            os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), 'w'
        ) as file:
            json.dump(asdict(self), file)
        unfinished.replace(path)

    @classmethod
    def read(cls, directory: Path) -> Launch:
        """Read the file of a run's directory.

        Raises:
            ConfigError: this node does not see it.
        """
        path = directory / LAUNCH_FILE
        try:
            values = json.loads(path.read_text(encoding='utf-8'))
        except FileNotFoundError as error:
            raise ConfigError(
                f'the node {processes.this_host()} does not see {path}: FINETUNER_HOME has to be '
                'one directory, mounted at the same place on the server and on all nodes'
            ) from error
        values['ray'] = RaySettings(**values['ray'])
        values['limits'] = WorkerLimits(**values['limits'])
        return cls(**values)


class RayLauncher:
    """Workers are jobs of a Ray cluster.

    Args:
        settings: with the cluster in them.
        limits: what one process may use: its memory is asked of Ray, and held to.

    Raises:
        ConfigError: the address is none.
    """

    # jobs go on without it
    outlasts_server = True

    def __init__(self, settings: Settings, limits: WorkerLimits | None = None) -> None:
        if settings.ray is None:
            raise ConfigError('the settings name no Ray cluster: set FINETUNER_RAY_ADDRESS')
        check_jobs_address(settings.ray.address)
        # a server on another machine cannot tell whether the one that starts a job is still there
        self.host = f'{processes.this_host()} with Ray'
        self.limits = limits or WorkerLimits()
        self._settings = settings
        self._ray = settings.ray

    @cached_property
    def _client(self) -> Any:
        return jobs_client(self._ray.address)

    def check(self, config: RunConfig) -> None:
        """Refuse what no cluster can do.

        Raises:
            ConfigError: Ray is not installed, or the run store is in a place of this machine alone.
            ServerError: the cluster does not answer.
        """
        self._client  # noqa: B018 - who submits learns it, and not the log of a run

    def launch(self, run_id: int) -> ProcessMark:
        """Submit a job; ServerError when the cluster does not take it."""
        submission = f'finetuner-{run_id}-{secrets.token_hex(4)}'
        settings = self._settings
        launch = Launch(
            run_id,
            str(settings.home),
            settings.database_url,
            settings.artifacts_url,
            submission,
            self._ray,
            self.limits,
        )
        launch.write()
        command = job_command('finetuner.runs.ray_job', str(launch.directory))
        submit_job(self._client, command, submission, {'run': str(run_id)})
        return launch.mark(0)

    def is_alive(self, worker: ProcessMark) -> bool:
        """Whether a job has not ended; of a process that starts one, whether it is there.

        Raises:
            ServerError: the cluster does not answer.
        """
        submission = _submission(worker)
        if submission is None:
            return processes.is_alive(worker)
        status = self._status(submission)
        return status is not None and not status.is_terminal()

    def pause(self, worker: ProcessMark) -> None:
        """Have a job end; its run goes on from its last checkpoint."""
        self.end(worker, grace=0.0)

    def end(self, worker: ProcessMark, grace: float) -> None:
        """Stop a job; it has so many seconds to end, and Ray ends it after a while."""
        submission = _submission(worker)
        if submission is None:
            processes.end_process(worker, grace)
            return
        status = self._status(submission)
        if status is None or status.is_terminal():
            return
        self._ask('stop_job', submission)
        deadline = time.monotonic() + grace
        while self.is_alive(worker) and time.monotonic() < deadline:
            time.sleep(0.1)

    def memory_bytes(self, worker: ProcessMark) -> int:
        """Not known here: each node holds its processes to the limit."""
        return 0

    def last_words(self, worker: ProcessMark, run_id: int) -> str:
        """What Ray says of a job's end, and the last lines of its log."""
        submission = _submission(worker)
        if submission is None or self._status(submission) is None:
            return ''
        message = self._ask('get_job_info', submission).message or ''
        lines = [line.strip() for line in str(self._ask('get_job_logs', submission)).splitlines()]
        tail = ' | '.join([line for line in lines if line][-_NUM_LINES:])
        said = ' '.join(message.split())[:500]
        return (f' ({said})' if said else '') + (f'; its last output: {tail}' if tail else '')

    def name_of(self, worker: ProcessMark) -> str:
        """What to call a worker in a log."""
        submission = _submission(worker)
        return f'Ray job {submission}' if submission else f'process {worker.pid}'

    def _status(self, submission: str) -> Any:
        """Of a job; None where the cluster knows none of that id, as a new one does."""
        try:
            return self._ask('get_job_status', submission)
        except LookupError:
            return None

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call the jobs API; LookupError for a job that it does not know."""
        try:
            return getattr(self._client, method)(*arguments, **named)
        except ServerError:
            raise
        except (RuntimeError, OSError) as error:
            self.__dict__.pop('_client', None)
            # what it raises for every answer that is none; of requests, too, an OSError
            reason = ' '.join(str(error).split())[:500]
            if 'does not exist' in reason or '404' in reason:
                raise LookupError(reason) from error
            raise ServerError(
                f'the Ray cluster at {self._ray.address} does not answer: {reason}'
            ) from error


def _submission(worker: ProcessMark) -> str | None:
    return worker.mark.removeprefix(_MARK) if worker.mark.startswith(_MARK) else None
