"""Files and directories that nobody goes on with: how old and how large they are, and their end."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

KEPT_SECONDS = 24 * 3600.0


def left_over(paths: Iterable[Path], seconds: float) -> Iterator[tuple[Path, int]]:
    """Those to which nothing was added for so long, with the bytes that their end makes free.

    Args:
        paths: files and directories; what goes away meanwhile is left out.
        seconds: what is newer stays; with 0, nothing does, whatever the clock says.
    """
    oldest = time.time() - seconds if seconds else math.inf
    for path in paths:
        files = _files_of(path)
        if files and max(file.st_mtime for file in files) < oldest:
            yield path, sum(f.st_size for f in files if stat.S_ISREG(f.st_mode) and f.st_nlink == 1)


def delete_path(path: Path) -> None:
    """Delete a file, or a directory with all that is in it; nothing there is no error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _files_of(path: Path) -> list[os.stat_result]:
    """What a path and all below it look like; what goes away meanwhile is left out."""
    below = [Path(folder, name) for folder, _, names in os.walk(path) for name in ('.', *names)]
    found = []
    for each in (path, *below):
        with contextlib.suppress(FileNotFoundError):
            found.append(each.lstat())
    return found
