"""How many cores there are to compute on."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, 'sched_getaffinity', None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def share_of_cores(num_processes: int) -> int:
    """How many cores each of so many processes of this machine has to itself; one at least."""
    return max(1, num_cores() // num_processes)
