"""The processes of a run beside its worker, where several train together.

The worker is the first of them: it alone writes to the run store, keeps checkpoints and saves the
artifact. The others do as it does, without a word, and end when it does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetuner.config import RunConfig, Settings
from finetuner.cores import share_of_cores
from finetuner.excepts import FinetunerError, RankLostError, TrainingError
from finetuner.runs.processes import output_tail, run_directory
from finetuner.significance import Stage

if TYPE_CHECKING:
    from finetuner.training.ranks import Ranks

_COMMAND = (sys.executable, '-m', 'finetuner.runs.worker')
# where a follower says that it is about to meet the others, and whose it is
_READY = 'FINETUNER_READY'
LEADER = 'FINETUNERLEADER'
# an import on a machine that has other things to do
_PATIENCE_SECONDS = 300.0
_LOOK_SECONDS = 0.5


class SilentObserver:
    """Of a process that leaves it to another one to tell how the run goes."""

    def progress(self, values: dict[str, Any]) -> None:
        """Nothing is told."""

    def step_metrics(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Nothing is told."""

    def epoch_metrics(self, epoch: int, values: dict[str, float]) -> None:
        """Nothing is told."""

    def evaluation(self, stage: Stage, metrics: dict[str, float]) -> None:
        """Nothing is told."""

    def examples(self, stage: Literal['before', 'after'], results: dict[str, list[str]]) -> None:
        """Nothing is told."""

    def begins(self, step: int, epoch: int) -> None:
        """Nothing is told."""

    def write_all(self) -> None:
        """There is nothing to write."""

    def is_paused(self) -> bool:
        """The first process decides on that, and its end is that of the others."""
        return False


def follows() -> bool:
    """Whether this process is one of several of a run, and not the first."""
    return int(os.environ.get('RANK', '0')) > 0


def output_file(rank: int) -> str:
    """Name of the file, in a run's directory, with what a follower writes."""
    return f'output-{rank}.txt'


@dataclass
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    ready: int


class Followers:
    """The other processes of a run on this machine, none where it has no others.

    Args:
        settings: where the run is kept.
        run_id: of the run.
    """

    def __init__(self, settings: Settings, run_id: int) -> None:
        self._settings = settings
        self._run_id = run_id
        self._running: list[_Follower] = []

    @contextmanager
    def of(self, config: RunConfig) -> Iterator[None]:
        """Have the followers of a run within the block.

        Whoever started this process as one of several, as on a cluster, has started the others.

        Raises:
            TrainingError: one of them ended; says of what.
        """
        if config.num_processes < 2 or 'WORLD_SIZE' in os.environ:
            yield
            return
        try:
            self._start(config.num_processes)
            yield
        except TrainingError as error:
            # its connections are gone a moment before it is
            reason = self._failure(patience=3.0) if isinstance(error, RankLostError) else None
            if reason is None:
                raise
            raise TrainingError(reason) from error
        finally:
            self._end()

    def join(self, device: str) -> Ranks:
        """Wait for the followers, and meet them; see `finetuner.training.ranks.join_ranks`."""
        from finetuner.training.ranks import join_ranks

        waiting = {each.ready for each in self._running}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], _LOOK_SECONDS)
            waiting -= {pipe for pipe in ready if os.read(pipe, 1)}
            reason = self._failure()
            if reason is not None or time.monotonic() > deadline:
                raise TrainingError(reason or 'the other processes of the run do not start')
        return join_ranks(device)

    def _start(self, num_processes: int) -> None:
        shared = {
            'WORLD_SIZE': str(num_processes),
            'LOCAL_WORLD_SIZE': str(num_processes),
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(_free_port()),
        }
        # each takes its share of the cores; the environment may say otherwise
        threads = str(share_of_cores(num_processes))
        environment = {'OMP_NUM_THREADS': threads, **os.environ, **shared}
        directory = run_directory(self._settings, self._run_id)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for rank in range(1, num_processes):
            self._running.append(self._started(rank, environment, directory))
        os.environ.setdefault('OMP_NUM_THREADS', threads)
        os.environ.update(shared, RANK='0', LOCAL_RANK='0')

    def _started(self, rank: int, environment: dict[str, str], directory: Path) -> _Follower:
        ready, theirs = os.pipe()
        own = {'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        own |= {_READY: str(theirs), LEADER: str(os.getpid())}
        try:
            with (directory / output_file(rank)).open('wb') as output:
                # in the worker's group, so that what ends it ends them
                process = subprocess.Popen(
                    [*_COMMAND, str(self._run_id)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment | own,
                    pass_fds=(theirs,),
                )
        finally:
            os.close(theirs)
        return _Follower(rank, process, ready)

    def _failure(self, patience: float = 0.0) -> str | None:
        """Why a follower has ended, as it said itself; None while all are there."""
        deadline = time.monotonic() + patience
        while True:
            for each in self._running:
                code = each.process.poll()
                if code:
                    path = run_directory(self._settings, self._run_id) / output_file(each.rank)
                    said = output_tail(path)
                    how = f'signal {-code}' if code < 0 else f'exit code {code}'
                    return f'process {each.rank} of the run ended ({how}): {said or "no output"}'
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)

    def _end(self) -> None:
        for each in self._running:
            each.process.kill()
        for each in self._running:
            each.process.wait()
            os.close(each.ready)
        self._running.clear()


def follow_run(run_id: int, settings: Settings) -> bool:
    """Train with the other processes of a run, the first of which does all else.

    Args:
        run_id: of the run.
        settings: where it is kept.

    Returns:
        Whether it came to its end; if not, what was in the way is on stderr.
    """
    from finetuner.runs.runner import execute_run
    from finetuner.runs.workspace import Workspace

    workspace = Workspace(settings)
    run = workspace.runs.read_run(run_id)
    workspace.close()
    # what is its owner's alone is there for the run too
    workspace = Workspace(settings, run.owner or '')
    files = run_directory(settings, run_id)
    try:
        config = workspace.resolve_artifact(RunConfig.from_parameters(run.config))
        # it writes no artifact
        nowhere = files / 'nowhere'
        execute_run(
            config, workspace.load_data, nowhere, SilentObserver(), files, join=_join_leader
        )
    except FinetunerError as error:
        print(' '.join(str(error).split()), file=sys.stderr)
        return False
    finally:
        workspace.close()
    return True


def _join_leader(device: str) -> Ranks:
    from finetuner.training.ranks import join_ranks

    pipe = os.environ.pop(_READY, None)
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
            os.write(int(pipe), b'1')
        os.close(int(pipe))
    return join_ranks(device)


def end_with_leader() -> None:
    """End when the process does that started this one, if it said so: one that is killed does not."""
    leader = os.environ.get(LEADER)
    if leader is None:
        return

    def watch() -> None:
        while os.getppid() == int(leader):
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name='leader', daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])
