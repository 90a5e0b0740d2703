"""Which classes an image shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuner.collections.geometry import Frame
from finetuner.collections.labels.base import LabelKind, damaged, shown, some
from finetuner.excepts import DataError


@dataclass(frozen=True)
class ClassLabels(LabelKind[np.ndarray]):
    """Which classes an image shows: uint8 `[classes]`, 1 for each that is there.

    Taken are such a vector ("one hot encoding", more than one may be hot), a class's name, or several.
    """

    mltype = 'classification'

    def read(self, label: Any, frame: Frame) -> np.ndarray:
        """See `LabelKind.read`."""
        del frame
        if isinstance(label, str):
            return self._of_names([label])
        values = label.tolist() if isinstance(label, np.ndarray) else label
        if not isinstance(values, Sequence):
            raise DataError(f'{self._expected()}: not {shown(label)}')
        if values and all(isinstance(value, str) for value in values):
            return self._of_names(values)
        if any(isinstance(value, str) or value not in (0, 1) for value in values):
            raise DataError(f'{self._expected()}: not {shown(label)}')
        if len(values) != len(self.classes):
            raise DataError(f'{self._expected()}: {shown(label)} has {len(values)} numbers')
        return np.array(values, np.uint8)

    def flip(
        self, label: np.ndarray, frame: Frame, *, horizontal: bool, vertical: bool
    ) -> np.ndarray:
        """It stays what it is."""
        del frame, horizontal, vertical
        return label

    def present(self, label: np.ndarray) -> list[str]:
        """See `LabelKind.present`."""
        return [name for name, value in zip(self.classes, label, strict=True) if value]

    def encode(self, label: np.ndarray) -> bytes:
        """A byte a class."""
        return label.tobytes()

    def decode(self, data: bytes, frame: Frame) -> np.ndarray:
        """See `LabelKind.decode`."""
        del frame
        vector = np.zeros(len(self.classes), np.uint8)
        if len(data) > len(vector) or max(data, default=0) > 1:
            raise damaged(self, data)
        vector[: len(data)] = np.frombuffer(data, np.uint8)
        return vector

    def as_json(self, label: np.ndarray) -> list[int]:
        """Zeros and ones."""
        return label.tolist()

    def _of_names(self, names: Sequence[str]) -> np.ndarray:
        vector = np.zeros(len(self.classes), np.uint8)
        for name in names:
            vector[self.index_of(name)] = 1
        return vector

    def _expected(self) -> str:
        return (
            f'a label of this collection is {len(self.classes)} zeros and ones, or the names of '
            f'classes ({some(self.classes)})'
        )
