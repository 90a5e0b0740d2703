"""Query-document pairs: which of them belong together, said as classes."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
from docarray import Document

from finetuner.data.contents import LABEL_TAG, content_of, copy_document
from finetuner.excepts import DataError


def join_pairs(pairs: Iterable[tuple[Document, Document]]) -> list[Document]:
    """Join query-document pairs into classes: what is linked, over however many pairs, is one class.

    A document that belongs to two queries joins them, so no document ever has two labels.

    Args:
        pairs: each a query and a document relevant to it; left as they are. A Document paired
            with itself is a class of its own, unless other pairs link it to more.

    Returns:
        Class data: a copy of the first Document of each distinct content (the same text, uri,
        bytes or array), in order of appearance, with the tag `finetuner_label`, counted from 0
        in order of appearance.

    Raises:
        DataError: a Document of a pair has no content; the pair's position is named.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    docs: list[Document] = []
    position_of: dict[Any, int] = {}
    # a query and a document by turns; an array takes 16 bytes a pair, tuples would take 120
    ends = array('q')
    for number, pair in enumerate(pairs):
        for doc in pair:
            position = position_of.setdefault(_content_key(doc, number), len(docs))
            if position == len(docs):
                docs.append(doc)
            ends.append(position)
    if not docs:
        return docs
    edges = np.asarray(ends).reshape(-1, 2)
    links = (np.ones(len(edges), np.bool_), (edges[:, 0], edges[:, 1]))
    _, components = connected_components(
        coo_array(links, shape=(len(docs), len(docs))), directed=False
    )
    _, first_positions, component_of = np.unique(components, return_index=True, return_inverse=True)
    # scipy numbers components as it pleases
    rank = np.empty(len(first_positions), np.int64)
    rank[np.argsort(first_positions)] = np.arange(len(first_positions))
    for position, label in enumerate(rank[component_of].tolist()):
        docs[position] = copy_document(docs[position])
        docs[position].tags[LABEL_TAG] = label
    return docs


def _content_key(doc: Document, number: int) -> Any:
    content = content_of(doc)
    if content is None:
        raise DataError(
            f'pair {number}: a Document of it has no content: set text, tensor, blob or uri'
        )
    if isinstance(content, str):
        return ('text' if doc.text else 'uri', content)
    if isinstance(content, bytes):
        return ('blob', hashlib.sha256(content).digest())
    values = np.ascontiguousarray(content)
    return (values.dtype.str, values.shape, hashlib.sha256(values.tobytes()).digest())
