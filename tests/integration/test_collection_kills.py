"""Collections whose writer is killed at any moment: nothing saved is lost, nothing half-written is served."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection

import dask.array  # noqa: F401  once here, and not in each child
import numpy as np
import pytest

from finetuner.collections import TrainingSet, search
from finetuner.excepts import NotFoundError

SIZE = (32, 32)
FED_AT_ONCE = 20
NUM_KILLS = 30
# forked, so that a start costs nothing, and nothing of the database is open before
FORK = multiprocessing.get_context('fork')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home'


def image(number: int) -> np.ndarray:
    return np.full((3, *SIZE), number % 251, np.uint8)


def feed_and_save(told: Connection) -> None:
    """Add pairs to one collection for ever; tells how many are saved."""
    try:
        made = TrainingSet.from_name('set')
    except NotFoundError:
        made = TrainingSet('set', tile_size=SIZE, classes=['odd'])
    saved = len(made)
    while True:
        numbers = range(saved, saved + FED_AT_ONCE)
        made.feed((image(number), [number % 2]) for number in numbers)
        made.save()
        saved += FED_AT_ONCE
        told.send(saved)


def killed(work, seconds: float) -> list[int]:
    """What a process told before it was killed."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    told = []
    try:
        while True:
            told.append(ours.recv())
    except EOFError:
        return told


def check(told: Connection, at_least: int) -> None:
    """Read all that is served; tells how many pairs there are."""
    if not search():
        told.send(0)
        return
    made = TrainingSet.from_name('set')
    count = len(made)
    for number, point in enumerate(made):
        assert (point.image.compute(scheduler='sync') == number % 251).all()
        assert point.y.tolist() == [number % 2]
    assert count >= at_least
    assert count % FED_AT_ONCE == 0
    told.send(count)


def checked(at_least: int) -> int:
    """What `check` tells, of a process of its own: the next one is forked from one that opened nothing."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=check, args=(theirs, at_least))
    process.start()
    theirs.close()
    process.join()
    assert process.exitcode == 0
    return ours.recv()


def test_a_killed_writer_leaves_whole_saves_only(home):
    rng = random.Random(0)
    saved = 0
    for _ in range(NUM_KILLS):
        told = killed(feed_and_save, rng.uniform(0.02, 0.4))
        saved = checked(max([saved, *told]))
    assert saved >= NUM_KILLS * FED_AT_ONCE / 4, 'some came to an end'
    other = TrainingSet('other', tile_size=SIZE)
    other.feed([(image(0), [1])])
    drafts = list((home / 'collections-unsaved').glob('*/.lock'))
    assert len(drafts) == 1, 'what the killed ones left is cleared'
