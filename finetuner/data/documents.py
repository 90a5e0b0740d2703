"""Labelled Documents as a whole: which kind of data they are, and whether a run can use them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from docarray import Document

from finetuner.data.contents import (
    LABEL_TAG,
    SCORE_TAG,
    has_content,
    has_label,
    has_score,
    load_contents,
    nested_documents,
    normalise_label,
    positions_text,
    raw_label,
    read_label,
)
from finetuner.data.storing import documents_hash, load_documents, save_documents
from finetuner.excepts import DataError

__all__ = [
    'LABEL_TAG',
    'SCORE_TAG',
    'DataKind',
    'check_class_data',
    'check_evaluation_data',
    'data_kind',
    'documents_hash',
    'has_content',
    'has_label',
    'load_contents',
    'load_documents',
    'read_label',
    'require_class_data',
    'save_documents',
]

DataKind = Literal['class', 'session', 'instance', 'scored_pair', 'text_image_pair']

_LOGGER = logging.getLogger(__name__)
_NAMES: dict[DataKind, str] = {
    'class': 'class data (content and a label)',
    'session': 'sessions (matches)',
    'instance': 'unlabelled data (content, no label)',
    'scored_pair': f'scored pairs (`{SCORE_TAG}`)',
    'text_image_pair': 'text-image pairs (two chunks)',
}
_PROBLEMS_SHOWN = 3


def data_kind(docs: Sequence[Document]) -> DataKind:
    """Decide, over all Documents, which kind of training data they are.

    Matches make a session, the tag `finetuner_score` a scored pair, chunks without content of
    their parent's own a text-image pair, a label class data; content alone is an instance.

    Args:
        docs: at least one.

    Returns:
        The one kind that every Document is of.

    Raises:
        DataError: there are none, they are of several kinds, or one breaks the rules of its kind
            (no content, a label that is none ...); positions are named.
    """
    positions: dict[DataKind, list[int]] = {}
    problems: dict[str, list[int]] = {}
    for position, doc in enumerate(docs):
        kind = _kind_of(doc)
        positions.setdefault(kind, []).append(position)
        for problem in dict.fromkeys(_problems_of(doc, kind)):
            problems.setdefault(problem, []).append(position)
    if not positions:
        raise DataError('there are no Documents: give at least one')
    if len(positions) > 1:
        problems.update(_mixture(positions))
    if problems:
        raise DataError(_explain(problems))
    return next(iter(positions))


def require_class_data(docs: Sequence[Document]) -> None:
    """Refuse every kind but class data: the others cannot be trained on yet.

    Raises:
        DataError: as `data_kind`, or the Documents are of another kind.
    """
    kind = data_kind(docs)
    if kind != 'class':
        raise DataError(
            f'these Documents are {_NAMES[kind]}, and training comes for class data only for now: '
            f'give every Document content and the tag `{LABEL_TAG}`, and no matches; '
            'see docs/data.md#class'
        )


def check_class_data(
    docs: Sequence[Document],
    batch_size: int | None = None,
    num_items_per_class: int | None = None,
) -> None:
    """Check, before a run exists, that class data can be trained on in batches of this shape.

    Args:
        docs: the training data.
        batch_size: Documents in a batch; None leaves the batch unchecked.
        num_items_per_class: Documents of one class in a batch; None for the sampler's own
            choice, `batch_size // number of classes`.

    Raises:
        DataError: not class data, one class only, no class with two Documents, or fewer classes
            or Documents than a batch needs.
    """
    require_class_data(docs)
    counts = Counter(read_label(doc, position) for position, doc in enumerate(docs))
    if len(counts) == 1:
        raise DataError(
            f'all {len(docs)} Documents have the label {next(iter(counts))!r}: training tells '
            'classes apart and needs at least two'
        )
    num_single = sum(count == 1 for count in counts.values())
    if num_single == len(counts):
        raise DataError(
            f'each of the {len(counts)} labels occurs once: training needs classes with at least '
            f'two Documents; check that `{LABEL_TAG}` names the class and not the Document'
        )
    if num_single:
        _LOGGER.warning(
            '%d of %d classes have one Document only and teach little', num_single, len(counts)
        )
    if batch_size is not None:
        items = num_items_per_class or max(1, batch_size // len(counts))
        _check_batch(len(docs), len(counts), batch_size, items)


def _check_batch(num_docs: int, num_classes: int, batch_size: int, num_items: int) -> None:
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


def check_evaluation_data(query_docs: Sequence[Document], index_docs: Sequence[Document]) -> None:
    """Check that every query has something to be found in the index.

    Args:
        query_docs: class data.
        index_docs: class data; labels that no query has are fine.

    Raises:
        DataError: a Document has no content or label, or a query's label is absent from the
            index; positions are named, and which of the two arrays.
    """
    labels = []
    for name, docs in (('query_data', query_docs), ('index_data', index_docs)):
        try:
            require_class_data(docs)
        except DataError as error:
            raise DataError(f'{name}: {error}') from error
        labels.append([read_label(doc, position) for position, doc in enumerate(docs)])
    query_labels, index_labels = labels
    known = set(index_labels)
    absent = [position for position, label in enumerate(query_labels) if label not in known]
    if absent:
        missing = list(dict.fromkeys(query_labels[position] for position in absent))
        shown = ' or '.join(repr(label) for label in missing[:5])
        more = f' or {len(missing) - 5} others' if len(missing) > 5 else ''
        raise DataError(
            f'query_data: {positions_text(absent)} ({len(absent)} of {len(query_labels)}): no '
            f'Document of index_data has the label {shown}{more}; add such Documents to '
            'index_data or leave these queries out'
        )


def _kind_of(doc: Document) -> DataKind:
    if nested_documents(doc, 'matches'):
        return 'session'
    if has_score(doc):
        return 'scored_pair'
    if nested_documents(doc, 'chunks') and not has_content(doc):
        return 'text_image_pair'
    return 'class' if has_label(doc) else 'instance'


def _problems_of(doc: Document, kind: DataKind) -> Iterator[str]:
    if kind in ('scored_pair', 'text_image_pair'):
        yield from _pair_problems(doc, kind)
        return
    if not has_content(doc):
        yield 'content is empty: set text, tensor, blob or uri'
    if kind == 'class':
        try:
            normalise_label(raw_label(doc))
        except DataError as error:
            yield f'{error}; `{LABEL_TAG}` takes an int or a str; see docs/data.md#class'
    if kind == 'session':
        yield from _session_problems(doc)


def _session_problems(root: Document) -> Iterator[str]:
    for match in nested_documents(root, 'matches'):
        if not has_content(match):
            yield 'content of a match is empty: set text, tensor, blob or uri'
        label = raw_label(match)
        if label not in (1, -1):
            found = f'the label {label!r}' if has_label(match) else 'no label'
            yield (
                f"a match has {found}: a session's matches are labelled 1 (similar to the root) "
                'or -1 (not similar); see docs/data.md#session'
            )


def _pair_problems(doc: Document, kind: DataKind) -> Iterator[str]:
    chunks = nested_documents(doc, 'chunks')
    if len(chunks) != 2:
        yield f'a pair has two chunks, not {len(chunks)}; see docs/data.md#pairs'
    if any(not has_content(chunk) for chunk in chunks):
        yield 'content of a chunk is empty: set text, tensor, blob or uri'
    if kind == 'scored_pair':
        score = doc.tags[SCORE_TAG]
        if not isinstance(score, (int, float)) or not 0 <= score <= 1:
            yield f'{SCORE_TAG} {score!r} is not a number from 0 to 1; see docs/data.md#pairs'
    elif sorted(chunk.modality or '' for chunk in chunks) != ['image', 'text']:
        yield 'the chunks are not of modality `text` and `image`; see docs/data.md#pairs'


def _mixture(positions: dict[DataKind, list[int]]) -> dict[str, list[int]]:
    if set(positions) == {'class', 'instance'}:
        return {
            f'label is missing, while {len(positions["class"])} others have one: set the tag '
            f'`{LABEL_TAG}` of all Documents or of none; see docs/data.md#class': positions[
                'instance'
            ]
        }
    return {
        f'these are {_NAMES[kind]}, and all Documents of a data set must be of one kind': where
        for kind, where in positions.items()
    }


def _explain(problems: dict[str, list[int]]) -> str:
    lines = [
        f'{positions_text(where)}: {problem}'
        for problem, where in list(problems.items())[:_PROBLEMS_SHOWN]
    ]
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f'{len(problems) - _PROBLEMS_SHOWN} more problems of other Documents')
    return '. '.join(lines)
