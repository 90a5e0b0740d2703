"""What starts, watches and ends workers: an interface, and the one that makes processes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetuner.config import RunConfig, Settings
from finetuner.cores import num_cores
from finetuner.excepts import ConfigError
from finetuner.runs import processes
from finetuner.runs.records import ProcessMark


@dataclass(frozen=True)
class WorkerLimits:
    """What one worker may use.

    Attributes:
        memory_mb: resident memory of the worker and its loader processes, in MB of 10^6 bytes; a
            run that takes more is ended and says so. None sets no limit.
        num_threads: of each process that computes; None leaves it to torch: one for each core.
    """

    memory_mb: int | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
            ConfigError: one is not a positive number.
        """
        for name in ('memory_mb', 'num_threads'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f'{name} is {value}: it takes 1 or more, or nothing')


class Launcher(Protocol):
    """Starts workers of runs and looks after them.

    A worker is known by a `ProcessMark`, which any process on the launcher's host understands.
    """

    host: str
    limits: WorkerLimits
    # whether workers stay when the server ends, for the next one to look after
    outlasts_server: bool

    def check(self, config: RunConfig) -> None:
        """Refuse a run that cannot be started here, with a ConfigError that says why."""

    def launch(self, run_id: int) -> ProcessMark:
        """Start a worker, which goes on when this process ends; OSError when it cannot start."""

    def is_alive(self, worker: ProcessMark) -> bool:
        """Whether a worker is still there."""

    def pause(self, worker: ProcessMark) -> None:
        """Ask a worker to write a checkpoint after its batch and to end."""

    def end(self, worker: ProcessMark, grace: float) -> None:
        """End a worker with all its processes; it has so many seconds to do that itself."""

    def memory_bytes(self, worker: ProcessMark) -> int:
        """Resident memory of a worker and its processes; 0 when it has ended."""

    def last_words(self, worker: ProcessMark, run_id: int) -> str:
        """Why a worker has ended, as far as that can be seen from outside; '' if not at all."""

    def name_of(self, worker: ProcessMark) -> str:
        """What to call a worker in a log."""


def build_launcher(settings: Settings, limits: WorkerLimits | None = None) -> Launcher:
    """Make what starts workers, as the settings say.

    Args:
        settings: handed to workers.
        limits: what one worker may use.
    """
    if settings.ray is None:
        return ProcessLauncher(settings, limits=limits)
    from finetuner.runs.ray_launching import RayLauncher

    return RayLauncher(settings, limits)


class ProcessLauncher:
    """Workers are processes of this machine.

    Args:
        settings: handed to workers.
        command: the program of a worker and its first arguments; None takes this package's.
        limits: what one worker may use.
    """

    # each is asked for a checkpoint, since the machine may be about to end
    outlasts_server = False

    def __init__(
        self,
        settings: Settings,
        command: Sequence[str] | None = None,
        limits: WorkerLimits | None = None,
    ) -> None:
        self.host = processes.this_host()
        self.limits = limits or WorkerLimits()
        self._settings = settings
        self._command = command

    def check(self, config: RunConfig) -> None:
        """Refuse a run of more processes than there are cores or GPUs, or of several machines.

        Raises:
            ConfigError: it is such a run; says what there is.
        """
        if config.num_nodes > 1:
            raise ConfigError(
                f'num_nodes={config.num_nodes}: runs are processes of one machine here; several '
                'machines need a Ray cluster, FINETUNER_LAUNCHER=ray, and its address in '
                'FINETUNER_RAY_ADDRESS; see docs/clusters.md'
            )
        if config.num_processes == 1:
            return
        most, what = num_cores(), 'cores'
        if config.device == 'cuda':
            import torch

            if torch.cuda.is_available():
                most, what = torch.cuda.device_count(), 'GPUs'
        if config.num_processes > most:
            raise ConfigError(
                f'num_processes={config.num_processes}: this machine has {most} {what}, and each '
                'process takes one at least'
            )

    def launch(self, run_id: int) -> ProcessMark:
        """Start a worker, which goes on when this process ends; OSError when it cannot start."""
        return processes.launch_worker(
            self._settings, run_id, self._command, self.limits.num_threads
        )

    def is_alive(self, worker: ProcessMark) -> bool:
        """Whether a worker is still there."""
        return processes.is_alive(worker)

    def pause(self, worker: ProcessMark) -> None:
        """Ask a worker to write a checkpoint after its batch and to end."""
        processes.pause_process(worker)

    def end(self, worker: ProcessMark, grace: float) -> None:
        """End a worker with all its processes; it has so many seconds to do that itself."""
        processes.end_process(worker, grace)

    def memory_bytes(self, worker: ProcessMark) -> int:
        """Resident memory of a worker and its processes; 0 when it has ended."""
        return processes.memory_bytes(worker)

    def last_words(self, worker: ProcessMark, run_id: int) -> str:
        """Why a worker has ended, as far as that can be seen from outside; '' if not at all."""
        reason = processes.exit_reason(worker)
        tail = processes.read_output_tail(self._settings, run_id)
        return (f' ({reason})' if reason else '') + (f'; its last output: {tail}' if tail else '')

    def name_of(self, worker: ProcessMark) -> str:
        """What to call a worker in a log."""
        return f'worker process {worker.pid}'
