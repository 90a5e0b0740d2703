"""What runs have measured, remembered for the next: a small file of numbers."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

logger = logging.getLogger('finetuner.run')


class Findings(Protocol):
    """Whoever remembers what was measured; a run knows no more of it than this."""

    def recall(self, key: str) -> dict[str, float] | None:
        """What was found under a key; None for nothing."""

    def remember(self, key: str, values: Mapping[str, float]) -> None:
        """Keep what was found."""


class NoFindings:
    """Remembers nothing."""

    def recall(self, key: str) -> dict[str, float] | None:
        """Nothing was found."""
        return None

    def remember(self, key: str, values: Mapping[str, float]) -> None:
        """Forget it."""


class FindingsFile:
    """Remembers in a JSON file, which may be deleted at any time."""

    def __init__(self, path: Path) -> None:
        """Open nothing yet.

        Args:
            path: of the file; its folder exists when something is remembered.
        """
        self._path = path

    def recall(self, key: str) -> dict[str, float] | None:
        """What was found under a key; None for nothing."""
        return self._read().get(key)

    def remember(self, key: str, values: Mapping[str, float]) -> None:
        """Keep what was found, or go on without where the file cannot be written."""
        # two runs at once may lose what one of them found: it is then found again
        found = {**self._read(), key: dict(values)}
        try:
            with tempfile.NamedTemporaryFile(
                'w', dir=self._path.parent, prefix='.measured-', delete=False, encoding='utf-8'
            ) as file:
                json.dump(found, file, indent=1, sort_keys=True)
            os.replace(file.name, self._path)
        except OSError as error:
            logger.info('What was measured is not remembered: %s', error)

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self._path.read_text(encoding='utf-8'))
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {key: value for key, value in found.items() if _is_numbers(value)}


def _is_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, (int, float)) for v in value.values())
