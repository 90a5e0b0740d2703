"""Windows of rasters, against rasterio's own reading of the whole and its own geometry."""

from __future__ import annotations

import itertools
import types

import dask
import numpy as np
import pytest
import rasterio.windows
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from rasterio.warp import transform as warp_points

from finetuner.collections.raster import Raster, RasterWindow
from finetuner.excepts import ConfigError, DataError
from tests.unit.raster_making import TILED, UTM, pixels, write

pytestmark = [
    pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning'),
    # rasterio 1.4 multiplies as affine 2 did
    pytest.mark.filterwarnings('ignore:Use `@` matmul:PendingDeprecationWarning'),
]

HEIGHT, WIDTH = 70, 90
ROTATED = Affine.translation(500_000, 4_000_000) @ Affine.rotation(30) @ Affine.scale(2, -3)
KINDS = {
    'tiled uint16': ('a.tif', 'GTiff', (3, 'uint16'), {**UTM, **TILED}),
    'striped float32': ('a.tif', 'GTiff', (8, 'float32'), UTM),
    'big-endian int16': ('a.tif', 'GTiff', (2, 'int16'), {**UTM, 'endianness': 'BIG'}),
    'band by band': ('a.tif', 'GTiff', (4, 'uint8'), {**UTM, **TILED, 'interleave': 'band'}),
    'compressed int8': ('a.tif', 'GTiff', (2, 'int8'), {**UTM, 'compress': 'deflate'}),
    'float64 with nodata': ('a.tif', 'GTiff', (2, 'float64'), {**UTM, 'nodata': -9999.0}),
    'rotated': ('a.tif', 'GTiff', (1, 'uint8'), {'crs': 'EPSG:32613', 'transform': ROTATED}),
    'south up': (
        'a.tif',
        'GTiff',
        (1, 'uint8'),
        {'crs': 'EPSG:4326', 'transform': Affine(0.25, 0, -20, 0, 0.25, -30)},
    ),
    'on no map': ('a.tif', 'GTiff', (3, 'uint8'), {}),
    'PNG': ('a.png', 'PNG', (3, 'uint16'), {}),
    'JPEG 2000': ('a.jp2', 'JP2OpenJPEG', (3, 'uint8'), {**UTM, 'reversible': 'yes'}),
    'ENVI': ('a.img', 'ENVI', (3, 'float32'), {**UTM, 'interleave': 'bil'}),
    'ASCII grid': ('a.asc', 'AAIGrid', (1, 'int32'), {'transform': Affine(2, 0, 5, 0, -2, 6)}),
    'SAGA': ('a.sdat', 'SAGA', (1, 'float32'), {'transform': Affine(2, 0, 5, 0, -2, 6)}),
}


@pytest.fixture(params=KINDS)
def kept(request, tmp_path):
    """A raster of each kind, and what rasterio reads of its whole."""
    name, driver, (bands, dtype), options = KINDS[request.param]
    array = pixels(bands, HEIGHT, WIDTH, dtype)
    path = write(
        tmp_path / name, np.abs(array // 2) if driver == 'AAIGrid' else array, driver, **options
    )
    with rasterio.open(path) as dataset:
        yield Raster(path), dataset, dataset.read()


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A raster of 23 x 31 pixels that the tests only read, and its pixels."""
    array = pixels(2, 23, 31, 'uint16')
    return Raster(write(tmp_path_factory.mktemp('plain') / 'a.tif', array, **UTM)), array


# ---- pixels and places


def test_windows_hold_the_pixels_that_rasterio_reads_of_the_whole(kept):
    raster, dataset, whole = kept
    assert raster.shape == whole.shape == (dataset.count, HEIGHT, WIDTH)
    assert raster.dtype == whole.dtype
    for window in [
        *raster.iterwindows(20, (9, 14), seed=5),
        raster.window(0, 0, HEIGHT, WIDTH),
        raster.window(WIDTH - 1, HEIGHT - 1, 1, 1),
    ]:
        expected = whole[
            :, window.row : window.row + window.height, window.column : window.column + window.width
        ]
        for found in (window.read(), window.compute(), np.asarray(window)):
            assert found.shape == window.shape == expected.shape
            assert found.dtype == window.dtype == raster.dtype
            assert found.dtype.isnative
            np.testing.assert_array_equal(found, expected)


def test_windows_lie_where_rasterio_says(kept):
    raster, dataset, _ = kept
    if dataset.transform.is_identity:
        assert raster.transform is raster.crs is raster.bounds_as('EPSG:4326') is None
        assert raster.bounds == (0, 0, WIDTH, HEIGHT)
    else:
        assert raster.transform == dataset.transform
    for window in raster.iterwindows(20, (9, 14), seed=6):
        place = rasterio.windows.Window(window.column, window.row, 14, 9)
        transform = rasterio.windows.transform(place, dataset.transform)
        assert window.transform.almost_equals(transform)
        corners = [transform @ corner for corner in itertools.product((0, 14), (0, 9))]
        xs, ys = zip(*corners, strict=True)
        assert window.bounds == pytest.approx((min(xs), min(ys), max(xs), max(ys)))
        if not dataset.transform.b:
            left, bottom, right, top = rasterio.windows.bounds(place, dataset.transform)
            assert window.bounds == pytest.approx((left, min(bottom, top), right, max(bottom, top)))
        assert (window.frame.height, window.frame.width, window.crs) == (9, 14, raster.crs)


def test_the_published_loop_feeds_windows_of_the_raster(tmp_path):
    array = pixels(8, 300, 400, 'float32')
    image = Raster(write(tmp_path / 'a.tif', array, **UTM))
    fed = []
    for win in image.iterwindows(count=100, window_shape=(256, 256)):
        fed.append((win, [1]))
    assert len(fed) == 100
    win = fed[-1][0]
    assert (win.shape, win.dtype, win.crs) == ((8, 256, 256), np.float32, 'EPSG:32613')
    np.testing.assert_array_equal(
        win.read(), array[:, win.row : win.row + 256, win.column : win.column + 256]
    )


@pytest.mark.parametrize('bands', [[3], [4, 1], [2, 2, 1], (np.int64(1),), range(1, 5)])
def test_bands_are_those_asked_for_in_their_order(tmp_path, bands):
    array = pixels(4, 20, 30, 'uint8')
    raster = Raster(write(tmp_path / 'a.tif', array), bands)
    assert raster.bands == tuple(bands)
    assert raster.shape == (len(bands), 20, 30)
    expected = array[[band - 1 for band in bands], 3:8, 2:9]
    np.testing.assert_array_equal(raster.window(2, 3, 5, 7).read(), expected)


def test_pixels_are_given_as_they_are_whatever_is_masked(tmp_path):
    array = pixels(3, 20, 30, 'uint8')
    path = write(tmp_path / 'a.tif', array, nodata=7, **UTM)
    with rasterio.open(path, 'r+') as dataset:
        dataset.write_mask(np.zeros((20, 30), bool))
        dataset.scales, dataset.offsets = (2.0,) * 3, (5.0,) * 3
    raster = Raster(path)
    assert raster.nodata == 7
    np.testing.assert_array_equal(raster.window(0, 0, 20, 30).read(), array)


@pytest.mark.parametrize('crs', ['EPSG:4326', 'EPSG:3857', 'EPSG:27700', 'EPSG:5514', 'EPSG:32760'])
def test_a_known_system_goes_by_its_code(tmp_path, crs):
    path = write(tmp_path / 'a.tif', pixels(1, 4, 4, 'uint8'), crs=crs, transform=ROTATED)
    assert Raster(path).crs == crs


@pytest.mark.parametrize(
    'crs',
    [
        '+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84',
        # nearly a known one, which it must not be taken for
        '+proj=utm +zone=13 +ellps=GRS80 +units=m',
        '+proj=utm +zone=13 +datum=WGS84 +units=us-ft',
    ],
)
def test_another_system_goes_by_its_wkt(tmp_path, crs):
    path = write(tmp_path / 'a.tif', pixels(1, 4, 4, 'uint8'), crs=crs, transform=ROTATED)
    found = Raster(path).crs
    assert 'PROJ' in found
    assert rasterio.crs.CRS.from_wkt(found) == rasterio.open(path).crs


def test_ground_control_points_alone_put_a_raster_on_no_map(tmp_path):
    points = [GroundControlPoint(row, col, col, -row) for row in (0, 4) for col in (0, 4)]
    path = write(tmp_path / 'a.tif', pixels(1, 4, 4, 'uint8'), gcps=points, crs='EPSG:4326')
    raster = Raster(path)
    assert raster.transform is raster.crs is None
    assert raster.bounds == (0, 0, 4, 4)
    assert raster.window(1, 2, 2, 3).bounds == (1, 2, 4, 4)


def test_bounds_elsewhere_hold_every_point_of_the_edge(tmp_path):
    array = pixels(1, 50, 60, 'uint8')
    options = {'crs': 'EPSG:32613', 'transform': from_origin(200_000, 7_900_000, 8000, 8000)}
    raster = Raster(write(tmp_path / 'a.tif', array, **options))
    for window in raster.iterwindows(5, (20, 30), seed=1):
        minx, miny, maxx, maxy = window.bounds
        along = np.linspace(0, 1, 400)
        xs = np.concatenate([minx + along * (maxx - minx)] * 2 + [[minx] * 400, [maxx] * 400])
        ys = np.concatenate([[miny] * 400, [maxy] * 400] + [miny + along * (maxy - miny)] * 2)
        longitudes, latitudes = warp_points('EPSG:32613', 'EPSG:4326', xs, ys)
        expected = min(longitudes), min(latitudes), max(longitudes), max(latitudes)
        assert window.bounds_as('EPSG:4326') == pytest.approx(expected, abs=0.02)
        assert window.bounds_as('EPSG:32613') == pytest.approx(window.bounds)


def test_bounds_across_the_180th_meridian(tmp_path):
    options = {'crs': 'EPSG:32601', 'transform': from_origin(200_000, 5_000_000, 10_000, 10_000)}
    raster = Raster(write(tmp_path / 'a.tif', pixels(1, 10, 20, 'uint8'), **options))
    minx, _, maxx, _ = raster.bounds_as('EPSG:4326')
    assert 179 < minx < 180
    assert -180 < maxx < -178


def test_bounds_in_no_system(tmp_path):
    local = 'LOCAL_CS["pixels",UNIT["metre",1]]'
    array = pixels(1, 4, 4, 'uint8')
    raster = Raster(write(tmp_path / 'a.tif', array, crs=local, transform=ROTATED))
    with pytest.raises(DataError, match=r'a\.tif.* cannot be placed'):
        raster.bounds_as('EPSG:4326')
    raster = Raster(write(tmp_path / 'b.tif', array, **UTM))
    for crs in ('EPSG:99999', 'nonsense', None, 7):
        with pytest.raises(ConfigError, match='is no coordinate system'):
            raster.bounds_as(crs)
    with pytest.raises(DataError, match='cannot be placed'):
        Raster(
            write(tmp_path / 'c.tif', array, crs='EPSG:4326', transform=from_origin(0, 900, 1, 1))
        ).bounds_as('EPSG:3857')


# ---- windows one after the other


@given(
    height=st.integers(1, 23), width=st.integers(1, 31), overlap=st.integers(0, 30), data=st.data()
)
@settings(max_examples=80, deadline=None)
def test_a_grid_covers_each_pixel_as_often_as_counted_by_hand(plain, height, width, overlap, data):
    raster, _ = plain
    overlap %= min(height, width)
    windows = list(raster.iterwindows(window_shape=(height, width), order='grid', overlap=overlap))
    covered = np.zeros((23, 31), int)
    for window in windows:
        assert window.shape == (2, height, width)
        covered[window.row : window.row + height, window.column : window.column + width] += 1

    def times(pixel: int, size: int, total: int) -> int:
        step, start, found = size - overlap, 0, 0
        while start + size <= total:
            found += start <= pixel < start + size
            start += step
        return found

    expected = [
        [times(row, height, 23) * times(column, width, 31) for column in range(31)]
        for row in range(23)
    ]
    np.testing.assert_array_equal(covered, expected)
    assert windows == sorted(windows, key=lambda window: (window.row, window.column))
    count = data.draw(st.integers(1, len(windows) + 2))
    shape = (height, width)
    first = raster.iterwindows(count, shape, order='grid', overlap=overlap)
    assert list(first) == windows[:count]


def test_a_grid_without_rest_is_the_whole(plain):
    raster, array = plain
    strips = [window.read() for window in raster.iterwindows(window_shape=(23, 1), order='grid')]
    np.testing.assert_array_equal(np.concatenate(strips, axis=2), array)


@given(height=st.integers(1, 23), width=st.integers(1, 31), seed=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_random_windows_are_within_and_come_again_with_their_seed(plain, height, width, seed):
    raster, _ = plain
    windows = list(raster.iterwindows(12, (height, width), seed=seed))
    for window in windows:
        assert 0 <= window.column <= 31 - width
        assert 0 <= window.row <= 23 - height
    assert list(raster.iterwindows(30, (height, width), seed=seed))[:12] == windows


def test_random_windows_are_as_likely_at_each_place(plain):
    raster, _ = plain
    places = np.zeros((4, 6), int)
    for window in raster.iterwindows(24_000, (20, 26), seed=0):
        places[window.row, window.column] += 1
    # 1000 each; the chance that one of 24 is off by five deviations is 1 in 70,000
    assert (np.abs(places - 1000) < 5 * np.sqrt(1000)).all()


def test_random_windows_without_seed_differ(plain):
    raster, _ = plain
    first, second = (list(raster.iterwindows(20, (3, 3))) for _ in range(2))
    assert first != second


def test_a_window_as_large_as_the_raster_is_all_of_it(plain):
    raster, array = plain
    for order in ('random', 'grid'):
        (window,) = raster.iterwindows(1, (23, 31), order=order)
        np.testing.assert_array_equal(window, array)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({}, r'random windows need count'),
        ({'count': 0}, 'count 0 is no whole number from 1'),
        ({'count': 2.0}, 'count 2.0 is no whole number'),
        ({'count': True}, 'count True is no whole number'),
        ({'count': 1, 'window_shape': 8}, r'window_shape=8 is no \(height, width\)'),
        ({'count': 1, 'window_shape': (8,)}, r'window_shape=\(8,\) is no \(height, width\)'),
        ({'count': 1, 'window_shape': (0, 8)}, 'height of window_shape 0'),
        ({'count': 1, 'window_shape': (8, 2.5)}, 'width of window_shape 2.5'),
        ({'count': 1, 'window_shape': (24, 8)}, r'\(24, 8\) is larger than .*a\.tif.* 23 x 31'),
        ({'count': 1, 'window_shape': (8, 32)}, r'\(8, 32\) is larger than .*a\.tif.* 23 x 31'),
        ({'count': 1, 'order': 'gird'}, "unknown order 'gird': did you mean 'grid'"),
        ({'count': 1, 'overlap': 2}, 'overlap=2 is of grids'),
        ({'order': 'grid', 'overlap': 8}, 'overlap=8 leaves no step .* 0 to 7'),
        ({'order': 'grid', 'overlap': -1}, 'overlap -1 is no whole number from 0'),
        ({'count': 1, 'seed': -1}, 'seed -1 is no whole number from 0'),
        ({'count': 1, 'seed': 'a'}, "seed 'a' is no whole number from 0"),
    ],
)
def test_what_is_no_row_of_windows_is_said_before_the_first(plain, arguments, words):
    raster, _ = plain
    with pytest.raises(ConfigError, match=words):
        raster.iterwindows(**{'window_shape': (8, 8), **arguments})


@pytest.mark.parametrize(
    ('place', 'words'),
    [
        ((-1, 0, 2, 2), 'column -1 is no whole number from 0'),
        ((0, -1, 2, 2), 'row -1 is no whole number from 0'),
        ((0, 0, 0, 2), 'height 0 is no whole number from 1'),
        ((0, 0, 2, 1.5), 'width 1.5 is no whole number from 1'),
        ((30, 0, 2, 2), r'2 x 2 pixels from row 0, column 30 ends outside .* 23 x 31'),
        ((0, 22, 2, 2), r'2 x 2 pixels from row 22, column 0 ends outside .* 23 x 31'),
    ],
)
def test_what_is_no_window(plain, place, words):
    raster, _ = plain
    with pytest.raises(ConfigError, match=words):
        raster.window(*place)


# ---- windows as arrays


def test_numpy_takes_a_window_for_an_array(plain):
    raster, array = plain
    window = raster.window(3, 4, 5, 6)
    part = array[:, 4:9, 3:9]
    assert np.asarray(window, np.float32).dtype == np.float32
    np.testing.assert_array_equal(np.array(window, dtype=np.float64), part)
    np.testing.assert_array_equal(np.stack([window, window])[1], part)
    assert np.mean(window) == part.mean()
    with pytest.raises(ValueError, match='always a copy'):
        window.__array__(copy=False)
    first, second = window.read(), window.read()
    first[:] = 0
    np.testing.assert_array_equal(second, part)


def test_dask_reads_a_window_when_it_computes(plain):
    raster, array = plain
    windows = list(raster.iterwindows(window_shape=(5, 6), order='grid'))
    arrays = [window.dask for window in windows]
    for window, lazy in zip(windows, arrays, strict=True):
        assert (lazy.shape, lazy.dtype) == (window.shape, window.dtype)
        assert lazy.name == window.dask.name
    assert len({lazy.name for lazy in arrays}) == len(windows)
    for scheduler in ('threads', 'sync'):
        found = dask.compute(*arrays, scheduler=scheduler)
        for window, block in zip(windows, found, strict=True):
            np.testing.assert_array_equal(block, window.read())
    whole = raster.window(0, 0, 23, 31).dask
    assert int(whole.sum()) == int(array.astype(int).sum())


def test_windows_are_made_one_at_a_time(plain):
    raster, _ = plain
    windows = raster.iterwindows(10**12, (3, 3), seed=1)
    assert isinstance(windows, types.GeneratorType)
    assert isinstance(next(windows), RasterWindow)


def test_what_they_are_is_told(plain):
    raster, _ = plain
    assert repr(raster).endswith("a.tif', shape=(2, 23, 31), dtype=uint16)")
    assert 'column=3, row=4, shape=(2, 5, 6)' in repr(raster.window(3, 4, 5, 6))
