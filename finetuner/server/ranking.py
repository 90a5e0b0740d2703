"""Sorting the candidates that a query brings along."""

from __future__ import annotations

import numpy as np
from docarray import Document, DocumentArray

from finetuner.excepts import DataError
from finetuner.server.tags import ERROR_TAG
from finetuner.vector_index.checking import checked_embeddings
from finetuner.vector_index.exact import distances_to


def rank_matches(doc: Document, distance: str, limit: int | None = None) -> None:
    """Sort the matches of a Document by their distance to it; equal ones stay in their order.

    Where the Document has no embedding its matches stay as they are. Matches without one, or with
    one that cannot be compared, come last, their tag `finetuner_error` saying why.

    Args:
        doc: with an embedding, its matches with embeddings.
        distance: `cosine`, `euclidean` or `inner_product`.
        limit: keep no more matches than so many.
    """
    if doc.embedding is None or not len(doc.matches):
        return
    try:
        (query,) = checked_embeddings([doc.embedding], distance, 'query')
    except DataError as error:
        doc.tags[ERROR_TAG] = str(error)
        return
    comparable, values, others = [], [], []
    for match in doc.matches:
        try:
            values.append(_embedding_of(match, len(query), distance))
            comparable.append(match)
        except DataError as error:
            match.tags.setdefault(ERROR_TAG, str(error))
            others.append(match)
    ranked: list[Document] = []
    if comparable:
        distances = distances_to(query, np.stack(values), distance)
        for position in np.argsort(distances, kind='stable').tolist():
            match = comparable[position]
            match.scores[distance].value = float(distances[position])
            ranked.append(match)
    doc.matches = DocumentArray([*ranked, *others][:limit])


def _embedding_of(match: Document, dimension: int, distance: str) -> np.ndarray:
    if match.embedding is None:
        raise DataError('it has no embedding')
    (value,) = checked_embeddings([match.embedding], distance, 'match')
    if len(value) != dimension:
        raise DataError(f'its embedding has {len(value)} dimensions, that of its query {dimension}')
    return value
