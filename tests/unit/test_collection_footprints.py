"""Which tiles a shape lies in, against a fine rasterisation of it by GDAL."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import rasterize

from finetuner.collections.footprints import Grid, parts_of, tiles_covered, tiles_touched
from finetuner.collections.geometry import Frame, united_degrees

pytestmark = pytest.mark.filterwarnings('ignore:Use `@` matmul:PendingDeprecationWarning')

ROWS, COLUMNS, FINE = 6, 7, 24
# tiles of 10 x 20 pixels; the last row and column of pixels are in none
GRID = Grid(Frame(10 * ROWS + 3, 20 * COLUMNS + 1, (2.0, 0.0, 100.0, 0.0, -3.0, 900.0)), 10, 20)


def on_map(places):
    """Places in units of tiles, as the map has them."""
    return [list(GRID.frame.to_map(20 * x, 10 * y)) for x, y in places]


def polygon(*rings):
    return {'type': 'Polygon', 'coordinates': [on_map([*ring, ring[0]]) for ring in rings]}


def square(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def fine(geometry, all_touched):
    """`[rows, columns, fine, fine]`: which places of each tile GDAL draws."""
    a, b, c, d, e, f = GRID.frame.transform
    small = Affine(a * 20 / FINE, b, c, d, e * 10 / FINE, f)
    mask = rasterize(
        [geometry], (ROWS * FINE, COLUMNS * FINE), transform=small, all_touched=all_touched
    )
    return mask.reshape(ROWS, FINE, COLUMNS, FINE).transpose(0, 2, 1, 3).astype(bool)


def touched(geometry):
    return tiles_touched(parts_of(geometry, GRID), GRID)


def covered(geometry):
    return tiles_covered(parts_of(geometry, GRID), GRID)


@st.composite
def stars(draw):
    """A polygon around a place, some with a hole."""
    x, y = draw(st.floats(-1, COLUMNS + 1)), draw(st.floats(-1, ROWS + 1))
    count = draw(st.integers(3, 9))
    radii = draw(st.lists(st.floats(0.05, 6), min_size=count, max_size=count))
    angles = np.arange(count) * 2 * np.pi / count + draw(st.floats(0, 6))
    ring = [(x + r * np.cos(t), y + r * np.sin(t)) for r, t in zip(radii, angles, strict=True)]
    hole = [(x + (px - x) * 0.6, y + (py - y) * 0.6) for px, py in ring]
    return polygon(ring, hole) if draw(st.booleans()) else polygon(ring)


@settings(max_examples=300, deadline=None)
@given(stars())
def test_polygons_lie_in_the_tiles_that_a_fine_drawing_of_them_reaches(shape):
    found = np.zeros((ROWS, COLUMNS), bool)
    full = np.zeros((ROWS, COLUMNS), bool)
    for tile in touched(shape):
        found[tile] = True
    for tile in covered(shape):
        full[tile] = True
    centres, any_part = fine(shape, all_touched=False), fine(shape, all_touched=True)
    assert (found | ~centres.any((2, 3))).all(), 'the centre of a small pixel is inside'
    assert (any_part.any((2, 3)) | ~found).all(), 'not even a border of it is there'
    assert (centres.all((2, 3)) | ~full).all()
    assert (found | ~full).all()
    # where all is inside, to the last small pixel that a border touches
    outside = fine_outside(shape)
    assert (full | outside.any((2, 3))).all()


def fine_outside(shape):
    """Small pixels that are not wholly inside, by the borders that touch them."""
    lines = {'type': 'MultiLineString', 'coordinates': shape['coordinates']}
    return ~fine(shape, all_touched=False) | fine(lines, all_touched=True)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-2, COLUMNS + 2), st.floats(-2, ROWS + 2)), min_size=2, max_size=6)
)
def test_lines_lie_in_the_tiles_that_points_of_them_are_in(places):
    found = touched({'type': 'LineString', 'coordinates': on_map(places)})
    steps = np.linspace(0, 1, 500)[:, None]
    for begin, end in itertools.pairwise(places):
        for x, y in np.array(begin) * (1 - steps) + np.array(end) * steps:
            inner = min(x % 1, 1 - x % 1, y % 1, 1 - y % 1) > 1e-6
            if inner and 0 <= x < COLUMNS and 0 <= y < ROWS:
                assert (int(y), int(x)) in found
    assert all(0 <= row < ROWS and 0 <= column < COLUMNS for row, column in found)


@pytest.mark.parametrize(
    ('ring', 'expected'),
    [
        (square(1, 1, 2, 2), {(1, 1)}),
        (square(1, 1, 3, 2), {(1, 1), (1, 2)}),
        (square(0.9999, 1, 2, 2), {(1, 0), (1, 1)}),
        (square(-3, -3, 0, 0), set()),
        (square(-3, -3, 0.5, 0.5), {(0, 0)}),
        (square(COLUMNS - 0.5, 0, COLUMNS + 4, 0.5), {(0, COLUMNS - 1)}),
        (square(COLUMNS, 0, COLUMNS + 4, 0.5), set()),
        ([(2, 0), (3, 1), (2, 2), (1, 1)], {(0, 1), (0, 2), (1, 1), (1, 2)}),
        # a triangle whose box holds four tiles, and which only passes three of them
        ([(0.1, 0.1), (1.5, 0.1), (0.1, 1.5)], {(0, 0), (0, 1), (1, 0)}),
        # bow tie
        ([(0.5, 0.5), (2.5, 2.5), (2.5, 0.5), (0.5, 2.5)],
         {(0, 0), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 2)} | {(0, 0)}),
    ],
)  # fmt: skip
def test_borders_are_exact(ring, expected):
    assert touched(polygon(ring)) == expected


def test_a_tile_in_a_hole_is_not_touched():
    shape = polygon(square(0, 0, 5, 5), square(1, 1, 4, 4))
    assert touched(shape) == {(row, column) for row in range(5) for column in range(5)} - {
        (row, column) for row in range(1, 4) for column in range(1, 4)
    }
    assert covered(shape) == touched(shape)
    assert covered(polygon(square(0.5, 0.5, 3, 3))) == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_a_place_on_a_border_is_in_one_tile():
    point = {'type': 'Point', 'coordinates': on_map([(2, 3)])[0]}
    assert touched(point) == {(3, 2)}
    along = {'type': 'LineString', 'coordinates': on_map([(2, 0.25), (2, 1.5)])}
    assert touched(along) == {(0, 2), (1, 2)}
    many = {'type': 'MultiPoint', 'coordinates': on_map([(0, 0), (COLUMNS, 1), (1.5, 1.5)])}
    assert touched(many) == {(0, 0), (1, 1)}


@pytest.mark.parametrize(
    'geometry',
    [
        {'type': 'Polygon', 'coordinates': []},
        {'type': 'Polygon', 'coordinates': [[[0, 0], [1, 1], [0, 0]]]},
        {'type': 'Polygon', 'coordinates': [[[0, 0], [1, 0], [1, 1], [0, 1]]]},
        {'type': 'LineString', 'coordinates': [[0, 0]]},
        {'type': 'Point', 'coordinates': [float('nan'), 0]},
        {'type': 'GeometryCollection', 'geometries': []},
        {'type': 'Circle', 'coordinates': [0, 0]},
    ],
)
def test_what_is_no_geometry_is_refused(geometry):
    with pytest.raises((ValueError, TypeError, KeyError)):
        parts_of(geometry, GRID)


def test_systems_that_are_none_have_no_degrees():
    boxes = {'microscope': (0, 0, 1, 1), 'EPSG:abc': (0, 0, 1, 1)}
    assert united_degrees(boxes.items()) is None
