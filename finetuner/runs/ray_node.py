"""What runs on a node of a Ray cluster: a process of a run, started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from finetuner.excepts import RANK_LOST, ConfigError
from finetuner.runs import processes
from finetuner.runs.followers import LEADER, output_file
from finetuner.runs.ray_launching import Launch
from finetuner.runs.records import ProcessMark

# exit code of a worker that cannot go on alone, and leaves it to its job what becomes of the run
LOST = 75
WORKER = 'FINETUNER_WORKER'
# of a stop that Ray gives three seconds
_GRACE_SECONDS = 1.5
_LOOK_SECONDS = 0.1
_MEMORY_LOOKS = 10


@dataclass(frozen=True)
class RankEnd:
    """How a process of a run ended.

    Attributes:
        spoke: whether the run store says what became of the run: it finished, failed or waits.
        failure: why it ended, where it does not.
        is_cause: whether that is the reason, and not what follows from another process's end.
        is_lost: whether it may go better elsewhere: the process was killed, or its node is gone.
    """

    spoke: bool
    failure: str | None = None
    is_cause: bool = False
    is_lost: bool = False


def node_address() -> tuple[str, int]:
    """Where the processes of a run can meet: this node's address and a port that is free."""
    from finetuner.ray_cluster import import_ray

    address = import_ray().util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, int(probe.getsockname()[1])


class RankHost:
    """An actor that has a process of a run on its node: starts it, watches it, and ends it.

    An actor, since Ray aborts a driver that cancels a task which comes to its end at that moment.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._ending = threading.Event()

    def end(self) -> None:
        """Have the process end, in peace if it can; `run` tells when it has."""
        self._ending.set()

    def run(self, directory: str, attempt: int, ranks: dict[str, str]) -> RankEnd:
        """Start one of the processes of a run on this node, and wait for its end.

        Args:
            directory: of the run.
            attempt: which of the job's, from 0.
            ranks: its environment among the others; empty where it is alone.
        """
        try:
            launch = Launch.read(Path(directory))
        except ConfigError as error:
            return RankEnd(False, str(error), is_cause=True)
        rank = int(ranks.get('RANK', '0'))
        said = Path(directory) / output_file(rank)
        worker = _start(launch, attempt, ranks, said)
        own = ProcessMark(worker.pid, processes.process_mark(worker.pid) or 'gone')
        try:
            too_large = self._wait(worker, own, launch.limits.memory_mb)
        finally:
            _end(worker)
        code = worker.returncode
        if code == 0 or (rank == 0 and code == 1 and too_large is None):
            # of the others, the first one tells
            return RankEnd(rank == 0)
        if too_large:
            return RankEnd(False, too_large, is_cause=True)
        how = f'signal {-code}' if code < 0 else f'exit code {code}'
        tail = processes.output_tail(said)
        failure = f'process {rank} of the run ended on {processes.this_host()} ({how}): {tail}'
        is_cause = code != LOST and RANK_LOST not in tail
        return RankEnd(False, failure, is_cause, is_lost=code < 0 or not is_cause)

    def _wait(
        self, worker: subprocess.Popen[bytes], own: ProcessMark, memory_mb: int | None
    ) -> str | None:
        """Wait until a process ends, is to end, or takes too much; says so then."""
        looks = 0
        while worker.poll() is None and not self._ending.wait(_LOOK_SECONDS):
            looks += 1
            if memory_mb is None or looks % _MEMORY_LOOKS:
                continue
            if processes.memory_bytes(own) > memory_mb * 1_000_000:
                return f'a process of the run took more than the {memory_mb:,} MB that it may have'
        return None


def _start(
    launch: Launch, attempt: int, ranks: dict[str, str], said: Path
) -> subprocess.Popen[bytes]:
    mark = launch.mark(attempt)
    environment = processes.worker_environment(
        launch.settings, os.environ, launch.limits.num_threads or max(1, int(launch.ray.num_cpus))
    )
    environment |= ranks
    environment |= {WORKER: f'{mark.pid}:{mark.mark}', LEADER: str(os.getpid())}
    is_first = ranks.get('RANK', '0') == '0'
    with said.open('wb') as output:
        return subprocess.Popen(
            [sys.executable, '-m', 'finetuner.runs.worker', str(launch.run_id)],
            stdin=subprocess.DEVNULL,
            # what the first one prints is for Ray's log
            stdout=None if is_first else output,
            stderr=None if is_first else subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End a process with its children, if it is still there; it has a moment to do that itself."""
    for number in (15, 9):
        if worker.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(_GRACE_SECONDS)
