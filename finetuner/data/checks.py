"""Whether data can be trained and evaluated on in batches of a given shape, before a run exists."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from docarray import Document

from finetuner.data.contents import LABEL_TAG, positions_text
from finetuner.data.datasets import (
    ClassDataset,
    InstanceDataset,
    ScoredPairDataset,
    SessionDataset,
    TextImageDataset,
)
from finetuner.data.documents import KIND_NAMES
from finetuner.data.labelled import LabelledDataset
from finetuner.data.labelling import NEGATIVE, POSITIVE, ROOT
from finetuner.data.loading import build_dataset
from finetuner.excepts import ConfigError, DataError

_LOGGER = logging.getLogger(__name__)


def check_training_data(
    dataset: LabelledDataset[Any],
    batch_size: int | None = None,
    num_items_per_class: int | None = None,
    views_per_instance: int = 2,
) -> None:
    """Check that a dataset can be learned from, in batches of this shape.

    Args:
        dataset: of any kind.
        batch_size: items in a batch; None leaves the batch unchecked.
        num_items_per_class: of class data: items of one class in a batch; None for the sampler's
            own choice, `batch_size // number of classes`.
        views_per_instance: of unlabelled data: views of each Document in a batch.

    Raises:
        DataError: nothing can be learned from it (one class only, no session with a positive
            match, one score only ...), or it is less than a batch needs.
        ConfigError: a size is no whole number, or too small for any data.
    """
    _check_size('batch_size', batch_size, 1)
    _check_size('num_items_per_class', num_items_per_class, 1)
    _check_size('views_per_instance', views_per_instance, 2)
    if isinstance(dataset, ClassDataset):
        _check_classes(dataset, batch_size, num_items_per_class)
    elif isinstance(dataset, SessionDataset):
        _check_sessions(dataset, batch_size)
    elif isinstance(dataset, InstanceDataset):
        _check_instances(dataset, batch_size, views_per_instance)
    elif isinstance(dataset, ScoredPairDataset):
        _check_scored_pairs(dataset, batch_size)
    elif isinstance(dataset, TextImageDataset):
        _check_text_image_pairs(dataset, batch_size)


def _check_size(name: str, value: Any, least: int) -> None:
    is_number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and not (is_number and value >= least):
        raise ConfigError(f'{name}={value!r} is not a whole number of at least {least}')


def _check_classes(
    dataset: ClassDataset, batch_size: int | None, num_items_per_class: int | None
) -> None:
    sizes = dataset.class_sizes
    if len(sizes) == 1:
        raise DataError(
            f'all {len(dataset)} Documents have the label {dataset.classes[0]!r}: training tells '
            'classes apart and needs at least two'
        )
    num_single = int((sizes == 1).sum())
    if num_single == len(sizes):
        raise DataError(
            f'each of the {len(sizes)} labels occurs once: training needs classes with at least '
            f'two Documents; check that `{LABEL_TAG}` names the class and not the Document'
        )
    if num_single:
        _LOGGER.warning(
            '%d of %d classes have one Document only and teach little', num_single, len(sizes)
        )
    if batch_size is not None:
        items = num_items_per_class or max(1, batch_size // len(sizes))
        _check_class_batch(len(dataset), len(sizes), batch_size, items)


def _check_class_batch(num_docs: int, num_classes: int, batch_size: int, num_items: int) -> None:
    needed = batch_size // num_items
    asked = f'batch_size={batch_size} with num_items_per_class={num_items}'
    if needed < 2:
        raise DataError(
            f'{asked} puts {needed} class{"" if needed == 1 else "es"} into a batch, which needs at '
            f'least two: use batch_size of at least {2 * num_items}, or num_items_per_class of at '
            f'most {max(1, batch_size // 2)}'
        )
    if needed > num_classes:
        least = -(-batch_size // num_classes)
        raise DataError(
            f'{asked} needs {needed} classes in a batch, and the data has {num_classes}: use '
            f'batch_size of at most {num_classes * num_items}, or num_items_per_class of at least '
            f'{least}'
        )
    if needed * num_items > num_docs:
        raise DataError(
            f'{asked} needs {needed * num_items} Documents in a batch, and the data has '
            f'{num_docs}: use batch_size of at most {num_docs}'
        )


def _check_sessions(dataset: SessionDataset, batch_size: int | None) -> None:
    types = dataset.label_values[:, 1]
    for type_, name in ((POSITIVE, 'positive (1)'), (NEGATIVE, 'negative (-1)')):
        if not (types == type_).any():
            raise DataError(
                f'none of the {len(types) - dataset.num_documents} matches of these '
                f'{dataset.num_documents} sessions is labelled {name}: training needs both, '
                'what was chosen and what was not; see docs/data.md#session'
            )
    sizes = np.diff(np.append(np.flatnonzero(types == ROOT), len(types)))
    if batch_size is None:
        return
    if batch_size < 3:
        raise DataError(
            f'batch_size={batch_size} cannot hold a root with a positive and a negative match: '
            'use at least 3'
        )
    num_larger = int((sizes > batch_size).sum())
    if num_larger:
        _LOGGER.warning(
            '%d of %d sessions have more than batch_size=%d Documents: a part of each is drawn '
            'every epoch',
            num_larger,
            len(sizes),
            batch_size,
        )


def _check_instances(
    dataset: InstanceDataset, batch_size: int | None, views_per_instance: int
) -> None:
    if len(dataset) < 2:
        raise DataError(
            'there is one Document only: training tells Documents apart and needs at least two'
        )
    if batch_size is None:
        return
    if batch_size % views_per_instance:
        raise DataError(
            f'batch_size={batch_size} is not a multiple of views_per_instance='
            f'{views_per_instance}: use {batch_size // views_per_instance * views_per_instance} or '
            f'{-(-batch_size // views_per_instance) * views_per_instance}'
        )
    if batch_size < 2 * views_per_instance:
        raise DataError(
            f'batch_size={batch_size} with views_per_instance={views_per_instance} puts one '
            f'Document into a batch, which needs at least two: use {2 * views_per_instance} or more'
        )


def _check_scored_pairs(dataset: ScoredPairDataset, batch_size: int | None) -> None:
    scores = dataset.label_values
    if len(scores) > 2 and scores.min() == scores.max():
        raise DataError(
            f'all {dataset.num_documents} pairs have the score {float(scores[0]):g}: training '
            'needs pairs that are more and pairs that are less similar; see docs/data.md#pairs'
        )
    if batch_size is not None and batch_size < 2:
        raise DataError(f'batch_size={batch_size} cannot hold a pair: use at least 2')


def _check_text_image_pairs(dataset: TextImageDataset, batch_size: int | None) -> None:
    if len(np.unique(dataset.label_values[:, 0])) < 2:
        raise DataError(
            f'all {dataset.num_documents} pairs have the same text: training tells texts apart and '
            'needs at least two; see docs/data.md#pairs'
        )
    if batch_size is not None and (batch_size < 4 or batch_size % 2):
        raise DataError(
            f'batch_size={batch_size} does not hold whole pairs, two at least: a text and a '
            f'picture count as one each, so use {max(4, batch_size // 2 * 2)}'
        )


def build_named_dataset(docs: Sequence[Document], name: str) -> LabelledDataset[Any]:
    """Make the dataset that fits the kind of the Documents; errors say which data it is.

    Args:
        docs: Documents of one kind.
        name: what errors call them, such as `train_data`.

    Raises:
        DataError: as `survey_documents`.
    """
    try:
        return build_dataset(docs)
    except DataError as error:
        raise DataError(f'{name}: {error}') from error


def build_evaluation_dataset(docs: Sequence[Document], name: str) -> ClassDataset:
    """Make the dataset of queries or of an index.

    Args:
        docs: class data.
        name: what errors call it: `query_data` or `index_data`.

    Raises:
        DataError: it is not class data; positions are named.
    """
    dataset = build_named_dataset(docs, name)
    if not isinstance(dataset, ClassDataset):
        raise DataError(
            f'{name}: these Documents are {KIND_NAMES[dataset.kind]}, and retrieval is evaluated '
            f'on class data only: give every Document content and the tag `{LABEL_TAG}`, and no '
            'matches; see docs/data.md#class'
        )
    return dataset


def check_evaluation_data(queries: ClassDataset, index: ClassDataset) -> None:
    """Check that every query has something to be found in the index.

    Args:
        queries: what is searched for.
        index: what is searched; labels that no query has are fine.

    Raises:
        DataError: a query's label is absent from the index; positions are named.
    """
    known = set(index.classes)
    missing = [label for label in queries.classes if label not in known]
    if not missing:
        return
    unknown = [number for number, label in enumerate(queries.classes) if label not in known]
    absent = np.flatnonzero(np.isin(queries.label_values, unknown)).tolist()
    shown = ' or '.join(repr(label) for label in missing[:5])
    more = f' or {len(missing) - 5} others' if len(missing) > 5 else ''
    raise DataError(
        f'query_data: {positions_text(absent)} ({len(absent)} of {len(queries)}): no '
        f'Document of index_data has the label {shown}{more}; add such Documents to '
        'index_data or leave these queries out'
    )


def check_findable(queries: ClassDataset) -> None:
    """Check that each Document can find another one of its class, when searched among themselves.

    Raises:
        DataError: a label occurs once; positions are named.
    """
    counts = Counter(queries.label_values.tolist())
    alone = [p for p, label in enumerate(queries.label_values.tolist()) if counts[label] == 1]
    if alone:
        raise DataError(
            f'query_data: {positions_text(alone)} can find nothing but themselves: without '
            'index_data every label needs at least two Documents'
        )
