"""The kinds of labelled Documents: which one a data set is, and what each asks of its Documents."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.contents import (
    LABEL_TAG,
    MODALITIES,
    SCORE_TAG,
    has_content,
    has_label,
    has_score,
    load_contents,
    match_label,
    nested_documents,
    normalise_label,
    positions_text,
    raw_label,
    read_label,
    read_score,
    shown_value,
    wrong_field,
)
from finetuner.data.labelling import (
    ClassLabels,
    InstanceLabels,
    LabelColumn,
    ScoredPairLabels,
    SessionLabels,
    TextImageLabels,
)
from finetuner.data.stored.storing import documents_hash, load_documents, save_documents
from finetuner.excepts import DataError

__all__ = [
    'COLUMNS',
    'KIND_NAMES',
    'LABEL_TAG',
    'SCORE_TAG',
    'DataKind',
    'Positions',
    'Survey',
    'data_kind',
    'documents_hash',
    'has_content',
    'has_label',
    'kind_of',
    'load_contents',
    'load_documents',
    'problems_of',
    'read_label',
    'save_documents',
    'survey_documents',
]

DataKind = Literal['class', 'session', 'instance', 'scored_pair', 'text_image_pair']

KIND_NAMES: dict[DataKind, str] = {
    'class': 'class data (content and a label)',
    'session': 'sessions (matches)',
    'instance': 'unlabelled data (content, no label)',
    'scored_pair': f'scored pairs (`{SCORE_TAG}`)',
    'text_image_pair': 'text-image pairs (two chunks)',
}
COLUMNS: dict[DataKind, Callable[[], LabelColumn]] = {
    'class': ClassLabels,
    'session': SessionLabels,
    'instance': InstanceLabels,
    'scored_pair': ScoredPairLabels,
    'text_image_pair': TextImageLabels,
}
_PROBLEMS_SHOWN = 3
_POSITIONS_SHOWN = 5
# kinds of problems told apart: data that is wrong throughout must not fill the memory with reports
_MAX_PROBLEMS = 1_000


class Positions:
    """Where something was found: the first few positions, and how many there are in all.

    Attributes:
        first: the first five.
        count: of all.
    """

    def __init__(self, positions: Iterable[int] = ()) -> None:
        self.first: list[int] = []
        self.count = 0
        for position in positions:
            self.add(position)

    def add(self, position: int) -> None:
        """Note one more."""
        if len(self.first) < _POSITIONS_SHOWN:
            self.first.append(position)
        self.count += 1

    def __str__(self) -> str:
        """Return `'Documents 3, 8 and 14 more'`."""
        return positions_text(self.first, self.count)


@dataclass(frozen=True)
class Survey:
    """What one pass over all Documents found.

    Attributes:
        kind: the one that every Document is of.
        column: their labels.
        num_documents: how many there are.
    """

    kind: DataKind
    column: LabelColumn
    num_documents: int


def data_kind(docs: Sequence[Document]) -> DataKind:
    """Decide, over all Documents, which kind of training data they are; see `survey_documents`."""
    return survey_documents(docs).kind


def survey_documents(docs: Sequence[Document]) -> Survey:
    """Decide which kind of training data the Documents are, and collect their labels, in one pass.

    Matches make a session, the tag `finetuner_score` a scored pair, chunks without content of
    their parent's own a text-image pair, a label class data; content alone is an instance.

    Args:
        docs: at least one.

    Returns:
        The one kind that every Document is of, and the labels.

    Raises:
        DataError: there are none, they are of several kinds, two have the same id, or one breaks
            the rules of its kind (no content, a label that is none ...); positions are named.
    """
    columns: dict[DataKind, LabelColumn] = {}
    positions: dict[DataKind, Positions] = {}
    problems: dict[str, Positions] = {}
    ids = array('q')
    for position, doc in enumerate(docs):
        if not isinstance(doc, Document):
            raise DataError(
                f'item {position} is a {type(doc).__name__}, not a Document: give '
                'docarray.Document objects'
            )
        fault = wrong_field(doc)
        if fault:
            raise DataError(f'Document {position}: {fault}')
        kind = kind_of(doc)
        positions.setdefault(kind, Positions()).add(position)
        ids.append(hash(doc.id))
        found = dict.fromkeys(problems_of(doc, kind))
        for problem in found:
            if problem in problems or len(problems) < _MAX_PROBLEMS:
                problems.setdefault(problem, Positions()).add(position)
        if not found and not problems and len(positions) == 1:
            columns.setdefault(kind, COLUMNS[kind]()).add(doc)
    if not positions:
        raise DataError('there are no Documents: give at least one')
    if len(positions) > 1:
        problems.update(_mixture(positions))
    problems.update(_duplicates(docs, np.array(ids, dtype=np.int64)))
    if problems:
        raise DataError(_explain(problems))
    kind = next(iter(positions))
    return Survey(kind, columns[kind], len(ids))


def _duplicates(docs: Sequence[Document], hashes: NDArray[np.int64]) -> dict[str, Positions]:
    """Documents with the id of one before them.

    Hashes stand for the ids, which would take ten times the memory; equal ones are looked up.
    """
    values, counts = np.unique(hashes, return_counts=True)
    suspects = np.flatnonzero(np.isin(hashes, values[counts > 1]))
    seen: dict[str, int] = {}
    again: dict[str, Positions] = {}
    for position in suspects.tolist():
        id_ = docs[position].id
        if id_ in seen:
            problem = (
                f'the id {shown_value(id_)} is that of Document {seen[id_]} too: give every Document an id of '
                'its own, or leave ids out'
            )
            again.setdefault(problem, Positions()).add(position)
        elif len(seen) < _MAX_PROBLEMS:
            seen[id_] = position
    return again


def kind_of(doc: Document) -> DataKind:
    """Say which kind one Document is of, by its outward signs."""
    if nested_documents(doc, 'matches'):
        return 'session'
    if has_score(doc):
        return 'scored_pair'
    if nested_documents(doc, 'chunks') and not has_content(doc):
        return 'text_image_pair'
    return 'class' if has_label(doc) else 'instance'


def problems_of(doc: Document, kind: DataKind) -> Iterator[str]:
    """Say which rules of its kind a Document breaks."""
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
        if match_label(match) is None:
            found = f'the label {shown_value(raw_label(match))}' if has_label(match) else 'no label'
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
        if read_score(doc) is None:
            found = shown_value(doc.tags[SCORE_TAG])
            yield f'{SCORE_TAG} {found} is not a number from 0 to 1; see docs/data.md#pairs'
    elif sorted(chunk.modality or '' for chunk in chunks) != sorted(MODALITIES):
        yield (
            'the chunks are not of modality `text` and `image`: set `modality`, or give the pair a '
            f'number in `{SCORE_TAG}`; queries with their documents become class data by '
            'finetuner.data.join_pairs; see docs/data.md#pairs'
        )


def _mixture(positions: dict[DataKind, Positions]) -> dict[str, Positions]:
    if set(positions) == {'class', 'instance'}:
        return {
            f'label is missing, while {positions["class"].count} others have one: set the tag '
            f'`{LABEL_TAG}` of all Documents or of none; see docs/data.md#class': positions[
                'instance'
            ]
        }
    if set(positions) == {'session', 'instance'}:
        return {
            f'matches are missing, while {positions["session"].count} others have some: set '
            'matches of all Documents or of none, and leave out roots that have none; see '
            'docs/data.md#session': positions['instance']
        }
    return {
        f'these are {KIND_NAMES[kind]}, and all Documents of a data set must be of one kind': where
        for kind, where in positions.items()
    }


def _explain(problems: dict[str, Positions]) -> str:
    lines = [f'{where}: {problem}' for problem, where in list(problems.items())[:_PROBLEMS_SHOWN]]
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f'{len(problems) - _PROBLEMS_SHOWN} more problems of other Documents')
    return '. '.join(lines)
