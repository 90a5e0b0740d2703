"""Collections of pairs on this machine: fed, saved, found, read, changed."""

from __future__ import annotations

import io
import threading
import tracemalloc

import numpy as np
import pytest
from docarray import Document
from PIL import Image

from finetuner.collections import TrainingSet, VedaCollection, search
from finetuner.collections import training_set as module
from finetuner.collections.draft import Draft
from finetuner.collections.local import LocalCollections
from finetuner.config import Settings
from finetuner.excepts import ConfigError, ConflictError, DataError, NotFoundError

SIZE = (8, 10)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('FINETUNER_DATABASE_URL', raising=False)
    monkeypatch.delenv('FINETUNER_ARTIFACTS_URL', raising=False)
    return tmp_path / 'home'


def image(seed=0, bands=3, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 200, (bands, *SIZE)).astype(dtype)


def pairs(count, classes=3, start=0):
    for seed in range(start, start + count):
        label = [0] * classes
        label[seed % classes] = 1
        yield image(seed), label


def saved(name='set', count=6, **options):
    made = TrainingSet(name, tile_size=SIZE, **options)
    made.feed(pairs(count))
    made.save()
    return made


def as_owner(owner):
    """What another user of a server sees of the same store."""
    place = module.current_place()
    twin = LocalCollections(place.settings, owner)
    return twin


# ---- feeding


def test_what_was_fed_is_counted_by_group_and_read_back():
    made = TrainingSet('set', tile_size=SIZE)
    assert (made.count, made.id, made.shape, len(made)) == ({}, None, None, 0)
    made.feed(pairs(4))
    made.feed(pairs(2, start=4), group='test')
    made.feed(pairs(1, start=6), group='odd one')
    assert made.count == {'train': 4, 'test': 2, 'odd one': 1}
    assert made.shape == [3, *SIZE]
    assert made.dtype == np.uint8
    made.save()
    assert made.count == {'train': 4, 'test': 2, 'odd one': 1}
    found = list(made)
    assert [point.group for point in found] == ['train'] * 4 + ['test'] * 2 + ['odd one']
    for point, (pixels, label) in zip(found, pairs(7), strict=True):
        assert point.image.compute().tolist() == pixels.tolist()
        assert point.y.tolist() == label
    assert VedaCollection is TrainingSet


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'int16', 'int32', 'float16', 'float32', 'f8'])
@pytest.mark.parametrize('bands', [1, 3, 8])
def test_every_dtype_comes_back_as_it_was(dtype, bands):
    made = TrainingSet('set', tile_size=SIZE)
    pixels = (image(bands=bands) / 3).astype(dtype)
    made.feed([(pixels, [1]), (pixels.transpose(1, 2, 0), [0])])
    made.feed([(pixels.astype(pixels.dtype.newbyteorder('>')), [1])])
    made.save()
    for point in made:
        read = point.image.compute()
        assert read.dtype == np.dtype(dtype)
        assert read.dtype.isnative
        assert (read == pixels).all()


def encoded(pixels, form):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def test_images_come_in_many_forms(tmp_path):
    import dask.array

    pixels = image().transpose(1, 2, 0)
    png = encoded(pixels, 'PNG')
    (tmp_path / 'a.png').write_bytes(png)
    forms = [
        pixels,
        pixels.transpose(2, 0, 1),
        Image.fromarray(pixels),
        dask.array.from_array(pixels, chunks=3),
        png,
        tmp_path / 'a.png',
        str(tmp_path / 'a.png'),
        Document(blob=png),
        Document(tensor=pixels),
        Document(uri=str(tmp_path / 'a.png')),
    ]
    made = TrainingSet('set', tile_size=SIZE)
    made.feed((form, [1]) for form in forms)
    document = made.save()
    assert document['data']['source'] == 'mixed'
    for point in made:
        assert (point.image.compute() == pixels.transpose(2, 0, 1)).all()


def test_a_picture_is_kept_as_the_file_it_was():
    """So that a set of JPEGs takes the room of JPEGs."""
    picture = encoded(np.zeros((*SIZE, 3), np.uint8), 'JPEG')
    made = TrainingSet('set', tile_size=SIZE)
    made.feed([(picture, [1])])
    made.save()
    pair = made._place.store.list_pairs(made.id, 0, 1)[0]
    assert pair.place.num_bytes == len(picture)


def test_nothing_is_read_before_compute(home):
    made = saved()
    point = made[0]
    lazy = point.image
    assert lazy.shape == (3, *SIZE)
    assert lazy.dtype == np.uint8
    for pack in home.glob('collections/*/*.pack'):
        pack.unlink()
    with pytest.raises(DataError, match='not there any more'):
        lazy.compute()


@pytest.mark.parametrize(
    ('wrong', 'words'),
    [
        ((image()[:, 1:], [1]), r'pair 2: the image is \[3, 7, 10\].*\[bands, 8, 10\]'),
        ((image(bands=4), [1]), r'pair 2: the image is \[4, 8, 10\] of uint8.*\[3, 8, 10\]'),
        ((image(dtype=np.uint16), [1]), 'pair 2: the image is .* of uint16'),
        ((image(), [1, 0]), 'pair 2: a label of this collection is 1 zeros and ones'),
        ((image(), 'blue'), "pair 2: a label.*|pair 2: unknown class 'blue'"),
        ((image(),), 'pair 2: it takes .image, label.'),
        (image(), r'pair 2: it takes \(image, label\), not a ndarray'),
        (('no-such-file.png', [1]), 'pair 2: .*no-such-file.png'),
        ((b'no picture', [1]), 'pair 2: not a picture'),
        ((None, [1]), 'pair 2: an image is an array .* not a NoneType'),
        ((image().astype(complex), [1]), 'pair 2: an image of complex128'),
        ((Document(text='x'), [1]), 'pair 2: the Document holds no image'),
    ],
)
def test_the_first_pair_that_is_not_like_the_others_is_told(wrong, words):
    made = TrainingSet('set', tile_size=SIZE, classes=['one'])
    with pytest.raises(DataError, match=words):
        made.feed([(image(1), [1]), (image(2), [0]), wrong, (image(3), [1])])
    assert made.count == {'train': 2}, 'what came before stays'
    made.feed([(image(4), [1])])
    made.save()
    assert [point.y.tolist() for point in made] == [[1], [0], [1]]


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'mltype': 'clasification'}, "did you mean 'classification'"),
        ({'tile_size': 256}, r'tile_size=256: it takes \[height, width\]'),
        ({'tile_size': [0, 4]}, 'tile_size'),
        ({'tile_size': [4.5, 4]}, 'tile_size'),
        ({'classes': 'cat'}, 'it takes a list of names'),
        ({'classes': ['a', 'a']}, 'each once'),
        ({'classes': []}, 'one name or more'),
        ({'partition': [50, 20, 10]}, 'which make 100'),
        ({'partition': 70}, 'partition=70'),
        ({'name': ''}, 'name'),
        ({'name': 'a\0'}, 'characters that are no text'),
        ({'name': 'a' * 201}, 'at most 200'),
        ({'description': 7}, 'description=7'),
        ({'public': 'yes'}, "public='yes'"),
    ],
)
def test_what_a_collection_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        TrainingSet(**{'name': 'set', **options})


def test_classes_come_from_the_labels_where_none_were_given():
    made = TrainingSet('named', tile_size=SIZE)
    made.feed([(image(), 'cat'), (image(), ['dog', 'cat']), (image(), 'bird')])
    assert made.classes == ['cat', 'dog', 'bird']
    made.save()
    made.feed([(image(), 'eel')])
    made.save()
    assert made.classes == ['cat', 'dog', 'bird', 'eel']
    assert [point.y.tolist() for point in made] == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert made[1].present == ['cat', 'dog']

    boxes = TrainingSet('boxes', 'object_detection', SIZE)
    boxes.feed([(image(), {'car': [[0, 0, 4, 4]]}), (image(), {'boat': [[1, 1, 2, 2]], 'car': []})])
    boxes.save()
    assert boxes.classes == ['car', 'boat']
    assert boxes[1].y == [[], [(1.0, 1.0, 2.0, 2.0)]]

    plain = TrainingSet('one class', 'object_detection', SIZE)
    plain.feed([(image(), []), (image(), [[0, 0, 4, 4]])])
    assert plain.classes == ['class1']

    mask = np.zeros(SIZE, int)
    mask[0, 0] = 3
    masks = TrainingSet('masks', 'segmentation', SIZE)
    masks.feed([(image(), np.zeros(SIZE, int)), (image(), mask)])
    masks.save()
    assert masks.classes == ['class1', 'class2', 'class3']
    assert masks[1].y.tolist() == mask.tolist()
    assert masks[1].data['label'] == mask.tolist()


def test_a_partition_divides_what_is_fed():
    made = TrainingSet('set', tile_size=SIZE, partition=[70, 20, 10])
    made.feed(pairs(50))
    made.save()
    made.feed(pairs(50))
    made.save()
    counts = made.count
    assert counts['train'] == pytest.approx(70, abs=2)
    assert counts['validate'] == pytest.approx(20, abs=2)
    assert counts['test'] == pytest.approx(10, abs=2)
    assert sum(counts.values()) == 100
    made.feed(pairs(1), group='test')
    assert made.count['test'] == counts['test'] + 1


def test_feeding_takes_no_memory():
    made = TrainingSet('set', tile_size=(64, 64))

    def many():
        for seed in range(3000):
            yield np.full((3, 64, 64), seed % 200, np.uint8), [seed % 2]

    made.feed(pairs_of_64(10))
    tracemalloc.start()
    try:
        made.feed(many())
        made.save()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.count == {'train': 3010}
    assert peak < 8e6, '37 MB of pixels went through'


def pairs_of_64(count):
    for _ in range(count):
        yield np.zeros((3, 64, 64), np.uint8), [1]


# ---- saving


def test_saving_tells_what_it_is():
    document = saved(description='shoes', classes=['a', 'b', 'c']).save()
    data = document['data']
    expected = {
        'id': 1,
        'classes': ['a', 'b', 'c'],
        'count': {'train': 6},
        'name': 'set',
        'description': 'shoes',
        'nclasses': 3,
        'mlType': 'classification',
        'bbox': None,
        'shape': [3, *SIZE],
        'dtype': 'uint8',
        'partition': None,
        'sensors': [],
        'source': 'array',
        'userId': '',
        'public': False,
    }
    assert {name: data[name] for name in expected} == expected
    assert data['created_at'].endswith('Z')
    assert set(document['links']) == {'self', 'update', 'publish', 'delete', 'create'}
    assert document['links']['update'] == {'href': '/api/v1/data/1', 'method': 'PUT'}


def test_a_collection_may_be_saved_before_its_first_pair():
    made = TrainingSet('set', tile_size=SIZE, classes=['a', 'b', 'c'])
    data = made.save()['data']
    assert (data['status'], data['shape'], data['dtype'], data['count']) == (
        'EMPTY',
        None,
        None,
        {},
    )
    assert data['tile_size'] == list(SIZE)
    opened = TrainingSet.from_name('set')
    assert (opened.tile_size, opened.classes, len(opened)) == (list(SIZE), ['a', 'b', 'c'], 0)
    opened.feed(pairs(2))
    opened.save()
    assert made.count == {'train': 2}
    assert made.shape == [3, *SIZE]


def test_two_who_bring_the_first_images_do_not_mix_them_up():
    made = TrainingSet('set', tile_size=SIZE)
    made.save()
    one, other = TrainingSet.from_id(made.id), TrainingSet.from_id(made.id)
    one.feed([(image(), [1])])
    other.feed([(image(bands=4), [1])])
    one.save()
    with pytest.raises(ConflictError, match=r'other classes by now|other images'):
        other.save()
    assert made.shape == [3, *SIZE]


def test_nothing_is_saved_twice():
    made = saved()
    made.save()
    assert made.count == {'train': 6}
    with pytest.raises(ConflictError, match=r"from_name\('set'\)"):
        TrainingSet('set', tile_size=SIZE).feed(pairs(1))


def test_a_name_that_was_taken_meanwhile_loses_nothing():
    first, second = TrainingSet('set', tile_size=SIZE), TrainingSet('set', tile_size=SIZE)
    first.feed(pairs(2))
    second.feed(pairs(3))
    first.save()
    with pytest.raises(ConflictError, match='there already'):
        second.save()
    second.update(name='other')
    second.save()
    assert [point.image.compute().sum() for point in second] == [p.sum() for p, _ in pairs(3)]


def test_two_who_add_pairs_at_once_both_do():
    made = saved(count=3)
    others = [TrainingSet.from_id(made.id) for _ in range(4)]
    for number, other in enumerate(others):
        other.feed(pairs(5, start=10 * number))
    threads = [threading.Thread(target=other.save) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.count == {'train': 23}


def test_classes_that_two_bring_at_once_are_not_mixed_up():
    made = TrainingSet('set', tile_size=SIZE)
    made.feed([(image(), 'cat')])
    made.save()
    one, other = TrainingSet.from_id(made.id), TrainingSet.from_id(made.id)
    one.feed([(image(), 'dog')])
    other.feed([(image(), 'eel')])
    one.save()
    with pytest.raises(ConflictError, match='other classes by now'):
        other.save()
    assert made.count == {'train': 2}


def test_removing_leaves_nothing(home):
    made = saved()
    number = made.id
    made.remove()
    assert search() == []
    assert not list(home.glob('collections/*'))
    with pytest.raises(NotFoundError, match=f'no collection {number}'):
        TrainingSet.from_id(number)
    made.feed(pairs(2))
    made.save()
    assert made.id != number, 'ids are never used again'
    assert made.count == {'train': 2}


def test_drafts_of_processes_that_are_gone_are_cleared(home):
    spec = module.CollectionSpec.checked('x', tile_size=SIZE)
    live = Draft(home / 'collections-unsaved', spec)
    live.add(image(), [1])
    left = home / 'collections-unsaved' / 'deadbeef'
    left.mkdir()
    (left / '.lock').touch()
    (left / 'x.pack').write_bytes(b'x')
    Draft(home / 'collections-unsaved', spec).discard()
    assert not left.exists()
    live.add(image(), [1])
    assert len(list(live.pairs())) == 2
    live.discard()
    assert not list((home / 'collections-unsaved').iterdir())


# ---- reading


@pytest.mark.parametrize(
    'index',
    [slice(0, 5), slice(None), slice(-2, None), slice(5, 1), slice(1, 6, 2), slice(None, None, -1),
     slice(4, 0, -3), slice(20, 30)],
)  # fmt: skip
def test_slices_are_those_of_lists(index):
    made = saved()
    expected = [point.id for point in made][index]
    assert [point.id for point in made[index]] == expected


def test_indices_are_those_of_lists():
    made = saved(count=3)
    assert [made[i].id for i in (0, 2, -1, -3)] == [1, 3, 3, 1]
    for index in (3, -4):
        with pytest.raises(IndexError, match='there are 3'):
            made[index]
    with pytest.raises(TypeError, match='whole numbers'):
        made['a']


def test_labels_are_changed_and_pairs_removed():
    made = saved()
    made[0].update([0, 0, 1])
    assert made[0].y.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match='3 zeros and ones'):
        made[0].update([1])
    point = made[1]
    point.remove()
    assert made.count == {'train': 5}
    for late in (point.remove, lambda: point.update([1, 0, 0])):
        with pytest.raises(NotFoundError, match='was removed'):
            late()


def test_a_pack_that_was_damaged_is_noticed(home):
    made = saved()
    (pack,) = home.glob('collections/*/*.pack')
    data = bytearray(pack.read_bytes())
    data[300] ^= 1
    pack.write_bytes(data)
    assert made[0].image.compute().shape
    with pytest.raises(DataError, match='the file is damaged'):
        made[1].image.compute()


def test_threads_read_one_collection():
    made = saved(count=60)
    expected = [pixels.sum() for pixels, _ in pairs(60)]
    points = made[:]
    found: dict[int, list[int]] = {}

    def read(number):
        found[number] = [int(point.image.compute(scheduler='sync').sum()) for point in points]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i] == expected for i in range(6))


# ---- finding


def names(found):
    return [each.name for each in found]


def test_collections_are_found_by_words_kind_and_class():
    saved('Shoes of Rome', description='sandals and boots', classes=['caliga', 'soccus', 'x'])
    saved('Fountains', description='from a plane, over Rome', classes=['caliga', 'b', 'c'])
    masks = TrainingSet('Roofs', 'segmentation', SIZE)
    masks.feed([(image(), np.zeros(SIZE, int))])
    masks.save()
    assert names(search()) == ['Roofs', 'Fountains', 'Shoes of Rome']
    assert set(names(search('rome'))) == {'Fountains', 'Shoes of Rome'}
    assert names(search('rome boot')) == ['Shoes of Rome']
    assert names(search('soccus')) == ['Shoes of Rome']
    assert names(search('fount')) == ['Fountains']
    assert names(search('"; DROP TABLE')) == []
    assert names(search('--')) == []
    assert names(search(mltype='segmentation')) == ['Roofs']
    assert names(search(classes=['caliga', 'b'])) == ['Fountains']
    assert names(search('rome', classes='x')) == ['Shoes of Rome']
    assert names(search(limit=1, offset=1)) == ['Fountains']


def test_operators_of_a_search_are_words():
    saved('Shoes of Rome', count=1)
    assert names(search('AND OR NOT')) == []
    saved('and or not', count=1)
    assert names(search('AND OR NOT')) == ['and or not']


def test_words_follow_what_a_collection_is_now():
    made = saved('first')
    made.update(name='second', description='of everything')
    assert (names(search('first')), names(search('second everything'))) == ([], ['second'])
    made.remove()
    assert search('second') == []
    saved('third')
    assert names(search('third')) == ['third']


def test_collections_are_opened_in_three_ways():
    made = saved()
    for opened in (
        TrainingSet.from_id(made.id),
        TrainingSet.from_id(str(made.id)),
        TrainingSet.from_name('set'),
        TrainingSet.from_doc(made.document),
        TrainingSet.from_doc(made.document['data']),
        TrainingSet.from_doc(search()[0]),
    ):
        assert opened.id == made.id
        assert (opened.classes, opened.tile_size) == (made.classes, list(SIZE))
        assert opened[2].y.tolist() == made[2].y.tolist()
    with pytest.raises(NotFoundError, match="did you mean 'set'"):
        TrainingSet.from_name('sets')
    with pytest.raises(ConfigError, match='no `id`'):
        TrainingSet.from_doc({'name': 'set'})
    with pytest.raises(ConfigError, match='whole number'):
        TrainingSet.from_id('one')


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'text': 7}, 'it takes words'),
        ({'mltype': 'mask'}, 'unknown mltype'),
        ({'bbox': [1, 2, 3]}, r'\[west, south, east, north\]'),
        ({'bbox': [0, 3, 1, 1]}, 'south <= north'),
        ({'bbox': [200, 0, 10, 1]}, 'across the 180th meridian'),
        ({'bbox': [3, 0, float('nan'), 1]}, 'across the 180th meridian'),
        ({'classes': ['x'] * 101}, '100 names'),
        ({'offset': 1 << 63}, 'offset 0 or more'),
        ({'classes': 7}, 'names of classes'),
        ({'limit': 0}, 'limit is 1 to'),
        ({'offset': -1}, 'offset 0 or more'),
    ],
)
def test_what_cannot_be_searched_for(options, words):
    with pytest.raises(ConfigError, match=words):
        search(**options)


# ---- sharing


def test_others_see_what_is_published_and_change_nothing():
    made = saved()
    other = as_owner('bob')
    assert other.store.search(module.Query()) == []
    with pytest.raises(NotFoundError):
        other.store.get(made.id)
    with pytest.raises(NotFoundError):
        other.store.get_pair(made[0].id)
    made.publish()
    assert [record.name for record in other.store.search(module.Query())] == ['set']
    assert other.store.find('set').id == made.id
    pair, collection = other.store.get_pair(made[0].id)
    read = other.store.reader_of(collection)(pair)
    assert len(read) == 3 * SIZE[0] * SIZE[1]
    for attempt in (
        lambda: other.store.change(made.id, name='mine'),
        lambda: other.store.change(made.id, public=False),
        lambda: other.store.remove(made.id),
        lambda: other.store.relabel(pair.id, [0, 1, 0]),
        lambda: other.store.remove_pair(pair.id),
    ):
        with pytest.raises(NotFoundError):
            attempt()
    made.unpublish()
    assert other.store.search(module.Query()) == []
    assert made.count == {'train': 6}


def test_a_name_belongs_to_its_owner():
    saved()
    other = as_owner('bob')
    other.store.check_name('set')
    with pytest.raises(NotFoundError):
        other.store.find('set')


def test_pictures_on_other_storage(tmp_path, monkeypatch):
    """Whatever fsspec opens holds the packs; here its memory."""
    monkeypatch.setenv('FINETUNER_ARTIFACTS_URL', 'memory://bucket/artifacts')
    made = saved(count=4)
    opened = TrainingSet.from_name('set')
    assert [p.image.compute().sum() for p in opened] == [x.sum() for x, _ in pairs(4)]
    assert not list(Settings.from_environment().home.glob('collections/*'))
    made.remove()
