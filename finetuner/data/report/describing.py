"""Look at training data: what it is, how much of what it holds, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from docarray import Document

from finetuner.data.report.description import (
    SCORE_BINS,
    ClassSizes,
    DataDescription,
    Spread,
    print_description,
    sample_text,
)
from finetuner.data.report.inventory import Inventory, Opened, open_sample, take_inventory
from finetuner.excepts import DataError

if TYPE_CHECKING:
    from finetuner.data.csv import CSVOptions

_MOST_OPENED = 1000
_MOST_SHOWN = 5
_BIGGEST_SHOWN = 8
_MOST_SIZES = 8


def describe(
    docs: Sequence[Document] | str | Path, csv_options: CSVOptions | None = None
) -> DataDescription:
    """Print what training data holds and what is wrong with it, in one pass over the Documents.

    Bad data is reported, not raised. All local files are looked for; of tensors, blobs and files
    up to 1,000 are opened, spread evenly. Nothing is fetched over the network.

    Args:
        docs: Documents of any kind, or the path of a file or folder of training data.
        csv_options: how to read a CSV file.

    Returns:
        What was printed.

    Raises:
        ConfigError: the path is of no kind that is read, or the options do not fit it.
        OSError: the path cannot be opened.
    """
    name = 'Training data'
    if isinstance(docs, (str, Path)):
        from finetuner.data.sources import open_documents

        name = str(docs)
        try:
            opened_docs = open_documents(docs, csv_options)
        except DataError as error:
            inventory = Inventory()
            inventory.conclude(str(error))
            description = _describe(inventory, Opened(0))
            print_description(description, name)
            return description
    else:
        opened_docs = docs
    inventory = take_inventory(opened_docs)
    description = _describe(inventory, open_sample(opened_docs, inventory, _MOST_OPENED))
    print_description(description, name)
    return description


def _describe(inventory: Inventory, opened: Opened) -> DataDescription:
    sizes = opened.pixel_sizes
    missing = [fault for words, fault in inventory.faults.items() if words.endswith('is missing')]
    is_pair = inventory.kind in ('scored_pair', 'text_image_pair')
    counts = np.bincount(
        np.array(inventory.class_numbers, dtype=np.int64) + 1, minlength=len(inventory.classes) + 1
    )[1:]
    return DataDescription(
        kind=inventory.kind,
        reason=inventory.reason,
        num_documents=inventory.num_documents,
        num_items=inventory.num_items,
        num_positives=inventory.matches[1],
        num_negatives=inventory.matches[-1],
        num_pairs=inventory.num_documents if is_pair else 0,
        classes=_class_sizes(list(inventory.classes), counts) if len(counts) else None,
        scores=_score_histogram(inventory),
        contents=dict(inventory.contents.most_common()),
        shapes=dict(inventory.shapes.most_common()),
        schemes=dict(inventory.schemes.most_common()),
        formats=dict(inventory.formats.most_common()),
        text_lengths=_spread(inventory.text_lengths),
        blob_sizes=_spread(inventory.blob_sizes),
        num_missing=sum(fault.num_items for fault in missing),
        num_opened=opened.num_opened,
        num_openable=inventory.num_openable,
        picture_formats=dict(opened.formats.most_common()),
        picture_sizes=_picture_sizes(sizes),
        num_duplicate_ids=inventory.num_repeated_ids(),
        problems=tuple(_problems(inventory, opened, counts)),
        warnings=tuple(_warnings(inventory, opened, counts)),
    )


def _spread(sizes: Sequence[int]) -> Spread | None:
    if not len(sizes):
        return None
    values = np.array(sizes)
    return Spread(int(values.min()), float(np.median(values)), int(values.max()))


def _picture_sizes(sizes: list[tuple[int, int]]) -> tuple[Spread, Spread] | None:
    if not sizes:
        return None
    widths, heights = (
        Spread(min(lengths), median(lengths), max(lengths)) for lengths in zip(*sizes, strict=True)
    )
    return widths, heights


def _class_sizes(labels: list[int | str], counts: np.ndarray) -> ClassSizes:
    by_size = np.argsort(-counts, kind='stable')[:_BIGGEST_SHOWN].tolist()
    distinct, numbers = np.unique(counts, return_counts=True)
    low = distinct
    if len(distinct) > _MOST_SIZES:
        # by powers of two: 1, 2-3, 4-7 ...
        low = 2 ** np.log2(distinct).astype(int)
    groups = Counter[int]()
    for bound, number in zip(low.tolist(), numbers.tolist(), strict=True):
        groups[bound] += number
    exact = len(distinct) <= _MOST_SIZES
    spread = _spread(counts.tolist()) or Spread(0, 0, 0)
    return ClassSizes(
        num_classes=len(labels),
        sizes=spread,
        num_single=int((counts == 1).sum()),
        biggest=tuple((labels[number], int(counts[number])) for number in by_size),
        histogram=tuple(
            (bound, bound if exact else 2 * bound - 1, number) for bound, number in groups.items()
        ),
    )


def _score_histogram(inventory: Inventory) -> tuple[int, ...]:
    if not len(inventory.scores):
        return ()
    counts, _ = np.histogram(np.array(inventory.scores), bins=SCORE_BINS, range=(0, 1))
    return tuple(counts.tolist())


def _only_strange(opened: Opened) -> bool:
    """Whether nothing that was opened is a picture at all, so that its user must know better."""
    return 0 < opened.num_encoded == opened.num_strange


def _problems(inventory: Inventory, opened: Opened, counts: np.ndarray) -> list[str]:
    problems = [inventory.reason] if inventory.reason else []
    problems += [fault.describe(words) for words, fault in inventory.faults.items()]
    failures = opened.failures
    if failures and not _only_strange(opened):
        problems += failures[:_MOST_SHOWN]
        if len(failures) > _MOST_SHOWN:
            problems.append(
                f'{len(failures)} of {sample_text(opened.num_opened, inventory.num_openable)} '
                'cannot be used; the first are above'
            )
    if inventory.kind == 'class' and not inventory.reason:
        if len(counts) == 1:
            problems.append(
                f'all {inventory.num_documents:,} Documents have the label '
                f'{next(iter(inventory.classes))!r}: training tells classes apart and needs at '
                'least two'
            )
        elif (counts == 1).all():
            problems.append(
                f'each of the {len(counts):,} labels occurs once: training needs classes with at '
                'least two Documents'
            )
    if inventory.kind == 'session' and not inventory.reason:
        problems += [
            f'no match is labelled {label}: training needs matches of both labels, 1 and -1'
            for label in (1, -1)
            if not inventory.matches[label]
        ]
    if inventory.kind == 'instance' and inventory.num_documents == 1 and not inventory.reason:
        problems.append('there is one Document only: training needs at least two')
    scores = inventory.scores
    if not inventory.reason and len(scores) > 1 and min(scores) == max(scores):
        problems.append(f'all {len(scores):,} pairs have the score {scores[0]:g}')
    return problems


def _warnings(inventory: Inventory, opened: Opened, counts: np.ndarray) -> list[str]:
    warnings = []
    num_single = int((counts == 1).sum())
    if 0 < num_single < len(counts):
        warnings.append(
            f'{num_single:,} of {len(counts):,} classes have one Document only and teach little'
        )
    if inventory.num_without_positive and inventory.matches[1]:
        warnings.append(
            f'{inventory.num_without_positive:,} of {inventory.num_documents:,} sessions have no '
            'match labelled 1'
        )
    warnings += _repetitions(inventory)
    shown = ', '.join(opened.contradictions[:_MOST_SHOWN])
    if opened.contradictions:
        more = len(opened.contradictions) - _MOST_SHOWN
        rest = f' and {more:,} more pairs' if more > 0 else ''
        warnings.append(f'the same picture stands under two labels: {shown}{rest}')
    if _only_strange(opened):
        warnings.append(
            f'none of {sample_text(opened.num_encoded, opened.num_encoded)} is a picture '
            'of a known format: give a preprocess_fn that reads them'
        )
    num_remote = inventory.schemes['http'] + inventory.schemes['https']
    if num_remote:
        warnings.append(f'{num_remote:,} uris are http(s) addresses, which were not opened')
    return warnings


def _repetitions(inventory: Inventory) -> list[str]:
    earlier, later = inventory.repeated_contents()
    if not len(later):
        return []
    found = []
    labels = np.array(inventory.class_numbers, dtype=np.int64)
    differs = (labels[earlier] != labels[later]) & (labels[earlier] >= 0) & (labels[later] >= 0)
    what = {
        'session': 'the root of an earlier session: put their matches under one root',
        'scored_pair': 'the contents of an earlier pair',
        'text_image_pair': 'the contents of an earlier pair',
        'instance': 'the content of an earlier one, from which training would tell it apart',
    }.get(inventory.kind or '', 'the content of an earlier one')
    for chosen, words in (
        (differs, 'the content of an earlier one under another label'),
        (~differs, what),
    ):
        if chosen.any():
            first = f'Documents {earlier[chosen][0]} and {later[chosen][0]}'
            count = int(chosen.sum())
            found.append(
                f'{count:,} Document{"s repeat" if count > 1 else " repeats"} {words} '
                f'(first: {first})'
            )
    return found
