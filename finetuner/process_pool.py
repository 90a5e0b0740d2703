"""Processes that compute tasks.

Not those of `concurrent.futures`: these share a pipe for results, and one that is killed while it sends,
as happens where memory runs out, leaves half a message there, for the end of which its parent waits for
ever. Here each has a pipe of its own.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol


@dataclass(frozen=True)
class Done:
    """A task that is done, or given up.

    Attributes:
        task: what was remembered of it.
        result: what came of it.
        seconds: that it took.
        error: how `compute` failed, with its traceback; else empty.
        death: how the processes ended that were computing it; else empty.
    """

    task: Any
    result: Any = None
    seconds: float = 0.0
    error: str = ''
    death: str = ''


class _Process(Protocol):
    """What `multiprocessing` and `subprocess` have in common, with the names of the former."""

    def kill(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...

    @property
    def exitcode(self) -> int | None: ...


@dataclass
class _Worker:
    process: _Process
    pipe: Connection
    # number of each task that it has and what is remembered of it, in order
    tasks: list[tuple[int, Any]] = field(default_factory=list)


class ProcessPool:
    """Computes tasks in processes, some of them at a time."""

    def __init__(
        self,
        compute: Callable[[Any], Any],
        num_workers: int,
        *,
        name: str = 'worker',
        remember: Callable[[Any], Any] | None = None,
        tasks_each: int = 2,
        most_deaths: int = 1,
        fresh: bool = False,
    ) -> None:
        """Start nothing yet.

        Args:
            compute: computes a task, in the process.
            num_workers: how many processes.
            name: of the processes, and of their folder of temporary files.
            remember: what is held of a task and given back with its result; None holds the task.
            tasks_each: that a process has: with two, it never waits while results are kept.
            most_deaths: how many processes may die while they compute a task before it is given up.
                More than 1 needs `remember` to be None.
            fresh: new interpreters in place of forks, for libraries whose threads do not outlive a
                fork; `compute` is pickled then.
        """
        self._compute = compute
        self._num_workers = num_workers
        self._name = name
        self._remember = remember
        self._tasks_each = tasks_each
        self._most_deaths = most_deaths
        self._fresh = fresh

    def run(self, tasks: Iterator[Any]) -> Generator[Done, None, None]:
        """Compute tasks; the processes are gone when this ends.

        Close it (`contextlib.closing`), for them to be gone whatever goes wrong meanwhile.

        Args:
            tasks: each is asked for when a process is free to take it.

        Yields:
            The tasks in the order in which they are done.
        """
        left = _Left(tasks)
        if not left:
            # nothing to do is no reason to start processes
            return
        workers: list[_Worker] = []
        # what functions leave there goes with it: processes that are killed clear nothing up
        with tempfile.TemporaryDirectory(
            prefix=f'{self._name}-', ignore_cleanup_errors=True
        ) as folder:
            try:
                for _ in range(self._num_workers):
                    workers.append(self._start(folder))
                for _ in range(self._tasks_each):
                    for worker in workers:
                        self._give(worker, left)
                while busy := {worker.pipe: worker for worker in workers if worker.tasks}:
                    for pipe in wait(list(busy)):
                        worker = busy[pipe]  # type: ignore[index]
                        try:
                            result, seconds, error = worker.pipe.recv()
                        except (EOFError, OSError):
                            # at the end of a message, or in the middle of it
                            yield from self._bury(worker, left)
                            workers[workers.index(worker)] = self._start(folder)
                            for each in workers:
                                self._give(each, left)
                            continue
                        _, task = worker.tasks.pop(0)
                        self._give(worker, left)
                        yield Done(task, result, seconds, error)
            finally:
                for worker in workers:
                    worker.process.kill()
                    worker.pipe.close()
                for worker in workers:
                    worker.process.join()

    def _give(self, worker: _Worker, left: _Left) -> None:
        if len(worker.tasks) >= self._tasks_each or not left:
            return
        number, task = left.take()
        worker.tasks.append((number, self._remember(task) if self._remember else task))
        # one that died has it, and is found dead when it is waited for
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.pipe.send(task)

    def _bury(self, worker: _Worker, left: _Left) -> list[Done]:
        """Put back what a process had that died, or give up what it computed."""
        worker.process.join(1)
        worker.pipe.close()
        code = worker.process.exitcode
        how = f'ended with {code}' if code is None or code >= 0 else f'was killed by signal {-code}'
        (number, task), *others = worker.tasks
        for other in reversed(others):
            left.put_back(*other)
        left.deaths[number] += 1
        if left.deaths[number] >= self._most_deaths:
            return [Done(task, death=how)]
        left.put_back(number, task)
        return []

    def _start(self, folder: str) -> _Worker:
        here, there = multiprocessing.Pipe()
        if self._fresh:
            process: _Process = _Interpreter(there, folder)
        else:
            context: Any = multiprocessing.get_context('fork' if forks() else 'spawn')
            given = (there, self._compute, os.getpid(), folder)
            process = context.Process(target=_work, args=given, name=self._name)
            process.start()  # type: ignore[attr-defined]
        # so that its end is closed when it dies
        there.close()
        if self._fresh:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                here.send(self._compute)
        return _Worker(process, here)


class _Left:
    """Tasks that nobody has, numbered: those put back first."""

    def __init__(self, tasks: Iterator[Any]) -> None:
        self._tasks = enumerate(tasks)
        self._next: collections.deque[tuple[int, Any]] = collections.deque()
        # processes that died of each
        self.deaths: collections.Counter[int] = collections.Counter()

    def __bool__(self) -> bool:
        """Whether there are any; looks one ahead."""
        if not self._next:
            self._next.extend(itertools.islice(self._tasks, 1))
        return bool(self._next)

    def take(self) -> tuple[int, Any]:
        return self._next.popleft()

    def put_back(self, number: int, task: Any) -> None:
        self._next.appendleft((number, task))


class _Interpreter:
    """A new interpreter that works; the main module of this one is not imported there."""

    def __init__(self, pipe: Connection, folder: str) -> None:
        descriptor = pipe.fileno()
        code = f'from finetuner.process_pool import serve; serve({descriptor}, {os.getpid()}, {folder!r})'
        self._process = subprocess.Popen(
            [sys.executable, '-c', code],
            stdin=subprocess.DEVNULL,
            # what libraries print there is no result of this process
            stdout=2,
            pass_fds=(descriptor,),
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
        )

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)


def forks() -> bool:
    """Whether processes are forked, as torch's loaders are: on Linux."""
    return os.uname().sysname == 'Linux' if hasattr(os, 'uname') else False


# ---- in the process


def serve(descriptor: int, parent: int, folder: str) -> None:
    """Work in a new interpreter: what computes comes first.

    Args:
        descriptor: of the pipe.
        parent: process id of who started it.
        folder: for temporary files.
    """
    pipe = Connection(descriptor)
    _work(pipe, pipe.recv(), parent, folder)


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
