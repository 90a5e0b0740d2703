"""The part of a server that takes runs from the queue, starts their workers and looks after them.

Any number of dispatchers may work on one store, on one machine or several. Each starts workers
for the runs that it claims. A worker whose machine is its own it looks at; of one on another
machine it watches the beats, by its own steady clock, so that no two clocks need to agree.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field

from sqlalchemy.exc import SQLAlchemyError

from finetuner.excepts import FinetunerError, NotFoundError
from finetuner.runs.processes import this_process
from finetuner.runs.records import RunRecord
from finetuner.runs.states import STARTED
from finetuner.runs.workspace import Workspace

logger = logging.getLogger('finetuner.runs.dispatcher')

LOOK_SECONDS = 0.5
# a worker on another machine beats every two seconds, and a database may be gone for a while
SILENT_SECONDS = 90.0
DRAIN_SECONDS = 20.0
# how often another worker goes on with a run whose worker died
MAX_RETRIES = 3


@dataclass
class _Watched:
    """When another machine's worker was last seen to beat."""

    beats: int
    at: float


@dataclass
class Dispatcher:
    """Takes runs and starts workers for them, by a thread of its own.

    Attributes:
        workspace: where the runs are; its launcher starts the workers.
        num_workers: runs at a time.
        silent_seconds: after so long without a beat a worker on another machine counts as dead.
    """

    workspace: Workspace
    num_workers: int = 1
    silent_seconds: float = SILENT_SECONDS
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _watched: dict[int, _Watched] = field(default_factory=dict)
    _is_well: bool = True

    def start(self) -> None:
        """Begin to take runs."""
        self._thread = threading.Thread(target=self._run, name='dispatcher', daemon=True)
        self._thread.start()

    def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Take no more runs, and have those that go on written to checkpoints and queued again.

        Args:
            seconds: workers have to come to a checkpoint; those that do not are ended, and their
                runs will go on from the checkpoint before.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.workspace.launcher.outlasts_server:
            return
        try:
            mine = [run for run in self._going() if run.launcher == this_process()]
        except SQLAlchemyError as error:
            logger.warning('the run store does not answer, runs are left as they are: %s', error)
            return
        launcher = self.workspace.launcher
        workers = [run.worker for run in mine if run.worker is not None]
        for run in mine:
            # one that is only starting has nothing to write down
            if run.worker is not None and run.status == STARTED:
                launcher.pause(run.worker)
            elif run.worker is not None:
                launcher.end(run.worker, grace=0.5)
        deadline = time.monotonic() + seconds
        while any(map(launcher.is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for worker in workers:
            launcher.end(worker, grace=2.0)
        for run in mine:
            with contextlib.suppress(NotFoundError):  # deleted meanwhile
                self._give_back(run)

    def _give_back(self, run: RunRecord) -> None:
        """Queue a run again whose worker was ended before it could do so itself."""
        now = self.workspace.runs.read_run(run.id)
        if now.is_going and not self.workspace.launcher.is_alive(now.worker or now.launcher):
            message = 'The server ended; the run waits for the next one'
            self.workspace.runs.requeue(run.id, message, seen=now, is_retry=False)

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            try:
                self.look()
                if not self._is_well:
                    logger.info('the run store answers again')
                self._is_well = True
            except (SQLAlchemyError, FinetunerError, OSError) as error:
                # The queue goes on when the database does; said once, not twice a second.
                if self._is_well:
                    logger.warning('the queue waits: %s', error)
                self._is_well = False
                # nobody could show a sign of life meanwhile
                self._watched.clear()

    def look(self) -> None:
        """Look after the runs that are going, once, and start what may start."""
        going = self._going()
        for run in going:
            self._look_after(run)
        here = [run for run in self._going() if self._is_mine(run)]
        for _ in range(self.num_workers - len(here)):
            if not self.workspace.runs.count_waiting():
                return
            claimed = self.workspace.runs.claim(this_process(), self.workspace.launcher.host)
            if claimed is None:
                return
            self.workspace.launch(claimed.id)

    def _going(self) -> list[RunRecord]:
        return self.workspace.runs.list_taken()

    def _is_mine(self, run: RunRecord) -> bool:
        """Whether a run takes one of this dispatcher's places.

        A worker outlives a server that was killed; the next one on the machine counts it as its own.
        """
        if run.host != self.workspace.launcher.host:
            return False
        return run.launcher == this_process() or not self.workspace.launcher.is_alive(run.launcher)

    def _look_after(self, run: RunRecord) -> None:
        launcher = self.workspace.launcher
        if run.host != launcher.host:
            self._listen(run)
        elif run.cancel_requested and run.worker is not None:
            # asked for on a machine that can end no process here
            self.workspace.cancel(run)
        elif run.worker is not None and self._is_too_large(run):
            limit = launcher.limits.memory_mb
            reason = (
                f'the run took more than the {limit:,} MB of memory that a worker may have here: '
                'a smaller batch_size or micro_batch_size needs less'
            )
            if self.workspace.runs.mark_failed(run.id, reason, seen=run):
                launcher.end(run.worker, grace=0.5)
                self.workspace.artifacts.delete(run.artifact_id)
        else:
            self.workspace.settle(run)

    def _is_too_large(self, run: RunRecord) -> bool:
        limit = self.workspace.launcher.limits.memory_mb
        if limit is None or run.worker is None:
            return False
        return self.workspace.launcher.memory_bytes(run.worker) > limit * 1_000_000

    def _listen(self, run: RunRecord) -> None:
        now = time.monotonic()
        watched = self._watched.get(run.id)
        if watched is None or watched.beats != run.beats:
            self._watched[run.id] = _Watched(run.beats, now)
        elif now - watched.at > self.silent_seconds:
            del self._watched[run.id]
            logger.warning('the worker of run %r on %s is silent', run.name, run.host)
            self.workspace.bury(run)
