"""Models by name: loaded once, within a limit of memory, swapped without anybody noticing."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetuner.encoding.model_pool import ModelPool
from finetuner.encoding.observer import EncodingObserver
from finetuner.excepts import ArtifactError, NotFoundError, TooLargeError
from tests.unit.plain_engine import PlainEngine

WAIT = 20
MEGABYTE = 2**20
# of an engine here, which takes next to nothing in truth: what is measured beside it is lost in it
LARGE = 400 * MEGABYTE


class Shelf(EncodingObserver):
    """What there is to load, and what was."""

    def __init__(self, **names):
        self.names = names
        self.loads = []
        self.dropped = []
        self.asked = []
        self.broken = set()
        self.engines = {}

    def resolve(self, name, owner):
        key = self.names.get(name if owner is None else f'{owner}/{name}')
        if key is None:
            raise NotFoundError(f'there is no {name}')
        return key

    def load(self, key):
        self.loads.append(key)
        if key in self.broken:
            raise ArtifactError(f'{key} is damaged')
        engine = PlainEngine(num_bytes=LARGE)
        self.engines[key] = weakref.ref(engine)
        return engine

    def model_dropped(self, model):
        self.dropped.append(model)

    def model_asked(self, model, is_loaded):
        self.asked.append((model, is_loaded))


@pytest.fixture
def pool_of():
    pools = []

    def build(shelf, default='first', memory_mb=None):
        pool = ModelPool(
            default,
            shelf.resolve,
            shelf.load,
            may_move=lambda name: '@' in name,
            memory_mb=memory_mb,
            poll_seconds=0.01,
            observer=shelf,
        )
        pools.append(pool)
        return pool

    yield build
    for pool in pools:
        pool.close()


def until(holds):
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_model_is_loaded_once_however_many_ask(pool_of):
    shelf = Shelf(first='a', second='b')
    pool = pool_of(shelf)
    together = threading.Barrier(8)

    def ask(_):
        together.wait()
        return pool.get('second')

    with ThreadPoolExecutor(8) as threads:
        found = set(map(id, threads.map(ask, range(8))))
    assert len(found) == 1
    assert shelf.loads == ['a', 'b']
    assert pool.get('second').key == 'b'
    assert shelf.asked[-1] == ('b', True)
    assert pool.get_default().key == 'a'


def test_a_new_model_has_answered_before_anybody_gets_it(pool_of):
    shelf = Shelf(first='a')
    assert pool_of(shelf).get_default().engine.batches == [1]


def test_the_least_recently_used_goes_first_and_the_default_never(pool_of):
    shelf = Shelf(first='a', second='b', third='c', fourth='d')
    pool = pool_of(shelf, memory_mb=1500)
    pool.get('second')
    pool.get('third')
    pool.get('second')
    pool.get('fourth')
    assert [model.key for model in pool.loaded] == ['a', 'b', 'd']
    assert shelf.dropped == ['c']
    until(lambda: gc.collect() is not None and shelf.engines['c']() is None)
    assert pool.get('third').key == 'c'
    assert shelf.dropped == ['c', 'b']


def test_a_model_larger_than_the_limit_is_refused(pool_of):
    shelf = Shelf(first='a', second='b')
    pool = pool_of(shelf, memory_mb=300)
    with pytest.raises(TooLargeError, match=r'the model b takes .* may take 300 MB'):
        pool.get('second')
    assert [model.key for model in pool.loaded] == ['a']


def test_a_name_that_moves_swaps_the_model_and_lets_the_old_one_go(pool_of):
    shelf = Shelf(**{'emoji@latest': 'a'})
    pool = pool_of(shelf, 'emoji@latest')
    held = pool.get_default()
    shelf.names['emoji@latest'] = 'b'
    until(lambda: pool.get_default().key == 'b')
    assert shelf.dropped == ['a']
    # whoever began with it ends with it
    assert held.key == 'a'
    assert shelf.engines['a']() is not None
    del held
    until(lambda: gc.collect() is not None and shelf.engines['a']() is None)


def test_no_request_waits_while_a_new_model_is_loaded(pool_of):
    shelf = Shelf(**{'first': 'a', 'emoji@latest': 'b'})
    pool = pool_of(shelf)
    assert pool.get('emoji@latest').key == 'b'
    may_load = threading.Event()
    load, shelf.load = shelf.load, None
    pool._load = lambda key: (may_load.wait(WAIT), load(key))[1]
    shelf.names['emoji@latest'] = 'c'
    until(lambda: pool._loading)
    assert pool.get('emoji@latest').key == 'b'
    may_load.set()
    until(lambda: pool.get('emoji@latest').key == 'c')
    assert shelf.dropped == ['b']


def test_a_new_model_that_is_damaged_replaces_nothing(pool_of, caplog):
    shelf = Shelf(**{'emoji@latest': 'a'})
    pool = pool_of(shelf, 'emoji@latest')
    shelf.broken.add('b')
    with caplog.at_level(logging.ERROR, logger='finetuner'):
        shelf.names['emoji@latest'] = 'b'
        until(lambda: 'stays what it was: b is damaged' in caplog.text)
    assert pool.get_default().key == 'a'
    shelf.broken.clear()
    until(lambda: pool.get_default().key == 'b')


def test_a_model_that_cannot_be_loaded_is_not_tried_all_the_time(pool_of):
    shelf = Shelf(**{'emoji@latest': 'a', 'shoes@latest': 'x', 'first': 'a'})
    pool = pool_of(shelf, 'emoji@latest')
    pool.get('shoes@latest')
    shelf.broken |= {'b', 'y'}
    shelf.names.update({'emoji@latest': 'b', 'shoes@latest': 'y'})
    until(lambda: {'b', 'y'} <= set(shelf.loads))
    time.sleep(0.3)  # thirty looks
    assert (shelf.loads.count('b'), shelf.loads.count('y')) == (1, 1)
    # another one is tried at once
    shelf.names.update({'emoji@latest': 'c', 'shoes@latest': 'z'})
    until(lambda: pool.get_default().key == 'c')
    until(lambda: pool.get('shoes@latest').key == 'z')


def test_names_are_looked_at_again_after_what_nobody_expects(pool_of, caplog):
    shelf = Shelf(**{'emoji@latest': 'a', 'shoes@latest': 'x'})
    pool = pool_of(shelf, 'emoji@latest')
    pool.get('shoes@latest')
    resolve = shelf.resolve

    def fail(*_):
        raise OSError('the database is away')

    pool._resolve = fail
    with caplog.at_level(logging.ERROR, logger='finetuner'):
        until(lambda: caplog.text.count('the database is away') >= 2)
    pool._resolve = resolve
    shelf.names.update({'emoji@latest': 'b', 'shoes@latest': 'y'})
    until(lambda: pool.get_default().key == 'b')
    until(lambda: pool.get('shoes@latest').key == 'y')


def test_a_default_that_is_loaded_is_not_dropped_before_it_is_one(pool_of):
    shelf = Shelf(**{'emoji@latest': 'a', 'old': 'x', 'other': 'y'})
    pool = pool_of(shelf, 'emoji@latest', memory_mb=1000)
    pool.get('old')

    def load_another(model):
        # while the old one is let go of for the new default
        if model == 'x':
            shelf.dropped.append(model)
            with ThreadPoolExecutor(1) as thread:
                thread.submit(pool.get, 'other').result()

    shelf.model_dropped = load_another
    shelf.names['emoji@latest'] = 'b'
    until(lambda: pool.get_default().key == 'b')
    assert shelf.dropped[0] == 'x'
    assert pool.get_default().engine is not None


def test_the_default_and_another_keep_to_the_limit_together(pool_of):
    shelf = Shelf(first='a', second='b', **{'emoji@latest': 'a'})
    with pytest.raises(TooLargeError, match='of which the default has 400 MB'):
        pool_of(shelf, memory_mb=700).get('second')
    # one that takes its place may be as large as all together
    moving = pool_of(shelf, 'emoji@latest', memory_mb=700)
    shelf.names['emoji@latest'] = 'b'
    until(lambda: moving.get_default().key == 'b')


def test_a_default_that_stands_for_nothing_yet_is_waited_for(pool_of):
    shelf = Shelf()
    pool = pool_of(shelf, 'emoji@latest')
    assert not pool.is_ready
    assert pool.reason == 'there is no emoji@latest'
    with pytest.raises(NotFoundError, match='there is no emoji@latest'):
        pool.get_default()
    shelf.names['emoji@latest'] = 'a'
    until(lambda: pool.is_ready)
    assert pool.reason == ''
    assert pool.get_default().key == 'a'


def test_a_default_that_cannot_move_must_be_there(pool_of):
    with pytest.raises(NotFoundError):
        pool_of(Shelf(), 'first')
    shelf = Shelf(first='a')
    shelf.broken.add('a')
    with pytest.raises(ArtifactError, match='a is damaged'):
        pool_of(shelf)


def test_a_name_means_what_it_means_to_who_asks(pool_of):
    shelf = Shelf(
        **{'first': 'a', 'ann/emoji@latest': 'b', 'bob/emoji@latest': 'c', 'ann/own': 'd'}
    )
    pool = pool_of(shelf)
    assert pool.get('emoji@latest', 'ann').key == 'b'
    assert pool.get('emoji@latest', 'bob').key == 'c'
    assert pool.get('own', 'ann').key == 'd'
    # loaded for one is not there for the other
    with pytest.raises(NotFoundError):
        pool.get('own', 'bob')


def test_a_name_that_is_taken_away_is_gone(pool_of):
    shelf = Shelf(**{'first': 'a', 'emoji@v1': 'b'})
    pool = pool_of(shelf)
    assert pool.get('emoji@v1').key == 'b'
    del shelf.names['emoji@v1']

    def is_gone():
        try:
            pool.get('emoji@v1')
        except NotFoundError:
            return True
        return False

    until(is_gone)


def test_many_names_take_no_memory(pool_of):
    shelf = Shelf(first='a')
    pool = pool_of(shelf)
    for n in range(3000):
        with pytest.raises(NotFoundError):
            pool.get(f'emoji@{n}')
    shelf.names.update({f'emoji@{n}': 'a' for n in range(3000)})
    for n in range(3000):
        pool.get(f'emoji@{n}')
    assert len(pool._names) <= 1000
    assert not pool._loading


def test_a_load_that_fails_is_tried_again_when_asked_again(pool_of):
    shelf = Shelf(first='a', second='b')
    pool = pool_of(shelf)
    shelf.broken.add('b')
    for _ in range(2):
        with pytest.raises(ArtifactError):
            pool.get('second')
    shelf.broken.clear()
    assert pool.get('second').key == 'b'
