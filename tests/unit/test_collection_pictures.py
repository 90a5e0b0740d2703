"""Pairs as pictures and as Documents."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from finetuner.collections import TrainingSet
from finetuner.collections.drawing import as_rgb, colour_of, draw_pair
from finetuner.collections.geometry import Frame
from finetuner.collections.labels import build_label_kind
from finetuner.data.sources import open_documents
from finetuner.excepts import ConfigError, NotFoundError

SIZE = (40, 60)
FRAME = Frame(*SIZE)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (3, *SIZE), np.uint8)


def opened(blob):
    return np.asarray(Image.open(io.BytesIO(blob)))


# ---- colours


def test_uint8_is_shown_as_it_is_and_one_band_is_grey():
    pixels = image()
    assert (as_rgb(pixels) == pixels.transpose(1, 2, 0)).all()
    assert (as_rgb(pixels[:1]) == pixels[0][..., None]).all()
    assert (as_rgb(pixels[:2]) == pixels[0][..., None]).all()
    assert (as_rgb(pixels, [2, 1, 0]) == pixels[::-1].transpose(1, 2, 0)).all()
    for bands in ([0, 1, 3], [0, 1], [-1, 0, 1]):
        with pytest.raises(ConfigError, match='three numbers from 0 to 2'):
            as_rgb(pixels, bands)


@pytest.mark.parametrize('dtype', ['uint16', 'int32', 'float32'])
def test_other_numbers_are_stretched(dtype):
    ramp = np.arange(2400).reshape(1, *SIZE).astype(dtype)
    shown = as_rgb(ramp)[..., 0].ravel().astype(int)
    assert (shown.min(), shown.max()) == (0, 255)
    assert (np.diff(shown) >= 0).all()
    assert (shown == 0).mean() == pytest.approx(0.02, abs=0.01)


def test_what_is_no_number_is_black():
    pixels = np.ones((1, *SIZE), np.float32)
    pixels[0, 0, 0], pixels[0, 0, 1] = np.nan, 2
    assert (as_rgb(pixels)[0, 0] == 0).all()
    assert as_rgb(np.full((1, *SIZE), np.nan, np.float32)).max() == 0


def test_classes_have_colours_of_their_own():
    assert len({colour_of(i) for i in range(40)}) == 40


# ---- boxes and masks


def test_boxes_are_drawn_where_they_are():
    kind = build_label_kind('object_detection', ['a'])
    plain = np.full((3, *SIZE), 255, np.uint8)
    picture = np.asarray(draw_pair(plain, kind.read([[10, 5, 30, 20]], FRAME), kind))
    scale = picture.shape[1] // SIZE[1]
    rows, columns = np.nonzero((picture == colour_of(0)).all(-1))
    assert (columns.min(), columns.max() + 1) == (10 * scale, 30 * scale)
    assert (rows.min(), rows.max() + 1) == (5 * scale, 20 * scale)
    assert (picture[10 * scale, 20 * scale] == 255).all(), 'what is in it is seen'


def test_masks_are_laid_over_the_picture():
    kind = build_label_kind('segmentation', ['a', 'b'])
    mask = np.zeros(SIZE, np.uint8)
    mask[:10], mask[30:] = 1, 2
    plain = np.full((3, *SIZE), 200, np.uint8)
    picture = np.asarray(draw_pair(plain, mask, kind)).astype(float)
    scale = picture.shape[0] // SIZE[0]
    for row, colour in ((5, colour_of(0)), (35, colour_of(1))):
        assert picture[row * scale, 0] == pytest.approx(0.55 * 200 + 0.45 * np.array(colour), abs=1)
    assert (picture[20 * scale] == 200).all()


# ---- sheets


def made(count=10, mltype='classification', label=('cat',)):
    training_set = TrainingSet('set', mltype, SIZE)
    training_set.feed((image(i), label) for i in range(count))
    training_set.save()
    return training_set


def test_a_sheet_shows_pairs_of_all_of_the_collection():
    training_set = made(30)
    sheet = training_set.preview(count=6, columns=3, size=40)
    assert sheet.height > training_set.preview(count=3, columns=3, size=40).height + 40
    assert training_set[3].preview.size[0] >= 256
    with pytest.raises(ConfigError, match='no pairs to draw'):
        training_set.preview(group='test')
    with pytest.raises(ConfigError, match='1 to 256'):
        training_set.preview(count=0)
    with pytest.raises(ConfigError, match='columns=0'):
        training_set.preview(columns=0)


def test_bad_pairs_are_marked_and_removed():
    training_set = made(10)
    cleaning = training_set.clean(size=4)
    assert (cleaning.page, cleaning.num_pages) == (1, 3)
    first = [point.id for point in cleaning.points]
    cleaning.mark(first[0], first[2], first[0])
    before = np.asarray(cleaning.sheet)
    assert (before == (0xD7, 0x30, 0x27)).all(-1).any(), 'framed in red'
    with pytest.raises(NotFoundError, match='not on page 1'):
        cleaning.mark(first[1], 999)
    assert cleaning.marked == [first[0], first[2]]
    assert cleaning.turn().turn().turn().page == 3
    assert [point.id for point in cleaning.points] == [9, 10]
    cleaning.mark(10).mark(9).unmark(9)
    with pytest.raises(ConfigError, match='pages 1 to 3'):
        cleaning.turn(4)
    assert cleaning._repr_png_()[:4] == b'\x89PNG'
    assert cleaning.remove() == 3
    assert cleaning.marked == []
    assert [point.id for point in training_set] == [2, 4, 5, 6, 7, 8, 9]
    assert cleaning.page == 2


# ---- Documents


def test_pairs_become_documents_by_class():
    training_set = TrainingSet('set', tile_size=SIZE, classes=['cat', 'dog'])
    labels = ['cat', [1, 1], [0, 0]]
    training_set.feed((image(i), label) for i, label in enumerate(labels))
    training_set.feed([(image(3), 'dog')], group='test')
    training_set.save()
    docs = training_set.to_documents()
    assert [doc.tags['finetuner_label'] for doc in docs] == ['cat', 'cat + dog', 'none', 'dog']
    assert [doc.tags['group'] for doc in docs] == ['train'] * 3 + ['test']
    for number, doc in enumerate(docs):
        assert (opened(doc.blob) == image(number).transpose(1, 2, 0)).all()
    assert len({doc.id for doc in docs}) == 4
    assert len(training_set.to_documents('test')) == 1
    assert [doc.id for doc in open_documents(training_set)] == docs[:3, 'id']
    turned = training_set.to_documents(bands=[2, 1, 0])[0]
    assert (opened(turned.blob) == image(0)[::-1].transpose(1, 2, 0)).all()


def test_a_picture_stays_the_file_it_was():
    file = io.BytesIO()
    Image.fromarray(image().transpose(1, 2, 0)).save(file, 'JPEG')
    training_set = TrainingSet('set', tile_size=SIZE)
    training_set.feed([(file.getvalue(), 'cat')])
    training_set.save()
    assert training_set.to_documents()[0].blob == file.getvalue()


def test_boxes_become_pictures_by_class():
    training_set = TrainingSet('set', 'object_detection', SIZE, ['car', 'boat'])
    training_set.feed(
        [
            (image(0), {'car': [[1, 2, 11, 22], [0.5, 0.5, 3.2, 4]], 'boat': [[0, 0, 60, 40]]}),
            (image(1), {}),
        ]
    )
    training_set.save()
    docs = training_set.to_documents()
    assert [doc.tags['finetuner_label'] for doc in docs] == ['car', 'car', 'boat']
    pixels = image(0).transpose(1, 2, 0)
    for doc, cut in zip(docs, (pixels[2:22, 1:11], pixels[0:4, 0:4], pixels), strict=True):
        assert (opened(doc.blob) == cut).all()
    assert docs[0].tags['box'] == [1, 2, 11, 22]
