"""Labels of training data as arrays: what each item of a dataset is similar to, and to which degree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.contents import (
    MODALITIES,
    match_label,
    nested_documents,
    normalise_label,
    raw_label,
    read_score,
)
from finetuner.excepts import DataError

AnyLabel = TypeVar('AnyLabel', bound=Any)

ROOT, POSITIVE, NEGATIVE = 0, 1, -1


class LabelArray(Sequence[AnyLabel]):
    """Labels as a sequence of plain ints, floats or tuples, held as one array.

    A list of a million labels is a million objects, which every loader process would copy as soon
    as it looked at them. This one is read in place, and is equal to a list of the same labels.

    Attributes:
        values: `[n]`, or `[n, 2]` where a label is a tuple.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        """Return the number of labels."""
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> AnyLabel: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[AnyLabel]: ...
    def __getitem__(self, index: int | slice) -> AnyLabel | Sequence[AnyLabel]:
        """Return one label, or the labels of a slice."""
        found = self.values[index]
        if isinstance(index, slice):
            return LabelArray(found)
        return _plain(found)

    def __iter__(self) -> Iterator[AnyLabel]:
        """Yield the labels in order."""
        return map(_plain, self.values)

    def __eq__(self, other: object) -> bool:
        """Compare with any sequence of labels."""
        if isinstance(other, LabelArray):
            return np.array_equal(self.values, other.values)
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(other) == len(self) and all(a == b for a, b in zip(self, other, strict=True))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Give NumPy the array itself."""
        return np.array(self.values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        """Show the first few."""
        more = ', ...' if len(self) > 10 else ''
        return f'[{", ".join(repr(label) for label in self[:10])}{more}]'


def _plain(value: Any) -> Any:
    return tuple(value.tolist()) if isinstance(value, np.ndarray) else value.item()


class LabelColumn(ABC):
    """Collects the labels of one kind of data, a Document at a time."""

    @abstractmethod
    def add(self, doc: Document) -> None:
        """Take the labels of the next Document, which has been found to be of this kind.

        Raises:
            DataError: what should be a label is none.
        """

    @abstractmethod
    def values(self) -> NDArray[Any]:
        """One label an item, in the order of the items."""


class ClassLabels(LabelColumn):
    """One int a Document: its class, counted from 0 in order of appearance.

    Attributes:
        numbers: the number of each class, by the label that the Documents have.
    """

    def __init__(self) -> None:
        self.numbers: dict[int | str, int] = {}
        self._values = array('i')

    def add(self, doc: Document) -> None:
        """Take the Document's label."""
        label = normalise_label(raw_label(doc))
        self._values.append(self.numbers.setdefault(label, len(self.numbers)))

    def values(self) -> NDArray[np.int32]:
        """`[num_documents]` int32."""
        return np.array(self._values, dtype=np.int32)


class InstanceLabels(LabelColumn):
    """One int a Document, its own position: nothing is similar to it but itself."""

    def __init__(self, count: int = 0) -> None:
        self._count = count

    def add(self, doc: Document) -> None:
        """Count the Document."""
        self._count += 1

    def values(self) -> NDArray[np.int64]:
        """`[num_documents]` int64."""
        return np.arange(self._count, dtype=np.int64)


class SessionLabels(LabelColumn):
    """Of each root, then of each of its matches: (number of the session, 0, 1 or -1)."""

    def __init__(self) -> None:
        self._sessions = array('q')
        self._types = array('b')
        self._count = 0

    def add(self, doc: Document) -> None:
        """Take a root and the labels of its matches."""
        types = [ROOT]
        for match in nested_documents(doc, 'matches'):
            type_ = match_label(match)
            if type_ is None:
                raise DataError(f'label {raw_label(match)!r} of a match is not 1 or -1')
            types.append(type_)
        self._types.extend(types)
        self._sessions.extend([self._count] * len(types))
        self._count += 1

    def values(self) -> NDArray[np.int64]:
        """`[num_items, 2]` int64."""
        return np.stack([np.array(self._sessions), np.array(self._types)], axis=1).astype(np.int64)


class ScoredPairLabels(LabelColumn):
    """Of each of the two chunks: the score of the pair."""

    def __init__(self) -> None:
        self._scores = array('d')

    def add(self, doc: Document) -> None:
        """Take the pair's score, once for each of its chunks."""
        score = read_score(doc)
        if score is None:
            raise DataError('the score of a pair is not a number from 0 to 1')
        self._scores.extend((score, score))

    def values(self) -> NDArray[np.float32]:
        """`[2 * num_documents]` float32."""
        return np.array(self._scores, dtype=np.float32)


class TextImageLabels(LabelColumn):
    """Of each of the two chunks: (number of the text, 0 for the text or 1 for the image).

    Equal texts have one number: a picture belongs to the text of any of them.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._values = array('q')

    def add(self, doc: Document) -> None:
        """Take the pair's text."""
        text = next(c.text for c in nested_documents(doc, 'chunks') if c.modality == MODALITIES[0])
        # a hash stands for a text, which would take ten times the memory
        self._values.append(self._numbers.setdefault(hash(text), len(self._numbers)))

    def values(self) -> NDArray[np.int64]:
        """`[2 * num_documents, 2]` int64."""
        texts = np.repeat(np.array(self._values, dtype=np.int64), len(MODALITIES))
        return np.stack([texts, np.arange(len(texts)) % len(MODALITIES)], axis=1)
