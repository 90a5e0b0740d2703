"""What the benchmarks share: contestants that take turns, and their table."""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# does its work once and returns how many pictures that were
Contestant = Callable[[], int]
# the threads of ONNX Runtime and OpenMP look for more work on their cores before they sleep
PAUSE_SECONDS = 0.2
NAME_WIDTH = 46


def epoch_by_epoch(trainer: Any, loader: Any) -> Callable[[], None]:
    """A function that trains one epoch more: `Trainer.fit` is told how many there are in all."""
    numbers = itertools.count(1)
    return lambda: trainer.fit(loader, next(numbers))


def take_turns(contestants: Mapping[str, Contestant], num_rounds: int) -> dict[str, list[float]]:
    """Run everybody once for practice, then in turns, so that all meet the same weather.

    Args:
        contestants: by name.
        num_rounds: how often each runs.

    Returns:
        Pictures a second of each, round by round.
    """
    for contestant in contestants.values():
        contestant()
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(num_rounds):
        for name, contestant in contestants.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            num_pictures = contestant()
            speeds[name].append(num_pictures / (time.perf_counter() - start))
    return speeds


def print_head(title: str, *against: str) -> None:
    """Print a title and the captions of the columns."""
    captions = ''.join(f' {f"to {name}":>14}' for name in against)
    print(f'\n{title:<{NAME_WIDTH}} {"images/s":>9}{captions}')


def print_speeds(speeds: Mapping[str, list[float]], *peers: str) -> None:
    """Print a line a contestant: its median speed, and the median ratio to the peers' of a round.

    Args:
        speeds: what `take_turns` returned.
        peers: whom everybody is compared with, in the order of the captions.
    """
    for name, own in speeds.items():
        ratios = ''.join(f' {ratio(own, speeds[peer]):>14.2f}' for peer in peers)
        print(f'{name:<{NAME_WIDTH}} {statistics.median(own):>9,.1f}{ratios}', flush=True)


def ratio(own: list[float], peers: list[float]) -> float:
    """The median of what each round says."""
    return statistics.median(mine / other for mine, other in zip(own, peers, strict=True))


def peak_resident_mb() -> float:
    """Largest resident size of this process in MB; Linux only.

    Of this program alone: what `resource` tells also counts the process that started it.
    """
    status = Path('/proc/self/status').read_text()
    found = re.search(r'VmHWM:\s+(\d+) kB', status)
    if found is None:
        raise OSError('/proc/self/status does not tell VmHWM')
    return int(found[1]) / 1024
