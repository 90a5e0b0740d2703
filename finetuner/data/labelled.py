"""What all datasets share: labelled Documents as (content, label) pairs, made when asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.contents import content_of, copy_document
from finetuner.data.documents import DataKind
from finetuner.data.labelling import AnyLabel, LabelArray, LabelColumn

PreprocessFn = Callable[[Document], Any]
AnyDataset = TypeVar('AnyDataset', bound='LabelledDataset[Any]')

# matches and chunks that a Document may have, in the numbers of items
_INNER_BITS = 24


class LabelledDataset(Generic[AnyLabel]):
    """What every kind of dataset does: content by index, preprocessed at each access.

    A Document is one item, or several that belong together (a root and its matches, the two of a
    pair). A kind of data is a subclass that says which Document an item's content is.

    Attributes:
        kind: of the data.
        items_per_document: how many items a Document is; 0 where that differs.
    """

    kind: ClassVar[DataKind]
    items_per_document: ClassVar[int] = 1

    def __init__(
        self, docs: Sequence[Document], column: LabelColumn, preprocess_fn: PreprocessFn | None
    ) -> None:
        self._docs = docs
        # where in `docs` each Document of this dataset stands; None for all of them in order
        self._positions: NDArray[np.int64] | None = None
        self._values = column.values()
        self._preprocess_fn = preprocess_fn
        self._content_fn: Callable[[int], Any] | None = None
        self._last: tuple[int, Document] | None = None
        self._prepare()

    @classmethod
    def of_column(
        cls: type[AnyDataset],
        docs: Sequence[Document],
        column: Any,
        preprocess_fn: PreprocessFn | None = None,
    ) -> AnyDataset:
        """Make a dataset of labels that were collected already.

        Args:
            docs: the Documents.
            column: their labels.
            preprocess_fn: takes a Document and returns what the model takes.
        """
        dataset = cls.__new__(cls)
        LabelledDataset.__init__(dataset, docs, column, preprocess_fn)
        return dataset

    @property
    def labels(self) -> Sequence[AnyLabel]:
        """One label an item, in the order of the items; `numpy.asarray` of it copies nothing."""
        return LabelArray(self._values)

    @property
    def label_values(self) -> NDArray[Any]:
        """The labels as the array they are held in: `[num_items]`, or `[num_items, 2]`."""
        return self._values

    @property
    def num_documents(self) -> int:
        """Documents, each with all its items."""
        return len(self._docs) if self._positions is None else len(self._positions)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._values)

    def __getitem__(self, index: int) -> tuple[Any, AnyLabel]:
        """Return an item's content and label.

        `preprocess_fn` gets a copy of the Document each time, so that what it sets on it (a
        loaded picture, an augmented tensor) neither piles up in memory nor comes back at the next
        access.

        Args:
            index: from 0, or from the end where negative.

        Raises:
            IndexError: there is no such item.
        """
        label = self.labels[int(index)]
        if self._content_fn is not None:
            return self._content_fn(int(index) % len(self)), label
        doc = self.document(int(index) % len(self))
        if self._preprocess_fn is None:
            return content_of(doc), label
        return self._preprocess_fn(copy_document(doc)), label

    @property
    def num_classes(self) -> int:
        """How many different things there are: Documents, where nothing says which are alike."""
        return self.num_documents

    def document(self, index: int) -> Document:
        """Return the Document, match or chunk that holds an item's content.

        Args:
            index: from 0.
        """
        number, inner = self._place(index)
        return self._inner(self._root(self._position(number)), inner)

    def position_of(self, index: int) -> str:
        """Name the Document that an item comes from, for messages: `'Document 3'`."""
        number, inner = self._place(index)
        return f'Document {self._position(number)}{self._inner_name(inner)}'

    def with_preprocess(self: AnyDataset, preprocess_fn: PreprocessFn | None) -> AnyDataset:
        """Return the same items, made into what a model takes in another way."""
        twin = copy.copy(self)
        twin._preprocess_fn, twin._content_fn, twin._last = preprocess_fn, None, None
        return twin

    def with_contents(self: AnyDataset, content_fn: Callable[[int], Any]) -> AnyDataset:
        """Return the same items, whose contents do not come from their Documents.

        Args:
            content_fn: takes an item's index, from 0, and returns what the model takes.
        """
        twin = copy.copy(self)
        twin._content_fn = content_fn
        return twin

    @property
    def source(self) -> Sequence[Document]:
        """The Documents that this dataset, and every subset of it, was made of."""
        return self._docs

    def item_keys(self) -> NDArray[np.int64]:
        """Return a number for each item, `[num_items]`, that it has in every subset too.

        Among datasets of one `source`, items with the same number are the same.
        """
        numbers = self.document_numbers(np.arange(len(self)))
        # the items of a Document stand together
        inner = np.arange(len(self)) - np.searchsorted(numbers, numbers)
        positions = numbers if self._positions is None else self._positions[numbers]
        return (positions.astype(np.int64) << _INNER_BITS) | inner

    def subset(self: AnyDataset, numbers: NDArray[np.int64]) -> AnyDataset:
        """Return some of the Documents, with all their items, labelled anew from 0.

        Args:
            numbers: `[n]`, which of the dataset's Documents, in the order wanted.
        """
        twin = copy.copy(self)
        twin._positions = numbers if self._positions is None else self._positions[numbers]
        twin._content_fn, twin._last = None, None
        twin._relabel(self, numbers)
        twin._prepare()
        return twin

    def document_numbers(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which of the dataset's Documents each item belongs to."""
        return indices // self.items_per_document

    def lost_documents(self, broken: Iterable[int]) -> set[int]:
        """Say which Documents are of no use when some items cannot be loaded.

        Args:
            broken: those items.

        Returns:
            Numbers of Documents. Here: all that have a broken item.
        """
        return set(self.document_numbers(np.fromiter(broken, dtype=np.int64)).tolist())

    def usable(self, indices: Sequence[int], broken: Collection[int]) -> list[int]:
        """Say which items of a batch are of use when some of them cannot be loaded.

        Args:
            indices: the batch.
            broken: those of its items that cannot be loaded.

        Returns:
            Places in the batch, in order.
        """
        lost = self.lost_documents(broken)
        numbers = self.document_numbers(np.asarray(indices)).tolist()
        return [
            place
            for place, index in enumerate(indices)
            if index not in broken and numbers[place] not in lost
        ]

    def _place(self, index: int) -> tuple[int, int]:
        """Number of an item's Document, and which of that Document's items it is."""
        return divmod(index, self.items_per_document)

    def _position(self, number: int) -> int:
        return number if self._positions is None else int(self._positions[number])

    def _root(self, position: int) -> Document:
        """The Document at a position; a lazy sequence decodes it once for neighbouring items."""
        if self.items_per_document == 1:
            return self._docs[position]
        last = self._last
        if last is None or last[0] != position:
            last = self._last = position, self._docs[position]
        return last[1]

    def _inner(self, root: Document, inner: int) -> Document:
        return root

    def _inner_name(self, inner: int) -> str:
        return ''

    def _prepare(self) -> None:
        """Called when the labels are set."""

    def _relabel(self, whole: LabelledDataset[Any], numbers: NDArray[np.int64]) -> None:
        self._values = whole._values[numbers]
