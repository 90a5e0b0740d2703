"""What a request over gRPC holds, read from its bytes: Documents are found, not opened.

Few bytes of protobuf can make many objects: two make an empty Document, six an entry of a tag. So
what makes them is counted before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from finetuner.excepts import ConfigError, DataError, TooLargeError

# numbers of fields in jina.proto and docarray.proto
_PARAMETERS, _DATA = 2, 4
_DOCS, _DOCS_BYTES = 1, 2
_URI = 9
_NESTED = (14, 15)  # chunks, matches
_MAPS = (17, 18, 19, 20)  # tags, scores, evaluations, _metadata
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5

# over HTTP as well
NESTED_A_DOCUMENT = 10
# a Document has eighteen kinds of fields, and so has each of the ten within it
_FIELDS_A_DOCUMENT = 200
_MAX_MAP_BYTES = 8 << 20
_MAX_PARAMETER_BYTES = 4 << 20
_MAX_FIELDS = 10_000
_NO_REQUEST = 'the message is no DataRequest of Jina'


@dataclass(frozen=True)
class Documents:
    """The Documents of a message, not opened.

    Attributes:
        count: those within others not counted.
        arrays: the `DocumentArrayProto`s, views of the message.
        are_plain: whether each is all there is to read: no address, no Documents within.
    """

    count: int
    arrays: tuple[memoryview, ...]
    are_plain: bool

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(map(len, self.arrays))


def find_documents(raw: bytes, most: int) -> Documents:
    """Find the Documents of a `DataRequestProto`.

    Args:
        raw: the message as it came.
        most: of which more need not be counted.

    Returns:
        Them; or only some, of which there are more than `most`.

    Raises:
        ConfigError: the bytes are no such message.
        DataError: the Documents are in the field `docs_bytes`, which Jina unpickles.
        TooLargeError: parameters, tags, fields or Documents within others are too many.
    """
    count = 0
    arrays = []
    reading = _Reading(most)
    with _cut_off_is_told():
        for docs in reading.document_arrays(memoryview(raw)):
            arrays.append(docs)
            for field, doc in reading.parts(docs):
                if field != _DOCS:
                    continue
                count += 1
                if count > most:
                    return Documents(count, (), False)
                reading.look_into(doc)
        while reading.nested:
            reading.look_into(reading.nested.pop())
    return Documents(count, tuple(arrays), reading.are_plain)


def split_documents(raw: bytes, count: int) -> list[memoryview]:
    """The Documents of a `DataRequestProto` of ours, each by itself.

    Args:
        raw: the message.
        count: at most so many.

    Returns:
        A `DocumentProto` each.

    Raises:
        ConfigError: the bytes are no such message.
    """
    reading = _Reading(count)
    with _cut_off_is_told():
        return [
            doc
            for docs in reading.document_arrays(memoryview(raw))
            for field, doc in reading.parts(docs)
            if field == _DOCS
        ]


def data_of(arrays: Iterable[bytes | memoryview]) -> bytes:
    """The field `data` of a `DataRequestProto`, to be put behind its other fields.

    Args:
        arrays: `DocumentArrayProto`s, which become one.
    """
    return _delimited(_DATA, _delimited(_DOCS, b''.join(arrays)))


def array_of(docs: Iterable[memoryview]) -> bytes:
    """A `DocumentArrayProto` of `DocumentProto`s."""
    return b''.join(_delimited(_DOCS, doc) for doc in docs)


def too_many_nested(most: int) -> str:
    """What a client is told whose Documents hold too many others.

    Args:
        most: Documents of a request.
    """
    return (
        f'the chunks and matches of the Documents are more than {most:,} times '
        f'{NESTED_A_DOCUMENT}: send the Documents in parts'
    )


class _Reading:
    """Walks through a message, and ends where it holds more of something than it may.

    Attributes:
        nested: Documents within others, found and not looked into yet.
        are_plain: whether no Document has an address or others within.
    """

    def __init__(self, most: int) -> None:
        self.nested: list[memoryview] = []
        self.are_plain = True
        self._most = most
        self._nested_left = NESTED_A_DOCUMENT * most
        self._max_fields = _MAX_FIELDS + _FIELDS_A_DOCUMENT * most
        self._num_fields = 0
        self._map_bytes = 0

    def document_arrays(self, message: memoryview) -> Iterator[memoryview]:
        """The arrays of Documents in a request: one, but the wire allows more, which are joined."""
        num_fields = parameter_bytes = 0
        for number, data in self.parts(message):
            num_fields += 1
            if number == _PARAMETERS:  # protobuf merges them if there are more
                parameter_bytes += len(data)
                if parameter_bytes > _MAX_PARAMETER_BYTES:
                    raise TooLargeError(
                        f'the parameters take {parameter_bytes:,} bytes: at most '
                        f'{_MAX_PARAMETER_BYTES:,} are taken'
                    )
            if number == _DATA:
                for kind, docs in self.parts(data):
                    num_fields += 1
                    if kind == _DOCS_BYTES:
                        raise DataError(
                            'the Documents are pickled (`docs_bytes`): this server opens no '
                            'pickle; send them as protobuf, as jina.Client does'
                        )
                    if kind == _DOCS:
                        yield docs
            if num_fields > _MAX_FIELDS:
                raise ConfigError(f'{_NO_REQUEST}: it has more than {_MAX_FIELDS:,} fields')

    def look_into(self, doc: memoryview) -> None:
        """Note the Documents within one, and count the bytes of its maps."""
        for field, value in self.parts(doc):
            if field == _URI:
                self.are_plain = False
            elif field in _NESTED:
                self.are_plain = False
                if not self._nested_left:
                    raise TooLargeError(too_many_nested(self._most))
                self._nested_left -= 1
                self.nested.append(value)
            elif field in _MAPS:
                self._map_bytes += len(value)
                if self._map_bytes > _MAX_MAP_BYTES:
                    raise TooLargeError(
                        f'the tags of the Documents take more than {_MAX_MAP_BYTES >> 20} MiB: '
                        'send them in parts, or keep contents in text, blob or tensor'
                    )

    def parts(self, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The delimited fields of a message, with their numbers; all others are skipped."""
        position, end = 0, len(view)
        while position < end:
            # two bytes make a field, so they are counted whether anybody looks at them or not
            self._num_fields += 1
            if self._num_fields > self._max_fields:
                raise TooLargeError(
                    f'the Documents have more than {self._max_fields:,} fields in all: send them '
                    'in parts'
                )
            key, position = _varint(view, position)
            kind = key & 7
            if kind == _DELIMITED:
                length, position = _varint(view, position)
                if length > end - position:
                    raise IndexError
                yield key >> 3, view[position : position + length]
                position += length
            elif kind == _VARINT:
                _, position = _varint(view, position)
            elif kind == _FIXED64:
                position += 8
            elif kind == _FIXED32:
                position += 4
            else:
                raise ConfigError(f'{_NO_REQUEST}: it has a field of kind {kind}')


@contextmanager
def _cut_off_is_told() -> Iterator[None]:
    try:
        yield
    except (IndexError, OverflowError) as error:
        raise ConfigError(f'{_NO_REQUEST}: its bytes are cut off or mixed up') from error


def _delimited(field: int, content: bytes | memoryview) -> bytes:
    length, written = len(content), bytearray((field << 3 | _DELIMITED,))
    while length >= 0x80:
        written.append(length & 0x7F | 0x80)
        length >>= 7
    written.append(length)
    return b''.join((written, content))


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    byte = view[position]
    if byte < 0x80:
        return byte, position + 1
    value = shift = 0
    while True:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise OverflowError
