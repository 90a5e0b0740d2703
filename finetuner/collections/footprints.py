"""Which tiles of a grid a shape lies in: exact for points, lines and polygons, with no more tests than needed.

Shapes are in units of tiles here: tile (row, column) is the square from (column, row) to
(column + 1, row + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuner.collections.geometry import Bounds, Frame

POINT, LINE, POLYGON = 'point', 'line', 'polygon'
# A place is rounded to so many decimals of a pixel: shapes that end where a tile does end there
# exactly, whatever arithmetic brought them.
DECIMALS = 6
# of a side that must pass through a tile
_SHARE = 1e-12


@dataclass(frozen=True)
class Grid:
    """Tiles side by side, from the upper left of an image; what is left over belongs to none.

    Attributes:
        frame: of the image.
        height: of a tile, in pixels.
        width: of a tile, in pixels.
    """

    frame: Frame
    height: int
    width: int

    @property
    def num_rows(self) -> int:
        """Tiles one below the other."""
        return self.frame.height // self.height

    @property
    def num_columns(self) -> int:
        """Tiles side by side."""
        return self.frame.width // self.width

    def to_tiles(self, coordinates: np.ndarray) -> np.ndarray:
        """Places on the map `[n, 2]` as places in the grid, `[n, 2]` in units of tiles."""
        columns, rows = self.frame.to_pixels(coordinates[:, 0], coordinates[:, 1])  # type: ignore[arg-type]
        pixels = np.round(np.stack([columns, rows], axis=1), DECIMALS)
        return pixels / (self.width, self.height)


@dataclass(frozen=True)
class Part:
    """A point, a line or a polygon of a shape.

    Attributes:
        kind: `POINT`, `LINE` or `POLYGON`.
        sides: `[n, 4]`, x and y of both ends; of a polygon those of all its rings.
    """

    kind: str
    sides: np.ndarray

    @property
    def bounds(self) -> Bounds:
        """`(minx, miny, maxx, maxy)`."""
        xs, ys = self.sides[:, 0::2], self.sides[:, 1::2]
        return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())

    def surrounds(self, x: float, y: float) -> bool:
        """Whether a place that is on no side is inside; holes are not."""
        x1, y1, x2, y2 = self.sides.T
        crosses = (y1 > y) != (y2 > y)
        x1, y1, x2, y2 = x1[crosses], y1[crosses], x2[crosses], y2[crosses]
        return bool(np.count_nonzero(x < x1 + (y - y1) / (y2 - y1) * (x2 - x1)) % 2)


def parts_of(geometry: Any, grid: Grid) -> list[Part]:
    """The parts of a GeoJSON geometry in the projected units of the image.

    Raises:
        ValueError: it is no geometry; so are KeyError and TypeError.
    """
    kind = geometry['type']
    if kind == 'GeometryCollection':
        found = [part for each in geometry['geometries'] for part in parts_of(each, grid)]
    elif kind in _READERS:
        found = _READERS[kind](geometry['coordinates'], grid)
    else:
        raise ValueError(f'there is no geometry of type {kind!r}')
    if not found:
        raise ValueError('it is empty')
    return found


def bounds_of(parts: Sequence[Part]) -> Bounds:
    """What holds several parts, `(minx, miny, maxx, maxy)` in units of tiles."""
    minx, miny, maxx, maxy = zip(*(part.bounds for part in parts), strict=True)
    return min(minx), min(miny), max(maxx), max(maxy)


def tiles_touched(parts: Sequence[Part], grid: Grid) -> set[tuple[int, int]]:
    """Rows and columns of the tiles that a shape lies in.

    A polygon lies in a tile where it covers some of its area, a line where some of its length is in
    it. A point, and what runs along the border of two tiles, lies in the right or the lower one.
    """
    return {(row, column) for part in parts for row, column, _ in _visited(part, grid)}


def tiles_covered(parts: Sequence[Part], grid: Grid) -> set[tuple[int, int]]:
    """Rows and columns of the tiles that are wholly in one of the polygons of a shape."""
    return {
        (row, column)
        for part in parts
        if part.kind == POLYGON
        for row, column, is_full in _visited(part, grid, is_exact=True)
        if is_full
    }


def _visited(part: Part, grid: Grid, is_exact: bool = False) -> Iterator[tuple[int, int, bool]]:
    """Row and column of each tile, and whether the part covers all of it."""
    minx, miny, maxx, maxy = part.bounds
    left, top = int(np.floor(minx)), int(np.floor(miny))
    right, bottom = max(int(np.ceil(maxx)), left + 1), max(int(np.ceil(maxy)), top + 1)
    if part.kind != POLYGON:
        # what ends on a border may belong to the tile behind it
        right, bottom = int(np.floor(maxx)) + 1, int(np.floor(maxy)) + 1
    is_alone = right - left == 1 and bottom - top == 1 and not is_exact
    block = max(left, 0), max(top, 0), min(right, grid.num_columns), min(bottom, grid.num_rows)
    if is_alone and block == (left, top, right, bottom):
        yield top, left, False
        return
    waiting = [(part.sides, block)]
    while waiting:
        sides, (left, top, right, bottom) = waiting.pop()
        if left >= right or top >= bottom:
            continue
        sides = sides[_passing(sides, left, top, right, bottom, part.kind == POLYGON)]
        if not len(sides):
            middle = (left + right) / 2, (top + bottom) / 2
            if part.kind == POLYGON and part.surrounds(*middle):
                for row in range(top, bottom):
                    yield from ((row, column, True) for column in range(left, right))
        elif right - left == 1 and bottom - top == 1:
            yield top, left, False
        elif right - left >= bottom - top:
            half = (left + right) // 2
            waiting += [(sides, (left, top, half, bottom)), (sides, (half, top, right, bottom))]
        else:
            half = (top + bottom) // 2
            waiting += [(sides, (left, top, right, half)), (sides, (left, half, right, bottom))]


def _passing(
    sides: np.ndarray, left: int, top: int, right: int, bottom: int, is_open: bool
) -> np.ndarray:
    """Which sides pass through a block (Liang and Barsky), `[n]` bool.

    What only touches its border does not; but where it is not open, its left and upper border belong
    to it.
    """
    begin, end = np.zeros(len(sides)), np.ones(len(sides))
    passes = np.ones(len(sides), bool)
    for axis, low, high in ((0, left, right), (1, top, bottom)):
        start, step = sides[:, axis], sides[:, axis + 2] - sides[:, axis]
        is_still = step == 0
        above = (start > low) if is_open else (start >= low)
        passes &= ~is_still | (above & (start < high))
        safe = np.where(is_still, 1.0, step)
        one, other = (low - start) / safe, (high - start) / safe
        begin = np.where(is_still, begin, np.maximum(begin, np.minimum(one, other)))
        end = np.where(is_still, end, np.minimum(end, np.maximum(one, other)))
    return passes & (end - begin > _SHARE)


def _places(coordinates: Any, grid: Grid) -> np.ndarray:
    places = np.array([place[:2] for place in coordinates], np.float64)
    if places.ndim != 2 or places.shape[1] != 2 or not np.isfinite(places).all():
        raise ValueError('its coordinates are no pairs of numbers')
    return grid.to_tiles(places)


def _sides(places: np.ndarray) -> np.ndarray:
    return np.concatenate([places[:-1], places[1:]], axis=1)


def _points(coordinates: Any, grid: Grid) -> list[Part]:
    return [
        Part(POINT, np.concatenate([place, place])[None]) for place in _places(coordinates, grid)
    ]


def _line(coordinates: Any, grid: Grid) -> list[Part]:
    if len(coordinates) < 2:
        raise ValueError('a line has two points or more')
    return [Part(LINE, _sides(_places(coordinates, grid)))]


def _polygon(coordinates: Any, grid: Grid) -> list[Part]:
    rings = [_places(ring, grid) for ring in coordinates]
    if not rings or any(len(ring) < 4 or (ring[0] != ring[-1]).any() for ring in rings):
        raise ValueError('a ring of a polygon has four points or more, the last the first again')
    part = Part(POLYGON, np.concatenate([_sides(ring) for ring in rings]))
    minx, miny, maxx, maxy = part.bounds
    return [part] if minx < maxx and miny < maxy else [Part(LINE, part.sides)]


def _each(read: Callable[[Any, Grid], list[Part]]) -> Callable[[Any, Grid], list[Part]]:
    return lambda coordinates, grid: [part for each in coordinates for part in read(each, grid)]


_READERS: Mapping[str, Callable[[Any, Grid], list[Part]]] = {
    'Point': lambda coordinates, grid: _points([coordinates], grid),
    'MultiPoint': _points,
    'LineString': _line,
    'MultiLineString': _each(_line),
    'Polygon': _polygon,
    'MultiPolygon': _each(_polygon),
}
