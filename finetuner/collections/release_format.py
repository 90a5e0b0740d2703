"""What is in a release of a collection: names of its files, labels as JSON, images as GeoTIFF.

<name>-<version>/
    bounds.geojson             where the images are, in degrees
    images/<group>/<id>.tif    pixels, transform and coordinate system
    labels/<group>/<id>.json   see `label_document`
    meta.json                  what the collection is, and the hash and size of every other file
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from finetuner.collections.geometry import Frame
from finetuner.collections.labels import LabelKind, MaskLabels
from finetuner.collections.records import CollectionRecord, PairRecord
from finetuner.collections.systems import system_of
from finetuner.excepts import ConfigError, DataError

FORMAT = 'finetuner-collection'
FORMAT_REVISION = 1
META, BOUNDS, IMAGES, LABELS = 'meta.json', 'bounds.geojson', 'images', 'labels'
# of a folder: many file systems take 255 bytes
_MOST_LETTERS = 100
_VERSION = re.compile(r'[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}')


def check_version(version: Any) -> str:
    """The name of a version, which is part of names of files.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise ConfigError(
            f'version={version!r:.120}: it takes letters, digits and . _ - (no dot first), at most 100'
        )
    return version


def archive_path(path: str | os.PathLike[str], name: str, version: str) -> Path:
    """Where an archive is written to.

    Args:
        path: that was asked for: of a file, or of a directory that is there.
        name: of the collection, as it was released.
        version: of the release, checked.

    Raises:
        ConfigError: the folder of the file is not there.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        return target / f'{folder_of(name)}-{version}.tar'
    if not target.parent.is_dir():
        raise ConfigError(f'there is no folder {str(target.parent)!r}: make it first')
    return target


def folder_of(name: str) -> str:
    """A group's or a collection's name as the name of a folder; no two groups have the same."""
    found = quote(name, safe='').replace('~', '%7E')
    if not found.startswith('.') and len(found) <= _MOST_LETTERS:
        return found
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f'{re.sub("[^A-Za-z0-9_-]", "_", name)[:60]}~{digest}'


def label_document(pair: PairRecord, collection: CollectionRecord) -> dict[str, Any]:
    """A label as JSON holds it.

    `label` is, for classification, zeros and ones in the order of `classes`; for object detection, for
    each class its boxes `[minx, miny, maxx, maxy]` in pixels; for segmentation, for each class that is
    there its pixels as uncompressed run lengths as in COCO: `{class: {"size": [height, width],
    "counts": [...]}}`, where `counts` are lengths of runs of pixels without and with the class in
    turn, down the columns, the left one first. `transform` and `crs` say where the image lies, see
    `Frame`; null where it is on no map.
    """
    kind = collection.kind
    label = kind.decode(pair.label, pair.frame)
    shown = runs_of(label, kind.classes) if isinstance(kind, MaskLabels) else kind.as_json(label)
    return {
        'id': pair.id,
        'group': pair.group,
        'mlType': collection.mltype,
        'label': shown,
        'classes': list(collection.classes),
        'transform': None if pair.frame.transform is None else list(pair.frame.transform),
        'crs': pair.frame.crs,
    }


def label_of_document(document: Mapping[str, Any], kind: LabelKind, frame: Frame) -> Any:
    """The label that `label_document` wrote, in a form that is fed.

    Raises:
        DataError: it is none.
    """
    label = document.get('label')
    if isinstance(kind, MaskLabels):
        return mask_of(label, kind, frame)
    if not isinstance(label, list):
        raise DataError(f'its label is {str(label)[:60]!r}: for {kind.mltype} it is a list')
    return label


def runs_of(mask: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """The pixels of each class in a mask `[height, width]` as run lengths; see `label_document`."""
    values = mask.T.ravel()
    found = {}
    for value in np.unique(values[values > 0]).tolist():
        # the first run is of pixels without the class, and may have none
        is_it = np.concatenate([[False], values == value])
        starts = np.flatnonzero(is_it[1:] != is_it[:-1])
        counts = np.diff(np.concatenate([[0], starts, [len(values)]]))
        found[classes[value - 1]] = {'size': list(mask.shape), 'counts': counts.tolist()}
    return found


def mask_of(runs: Any, kind: MaskLabels, frame: Frame) -> np.ndarray:
    """The mask that `runs_of` made run lengths of, uint8 `[height, width]`.

    Raises:
        DataError: these are none of such a mask.
    """
    expected = (
        'its label is no mask: it takes {class: {"size": [height, width], "counts": [...]}} with '
        f'size [{frame.height}, {frame.width}]'
    )
    if not isinstance(runs, Mapping):
        raise DataError(f'{expected}, not {str(runs)[:60]!r}')
    mask = np.zeros(frame.height * frame.width, np.uint8)
    for name, given in runs.items():
        value = kind.index_of(name) + 1
        counts = given.get('counts') if isinstance(given, Mapping) else None
        if not isinstance(counts, list) or given['size'] != [frame.height, frame.width]:
            raise DataError(f'{expected}, not {str(given)[:60]!r}')
        if any(type(count) is not int or count < 0 for count in counts) or sum(counts) != mask.size:
            raise DataError(f'{expected}: the counts of {name!r} do not make {mask.size}')
        mask[np.repeat(np.arange(len(counts)) % 2 == 1, counts)] = value
    return mask.reshape(frame.width, frame.height).T


def tiff_dtype(dtype: str) -> str:
    """The dtype in which a GeoTIFF holds pixels without loss.

    Raises:
        DataError: there is none.
    """
    # GDAL 3.10 does not know halves of floats
    name = 'float32' if dtype == 'float16' else dtype
    if np.dtype(name).itemsize > 8:
        raise DataError(f'images of {dtype} have no place in a GeoTIFF: feed them as float64')
    return name


def tiff_of(pixels: np.ndarray, frame: Frame) -> bytes:
    """The GeoTIFF of an image `[bands, height, width]`: lossless, the same bytes each time."""
    from affine import Affine
    from rasterio.io import MemoryFile

    # there is no place on a map to tell of
    for message in ('Dataset has no geotransform', 'The given matrix is equal to Affine.identity'):
        warnings.filterwarnings('ignore', message, module=r'rasterio\.io')
    dtype = tiff_dtype(pixels.dtype.name)
    bands, height, width = pixels.shape
    options: dict[str, Any] = {}
    if frame.transform is not None:
        options['transform'] = Affine(*frame.transform)
    if frame.crs is not None:
        # a system of its own, which the label's file tells
        with suppress(ConfigError):
            options['crs'] = system_of(frame.crs)
    with MemoryFile() as file:
        with file.open(
            driver='GTiff',
            count=bands,
            height=height,
            width=width,
            dtype=dtype,
            compress='deflate',
            num_threads=1,
            **options,
        ) as dataset:
            dataset.write(pixels.astype(dtype, copy=False))
        return bytes(file.read())


def footprint_of(frame: Frame) -> dict[str, Any] | None:
    """The corners of an image as a GeoJSON polygon in degrees; None where it is on no map.

    Across the 180th meridian its longitudes go on beyond 180, so that it does not go round the earth.
    """
    from rasterio.errors import RasterioError
    from rasterio.warp import transform

    from finetuner.collections.raster_formats import gdal_errors

    if frame.transform is None or frame.crs is None:
        return None
    corners = ((0, 0), (0, frame.height), (frame.width, frame.height), (frame.width, 0))
    xs, ys = zip(*(frame.to_map(column, row) for column, row in corners), strict=True)
    try:
        east, north = transform(system_of(frame.crs), 'EPSG:4326', xs, ys)[:2]
    except (ValueError, RasterioError, *gdal_errors()):  # a system of its own
        return None
    places = np.array([east, north]).T
    if not np.isfinite(places).all():
        return None
    if np.ptp(places[:, 0]) > 180:
        places[places[:, 0] < 0, 0] += 360
    ring = places.tolist()
    return {'type': 'Polygon', 'coordinates': [[*ring, ring[0]]]}
