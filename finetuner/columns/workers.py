"""Processes that compute tasks.

Not those of `concurrent.futures`: these share a pipe for results, and one that is killed while it sends,
as happens where memory runs out, leaves half a message there, for the end of which its parent waits for
ever. Here each has a pipe of its own.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from finetuner.excepts import DataError

# one that is computed, and the next: nobody waits for work while results are kept
_MOST_TASKS = 2


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    # of the tasks that it has, in order
    sizes: list[int] = field(default_factory=list)


def run_in_processes(
    tasks: Iterator[Any],
    compute: Callable[[Any], Any],
    num_workers: int,
    size_of: Callable[[Any], int],
) -> Generator[tuple[Any, int, float], None, None]:
    """Compute tasks in processes, which are gone when this ends.

    Args:
        tasks: each is asked for when a process is free to take it.
        compute: computes a task, in the process.
        num_workers: how many processes.
        size_of: what the caller wants to know of a task when it is done.

    Close it (`contextlib.closing`), for its processes to be gone whatever goes wrong meanwhile.

    Yields:
        What came of a task, its size, and the seconds that it took; in the order in which they are done.

    Raises:
        DataError: a process was killed, or ended by itself.
        RuntimeError: `compute` raised an error.
    """
    first = next(tasks, None)
    if first is None:
        # nothing to do is no reason to start processes
        return
    workers: list[_Worker] = []
    left = itertools.chain([first], tasks)
    # what functions leave there goes with it: processes that are killed clear nothing up
    folder = tempfile.TemporaryDirectory(prefix='columns-', ignore_cleanup_errors=True)
    try:
        for _ in range(num_workers):
            workers.append(_start(compute, folder.name))
        for _ in range(_MOST_TASKS):
            for worker in workers:
                _give(worker, left, size_of)
        while busy := [worker for worker in workers if worker.sizes]:
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(each for each in busy if each.pipe is pipe)
                result, seconds, error = _received(worker)
                if error:
                    raise RuntimeError(f'a process that computes failed:\n{error}')
                size = worker.sizes.pop(0)
                _give(worker, left, size_of)
                yield result, size, seconds
    finally:
        for worker in workers:
            worker.process.kill()
            worker.pipe.close()
        for worker in workers:
            worker.process.join()
        folder.cleanup()


def _start(compute: Callable[[Any], Any], folder: str) -> _Worker:
    context: Any = multiprocessing.get_context('fork' if forks() else 'spawn')
    here, there = context.Pipe()
    given = (there, compute, os.getpid(), folder)
    process = context.Process(target=_work, args=given, name='column')
    process.start()
    # so that its end is closed when it dies
    there.close()
    return _Worker(process, here)


def _give(worker: _Worker, tasks: Iterator[Any], size_of: Callable[[Any], int]) -> None:
    task = next(tasks, None)
    if task is None:
        return
    worker.sizes.append(size_of(task))
    try:
        worker.pipe.send(task)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise _killed(worker) from error


def _received(worker: _Worker) -> tuple[Any, float, str]:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError) as error:
        # at the end of a message, or in the middle of it
        raise _killed(worker) from error


def _killed(worker: _Worker) -> DataError:
    worker.process.join(1)
    code = worker.process.exitcode
    how = f'ended with {code}' if code is None or code >= 0 else f'was killed by signal {-code}'
    return DataError(
        f'a process that computes {how}, perhaps for memory: what was computed before is kept; go on '
        'with fewer workers'
    )


def forks() -> bool:
    """Whether processes are forked, as torch's loaders are: on Linux."""
    return os.uname().sysname == 'Linux' if hasattr(os, 'uname') else False


# ---- in the process


def _work(pipe: Connection, compute: Callable[[Any], Any], parent: int, folder: str) -> None:
    tempfile.tempdir = folder
    # who interrupts the parent has it end this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent, folder), name='end', daemon=True).start()
    tasks: queue.Queue[Any] = queue.Queue()
    # read meanwhile: else parent and child could both wait for the other to read
    threading.Thread(target=_read, args=(pipe, tasks), name='read', daemon=True).start()
    while True:
        task = tasks.get()
        begun = time.monotonic()
        try:
            message = compute(task), time.monotonic() - begun, ''
        except BaseException:  # noqa: BLE001 - the parent tells it
            message = None, 0.0, traceback.format_exc()
        pipe.send(message)


def _read(pipe: Connection, tasks: queue.Queue[Any]) -> None:
    while True:
        try:
            tasks.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)


def _end_with(parent: int, folder: str) -> None:
    """End when the process does that started this one: one that is killed tells nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
