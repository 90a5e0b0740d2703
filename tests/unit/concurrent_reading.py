"""Reading one object from several threads and forked processes at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_NUM_PROCESSES, _NUM_THREADS = 4, 3
Read = Callable[[list[Any]], None]


def reader(docs: Sequence[Any], expected: list[str], num_rounds: int) -> Read:
    """A function that reads all Documents, at random and in order, and keeps what is amiss."""

    def read(failures: list[Any]) -> None:
        rng = np.random.default_rng(os.getpid())
        for _ in range(num_rounds):
            order = rng.permutation(len(expected))
            got = [docs[i].id for i in order] + [doc.id for doc in docs]
            if got != [expected[i] for i in order] + expected:
                failures.append(order)

    return read


def forked_readers(read: Read) -> list[Any]:
    """Processes that read in several threads each; the exit code is how often that went wrong."""

    def read_in_process() -> None:
        failures: list[Any] = []
        threads = [threading.Thread(target=read, args=(failures,)) for _ in range(_NUM_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(len(failures))

    context = multiprocessing.get_context('fork')
    return [context.Process(target=read_in_process) for _ in range(_NUM_PROCESSES)]
