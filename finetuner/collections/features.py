"""GeoJSON as people have it: the classes of its features, and where on an image they are."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetuner.collections.burning import check_geometry
from finetuner.collections.geometry import Bounds, Frame
from finetuner.collections.labels.masks import features_of, is_features
from finetuner.collections.systems import system_of
from finetuner.excepts import ConfigError, DataError, unknown_name

_LOGGER = logging.getLogger(__name__)
# coordinates of GeoJSON without another word: longitude, latitude
_DEGREES = 'OGC:CRS84'

GeoJson = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def read_geojson(geojson: GeoJson) -> tuple[list[Mapping[str, Any]], str | None]:
    """The features of GeoJSON, and the coordinate system that it names.

    Args:
        geojson: the path of a file, a FeatureCollection, a feature, or a list of features.

    Raises:
        DataError: it is none, or holds no features.
    """
    if isinstance(geojson, str | os.PathLike):
        geojson = _parsed(Path(geojson).expanduser())
    if not isinstance(geojson, Mapping) and not (geojson and is_features(geojson)):
        raise DataError(
            f'{str(geojson)[:80]!r} is no GeoJSON: it takes a FeatureCollection, a feature, a list '
            'of features, or the path of a file that holds one'
        )
    found = features_of(geojson)
    for position, feature in enumerate(found):
        if feature.get('type') != 'Feature':
            raise DataError(
                f'feature {position} is of type {feature.get("type")!r}: it takes '
                "{'type': 'Feature', 'geometry': ..., 'properties': ...}"
            )
    if not found:
        raise DataError('the GeoJSON holds no features: there is nothing to make labels of')
    return found, _named_system(geojson) if isinstance(geojson, Mapping) else None


def class_names(
    features: Sequence[Mapping[str, Any]],
    label_field: str | None,
    default_label: str | None,
    classes: Sequence[str] | None,
) -> list[str]:
    """The class of each feature.

    Args:
        features: of the GeoJSON.
        label_field: property that names it; None is `label`.
        default_label: of features without it.
        classes: those that there are; None takes any.

    Raises:
        DataError: a feature has none, or one that is not there.
    """
    field = 'label' if label_field is None else label_field
    found = []
    for position, feature in enumerate(features):
        properties = feature.get('properties')
        name = properties.get(field) if isinstance(properties, Mapping) else None
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if name is None or name == '':
            name = default_label
        if not isinstance(name, str) or not name:
            raise DataError(
                f'feature {position} has no class ({field!r} is {str(name)[:40]!r}): its property '
                f'{field!r} names it; label_field=... takes another property, and '
                'default_label=... is the class of features without it'
            )
        if classes is not None and name not in classes:
            raise DataError(f'feature {position}: {unknown_name("class", name, classes)}')
        found.append(name)
    return found


def geometries_on(
    frame: Frame, geometries: Sequence[Any], system: str | None
) -> list[Mapping[str, Any]]:
    """Geometries in the projected units of an image.

    Those that are said to be in another system are brought into the image's. So are those of which
    nothing is said, where they can only be longitudes and latitudes (as GeoJSON has them by its
    standard): all are in range, none is near the image, and as degrees they are on it.

    Args:
        frame: of the image.
        geometries: as the GeoJSON has them.
        system: that it names.

    Raises:
        DataError: one of them is no geometry, or nowhere in the system of the image.
    """
    for position, geometry in enumerate(geometries):
        try:
            check_geometry(geometry)
        except ValueError as error:
            raise DataError(no_geometry(position, error)) from error
    if frame.crs is None:
        return list(geometries)
    if system is not None:
        return _moved(geometries, system, frame.crs)
    if _are_degrees(_bounds(geometries)) and not _is_geographic(frame.crs):
        if _meet(_bounds(geometries), frame.bounds):
            return list(geometries)
        try:
            moved = _moved(geometries, _DEGREES, frame.crs)
        except DataError:
            return list(geometries)
        if _meet(_bounds(moved), frame.bounds):
            _LOGGER.info('the GeoJSON is in degrees and was brought into %s', frame.crs[:40])
            return moved
    return list(geometries)


def no_geometry(position: int, reason: object) -> str:
    """What is said of a feature that is nowhere."""
    return (
        f'feature {position} has no GeoJSON geometry ({reason}): it takes Point, LineString, '
        'Polygon, their Multi-forms or a GeometryCollection'
    )


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f'{str(path)!r} cannot be opened: {error.strerror}') from error
    except (ValueError, RecursionError) as error:
        raise DataError(f'{str(path)!r} is no GeoJSON: {error}') from error


def _named_system(geojson: Mapping[str, Any]) -> str | None:
    """What the member `crs` of GeoJSON before RFC 7946 says."""
    given = geojson.get('crs')
    if given is None:
        return None
    properties = given.get('properties') if isinstance(given, Mapping) else None
    name = properties.get('name') if isinstance(properties, Mapping) else None
    if not isinstance(name, str):
        raise DataError(
            f'crs={str(given)[:80]}: it takes {{"type": "name", "properties": {{"name": ...}}}}, '
            'or leave it out'
        )
    return name


def _moved(geometries: Sequence[Any], source: str, target: str) -> list[Mapping[str, Any]]:
    from rasterio import Env
    from rasterio.warp import transform_geom

    from finetuner.collections.raster_formats import gdal_errors

    try:
        known, wanted = system_of(source), system_of(target)
    except ConfigError as error:
        raise DataError(
            f'the GeoJSON names the coordinate system {source[:80]!r}, the image '
            f'{target[:80]!r}: one of them is not known ({error})'
        ) from error
    with Env():
        if known == wanted:
            return list(geometries)
        try:
            moved = transform_geom(known, wanted, list(geometries))
        except gdal_errors() as error:
            raise DataError(
                f'the features cannot be brought from {source[:80]!r} into the system of the '
                f'image: {error}'
            ) from error
    if not all(map(math.isfinite, _bounds(moved))):
        raise DataError(f"features in {source[:80]!r} are out of the range of the image's system")
    return moved


def _is_geographic(crs: str) -> bool:
    try:
        return bool(system_of(crs).is_geographic)
    except ConfigError:
        return True


def _bounds(geometries: Sequence[Any]) -> Bounds:
    xs, ys = [], []
    for geometry in geometries:
        for x, y in _places(geometry):
            xs.append(x)
            ys.append(y)
    if not xs:
        return math.inf, math.inf, -math.inf, -math.inf
    return min(xs), min(ys), max(xs), max(ys)


def _places(geometry: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    if geometry['type'] == 'GeometryCollection':
        for each in geometry['geometries']:
            yield from _places(each)
        return
    waiting = [geometry['coordinates']]
    while waiting:
        coordinates = waiting.pop()
        if coordinates and not isinstance(coordinates[0], Sequence):
            yield coordinates[0], coordinates[1]
        else:
            waiting.extend(coordinates)


def _are_degrees(bounds: Bounds) -> bool:
    minx, miny, maxx, maxy = bounds
    return -180 <= minx <= maxx <= 180 and -90 <= miny <= maxy <= 90


def _meet(one: Bounds, other: Bounds) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def check_choice(what: str, value: Any, choices: Sequence[str]) -> str:
    """One of several words; ConfigError for any other."""
    if value not in choices:
        raise ConfigError(unknown_name(what, value, choices))
    return str(value)
