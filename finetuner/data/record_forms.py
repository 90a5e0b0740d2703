"""One record of a data file, a mapping of keys to values, as the Document that it describes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
from docarray import Document

from finetuner.data.contents import LABEL_TAG, MODALITIES, SCORE_TAG, normalise_label
from finetuner.excepts import DataError, unknown_name

# the columns that data sets of pairs come with, each for a query and a document
_PAIR_KEYS = (('sentence1', 'sentence2'), ('query', 'document'), ('anchor', 'positive'))
_CONTENT_KEYS = ('text', 'uri', 'image', 'tensor')
_SCORE_KEYS = ('score', SCORE_TAG)
_KEYS = {
    *_CONTENT_KEYS, 'label', LABEL_TAG, *_SCORE_KEYS, 'id', 'tags', 'matches', 'chunks', 'modality',
    'pair', *itertools.chain.from_iterable(_PAIR_KEYS),
}  # fmt: skip

Pair = tuple[Document, Document]
# from the way a record names a picture to its uri
Locate = Callable[[str], str]


def document_or_pair(record: Mapping[str, Any], locate: Locate, where: str) -> Document | Pair:
    """Make a Document of a record, or two of a query-document pair without a score.

    Args:
        record: its keys are those of `finetuner.data.records.read_json_lines`.
        locate: turns the name of a picture into a uri, or raises a DataError.
        where: the place of the record, for messages.

    Raises:
        DataError: the record fits no form.
    """
    try:
        return _Record(record, locate, where).made()
    except RecursionError as error:
        raise DataError(f'{where} is nested too deep') from error


class _Record:
    """One record on its way to a Document."""

    def __init__(self, record: Mapping[str, Any], locate: Locate, where: str) -> None:
        self._locate = locate
        self._where = where
        for key in record:
            if key not in _KEYS:
                self._refuse(
                    f'{unknown_name("key", key, _KEYS)} What belongs to no key goes into `tags`'
                )
        # null, and a column without a value in this row
        self._values = {key: value for key, value in record.items() if value not in (None, '')}

    def made(self) -> Document | Pair:
        pair = self._pair()
        if pair is None:
            return self.document()
        one, other = pair
        for key in (*_CONTENT_KEYS, 'label', LABEL_TAG, 'matches', 'chunks', 'modality'):
            if key in self._values:
                hint = '; call a score `score`' if 'label' in key else ''
                self._refuse(f'`{key}` stands beside a pair, where only a score belongs{hint}')
        kinds = [_modality(doc) for doc in pair]
        score = self._score()
        if score is None and kinds[0] == kinds[1]:
            if any(key in self._values for key in ('id', 'tags')) or any(d.tags for d in pair):
                self._refuse('a query-document pair takes no id, tags or labels: it is no Document')
            return pair
        for doc, kind in zip(pair, kinds, strict=True):
            doc.modality = kind
        if score is None and kinds[0] != 'text':
            one, other = other, one
        doc = self._bare_document()
        doc.chunks = [one, other]
        return doc

    def document(self) -> Document:
        keys = [key for key in _CONTENT_KEYS if key in self._values]
        nested = {name: self._nested(name) for name in ('matches', 'chunks')}
        if not keys and not any(nested.values()):
            self._refuse(f'there is no content: give one of {", ".join(_CONTENT_KEYS)}')
        doc = self._bare_document()
        if len(keys) == 2 and keys[0] == 'text' and keys[1] in ('uri', 'image') and self._is_bare():
            doc.chunks = [Document(text=self._text('text')), self._picture(keys[1])]
            for chunk, modality in zip(doc.chunks, MODALITIES, strict=True):
                chunk.modality = modality
            return doc
        if len(keys) > 1:
            self._refuse(f'there are several contents, {" and ".join(keys)}: give one of them')
        for key in keys:
            self._set_content(doc, key)
        if 'modality' in self._values:
            doc.modality = self._text('modality')
        for name, docs in nested.items():
            if docs:
                setattr(doc, name, docs)
        return doc

    def _is_bare(self) -> bool:
        others = ('label', LABEL_TAG, *_SCORE_KEYS, 'matches', 'chunks', 'modality')
        return not any(key in self._values for key in others)

    def _bare_document(self) -> Document:
        """Return a Document with id, tags, label and score, and no content yet."""
        doc = Document(tags=self._tags())
        number = self._values.get('id')
        if number is not None:
            if isinstance(number, bool) or not isinstance(number, (str, int)):
                self._refuse(f'`id` is {_shown(number)}, neither a str nor an int')
            doc.id = str(number)
        return doc

    def _tags(self) -> dict[str, Any]:
        tags = self._values.get('tags', {})
        # a map of Arrow is a list of tuples
        is_map = isinstance(tags, list) and all(isinstance(item, tuple) for item in tags)
        if not isinstance(tags, dict) and not is_map:
            self._refuse(f'`tags` is {_shown(tags)}, not an object')
        tags = dict(tags)
        label = self._one_of(('label', LABEL_TAG))
        if label is not None:
            try:
                tags[LABEL_TAG] = normalise_label(label)
            except (DataError, OverflowError) as error:
                self._refuse(f'{error}; a label is an int or a str', error)
        score = self._score()
        if score is not None:
            tags[SCORE_TAG] = score
        return tags

    def _score(self) -> float | None:
        score = self._one_of(_SCORE_KEYS)
        if score is None:
            return None
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not is_number or not 0 <= score <= 1:
            self._refuse(f'score {_shown(score)} is not a number from 0 to 1')
        return float(score)

    def _one_of(self, names: tuple[str, str]) -> Any:
        found = [name for name in names if name in self._values]
        if len(found) > 1:
            self._refuse(f'`{names[0]}` and `{names[1]}` mean the same: give one of them')
        return self._values[found[0]] if found else None

    def _pair(self) -> Pair | None:
        forms = [keys for keys in _PAIR_KEYS if any(key in self._values for key in keys)]
        if len(forms) + ('pair' in self._values) > 1:
            self._refuse('there are several pairs in one record')
        if 'pair' in self._values:
            pair = self._values['pair']
            if not isinstance(pair, list) or len(pair) != 2:
                self._refuse(f'`pair` is {_shown(pair)}, not a list of two texts or records')
            one, other = (self._side(side, number) for number, side in enumerate(pair))
            return one, other
        if not forms:
            return None
        for key in forms[0]:
            if key not in self._values:
                self._refuse(f'`{key}` is missing beside {" and ".join(self._values)}')
        one, other = (Document(text=self._text(key)) for key in forms[0])
        return one, other

    def _side(self, side: Any, number: int) -> Document:
        return self._inner({'text': side} if isinstance(side, str) else side, 'side', number)

    def _nested(self, name: str) -> list[Document]:
        records = self._values.get(name, [])
        if not isinstance(records, list):
            self._refuse(f'`{name}` is {_shown(records)}, not a list of records')
        kind = 'match' if name == 'matches' else 'chunk'
        return [self._inner(record, kind, number) for number, record in enumerate(records)]

    def _inner(self, record: Any, kind: str, number: int) -> Document:
        where = f'{self._where}, {kind} {number}'
        if not isinstance(record, dict):
            raise DataError(f'{where} is {_shown(record)}, not a record')
        inner = _Record(record, self._locate, where)
        doc = inner.made()
        if isinstance(doc, tuple):
            inner._refuse('a pair stands at the top, not in a record')
        return doc

    def _set_content(self, doc: Document, key: str) -> None:
        if key == 'text':
            doc.text = self._text(key)
        elif key == 'tensor':
            doc.tensor = self._tensor()
        else:
            picture = self._picture(key)
            if picture.uri:
                doc.uri = picture.uri
            else:
                doc.blob = picture.blob
            doc.tags.update(picture.tags)

    def _text(self, key: str) -> str:
        value = self._values[key]
        if not isinstance(value, str):
            self._refuse(f'`{key}` is {_shown(value)}, not a text')
        if value.isspace():
            self._refuse(f'`{key}` is empty')
        return value

    def _picture(self, key: str) -> Document:
        value = self._values[key]
        if isinstance(value, dict) and set(value) <= {'bytes', 'path'}:
            path = value.get('path')
            value = value.get('bytes') or path
            if isinstance(value, bytes):
                # a name to show, and no path of this machine
                return Document(blob=value, tags={'file': path} if path else {})
        if isinstance(value, bytes) and value and key == 'image':
            return Document(blob=value)
        if not isinstance(value, str) or not value.strip():
            self._refuse(f'`{key}` is {_shown(value)}, not a path or uri')
        try:
            return Document(uri=self._locate(value))
        except DataError as error:
            self._refuse(str(error), error)

    def _tensor(self) -> np.ndarray:
        value = self._values['tensor']
        try:
            tensor = np.asarray(value)
        except (ValueError, TypeError) as error:
            self._refuse(f'`tensor` is no array, its lists differ in length: {error}', error)
        if tensor.dtype.kind not in 'iuf' or not tensor.size or not tensor.ndim:
            self._refuse(f'`tensor` is {_shown(value)}, not a nested list of numbers')
        if tensor.dtype.kind == 'f':
            # what models take; a list of Python numbers says nothing about its precision
            with np.errstate(over='ignore'):
                tensor = tensor.astype(np.float32)
            if not np.isfinite(tensor).all():
                self._refuse('`tensor` holds numbers that are not finite')
        return tensor

    def _refuse(self, problem: str, cause: Exception | None = None) -> NoReturn:
        raise DataError(f'{self._where}: {problem}') from cause


def _modality(doc: Document) -> str:
    return 'text' if doc.text else 'image'


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]}...'
