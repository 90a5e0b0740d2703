"""Datasets: one class for each kind of labelled Documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.contents import LABEL_TAG, MODALITIES, has_label, nested_documents
from finetuner.data.documents import (
    COLUMNS,
    KIND_NAMES,
    DataKind,
    Positions,
    survey_documents,
)
from finetuner.data.labelled import LabelledDataset, PreprocessFn
from finetuner.data.labelling import ROOT, AnyLabel, ClassLabels, InstanceLabels, SessionLabels
from finetuner.excepts import DataError


class MissingLabelError(DataError, KeyError):
    """A Document has no label tag where every Document needs one."""

    def __str__(self) -> str:
        """Return the message as it is; a KeyError would put quotes around it."""
        return str(self.args[0])


class ClassDataset(LabelledDataset[int]):
    """Documents that each have a class label, as (content, label) pairs."""

    kind = 'class'

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
        column, missing = ClassLabels(), Positions()
        for position, doc in enumerate(docs):
            if not has_label(doc):
                missing.add(position)
                continue
            try:
                column.add(doc)
            except DataError as error:
                raise DataError(
                    f'Document {position}: {error}; `{LABEL_TAG}` takes an int or a str; '
                    'see docs/data.md#class'
                ) from None
        if missing.count:
            raise MissingLabelError(
                f'The tag `{LABEL_TAG}` is missing from {missing}: every Document '
                f'of a {type(self).__name__} needs an int or a str there; see docs/data.md#class'
            )
        super().__init__(docs, column, preprocess_fn)
        self._classes = list(column.numbers)

    @classmethod
    def of_column(
        cls,
        docs: Sequence[Document],
        column: ClassLabels,
        preprocess_fn: PreprocessFn | None = None,
    ) -> ClassDataset:
        """Make a dataset of labels that were collected already; see `LabelledDataset`."""
        dataset = super().of_column(docs, column, preprocess_fn)
        dataset._classes = list(column.numbers)
        return dataset

    @property
    def labels(self) -> Sequence[int]:
        """One int an item: its class, counted from 0 in order of appearance."""
        return super().labels

    @property
    def classes(self) -> list[int | str]:
        """The labels as the Documents have them: `classes[label]` is the tag of class `label`."""
        return self._classes

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self._classes)

    @property
    def class_sizes(self) -> NDArray[np.int64]:
        """`[num_classes]`, how many items each class has."""
        return np.bincount(self._values, minlength=len(self._classes))

    def _relabel(self, whole: LabelledDataset[Any], numbers: NDArray[np.int64]) -> None:
        self._values, found = number_anew(whole._values[numbers])
        self._classes = [self._classes[label] for label in found.tolist()]


class InstanceDataset(LabelledDataset[int]):
    """Documents without labels: each is similar only to other views of itself.

    A sampler that draws the same index twice gets two views, where `preprocess_fn` augments.
    """

    kind = 'instance'

    def __init__(self, docs: Sequence[Document], preprocess_fn: PreprocessFn | None = None) -> None:
        """Count the Documents.

        Args:
            docs: Documents with content.
            preprocess_fn: takes a Document and returns what the model takes: a view of it, drawn
                anew at each access.
        """
        column = InstanceLabels(len(docs))
        super().__init__(docs, column, preprocess_fn)

    @property
    def labels(self) -> Sequence[int]:
        """One int an item: its own position."""
        return super().labels

    def _relabel(self, whole: LabelledDataset[Any], numbers: NDArray[np.int64]) -> None:
        self._values = np.arange(len(numbers), dtype=np.int64)


class SessionDataset(LabelledDataset[tuple[int, int]]):
    """Root Documents and their matches, as (content, (session, type)) pairs.

    A session's items stand together, the root first, then its matches in their order.
    """

    kind = 'session'
    items_per_document = 0

    def __init__(self, docs: Sequence[Document], preprocess_fn: PreprocessFn | None = None) -> None:
        """Read the labels of all matches; contents are touched only when asked for.

        Args:
            docs: roots with `matches`, each match with 1 (similar to the root) or -1 (not
                similar) in the tag `finetuner_label`.
            preprocess_fn: takes a Document, root or match, and returns what the model takes.

        Raises:
            KeyError: a match has no label.
            DataError: a match's label is neither 1 nor -1.
        """
        column = SessionLabels()
        for position, doc in enumerate(docs):
            for number, match in enumerate(nested_documents(doc, 'matches')):
                if not has_label(match):
                    raise MissingLabelError(
                        f'The tag `{LABEL_TAG}` is missing from match {number} of Document '
                        f'{position}: every match of a {type(self).__name__} needs 1 or -1 there; '
                        'see docs/data.md#session'
                    )
            try:
                column.add(doc)
            except DataError as error:
                raise DataError(f'Document {position}: {error}; see docs/data.md#session') from None
        super().__init__(docs, column, preprocess_fn)

    @property
    def labels(self) -> Sequence[tuple[int, int]]:
        """One (session, type) an item: type 0 is the root, 1 and -1 its matches."""
        return super().labels

    def document_numbers(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which session each item belongs to."""
        return self._values[indices, 0]

    def lost_documents(self, broken: Iterable[int]) -> set[int]:
        """Say which sessions are of no use when some items cannot be loaded.

        Without its root a session says nothing; without a match it only says less.
        """
        return {int(self._values[i, 0]) for i in broken if self._values[i, 1] == ROOT}

    def _prepare(self) -> None:
        self._starts = np.flatnonzero(self._values[:, 1] == ROOT)

    def _place(self, index: int) -> tuple[int, int]:
        session = int(self._values[index, 0])
        return session, index - int(self._starts[session])

    def _inner(self, root: Document, inner: int) -> Document:
        return nested_documents(root, 'matches')[inner - 1] if inner else root

    def _inner_name(self, inner: int) -> str:
        return f', match {inner - 1}' if inner else ''

    def _relabel(self, whole: LabelledDataset[Any], numbers: NDArray[np.int64]) -> None:
        # `_starts` are still those of the whole
        sizes = np.diff(np.append(self._starts, len(whole)))[numbers]
        first = np.cumsum(sizes) - sizes
        items = np.arange(int(sizes.sum())) + np.repeat(self._starts[numbers] - first, sizes)
        sessions = np.repeat(np.arange(len(numbers)), sizes)
        self._values = np.stack([sessions, whole._values[items, 1]], axis=1)


class _PairDataset(LabelledDataset[AnyLabel]):
    """Documents with two chunks: items 2i and 2i+1 are those of Document i."""

    items_per_document = 2

    def _inner(self, root: Document, inner: int) -> Document:
        return nested_documents(root, 'chunks')[inner]

    def _inner_name(self, inner: int) -> str:
        return f', chunk {inner}'

    def _relabel(self, whole: LabelledDataset[Any], numbers: NDArray[np.int64]) -> None:
        self._values = whole._values.reshape(-1, 2)[numbers].reshape(-1)


class ScoredPairDataset(_PairDataset[float]):
    """Pairs with a score, as (content, score): items 2i and 2i+1 are the chunks of Document i."""

    kind = 'scored_pair'

    def __init__(self, docs: Sequence[Document], preprocess_fn: PreprocessFn | None = None) -> None:
        """Read the scores; contents are touched only when asked for.

        Args:
            docs: Documents that `data_kind` finds to be scored pairs.
            preprocess_fn: takes a chunk and returns what the model takes.

        Raises:
            DataError: they are not scored pairs.
        """
        super().__init__(docs, _surveyed(docs, 'scored_pair'), preprocess_fn)


class TextImageDataset(_PairDataset[tuple[int, int]]):
    """Texts with their pictures, as (content, (text, 0 for the text or 1 for the image)).

    Items 2i and 2i+1 are the text and the image of Document i, however its chunks are ordered.
    Texts are counted from 0 in order of appearance; pairs of the same text have one number.
    """

    kind = 'text_image_pair'

    def __init__(self, docs: Sequence[Document], preprocess_fn: PreprocessFn | None = None) -> None:
        """Count the pairs; contents are touched only when asked for.

        Args:
            docs: Documents that `data_kind` finds to be text-image pairs.
            preprocess_fn: takes a chunk, whose `modality` says which it is, and returns what the
                model takes.

        Raises:
            DataError: they are not text-image pairs.
        """
        super().__init__(docs, _surveyed(docs, 'text_image_pair'), preprocess_fn)

    def _inner(self, root: Document, inner: int) -> Document:
        chunks = nested_documents(root, 'chunks')
        return next(chunk for chunk in chunks if chunk.modality == MODALITIES[inner])

    def _inner_name(self, inner: int) -> str:
        return f', {MODALITIES[inner]}'

    def _relabel(self, whole: LabelledDataset[Any], numbers: NDArray[np.int64]) -> None:
        values = whole._values.reshape(-1, 2, 2)[numbers].reshape(-1, 2)
        self._values = np.stack([number_anew(values[:, 0])[0], values[:, 1]], axis=1)


DATASETS: dict[DataKind, type[LabelledDataset[Any]]] = {
    dataset.kind: dataset
    for dataset in (
        ClassDataset,
        SessionDataset,
        InstanceDataset,
        ScoredPairDataset,
        TextImageDataset,
    )
}


def number_anew(values: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """Number values from 0 in order of appearance.

    Args:
        values: `[n]`.

    Returns:
        `[n]`, the new numbers; and what each of them stands for.
    """
    found, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[inverse], found[order]


def _surveyed(docs: Sequence[Document], kind: DataKind) -> Any:
    if not len(docs):
        return COLUMNS[kind]()
    survey = survey_documents(docs)
    if survey.kind != kind:
        raise DataError(f'these Documents are {KIND_NAMES[survey.kind]}, not {KIND_NAMES[kind]}')
    return survey.column
