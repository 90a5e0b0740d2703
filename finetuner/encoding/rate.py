"""How fast something goes of late."""

from __future__ import annotations

import math
import time

_SECONDS = 10


class Rate:
    """A moving average of how many there were a second, while there was something to do.

    Each count weighs less by a factor of e after 10 seconds.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._sum = 0.0
        self._weight = 0.0
        self._since = time.monotonic()

    @property
    def per_second(self) -> float:
        """The average; 0 as long as nothing was counted."""
        return self._sum / self._weight if self._weight else 0.0

    def resume(self) -> None:
        """There is something to do again: the time until now was idle, and says nothing."""
        self._since = time.monotonic()

    def count(self, number: int) -> None:
        """So many were done since the last time, or since there was something to do."""
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-6)
        kept = math.exp(-elapsed / _SECONDS)
        self._sum = kept * self._sum + (1 - kept) * number / elapsed
        self._weight = kept * self._weight + (1 - kept)
        self._since = now
