"""Datasets: labelled Documents as (content, label) pairs, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from docarray import Document

from finetuner.data.contents import LABEL_TAG, content_of, copy_document, positions_text, read_label
from finetuner.excepts import DataError

PreprocessFn = Callable[[Document], Any]
AnyLabel = TypeVar('AnyLabel')


class MissingLabelError(DataError, KeyError):
    """A Document has no label tag where every Document needs one."""

    def __str__(self) -> str:
        """Return the message as it is; a KeyError would put quotes around it."""
        return str(self.args[0])


class LabelledDataset(Generic[AnyLabel]):
    """What every kind of dataset does: content by index, preprocessed at each access.

    A kind of data is a subclass that hands over one label an item and says which Document the
    item at an index is.
    """

    def __init__(
        self,
        docs: Sequence[Document],
        labels: list[AnyLabel],
        preprocess_fn: PreprocessFn | None = None,
    ) -> None:
        self._docs = docs
        self._labels = labels
        self._preprocess_fn = preprocess_fn

    @property
    def labels(self) -> list[AnyLabel]:
        """One label an item, in the order of the items."""
        return self._labels

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._labels)

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
        label = self._labels[index]
        doc = self._document(int(index) % len(self))
        if self._preprocess_fn is None:
            return content_of(doc), label
        return self._preprocess_fn(copy_document(doc)), label

    def position_of(self, index: int) -> str:
        """Name the Document that an item comes from, for messages: `'Document 3'`."""
        return f'Document {index}'

    def _document(self, index: int) -> Document:
        return self._docs[index]


class ClassDataset(LabelledDataset[int]):
    """Documents that each have a class label, as (content, label) pairs."""

    def __init__(self, docs: Sequence[Document], preprocess_fn: PreprocessFn | None = None) -> None:
        """Read all labels; contents are touched only when asked for.

        Args:
            docs: Documents with an int or str in the tag `finetuner_label`.
            preprocess_fn: takes a Document and returns what the model takes. Without it an item's
                content is the Document's text, tensor, blob or uri, as it is.

        Raises:
            KeyError: a label is missing.
            DataError: a label is neither an int nor a str.
        """
        found = [read_label(doc, position) for position, doc in enumerate(docs)]
        missing = [position for position, label in enumerate(found) if label is None]
        if missing:
            raise MissingLabelError(
                f'The tag `{LABEL_TAG}` is missing from {positions_text(missing)}: every Document '
                f'of a {type(self).__name__} needs an int or a str there; see docs/data.md#class'
            )
        numbers: dict[int | str, int] = {}
        labels = [numbers.setdefault(label, len(numbers)) for label in found if label is not None]
        super().__init__(docs, labels, preprocess_fn)
        self._classes = list(numbers)

    @property
    def labels(self) -> list[int]:
        """One int an item: its class, counted from 0 in order of appearance."""
        return self._labels

    @property
    def classes(self) -> list[int | str]:
        """The labels as the Documents have them: `classes[label]` is the tag of class `label`."""
        return self._classes
