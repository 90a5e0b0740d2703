"""Whole lives of collections - feed, save, caching, release - are killed at any moment, over one home.

After each kill nothing that was saved is lost, nothing half-written is served, and all goes on.
`COLLECTION_KILLS=300 python -m pytest tests/integration/test_collection_kills.py -s` kills more of them.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dask.array  # noqa: F401  once here, and not in each child
import numpy as np
import rasterio.warp  # noqa: F401

from finetuner.collections import TrainingSet, create_from_archive, garbage
from finetuner.collections.cache import open_cache
from finetuner.collections.caching import stop_all_caching
from finetuner.collections.local import LocalCollections
from finetuner.config import Settings
from finetuner.excepts import NotFoundError
from tests.unit.collection_pairs import CLASSES, image_of, label_of, same_label

NUM_KILLS = int(os.environ.get('COLLECTION_KILLS', '50'))
PHASES = ('feed', 'save', 'caching', 'release')
SHAPE = (3, 24, 24)
NUM_PAIRS = 40
MLTYPES = dict(zip('abc', CLASSES, strict=True))
# what Python tells of changes of files
STEPS = {'os.mkdir', 'os.link', 'os.rename', 'os.remove', 'os.rmdir'}
FORK = multiprocessing.get_context('fork')


def seeds_of(number: int) -> range:
    """What a life feeds."""
    return range(number * NUM_PAIRS, (number + 1) * NUM_PAIRS)


def pair_of(seed: int, mltype: str) -> tuple[np.ndarray, Any]:
    return image_of(seed, SHAPE, np.uint8), label_of(seed, mltype, SHAPE)


def assert_is(seed: int, mltype: str, pixels: np.ndarray, label: Any) -> None:
    image, expected = pair_of(seed, mltype)
    assert pixels.dtype == image.dtype
    assert (pixels == image).all()
    assert same_label(label, expected)


# ---- a life, and its end


def opened(name: str, mltype: str) -> TrainingSet:
    try:
        return TrainingSet.from_name(name)
    except NotFoundError:
        return TrainingSet(name, mltype, SHAPE[1:], classes=CLASSES[mltype])


def live(tell: Callable[[str], None], name: str, mltype: str, number: int) -> None:
    """Feed, save, cache and release a collection; tells what comes next."""
    made = opened(name, mltype)
    first, second = seeds_of(number)[: NUM_PAIRS // 2], seeds_of(number)[NUM_PAIRS // 2 :]
    tell('feed')
    made.feed((pair_of(seed, mltype) for seed in first), 'train')
    made.feed((pair_of(seed, mltype) for seed in second), 'test')
    tell('save')
    made.save()
    tell('caching')
    made.batch(8).close()
    tell('release')
    made.release(f'v{number}')
    tell('end')


@dataclass(frozen=True)
class Aim:
    """When to kill: so many seconds after a phase began, or before the next step of it that changes files.

    Attributes:
        phase: of the life.
        seconds: since it began.
        step: from 0.
    """

    phase: str
    seconds: float = 0.0
    step: int | None = None


def live_on(told: Connection, name: str, number: int, aim: Aim | None) -> None:
    """Live, and end before a step if that is the aim; tells phases, and the steps before each."""
    phase, step = '', 0

    def count(event: str, _: tuple) -> None:
        nonlocal step
        if event in STEPS:
            if aim is not None and (aim.phase, aim.step) == (phase, step):
                os.kill(os.getpid(), signal.SIGKILL)
            step += 1

    def tell(what: str) -> None:
        nonlocal phase, step
        told.send((what, step))
        phase, step = what, 0

    sys.addaudithook(count)
    live(tell, name, MLTYPES[name], number)
    time.sleep(600)


@dataclass
class Lives:
    """What was seen of them.

    Attributes:
        seconds: that each phase takes.
        steps: of each phase, as many as it ever had.
        done: steps that were aimed at.
        hits: how often a life was killed in each phase.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.1))
    steps: Counter[str] = field(default_factory=Counter)
    done: set[tuple[str, int]] = field(default_factory=set)
    hits: Counter[str] = field(default_factory=Counter)

    def note(self, phase: str, seconds: float, num_steps: int) -> None:
        self.seconds[phase] += 0.4 * (seconds - self.seconds[phase])
        self.steps[phase] = max(self.steps[phase], num_steps)

    def choose(self, rng: random.Random) -> Aim:
        """Half of the time any moment, of rarely hit phases more, else a step that is not done yet."""
        if rng.random() < 0.5:
            rarest = min(PHASES, key=lambda phase: (self.hits[phase], rng.random()))
            phase = rng.choice((rarest, *PHASES))
            return Aim(phase, rng.uniform(0, self.seconds[phase]))
        steps = {(phase, step) for phase in PHASES for step in range(self.steps[phase])}
        if steps <= self.done:
            self.done.clear()
        phase, step = rng.choice(sorted(steps - self.done))
        self.done.add((phase, step))
        return Aim(phase, step=step)


def killed(name: str, number: int, lives: Lives, aim: Aim | None) -> list[str]:
    """What a life told before it was killed."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=live_on, args=(theirs, name, number, aim))
    process.start()
    theirs.close()
    told: list[str] = []
    since = time.monotonic()
    until = math.inf
    with suppress(EOFError, OSError):
        while told[-1:] != ['end'] and ours.poll(min(60, max(0, until - time.monotonic()))):
            what, num_steps = ours.recv()
            if told:
                lives.note(told[-1], time.monotonic() - since, num_steps)
            told.append(what)
            since = time.monotonic()
            if aim is not None and aim.step is None and what == aim.phase:
                until = since + aim.seconds
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f'a life has failed after {told}'
    # what it told in its last moments
    with suppress(EOFError, OSError):
        while True:
            told.append(ours.recv()[0])
    return told


# ---- what is there then


@dataclass
class Known:
    """What is there for sure, told from check to check.

    Attributes:
        saves: numbers of the lives whose pairs each collection has.
        ids: seeds by the ids of pairs, those of removed ones too.
        releases: numbers of the lives whose pairs each release has, by collection and version.
    """

    saves: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in MLTYPES})
    ids: dict[str, dict[int, int]] = field(default_factory=lambda: {name: {} for name in MLTYPES})
    releases: dict[str, dict[str, list[int]]] = field(
        default_factory=lambda: {name: {} for name in MLTYPES}
    )


def seeds_in(made: TrainingSet) -> Iterator[tuple[int, int]]:
    """Ids and seeds of all pairs; images and labels are bit for bit what was fed."""
    for point in made:
        pixels = point.read()
        low = pixels.ravel()[:5].tolist()
        seed = sum(part << shift for part, shift in zip(low, (0, 7, 14, 21, 28), strict=True))
        assert_is(seed, made.mltype, pixels, point.y)
        yield point.id, seed


def check_pairs(known: Known, name: str, doubtful: int | None = None) -> None:
    """A collection holds what was saved, and all or nothing of what was just being saved."""
    try:
        made = TrainingSet.from_name(name)
    except NotFoundError:
        assert not known.saves[name]
        return
    found = dict(seeds_in(made))
    expected = [seed for number in known.saves[name] for seed in seeds_of(number)]
    if doubtful is not None and len(found) > len(expected):
        known.saves[name].append(doubtful)
        expected += seeds_of(doubtful)
    assert list(found.values()) == expected
    assert sum(made.count.values()) == len(expected)
    known.ids[name].update(found)


def check_cache(known: Known, name: str, place: LocalCollections) -> None:
    """A cache opens, and all that it serves is right, of whatever revision it is."""
    with suppress(NotFoundError):
        made = TrainingSet.from_name(name)
        with open_cache(place.cache, made._saved.key) as cache:
            for group in cache.groups:
                for position in cache.positions(group).tolist():
                    seed = known.ids[name][int(cache.ids[position])]
                    assert group == ('train' if seed % NUM_PAIRS < NUM_PAIRS // 2 else 'test')
                    pixels, label = cache.read_image(position), cache.read_label(position)
                    assert_is(seed, made.mltype, pixels, label)


def check_releases(
    known: Known, name: str, home: Path, doubtful: str | None, every: int = 1
) -> None:
    """Releases that were made are there, and each that is listed is whole."""
    if not known.saves[name]:
        return
    made = TrainingSet.from_name(name)
    found = {about['version']: about for about in made.releases()}
    new = set(found) - set(known.releases[name])
    assert set(known.releases[name]) <= set(found)
    assert new <= {doubtful}
    for version in new:
        known.releases[name][version] = list(known.saves[name])
        again = create_from_archive(made.download_release(version, home / 'new.tar'), 'again')
        again.save()
        expected = [seed for number in known.saves[name] for seed in seeds_of(number)]
        assert sorted(seed for _, seed in seeds_in(again)) == expected
        again.remove()
    for version, about in list(found.items())[::every]:
        path = made.download_release(version, home / 'release.tar')
        assert hashlib.sha256(path.read_bytes()).hexdigest() == about['sha256']
        assert sum(about['count'].values()) == NUM_PAIRS * len(known.releases[name][version])


def check_garbage(place: LocalCollections) -> None:
    """It goes, and then there is none."""
    garbage.collect_collection_garbage(place, seconds=0)
    again = garbage.collect_collection_garbage(place, seconds=0)
    assert not any(vars(again).values()), again
    # one that is empty may be somebody's, who is just beginning: it goes when it is older
    left = [path for path in place.drafts.glob('*/*') if path.parent.is_dir()]
    left += (place.settings.home / 'collections').rglob('.*')
    assert not left


def check_life(known: Known, name: str, number: int) -> None:
    """All of it works: for the collection that was just killed, and for a new one."""
    if known.saves[name]:
        with TrainingSet.from_name(name).batch(8) as batch:
            assert len(batch.train) + len(batch.test) == NUM_PAIRS * len(known.saves[name])
    live(lambda _: None, 'another', MLTYPES[name], number)
    another = TrainingSet.from_name('another')
    assert [seed for _, seed in seeds_in(another)] == list(seeds_of(number))
    assert [about['version'] for about in another.releases()] == [f'v{number}']
    another.remove()


def thin_out(known: Known, name: str, is_whole: bool) -> None:
    """Now and then pairs are removed, so that a pack is garbage, or a collection is."""
    made = TrainingSet.from_name(name)
    if is_whole:
        made.remove()
        known.saves[name], known.releases[name], known.ids[name] = [], {}, {}
        return
    while len(known.saves[name]) > 2:
        gone = known.saves[name].pop(0)
        ids = [pair_id for pair_id, seed in known.ids[name].items() if seed in seeds_of(gone)]
        made._place.store.remove_pairs(made.id, ids)


def check(told: Connection, known: Known, home: Path, name: str, number: int, seen: list[str]):
    """All of it, in a process of its own; tells what is known then."""
    place = LocalCollections(Settings.from_environment())
    # nothing runs, whose half-written files they might be
    garbage._WRITING_SECONDS = 0.0
    if 'caching' in seen:
        known.saves[name].append(number)
    for each in MLTYPES:
        is_doubtful = each == name and seen[-1:] == ['save']
        check_pairs(known, each, number if is_doubtful else None)
    for each in MLTYPES:
        check_cache(known, each, place)
    if 'end' in seen:
        assert f'v{number}' in [
            about['version'] for about in TrainingSet.from_name(name).releases()
        ]
    check_releases(known, name, home, f'v{number}' if 'release' in seen else None)
    check_garbage(place)
    for each in MLTYPES:
        check_pairs(known, each)
        check_cache(known, each, place)
        check_releases(known, each, home, None, every=3)
    check_life(known, name, number)
    if known.saves[name]:
        thin_out(known, name, is_whole=number % 7 == 0)
    stop_all_caching()
    told.send(known)


def checked(*arguments: Any) -> Known:
    """What `check` tells, in a process of its own: none is forked from one that opened anything."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=check, args=(theirs, *arguments))
    process.start()
    theirs.close()
    with suppress(EOFError):
        known = ours.recv()
        process.join()
        return known
    process.join()
    raise AssertionError(f'what {arguments[3:]} left is not right: see above')


def kill_and_check(home: str, num_kills: int) -> None:
    """Kill, and check, and so on."""
    os.environ['FINETUNER_HOME'] = home
    os.environ.pop('FINETUNER_ARTIFACTS_URL', None)
    rng = random.Random(0)
    lives, known = Lives(), Known()
    began = time.monotonic()
    for number in range(num_kills + 3):
        name = 'abc'[number % 3]
        # three whole lives first: to know how long they take, and their steps
        aim = lives.choose(rng) if number >= 3 else None
        seen = killed(name, number, lives, aim)
        if aim is not None:
            lives.hits[seen[-1] if seen else 'start'] += 1
        known = checked(known, Path(home), name, number, seen)
    took = ', '.join(f'{phase} {1000 * lives.seconds[phase]:.0f} ms' for phase in PHASES)
    print(
        f'{num_kills} kills in {time.monotonic() - began:.0f} s: {dict(lives.hits)}; before steps '
        f'{len(lives.done)} of {dict(lives.steps)}; lives took: {took}',
        flush=True,
    )
    fewest = min(lives.hits[phase] for phase in PHASES)
    assert fewest >= num_kills // 20, 'a phase was hardly ever hit'
    assert any(known.saves.values())


def test_nothing_saved_is_lost_and_nothing_half_written_is_served(tmp_path):
    # spawned: what it forks has no threads of other tests in it, whose locks nobody would release
    context = multiprocessing.get_context('spawn')
    process = context.Process(target=kill_and_check, args=(str(tmp_path / 'home'), NUM_KILLS))
    process.start()
    process.join()
    assert process.exitcode == 0
