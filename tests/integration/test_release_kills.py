"""Releases whose writer is killed at any moment: what is served is whole, and what is left is cleared."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time

import dask.array  # noqa: F401  once here, and not in each child
import numpy as np
import pytest
import rasterio.warp  # noqa: F401

from finetuner.collections import TrainingSet, create_from_archive

SIZE = (32, 32)
NUM_PAIRS = 150
NUM_KILLS = 15
# forked, so that a start costs nothing, and nothing of the database is open before
FORK = multiprocessing.get_context('fork')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home'


def make() -> None:
    made = TrainingSet('set', tile_size=SIZE, classes=['odd'])
    made.feed((np.full((3, *SIZE), seed, np.uint8), [seed % 2]) for seed in range(NUM_PAIRS))
    made.save()


def release_on_and_on() -> None:
    made = TrainingSet.from_name('set')
    number = len(made.releases())
    while True:
        made.release(f'v{number}')
        number += 1


def check(home, at_least: int) -> None:
    """All that is served is whole, and there are no fewer than there were."""
    made = TrainingSet.from_name('set')
    known = made.releases()
    assert len(known) >= at_least
    assert [about['version'] for about in known] == [f'v{number}' for number in range(len(known))]
    for about in known:
        path = made.download_release(about['version'], home)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == about['sha256']
        assert about['content_sha256'] == known[0]['content_sha256']
        path.unlink()
    (home / 'known').write_text(str(len(known)))


def check_last(home) -> None:
    made = TrainingSet.from_name('set')
    made.release('last')
    again = create_from_archive(made.download_release('last', home), 'again')
    again.save()
    pixels = [point.read()[0, 0, 0] for point in again]
    assert pixels == list(range(NUM_PAIRS))
    left = [path for path in (home / 'collections-unsaved').iterdir() if path.is_dir()]
    assert left == [], 'what the killed ones left is cleared'
    assert len(list(home.glob('collections/*/releases/*.json'))) == len(made.releases())


def run(work, *arguments) -> None:
    """In a process of its own: the next one is forked from one that opened nothing."""
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_killed_release_leaves_whole_ones_only(home):
    rng = random.Random(0)
    run(make)
    known = 0
    for _ in range(NUM_KILLS):
        process = FORK.Process(target=release_on_and_on)
        process.start()
        time.sleep(rng.uniform(0.05, 1.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        run(check, home, known)
        known = int((home / 'known').read_text())
    assert known >= 3, 'some came to an end'
    run(check_last, home)
