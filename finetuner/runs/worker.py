"""The process that does one run: `python -m finetuner.runs.worker <run id>`."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from finetuner.config import RunConfig, Settings
from finetuner.excepts import FinetunerError, RankLostError, TrainingPausedError
from finetuner.runs.findings import FindingsFile
from finetuner.runs.followers import Followers, end_with_leader, follow_run, follows
from finetuner.runs.processes import launch_worker, run_directory, stop_workers, this_process
from finetuner.runs.ray_node import LOST, WORKER
from finetuner.runs.recorder import RunRecorder
from finetuner.runs.records import ProcessMark, RunRecord
from finetuner.runs.run_files import delete_checkpoint
from finetuner.runs.workspace import CANCELLED, Workspace

if TYPE_CHECKING:
    from docarray import DocumentArray

    Execute = Callable[
        [RunConfig, Callable[[str], DocumentArray], Path, RunRecorder, Path],
        None,
    ]

__all__ = ['launch_worker', 'main', 'run_worker', 'stop_workers']

PAUSED = 'paused'
# another process of the run is gone, and what becomes of the run is for its job to say
LEFT = 'left'
PATIENCE_SECONDS = 600.0

logger = logging.getLogger('finetuner.runs.worker')


class EndedBySignalError(BaseException):
    """SIGTERM came. No Exception, so that no one's `except Exception` keeps the run going."""


class _Termination:
    """Turns SIGTERM into an exception of the main thread, once, and only while that is wanted.

    SIGUSR1 asks for less: a checkpoint after the batch that is being trained on, and an end there.
    """

    def __init__(self) -> None:
        self.came = False
        self.on_pause: Callable[[], None] = lambda: None
        self._ignored = False
        self._pid = os.getpid()

    @contextmanager
    def watching(self) -> Iterator[_Termination]:
        """Catch SIGTERM and SIGUSR1 within the block."""
        before = signal.signal(signal.SIGTERM, self._on_signal)
        before_pause = signal.signal(signal.SIGUSR1, lambda *_: self.on_pause())
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)
            signal.signal(signal.SIGUSR1, before_pause)

    def ignore(self) -> None:
        """From here on the run ends by itself in a moment."""
        self._ignored = True

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked loader process inherits this handler and has nothing to tidy up.
            os._exit(128 + number)
        if not self.came and not self._ignored:
            self.came = True
            raise EndedBySignalError


def run_worker(run_id: int, settings: Settings, execute: Execute | None = None) -> bool:
    """Do one run from beginning to end and leave it FINISHED or FAILED.

    Args:
        run_id: a run with status CREATED.
        settings: where it is kept.
        execute: makes the artifact of the config, `runner.execute_run` when None; it goes on
            from a checkpoint in the run's directory, if there is one.

    Returns:
        Whether the run finished.
    """
    workspace = Workspace(settings)
    run = workspace.runs.read_run(run_id)
    workspace.close()
    # what is its owner's alone is there for the run too
    workspace = Workspace(settings, run.owner or '')
    # hours of training are worth waiting for a database that is started anew
    workspace.database.patience_seconds = PATIENCE_SECONDS
    worker = _own_mark()
    with _Termination().watching() as termination:
        try:
            if not workspace.runs.mark_started(run_id, worker):
                print(f'run {run_id} cannot be started: it is not {run.status} any more')
                return False
            with RunRecorder(workspace.runs, run_id, worker).recording() as recorder:
                termination.on_pause = recorder.pause
                reason = _attempt(workspace, run, recorder, execute, termination)
        except EndedBySignalError:
            # It came where nothing was being done yet.
            reason = _ended_reason(workspace, run)
        termination.ignore()
        # The recorder has written its last line: the reason of a failure comes after it.
        if (
            reason not in (None, LEFT)
            and not _returned(workspace, run, worker, termination, reason)
            and workspace.runs.mark_failed(run_id, reason, worker=worker)
        ):
            workspace.artifacts.delete(run.artifact_id)
    workspace.close()
    if reason == LEFT:
        # its job knows whether a node was lost, and what to do about it
        sys.exit(LOST)
    return reason is None


def _own_mark() -> ProcessMark:
    """What the run store knows this worker by: its process, or what started it elsewhere said."""
    pid, found, mark = os.environ.get(WORKER, '').partition(':')
    return ProcessMark(int(pid), mark) if found else this_process()


def _returned(
    workspace: Workspace,
    run: RunRecord,
    worker: ProcessMark,
    termination: _Termination,
    reason: str,
) -> bool:
    """Give a run back to its queue, when a server asked its worker to end."""
    if not termination.came and reason != PAUSED:
        return False
    message = 'The run waits for another worker and goes on from its last checkpoint'
    return workspace.runs.requeue(run.id, message, worker=worker, is_retry=False)


def _attempt(
    workspace: Workspace,
    run: RunRecord,
    recorder: RunRecorder,
    execute: Execute | None,
    termination: _Termination,
) -> str | None:
    """Do the run; returns why it failed, None when it finished."""
    try:
        followers = Followers(workspace.settings, run.id)
        execute = execute or _runner(workspace.settings, followers)
        files = run_directory(workspace.settings, run.id)
        config = workspace.resolve_artifact(RunConfig.from_parameters(run.config))
        # of a worker that was killed between writing it and saying so
        workspace.artifacts.delete(run.artifact_id)
        with (
            followers.of(config),
            workspace.artifacts.staged_directory(run.artifact_id) as directory,
        ):
            execute(config, workspace.load_data, directory, recorder, files)
            termination.ignore()
        # The log is complete before anyone reads that the run has ended.
        recorder.write()
        if not workspace.runs.mark_finished(run.id, _own_mark()):
            return _ended_reason(workspace, run)
        delete_checkpoint(files)
        return None
    except EndedBySignalError:
        return _ended_reason(workspace, run)
    except TrainingPausedError:
        return PAUSED
    except RankLostError as error:
        if termination.came:
            return _ended_reason(workspace, run)
        return LEFT if WORKER in os.environ else _one_line(str(error))
    except FinetunerError as error:
        return _ended_reason(workspace, run) if termination.came else _one_line(str(error))
    except (Exception, SystemExit) as error:
        if termination.came:
            # What a loader or an exporter made of the signal that ended its helpers.
            return _ended_reason(workspace, run)
        logger.exception('The run ended with an unexpected error')
        return _one_line(f'{type(error).__name__}: {error}')


def _runner(settings: Settings, followers: Followers) -> Execute:
    from finetuner.runs.runner import execute_run

    findings = FindingsFile(settings.home / 'measured.json')
    return functools.partial(execute_run, findings=findings, join=followers.join)


def _ended_reason(workspace: Workspace, run: RunRecord) -> str:
    if workspace.runs.read_run(run.id).cancel_requested:
        return CANCELLED
    return 'ended by a signal (SIGTERM)'


def _one_line(text: str) -> str:
    return ' '.join(text.split())


def main() -> int:
    """Do the run whose number is the only argument, kept where the environment says."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        print('usage: python -m finetuner.runs.worker <run id>', file=sys.stderr)
        return 2
    end_with_leader()
    do_run = follow_run if follows() else run_worker
    return 0 if do_run(int(sys.argv[1]), Settings.from_environment()) else 1


if __name__ == '__main__':
    sys.exit(main())
