"""The cache of a collection: whole or not there, whatever ends its writer, and right for all readers."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import pickle
import resource
import threading
import time

import h5py
import numpy as np
import pytest

from finetuner.collections.cache import count_cached, open_cache, write_cache
from finetuner.collections.cache.disk import hold
from finetuner.collections.cache.packing import ChunkForm, pack
from finetuner.collections.cache.parts import write_part
from finetuner.excepts import ConfigError, DataError, NotFoundError

from .collection_pairs import KEY, MemorySource, assert_serves, image_of, in_child

PER_PART = ChunkForm((3, 8, 8), np.dtype(np.uint8)).images_per_part


def files(root, start=''):
    return sorted(name for name in os.listdir(root / KEY) if name.startswith(start))


def ids_of_part(path):
    with h5py.File(path) as file:
        return file['ids'][()].tolist()


def images_of(root):
    """Pairs whose images lie in parts, each part's."""
    return [ids_of_part(root / KEY / name) for name in files(root, 'images-')]


# ---- what is written


@pytest.mark.parametrize('mltype', ['classification', 'object_detection', 'segmentation'])
def test_what_is_written_is_read(tmp_path, mltype):
    source = MemorySource([3, 4, 7, 2**40], mltype=mltype, shape=(2, 9, 11))
    assert write_cache(source, tmp_path)
    with open_cache(tmp_path, KEY) as cache:
        assert cache.is_whole
        assert_serves(cache, source)
    assert count_cached(tmp_path, KEY) == 4


@pytest.mark.parametrize(
    'dtype', ['bool', 'uint8', 'int8', 'uint16', '>u2', 'int32', 'f2', 'f4', 'f8']
)
def test_any_program_that_reads_hdf5_finds_the_images(tmp_path, dtype):
    source = MemorySource(range(8), dtype=dtype, shape=(3, 16, 20))
    write_cache(source, tmp_path)
    (name,) = files(tmp_path, 'images-')
    with h5py.File(tmp_path / KEY / name) as file:
        images = file['images']
        assert images.chunks == (1, 3, 16, 20)
        assert images.compression == 'gzip'
        for row, pair_id in enumerate(file['ids'][()].tolist()):
            assert (images[row] == image_of(pair_id, source.shape, images.dtype)).all()
    with open_cache(tmp_path, KEY) as cache:
        assert cache.dtype == source.dtype.newbyteorder('=')
        for position in range(8):
            assert (cache.read_image(position) == source.image_of(position)).all()


def test_what_compresses_is_smaller_and_noise_is_kept_as_it_is(tmp_path):
    steps, noise = range(0, 40, 2), range(1, 41, 2)
    sizes = {}
    for name, ids in (('steps', steps), ('noise', noise)):
        write_cache(MemorySource(ids, shape=(3, 256, 256)), tmp_path / name)
        (part,) = files(tmp_path / name, 'images-')
        path = tmp_path / name / KEY / part
        sizes[name] = path.stat().st_size / (20 * 3 * 256 * 256)
        with h5py.File(path) as file:
            chunks = [file['images'].id.get_chunk_info(row) for row in range(20)]
        assert {chunk.filter_mask for chunk in chunks} == {int(name == 'noise')}
    assert sizes['steps'] < 0.6
    assert 1 <= sizes['noise'] < 1.02


def test_an_empty_collection_has_a_cache(tmp_path):
    source = MemorySource([])
    assert write_cache(source, tmp_path)
    with open_cache(tmp_path, KEY) as cache:
        assert cache.is_whole
        assert_serves(cache, source)
        assert cache.groups == ()
    assert files(tmp_path, 'images-') == []


def test_there_is_no_cache_before_one_is_written(tmp_path):
    with pytest.raises(NotFoundError, match='has no cache'):
        open_cache(tmp_path, KEY)
    assert count_cached(tmp_path, KEY) == 0
    for key in ('', '../up', 'AB', 'xyz'):
        with pytest.raises(ConfigError, match='names no collection'):
            open_cache(tmp_path, key)


def test_an_image_of_another_form_is_refused_and_nothing_is_left(tmp_path):
    source = MemorySource(range(3))
    source.shape = (3, 8, 9)
    source.image_of = lambda pair_id: image_of(pair_id, (3, 8, 8), np.uint8)
    with pytest.raises(DataError, match=r'shape \(3, 8, 8\)'):
        write_cache(source, tmp_path)
    assert files(tmp_path, 'images-') == []
    assert files(tmp_path, '.unfinished') == []


def test_ids_have_to_rise(tmp_path):
    source = MemorySource(range(3))
    source.ids = [1, 3, 2]
    with pytest.raises(DataError, match='pair 2 comes after pair 3'):
        write_cache(source, tmp_path)


# ---- what is written again


def test_a_second_time_nothing_is_read_or_written(tmp_path):
    source = MemorySource(range(20))
    write_cache(source, tmp_path)
    before = {name: (tmp_path / KEY / name).stat().st_mtime_ns for name in files(tmp_path)}
    source.reads.clear()
    source.rows = None
    assert write_cache(source, tmp_path)
    assert source.reads == []
    after = {name: (tmp_path / KEY / name).stat().st_mtime_ns for name in files(tmp_path)}
    before.pop('.writing.lock')
    after.pop('.writing.lock')
    assert after == before


def test_new_labels_are_written_without_images(tmp_path):
    write_cache(MemorySource(range(20)), tmp_path)
    parts = files(tmp_path, 'images-')
    source = MemorySource(range(20), revision=2, salt=1)
    write_cache(source, tmp_path)
    assert source.reads == []
    assert files(tmp_path, 'images-') == parts
    assert files(tmp_path, 'labels-') == ['labels-2-1.h5']
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, source)


def test_a_client_that_is_behind_changes_nothing(tmp_path):
    newer = MemorySource(range(5, 20), revision=2)
    write_cache(newer, tmp_path)
    older = MemorySource(range(10), revision=1)
    assert write_cache(older, tmp_path)
    assert older.reads == []
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, newer)


def test_parts_stay_until_less_than_half_of_one_is_wanted(tmp_path):
    write_cache(MemorySource(range(40)), tmp_path)
    parts = files(tmp_path, 'images-')
    half = MemorySource(range(20), revision=2)
    write_cache(half, tmp_path)
    assert files(tmp_path, 'images-') == parts
    less = MemorySource(range(19), revision=3)
    write_cache(less, tmp_path)
    assert images_of(tmp_path) == [list(range(19))]
    # copied from the part where they were
    assert less.reads == half.reads == []
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, less)
    write_cache(MemorySource([], revision=4), tmp_path)
    assert images_of(tmp_path) == []


def test_a_collection_that_grows_by_little_has_no_crowd_of_parts(tmp_path):
    for revision in range(1, 30):
        source = MemorySource(range(3 * revision), revision=revision)
        write_cache(source, tmp_path)
        assert source.reads == [each for each in source.ids if each >= 3 * (revision - 1)]
        assert len(files(tmp_path, 'images-')) == 1
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, source)


def test_full_parts_are_left_alone(tmp_path):
    write_cache(MemorySource(range(2 * PER_PART)), tmp_path)
    parts = files(tmp_path, 'images-')
    source = MemorySource(range(2 * PER_PART + 5), revision=2)
    told = []
    write_cache(source, tmp_path, on_progress=lambda *numbers: told.append(numbers))
    assert set(parts) < set(files(tmp_path, 'images-'))
    assert sorted(map(len, images_of(tmp_path))) == [5, PER_PART, PER_PART]
    assert told == [(2 * PER_PART, 2 * PER_PART + 5), (2 * PER_PART + 5,) * 2]


# ---- being stopped, and killed


def test_who_is_stopped_goes_on_later(tmp_path):
    source = MemorySource(range(PER_PART + 300))
    told = []
    assert not write_cache(
        source,
        tmp_path,
        on_progress=lambda *numbers: told.append(numbers),
        should_stop=lambda: len(source.reads) >= PER_PART + 100,
    )
    total = PER_PART + 300
    assert told == [(0, total), (PER_PART, total), (PER_PART + 100, total)]
    assert count_cached(tmp_path, KEY) == PER_PART + 100
    with open_cache(tmp_path, KEY) as cache:
        assert not cache.is_whole
        assert_serves(cache, source, every=7)
        with pytest.raises(DataError, match='was not written yet'):
            cache.read_image(total - 1)
    source.reads.clear()
    assert write_cache(source, tmp_path)
    assert source.reads == list(range(PER_PART + 100, total))
    with open_cache(tmp_path, KEY) as cache:
        assert cache.is_whole
        assert_serves(cache, source, every=7)
    assert files(tmp_path, 'begun') == []


def test_a_failing_image_keeps_what_was_written(tmp_path):
    source = MemorySource(range(PER_PART + 300))
    right = source.image_of

    def failing(pair_id):
        if pair_id == PER_PART + 200:
            raise OSError('the disk is gone')
        return right(pair_id)

    source.image_of = failing
    with pytest.raises(OSError, match='the disk is gone'):
        write_cache(source, tmp_path)
    assert files(tmp_path, '.unfinished') == []
    source.image_of = right
    source.reads.clear()
    assert write_cache(source, tmp_path)
    assert source.reads == list(range(PER_PART, PER_PART + 300))


def test_killed_at_any_moment_nothing_half_written_is_served(tmp_path):
    random = np.random.default_rng(0)
    source = MemorySource(range(10 * PER_PART))
    num_parts = []
    for _ in range(15):
        before = set(files(tmp_path, 'images-')) if (tmp_path / KEY).exists() else set()
        writer = in_child(write_cache, source, tmp_path)
        time.sleep(float(random.uniform(0, 0.25)))
        writer.kill()
        writer.join()
        if not (tmp_path / KEY).exists():
            continue
        num_parts.append(len(files(tmp_path, 'images-')))
        assert before <= set(files(tmp_path, 'images-'))
        assert sum(map(len, images_of(tmp_path))) == count_cached(tmp_path, KEY)
        if files(tmp_path, 'begun') or files(tmp_path, 'labels'):
            with open_cache(tmp_path, KEY) as cache:
                assert_serves(cache, source, every=97)
    assert len(set(num_parts)) > 2, f'killed too early or too late: {num_parts}'
    there = {pair_id for ids in images_of(tmp_path) for pair_id in ids}
    parts = set(files(tmp_path, 'images-'))
    assert write_cache(source, tmp_path)
    assert source.reads == [pair_id for pair_id in source.ids if pair_id not in there]
    assert parts <= set(files(tmp_path, 'images-'))
    assert files(tmp_path, '.unfinished') == files(tmp_path, 'begun') == []
    with open_cache(tmp_path, KEY) as cache:
        assert cache.is_whole
        assert_serves(cache, source, every=97)


def a_change(source, random):
    """The next revision: some pairs fewer, some more, other labels."""
    ids = [pair_id for pair_id in source.ids if random.random() < 0.7]
    first = max(source.ids) + 1
    more = range(first, first + int(random.integers(1, 120)))
    return MemorySource([*ids, *more], source.revision + 1, salt=source.revision + 1)


def test_killed_amid_changes_a_whole_revision_is_served(tmp_path):
    random = np.random.default_rng(1)
    sources = {1: MemorySource(range(200))}
    write_cache(sources[1], tmp_path)
    # longer after one that was killed too early, shorter after one that came to its end
    wait = 0.05
    served = []
    for revision in range(2, 32):
        source = sources[revision] = a_change(sources[revision - 1], random)
        writer = in_child(write_cache, source, tmp_path)
        writer.join(wait * float(random.uniform(0.5, 1.5)))
        writer.kill()
        writer.join()
        with open_cache(tmp_path, KEY) as cache:
            assert cache.is_whole
            assert_serves(cache, sources[cache.revision], every=3)
            served.append(cache.revision)
            wait *= 0.6 if cache.revision == revision else 1.6
    assert served == sorted(served)
    behind = sum(one != revision for revision, one in enumerate(served, 2))
    assert 0 < behind < 30, 'always killed too late, or too early'
    assert write_cache(source, tmp_path)
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, source)
    assert len(files(tmp_path, 'labels-')) == 1
    assert len(files(tmp_path)) == 1 + 1 + len(files(tmp_path, 'images-'))
    assert len(files(tmp_path, 'images-')) <= 2


def fill_the_disk(source, root, limits):
    """A process that cannot write files longer than this, and this: 7 if it is told so each time."""
    for limit in limits:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        with pytest.raises(OSError, match='File too large'):
            write_cache(source, root)
        # what HDF5 could not close brings the process down here, if not before
        gc.collect()
    os._exit(7)


def test_a_full_disk_keeps_what_was_there(tmp_path):
    first, source = MemorySource(range(30)), MemorySource(range(500), revision=2)
    write_cache(source, tmp_path / 'whole')
    (part,) = files(tmp_path / 'whole', 'images-')
    size = (tmp_path / 'whole' / KEY / part).stat().st_size
    write_cache(first, tmp_path)
    before = files(tmp_path)
    # the end is where the indexes are written
    limits = [100, 1000, 10_000, *range(size - 6000, size, 300)]
    # not forked: threads of other tests may be at work here, and their locks would be held for ever
    writer = in_child(fill_the_disk, source, tmp_path, limits, method='spawn')
    writer.join(timeout=200)
    assert writer.exitcode == 7
    assert set(before) <= set(files(tmp_path))
    assert files(tmp_path, '.unfinished') == []
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, first)
    assert write_cache(source, tmp_path)
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, source, every=17)


# ---- several at once


def test_two_writers_take_turns(tmp_path):
    sources = [MemorySource(range(3 * PER_PART)) for _ in range(3)]
    results = []
    writers = [
        threading.Thread(target=lambda one=one: results.append(write_cache(one, tmp_path)))
        for one in sources
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert results == [True] * 3
    assert sorted(pair_id for one in sources for pair_id in one.reads) == sources[0].ids
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, sources[0], every=97)


def test_who_waits_for_a_writer_can_be_stopped(tmp_path):
    slow, waiting = MemorySource(range(10)), MemorySource(range(10))
    is_reading, may_go_on = threading.Event(), threading.Event()
    right = slow.image_of

    def wait(pair_id):
        is_reading.set()
        may_go_on.wait(20)
        return right(pair_id)

    slow.image_of = wait
    writer = threading.Thread(target=write_cache, args=(slow, tmp_path))
    writer.start()
    is_reading.wait(20)
    assert not write_cache(waiting, tmp_path, should_stop=lambda: True)
    # who reads alone does not wait
    assert count_cached(tmp_path, KEY) == 0
    with open_cache(tmp_path, KEY) as cache:
        assert len(cache) == 0
    may_go_on.set()
    writer.join()
    assert waiting.reads == []
    assert count_cached(tmp_path, KEY) == 10


def read_all_the_time(root, sources, until):
    seen = set()
    while not until.is_set():
        with open_cache(root, KEY) as cache:
            assert cache.is_whole
            assert_serves(cache, sources[cache.revision], every=5)
            seen.add(cache.revision)
    os._exit(0 if len(seen) > 2 else 3)


def test_readers_keep_what_they_opened_while_a_writer_goes_on(tmp_path):
    import multiprocessing

    random = np.random.default_rng(2)
    sources = {1: MemorySource(range(300))}
    for revision in range(2, 26):
        sources[revision] = a_change(sources[revision - 1], random)
    write_cache(sources[1], tmp_path)
    until = multiprocessing.get_context('fork').Event()
    held = open_cache(tmp_path, KEY)
    reader = in_child(read_all_the_time, tmp_path, sources, until)
    for revision in range(2, 26):
        write_cache(sources[revision], tmp_path)
        assert_serves(held, sources[1], every=20)
    until.set()
    reader.join(20)
    assert reader.exitcode == 0
    again = pickle.loads(pickle.dumps(held))
    held.close()
    assert_serves(again, sources[1])
    write_cache(MemorySource(sources[25].ids, 26), tmp_path)
    assert_serves(again, sources[1])
    again.close()
    # nobody reads them any more
    write_cache(MemorySource(sources[25].ids, 27), tmp_path)
    assert files(tmp_path, 'labels-') == ['labels-27-1.h5']
    assert {pair_id for ids in images_of(tmp_path) for pair_id in ids} >= set(sources[25].ids)
    assert len(files(tmp_path, 'images-')) <= 2


def test_a_closed_cache_says_so(tmp_path):
    write_cache(MemorySource(), tmp_path)
    cache = open_cache(tmp_path, KEY)
    cache.read_image(0)
    cache.close()
    with pytest.raises(DataError, match='was closed'):
        cache.read_image(0)
    with pytest.raises(DataError, match='was closed'):
        cache.read_label(0)


def read_or_say(root, source):
    """What a process that reads all says of it: 0 right, 5 damaged."""
    try:
        with open_cache(root, KEY) as cache:
            assert_serves(cache, source)
    except DataError as error:
        os._exit(5 if str(root / KEY) in str(error) else 4)
    os._exit(0)


@pytest.mark.parametrize('which', ['images-', 'labels-'])
def test_damage_is_noticed_and_mended_by_the_next_writer(tmp_path, which):
    random = np.random.default_rng(3)
    source = MemorySource(range(24), mltype='segmentation', shape=(2, 16, 16))
    write_cache(source, tmp_path)
    outcomes = []
    for _ in range(40):
        (name,) = files(tmp_path, which)
        path = tmp_path / KEY / name
        data = bytearray(path.read_bytes())
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        reader = in_child(read_or_say, tmp_path, source)
        reader.join()
        outcomes.append(reader.exitcode)
        assert reader.exitcode in (0, 5)
        source.reads.clear()
        assert write_cache(source, tmp_path)
        if reader.exitcode == 0 or which == 'labels-':
            assert source.reads == []
        else:
            assert source.reads == source.ids
            assert name not in files(tmp_path)
        with open_cache(tmp_path, KEY) as cache:
            assert_serves(cache, source)
        assert not [one for one in files(tmp_path) if one.endswith('.damaged')]
    assert outcomes.count(5) > 20


def read_without_descriptors(root):
    """8 if a process that may open no more files is told so."""
    cache = open_cache(root, KEY)
    highest = max(map(int, os.listdir('/proc/self/fd')))
    spare = [os.open('/dev/null', os.O_RDONLY) for _ in range(highest)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1,) * 2)
    with pytest.raises(OSError, match='Too many open files'):
        cache.read_image(0)
    os._exit(8)


def test_a_process_with_too_many_open_files_does_not_take_others_for_damaged(tmp_path):
    write_cache(MemorySource(), tmp_path)
    reader = in_child(read_without_descriptors, tmp_path)
    reader.join()
    assert reader.exitcode == 8
    assert not [one for one in files(tmp_path) if one.endswith('.damaged')]


@pytest.mark.parametrize('which', ['images-', 'labels-'])
def test_damage_of_an_index_is_noticed(tmp_path, which):
    random = np.random.default_rng(4)
    source = MemorySource(range(24), mltype='segmentation')
    write_cache(source, tmp_path)
    (name,) = files(tmp_path, which)
    path = tmp_path / KEY / name
    whole = path.read_bytes()
    with h5py.File(path) as file:
        chunks = {
            name: file[name].id.get_chunk_info(0)
            for name in file
            if file[name].chunks and name != 'images'
        }
    assert len(chunks) == (2 if which == 'images-' else 7)
    for chunk in chunks.values():
        for _ in range(5):
            data = bytearray(whole)
            data[chunk.byte_offset + random.integers(chunk.size)] ^= 1 << int(random.integers(8))
            path.write_bytes(data)
            with pytest.raises(DataError, match='is damaged'), open_cache(tmp_path, KEY) as cache:
                assert_serves(cache, source)


def test_who_waits_for_a_file_that_is_removed_is_told(tmp_path):
    path = tmp_path / 'labels-1-1.h5'
    path.touch()
    told = []

    def wait():
        try:
            told.append(hold(path))
        except FileNotFoundError as error:
            told.append(error)

    # as a writer does that removes it
    with path.open('r+') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reader = threading.Thread(target=wait)
        reader.start()
        time.sleep(0.1)
        path.unlink()
    reader.join()
    assert isinstance(told[0], FileNotFoundError)


@pytest.mark.parametrize('harm', ['cut', 'emptied', 'gone', 'text'])
def test_a_part_that_is_not_there_as_it_was_is_written_anew(tmp_path, harm):
    source = MemorySource(range(PER_PART + 600))
    write_cache(source, tmp_path)
    first = min(files(tmp_path, 'images-'), key=lambda name: int(name.split('-')[1]))
    path = tmp_path / KEY / first
    if harm == 'gone':
        path.unlink()
    elif harm == 'cut':
        path.write_bytes(path.read_bytes()[:-3000])
    else:
        path.write_bytes(b'' if harm == 'emptied' else b'no pictures here')
    with open_cache(tmp_path, KEY) as cache, pytest.raises(DataError, match=first):
        assert_serves(cache, source)
    source.reads.clear()
    assert write_cache(source, tmp_path)
    assert source.reads == list(range(PER_PART))
    with open_cache(tmp_path, KEY) as cache:
        assert_serves(cache, source, every=9)


def test_a_part_that_was_wrongly_said_to_be_damaged_is_kept(tmp_path):
    source = MemorySource(range(20))
    write_cache(source, tmp_path)
    (name,) = files(tmp_path, 'images-')
    (tmp_path / KEY / f'{name}.damaged').touch()
    source.reads.clear()
    assert write_cache(source, tmp_path)
    assert source.reads == []
    assert files(tmp_path, 'images-') == [name]


def test_a_cache_of_a_later_format_is_not_guessed_at(tmp_path):
    write_cache(MemorySource(), tmp_path)
    path = tmp_path / KEY / files(tmp_path, 'labels-')[0]
    with h5py.File(path, 'a') as file:
        about = json.loads(file['about'][()].tobytes())
        about['format'] = 2
        del file['about']
        file['about'] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with pytest.raises(DataError, match='of format 2'):
        open_cache(tmp_path, KEY)


def read_in_child(cache, source):
    assert_serves(cache, source)
    os._exit(0)


def test_forked_while_threads_read(tmp_path):
    source = MemorySource(range(200), shape=(3, 32, 32))
    write_cache(source, tmp_path)
    cache = open_cache(tmp_path, KEY)
    until = threading.Event()
    errors = []

    def read():
        while not until.is_set():
            try:
                # anew each time, so that h5py is at work too
                with open_cache(tmp_path, KEY) as mine:
                    assert_serves(mine, source, every=10)
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        child = in_child(read_in_child, cache, source)
        child.join(15)
        assert child.exitcode == 0
    until.set()
    for thread in threads:
        thread.join()
    assert not errors
    cache.close()


def test_a_reader_keeps_few_files_open(tmp_path):
    source = MemorySource(range(200))
    form = ChunkForm(source.shape, source.dtype)
    (tmp_path / KEY).mkdir()
    for pair_id in source.ids:
        write_part(tmp_path / KEY, form, [(pair_id, pack(source.image_of(pair_id), form))], 1)
    assert write_cache(source, tmp_path)
    assert source.reads == []
    before = len(os.listdir('/proc/self/fd'))
    with open_cache(tmp_path, KEY) as cache:
        for _ in range(2):
            assert_serves(cache, source)
        assert len(os.listdir('/proc/self/fd')) - before <= 66
    assert len(os.listdir('/proc/self/fd')) == before
