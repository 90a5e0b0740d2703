"""Garbage of collections: what nothing refers to goes, and never what somebody is about to save."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import delete

from finetuner.collections import TrainingSet, search
from finetuner.collections.cache import open_cache
from finetuner.collections.caching import stop_all_caching
from finetuner.collections.draft import Draft
from finetuner.collections.garbage import collect_collection_garbage
from finetuner.collections.local import LocalCollections
from finetuner.collections.place import current_place
from finetuner.collections.spec import CollectionSpec
from finetuner.collections.store import new_key
from finetuner.collections.tables import CollectionRow
from finetuner.config import Settings
from finetuner.excepts import ConfigError, ConflictError, NotFoundError

from .collection_pairs import in_child

SIZE = (8, 8)
DAY = 24 * 3600.0
NOTHING = {'packs': [], 'releases': [], 'caches': [], 'unfinished': [], 'num_bytes': 0}


@pytest.fixture(params=['disk', 'memory', 'elsewhere'])
def home(request, tmp_path, monkeypatch):
    """Files on this disk, and in two stores that keep times of their own and cannot rename into them."""
    urls = {
        'memory': f'memory://{uuid.uuid4().hex}',
        'elsewhere': f'dir::file://{tmp_path / "elsewhere"}',
    }
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('FINETUNER_ARTIFACTS_URL', raising=False)
    if request.param in urls:
        monkeypatch.setenv('FINETUNER_ARTIFACTS_URL', urls[request.param])
    yield tmp_path / 'home'
    stop_all_caching()


def image(seed):
    found = np.random.default_rng(seed).integers(0, 255, (3, *SIZE), np.uint8)
    found.ravel()[:4] = np.frombuffer(np.uint32(seed).tobytes(), np.uint8)
    return found


def seeds_of(made):
    """What a collection holds; each image is bit for bit what was fed."""
    found = []
    for point in made:
        pixels = point.read()
        seed = int(np.frombuffer(pixels.ravel()[:4].tobytes(), np.uint32)[0])
        assert (pixels == image(seed)).all()
        assert point.y.tolist() == [seed % 2]
        found.append(seed)
    return found


def make(name, seeds):
    made = TrainingSet(name, tile_size=SIZE, classes=['odd'])
    add(made, seeds)
    return made


def add(made, seeds):
    made.feed((image(seed), [seed % 2]) for seed in seeds)
    made.save()
    stop_all_caching()


def local(owner=''):
    return LocalCollections(Settings.from_environment(), owner)


def collect(seconds=0.0, only_look=False):
    return collect_collection_garbage(local(), seconds, only_look)


def make_old(*roots):
    """Three days older, all that is there."""
    for root in roots:
        for path in (root, *root.rglob('*')):
            times = path.stat().st_mtime - 3 * DAY
            os.utime(path, (times, times))


def all_files(home):
    """What is on the disk, and in a store that is in memory; caches are written in the background."""
    files = local().files
    found = [str(path) for path in home.parent.rglob('*') if path.is_file()]
    return {*found, *files._fs.find(files._root)} - {
        each for each in found if '/finetuner.db' in each or '/cache/collections/' in each
    }


# ---- what goes, and what stays


def test_what_somebody_has_stays_and_the_rest_goes(home):
    kept = make('kept', range(6))
    kept.release('1.0')
    kept.batch(2).close()
    theirs = CollectionSpec('theirs', 'classification', SIZE, ('odd',), None, '', False)
    draft = Draft(local().drafts, theirs)
    draft.add(image(1), [1])
    local('alice').store.create(theirs, draft, new_key())
    draft.discard()
    half = make('half', range(4))
    half[0].remove()
    assert vars(collect()) == NOTHING
    there = all_files(home)

    add(kept, range(6, 9))
    for point in kept[6:]:
        point.remove()
    files, key = local().files, kept._saved.key
    files.write(f'{key}/{"0" * 32}.pack', [b'of a save that was killed'])
    files.write(f'{key}/releases/2.0.tar', [b'of a release that was killed'])
    gone = make('gone', range(3))
    digits = gone.release('1.0')['sha256'][:32]
    gone_key = gone._saved.key
    gone.batch(2).close()
    local().files.local_path(f'{gone_key}/{gone[0]._pair.place.pack}')
    with local().database.session() as session:
        # as a process leaves it that is killed before it has deleted the files
        session.execute(delete(CollectionRow).where(CollectionRow.id == gone.id))

    found = collect(only_look=True)
    assert {name.partition('/')[0] for name in found.packs} >= {key, gone_key}
    assert f'{key}/{"0" * 32}.pack' in found.packs
    assert len(found.packs) >= 3
    assert sorted(found.releases) == sorted(
        [f'{key}/releases/2.0.tar']
        + [f'{gone_key}/releases/1.0{end}' for end in ('.json', f'-{digits}.tar')]
    )
    assert found.caches == [str(home / 'cache' / 'collections' / gone_key)]
    assert found.num_bytes > 3 * 192
    assert vars(collect(only_look=True)) == vars(found), 'a look deletes nothing'
    assert vars(collect()) == vars(found)
    assert all_files(home) == there
    assert vars(collect()) == NOTHING
    assert seeds_of(TrainingSet.from_name('kept')) == list(range(6))
    assert seeds_of(TrainingSet.from_name('half')) == [1, 2, 3]
    assert len(list(local('alice').store.iter_pairs(2))) == 1
    path = kept.download_release('1.0', home)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == kept.releases()[0]['sha256']


def test_what_is_new_stays(home):
    made = make('set', range(4))
    made.batch(2).close()
    made.release('1.0')
    key = made._saved.key
    local().files.write(f'{key}/releases/2.0.tar', [b'half'])
    local().files.write(f'{key}/{"0" * 32}.pack', [b'no rows yet'])
    with local().database.session() as session:
        session.execute(delete(CollectionRow))
    (home / 'collections-unsaved' / ('0' * 32)).mkdir()
    there = all_files(home)
    assert vars(collect(seconds=DAY)) == NOTHING
    assert all_files(home) == there
    if local().files.is_local:
        make_old(home)
        found = collect(seconds=DAY)
        assert [len(found.packs), len(found.releases), len(found.caches)] == [2, 3, 1]


def test_what_killed_processes_left_goes_after_a_while(home):
    make('set', range(4))

    def feed_and_die():
        made = TrainingSet.from_name('set')
        made.feed([(image(1), [1])])
        os._exit(0)

    child = in_child(feed_and_die)
    child.join()
    living = TrainingSet('living', tile_size=SIZE, classes=['odd'])
    unsaved = home / 'collections-unsaved'
    (half,) = [path for path in unsaved.iterdir() if path.is_dir()]
    folder = local().files._local_root / 'ab'
    folder.mkdir(parents=True)
    (folder / '.staging-1').write_bytes(b'half a copy')
    assert vars(collect(seconds=DAY)) == NOTHING
    make_old(half, folder)
    living.feed([(image(2), [0])])
    (draft,) = [path for path in unsaved.iterdir() if path.is_dir()]
    assert draft != half, 'who feeds clears what the dead left, at once'
    make_old(draft)
    assert collect(seconds=DAY).unfinished == [str(folder / '.staging-1')]
    living.save()
    assert seeds_of(living) == [2]


def test_a_draft_of_a_dead_process_goes(home):
    def feed_and_die():
        made = make('set', range(2))
        made.feed([(image(1), [1])])
        os._exit(0)

    in_child(feed_and_die).join()
    unsaved = home / 'collections-unsaved'
    (half,) = [path for path in unsaved.iterdir() if path.is_dir()]
    assert collect(seconds=DAY).unfinished == []
    make_old(half)
    assert collect(seconds=DAY, only_look=True).unfinished == [str(half)]
    assert half.exists()
    found = collect(seconds=DAY)
    assert found.unfinished == [str(half)]
    assert found.num_bytes >= 192
    assert not half.exists()


def test_a_cache_of_a_servers_collection_stays_while_it_is_used(home, monkeypatch):
    made = make('set', range(3))
    made.batch(2).close()
    key = made._saved.key
    folder = home / 'cache' / 'collections' / key
    with local().database.session() as session:
        session.execute(delete(CollectionRow))
    make_old(folder)
    monkeypatch.setenv('FINETUNER_HOST', 'http://127.0.0.1:9')
    assert collect(seconds=DAY).caches == []
    monkeypatch.delenv('FINETUNER_HOST')
    with open_cache(folder.parent, key):
        assert collect(seconds=DAY).caches == [], 'it was opened just now'
        make_old(folder)
        assert collect(seconds=DAY).caches == [], 'it is being read'
    make_old(folder)
    assert collect(seconds=DAY).caches == [str(folder)]
    assert not folder.exists()


def test_a_time_that_cannot_be(home):
    with pytest.raises(ConfigError, match='seconds is -1'):
        collect(-1)


# ---- what is about to be named


def test_a_save_that_failed_can_be_done_days_later(home):
    make('taken', range(2))
    made = TrainingSet('free', tile_size=SIZE, classes=['odd'])
    made.feed((image(seed), [seed % 2]) for seed in range(5))
    made.update(name='taken')
    with pytest.raises(ConflictError):
        made.save()
    # as a save that was refused when its images were there already
    made._draft.seal()
    for path in made._draft.packs:
        local().files.put_file(path, f'{made._key}/{path.name}', may_link=True)
    made.update(name='other')
    assert len(collect().packs) == 1
    made.save()
    assert seeds_of(TrainingSet.from_name('other')) == list(range(5))


def test_images_that_waited_for_days_count_as_new_once_they_are_stored(home):
    made = TrainingSet('set', tile_size=SIZE, classes=['odd'])
    made.feed([(image(1), [1])])
    made._draft.seal()
    (path,) = made._draft.packs
    os.utime(path, (time.time() - 3 * DAY,) * 2)
    local().files.put_file(path, f'{made._key}/{path.name}', may_link=True)
    assert vars(collect(seconds=DAY)) == NOTHING
    assert len(collect(only_look=True).packs) == 1
    made.save()
    assert seeds_of(made) == [1]


def save_and_save(number, count):
    """Make, fill, thin out, release and remove collections; what is there is whole at any time."""
    for turn in range(count):
        made = make(f'{number}-{turn}', range(20))
        wanted = list(range(20))
        for start in (20, 40):
            add(made, range(start, start + 20))
            wanted += range(start, start + 20)
            for point in made[:10]:
                point.remove()
            wanted = wanted[10:]
            assert seeds_of(made) == wanted
            about = made.release(f'v{start}')
            path = made.download_release(f'v{start}', Path(os.environ['FINETUNER_HOME']))
            assert hashlib.sha256(path.read_bytes()).hexdigest() == about['sha256']
        if turn % 2:
            made.remove()
    os._exit(0)


def collect_and_collect(until, told):
    num_turns = num_packs = 0
    while not until.is_set():
        num_packs += len(collect().packs)
        num_turns += 1
    told.send((num_turns, num_packs))
    os._exit(0)


@pytest.mark.parametrize('home', ['disk', 'elsewhere'], indirect=True)
def test_what_is_being_saved_and_released_is_not_taken_away(home):
    """Collect again and again, whatever its age, while other processes save and release."""
    make('first', range(3))
    context = multiprocessing.get_context('fork')
    until = context.Event()
    ours, theirs = context.Pipe()
    collectors = [in_child(collect_and_collect, until, theirs) for _ in range(2)]
    savers = [in_child(save_and_save, number, 4) for number in range(2)]
    for saver in savers:
        saver.join()
    until.set()
    for collector in collectors:
        collector.join()
    assert [child.exitcode for child in (*savers, *collectors)] == [0] * 4
    turns, num_packs = zip(*(ours.recv() for _ in collectors), strict=True)
    assert min(turns) > 5
    assert sum(num_packs) > 4, 'something was there to be taken'
    found = search()
    assert len(found) == 5
    for made in found:
        assert len(seeds_of(made)) in (3, 40)
        for about in made.releases():
            path = made.download_release(about['version'], home)
            assert hashlib.sha256(path.read_bytes()).hexdigest() == about['sha256']
    collect()
    assert vars(collect()) == NOTHING


def test_a_reader_of_what_was_removed_is_told(home):
    made = make('set', range(3))
    points = made[:]
    for point in made[:]:
        point.remove()
    assert len(collect().packs) == 1
    with pytest.raises((NotFoundError, ValueError), match=r'not there any more|removed'):
        points[0].read()
    assert len(current_place().store.list_pairs(made.id, 0, 10)) == 0
