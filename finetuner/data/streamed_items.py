"""Items of streamed Documents: what each is similar to, said without having seen the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from docarray import Document

from finetuner.data.contents import (
    MODALITIES,
    match_label,
    nested_documents,
    normalise_label,
    raw_label,
    read_score,
    shown_value,
)
from finetuner.data.documents import KIND_NAMES, DataKind, kind_of, problems_of
from finetuner.data.labelling import ROOT
from finetuner.excepts import ConfigError, DataError


class Streamed(NamedTuple):
    """A Document on its way into a batch.

    Attributes:
        kind: of it.
        where: what to call it in messages.
        items: Documents that hold content, and the label of each.
    """

    kind: DataKind
    where: str
    items: list[tuple[Document, Any]]


class Labeller:
    """Makes items of Documents, with labels that mean the same wherever they are made.

    | kind | items | label |
    |---|---|---|
    | class | 1 | place in `classes`; else the label where it is an int, and a number of 63 bits made of its text where it is a str |
    | instance | `views_per_instance` | number of the Document, another for each |
    | session | root and matches | (number of the Document, 0, 1 or -1) |
    | scored pair | 2 | the score |
    | text-image pair | text and image | (number of 63 bits made of the text, 0 or 1) |
    """

    def __init__(
        self, classes: Sequence[int | str] | None = None, views_per_instance: int = 2
    ) -> None:
        """Take what is the same for all.

        Args:
            classes: labels that there are; None where that is not known.
            views_per_instance: of unlabelled data.

        Raises:
            ConfigError: a class is none, or there twice.
        """
        self._classes: dict[int | str, int] | None = None
        if classes is not None:
            try:
                labels = [normalise_label(each) for each in classes]
            except DataError as error:
                raise ConfigError(f'classes: {error}') from error
            self._classes = {label: number for number, label in enumerate(labels)}
            if len(self._classes) != len(labels):
                raise ConfigError('classes: a label is there twice')
        self._views = views_per_instance

    def items_per_document(self, kind: DataKind) -> int | None:
        """How many items a Document of a kind is; None where that differs."""
        pairs = dict.fromkeys(('scored_pair', 'text_image_pair'), 2)
        return {'class': 1, 'instance': self._views, **pairs}.get(kind)

    def streamed(self, where: str, doc: Document, number: int, kind: DataKind | None) -> Streamed:
        """Make items of a Document.

        Args:
            where: what to call it in messages.
            doc: the Document.
            number: of it, another for each that is read.
            kind: of those before it, None for the first.

        Raises:
            DataError: it breaks the rules of its kind, or is of another than those before it.
        """
        own = kind_of(doc)
        if kind not in (None, own):
            raise DataError(
                f'{where}: it is of {KIND_NAMES[own]}, unlike those before it, which are of '
                f'{KIND_NAMES[kind]}'
            )
        problem = next(iter(problems_of(doc, own)), None)
        if problem:
            raise DataError(f'{where}: {problem}')
        return Streamed(own, where, self._items(where, doc, number, own))

    def _items(
        self, where: str, doc: Document, number: int, kind: DataKind
    ) -> list[tuple[Document, Any]]:
        if kind == 'class':
            return [(doc, self._class_number(where, normalise_label(raw_label(doc))))]
        if kind == 'instance':
            return [(doc, number)] * self._views
        if kind == 'session':
            matches = nested_documents(doc, 'matches')
            return [
                (doc, (number, ROOT)),
                *((match, (number, match_label(match))) for match in matches),
            ]
        chunks = nested_documents(doc, 'chunks')
        if kind == 'scored_pair':
            return [(chunk, read_score(doc)) for chunk in chunks]
        text, image = (next(c for c in chunks if c.modality == each) for each in MODALITIES)
        return [(text, (_hash(text.text), 0)), (image, (_hash(text.text), 1))]

    def _class_number(self, where: str, label: int | str) -> int:
        if self._classes is None:
            return label if isinstance(label, int) else _hash(label)
        number = self._classes.get(label)
        if number is None:
            raise DataError(f'{where}: its label {shown_value(label)} is not in `classes`')
        return number


def _hash(text: str) -> int:
    """A number of 63 bits that is the same in all processes."""
    digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def named_items(streamed: Streamed) -> Iterator[tuple[str, Document, Any]]:
    """Each item with what to call it."""
    inner = {'session': 'match', 'scored_pair': 'chunk', 'text_image_pair': 'chunk'}.get(
        streamed.kind
    )
    for number, (doc, label) in enumerate(streamed.items):
        where = streamed.where
        if inner == 'chunk' or (inner and number):
            where = f'{where}, {inner} {number - (inner == "match")}'
        yield where, doc, label


def without_broken(streamed: Streamed, broken: set[int]) -> list[int]:
    """Places of the items that are of use when some cannot be loaded.

    A session can do without matches; nothing else can do without a part of it.
    """
    places = range(len(streamed.items))
    if streamed.kind == 'session' and 0 not in broken:
        return [place for place in places if place not in broken]
    return [] if broken else list(places)
