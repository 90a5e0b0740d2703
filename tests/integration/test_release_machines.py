"""Several machines with one database and shared files release at once: one archive a version, whole."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from finetuner.collections import TrainingSet
from finetuner.collections.garbage import collect_collection_garbage
from finetuner.collections.local import LocalCollections
from finetuner.collections.releases import LocalReleases
from finetuner.collections.store import CollectionStore
from finetuner.config import Settings
from finetuner.excepts import ConflictError, FinetunerError, NotFoundError
from finetuner.storage.database import open_database
from tests.postgresql import INSTALLED, REASON, postgresql

NUM_MACHINES = 3
SIZE = (8, 8)


class Meeting(CollectionStore):
    """A store whose users all wait for each other, their archives written, before one is published."""

    barrier: threading.Barrier

    def held(self, record):
        self.barrier.wait(30)
        return super().held(record)


@pytest.fixture(scope='module')
def running():
    with postgresql() as server:
        yield server


@pytest.fixture(params=['sqlite', 'postgresql'])
def url(request, tmp_path):
    if request.param == 'sqlite':
        return f'sqlite:///{tmp_path / "finetuner.db"}'
    if not INSTALLED:
        pytest.skip(REASON)
    server = request.getfixturevalue('running')
    name = ''.join(c for c in request.node.name.lower() if c.isalnum())[:50]
    return server.create_database(name)


@pytest.fixture(params=['disk', 'memory'])
def machines(request, url, tmp_path):
    """Each has a home of its own; what is saved is shared."""
    found = []
    (tmp_path / 'shared').mkdir()
    for number in range(NUM_MACHINES):
        home = tmp_path / f'home {number}'
        home.mkdir()
        (home / 'collections').symlink_to(tmp_path / 'shared')
        artifacts = (
            str(home / 'artifacts') if request.param == 'disk' else f'memory://{tmp_path.name}'
        )
        found.append(LocalCollections(Settings(home, url, artifacts), '', open_database(url)))
    yield found
    for place in found:
        place.database.close()


@pytest.fixture
def made(machines, monkeypatch):
    monkeypatch.setattr('finetuner.collections.training_set.current_place', lambda: machines[0])
    made = TrainingSet('set', tile_size=SIZE, classes=['odd'])
    made.feed((np.full((3, *SIZE), seed, np.uint8), [seed % 2]) for seed in range(20))
    made.save()
    return made


def meeting(machines) -> list[LocalReleases]:
    barrier = threading.Barrier(len(machines))
    found = []
    for place in machines:
        store = Meeting(place.database, place.files, '')
        store.barrier = barrier
        found.append(LocalReleases(store, place.files, place.drafts, ''))
    return found


def at_once(*work):
    """What each returned or raised."""

    def outcome(one):
        try:
            return one()
        except FinetunerError as error:
            return error

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(outcome, work))


def kept(place, made) -> list[str]:
    return place.files.list_names(f'{made._key}/releases')


def test_of_several_that_make_a_version_one_gets_there(machines, made, tmp_path):
    record = made._fresh()
    # a name may change without the pairs: their archives are not the same
    renamed = [place.store.change(made.id, name=f'set {n}') for n, place in enumerate(machines)]
    for version, records in (('same', [record] * NUM_MACHINES), ('other', renamed)):
        outcomes = at_once(
            *(
                lambda one=one, each=each, version=version: one.make(each, version)
                for one, each in zip(meeting(machines), records, strict=True)
            )
        )
        (about,) = (each for each in outcomes if isinstance(each, dict))
        refused = [each for each in outcomes if not isinstance(each, dict)]
        assert {type(each) for each in refused} == {ConflictError}
        assert all('releases never change' in str(each) for each in refused)
        for place in machines:
            path = place.releases.fetch(record, version, tmp_path / 'a.tar')
            assert hashlib.sha256(path.read_bytes()).hexdigest() == about['sha256']
            assert about in place.releases.list_all(record)
        assert len([name for name in kept(machines[0], made) if name.startswith(version)]) == 2
    assert len(kept(machines[0], made)) == 4


def test_who_has_the_same_ticket_gets_the_same_release(machines, made):
    record = made._fresh()
    outcomes = at_once(
        *(lambda one=one: one.make(record, '1', 'ticket') for one in meeting(machines))
    )
    assert outcomes[0]['sha256']
    assert outcomes == [outcomes[0]] * NUM_MACHINES
    assert machines[1].releases.make(record, '1', 'ticket') == outcomes[0]
    with pytest.raises(ConflictError):
        machines[1].releases.make(record, '1', 'another')


def test_different_versions_are_made_at_once(machines, made):
    record = made._fresh()
    versions = [f'v{number}' for number in range(NUM_MACHINES)]
    outcomes = at_once(
        *(
            lambda one=one, version=version: one.make(record, version)
            for one, version in zip(meeting(machines), versions, strict=True)
        )
    )
    assert sorted(each['version'] for each in outcomes) == versions
    assert len({each['content_sha256'] for each in outcomes}) == 1


def test_what_was_changed_or_removed_elsewhere_is_not_released(machines, made):
    record = made._fresh()
    machines[1].store.remove_pair(made[0].id)
    with pytest.raises(ConflictError, match='changed while it was released'):
        machines[0].releases.make(record, '1')
    assert kept(machines[0], made) == []
    about = machines[1].releases.make(made._fresh(), '1')
    with pytest.raises(ConflictError, match='never change'):
        machines[0].releases.make(record, '1')
    assert machines[2].releases.list_all(record) == [about]

    class Removing(CollectionStore):
        def held(self, record):
            machines[1].store.remove(record.id)
            return super().held(record)

    place = machines[0]
    store = Removing(place.database, place.files, '')
    with pytest.raises(NotFoundError):
        LocalReleases(store, place.files, place.drafts, '').make(made._fresh(), '2')
    assert kept(place, made) == []


def test_an_archive_that_is_taken_for_garbage_is_stored_again(machines, made, tmp_path):
    """Whoever collects it does so between its being stored and its being named, and again."""
    left = [1, 2]

    class Collecting(CollectionStore):
        def held(self, record):
            if left:
                left.pop()
                found = collect_collection_garbage(machines[1], seconds=0)
                taken.extend(found.releases)
            return super().held(record)

    taken: list[str] = []
    place = machines[0]
    store = Collecting(place.database, place.files, '')
    about = LocalReleases(store, place.files, place.drafts, '').make(made._fresh(), '1')
    assert len(taken) == 2
    assert set(taken) == {f'{made._key}/releases/1-{about["sha256"][:32]}.tar'}
    assert collect_collection_garbage(machines[2], seconds=0).releases == []
    path = machines[2].releases.fetch(made._fresh(), '1', tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == about['sha256']


def test_what_killed_makers_left_is_garbage(machines, made):
    place = machines[0]
    folder = f'{made._key}/releases'
    half = f'1-{"a" * 32}.tar'
    place.files.write(f'{folder}/{half}', [b'half'])
    assert machines[1].releases.list_all(made._fresh()) == [], 'it is not served'
    machines[1].releases.make(made._fresh(), '1')
    assert collect_collection_garbage(machines[2], seconds=0).releases == [f'{folder}/{half}']
    assert len(kept(place, made)) == 2
