"""Where an image lies: its pixels, and the projected units of a map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from finetuner.collections.systems import moved_bounds, united_longitudes
from finetuner.excepts import ConfigError, DataError

# metres, feet or degrees: farther than round the earth
FARTHEST = 1e8
_MOST_DEGREES = 180

Bounds = tuple[float, float, float, float]
Transform = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """The pixels of an image, and where on a map they are.

    Attributes:
        height: pixels.
        width: pixels.
        transform: the affine map from (column, row) to the projected units, as GDAL's and rasterio's
            `Affine` writes it, `(a, b, c, d, e, f)`: `x = a*column + b*row + c`,
            `y = d*column + e*row + f`, of the upper left corner of a pixel. None where the image is
            on no map: units are pixels then.
        crs: the coordinate system as WKT or an authority's code, such as `EPSG:32613`.
    """

    height: int
    width: int
    transform: Transform | None = None
    crs: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no map.

        Raises:
            ConfigError: a size is below 1, or the transform cannot be turned round.
        """
        if self.height < 1 or self.width < 1:
            raise ConfigError(f'an image of {self.height} x {self.width} pixels has none')
        if self.transform is not None:
            a, b, _, d, e, _ = self.transform
            turn = a * e - b * d
            if not all(map(math.isfinite, (*self.transform, turn))) or turn == 0:
                raise ConfigError(f'transform {self.transform} cannot be turned round')
            if not all(map(math.isfinite, self.bounds)):
                raise ConfigError(f'transform {self.transform} places the image out of all range')

    def to_map(self, column: float, row: float) -> tuple[float, float]:
        """Projected units of a place in the image."""
        if self.transform is None:
            return column, row
        a, b, c, d, e, f = self.transform
        return a * column + b * row + c, d * column + e * row + f

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        """Column and row of a place on the map; whole numbers are corners of pixels."""
        if self.transform is None:
            return x, y
        a, b, c, d, e, f = self.transform
        determinant = a * e - b * d
        return (
            (e * (x - c) - b * (y - f)) / determinant,
            (a * (y - f) - d * (x - c)) / determinant,
        )

    @property
    def bounds(self) -> Bounds:
        """`(minx, miny, maxx, maxy)` of all corners, in projected units."""
        corners = [
            self.to_map(column, row) for column in (0, self.width) for row in (0, self.height)
        ]
        xs, ys = zip(*corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def window(self, column: int, row: int, height: int, width: int) -> Frame:
        """The frame of a part of this image.

        Args:
            column: of its left edge.
            row: of its upper edge.
            height: pixels.
            width: pixels.
        """
        x, y = self.to_map(column, row)
        if self.transform is None:
            transform: Transform | None = (1.0, 0.0, x, 0.0, 1.0, y)
        else:
            a, b, _, d, e, _ = self.transform
            transform = (a, b, x, d, e, y)
        return Frame(height, width, transform, self.crs)


def united_degrees(bounds: Iterable[tuple[str, Bounds]]) -> Bounds | None:
    """What holds several boxes, in degrees of longitude and latitude (EPSG:4326).

    Args:
        bounds: boxes, each after the coordinate system that it is in.

    Returns:
        `(west, south, east, north)`, the smallest there is: west > east where it lies across the 180th
        meridian, as GeoJSON has it. None where no box is on this earth.
    """
    found = []
    for crs, box in bounds:
        # PROJ turns longitudes back by one turn at a time, which of 1e300 takes for ever
        if not all(abs(side) <= FARTHEST for side in box):
            continue
        # a system of its own, such as that of a microscope, or far out of its range
        with suppress(ConfigError, DataError):
            found.append(moved_bounds(box, crs, 'EPSG:4326'))
    found = [box for box in found if all(abs(side) <= _MOST_DEGREES for side in box)]
    return united_boxes(found) if found else None


def united_boxes(boxes: Sequence[Bounds]) -> Bounds:
    """What holds several boxes in degrees; see `united_degrees`.

    Args:
        boxes: one at least.
    """
    west, east = united_longitudes((box[0], box[2]) for box in boxes)
    return west, min(box[1] for box in boxes), east, max(box[3] for box in boxes)
