"""Collections made of folders: one for each class, as pictures mostly lie on a disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.collections.draft import DEFAULT_GROUP
from finetuner.collections.geometry import Frame
from finetuner.collections.raster import Raster
from finetuner.collections.tiles import RASTER_SUFFIXES, PlacedImage, check_tile_size
from finetuner.collections.training_set import TrainingSet
from finetuner.data.contents import LABEL_TAG
from finetuner.data.folders import PICTURE_SUFFIXES, SPLITS, read_folder, split_folders
from finetuner.excepts import ConfigError, DataError
from finetuner.images import open_picture, read_uri, resize_pixels

_SUFFIXES = tuple(dict.fromkeys((*PICTURE_SUFFIXES, *RASTER_SUFFIXES)))
# what can be resized as it is; other numbers take the way over float64
_RESIZED = ('uint8', 'uint16', 'int16', 'float32', 'float64')


def create_from_folder(
    path: str | os.PathLike[str],
    name: str | None = None,
    tile_size: Sequence[int] | None = None,
    mltype: str = 'classification',
    resize: bool = False,
    group: str | None = None,
    partition: Sequence[float] | None = None,
    description: str = '',
) -> TrainingSet:
    """Take a folder of folders, each named by the class of the pictures and rasters in it.

    It may also hold a folder for each group (`train`, `test`, and `validate`, or `val`), with the folders
    of classes in these. Folders, and files in them, are taken in the order of their names, at any depth.
    Hidden files are skipped; other files that are no pictures by their names are skipped too, and a
    warning counts and names them.

    Args:
        path: of the folder.
        name: of the collection; None takes the folder's.
        tile_size: height and width of the images; None takes those of the first picture.
        mltype: `classification`: folders say nothing else.
        resize: bring pictures of another size to `tile_size`, without cropping: averaging areas where
            they shrink. Otherwise they are errors.
        group: that the pairs belong to, where the folders name no groups; None is `train`.
        partition: percentages for `train`, `validate` and `test`, see `TrainingSet`; not where the
            folders name groups.
        description: of the collection.

    Returns:
        The collection, its pairs fed and not saved; its classes are sorted by name.

    Raises:
        ConfigError: an argument is not what it may be.
        DataError: there is no such folder or it holds no pictures; or a file cannot be opened, or is of
            another size or form than the first: its path is told.
    """
    if mltype != 'classification':
        raise ConfigError(
            f"mltype={mltype!r}: folders name classes, which makes mltype='classification'; feed "
            'other labels to a TrainingSet'
        )
    root = os.path.abspath(os.path.expanduser(path))
    parts = _parts(root, group, partition)
    classes, first = _classes(parts)
    size = _size(first) if tile_size is None else check_tile_size(tile_size)
    name = name or Path(root).name
    made = TrainingSet(name, mltype, size, classes, partition, description)
    for folder, part in parts:
        _feed(made, folder, part, resize)
    return made


def _parts(root: str, group: str | None, partition: Any) -> list[tuple[str, str]]:
    """Folders of classes, and the group of each."""
    splits = split_folders(root, _SUFFIXES)
    if not splits:
        return [(root, DEFAULT_GROUP if group is None else group)]
    if group is not None or partition is not None:
        names = ', '.join(map(os.path.basename, splits))
        raise ConfigError(
            f'the folders in {root!r} ({names}) name groups already: leave out group=... and '
            'partition=..., or give one of the folders'
        )
    return [(folder, SPLITS[os.path.basename(folder).lower()]) for folder in splits]


def _classes(parts: Sequence[tuple[str, str]]) -> tuple[list[str], str]:
    """All classes, sorted, and the first picture."""
    found: set[str] = set()
    first = ''
    for folder, _ in parts:
        for doc in read_folder(folder, _SUFFIXES):
            if LABEL_TAG not in doc.tags:
                raise DataError(
                    f'the folder {folder!r} holds pictures and no folders of classes: put each '
                    'picture into a folder named by its class'
                )
            found.add(doc.tags[LABEL_TAG])
            first = first or doc.uri
    return sorted(found), first


def _feed(made: TrainingSet, folder: str, group: str, resize: bool) -> None:
    path = folder

    def pairs() -> Iterator[tuple[Any, str]]:
        nonlocal path
        for doc in read_folder(folder, _SUFFIXES):
            path = doc.uri
            yield _resized(path, made.tile_size) if resize else path, doc.tags[LABEL_TAG]

    try:
        made.feed(pairs(), group)
    except DataError as error:
        hint = '; resize=True resizes pictures' if ' x ' in str(error) and not resize else ''
        raise DataError(f'{path!r}: {error}{hint}') from error


def _is_raster(path: str) -> bool:
    return path.lower().endswith(RASTER_SUFFIXES)


def _size(path: str) -> tuple[int, int]:
    try:
        if not _is_raster(path):
            height, width = open_picture(read_uri(path)).shape[:2]
            return height, width
        with Raster(path) as raster:
            return raster.shape[1:]
    except DataError as error:
        raise DataError(f'{path!r}: {error}') from error


def _resized(path: str, size: Sequence[int]) -> Any:
    height, width = size
    if not _is_raster(path):
        data = read_uri(path)
        pixels = open_picture(data)
        is_right = pixels.shape[:2] == (height, width)
        return data if is_right else resize_pixels(pixels, height, width)
    with Raster(path) as raster:
        _, old_height, old_width = raster.shape
        pixels = raster.window(0, 0, old_height, old_width).read()
        if (old_height, old_width) != (height, width):
            pixels = np.stack([_resized_band(band, height, width) for band in pixels])
        frame = _resized_frame(raster.frame, height, width)
        return PlacedImage(pixels, frame, tuple(raster.sensors))


def _resized_band(band: np.ndarray, height: int, width: int) -> np.ndarray:
    if band.dtype.name in _RESIZED:
        return resize_pixels(band, height, width)
    found = resize_pixels(band.astype(np.float64), height, width)
    if band.dtype.kind != 'f':
        found = np.rint(found)
    return found.astype(band.dtype)


def _resized_frame(frame: Frame, height: int, width: int) -> Frame:
    if frame.transform is None:
        return Frame(height, width)
    a, b, c, d, e, f = frame.transform
    wider, higher = frame.width / width, frame.height / height
    return Frame(height, width, (a * wider, b * higher, c, d * wider, e * higher, f), frame.crs)
