"""What people know Documents by, in example results and on maps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from docarray import Document


def document_name(doc: Any, position: int) -> str:
    """What to call a Document in example results: its text, its address, or its place."""
    if doc.text:
        return doc.text[:80]
    return doc.uri or doc.tags.get('file') or f'Document {position} ({doc.id})'


def document_names(docs: Iterable[Document]) -> list[str]:
    """Names of Documents, each another: results are kept by the names of the queries."""
    names: list[str] = []
    taken: set[str] = set()
    for position, doc in enumerate(docs):
        name = document_name(doc, position)
        names.append(f'{name} (Document {position})' if name in taken else name)
        taken.add(names[-1])
    return names
