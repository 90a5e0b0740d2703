"""Collections made of shapes over a raster, and of folders of classes."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from affine import Affine
from PIL import Image
from rasterio.warp import transform_geom

from finetuner.collections import create_from_folder, create_from_geojson
from finetuner.collections.raster import Raster
from finetuner.excepts import ConfigError, DataError
from tests.unit.raster_making import UTM, pixels, write

pytestmark = [
    pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning'),
    pytest.mark.filterwarnings('ignore:Use `@` matmul:PendingDeprecationWarning'),
]

TILE = (10, 20)
ROWS, COLUMNS = 5, 6


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('FINETUNER_DATABASE_URL', raising=False)
    monkeypatch.delenv('FINETUNER_ARTIFACTS_URL', raising=False)
    return tmp_path / 'home'


@pytest.fixture
def scene(tmp_path):
    return write(tmp_path / 'scene.tif', pixels(3, 10 * ROWS + 4, 20 * COLUMNS + 7, 'uint8'), **UTM)


def on_map(x, y):
    """Place of a tile's corner, in the units of the map."""
    return [500_000 + 0.5 * 20 * x, 4_000_000 - 0.5 * 10 * y]


def ring(left, top, right, bottom):
    places = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return [on_map(*place) for place in places]


def box(left, top, right, bottom, label='house', **properties):
    return {
        'type': 'Feature',
        'properties': {'label': label, **properties},
        'geometry': {'type': 'Polygon', 'coordinates': [ring(left, top, right, bottom)]},
    }


# one wholly in (0, 0); one over (1, 1) and (1, 2); one wholly in (3, 4)
SHAPES = [
    box(0.25, 0.2, 0.75, 0.8),
    box(1.5, 1.2, 2.5, 1.7, 'road'),
    box(4.1, 3.1, 4.9, 3.9, 'house'),
]


def tiles_of(made, group='train'):
    """The tiles of what waits to be saved, `(row, column)`, and their labels."""
    made.save()
    found = {}
    for point in made:
        assert point.group == group
        left, _, _, top = point.bounds
        tile = round((4_000_000 - top) / 5), round((left - 500_000) / 10)
        found[tile] = point
    return found


# ---- shapes over a raster


@pytest.mark.parametrize(
    ('match', 'expected'),
    [
        ('INSIDE', {(0, 0), (3, 4)}),
        ('INTERSECT', {(0, 0), (1, 1), (1, 2), (3, 4)}),
        ('ALL', {(row, column) for row in range(4) for column in range(5)}),
    ],
)
def test_tiles_are_those_that_match(scene, match, expected):
    made = create_from_geojson({'type': 'FeatureCollection', 'features': SHAPES}, scene, 'set',
                               TILE, match)  # fmt: skip
    assert made.id is None, 'fed and not saved'
    found = tiles_of(made)
    assert set(found) == expected
    assert made.classes == ['house', 'road']
    with Raster(scene) as raster:
        for (row, column), point in found.items():
            window = raster.window(20 * column, 10 * row, *TILE)
            assert (point.read() == window.read()).all()
            assert point.data['crs'] == 'EPSG:32613'


def test_masks_are_what_gdal_draws_of_the_shapes(scene):
    made = create_from_geojson(SHAPES, scene, 'set', TILE)
    found = tiles_of(made)
    expected = np.zeros(TILE, np.uint8)
    expected[2:8, 5:15] = 1
    assert (found[0, 0].y == expected).all()
    assert found[1, 1].y[2:7, 10:].tolist() == [[2] * 10] * 5
    assert found[1, 2].y[2:7, :10].tolist() == [[2] * 10] * 5
    assert found[1, 1].y.sum() == found[1, 2].y.sum() == 2 * 50


def test_what_sticks_out_is_no_part_of_the_label_inside(scene):
    shapes = [*SHAPES, box(0.5, 0.5, 1.5, 0.9, 'road')]
    found = tiles_of(create_from_geojson(shapes, scene, 'set', TILE, 'INSIDE'))
    assert set(found) == {(0, 0), (3, 4)}
    assert found[0, 0].present == ['house']
    cut = tiles_of(create_from_geojson(shapes, scene, 'cut', TILE))
    assert cut[0, 0].present == ['house', 'road']
    assert cut[0, 1].present == ['road']


def test_boxes_are_cut_off_at_the_tile_and_none_is_less_than_a_pixel(scene):
    thin = box(0.98, 4.2, 2, 4.4, 'road')  # 0.4 pixels of it in the left tile
    made = create_from_geojson([*SHAPES, thin], scene, 'set', TILE, mltype='object_detection')
    found = tiles_of(made)
    assert set(found) == {(0, 0), (1, 1), (1, 2), (3, 4), (4, 1)}
    assert np.allclose(found[0, 0].y[0], [(5, 2, 15, 8)])
    assert np.allclose(found[1, 1].y[1], [(10, 2, 20, 7)])
    assert np.allclose(found[1, 2].y[1], [(0, 2, 10, 7)])
    assert np.allclose(found[4, 1].y[1], [(0, 2, 20, 4)])
    assert found[1, 1].y[0] == []


def test_classes_are_those_of_the_shapes_that_lie_there(scene):
    shapes = [*SHAPES, box(0.1, 0.1, 0.2, 0.2, 'road')]
    made = create_from_geojson(shapes, scene, 'set', TILE, mltype='classification',
                               background_ratio=1, seed=1, classes=['road', 'tree', 'house'])  # fmt: skip
    found = tiles_of(made)
    assert found[0, 0].y.tolist() == [1, 0, 1]
    assert found[1, 2].y.tolist() == [1, 0, 0]
    assert sorted(point.y.sum() for point in found.values()) == [0] * 4 + [1] * 3 + [2]


@pytest.mark.parametrize('mltype', ['classification', 'object_detection', 'segmentation'])
def test_background_is_drawn_from_free_tiles(scene, mltype):
    def made(name, seed, ratio):
        return tiles_of(
            create_from_geojson(
                SHAPES,
                scene,
                name,
                TILE,
                'INSIDE',
                mltype=mltype,
                background_ratio=ratio,
                seed=seed,
            )
        )

    first, again = made('a', 3, 2.5), made('b', 3, 2.5)
    assert set(first) == set(again)
    assert len(first) == 2 + 5
    assert len({frozenset(made(f'c{seed}', seed, 2.5)) for seed in range(4)}) > 1
    for tile in set(first) - {(0, 0), (3, 4)}:
        assert tile not in {(1, 1), (1, 2)}, 'a shape lies there, though not wholly'
        assert first[tile].present == []
    assert len(made('all', 0, 100)) == ROWS * COLUMNS - 2


def test_only_tiles_wholly_in_the_mask_are_used(scene):
    mask = {'type': 'Polygon', 'coordinates': [ring(0.5, 0, 6, 5), ring(4.4, 3.4, 4.5, 3.5)]}
    found = tiles_of(create_from_geojson(SHAPES, scene, 'set', TILE, mask=mask))
    assert set(found) == {(1, 1), (1, 2)}, 'the first is cut by the mask, the last has a hole in it'
    feature = {'type': 'Feature', 'geometry': mask, 'properties': {}}
    more = create_from_geojson(SHAPES, scene, 'x', TILE, mask=feature, background_ratio=99)
    assert set(tiles_of(more)) == {(row, column) for row in range(5) for column in range(1, 6)} - {
        (3, 4)
    }
    with pytest.raises(DataError, match='no tile is left'):
        create_from_geojson(
            SHAPES, scene, 'y', TILE, mask={'type': 'Polygon', 'coordinates': [ring(5, 0, 6, 5)]}
        )
    with pytest.raises(DataError, match='mask is a LineString'):
        create_from_geojson(
            SHAPES, scene, 'z', TILE, mask={'type': 'LineString', 'coordinates': ring(5, 0, 6, 5)}
        )


@pytest.mark.parametrize('says_so', [True, False])
def test_degrees_are_brought_into_the_system_of_the_raster(scene, tmp_path, says_so):
    moved = [
        {**shape, 'geometry': transform_geom('EPSG:32613', 'EPSG:4326', shape['geometry'])}
        for shape in SHAPES
    ]
    document = {'type': 'FeatureCollection', 'features': moved}
    if says_so:
        document['crs'] = {'type': 'name', 'properties': {'name': 'urn:ogc:def:crs:OGC:1.3:CRS84'}}
    path = tmp_path / 'shapes.geojson'
    path.write_text(json.dumps(document))
    found = tiles_of(create_from_geojson(path, scene, 'set', TILE))
    assert set(found) == {(0, 0), (1, 1), (1, 2), (3, 4)}
    assert abs(int(found[0, 0].y.sum()) - 60) <= 16


def test_shapes_in_pixels_of_a_picture_on_no_map(tmp_path):
    array = pixels(3, 40, 40, 'uint8')
    shape = {
        'type': 'Feature',
        'properties': {},
        'geometry': {
            'type': 'Polygon',
            'coordinates': [[[21, 2], [29, 2], [29, 5], [21, 5], [21, 2]]],
        },
    }
    made = create_from_geojson(shape, write(tmp_path / 'a.png', array, 'PNG'), 'set', (10, 10),
                               default_label='thing', mltype='object_detection')  # fmt: skip
    made.save()
    assert (made[0].read() == array[:, :10, 20:30]).all()
    assert made[0].y == [[(1, 2, 9, 5)]]


def test_a_turned_raster_has_its_tiles_in_its_own_rows(tmp_path):
    turned = Affine.translation(500_000, 4_000_000) @ Affine.rotation(30) @ Affine.scale(2, -3)
    path = write(tmp_path / 'a.tif', pixels(1, 40, 40, 'uint8'), crs='EPSG:32613', transform=turned)
    places = [(11, 21), (19, 21), (19, 29), (11, 29), (11, 21)]
    geometry = {'type': 'Polygon', 'coordinates': [[list(turned @ place) for place in places]]}
    feature = {'type': 'Feature', 'geometry': geometry, 'properties': {'label': 'x'}}
    made = create_from_geojson(feature, path, 'set', (10, 10), 'INSIDE', mltype='object_detection')
    made.save()
    assert len(made) == 1
    assert np.allclose(made[0].y[0], [(1, 1, 9, 9)])


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'label_field': 'kind'}, 'feature 0 has no class'),
        ({'classes': ['house', 'rood']}, "feature 1: unknown class 'road': did you mean 'rood'"),
        ({'match': 'inside'}, "did you mean 'INSIDE'"),
        ({'tilesize': (100, 20)}, 'which no tile of that size fits into'),
        ({'background_ratio': -1}, 'background_ratio=-1'),
        ({'mltype': 'boxes'}, 'mltype'),
        ({'geojson': []}, 'no GeoJSON'),
        ({'geojson': {'type': 'FeatureCollection', 'features': []}}, 'holds no features'),
        ({'geojson': 'no-such.geojson'}, 'cannot be opened'),
        ({'geojson': [{**SHAPES[0], 'geometry': None}]}, 'feature 0 has no GeoJSON geometry'),
        ({'geojson': [SHAPES[0], {'type': 'Polygon'}]}, "feature 1 is of type 'Polygon'"),
        ({'geojson': [box(70, 70, 80, 80)]}, 'none of the 1 features lies in a tile'),
        (
            {'geojson': {**SHAPES[0], 'crs': {'properties': {'name': 'EPSG:abc'}}}},
            'names the coordinate system',
        ),
        (
            {
                'geojson': [
                    {**SHAPES[0], 'geometry': {'type': 'Point', 'coordinates': on_map(1, 1)}}
                ],
                'mltype': 'object_detection',
            },
            'feature 0 is a Point, which has no box',
        ),
    ],
)
def test_what_cannot_be_made_is_told(scene, options, words):
    given = {'geojson': SHAPES, 'image': scene, 'name': 'set', 'tilesize': TILE, **options}
    with pytest.raises((ConfigError, DataError), match=words):
        create_from_geojson(**given)


def test_classes_come_from_any_property(scene):
    shapes = [box(0.2, 0.2, 0.4, 0.4, kind=7), box(1.2, 0.2, 1.4, 0.4, kind=None)]
    made = create_from_geojson(
        shapes, scene, 'set', TILE, label_field='kind', default_label='other', group='test'
    )
    assert made.classes == ['7', 'other']
    assert made.count == {'test': 2}


def test_a_hundred_thousand_shapes_take_seconds(tmp_path):
    side = 320
    scene = write(tmp_path / 'big.tif', np.zeros((1, side * 8, side * 8), np.uint8), **UTM)
    shapes = [
        box(0.4 * column + 0.1, 0.8 * row + 0.1, 0.4 * column + 0.3, 0.8 * row + 0.5)
        for row in range(200)
        for column in range(500)
    ]
    begun = time.process_time()
    made = create_from_geojson(shapes, scene, 'set', (1280, 1280), mltype='classification')
    assert time.process_time() - begun < 40
    assert made.count == {'train': 2 * 2}


# ---- folders of classes


def picture(path, size=(8, 10), shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((*size, 3), shade, np.uint8)
    array[: size[0] // 2] = 255 - shade
    Image.fromarray(array).save(path)
    return array


def test_folders_name_the_classes(tmp_path):
    root = tmp_path / 'shoes'
    for number, name in enumerate(['boot/b.png', 'boot/a.jpg', 'clog/deep/c.png', 'Adidas/x.png']):
        picture(root / name, shade=40 * number)
    (root / 'clog' / 'notes.txt').write_text('x')
    (root / '.hidden').mkdir()
    made = create_from_folder(root)
    assert (made.name, made.tile_size, made.classes) == (
        'shoes',
        [8, 10],
        ['Adidas', 'boot', 'clog'],
    )
    assert made.count == {'train': 4}
    made.save()
    assert [point.present for point in made] == [['Adidas'], ['boot'], ['boot'], ['clog']]
    assert made[0].read()[0, 0, 0] == 255 - 120
    with pytest.raises(DataError, match=r'unknown class|zeros and ones'):
        made.feed([(made[0].read(), 'sandal')])


def test_folders_may_name_groups_first(tmp_path):
    for name in ['train/a/1.png', 'train/b/2.png', 'val/b/3.png', 'test/c/4.png']:
        picture(tmp_path / 'set' / name)
    made = create_from_folder(tmp_path / 'set', 'named')
    assert made.count == {'test': 1, 'train': 2, 'validate': 1}
    assert made.classes == ['a', 'b', 'c']
    for options in ({'group': 'train'}, {'partition': [70, 20, 10]}):
        with pytest.raises(ConfigError, match='name groups already'):
            create_from_folder(tmp_path / 'set', **options)


def test_pictures_of_another_size_are_told_or_resized(tmp_path):
    root = tmp_path / 'set'
    picture(root / 'a' / '1.png', (8, 10))
    picture(root / 'a' / '2.png', (16, 20))
    with pytest.raises(DataError, match=r"2\.png': pair 1: the picture is 16 x 20.*resize=True"):
        create_from_folder(root)
    made = create_from_folder(root, resize=True)
    made.save()
    assert made[0].read().tolist() == made[1].read().tolist()
    checks = np.indices((16, 20)).sum(0) % 2 * 200
    Image.fromarray(np.stack([checks] * 3, -1).astype(np.uint8)).save(root / 'a' / '3.png')
    made = create_from_folder(root, 'other', tile_size=(8, 10), resize=True)
    made.save()
    assert (made[2].read() == 100).all(), 'areas are averaged'


@pytest.mark.parametrize('dtype', ['uint8', 'int8', 'uint16', 'int32', 'uint32', 'float32'])
def test_rasters_of_any_dtype_are_resized_with_their_places(tmp_path, dtype):
    root = tmp_path / 'set'
    array = pixels(5, 8, 12, dtype)
    (root / 'a').mkdir(parents=True)
    write(root / 'a' / '1.tif', array, **UTM)
    made = create_from_folder(root, tile_size=(4, 6), resize=True)
    made.save()
    expected = array.astype(np.float64).reshape(5, 4, 2, 6, 2).mean((2, 4))
    assert made.dtype == dtype
    assert np.allclose(made[0].read(), expected, atol=0.51 if np.dtype(dtype).kind != 'f' else 0.1)
    with Raster(root / 'a' / '1.tif') as raster:
        assert made[0].bounds == list(raster.bounds)
    plain = create_from_folder(root, 'plain')
    plain.save()
    assert (plain[0].read() == array).all()


@pytest.mark.parametrize('is_damaged_first', [True, False])
def test_a_file_that_is_no_picture_is_told(tmp_path, is_damaged_first):
    picture(tmp_path / 'set' / 'a' / 'm.png')
    (tmp_path / 'set' / 'a' / ('a.png' if is_damaged_first else 'z.png')).write_bytes(b'no picture')
    with pytest.raises(DataError, match=r"[az]\.png': .*not a picture"):
        create_from_folder(tmp_path / 'set')


def test_folders_that_cannot_be_taken(tmp_path):
    picture(tmp_path / 'flat' / 'a.png')
    with pytest.raises(DataError, match='no folders of classes'):
        create_from_folder(tmp_path / 'flat')
    with pytest.raises(DataError, match='there is no folder'):
        create_from_folder(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match='there is no picture'):
        create_from_folder(tmp_path / 'empty')
    with pytest.raises(ConfigError, match='folders name classes'):
        create_from_folder(tmp_path / 'flat', mltype='segmentation')
