"""What labels of a kind have in common, and the words of their errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from reprlib import Repr
from typing import Any, ClassVar, Generic, TypeVar

from finetuner.collections.geometry import Frame
from finetuner.excepts import DataError, unknown_name

Label = TypeVar('Label')


@dataclass(frozen=True)
class LabelKind(ABC, Generic[Label]):
    """What the labels of a collection are.

    Attributes:
        classes: their names, in the order in which labels count them.
    """

    classes: tuple[str, ...]
    mltype: ClassVar[str]

    @abstractmethod
    def read(self, label: Any, frame: Frame) -> Label:
        """Check a label, and bring it into the form that is kept.

        Args:
            label: in any of the forms that its kind takes.
            frame: of the image it belongs to.

        Raises:
            DataError: it is no label of this kind, or of another image.
        """

    @abstractmethod
    def flip(self, label: Label, frame: Frame, *, horizontal: bool, vertical: bool) -> Label:
        """What a label becomes when its image is turned over.

        Args:
            label: in the form that is kept.
            frame: of the image.
            horizontal: whether left becomes right.
            vertical: whether top becomes bottom.
        """

    @abstractmethod
    def present(self, label: Label) -> list[str]:
        """Names of the classes that a label says are there."""

    @abstractmethod
    def encode(self, label: Label) -> bytes:
        """A label, in the form that is kept, as bytes."""

    @abstractmethod
    def decode(self, data: bytes, frame: Frame) -> Label:
        """The label that `encode` made bytes of.

        Args:
            data: the bytes; of a collection that had fewer classes then, too.
            frame: of the image.

        Raises:
            DataError: these are no such bytes.
        """

    @abstractmethod
    def as_json(self, label: Label) -> Any:
        """A label as JSON holds it."""

    def index_of(self, name: str) -> int:
        """Place of a class.

        Raises:
            DataError: there is no such class.
        """
        place = self.places.get(name) if isinstance(name, str) else None
        if place is None:
            raise DataError(unknown_name('class', name, self.classes))
        return place

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each class."""
        return {name: place for place, name in enumerate(self.classes)}


def damaged(kind: LabelKind, data: bytes) -> DataError:
    """What is said of bytes that no label became."""
    return DataError(
        f'a kept label of {len(data)} bytes is damaged, or of other classes than '
        f'{some(kind.classes)}'
    )


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many there are besides."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(map(repr, names[:most])) + more


def shown(value: Any, most: int = 80) -> str:
    """What came, as errors quote it; of what is large or deep only the beginning is looked at."""
    text = _SHORT.repr(value)
    return text if len(text) <= most else f'{text[:most]}...'


def _short() -> Repr:
    found = Repr()
    found.maxlevel = 8
    found.maxlist = found.maxtuple = found.maxdict = 20
    found.maxstring = found.maxlong = found.maxother = 100
    return found


_SHORT = _short()
