"""One pass over Documents that counts what they hold, in counters and arrays.

Nothing is kept of a Document but a few numbers, so that a million of them can be counted where
they lie. Pictures are opened afterwards, and only a sample of them.
"""

from __future__ import annotations

import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.contents import (
    content_of,
    is_local_file,
    match_label,
    nested_documents,
    normalise_label,
    positions_text,
    raw_label,
    read_score,
    wrong_field,
)
from finetuner.data.documents import DataKind, data_kind, kind_of
from finetuner.data.report.items import (
    array_key,
    file_status,
    item_name,
    items_of,
    picture_format,
    plain_array,
    scheme_of,
    shape_text,
)
from finetuner.excepts import DataError, PictureError

_READ_SCHEMES = ('path', 'file', 'http', 'https', 'data')
_SHOWN = 5
_MOST_SHAPES = 1000


class Inventory:
    """What a pass over Documents found; `take_inventory` fills it.

    Attributes:
        kind: of the Documents; None when they are mixed, or there are none.
        reason: why they cannot be trained on, in the words of `data_kind`; empty when they can.
        num_documents: Documents seen.
        num_items: items of their dataset: roots and matches, or the chunks of pairs.
        matches: matches by label; None stands for any but 1 and -1.
        num_without_positive: sessions with no match labelled 1.
        classes: number of each class, by label, in order of appearance.
        class_numbers: number of the class of each Document; -1 where it has no label.
        scores: of scored pairs, those that are numbers from 0 to 1.
        contents: items by what they hold: text, tensor, blob, uri, nothing.
        shapes: tensors by shape and dtype.
        formats: blobs by the picture format that they begin like.
        schemes: uris by scheme; `path` where there is none.
        text_lengths: in characters.
        blob_sizes: in bytes.
        faults: of uris, in words, with the Documents that have them.
    """

    def __init__(self) -> None:
        self.kind: DataKind | None = None
        self.reason = ''
        self.num_documents = 0
        self.num_items = 0
        self.matches: Counter[int | None] = Counter()
        self.num_without_positive = 0
        self.classes: dict[int | str, int] = {}
        self.class_numbers = array('q')
        self.scores = array('d')
        self.contents: Counter[str] = Counter()
        self.shapes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.schemes: Counter[str] = Counter()
        self.text_lengths = array('q')
        self.blob_sizes = array('q')
        self.faults: dict[str, Fault] = {}
        self._kinds: set[DataKind] = set()
        self._ids = array('q')
        self._contents = array('q')
        self._openable_positions = array('q')
        self._openable_items = array('i')

    def add(self, doc: Document) -> None:
        """Count the next Document."""
        kind = kind_of(doc)
        self._kinds.add(kind)
        self._ids.append(hash(doc.id))
        items = items_of(doc)
        keys = [self._add_item(item, number) for number, item in enumerate(items)]
        self.num_items += len(items)
        self._contents.append(hash(tuple(keys) if 'pair' in kind else keys[0]))
        self._add_labels(doc, kind)
        self.num_documents += 1

    def conclude(self, reason: str) -> None:
        """Settle the kind, once every Document was seen.

        Args:
            reason: why they cannot be trained on; empty when they can.
        """
        self.reason = reason
        self.kind = next(iter(self._kinds)) if len(self._kinds) == 1 else None

    def num_repeated_ids(self) -> int:
        """Documents whose id an earlier one has."""
        return len(self._ids) - len(np.unique(np.array(self._ids)))

    def repeated_contents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find Documents with the content of an earlier one, texts but for case and spaces.

        Of a session the root is compared, of a pair both chunks.

        Returns:
            Positions of the earlier ones and of those that repeat them, both `[num_repeats]`.
        """
        return _repeats(self._contents)

    def openable(self, most: int) -> list[tuple[int, int]]:
        """Choose what to open of tensors, blobs and uris: all, or `most` of them spread evenly.

        Returns:
            (position of the Document, number of the item in it), in order.
        """
        count = len(self._openable_positions)
        chosen = np.unique(np.linspace(0, max(0, count - 1), min(most, count)).round().astype(int))
        return [(self._openable_positions[n], self._openable_items[n]) for n in chosen.tolist()]

    @property
    def num_openable(self) -> int:
        """Items that hold a tensor, a blob or a uri that can be read here."""
        return len(self._openable_positions)

    def _add_labels(self, doc: Document, kind: DataKind) -> None:
        number = -1
        if kind == 'session':
            labels = [match_label(match) for match in nested_documents(doc, 'matches')]
            self.matches.update(labels)
            self.num_without_positive += 1 not in labels
        elif kind == 'scored_pair':
            score = read_score(doc)
            if score is not None:
                self.scores.append(score)
        elif kind == 'class':
            try:
                label = normalise_label(raw_label(doc))
                number = self.classes.setdefault(label, len(self.classes))
            except DataError:
                number = -1  # data_kind words it, with its position
        self.class_numbers.append(number)

    def _add_item(self, item: Document, number: int) -> Any:
        """Count an item's content; return what it is compared by."""
        content = content_of(item)
        if content is None:
            self.contents['nothing'] += 1
            # unlike every other empty one: they are no repetition
            return ('nothing', self.num_documents, number)
        if isinstance(content, str) and content == item.text:
            self.contents['text'] += 1
            self.text_lengths.append(len(content))
            return ' '.join(content.casefold().split())
        if isinstance(content, str):
            self.contents['uri'] += 1
            key: Any = content
            readable = self._add_uri(content)
        elif isinstance(content, (bytes, bytearray, memoryview)):
            self.contents['blob'] += 1
            self.blob_sizes.append(len(content))
            self.formats[picture_format(bytes(content[:16])) or 'unknown'] += 1
            readable, key = True, bytes(content)
        else:
            self.contents['tensor'] += 1
            shape = shape_text(content)
            known = shape in self.shapes or len(self.shapes) < _MOST_SHAPES
            self.shapes[shape if known else 'others'] += 1
            readable, key = True, array_key(content)
        if readable:
            self._openable_positions.append(self.num_documents)
            self._openable_items.append(number)
        return key

    def _add_uri(self, uri: str) -> bool:
        """Count a uri; return whether it can be opened without the network."""
        scheme = scheme_of(uri)
        self.schemes[scheme] += 1
        if scheme not in _READ_SCHEMES:
            read = ', '.join(name for name in _READ_SCHEMES[1:])
            self._fault(f'uris of the scheme {scheme!r} are not read: use a path, or {read}', uri)
            return False
        if not is_local_file(uri):
            return scheme == 'data'
        found = file_status(uri)
        if found is None:
            self._fault('the file of the uri is missing', uri)
        elif not stat.S_ISREG(found.st_mode):
            self._fault('the uri is not a regular file', uri)
        elif not found.st_size:
            self._fault('the file of the uri is empty (0 bytes)', uri)
        else:
            return True
        return False

    def _fault(self, words: str, example: str) -> None:
        fault = self.faults.setdefault(words, Fault(example, []))
        fault.num_items += 1
        if fault.last == self.num_documents:
            return
        fault.last = self.num_documents
        fault.num_documents += 1
        if len(fault.positions) < _SHOWN:
            fault.positions.append(self.num_documents)


@dataclass
class Fault:
    """Something wrong with several Documents.

    Attributes:
        example: the first of what is wrong.
        positions: of the first Documents.
        num_documents: Documents concerned.
        num_items: items concerned: several of a Document count each.
        last: position of the last Document concerned.
    """

    example: str
    positions: list[int]
    num_documents: int = 0
    num_items: int = 0
    last: int = -1

    def describe(self, words: str) -> str:
        """Say it in one line, with the Documents by position."""
        first = 'the first is ' if self.num_items > 1 else ''
        return f'{positions_text(self.positions, self.num_documents)}: {words} ({first}{self.example[:200]!r})'


def take_inventory(docs: Sequence[Document]) -> Inventory:
    """Count what Documents hold and decide on their kind, in one pass over them.

    Args:
        docs: any; what is wrong with them is found, not raised.
    """
    inventory = Inventory()
    watched = _Watched(docs, inventory)
    reason = ''
    try:
        data_kind(watched)
    except DataError as error:
        reason = str(error)
    try:
        # What data_kind left unread, as it does when it gives up early.
        watched.read_rest()
    except DataError as error:
        reason = str(error)
    inventory.conclude(reason)
    return inventory


class _Watched(Sequence[Document]):
    """Documents that are counted as they are read for the first time.

    So the check of the kind and the inventory share one pass: reading is what costs.
    """

    def __init__(self, docs: Sequence[Document], inventory: Inventory) -> None:
        self._docs = docs
        self._inventory = inventory
        self._whole = False

    def __len__(self) -> int:
        return len(self._docs)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | Sequence[Document]:
        return self._docs[index]

    def __iter__(self) -> Iterator[Document]:
        for position, doc in enumerate(self._docs):
            if not isinstance(doc, Document):
                # data_kind refuses it
                yield doc
                return
            fault = wrong_field(doc)
            if fault:
                raise DataError(f'Document {position}: {fault}')
            if position == self._inventory.num_documents:
                self._inventory.add(doc)
            yield doc
        self._whole = True

    def read_rest(self) -> None:
        for _ in () if self._whole else self:
            pass


@dataclass
class Opened:
    """What opening a sample of tensors, blobs and uris found.

    Attributes:
        num_opened: items looked at.
        pixel_sizes: (width, height) of the pictures as they lie in their files.
        formats: of the pictures, by Pillow's names.
        failures: why an item cannot be used, with its name.
        num_strange: blobs and files among them that begin like no picture at all.
        num_encoded: blobs and files looked at.
        contradictions: names of two Documents with the same bytes and different labels.
    """

    num_opened: int
    pixel_sizes: list[tuple[int, int]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    num_strange: int = 0
    num_encoded: int = 0


def open_sample(docs: Sequence[Document], inventory: Inventory, most: int) -> Opened:
    """Open pictures as training would, and look into tensors: all, or `most` spread evenly.

    Args:
        docs: those that were counted.
        inventory: what was found of them.
        most: items to open. Nothing is fetched over the network.
    """
    chosen = inventory.openable(most)
    opened = Opened(len(chosen))
    seen: dict[int, int] = {}
    for position, number in chosen:
        doc = docs[position]
        item = items_of(doc)[number]
        content = content_of(item)
        try:
            data = _open(content, opened)
        except DataError as error:
            opened.failures.append(f'{item_name(doc, position, number)}: {error}')
            continue
        label = inventory.class_numbers[position]
        if data is None or label < 0:
            continue
        other = seen.setdefault(hash(data), position)
        if inventory.class_numbers[other] != label:
            opened.contradictions.append(f'Documents {other} and {position}')
    return opened


def _open(content: Any, opened: Opened) -> bytes | None:
    """Check one content; return the bytes of a picture, None for a tensor."""
    import io

    from PIL import Image

    from finetuner.images import load_picture, read_uri

    if not isinstance(content, (str, bytes, bytearray, memoryview)):
        array = plain_array(content)
        if array.dtype.kind == 'f' and not np.isfinite(array).all():
            raise PictureError('its tensor holds numbers that are not finite')
        return None
    data = read_uri(content) if isinstance(content, str) else bytes(content)
    opened.num_encoded += 1
    if picture_format(data[:16]) is None:
        opened.num_strange += 1
    load_picture(data, 32)
    with Image.open(io.BytesIO(data)) as image:
        opened.pixel_sizes.append(image.size)
        opened.formats[str(image.format)] += 1
    return data


def _repeats(keys: array[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of equal keys that follow one another in the order of the keys."""
    values = np.array(keys, dtype=np.int64)
    order = np.argsort(values, kind='stable')
    same = values[order[1:]] == values[order[:-1]]
    earlier, later = order[:-1][same], order[1:][same]
    by_position = np.argsort(later)
    return earlier[by_position], later[by_position]
