"""Labels of collections: what is taken, what is kept, against what one would compute pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import AffineTransformer

from finetuner.collections.burning import burn
from finetuner.collections.geometry import Frame, united_degrees
from finetuner.collections.labels import build_label_kind
from finetuner.collections.systems import system_of, united_longitudes
from finetuner.excepts import ConfigError, DataError

SIZES = st.integers(1, 24)
FRAME = Frame(20, 30)
MAPPED = Frame(20, 30, (0.5, 0.0, 1000.0, 0.0, -0.5, 5000.0), 'EPSG:32613')


# ---- classification


@pytest.mark.parametrize(
    ('label', 'kept'),
    [
        ([0, 1, 0], [0, 1, 0]),
        ([0, 0, 0], [0, 0, 0]),
        ((1, 0, 1), [1, 0, 1]),
        (np.array([0.0, 0.0, 1.0]), [0, 0, 1]),
        ([True, False, False], [1, 0, 0]),
        ('b', [0, 1, 0]),
        (['c', 'a'], [1, 0, 1]),
    ],
)
def test_classes_by_number_and_by_name(label, kept):
    kind = build_label_kind('classification', ['a', 'b', 'c'])
    found = kind.read(label, FRAME)
    assert found.dtype == np.uint8
    assert found.tolist() == kept
    assert kind.present(found) == [name for name, one in zip('abc', kept, strict=True) if one]


@pytest.mark.parametrize(
    ('label', 'words'),
    [
        ([1, 0], 'has 2 numbers'),
        ([0, 2, 0], '3 zeros and ones'),
        (['a', 1, 0], '3 zeros and ones'),
        ('d', "unknown class 'd'"),
        (1, '3 zeros and ones'),
        (None, '3 zeros and ones'),
        ([[1, 0, 0]], '3 zeros and ones'),
        ([0.5, 0, 0], '3 zeros and ones'),
    ],
)
def test_what_is_no_class(label, words):
    with pytest.raises(DataError, match=words):
        build_label_kind('classification', ['a', 'b', 'c']).read(label, FRAME)


# ---- boxes


def test_boxes_of_one_class_and_of_several():
    one = build_label_kind('object_detection', ['car'])
    box = [1, 2, 3.5, 4]
    assert one.read([box, box], FRAME) == [[(1, 2, 3.5, 4)] * 2]
    assert one.read([], FRAME) == [[]]
    assert one.read([[box]], FRAME) == one.read({'car': [box]}, FRAME) == one.read([box], FRAME)
    assert one.read(np.array([box]), FRAME) == one.read([box], FRAME)
    two = build_label_kind('object_detection', ['car', 'tree'])
    assert two.read([[], [box]], FRAME) == two.read({'tree': [box]}, FRAME)
    assert two.present(two.read([[], [box]], FRAME)) == ['tree']


@pytest.mark.parametrize(
    ('label', 'words'),
    [
        ([[1, 2, 3]], r"box of 'a' is \[1, 2, 3\]"),
        ([[3, 2, 1, 4]], '0 <= minx < maxx <= 30'),
        ([[0, 0, 31, 4]], '0 <= minx < maxx <= 30'),
        ([[0, -1, 3, 4]], '0 <= miny < maxy <= 20'),
        ([[0, 0, float('nan'), 4]], 'minx, miny, maxx, maxy'),
        ([[0, 0, True, 4]], 'minx, miny, maxx, maxy'),
        ({'b': []}, "unknown class 'b'"),
        ('a', 'a list of boxes'),
        ({'a': 'b'}, 'a list of boxes'),
        (7, 'a list of boxes'),
    ],
)
def test_what_is_no_box(label, words):
    with pytest.raises(DataError, match=words):
        build_label_kind('object_detection', ['a']).read(label, FRAME)


def test_boxes_of_the_wrong_number_of_classes():
    kind = build_label_kind('object_detection', ['a', 'b', 'c'])
    with pytest.raises(DataError, match='has 2 lists'):
        kind.read([[], []], FRAME)


def edges(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return (
        st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True).map(sorted).map(tuple)
    )


@st.composite
def frames_with_boxes(draw):
    height, width = draw(SIZES), draw(SIZES)
    boxes = draw(st.lists(st.tuples(edges(width), edges(height)), max_size=4))
    return Frame(height, width), [(x[0], y[0], x[1], y[1]) for x, y in boxes]


def painted(boxes, frame: Frame) -> np.ndarray:
    """How many boxes each pixel is in, looked at one by one."""
    image = np.zeros((frame.height, frame.width), int)
    for left, top, right, bottom in boxes:
        for row in range(frame.height):
            for column in range(frame.width):
                image[row, column] += left <= column < right and top <= row < bottom
    return image


@settings(max_examples=80, deadline=None)
@given(frames_with_boxes(), st.booleans(), st.booleans())
def test_flipped_boxes_lie_where_the_flipped_pixels_do(framed, horizontal, vertical):
    frame, boxes = framed
    kind = build_label_kind('object_detection', ['a'])
    kept = kind.read(boxes, frame)
    turned = kind.flip(kept, frame, horizontal=horizontal, vertical=vertical)
    image = painted(boxes, frame)
    image = image[:, ::-1] if horizontal else image
    image = image[::-1] if vertical else image
    assert (painted(turned[0], frame) == image).all()
    # what came of it is a label again, and turned twice it is what it was
    assert kind.read(turned, frame) == turned
    assert kind.flip(turned, frame, horizontal=horizontal, vertical=vertical) == kept


# ---- masks


@settings(max_examples=40, deadline=None)
@given(st.data(), st.booleans(), st.booleans())
def test_masks_and_layers_say_the_same(data, horizontal, vertical):
    height, width = data.draw(SIZES), data.draw(SIZES)
    frame = Frame(height, width)
    kind = build_label_kind('segmentation', ['a', 'b', 'c'])
    seed = data.draw(st.integers(0, 1000))
    mask = np.random.default_rng(seed).integers(0, 4, (height, width))
    kept = kind.read(mask, frame)
    assert kept.dtype == np.uint8
    assert (kept == mask).all()
    layers = np.array([mask == number for number in (1, 2, 3)])
    assert (kind.read(layers, frame) == mask).all()
    assert (kind.read(mask.tolist(), frame) == mask).all()
    turned = kind.flip(kept, frame, horizontal=horizontal, vertical=vertical)
    for row in range(height):
        for column in range(width):
            from_row = height - 1 - row if vertical else row
            from_column = width - 1 - column if horizontal else column
            assert turned[row, column] == kept[from_row, from_column]
    again = kind.flip(turned, frame, horizontal=horizontal, vertical=vertical)
    assert (again == kept).all()
    assert kind.present(kept) == ['abc'[value - 1] for value in sorted({*mask.flat} - {0})]


@pytest.mark.parametrize(
    ('label', 'words'),
    [
        (np.zeros((20, 29), int), r'this one is \[20, 29\]'),
        (np.full((20, 30), 3), 'its values are 3 to 3'),
        (np.full((20, 30), -1), 'its values are -1 to -1'),
        (np.zeros((20, 30)), 'a mask'),
        (np.full((2, 20, 30), 2), 'zeros and ones alone'),
        ([[1, 2], [3]], 'a mask'),
        ('a', 'a mask'),
        ([{'geometry': {'type': 'Point', 'coordinates': [1, 1]}}], 'no property `label`'),
        ([{'properties': {'label': 'x'}, 'geometry': None}], "unknown class 'x'"),
        ([{'properties': {'label': 'a'}, 'geometry': None}], 'no GeoJSON geometry'),
        ([{'properties': {'label': 'a'}}], 'no GeoJSON geometry'),
        ({'type': 'FeatureCollection'}, 'list of `features`'),
        (
            [{'properties': {'label': 'a'}, 'geometry': {'type': 'Polygon', 'coordinates': [[1]]}}],
            'no GeoJSON geometry',
        ),
    ],
)
def test_what_is_no_mask(label, words):
    with pytest.raises(DataError, match=words):
        build_label_kind('segmentation', ['a', 'b']).read(label, FRAME)


def polygon(points) -> dict:
    return {'type': 'Polygon', 'coordinates': [[*points, points[0]]]}


def feature(points, **properties) -> dict:
    return {'type': 'Feature', 'properties': properties, 'geometry': polygon(points)}


def test_features_of_several_classes_later_ones_on_top():
    kind = build_label_kind('segmentation', ['field', 'house'])
    x, y = MAPPED.to_map(0, 0)
    field = feature([(x, y), (x + 15, y), (x + 15, y - 10), (x, y - 10)], label='field')
    # reaches out of the image on the right
    house = feature([(x + 10, y), (x + 90, y), (x + 90, y - 2), (x + 10, y - 2)], label='house')
    mask = kind.read({'type': 'FeatureCollection', 'features': [field, house]}, MAPPED)
    expected = np.ones((20, 30), np.uint8)
    expected[:4, 20:] = 2
    assert (mask == expected).all()
    assert (kind.read([house, field], MAPPED) == 1).all()
    assert (kind.read([], MAPPED) == 0).all()
    one = build_label_kind('segmentation', ['field'])
    assert (one.read(feature([(x, y), (x + 15, y), (x, y - 10)]), MAPPED)[0, :-1] == 1).all()


def is_inside(points, x: float, y: float) -> tuple[bool, float]:
    """Whether a ray from a place crosses a polygon's border an odd number of times; and how near it is."""
    inside, nearest = False, np.inf
    for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]], strict=True):
        if (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1:
            inside = not inside
        length = (x2 - x1) ** 2 + (y2 - y1) ** 2
        along = max(0.0, min(1.0, ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length))
        nearest = min(nearest, np.hypot(x1 + along * (x2 - x1) - x, y1 + along * (y2 - y1) - y))
    return inside, nearest


@st.composite
def frames_on_maps(draw):
    """Images turned, sheared, mirrored and moved."""
    scale = draw(st.sampled_from([0.3, 1.0, 30.0]))
    angle = draw(st.floats(0, 6.28))
    mirrored = draw(st.sampled_from([1, -1]))
    shear = draw(st.sampled_from([0.0, 0.4]))
    x, y = draw(st.floats(-1e5, 1e5)), draw(st.floats(-1e5, 1e5))
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    transform = (cos, -sin * mirrored + shear * cos, x, sin, cos * mirrored + shear * sin, y)
    return Frame(draw(SIZES), draw(SIZES), tuple(map(float, transform)))


@settings(max_examples=60, deadline=None)
@given(frames_on_maps(), st.data())
def test_burnt_polygons_hold_the_pixels_whose_centres_are_inside(frame, data):
    corner = st.tuples(
        st.floats(-5, frame.width + 5).map(lambda v: round(v, 3)),
        st.floats(-5, frame.height + 5).map(lambda v: round(v, 3)),
    )
    in_pixels = data.draw(st.lists(corner, min_size=3, max_size=6, unique=True))
    on_map = [frame.to_map(column, row) for column, row in in_pixels]
    mask = burn([(polygon(on_map), 7)], frame)
    for row in range(frame.height):
        for column in range(frame.width):
            inside, distance = is_inside(in_pixels, column + 0.5, row + 0.5)
            if distance > 1e-3:
                assert (mask[row, column] == 7) == inside, (row, column)


# ---- maps


@settings(max_examples=100, deadline=None)
@given(frames_on_maps(), st.floats(-50, 50), st.floats(-50, 50))
def test_pixels_and_map_agree_with_rasterio(frame, column, row):
    x, y = frame.to_map(column, row)
    with AffineTransformer(Affine(*frame.transform)) as theirs:
        found = theirs.xy(row, column, offset='ul')
        assert (x, y) == pytest.approx((float(found[0]), float(found[1])), rel=1e-9, abs=1e-6)
        rows, columns = theirs.rowcol(x, y, op=lambda value: value)
    back = frame.to_pixels(x, y)
    assert back == pytest.approx((float(columns), float(rows)), abs=1e-6)
    assert back == pytest.approx((column, row), abs=1e-6)


def test_windows_lie_where_their_pixels_do():
    part = MAPPED.window(4, 6, 5, 10)
    assert part.to_map(0, 0) == MAPPED.to_map(4, 6)
    assert part.to_map(10, 5) == MAPPED.to_map(14, 11)
    assert part.bounds == (1002.0, 4994.5, 1007.0, 4997.0)
    assert part.crs == 'EPSG:32613'
    plain = FRAME.window(4, 6, 5, 10)
    assert plain.to_map(0, 0) == (4, 6)
    assert plain.to_pixels(4, 6) == (0, 0)


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda: Frame(0, 3), '0 x 3 pixels'),
        (lambda: Frame(3, 3, (1.0, 2.0, 0.0, 2.0, 4.0, 0.0)), 'cannot be turned round'),
        (lambda: Frame(3, 3, (float('inf'), 0.0, 0.0, 0.0, 1.0, 0.0)), 'cannot be turned'),
        (lambda: build_label_kind('detection', ['a']), "unknown mltype 'detection'"),
        (lambda: build_label_kind('classification', []), 'one name or more'),
        (lambda: build_label_kind('classification', ['a', 'a']), 'each once'),
        (lambda: build_label_kind('classification', 'abc'), 'list of names'),
        (lambda: build_label_kind('segmentation', [str(i) for i in range(256)]), '255 of them'),
    ],
)
def test_what_cannot_be(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# ---- bytes that are kept


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_come_back_from_their_bytes(data):
    frame = Frame(data.draw(SIZES), data.draw(SIZES))
    classes = [f'class{i}' for i in range(data.draw(st.integers(1, 5)))]
    vector = data.draw(st.lists(st.integers(0, 1), min_size=len(classes), max_size=len(classes)))
    kind = build_label_kind('classification', classes)
    label = kind.read(vector, frame)
    assert kind.decode(kind.encode(label), frame).tolist() == kind.as_json(label) == vector

    kind = build_label_kind('object_detection', classes)
    boxes = [[(0.0, 0.0, float(frame.width), 0.5)] * number for number in vector]
    label = kind.read(boxes, frame)
    assert kind.decode(kind.encode(label), frame) == label
    assert kind.as_json(label) == [[list(box) for box in each] for each in boxes]

    kind = build_label_kind('segmentation', classes)
    seed = data.draw(st.integers(0, 99))
    mask = np.random.default_rng(seed).integers(0, len(classes), (frame.height, frame.width))
    label = kind.read(mask, frame)
    assert kind.decode(kind.encode(label), frame).tolist() == kind.as_json(label) == mask.tolist()


def test_a_class_that_came_later_is_not_in_labels_that_were_before():
    before = build_label_kind('classification', ['a'])
    after = build_label_kind('classification', ['a', 'b'])
    assert after.decode(before.encode(before.read([1], FRAME)), FRAME).tolist() == [1, 0]


@pytest.mark.parametrize('mltype', ['classification', 'object_detection', 'segmentation'])
@pytest.mark.parametrize('spoil', [lambda b: b + b'\x05' * 7, lambda b: b'\x09' * 41])
def test_bytes_that_are_damaged(mltype, spoil):
    kind = build_label_kind(mltype, ['a', 'b'])
    whole = {
        'classification': [1, 0],
        'object_detection': [[[0, 0, 1, 1]], []],
        'segmentation': np.ones((20, 30), int),
    }[mltype]
    data = spoil(kind.encode(kind.read(whole, FRAME)))
    if mltype == 'segmentation':
        other = Frame(20, 31)
        with pytest.raises(DataError, match='damaged'):
            kind.decode(kind.encode(kind.read(whole, FRAME)), other)
        data = data[:-9] if data.startswith(b'\x78') else data
    with pytest.raises(DataError, match='damaged'):
        kind.decode(data, FRAME)


def test_boxes_that_are_nowhere_on_earth_are_in_no_box():
    east = {'EPSG:32613': (500_000.0, 4_399_000.0, 501_000.0, 4_400_000.0)}
    found = united_degrees(east.items())
    assert found == pytest.approx((-105.0, 39.74, -104.988, 39.75), abs=0.01)
    nowhere = {
        'EPSG:abc': (0.0, 0.0, 1.0, 1.0),
        'EPSG:3857': (1e300, 1e300, 2e300, 2e300),
        'EPSG:4326': (1e5, 0.0, 2e5, 1.0),
        'EPSG:32613': (float('nan'), 0.0, 1.0, 1.0),
        'LOCAL_CS["microscope"]': (0.0, 0.0, 1.0, 1.0),
        '': (0.0, 0.0, 1.0, 1.0),
    }
    for crs, box in nowhere.items():
        assert united_degrees([(crs, box)]) is None, crs
    assert united_degrees({**nowhere, **east}.items()) == found
    assert united_degrees([]) is None


@pytest.mark.parametrize(
    ('arcs', 'expected'),
    [
        ([(170, -170)], (170, -170)),
        ([(170, 175), (-175, -170)], (170, -170)),
        ([(-100, -90), (10, 20)], (-100, 20)),
        ([(-180, 180), (3, 4)], (-180, 180)),
        ([(-180, 0), (0, 180)], (-180, 180)),
        ([(-90, -90), (90, 90)], (-90, 90)),
        ([(-180, -179), (179, 180)], (179, -179)),
    ],
)
def test_longitudes_on_both_sides_of_the_180th_meridian(arcs, expected):
    assert united_longitudes(arcs) == expected


@given(st.lists(st.tuples(*[st.integers(-180, 180)] * 2), min_size=1, max_size=5))
def test_united_longitudes_hold_all_and_nothing_shorter_does(arcs):
    def within(place, west, east):
        return west <= place <= east if west <= east else not east < place < west

    def length(west, east):
        return east - west if west <= east else east - west + 360

    west, east = united_longitudes(arcs)
    inside = {
        place for one, other in arcs for place in range(-180, 181) if within(place, one, other)
    }
    # the 180th meridian has two names
    assert all(
        within(place, west, east) or (abs(place) == 180 and within(-place, west, east))
        for place in inside
    )
    # any that is as good begins where one of them does
    turned = {place % 360 for place in inside}
    shortest = min(
        max((place - start) % 360 for place in turned) for start in {one % 360 for one, _ in arcs}
    )
    gaps_count = {(place + 1) % 360 for place in turned} <= turned
    assert gaps_count or length(west, east) <= max(shortest, 0) + 1e-9


@pytest.mark.parametrize('size', [5, 40])
def test_lines_that_leave_the_image_are_drawn_as_if_they_were_followed(size):
    from affine import Affine
    from rasterio.features import rasterize
    from scipy.ndimage import binary_dilation

    rng = np.random.default_rng(size)
    for _ in range(50):
        line = rng.uniform(-50 * size, 50 * size, (6, 2)).tolist()
        shape = {'type': 'LineString', 'coordinates': line}
        expected = rasterize([(shape, 1)], (size, size), transform=Affine.identity())
        found = burn([(shape, 1)], Frame(size, size))
        # a pixel to the side is a matter of rounding
        assert not (found.astype(bool) & ~binary_dilation(expected, np.ones((3, 3)))).any()
        assert not (expected.astype(bool) & ~binary_dilation(found, np.ones((3, 3)))).any()
    inside = {'type': 'LineString', 'coordinates': rng.uniform(0, size, (20, 2)).tolist()}
    expected = rasterize([(inside, 1)], (size, size), transform=Affine.identity())
    assert (burn([(inside, 1)], Frame(size, size)) == expected).all()


def test_what_is_drawn_in_strips_is_drawn_as_at_once():
    angles = np.arange(4000) * 2.399963
    star = np.stack([500 + 480 * np.cos(angles), 500 + 480 * np.sin(angles)], axis=1).tolist()
    shape = {'type': 'Polygon', 'coordinates': [[*star, star[0]]]}
    frame = Frame(1000, 1000)
    from rasterio.features import rasterize

    assert (burn([(shape, 3)], frame) == rasterize([(shape, 3)], (1000, 1000))).all()


@pytest.mark.parametrize('name', ['EPSG:4326', 'EPSG:3857', 'ESRI:102001', 'IAU_2015:30100'])
@pytest.mark.parametrize('version', ['WKT1_GDAL', 'WKT2_2019'])
def test_systems_by_name_and_in_full_are_the_same(name, version):
    system = system_of(name)
    assert system_of(system.to_wkt(version=version)) == system
