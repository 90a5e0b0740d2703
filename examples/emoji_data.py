"""The emoji data set of this folder as Documents: 500 concepts, four pictures and two texts each."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

from docarray import Document, DocumentArray

ARTISTS = ('noto', 'twemoji', 'fluent-emoji-flat', 'emojione')
QUERY_ARTIST = 'noto'

Split = Literal['train', 'test']


def load_emoji(
    split: Split = 'train', root: str | Path | None = None, blobs: bool = False
) -> DocumentArray:
    """Make one Document a picture, 1,000 in a split, of 250 concepts.

    Args:
        split: no concept is in both.
        root: the data set's folder; by default `emoji` beside this file.
        blobs: read the files into `blob`, to send them; otherwise `uri` is the file's path.

    Returns:
        Concepts in alphabetical order, each with its four artists in the order of `ARTISTS`. Tags:
        `finetuner_label` (the concept's number from 0), `concept`, `artist`; with `blobs` also
        `file`. The ids are the same each time.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: a picture is not where it should be.
    """
    folder = _root(root)
    docs = DocumentArray()
    for label, concept in enumerate(_concepts(folder, split)):
        for artist in ARTISTS:
            file = folder / split / concept / f'{artist}.webp'
            if not file.is_file():
                raise FileNotFoundError(f'{file} is missing: is {folder} the emoji data set?')
            doc = Document(
                id=f'emoji-{split}-{concept}-{artist}',
                tags={'finetuner_label': label, 'concept': concept, 'artist': artist},
            )
            if blobs:
                doc.blob = file.read_bytes()
                doc.tags['file'] = str(file)
            else:
                doc.uri = str(file)
            docs.append(doc)
    return docs


def load_emoji_queries_and_index(
    split: Split = 'test', root: str | Path | None = None, blobs: bool = False
) -> tuple[DocumentArray, DocumentArray]:
    """Split the pictures into queries and index: one artist is looked for among the other three.

    Args:
        split: as for `load_emoji`.
        root: as for `load_emoji`.
        blobs: as for `load_emoji`.

    Returns:
        250 queries (artist `noto`) and 750 Documents of the index; each query has 3 right answers.
    """
    docs = load_emoji(split, root, blobs)
    queries = DocumentArray(doc for doc in docs if doc.tags['artist'] == QUERY_ARTIST)
    index = DocumentArray(doc for doc in docs if doc.tags['artist'] != QUERY_ARTIST)
    return queries, index


def load_emoji_texts(split: Split = 'train', root: str | Path | None = None) -> DocumentArray:
    """Make two Documents a concept, 500 in a split: its name, and its keywords without the name.

    Args:
        split: as for `load_emoji`.
        root: as for `load_emoji`.

    Returns:
        Concepts in alphabetical order, the name first. Tags: `finetuner_label` (the concept's
        number from 0), `concept`, `kind` (`name` or `keywords`).

    Raises:
        ValueError: there is no such split.
    """
    docs = DocumentArray()
    for label, row in enumerate(_rows(_root(root), split)):
        for kind, text in (('name', row['name']), ('keywords', _keywords_without_name(row))):
            tags = {'finetuner_label': label, 'concept': row['concept'], 'kind': kind}
            docs.append(Document(id=f'emoji-{split}-{row["concept"]}-{kind}', text=text, tags=tags))
    return docs


def load_emoji_text_queries_and_index(
    split: Split = 'test', root: str | Path | None = None
) -> tuple[DocumentArray, DocumentArray]:
    """Split the texts into queries and index: a concept is looked for among keywords by its name.

    Returns:
        250 queries and 250 Documents of the index; each query has one right answer.
    """
    docs = load_emoji_texts(split, root)
    queries = DocumentArray(doc for doc in docs if doc.tags['kind'] == 'name')
    index = DocumentArray(doc for doc in docs if doc.tags['kind'] == 'keywords')
    return queries, index


def load_emoji_text_image_pairs(
    split: Split = 'train', root: str | Path | None = None
) -> DocumentArray:
    """Pair each picture with its name and its keywords, 1,000 pairs in a split.

    Args:
        split: as for `load_emoji`.
        root: as for `load_emoji`.

    Returns:
        Documents of two chunks, of modality `text` and `image`. The four pictures of a concept have
        the same text: name and keywords.
    """
    texts = {row['concept']: row['keywords'] for row in _rows(_root(root), split)}
    return DocumentArray(
        Document(
            id=f'{picture.id}-pair',
            chunks=[
                Document(text=texts[picture.tags['concept']], modality='text'),
                Document(uri=picture.uri, modality='image'),
            ],
        )
        for picture in load_emoji(split, root)
    )


def load_emoji_names_and_pictures(
    split: Split = 'test', root: str | Path | None = None
) -> tuple[DocumentArray, DocumentArray]:
    """Names to search with, and all pictures to find.

    Returns:
        250 queries, texts; and 1,000 pictures. Each query has 4 right answers.
    """
    names, _ = load_emoji_text_queries_and_index(split, root)
    return names, load_emoji(split, root)


def _keywords_without_name(row: dict[str, str]) -> str:
    keywords = row['keywords'].split('; ')
    return '; '.join(word for word in keywords if word.lower() != row['name'].lower())


def _root(root: str | Path | None) -> Path:
    return Path(root) if root is not None else Path(__file__).resolve().parent / 'emoji'


def _concepts(root: Path, split: str) -> list[str]:
    return [row['concept'] for row in _rows(root, split)]


def _rows(root: Path, split: str) -> list[dict[str, str]]:
    with (root / 'concepts.csv').open(encoding='utf-8', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['split'] == split]
    if not rows:
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    return sorted(rows, key=lambda row: row['concept'])
