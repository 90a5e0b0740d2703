"""Files that say which pairs there are, where their images lie, and what their labels are."""

from __future__ import annotations

import json
import os
import re
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetuner.collections.cache.disk import (
    Descriptor,
    damaged,
    is_marked,
    new_hdf5,
    read_hdf5,
)
from finetuner.collections.cache.packing import ChunkForm
from finetuner.collections.cache.source import PairSource
from finetuner.collections.labels import LabelKind, build_label_kind
from finetuner.excepts import DataError

if TYPE_CHECKING:
    import h5py

_NAME = re.compile(r'(labels|begun)-(\d+)-(\d+)\.h5')
_FORMAT = 1
_COPIED_AT_ONCE = 1 << 20
_MOST_ROWS_A_CHUNK = 1 << 16


@dataclass(frozen=True, order=True)
class TableName:
    """What the name of such a file says.

    Attributes:
        revision: of the collection.
        number: which file of this revision.
        is_whole: whether the images of all its pairs are in parts.
    """

    revision: int
    number: int
    is_whole: bool

    def __str__(self) -> str:
        """The name."""
        return f'{"labels" if self.is_whole else "begun"}-{self.revision}-{self.number}.h5'


def list_tables(directory: Path) -> list[TableName]:
    """The files of a cache, the newest last."""
    if not directory.is_dir():
        return []
    matches = filter(None, (_NAME.fullmatch(path.name) for path in directory.iterdir()))
    return sorted(
        TableName(int(match[2]), int(match[3]), match[1] == 'labels') for match in matches
    )


@dataclass(frozen=True)
class About:
    """What is the same for all pairs of a revision.

    Attributes:
        key: of the collection.
        revision: of it.
        form: of the images.
        kind: of the labels.
        groups: their names.
        parts: of the files that hold the images: names and bytes. None while images are missing.
    """

    key: str
    revision: int
    form: ChunkForm
    kind: LabelKind[Any]
    groups: tuple[str, ...]
    parts: tuple[tuple[str, int], ...] | None = None

    def as_json(self) -> bytes:
        """As the file holds it."""
        return json.dumps(
            {
                'format': _FORMAT,
                'key': self.key,
                'revision': self.revision,
                'shape': self.form.shape,
                'dtype': self.form.stored_dtype.str,
                'mltype': self.kind.mltype,
                'classes': self.kind.classes,
                'groups': self.groups,
                'parts': self.parts,
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> About:
        """Read what `as_json` wrote."""
        held = json.loads(data)
        if held['format'] != _FORMAT:
            raise ValueError(
                f'it is of format {held["format"]}, and this finetuner reads {_FORMAT}'
            )
        bands, height, width = held['shape']
        dtype = np.dtype(held['dtype']).newbyteorder('=')
        parts = held['parts']
        return cls(
            key=held['key'],
            revision=held['revision'],
            form=ChunkForm((bands, height, width), dtype),
            kind=build_label_kind(held['mltype'], held['classes']),
            groups=tuple(held['groups']),
            parts=None if parts is None else tuple((name, size) for name, size in parts),
        )


class PairList:
    """All pairs of a source.

    Attributes:
        ids: `[n]` int64, rising.
        groups: names of the groups, in the order in which they came.
        group_numbers: `[n]` int32.
        label_sizes: `[n]` int64, bytes.
        label_checksums: `[n]` uint32, CRC-32.
        labels: their bytes, one after the other, in a file.
    """

    def __init__(self, source: PairSource, labels: IO[bytes]) -> None:
        """Read all rows.

        Args:
            source: of the pairs.
            labels: where their bytes go.

        Raises:
            DataError: the ids do not rise.
        """
        self.labels = labels
        ids, group_numbers, sizes, checksums = array('q'), array('i'), array('q'), array('I')
        numbers: dict[str, int] = {}
        for row in source.rows():
            if ids and row.id <= ids[-1]:
                raise DataError(f'pair {row.id} comes after pair {ids[-1]}: ids have to rise')
            ids.append(row.id)
            group_numbers.append(numbers.setdefault(row.group, len(numbers)))
            sizes.append(len(row.label))
            checksums.append(zlib.crc32(row.label))
            labels.write(row.label)
        self.groups = tuple(numbers)
        self.ids: NDArray[np.int64] = np.array(ids, np.int64)
        self.group_numbers = np.array(group_numbers, np.int32)
        self.label_sizes = np.array(sizes, np.int64)
        self.label_checksums = np.array(checksums, np.uint32)


@contextmanager
def read_pairs(source: PairSource, directory: Path) -> Iterator[PairList]:
    """All pairs of a source, until the block ends.

    Args:
        source: of the pairs.
        directory: on whose disk the labels are kept meanwhile, in a file without a name.
    """
    with tempfile.TemporaryFile(dir=directory) as labels:
        yield PairList(source, labels)


def write_table(
    directory: Path,
    about: About,
    pairs: PairList,
    places: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
) -> TableName:
    """Write what is known of a revision.

    Args:
        directory: of the cache.
        about: what is the same for all pairs.
        pairs: all of them.
        places: `[n]` which of the parts that `about` names holds the image, and `[n]` where in it;
            None while images are missing.
    """
    numbers = [name.number for name in list_tables(directory) if name.revision == about.revision]
    name = TableName(about.revision, max(numbers, default=0) + 1, about.parts is not None)
    num_bytes = int(pairs.label_sizes.sum())
    with new_hdf5(directory, str(name)) as new:
        _keep(new.file, 'about', np.frombuffer(about.as_json(), np.uint8))
        _keep(new.file, 'ids', pairs.ids)
        _keep(new.file, 'group_numbers', pairs.group_numbers)
        if places is not None:
            _keep(new.file, 'part_numbers', places[0])
            _keep(new.file, 'part_rows', places[1])
        _keep(new.file, 'label_sizes', pairs.label_sizes)
        _keep(new.file, 'label_checksums', pairs.label_checksums)
        # in one piece, so that a label can be read at its place
        labels = new.file.create_dataset('labels', (num_bytes,), np.uint8)
        pairs.labels.seek(0)
        for start, data in _blocks(pairs.labels):
            labels[start : start + len(data)] = np.frombuffer(data, np.uint8)
            new.check()
    return name


class Table:
    """A file of pairs that is open for reading.

    Attributes:
        path: of the file.
        about: what is the same for all pairs.
        ids: `[n]` int64, rising.
        group_numbers: `[n]` int32.
        part_numbers: `[n]` int32, which of `about.parts` holds the image; where it has any.
        part_rows: `[n]` int32, where in it.
    """

    def __init__(self, path: Path) -> None:
        """Read all but the labels.

        Raises:
            FileNotFoundError: it is not there.
            DataError: it is damaged.
        """
        self.path = path
        with read_hdf5(path) as file:
            self._read(file)

    def _read(self, file: h5py.File) -> None:
        self.about = About.from_json(file['about'][()].tobytes())
        self.ids: NDArray[np.int64] = file['ids'][()]
        self.group_numbers: NDArray[np.int32] = file['group_numbers'][()]
        if self.about.parts is not None:
            self.part_numbers: NDArray[np.int32] = file['part_numbers'][()]
            self.part_rows: NDArray[np.int32] = file['part_rows'][()]
        self._label_sizes: NDArray[np.int64] = file['label_sizes'][()]
        self._label_checksums: NDArray[np.uint32] = file['label_checksums'][()]
        ends = np.cumsum(self._label_sizes)
        self._label_places = ends - self._label_sizes + (file['labels'].id.get_offset() or 0)

    def read_label(self, position: int, file: Descriptor) -> bytes:
        """A label, as its kind encoded it.

        Args:
            position: of its pair.
            file: the file, open.

        Raises:
            DataError: it is damaged; the next writer is told.
        """
        size, start = int(self._label_sizes[position]), int(self._label_places[position])
        data = os.pread(file.number, size, start)
        if len(data) != size or zlib.crc32(data) != self._label_checksums[position]:
            raise damaged(
                self.path, f'of the label of pair {self.ids[position]}, its checksum differs'
            )
        return data

    def is_usable(self) -> bool:
        """Whether all that this file names is there and nobody found it damaged."""
        if self.about.parts is None or is_marked(self.path):
            return False
        directory = self.path.parent
        return all(
            (path := directory / name).is_file()
            and path.stat().st_size == size
            and not is_marked(path)
            for name, size in self.about.parts
        )


def _keep(file: h5py.File, name: str, values: NDArray[Any]) -> None:
    """Write an array that is read as a whole; gzip's checksum shows when it was damaged."""
    if not len(values):
        file.create_dataset(name, data=values)
        return
    file.create_dataset(
        name,
        data=values,
        chunks=(min(len(values), _MOST_ROWS_A_CHUNK),),
        shuffle=True,
        compression='gzip',
        compression_opts=1,
    )


def _blocks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    start = 0
    while data := file.read(_COPIED_AT_ONCE):
        yield start, data
        start += len(data)
