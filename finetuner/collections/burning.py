"""Shapes drawn into masks, whatever shapes come: checked, and with a bound on the time it takes.

GDAL holds Python's lock while it draws, follows a line pixel by pixel however far outside of the
image it goes, and takes what is no number for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuner.collections.geometry import Frame
from finetuner.excepts import DataError

_COLLECTION = 'GeometryCollection'
# collections within one another
_DEEPEST = 10
_POINT, _LINE, _AREA = 'point', 'line', 'area'
# nanoseconds of GDAL: for each row and each corner, for each row that a side crosses, for each pixel
_A_CORNER, _A_SIDE, _A_PIXEL, _A_STEP = 1.5, 30.0, 0.5, 5.0
_MOST_NANOSECONDS = 2e9
# nobody else gets on meanwhile
_AT_ONCE = 5e7
# pixels from the image; beyond that nothing can be reckoned exactly
_FARTHEST = 1e15
# a line is followed so many images far outside of its image
_REACH = 4


@dataclass(frozen=True)
class _Shape:
    """A point, line or area of a geometry.

    Attributes:
        kind: which of these.
        paths: of places on the map, `[n, 2]` each; of an area its outline and its holes.
    """

    kind: str
    paths: list[np.ndarray]

    @property
    def geometry(self) -> dict[str, Any]:
        """As GeoJSON."""
        places = [path.tolist() for path in self.paths]
        if self.kind == _AREA:
            return {'type': 'Polygon', 'coordinates': places}
        if self.kind == _POINT:
            return {'type': 'MultiPoint', 'coordinates': places[0]}
        return {'type': 'MultiLineString', 'coordinates': places}


def burn(shapes: Iterable[tuple[Any, int]], frame: Frame) -> np.ndarray:
    """Draw geometries into a mask; a pixel is inside where its centre is (GDAL's rasterize).

    Args:
        shapes: GeoJSON geometries in the projected units of the image, each with its value.
        frame: of the image. What lies outside of it is cut off.

    Returns:
        uint8 `[height, width]`, 0 where nothing is, else the value of the last geometry there.

    Raises:
        DataError: a geometry is none, or they would take too long to draw.
    """
    mask = np.zeros((frame.height, frame.width), np.uint8)
    waiting: list[tuple[dict[str, Any], int]] = []
    total = held = 0.0
    for position, (geometry, value) in enumerate(shapes):
        try:
            found = list(_shapes_of(geometry))
        except ValueError as error:
            raise DataError(
                f'feature {position} has no GeoJSON geometry ({error}): it takes Point, LineString, '
                'Polygon, their Multi-forms or a GeometryCollection, with `coordinates` of numbers'
            ) from error
        for shape in found:
            near, cost = _near(shape, frame, position)
            total += cost
            if total > _MOST_NANOSECONDS:
                raise DataError(
                    f'the features up to {position} take too long to draw: cut them off at the '
                    'image, simplify them, or give a mask'
                )
            if held + cost > _AT_ONCE:
                _draw(waiting, mask, frame, held)
                waiting, held = [], 0.0
            if near is not None:
                waiting.append((near.geometry, value))
                held += cost
    _draw(waiting, mask, frame, held)
    return mask


def check_geometry(geometry: Any) -> None:
    """Refuse what is no GeoJSON geometry; whether a polygon crosses itself is not looked at.

    Raises:
        ValueError: it is none.
    """
    for _ in _shapes_of(geometry):
        pass


def _draw(
    shapes: list[tuple[dict[str, Any], int]], mask: np.ndarray, frame: Frame, cost: float
) -> None:
    """Draw what is checked, some rows at a time where that takes long."""
    from affine import Affine
    from rasterio.features import rasterize

    if not shapes:
        return
    whole = Affine.identity() if frame.transform is None else Affine(*frame.transform)
    step = math.ceil(frame.height / max(1, math.ceil(cost / _AT_ONCE)))
    for top in range(0, frame.height, step):
        transform = whole @ Affine.translation(0, top) if top else whole
        rasterize(shapes, out=mask[top : top + step], transform=transform)


def _near(shape: _Shape, frame: Frame, position: int) -> tuple[_Shape | None, float]:
    """What of a shape is to be drawn, and how many nanoseconds that takes."""
    pixels = [_to_pixels(path, frame) for path in shape.paths]
    if not all((np.abs(path) <= _FARTHEST).all() for path in pixels):
        raise DataError(f'feature {position} is out of all range')
    if shape.kind == _POINT:
        return shape, _A_SIDE * len(pixels[0])
    if shape.kind == _AREA:
        return shape, _cost_of_area(pixels, frame)
    reach = _REACH * max(frame.height, frame.width)
    low, high = np.array([-reach, -reach]), np.array([frame.width, frame.height]) + reach
    if any((path < low).any() or (path > high).any() for path in pixels):
        pieces = [piece for path in pixels for piece in _clipped(path, low, high)]
        if not pieces:
            return None, 0.0
        shape, pixels = _Shape(_LINE, [_to_map(piece, frame) for piece in pieces]), pieces
    steps = sum(np.abs(np.diff(path, axis=0)).max(axis=1).sum() for path in pixels)
    return shape, _A_STEP * steps + _A_SIDE * sum(map(len, pixels))


def _cost_of_area(pixels: Sequence[np.ndarray], frame: Frame) -> float:
    size = np.array([frame.width, frame.height])
    corners = np.concatenate(pixels)
    covered = np.clip(corners.max(axis=0), 0, size) - np.clip(corners.min(axis=0), 0, size)
    crossed = sum(
        float(np.abs(np.diff(np.clip(path[:, 1], 0, frame.height))).sum()) for path in pixels
    )
    rows = float(covered[1]) + 1
    area = float(covered[0] * covered[1])
    return _A_CORNER * len(corners) * rows + _A_SIDE * crossed + _A_PIXEL * area


def _clipped(path: np.ndarray, low: np.ndarray, high: np.ndarray) -> Iterator[np.ndarray]:
    """The parts of a line's sides that lie in a box, two places each (Liang and Barsky)."""
    start, step = path[:-1], np.diff(path, axis=0)
    with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
        one, other = (low - start) / step, (high - start) / step
    is_still = step == 0
    is_in = (start >= low) & (start <= high)
    first = np.where(is_still, np.where(is_in, -np.inf, np.inf), np.fmin(one, other))
    last = np.where(is_still, np.where(is_in, np.inf, -np.inf), np.fmax(one, other))
    begin = np.maximum(first.max(axis=1), 0)[:, None]
    end = np.minimum(last.min(axis=1), 1)[:, None]
    passes = (begin <= end)[:, 0]
    for left, right in zip(
        (start + begin * step)[passes], (start + end * step)[passes], strict=True
    ):
        yield np.stack([left, right])


def _to_pixels(path: np.ndarray, frame: Frame) -> np.ndarray:
    with np.errstate(over='ignore', invalid='ignore'):
        columns, rows = frame.to_pixels(path[:, 0], path[:, 1])  # type: ignore[arg-type]
    return np.stack([columns, rows], axis=1)


def _to_map(path: np.ndarray, frame: Frame) -> np.ndarray:
    xs, ys = frame.to_map(path[:, 0], path[:, 1])  # type: ignore[arg-type]
    return np.stack([xs, ys], axis=1)


def _shapes_of(geometry: Any) -> Iterator[_Shape]:
    """The points, lines and areas of a geometry; ValueError where it is none."""
    waiting = [(geometry, 0)]
    while waiting:
        one, depth = waiting.pop()
        if not isinstance(one, Mapping):
            raise ValueError('it is no JSON object')
        kind = one.get('type')
        if kind == _COLLECTION:
            members = _listed(one.get('geometries'), 'geometries')
            if depth >= _DEEPEST:
                raise ValueError(f'collections nest more than {_DEEPEST} deep')
            waiting += [(member, depth + 1) for member in reversed(members)]
        elif isinstance(kind, str) and kind in _READERS:
            yield from _READERS[kind](_listed(one.get('coordinates'), 'coordinates'))
        else:
            raise ValueError(f'its type is {str(kind)[:40]!r}')


def _listed(value: Any, name: str, least: int = 1) -> Sequence[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) < least:
        raise ValueError(f'its {name} are not {least} or more in a list')
    return value


def _path(places: Any, least: int) -> np.ndarray:
    """Places as `[n, 2]`; what they have beyond two numbers is left out."""
    given = _listed(places, 'coordinates', least)
    try:
        if any(isinstance(place, str) for place in given):
            raise TypeError
        # of three numbers and of two in one line
        found = np.array([place[:2] for place in given])
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError('its coordinates are no pairs of numbers') from error
    is_right = found.ndim == 2 and found.shape[1] == 2 and found.dtype.kind in 'iuf'
    if not is_right or not np.isfinite(found).all():
        raise ValueError('its coordinates are no pairs of finite numbers')
    return found.astype(np.float64)


def _each(kind: str, least: int) -> Callable[[Sequence[Any]], Iterator[_Shape]]:
    return lambda coordinates: iter([_Shape(kind, [_path(each, least) for each in coordinates])])


_READERS: Mapping[str, Callable[[Sequence[Any]], Iterator[_Shape]]] = {
    'Point': lambda place: iter([_Shape(_POINT, [_path([place], 1)])]),
    'MultiPoint': lambda places: iter([_Shape(_POINT, [_path(places, 1)])]),
    'LineString': lambda line: iter([_Shape(_LINE, [_path(line, 2)])]),
    'MultiLineString': _each(_LINE, 2),
    'LinearRing': lambda ring: iter([_Shape(_LINE, [_path(ring, 4)])]),
    'Polygon': _each(_AREA, 4),
    'MultiPolygon': lambda polygons: (
        _Shape(_AREA, [_path(ring, 4) for ring in _listed(polygon, 'coordinates')])
        for polygon in polygons
    ),
}
