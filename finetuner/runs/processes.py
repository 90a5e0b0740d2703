"""Worker processes: start them, tell whether they live, end them.

A worker outlives the process that started it. Whoever looks at a run later may be another
process, so a worker is known by its process id and a mark that no later process of that id has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from finetuner.config import Settings
from finetuner.runs.records import ProcessMark
from finetuner.storage.database import make_private_directory

WORKER_COMMAND = (sys.executable, '-m', 'finetuner.runs.worker')
GRACE_SECONDS = 5.0
OUTPUT_FILE = 'output.txt'

# what the libraries that compute in a worker look at
_THREAD_VARIABLES = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')

# Workers this process started, by process id; a forked child is not their parent.
_children: dict[int, subprocess.Popen[bytes]] = {}
os.register_at_fork(after_in_child=_children.clear)


def launch_worker(
    settings: Settings,
    run_id: int,
    command: Sequence[str] | None = None,
    num_threads: int | None = None,
) -> ProcessMark:
    """Start the worker of a run; it goes on when this process ends.

    Args:
        settings: handed over in the worker's environment.
        run_id: handed over as the last argument.
        command: the program and its first arguments, `WORKER_COMMAND` when None.
        num_threads: of the worker's computations; None leaves it to torch.

    Returns:
        The worker's process.

    Raises:
        OSError: it cannot be started.
    """
    directory = run_directory(settings, run_id)
    make_private_directory(directory)
    with (directory / OUTPUT_FILE).open('wb') as output:
        worker = subprocess.Popen(
            [*(command or WORKER_COMMAND), str(run_id)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=worker_environment(settings, os.environ, num_threads),
            start_new_session=True,
        )
    _children[worker.pid] = worker
    # A worker that is gone already has no mark left; it is found dead at the first look.
    return ProcessMark(worker.pid, process_mark(worker.pid) or 'gone')


def run_directory(settings: Settings, run_id: int) -> Path:
    """Where a run's worker keeps what is no artifact."""
    return settings.home / 'runs' / str(run_id)


def this_process() -> ProcessMark:
    """The process that asks."""
    return ProcessMark(os.getpid(), process_mark(os.getpid()) or 'gone')


def this_host() -> str:
    """Name of this machine: only its own processes can be looked at."""
    return socket.gethostname()


def process_mark(pid: int) -> str | None:
    """What tells a living process from others that have or had its id; None when it has ended."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return _linux_mark(pid) or f'{process.create_time():.2f}'
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


def is_alive(process: ProcessMark) -> bool:
    """Whether a process is still there; a later one of the same id does not count."""
    child = _children.get(process.pid)
    if child is not None:
        child.poll()  # takes its exit status, or it would stay a zombie
    return process_mark(process.pid) == process.mark


def exit_reason(process: ProcessMark) -> str:
    """How a process that has ended did so, in words; '' when it was not this process's child."""
    child = _children.get(process.pid)
    if child is None:
        return ''
    try:
        # A process with threads looks dead a moment before its exit status is there.
        code = child.wait(timeout=2)
    except subprocess.TimeoutExpired:
        return ''
    if code >= 0:
        return f'exit code {code}'
    if -code == signal.SIGKILL:
        return 'killed by signal 9, SIGKILL, as a system does that is out of memory'
    return f'killed by signal {-code}, {signal.Signals(-code).name}'


def end_process(process: ProcessMark, grace: float = GRACE_SECONDS) -> None:
    """End a worker and its children: SIGTERM, and SIGKILL when that was not enough.

    Args:
        process: a worker, the leader of its process group.
        grace: seconds between the two.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not is_alive(process):
            return
        _signal_group(process.pid, number)
        deadline = time.monotonic() + grace
        while is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.02)


def pause_process(process: ProcessMark) -> None:
    """Ask a worker to write a checkpoint after its batch and to end; it alone, not its children."""
    if is_alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)


def memory_bytes(process: ProcessMark) -> int:
    """Resident memory that a worker and its children share with nobody; 0 when it has ended."""
    if not is_alive(process):
        return 0
    total = 0
    try:
        worker = psutil.Process(process.pid)
        for each in (worker, *worker.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = each.memory_info()
                total += memory.rss - getattr(memory, 'shared', 0)
    except psutil.NoSuchProcess:
        return 0
    return total


def stop_workers(grace: float = GRACE_SECONDS) -> None:
    """End all workers that this process started, as an Executor does when it is closed.

    Args:
        grace: seconds they have to write down why they ended.
    """
    going = [worker for worker in list(_children.values()) if worker.poll() is None]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for worker in going:
            if worker.poll() is None:
                _signal_group(worker.pid, number)
        deadline = time.monotonic() + grace
        while any(worker.poll() is None for worker in going) and time.monotonic() < deadline:
            time.sleep(0.02)


def read_output_tail(settings: Settings, run_id: int, num_lines: int = 5) -> str:
    """The last lines a worker wrote past its log, in one line; '' when there are none."""
    return output_tail(run_directory(settings, run_id) / OUTPUT_FILE, num_lines)


def output_tail(path: Path, num_lines: int = 5) -> str:
    """The last lines of a file, in one line; '' when there are none, or no file."""
    try:
        with path.open('rb') as file:
            file.seek(max(0, path.stat().st_size - 4096))
            text = file.read().decode('utf-8', 'replace')
    except FileNotFoundError:
        return ''
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ' | '.join(lines[-num_lines:])


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # it has just ended


def _linux_mark(pid: int) -> str | None:
    """Start of a process in ticks since the machine's start: the clock may be set, this stays."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        fields = Path(f'/proc/{pid}/stat').read_text()
    except FileNotFoundError:
        return None
    # The second field, a name in parentheses, may hold spaces and parentheses itself.
    return f'{boot}:{fields.rpartition(")")[2].split()[19]}'


def worker_environment(
    settings: Settings, inherited: Mapping[str, str], num_threads: int | None = None
) -> dict[str, str]:
    """The environment of a worker.

    Args:
        settings: of the run store.
        inherited: of this process.
        num_threads: of the worker's computations; None leaves it to torch.
    """
    environment = {
        # glibc gives large activations back after each step and faults them in again for the next:
        # keeping them makes a step a third faster, for up to a third more memory
        'MALLOC_MMAP_MAX_': '0',
        'MALLOC_TRIM_THRESHOLD_': str(1 << 40),
        # OpenMP's threads wait busily for some ten milliseconds, which takes the cores from runs
        # beside this one; some tens of microseconds bridge the gaps between two kernels as well
        'GOMP_SPINCOUNT': '10000',
        **inherited,
        'FINETUNER_HOME': str(settings.home),
        'FINETUNER_DATABASE_URL': settings.database_url,
        'FINETUNER_ARTIFACTS_URL': settings.artifacts_url,
        # a run is not to start runs of its own
        'FINETUNER_LAUNCHER': 'process',
        # A script in the working directory must not stand in for a module of the same name.
        'PYTHONSAFEPATH': '1',
    }
    if num_threads is not None:
        environment |= dict.fromkeys(_THREAD_VARIABLES, str(num_threads))
    # a process of W&B that belongs to this one, and ends with it
    environment.pop('WANDB_SERVICE', None)
    root = Path(__file__).parents[2]
    if root.name not in ('site-packages', 'dist-packages'):
        # Run from its sources, the package is found only where this process found it.
        paths = [str(root), inherited.get('PYTHONPATH', '')]
        environment['PYTHONPATH'] = os.pathsep.join(path for path in paths if path)
    return environment
