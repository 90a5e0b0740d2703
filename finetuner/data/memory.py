"""How much memory this process may still take: of the machine, or of the container it is in."""

from __future__ import annotations

from pathlib import Path

import psutil

# of the control group, version 2 and version 1: its limit, its use, and the file with the pages of
# files in that use, which are given up first
_CONTROL_GROUPS = (
    ('memory.max', 'memory.current', 'memory.stat', 'inactive_file'),
    (
        'memory/memory.limit_in_bytes',
        'memory/memory.usage_in_bytes',
        'memory/memory.stat',
        'total_inactive_file',
    ),
)


def available_memory(control_groups: Path = Path('/sys/fs/cgroup')) -> int:
    """Bytes that can be had without anything being swapped or killed.

    psutil tells of the whole machine; a container may be allowed less.

    Args:
        control_groups: where Linux tells what the container may take.
    """
    available = psutil.virtual_memory().available
    for limit, used, stat, name in _CONTROL_GROUPS:
        allowed, taken = (_words(control_groups / file)[:1] for file in (limit, used))
        # 'max' where there is no limit
        if not (allowed and allowed[0].isdigit() and taken and taken[0].isdigit()):
            continue
        words = _words(control_groups / stat)
        pages = int(words[words.index(name) + 1]) if name in words else 0
        available = min(available, max(0, int(allowed[0]) - int(taken[0]) + pages))
    return available


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding='ascii').split()
    except OSError:
        return []
