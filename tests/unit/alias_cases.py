"""Names for artifacts, as they are tested on each database: the rules of the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from finetuner.config import RunConfig
from finetuner.excepts import ConfigError, ConflictError, NotFoundError
from finetuner.runs.records import ProcessMark, RunRecord
from finetuner.runs.store import RunStore
from finetuner.storage.database import Database

MARK = ProcessMark(1, 'a server')


def finished(store: RunStore, name: str, experiment: str = 'emoji', public: bool = False):
    """A run that has finished just now."""
    run = started(store, name, experiment, public)
    assert store.mark_finished(run.id)
    return store.read_run(run.id)


def started(store: RunStore, name: str, experiment: str = 'emoji', public: bool = False):
    """A run that is going."""
    config = RunConfig(train_data='x', experiment_name=experiment, public=public)
    run = store.create_run(config, name, MARK, 'host')
    assert store.mark_started(run.id, MARK)
    return run


def id_of(store: RunStore, alias: str) -> str:
    return store.aliases.find(alias).artifact_id


def delete(store: RunStore, run: RunRecord) -> None:
    with store.deletion(run):
        pass


def latest_is_the_newest_that_has_finished(database: Database) -> None:
    store, other = RunStore(database, 'alice'), RunStore(database, 'bob')
    with pytest.raises(NotFoundError, match="unknown alias 'emoji@latest'"):
        id_of(store, 'emoji@latest')
    slow = started(store, 'slow')
    with pytest.raises(NotFoundError, match="no run of experiment 'emoji' has finished"):
        id_of(store, 'emoji@latest')
    first = finished(store, 'first')
    finished(store, 'elsewhere', 'words')
    finished(other, 'of another')
    assert store.aliases.find('emoji@latest').run == 'first'
    assert id_of(store, 'emoji@latest') == first.artifact_id
    assert store.aliases.find('emoji@latest').updated_at == first.finished_at
    # what counts is which ended last, not which began last
    assert store.mark_finished(slow.id)
    assert id_of(store, 'emoji@latest') == slow.artifact_id
    store.mark_failed(started(store, 'without luck').id, 'no luck')
    assert id_of(store, 'emoji@latest') == slow.artifact_id
    delete(store, slow)
    assert id_of(store, 'emoji@latest') == first.artifact_id
    assert store.aliases.list() == []
    assert store.aliases.list_of(first.artifact_id) == ['emoji@latest']


def aliases_are_set_moved_listed_and_deleted(database: Database) -> None:
    store = RunStore(database, 'alice')
    first, second = finished(store, 'first'), finished(store, 'second', 'words')
    made = store.aliases.set('emoji@production', first.artifact_id)
    assert (made.alias, made.artifact_id) == ('emoji@production', first.artifact_id)
    assert (made.run, made.experiment) == ('first', 'emoji')
    moved = store.aliases.set('emoji@production', second.artifact_id)
    assert (moved.run, moved.experiment) == ('second', 'words')
    assert moved.updated_at > made.updated_at
    assert store.aliases.find('emoji@production') == moved
    # a name may hold what a name of an experiment may hold
    awkward = store.aliases.set("a@b/../x '%@v 2", first.artifact_id)
    assert store.aliases.list() == [awkward, moved]
    assert store.aliases.list_of(second.artifact_id) == ['emoji@production', 'words@latest']
    assert store.aliases.list_of('0' * 24) == []
    store.aliases.delete('emoji@production')
    with pytest.raises(NotFoundError, match='unknown alias'):
        store.aliases.delete('emoji@production')
    with pytest.raises(NotFoundError, match="did you mean 'emoji@latest'"):
        id_of(store, 'emoji@production')
    assert store.aliases.list() == [awkward]


def what_cannot_be_set_is_refused(database: Database) -> None:
    store = RunStore(database, 'alice')
    run = finished(store, 'run')
    for alias in ('emoji', '@v1', 'emoji@', '', '@'):
        with pytest.raises(ConfigError, match='written name@label'):
            store.aliases.set(alias, run.artifact_id)
        with pytest.raises(NotFoundError, match='as name@label'):
            id_of(store, alias)
    for alias in ('emoji@latest', 'emoji@Latest'):
        with pytest.raises(ConfigError, match="'emoji@production'"):
            store.aliases.set(alias, run.artifact_id)
        with pytest.raises(ConfigError, match='newest finished run'):
            store.aliases.delete(alias)
    for alias in ('x' * 201 + '@v1', 'x@' + 'v' * 201, 'x@v\n1', ' x@v', 'x@v '):
        with pytest.raises(ConfigError, match='printable'):
            store.aliases.set(alias, run.artifact_id)
    for artifact_id in ('0' * 24, started(store, 'going').artifact_id):
        with pytest.raises(NotFoundError, match='there is no artifact'):
            store.aliases.set('emoji@v1', artifact_id)
    assert store.aliases.list() == []


def owners_see_their_own_and_what_is_shared(database: Database) -> None:
    alice, bob = RunStore(database, 'alice'), RunStore(database, 'bob')
    visitor = RunStore(database, 'alice', only_public=True)
    secret, shared = finished(alice, 'secret'), finished(alice, 'shared', public=True)
    finished(alice, 'newest')
    alice.aliases.set('emoji@secret', secret.artifact_id)
    alice.aliases.set('emoji@shared', shared.artifact_id)
    with pytest.raises(NotFoundError):
        bob.aliases.set('mine@v1', secret.artifact_id)
    with pytest.raises(NotFoundError):
        bob.aliases.delete('emoji@shared')
    for alias in ('emoji@secret', 'emoji@shared', 'emoji@latest'):
        with pytest.raises(NotFoundError, match='Known: none') as caught:
            id_of(bob, alias)
        assert 'did you mean' not in str(caught.value)
    assert bob.aliases.set('mine@v1', shared.artifact_id).run == 'shared'
    assert [found.alias for found in bob.aliases.list()] == ['mine@v1']
    # who looks at another's names sees those of what is shared
    assert [found.alias for found in visitor.aliases.list()] == ['emoji@shared']
    assert id_of(visitor, 'emoji@latest') == shared.artifact_id
    with pytest.raises(NotFoundError) as caught:
        id_of(visitor, 'emoji@secret')
    assert 'Known: emoji@latest, emoji@shared.' in str(caught.value)
    # another's name does not keep a run from being deleted or hidden; it is seen to lead nowhere
    alice.set_public(shared.id, False)
    assert bob.aliases.find('mine@v1').run is None
    assert [found.run for found in bob.aliases.list()] == [None]
    alice.aliases.delete('emoji@shared')
    delete(alice, shared)
    assert bob.aliases.find('mine@v1').artifact_id == shared.artifact_id


def what_has_a_name_is_not_deleted(database: Database) -> None:
    store = RunStore(database, 'alice')
    runs = [finished(store, f'run {i}') for i in range(3)]
    for i in range(7):
        store.aliases.set(f'emoji@v{i}', runs[2].artifact_id)
    with pytest.raises(ConflictError, match=r"'emoji@v0', .* and 2 more"):
        store.refuse_named(runs)
    with pytest.raises(ConflictError, match="'emoji@v0'"):
        delete(store, runs[2])
    assert store.read_run(runs[2].id) == runs[2]
    store.refuse_named(runs[:2])
    for i in range(7):
        store.aliases.delete(f'emoji@v{i}')
    store.refuse_named(runs)
    delete(store, runs[2])
    with pytest.raises(NotFoundError):
        store.read_run(runs[2].id)


def nobody_names_what_is_being_deleted(database: Database) -> None:
    store = RunStore(database, 'alice')
    run = finished(store, 'run')
    with ThreadPoolExecutor(1) as pool:
        with store.deletion(run):
            setting = pool.submit(store.aliases.set, 'emoji@v1', run.artifact_id)
            with pytest.raises(TimeoutError):
                setting.result(timeout=0.3)
        with pytest.raises(NotFoundError, match='there is no artifact'):
            setting.result(timeout=30)
    assert store.aliases.list() == []


def many_move_one_alias_at_once(database: Database) -> None:
    store = RunStore(database, 'alice')
    runs = [finished(store, f'run {i}') for i in range(8)]

    def move(run: RunRecord) -> str:
        return store.aliases.set('emoji@v1', run.artifact_id).artifact_id

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(move, runs * 3))
    assert len(store.aliases.list()) == 1
    assert id_of(store, 'emoji@v1') in {run.artifact_id for run in runs}


CASES = (
    latest_is_the_newest_that_has_finished,
    aliases_are_set_moved_listed_and_deleted,
    what_cannot_be_set_is_refused,
    owners_see_their_own_and_what_is_shared,
    what_has_a_name_is_not_deleted,
    nobody_names_what_is_being_deleted,
    many_move_one_alias_at_once,
)
