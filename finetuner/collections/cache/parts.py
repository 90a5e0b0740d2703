"""Files of images: written whole, then never changed."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetuner.collections.cache.disk import (
    Descriptor,
    damaged,
    is_marked,
    new_hdf5,
    read_hdf5,
)
from finetuner.collections.cache.packing import ChunkForm, DamagedImageError, Packed, unpack

if TYPE_CHECKING:
    import h5py

_NAME = re.compile(r'images-(\d+)-(\d+)-[0-9a-f]{8}\.h5')
_GZIP_LEVEL = 1


class Part:
    """A file of images that is open for reading: its index is in memory, HDF5 has closed it.

    HDF5 reads one chunk at a time, whatever the threads, and decompresses it meanwhile. So the
    chunks are read at their places in the file.

    Attributes:
        path: of the file.
        ids: `[n]` int64, the pairs whose images these are.
    """

    def __init__(self, path: Path, form: ChunkForm) -> None:
        """Read the index.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it is damaged, or of images of another form.
        """
        self.path = path
        self._form = form
        with read_hdf5(path) as file:
            self._read_index(file)

    def _read_index(self, file: h5py.File) -> None:
        images = file['images']
        form = self._form
        if images.shape[1:] != form.shape or images.dtype != form.stored_dtype:
            raise ValueError(
                f'its images are {images.shape[1:]} of {images.dtype}, and those of its collection '
                f'{form.shape} of {form.dtype}'
            )
        self.ids: NDArray[np.int64] = file['ids'][()]
        self._checksums: NDArray[np.uint32] = file['checksums'][()]
        num_images = len(images)
        self._places = np.zeros((num_images, 3), np.int64)
        num_found = 0

        def note(chunk: Any) -> None:
            nonlocal num_found
            num_found += 1
            row = chunk.chunk_offset[0]
            self._places[row] = chunk.byte_offset, chunk.size, chunk.filter_mask

        images.id.chunk_iter(note)
        if not len(self.ids) == len(self._checksums) == num_images == num_found:
            raise ValueError(f'it has {num_found} chunks for {len(self.ids)} pairs')

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.ids)

    def packed(self, row: int, file: Descriptor) -> Packed:
        """An image as it is in the file, unchecked."""
        place, size, filter_mask = self._places[row].tolist()
        data = os.pread(file.number, size, place)
        return Packed(data, filter_mask, int(self._checksums[row]))

    def read(self, row: int, file: Descriptor) -> np.ndarray:
        """An image, `[bands, height, width]`; it may be read-only.

        Args:
            row: where in this part.
            file: the part, open.

        Raises:
            DataError: it is damaged; the next writer is told.
        """
        try:
            return unpack(self.packed(row, file), self._form)
        except DamagedImageError as error:
            raise damaged(self.path, f'of the image of pair {self.ids[row]}, {error}') from error

    def is_whole(self) -> bool:
        """Whether all images are what was written."""
        file = Descriptor(self.path)
        for row in range(len(self)):
            try:
                unpack(self.packed(row, file), self._form)
            except DamagedImageError:
                return False
        return True


def write_part(
    directory: Path, form: ChunkForm, images: Iterable[tuple[int, Packed]], most: int
) -> Path | None:
    """Write a file of images; it is there when all of it is on the disk.

    Args:
        directory: where to.
        form: of all images.
        images: each with the id of its pair.
        most: how many come at most.

    Returns:
        Where it is, or None if there came no image.
    """
    ids: list[int] = []
    checksums: list[int] = []
    with new_hdf5(directory) as new:
        dataset = new.file.create_dataset(
            'images',
            (most, *form.shape),
            form.stored_dtype,
            maxshape=(most, *form.shape),
            chunks=(1, *form.shape),
            shuffle=form.is_shuffled,
            compression='gzip',
            compression_opts=_GZIP_LEVEL,
        )
        for row, (pair_id, packed) in enumerate(images):
            dataset.id.write_direct_chunk((row, 0, 0, 0), packed.data, packed.filter_mask)
            new.check()
            ids.append(pair_id)
            checksums.append(packed.checksum)
        if not ids:
            return None
        dataset.resize(len(ids), axis=0)
        new.file.create_dataset('ids', data=np.array(ids, np.int64), fletcher32=True)
        new.file.create_dataset('checksums', data=np.array(checksums, np.uint32), fletcher32=True)
        new.name = f'images-{min(ids)}-{len(ids)}-{secrets.token_hex(4)}.h5'
    return directory / new.name


def list_parts(directory: Path, with_damaged: bool = False) -> list[Path]:
    """All files of images, those that hold most first.

    Args:
        directory: of the cache.
        with_damaged: also those that were found damaged.
    """
    found = [
        (-int(match[2]), path.name, path)
        for path in directory.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (with_damaged or not is_marked(path))
    ]
    return [path for _, _, path in sorted(found)]


def place(ids: NDArray[np.int64], parts: list[Part]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Where the images of pairs are.

    Args:
        ids: of the pairs.
        parts: files; where two hold an image, the first counts.

    Returns:
        `[n]` numbers of parts and `[n]` rows in them, both -1 where no part holds the image.
    """
    numbers = np.full(len(ids), -1, np.int32)
    rows = np.full(len(ids), -1, np.int32)
    if not parts:
        return numbers, rows
    held = np.concatenate([part.ids for part in parts])
    of_part = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    of_row = np.concatenate([np.arange(len(part)) for part in parts])
    order = np.argsort(held, kind='stable')
    found = np.searchsorted(held[order], ids)
    found[found == len(held)] = 0
    first = order[found]
    is_there = held[first] == ids
    numbers[is_there] = of_part[first[is_there]]
    rows[is_there] = of_row[first[is_there]]
    return numbers, rows
