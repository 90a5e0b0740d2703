"""Releases of collections: written, kept, read again, refused where they were changed."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.warp import transform_bounds

from finetuner.collections import TrainingSet, create_from_archive, search
from finetuner.collections import training_set as module
from finetuner.collections.geometry import Frame
from finetuner.collections.labels import MaskLabels
from finetuner.collections.local import LocalCollections
from finetuner.collections.release_format import folder_of, mask_of, runs_of
from finetuner.collections.tiles import PlacedImage
from finetuner.excepts import (
    ArtifactError,
    ConfigError,
    ConflictError,
    DataError,
    ForbiddenError,
    NotFoundError,
)

SIZE = (8, 10)
UTM = 'EPSG:32613'
GROUPS = ('train', 'a/b ..', 'test', '..', 'grüße' * 30)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('FINETUNER_DATABASE_URL', raising=False)
    monkeypatch.delenv('FINETUNER_ARTIFACTS_URL', raising=False)
    return tmp_path / 'home'


def image(seed, dtype='uint8', bands=3):
    generator = np.random.default_rng(seed)
    if np.dtype(dtype).kind == 'f':
        return generator.normal(0, 100, (bands, *SIZE)).astype(dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, (bands, *SIZE), dtype, endpoint=True)


def label(seed, mltype):
    generator = np.random.default_rng(seed)
    if mltype == 'classification':
        return generator.integers(0, 2, 3).tolist()
    if mltype == 'object_detection':
        return [
            [(x, 1.5, x + 2.25, 7) for x in range(int(generator.integers(0, 4)))] for _ in '123'
        ]
    return generator.integers(0, 4, SIZE)


def placed(pixels, seed, crs=UTM):
    frame = Frame(*SIZE, (2.0, 0.0, 500_000.0 + 20 * seed, 0.0, -2.0, 4_000_000.0), crs)
    return PlacedImage(pixels, frame, ('GE01',))


def saved(name='set', count=12, mltype='classification', dtype='uint8', on_map=False, **options):
    made = TrainingSet(name, mltype, SIZE, ['a', 'b', 'c'], **options)
    for seed in range(count):
        pixels = image(seed, dtype)
        pair = placed(pixels, seed) if on_map else pixels, label(seed, mltype)
        made.feed([pair], GROUPS[seed % len(GROUPS)])
    made.save()
    return made


def contents(made):
    """All that makes pairs equal, in their order."""
    return [
        (point.group, point.read().tobytes(), str(point.read().dtype), json.dumps(point.data['label']),
         point.data['transform'], point.data['crs'])
        for point in made
    ]  # fmt: skip


def files_of(path):
    with tarfile.open(path) as archive:
        return {m.name.split('/', 1)[1]: archive.extractfile(m).read() for m in archive}


# ---- there and back


@pytest.mark.parametrize('mltype', ['classification', 'object_detection', 'segmentation'])
@pytest.mark.parametrize('on_map', [True, False])
def test_what_was_released_comes_back(tmp_path, mltype, on_map):
    made = saved(mltype=mltype, on_map=on_map, description='shoes', partition=[50, 30, 20])
    made.release('1.0')
    path = made.download_release('1.0', tmp_path)
    assert path == tmp_path / 'set-1.0.tar'
    again = create_from_archive(path, 'again')
    assert (again.id, len(search())) == (None, 1), 'fed and not saved'
    again.save()
    assert contents(again) == contents(made)
    assert again.count == made.count
    old, new = made.document['data'], again.document['data']
    same = ('classes', 'has_fixed_classes', 'description', 'mlType', 'bbox', 'tile_size', 'shape',
            'dtype', 'partition', 'sensors')  # fmt: skip
    assert {key: new[key] for key in same} == {key: old[key] for key in same}


@pytest.mark.parametrize(
    'dtype',
    ['uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'uint64', 'int64', 'float16', 'float32',
     'float64'],
)  # fmt: skip
@pytest.mark.parametrize('bands', [1, 4])
def test_every_dtype_comes_back_as_it_was(tmp_path, dtype, bands):
    made = TrainingSet('set', tile_size=SIZE)
    made.feed([(image(0, dtype, bands), 'cat'), (placed(image(1, dtype, bands), 1), 'dog')])
    made.save()
    made.release('1')
    again = create_from_archive(made.download_release('1', tmp_path / 'a.tar'), 'again')
    again.save()
    assert contents(again) == contents(made)
    again.feed([(image(3, dtype, bands), 'eel')])
    again.save()
    assert again.classes == ['cat', 'dog', 'eel'], 'they grow as before'


@pytest.mark.parametrize('form', ['tar.gz', 'zip', 'folder', 'bare folder', 'bare zip'])
def test_releases_are_read_from_any_archive(tmp_path, form):
    made = saved(mltype='segmentation', on_map=True)
    made.release('1')
    tar = made.download_release('1', tmp_path)
    folder = tmp_path / 'out'
    with tarfile.open(tar) as archive:
        archive.extractall(folder, filter='data')
    if form == 'tar.gz':
        path = shutil.make_archive(tmp_path / 'other', 'gztar', folder)
    elif 'zip' in form:
        path = shutil.make_archive(
            tmp_path / 'other', 'zip', folder / 'set-1' if 'bare' in form else folder
        )
    else:
        path = folder / 'set-1' if 'bare' in form else folder
    again = create_from_archive(path, 'again')
    again.save()
    assert contents(again) == contents(made)


def test_others_can_read_what_is_in_a_release(tmp_path):
    made = saved(mltype='segmentation', on_map=True)
    about = made.release('1')
    files = files_of(made.download_release('1', tmp_path))
    meta = json.loads(files.pop('meta.json'))
    whole = {'percent_cached': 100, 'status': 'COMPLETE'}
    assert meta['data'] == {**made.document['data'], **whole}
    assert 'links' not in meta
    assert meta['files'] == {
        name: {'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data)}
        for name, data in files.items()
    }
    lines = ''.join(f'{meta["files"][name]["sha256"]}  {name}\n' for name in sorted(files))
    assert meta['content_sha256'] == hashlib.sha256(lines.encode()).hexdigest()
    assert about['content_sha256'] == meta['content_sha256']
    features = json.loads(files['bounds.geojson'])['features']
    for point, feature in zip(made, features, strict=True):
        folder = folder_of(point.group)
        assert feature['id'] == point.id
        xs, ys = zip(*feature['geometry']['coordinates'][0], strict=True)
        expected = transform_bounds(UTM, 'EPSG:4326', *point.bounds)
        assert np.allclose([min(xs), min(ys), max(xs), max(ys)], expected, atol=1e-9)
        with rasterio.open(io.BytesIO(files[f'images/{folder}/{point.id}.tif'])) as dataset:
            assert (dataset.read() == point.read()).all()
            assert dataset.crs == UTM
            assert list(dataset.transform)[:6] == point.data['transform']
            assert dataset.profile['compress'] == 'deflate'
        shown = json.loads(files[f'labels/{folder}/{point.id}.json'])
        assert (shown['id'], shown['group'], shown['mlType']) == (
            point.id,
            point.group,
            made.mltype,
        )
        for name, runs in shown['label'].items():
            binary = np.zeros(SIZE[0] * SIZE[1], int)
            place, value = 0, 0
            for count in runs['counts']:  # as COCO describes it
                binary[place : place + count] = value
                place, value = place + count, 1 - value
            value = made.classes.index(name) + 1
            assert (binary.reshape(SIZE, order='F') == (point.y == value)).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_run_lengths_are_the_mask(height, width, seed):
    kind = MaskLabels(('a', 'b', 'c'))
    mask = np.random.default_rng(seed).integers(0, 4, (height, width)).astype(np.uint8)
    assert (mask_of(runs_of(mask, kind.classes), kind, Frame(height, width)) == mask).all()


def test_folders_of_groups_are_safe_and_distinct():
    names = [*GROUPS, 'a_b', 'a%2Fb', 'a/b', '.', '...', '.x', 'A' * 200, 'A' * 199, 'ü' * 200, '~']
    folders = [folder_of(name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert '/' not in folder
        assert not folder.startswith('.')
        assert len(folder.encode()) <= 200


# ---- kept


def test_a_version_never_changes(tmp_path, home):
    made = saved()
    first = made.release('1.0')
    assert made.releases() == [first]
    made.feed([(image(99), [1, 0, 0])])
    made.save()
    with pytest.raises(ConflictError, match='never change'):
        made.release('1.0')
    second = made.release('1.1')
    assert [about['version'] for about in made.releases()] == ['1.0', '1.1']
    assert second['content_sha256'] != first['content_sha256']
    path = made.download_release('1.0', tmp_path / 'x.tar')
    assert hashlib.sha256(path.read_bytes()).hexdigest() == first['sha256']
    assert path.stat().st_size == first['size']
    assert sum(first['count'].values()) == 12
    made.remove()
    assert not list(home.glob('collections/*'))


def test_equal_content_has_one_hash():
    made = saved()
    assert made.release('a')['content_sha256'] == made.release('b')['content_sha256']
    made[0].update([0, 0, 0])
    assert made.release('c')['content_sha256'] != made.release('d-1')['revision']
    twins = [about['content_sha256'] for about in made.releases()]
    assert twins[0] == twins[1] != twins[2] == twins[3]


@pytest.mark.parametrize('version', ['', '.', '..', '.a', 'a/b', 'a b', 'ü', 'a' * 101, 7, None])
def test_versions_have_plain_names(version):
    made = saved(count=1)
    for ask in (made.release, lambda v: made.download_release(v, 'x')):
        with pytest.raises(ConfigError, match=r'letters, digits and \. _ -'):
            ask(version)


def test_what_cannot_be_released_or_downloaded(tmp_path, home):
    with pytest.raises(ConfigError, match='not saved yet'):
        TrainingSet('new', tile_size=SIZE).release('1')
    made = saved(public=True)
    made.release('1')
    with pytest.raises(NotFoundError, match="no release '2'; it has: 1"):
        made.download_release('2', tmp_path)
    place = LocalCollections(module.current_place().settings, 'another')
    other = TrainingSet._opened(place, place.store.find('set'))
    with pytest.raises(ForbiddenError, match='not yours'):
        other.release('2')
    assert other.download_release('1', tmp_path).exists()
    with pytest.raises(ConfigError, match='there is no folder'):
        made.download_release('1', tmp_path / 'no' / 'where.tar')
    archive = next(home.glob('collections/*/releases/1-*.tar'))
    data = bytearray(archive.read_bytes())
    data[3000] ^= 1
    archive.write_bytes(data)
    with pytest.raises(ArtifactError, match='damaged'):
        made.download_release('1', tmp_path / 'y.tar')
    assert not list(tmp_path.glob('y.tar*'))


def test_a_change_while_it_is_released_is_noticed(tmp_path):
    made = saved(count=200)
    point, done = made[0], threading.Event()

    def change():
        while not done.is_set():
            point.update([1, 1, 1])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with pytest.raises(ConflictError, match='changed while'):
            made.release('1')
    finally:
        done.set()
        thread.join()
    assert made.releases() == []
    made.release('1')
    assert len(made.releases()) == 1
    assert create_from_archive(made.download_release('1', tmp_path), 'again').count == made.count


def test_a_collection_without_pairs_is_released_too(tmp_path):
    made = TrainingSet('set', tile_size=SIZE, classes=['a'])
    made.save()
    made.release('1')
    again = create_from_archive(made.download_release('1', tmp_path), 'again')
    again.save()
    assert (again.count, again.tile_size, again.classes) == ({}, list(SIZE), ['a'])


def test_systems_of_their_own_come_back(tmp_path):
    made = TrainingSet('set', tile_size=SIZE)
    made.feed([(placed(image(0), 0, 'microscope 7'), [1])])
    made.feed([(PlacedImage(image(1), Frame(*SIZE, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))), [1])])
    made.save()
    made.release('1')
    path = made.download_release('1', tmp_path)
    features = json.loads(files_of(path)['bounds.geojson'])['features']
    assert [feature['geometry'] for feature in features] == [None, None]
    again = create_from_archive(path, 'again')
    again.save()
    assert contents(again) == contents(made)


def test_releasing_takes_no_memory(tmp_path):
    made = TrainingSet('set', tile_size=(64, 64), classes=['a'])
    made.feed((np.full((3, 64, 64), seed % 250, np.uint8), [seed % 2]) for seed in range(20))
    made.save()
    made.release('first')
    made.feed((np.full((3, 64, 64), seed % 250, np.uint8), [seed % 2]) for seed in range(500))
    made.save()
    tracemalloc.start()
    try:
        made.release('all')
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6, '6 MB of pixels went through'
    names = list(files_of(made.download_release('all', tmp_path)))
    assert names[:-1] == sorted(names[:-1])
    assert names[-1] == 'meta.json'


# ---- what comes from outside


@pytest.fixture
def parts(tmp_path):
    """The files of a release of boxes on a map, by name."""
    made = saved(count=3, mltype='object_detection', on_map=True)
    made.release('1')
    found = files_of(made.download_release('1', tmp_path))
    made.remove()
    return found


def written(path, files, rehash=True):
    """A tar of these files, their hashes right."""
    files = dict(files)
    if rehash:
        meta = json.loads(files.pop('meta.json'))
        meta['files'] = {
            name: {'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data)}
            for name, data in files.items()
        }
        files['meta.json'] = json.dumps(meta).encode()
    with tarfile.open(path, 'w') as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f'set-1/{name}')
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


LABEL, IMAGE = 'labels/train/1.json', 'images/train/1.tif'


def with_json(name, **changes):
    def change(files):
        files[name] = json.dumps({**json.loads(files[name]), **changes}).encode()

    return change


def with_data(**changes):
    def change(files):
        meta = json.loads(files['meta.json'])
        meta['data'].update(changes)
        files['meta.json'] = json.dumps(meta).encode()

    return change


def tiff(pixels):
    with rasterio.MemoryFile() as file:
        size = {'count': len(pixels), 'height': pixels.shape[1], 'width': pixels.shape[2]}
        with file.open(driver='GTiff', dtype=pixels.dtype, **size) as dataset:
            dataset.write(pixels)
        return bytes(file.read())


def with_file(name, data):
    return lambda files: files.update({name: data})


def renamed(old, new):
    return lambda files: files.update({new: files.pop(old)})


CHANGES = {
    'no meta': (lambda files: files.pop('meta.json'), 'no release of a collection'),
    'meta of lists': (with_file('meta.json', b'[]'), 'no JSON object'),
    'meta is cut': (with_file('meta.json', b'{"format": '), 'is no JSON'),
    'meta is nested': (with_file('meta.json', b'[' * 200_000), 'is no JSON'),
    'another format': (with_json('meta.json', format='x'), 'does not say so'),
    'a later revision': (with_json('meta.json', format_revision=2), 'format_revision 2'),
    'no data': (with_json('meta.json', data=None), 'has no `data`'),
    'no name': (with_data(name=None), 'describes no collection'),
    'unknown mltype': (with_data(mlType='boxes'), 'describes no collection'),
    'another mltype': (with_data(mlType='classification'), "'mlType' is object_detection"),
    'no classes': (with_data(classes=[]), 'tells no shape, dtype and classes'),
    'classes are numbers': (with_data(classes=[1]), 'describes no collection'),
    'another size': (with_data(tile_size=[9, 9]), 'not its tile_size'),
    'no shape': (with_data(shape=None), 'tells no shape'),
    'dtype of objects': (with_data(dtype='O'), 'image'),
    'unknown dtype': (with_data(dtype='u9'), 'tells no shape and dtype'),
    'another dtype': (with_data(dtype='int16'), r'its image is \[3, 8, 10\] of uint8'),
    'a huge shape': (
        with_data(shape=[1000, 8000, 8000], tile_size=[8000, 8000]), 'at most .* are read'
    ),
    'a huge tile': (
        with_data(shape=[3, 10**6, 10**6], tile_size=[10**6, 10**6]), 'pixels at most'
    ),
    'sensors that are none': (with_data(sensors=5), '`sensors` that are no list'),
    'a sensor that is none': (with_data(sensors=[5]), 'sensor=5'),
    'label of another kind': (with_json(LABEL, label=[1, 0, 1]), 'boxes of'),
    'label of a mask': (with_json(LABEL, label={'a': {}}), 'it is a list'),
    'label outside': (with_json(LABEL, label=[[[0, 0, 99, 99]], [], []]), 'a box of'),
    'no label': (with_json(LABEL, label=None), 'it is a list'),
    'label is cut': (with_file(LABEL, b'{"id": 1,'), 'is no JSON'),
    'another id': (with_json(LABEL, id=2), "'id' is 2"),
    'another group': (with_json(LABEL, group='test'), 'not that of its folder'),
    'a group of numbers': (with_json(LABEL, group=7), 'group=7'),
    'other classes': (with_json(LABEL, classes=['a']), "'classes' is"),
    'transform of letters': (with_json(LABEL, transform=['a'] * 6), 'six numbers'),
    'transform is flat': (with_json(LABEL, transform=[0] * 6), 'turned round'),
    'crs of numbers': (with_json(LABEL, crs=7), 'crs'),
    'image of another size': (with_file(IMAGE, tiff(image(0)[:, :4])), r'its image is \[3, 4, 10\]'),
    'image of other bands': (with_file(IMAGE, tiff(image(0)[:1])), r'its image is \[1, 8, 10\]'),
    'image of nothing': (with_file(IMAGE, b''), 'no raster|damaged'),
    'image is cut': (lambda files: files.update({IMAGE: files[IMAGE][:200]}), 'damaged|no raster'),
    'image is a text': (with_file(IMAGE, b'hello' * 100), 'no raster'),
    'image points elsewhere': (
        with_file(IMAGE, b'<VRTDataset rasterXSize="10" rasterYSize="8"></VRTDataset>'), 'no raster'
    ),
    'image renamed': (renamed(IMAGE, 'images/train/7.tif'), 'pair 1 of .* has no image'),
    'label renamed': (renamed(LABEL, 'labels/test/1.json'), 'has no label|has no image'),
    'a file of another kind': (with_file('run.sh', b'x'), "'run.sh' is no file of a release"),
}  # fmt: skip


@pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
@pytest.mark.parametrize('what', CHANGES)
def test_what_was_changed_is_told_and_nothing_is_kept(tmp_path, home, parts, what):
    change, words = CHANGES[what]
    create_from_archive(written(tmp_path / 'good.tar', parts)).remove()
    change(parts)
    is_meta = 'meta.json' not in parts or not parts['meta.json'].startswith(b'{"format": "f')
    path = written(tmp_path / 'bad.tar', parts, rehash=not is_meta and what != 'another format')
    with pytest.raises(DataError, match=words) as error:
        create_from_archive(path)
    assert str(home) not in str(error.value)
    assert search() == []
    left = [path for path in (home / 'collections-unsaved').iterdir() if path.is_dir()]
    assert left == []


def test_what_has_another_hash_is_told(tmp_path, parts):
    for name in (IMAGE, LABEL, 'bounds.geojson'):
        changed = {**parts, name: parts[name][:-1] + b' '}
        with pytest.raises(DataError, match=f"{name}' was changed"):
            create_from_archive(written(tmp_path / 'a.tar', changed, rehash=False))
    fewer = {name: data for name, data in parts.items() if name != IMAGE}
    with pytest.raises(DataError, match=f"{IMAGE}' is missing"):
        create_from_archive(written(tmp_path / 'b.tar', fewer, rehash=False))
    with pytest.raises(DataError, match='is there and not in its meta'):
        create_from_archive(written(tmp_path / 'c.tar', {**parts, 'x': b''}, rehash=False))


@pytest.mark.parametrize('form', ['tar', 'gz', 'zip'])
def test_archives_that_end_early_or_were_scrambled(tmp_path, parts, form):
    written(tmp_path / 'a.tar', parts, rehash=False)
    data = (tmp_path / 'a.tar').read_bytes()
    if form == 'gz':
        import gzip

        data = gzip.compress(data, mtime=0)
    if form == 'zip':
        with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                archive.writestr(f'set-1/{name}', content)
        data = (tmp_path / 'a.zip').read_bytes()
    rng = random.Random(0)
    num_refused = 0
    for number in range(120):
        broken = bytearray(data[: rng.randrange(len(data))] if number % 2 else data)
        for _ in range(0 if number % 2 else rng.randrange(1, 30)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / 'broken').write_bytes(broken)
        try:
            made = create_from_archive(tmp_path / 'broken', f'set {number}')
        except (DataError, ArtifactError) as error:
            num_refused += bool(str(error))
        else:
            # what does not matter was changed: a time, a mode, what fills a block
            assert made.count == {'train': 1, 'a/b ..': 1, 'test': 1}
            made.remove()
    assert num_refused > 60
    assert search() == []


def entry(name='set-1/x', kind=tarfile.REGTYPE, target='', data=b''):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    return info, data


@pytest.mark.parametrize(
    ('added', 'words'),
    [
        (entry(kind=tarfile.SYMTYPE, target='/etc/passwd'), 'is a link'),
        (entry(kind=tarfile.LNKTYPE, target='set-1/meta.json'), 'is a link'),
        (entry(kind=tarfile.CHRTYPE), 'no plain file'),
        (entry(kind=tarfile.FIFOTYPE), 'no plain file'),
        (entry('../x'), 'leaves it'),
        (entry('/etc/x'), 'leaves it'),
        (entry('set-1/../../x'), 'leaves it'),
        (entry('C:/x'), 'leaves it'),
        (entry('set-1/meta.json', data=b'{}'), 'more than once'),
        (entry('other/meta.json', data=b'{}'), 'no release'),
        (entry('set-1/deep/er/x', data=b'x'), 'not in its meta'),
    ],
)
def test_tars_that_could_do_harm_are_refused(tmp_path, parts, added, words):
    path = written(tmp_path / 'a.tar', parts)
    with tarfile.open(path, 'a') as archive:
        archive.addfile(added[0], io.BytesIO(added[1]))
    with pytest.raises(DataError, match=words):
        create_from_archive(path)


def test_bombs_are_refused(tmp_path, monkeypatch):
    import gzip

    from finetuner.storage import archives

    monkeypatch.setattr(archives, 'FREE_BYTES', 1 << 20)
    path = tmp_path / 'a.tar.gz'
    path.write_bytes(gzip.compress(bytes(64 << 20)))
    with pytest.raises(DataError, match='100 times its size'):
        create_from_archive(path)


def test_links_in_a_folder_are_refused(tmp_path, parts):
    folder = tmp_path / 'out'
    with tarfile.open(written(tmp_path / 'a.tar', parts)) as archive:
        archive.extractall(folder, filter='data')
    (folder / 'set-1' / IMAGE).unlink()
    (folder / 'set-1' / IMAGE).symlink_to('/etc/passwd')
    with pytest.raises(DataError, match='is a link'):
        create_from_archive(folder)
    with pytest.raises(DataError, match='there is no file'):
        create_from_archive(tmp_path / 'nowhere')
