"""What every contestant of `benchmarks/peers.py` shares: its task, its clock, its results.

A contestant is a script that is given a folder. It reads `task.json` there, trains, and writes
`result.json` and the embeddings of the test data, from which the driver computes the metrics. This
module lives with the packages of any of them: the standard library and NumPy.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """What to train on and how; the same for all contestants of a round.

    Attributes:
        kind: `pictures` or `texts`.
        train: (path of a picture or a text, label) of each item.
        query: the same of what is searched with.
        index: the same of what is to be found.
        epochs: times the training data is gone through.
        batch_size: items in a batch.
        items_per_class: of them, of each class.
        train_size: of training pictures, in pixels.
        embed_sizes: of test pictures; the best counts.
        num_workers: loader processes.
        seed: of everything drawn at random.
        curve: whether to measure after each epoch, the clock stopped.
        options: of this contestant.
    """

    kind: str
    train: list[tuple[str, int]]
    query: list[tuple[str, int]]
    index: list[tuple[str, int]]
    epochs: int
    batch_size: int
    items_per_class: int
    train_size: int
    embed_sizes: list[int]
    num_workers: int
    seed: int
    curve: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `task.json`."""
        (folder / 'task.json').write_text(json.dumps(asdict(self)))

    def is_in(self, folder: Path) -> bool:
        """Whether `task.json` is this task."""
        return (folder / 'task.json').read_text() == json.dumps(asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Task:
        """Read `task.json`."""
        return cls(**json.loads((folder / 'task.json').read_text()))


@dataclass
class Result:
    """What a contestant tells.

    Attributes:
        train_seconds: from the first batch asked for to the final weights.
        epoch_seconds: of each epoch's training.
        num_items: that went through the model in these epochs.
        saved_at: when the tuned model was on disk, in seconds since 1970.
        paused_seconds: of evaluation before that, which are not the training's.
        losses: mean of each epoch, where the library tells.
        curve: seconds of training and the metric after each epoch, if asked for.
        threads: of torch.
        versions: of the packages that trained.
    """

    train_seconds: float
    epoch_seconds: list[float]
    num_items: int
    saved_at: float
    threads: int
    versions: dict[str, str]
    paused_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write `result.json`, whole or not at all."""
        partial = folder / 'result.json.part'
        partial.write_text(json.dumps(asdict(self)))
        partial.rename(folder / 'result.json')

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Read `result.json`."""
        return cls(**json.loads((folder / 'result.json').read_text()))


class Clock:
    """Counts seconds, items and losses epoch by epoch."""

    def __init__(self) -> None:
        """Start."""
        self._epoch_losses: list[float] = []
        self.epoch_seconds: list[float] = []
        self.losses: list[float] = []
        self.num_items = 0
        self.start()

    def start(self) -> None:
        """Begin at zero seconds, here and now."""
        self._began = self._epoch_began = time.perf_counter()

    def batch(self, num_items: int, loss: float) -> None:
        """Count a batch."""
        self.num_items += num_items
        self._epoch_losses.append(loss)

    def epoch(self) -> None:
        """End an epoch and begin the next."""
        now = time.perf_counter()
        self.epoch_seconds.append(now - self._epoch_began)
        self._epoch_began = now
        if self._epoch_losses:
            self.losses.append(float(np.mean(self._epoch_losses)))
            print(f'epoch {len(self.epoch_seconds)}: loss {self.losses[-1]:.4f}', flush=True)
        self._epoch_losses = []

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._began

    def result(self, train_seconds: float, threads: int, versions: dict[str, str]) -> Result:
        """What was counted, the model having just been saved.

        Args:
            train_seconds: from the first batch to the final weights.
            threads: of torch.
            versions: of the libraries that trained.
        """
        return Result(
            train_seconds=train_seconds,
            epoch_seconds=self.epoch_seconds,
            num_items=self.num_items,
            saved_at=time.time(),
            threads=threads,
            versions=versions,
            losses=self.losses,
        )


def write_embeddings(folder: Path, way: str, query: np.ndarray, index: np.ndarray) -> None:
    """Write the embeddings of the test data.

    Args:
        folder: the contestant's.
        way: in which they were made, such as `128 px`.
        query: `[num_queries, dimension]`.
        index: `[num_index, dimension]`.
    """
    np.savez(folder / f'embeddings-{way}.npz', query=query, index=index)


def begin() -> tuple[Path, Task]:
    """The folder on the command line and the task in it; seeds Python and NumPy."""
    folder = Path(sys.argv[1]).resolve()
    task = Task.read(folder)
    random.seed(task.seed)
    np.random.seed(task.seed)
    return folder, task
