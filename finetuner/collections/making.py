"""Collections made of shapes on a map over a raster."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuner.collections.draft import DEFAULT_GROUP
from finetuner.collections.features import (
    GeoJson,
    check_choice,
    class_names,
    geometries_on,
    no_geometry,
    read_geojson,
)
from finetuner.collections.footprints import (
    DECIMALS,
    POINT,
    POLYGON,
    Grid,
    Part,
    bounds_of,
    parts_of,
    tiles_covered,
    tiles_touched,
)
from finetuner.collections.labels import MLTYPES
from finetuner.collections.raster import Raster, RasterWindow
from finetuner.collections.spec import check_classes
from finetuner.collections.tiles import check_tile_size
from finetuner.collections.training_set import TrainingSet
from finetuner.excepts import ConfigError, DataError

MATCHES = ('INSIDE', 'INTERSECT', 'ALL')

_Tile = tuple[int, int]


def create_from_geojson(
    geojson: GeoJson,
    image: str | os.PathLike[str] | Raster,
    name: str,
    tilesize: Sequence[int] = (256, 256),
    match: str = 'INTERSECT',
    default_label: str | None = None,
    label_field: str | None = None,
    mask: Mapping[str, Any] | None = None,
    background_ratio: float = 0.0,
    mltype: str = 'segmentation',
    classes: Sequence[str] | None = None,
    description: str = '',
    group: str = DEFAULT_GROUP,
    seed: int | None = None,
) -> TrainingSet:
    """Cut a raster into tiles, and label them by the features that lie in them.

    Tiles lie side by side from the upper left of the raster; what is left over at its right and lower
    edge is in none. A polygon lies in a tile where it covers some of its area, a line where some of
    its length is in it; a point in one tile alone.

    Labels are, for `segmentation`, the features with their classes, drawn into a mask (later ones over
    earlier ones; what covers the centre of no pixel leaves no mark); for `object_detection` the boxes
    around the features, cut off at the tile, but for those of less than a pixel (a tile that has no
    others is left out; points have no box and are refused); for `classification` the classes of the
    features that lie in the tile.

    Args:
        geojson: a path, a FeatureCollection, a feature, or a list of features, in the projected units
            of the raster. Those in another system are brought into it where the GeoJSON's member `crs`
            names it, or where they are evidently degrees and the raster is not.
        image: the raster, or its path.
        name: of the collection.
        tilesize: height and width of the tiles, in pixels.
        match: `INSIDE`: tiles that hold at least one feature wholly, and only what they hold wholly;
            `INTERSECT`: tiles that any feature lies in, which is cut off at them; `ALL`: all tiles that
            the box around all features lies in, whether they hold any or not.
        default_label: class of the features that name none.
        label_field: property that names the class; None is `label`.
        mask: a polygon (GeoJSON geometry or feature, in the system of the features); only tiles wholly
            inside it are used.
        background_ratio: for each tile with features so many that no feature lies in, drawn at random
            from those that are free; all of these where they are fewer. Their labels are empty.
        mltype: what the labels are.
        classes: names in their order; None takes them as the features name them.
        description: of the collection.
        group: that the pairs belong to.
        seed: the same one draws the same tiles.

    Returns:
        The collection, its pairs fed and not saved.

    Raises:
        ConfigError: an argument is not what it may be.
        DataError: the features or the raster cannot be read, a feature names no class, or no tile holds
            any.
    """
    size = check_tile_size(tilesize)
    check_choice('match', match, MATCHES)
    check_choice('mltype', mltype, MLTYPES)
    ratio = _check_ratio(background_ratio)
    if classes is not None:
        classes = check_classes(mltype, classes)
    given, system = read_geojson(geojson)
    names = class_names(given, label_field, default_label, classes)
    with ExitStack() as stack:
        raster = image if isinstance(image, Raster) else stack.enter_context(Raster(image))
        wanted = list(dict.fromkeys(names)) if classes is None else classes
        made = TrainingSet(name, mltype, size, wanted, description=description)
        grid = _grid_of(raster, size)
        shapes = _shapes_of(grid, [feature.get('geometry') for feature in given], names, system)
        if mltype == 'object_detection':
            _check_boxes(shapes)
        index = _Index(grid, shapes, match)
        allowed = None if mask is None else _tiles_inside(grid, mask, system)
        chosen = _chosen_tiles(index, match, allowed, _LABELS[mltype])
        spare = index.free(chosen, allowed)
        num_labelled = sum(map(bool, chosen.values()))
        count = min(len(spare), math.floor(ratio * num_labelled + 0.5))
        drawn = np.random.default_rng(seed).choice(len(spare), count, replace=False)
        chosen.update((spare[i], _LABELS[mltype]([], grid, spare[i])) for i in drawn)
        made.feed(_pairs(raster, size, chosen, made.classes), group)
    return made


@dataclass(frozen=True)
class _Shape:
    """A feature: its class, its geometry in units of the map, and its parts in the grid."""

    name: str
    geometry: Mapping[str, Any]
    parts: list[Part]


class _Index:
    """Which shapes lie in which tiles.

    Attributes:
        grid: of the tiles.
        by_tile: positions of the shapes that count for its label, in their order.
        box: around all shapes, in units of tiles.
    """

    def __init__(self, grid: Grid, shapes: list[_Shape], match: str) -> None:
        self.grid = grid
        self.shapes = shapes
        self.by_tile: dict[_Tile, list[_Shape]] = defaultdict(list)
        self._touched = np.zeros((grid.num_rows, grid.num_columns), bool)
        self.box = bounds_of([part for shape in shapes for part in shape.parts])
        for shape in shapes:
            tiles = tiles_touched(shape.parts, grid)
            for tile in tiles:
                self._touched[tile] = True
            if match != 'INSIDE' or _is_inside(shape, tiles):
                for tile in tiles:
                    self.by_tile[tile].append(shape)
        if not self._touched.any():
            raise DataError(
                f'none of the {len(shapes):,} features lies in a tile of the image: they are at '
                f'{_on_map(grid, self.box)}, and the image is at {list(grid.frame.bounds)} '
                f'({grid.frame.crs or "on no map"}): they must be in its coordinate system'
            )

    def tiles_of_box(self) -> Iterator[_Tile]:
        """All tiles that the box around all shapes lies in."""
        left, top, right, bottom = self.box
        columns = range(max(0, math.floor(left)), min(self.grid.num_columns, _end(left, right)))
        for row in range(max(0, math.floor(top)), min(self.grid.num_rows, _end(top, bottom))):
            yield from ((row, column) for column in columns)

    def free(self, chosen: Mapping[_Tile, Any], allowed: set[_Tile] | None) -> list[_Tile]:
        """Tiles that no shape lies in and that are not chosen, row by row."""
        is_free = ~self._touched
        for tile in chosen:
            is_free[tile] = False
        found = ((int(row), int(column)) for row, column in np.argwhere(is_free))
        return [tile for tile in found if allowed is None or tile in allowed]


def _grid_of(raster: Raster, size: tuple[int, int]) -> Grid:
    grid = Grid(raster.frame, *size)
    if not grid.num_rows or not grid.num_columns:
        raise ConfigError(
            f'tilesize={list(size)}: the image has {raster.frame.height} x {raster.frame.width} '
            'pixels, which no tile of that size fits into'
        )
    return grid


def _shapes_of(
    grid: Grid, given: Sequence[Any], names: Sequence[str], system: str | None
) -> list[_Shape]:
    found = []
    geometries = geometries_on(grid.frame, given, system)
    for position, (geometry, name) in enumerate(zip(geometries, names, strict=True)):
        try:
            found.append(_Shape(name, geometry, parts_of(geometry, grid)))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(no_geometry(position, error)) from error
    return found


def _check_boxes(shapes: Sequence[_Shape]) -> None:
    for position, shape in enumerate(shapes):
        if all(part.kind == POINT for part in shape.parts):
            raise DataError(
                f'feature {position} is a {shape.geometry["type"]}, which has no box: give polygons '
                'around the objects, or take another mltype'
            )


def _is_inside(shape: _Shape, tiles: set[_Tile]) -> bool:
    if len(tiles) != 1:
        return False
    ((row, column),) = tiles
    left, top, right, bottom = bounds_of(shape.parts)
    return column <= left and right <= column + 1 and row <= top and bottom <= row + 1


def _tiles_inside(grid: Grid, mask: Mapping[str, Any], system: str | None) -> set[_Tile]:
    geometry = mask.get('geometry') if mask.get('type') == 'Feature' else mask
    try:
        (moved,) = geometries_on(grid.frame, [geometry], system)
        parts = parts_of(moved, grid)
    except (DataError, KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f'the mask is no GeoJSON polygon: {error}') from error
    if any(part.kind != POLYGON for part in parts):
        raise DataError(f'the mask is a {moved["type"]}: it takes a Polygon or a MultiPolygon')
    return tiles_covered(parts, grid)


def _chosen_tiles(
    index: _Index, match: str, allowed: set[_Tile] | None, label: _MakeLabel
) -> dict[_Tile, Any]:
    """The label of each tile that is used for its features."""
    found = {}
    for tile in index.tiles_of_box() if match == 'ALL' else index.by_tile:
        if allowed is None or tile in allowed:
            made = label(index.by_tile.get(tile, []), index.grid, tile)
            if made or match == 'ALL':
                found[tile] = made
    if not any(found.values()):
        raise DataError(
            f'no tile is left: match={match!r} with this tilesize'
            f'{"" if allowed is None else " and this mask"} takes none that holds a feature; try '
            "match='INTERSECT' or other tiles"
        )
    return found


def _pairs(
    raster: Raster, size: tuple[int, int], labels: Mapping[_Tile, Any], classes: Sequence[str]
) -> Iterator[tuple[RasterWindow, Any]]:
    """Row by row, as the raster is read best."""
    height, width = size
    for row, column in sorted(labels):
        label = labels[row, column]
        if isinstance(label, set):
            label = [int(name in label) for name in classes]
        yield raster.window(column * width, row * height, height, width), label


# the label of a tile by the shapes in it; what is empty is false
_MakeLabel = Callable[[Sequence[_Shape], Grid, _Tile], Any]


def _features_in(shapes: Sequence[_Shape], grid: Grid, tile: _Tile) -> list[dict[str, Any]]:
    del grid, tile
    return [
        {'type': 'Feature', 'properties': {'label': shape.name}, 'geometry': shape.geometry}
        for shape in shapes
    ]


def _boxes_in(
    shapes: Sequence[_Shape], grid: Grid, tile: _Tile
) -> dict[str, list[tuple[float, ...]]]:
    row, column = tile
    found: dict[str, list[tuple[float, ...]]] = {}
    size = np.array([grid.width, grid.height] * 2)
    for shape in shapes:
        box = np.clip(bounds_of(shape.parts) * size - np.array([column, row] * 2) * size, 0, size)
        box = np.round(box, DECIMALS)
        if (box[2:] - box[:2] >= 1).all():
            found.setdefault(shape.name, []).append(tuple(box.tolist()))
    return found


def _classes_in(shapes: Sequence[_Shape], grid: Grid, tile: _Tile) -> set[str]:
    del grid, tile
    return {shape.name for shape in shapes}


_LABELS: dict[str, _MakeLabel] = {
    'segmentation': _features_in,
    'object_detection': _boxes_in,
    'classification': _classes_in,
}


def _end(low: float, high: float) -> int:
    """Of the tiles from `low` to `high`; of a point the one that it is in."""
    return max(math.ceil(high), math.floor(low) + 1)


def _on_map(grid: Grid, box: Sequence[float]) -> list[float]:
    left, top = grid.frame.to_map(box[0] * grid.width, box[1] * grid.height)
    right, bottom = grid.frame.to_map(box[2] * grid.width, box[3] * grid.height)
    return [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]


def _check_ratio(ratio: Any) -> float:
    is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not is_number or not math.isfinite(ratio) or ratio < 0:
        raise ConfigError(f'background_ratio={ratio!r}: it is 0 or more, such as 0.5')
    return float(ratio)
