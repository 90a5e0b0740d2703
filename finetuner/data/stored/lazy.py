"""Sequences of Documents that are made when they are asked for, and views of them."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from docarray import Document
from numpy.typing import NDArray

_POSITIONS_AT_ONCE = 1 << 14


class LazyDocuments(Sequence[Document]):
    """Documents that are made anew at each access: read-only, of any number.

    What is set on a Document got from here is not kept. A slice is a `DocumentsView`.
    """

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> DocumentsView: ...

    def __getitem__(self, index: int | slice) -> Document | DocumentsView:
        """Read a Document, or view a slice without reading any.

        Args:
            index: an int (numpy's too), negative from the end, or a slice.

        Raises:
            IndexError: there is no such Document.
            DataError: it cannot be read, or was changed since it was opened.
        """
        if isinstance(index, slice):
            return DocumentsView(self, np.arange(*index.indices(len(self)), dtype=np.int64))
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f'there is no Document {index} of {len(self)}')
        return self._read(position)

    def __iter__(self) -> Iterator[Document]:
        """Read all Documents in order, in large blocks."""
        return self._read_run(0, len(self))

    def __repr__(self) -> str:
        """Return the class and the number of Documents."""
        return f'<{type(self).__name__} of {len(self)} Documents>'

    @abstractmethod
    def _read(self, position: int) -> Document:
        """Read one Document; the position is in range."""

    @abstractmethod
    def _read_run(self, start: int, stop: int) -> Iterator[Document]:
        """Read neighbouring Documents, holding a block of them at most."""


class DocumentsView(LazyDocuments):
    """Some Documents of a sequence, in any order, without copying them.

    Attributes:
        docs: the sequence looked at; never a view itself.
        positions: `[n]` int64, read-only, where in `docs` each Document stands.
    """

    def __init__(self, docs: Sequence[Document], positions: Any) -> None:
        """Look at some Documents.

        Args:
            docs: any Documents; of a view, those it looks at.
            positions: `[n]` ints from 0 in the order wanted; one may come several times. An int64
                array is not copied.

        Raises:
            IndexError: a position is out of range.
            ValueError: the positions are no list of ints.
        """
        given = np.asarray(positions)
        if given.ndim != 1 or (given.size and given.dtype.kind not in 'iu'):
            raise ValueError(
                f'positions must be one list of ints, not of type {given.dtype} and shape '
                f'{given.shape}'
            )
        if given.size and (given.min() < 0 or given.max() >= len(docs)):
            raise IndexError(
                f'positions go from {given.min()} to {given.max()}, and there are {len(docs)} '
                'Documents'
            )
        numbers = given.astype(np.int64, copy=False)
        if isinstance(docs, DocumentsView):
            numbers = docs.positions[numbers]
            docs = docs.docs
        self.docs: Sequence[Document] = docs
        self.positions: NDArray[np.int64] = numbers.view()
        self.positions.flags.writeable = False

    def __len__(self) -> int:
        """Return how many Documents the view shows."""
        return len(self.positions)

    def _read(self, position: int) -> Document:
        return self.docs[int(self.positions[position])]

    def _read_run(self, start: int, stop: int) -> Iterator[Document]:
        for first in range(start, stop, _POSITIONS_AT_ONCE):
            positions = self.positions[first : min(first + _POSITIONS_AT_ONCE, stop)]
            if isinstance(self.docs, LazyDocuments):
                breaks = np.flatnonzero(np.diff(positions) != 1)
                firsts = positions[np.append(0, breaks + 1)].tolist()
                lasts = positions[np.append(breaks, -1)].tolist()
                for first_of_run, last_of_run in zip(firsts, lasts, strict=True):
                    if first_of_run == last_of_run:
                        yield self.docs._read(first_of_run)
                    else:
                        yield from self.docs._read_run(first_of_run, last_of_run + 1)
            else:
                yield from (self.docs[position] for position in positions.tolist())
