"""Collections made of releases: what `TrainingSet.release` wrote, checked as what comes from outside."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.collections.geometry import Frame
from finetuner.collections.labels import build_label_kind
from finetuner.collections.raster import Raster
from finetuner.collections.release_format import (
    BOUNDS,
    FORMAT,
    FORMAT_REVISION,
    IMAGES,
    LABELS,
    META,
    folder_of,
    label_of_document,
    tiff_dtype,
)
from finetuner.collections.spec import CollectionSpec, check_group, check_sensors
from finetuner.collections.tiles import ImageForm, PlacedImage
from finetuner.collections.training_set import TrainingSet
from finetuner.excepts import ConfigError, DataError
from finetuner.storage.archives import Members, open_members

# the most that such files can have: hashes of a million files, and a label of any mask
_MOST_META = 512 << 20
_MOST_LABEL = 64 << 20
_MOST_BOUNDS = 1 << 30
# of an image: a file of a few bytes can say that it is of any size
_MOST_IMAGE = 1 << 30
_NUMBERS = 6


def create_from_archive(path: str | os.PathLike[str], name: str | None = None) -> TrainingSet:
    """Take the release of a collection: an archive that `TrainingSet.download_release` wrote.

    Pairs come in the order of their numbers, in the groups in which they were; they get new numbers.

    Args:
        path: of a tar, a tar.gz, a zip, or the folder that one was unpacked into. Links in it, paths
            that leave it, and what unpacks to too much are refused. Nothing is written but one
            image at a time, and the tar of a tar.gz, as temporary files.
        name: of the collection; None takes that of the release.

    Returns:
        The collection, its pairs fed and not saved.

    Raises:
        ConfigError: the name is none.
        DataError: it is no such archive, or a file in it is missing, of another hash, or not what
            it should be; says which.
    """
    source = Path(os.path.expanduser(path))
    if not source.exists():
        raise DataError(f'there is no file or folder {str(source)!r}')
    with open_members(source) as members:
        return _Release(members, source.name).collection(name)


@dataclass(frozen=True)
class _Pair:
    number: int
    group_folder: str


class _Release:
    """An opened release.

    Args:
        members: its files.
        shown: what errors call it.
    """

    def __init__(self, members: Members, shown: str) -> None:
        self._members = members
        self._shown = shown
        self._root = self._found_root()
        self._meta = self._read_meta()
        self._hashes: Mapping[str, Any] = self._meta['files']
        self._sensors = self._read_sensors()
        self._check_files()

    def collection(self, name: str | None) -> TrainingSet:
        """The collection, its pairs fed."""
        spec, form = self._spec()
        if name is not None:
            spec = replace(spec, name=name)
        pairs = self._pairs()
        if pairs and (form is None or spec.classes is None):
            raise DataError(
                f'{self._shown}: {META} tells no shape, dtype and classes of its images'
            )
        # groups and classes are as they were; what comes later is divided and grows as before
        made = TrainingSet(
            spec.name, spec.mltype, spec.tile_size, spec.classes, None, spec.description
        )
        try:
            if form is not None:
                self._feed(made, pairs, form)
        except DataError:
            made.remove()
            raise
        fixed = self._meta['data'].get('has_fixed_classes') is not False
        made._spec = replace(spec, classes=spec.classes if fixed else None)
        return made

    def _found_root(self) -> str:
        split = [path.split('/') for path in self._members.sizes if path.endswith(META)]
        roots = ['/'.join([*parts[:-1], '']) for parts in split if parts[-1] == META]
        roots = [root for root in roots if root.count('/') <= 1]
        if len(roots) != 1:
            raise DataError(
                f'{self._shown} is no release of a collection, or incomplete: {META} is not in '
                'it, or not in the one folder that all files are in'
            )
        return roots[0]

    def _read_meta(self) -> dict[str, Any]:
        meta = self._json(META, self._members.read(self._root + META, _MOST_META))
        if meta.get('format') != FORMAT or not isinstance(meta.get('files'), dict):
            raise DataError(f'{self._shown} is no release of a collection: {META} does not say so')
        if meta.get('format_revision') != FORMAT_REVISION:
            raise DataError(
                f'{self._shown} is of format_revision {str(meta.get("format_revision"))[:20]}, and '
                f'{FORMAT_REVISION} is read here: take the finetuner that wrote it, or a newer one'
            )
        if not isinstance(meta.get('data'), dict):
            raise DataError(f'{self._shown}: {META} has no `data`, which describes the collection')
        return meta

    def _check_files(self) -> None:
        expected = {f'{self._root}{name}' for name in (*self._hashes, META)}
        for path in sorted(expected ^ set(self._members.sizes)):
            what = 'is missing' if path in expected else f'is there and not in its {META}'
            raise DataError(f'{self._shown} is incomplete or was changed: {path!r} {what}')
        if BOUNDS in self._hashes:
            self._read(BOUNDS, _MOST_BOUNDS)

    def _read(self, name: str, most: int) -> bytes:
        data = self._members.read(self._root + name, most)
        known = self._hashes[name]
        is_known = isinstance(known, dict) and known.get('size') == len(data)
        if not is_known or known.get('sha256') != hashlib.sha256(data).hexdigest():
            raise DataError(f'{self._shown}: {name!r} was changed: its hash is not that in {META}')
        return data

    def _read_sensors(self) -> tuple[str, ...]:
        given = self._meta['data'].get('sensors') or []
        if not isinstance(given, list):
            raise DataError(f'{self._shown}: {META} has `sensors` that are no list')
        try:
            return tuple(check_sensors(given))
        except DataError as error:
            raise DataError(f'{self._shown}: {META}: {error}') from error

    def _json(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{self._shown}: {name!r} is no JSON: {error}') from error
        if not isinstance(found, dict):
            raise DataError(f'{self._shown}: {name!r} is no JSON object')
        return found

    def _spec(self) -> tuple[CollectionSpec, ImageForm | None]:
        data = self._meta['data']
        try:
            spec = CollectionSpec.checked(
                data.get('name'),
                data.get('mlType'),
                data.get('tile_size'),
                data.get('classes') or None,
                data.get('partition'),
                data.get('description', ''),
            )
        except (ConfigError, TypeError) as error:
            raise DataError(f'{self._shown}: {META} describes no collection: {error}') from error
        if data.get('dtype') is None:
            return spec, None
        try:
            bands, height, width = data['shape']
            form = ImageForm((int(bands), int(height), int(width)), np.dtype(data['dtype']).name)
            tiff_dtype(form.dtype)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f'{self._shown}: {META} tells no shape and dtype: {error}') from error
        if form.shape[1:] != spec.tile_size or form.shape[0] < 1:
            raise DataError(f'{self._shown}: {META} has a shape that is not its tile_size')
        if form.num_bytes > _MOST_IMAGE:
            raise DataError(
                f'{self._shown}: its images of {list(form.shape)} take {form.num_bytes:,} bytes, and '
                f'at most {_MOST_IMAGE:,} are read'
            )
        return spec, form

    def _pairs(self) -> list[_Pair]:
        """What is in it, in the order in which it was fed."""
        found, images = [], set()
        for name in self._hashes:
            kind, *folders = name.split('/')
            stem, suffix = os.path.splitext(folders.pop() if folders else '')
            is_pair = len(folders) == 1 and stem.isascii() and stem.isdecimal()
            if is_pair and (kind, suffix) == (LABELS, '.json'):
                found.append(_Pair(int(stem), folders[0]))
            elif is_pair and (kind, suffix) == (IMAGES, '.tif'):
                images.add(_Pair(int(stem), folders[0]))
            elif name != BOUNDS:
                raise DataError(f'{self._shown}: {name!r} is no file of a release')
        for pair in sorted(images ^ set(found), key=lambda pair: pair.number):
            raise DataError(
                f'{self._shown}: pair {pair.number} of {pair.group_folder!r} has '
                f'{"no label" if pair in images else "no image"}'
            )
        return sorted(found, key=lambda pair: pair.number)

    def _feed(self, made: TrainingSet, pairs: list[_Pair], form: ImageForm) -> None:
        with tempfile.TemporaryDirectory() as directory:
            for pair in pairs:
                label_name = f'{LABELS}/{pair.group_folder}/{pair.number}.json'
                try:
                    document = self._json(label_name, self._read(label_name, _MOST_LABEL))
                    group = self._check_label(document, pair, made)
                    image, frame = self._image(document, pair, form, Path(directory))
                    kind = build_label_kind(made.mltype, made.classes)
                    label = label_of_document(document, kind, frame)
                    made.feed([(image, label)], group)
                except (DataError, ConfigError) as error:
                    raise DataError(f'{self._shown}: {label_name!r}: {error}') from error

    def _check_label(self, document: dict[str, Any], pair: _Pair, made: TrainingSet) -> str:
        expected = {'id': pair.number, 'mlType': made.mltype, 'classes': made.classes}
        for key, value in expected.items():
            if document.get(key) != value:
                raise DataError(
                    f'its {key!r} is {str(document.get(key))[:60]}, not {str(value)[:60]}'
                )
        group = check_group(document.get('group'))
        if folder_of(group) != pair.group_folder:
            raise DataError(f'its group {group[:60]!r} is not that of its folder')
        return group

    def _image(
        self, document: dict[str, Any], pair: _Pair, form: ImageForm, directory: Path
    ) -> tuple[Any, Frame]:
        name = f'{IMAGES}/{pair.group_folder}/{pair.number}.tif'
        path = directory / f'{pair.number}.tif'
        path.write_bytes(self._read(name, 2 * form.num_bytes + (1 << 20)))
        try:
            with Raster(path) as raster:
                if raster.shape != form.shape or raster.dtype != tiff_dtype(form.dtype):
                    raise DataError(
                        f'its image is {list(raster.shape)} of {raster.dtype}, and those of the '
                        f'collection are {list(form.shape)} of {form.dtype}'
                    )
                pixels = raster.window(0, 0, *form.shape[1:]).read().astype(form.dtype, copy=False)
                frame = raster.frame
        except DataError as error:
            raise DataError(str(error).replace(str(path), name)) from error
        finally:
            path.unlink()
        if 'transform' in document:
            frame = _frame_of(document, frame)
        if frame.transform is None and not self._sensors:
            return pixels, frame
        return PlacedImage(pixels, frame, self._sensors), frame


def _frame_of(document: Mapping[str, Any], frame: Frame) -> Frame:
    transform, crs = document['transform'], document.get('crs')
    if transform is not None:
        is_list = isinstance(transform, list) and len(transform) == _NUMBERS
        if not is_list or any(type(number) not in (int, float) for number in transform):
            raise DataError(f'its transform {str(transform)[:60]} is no list of six numbers')
        transform = tuple(map(float, transform))
    if crs is not None and not isinstance(crs, str):
        raise DataError(f'its crs {str(crs)[:60]} is no text')
    return Frame(frame.height, frame.width, transform, crs)
