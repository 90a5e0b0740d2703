"""Processes that compute tasks: what is done, what fails, and what is killed."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from contextlib import closing

import psutil
import pytest

from finetuner.process_pool import ProcessPool


class Square:
    """Squares numbers; those below 0 it does not survive."""

    def __init__(self, folder=None):
        self.folder = folder

    def __call__(self, number):
        if self.folder is not None:
            with open(f'{self.folder}/{number}', 'a') as file:
                file.write('x')
        if number == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == -2 and os.path.getsize(f'{self.folder}/{number}') < 2:
            os._exit(3)
        if number > 99:
            raise ValueError(f'{number} is too much')
        return number * number


@pytest.mark.parametrize('fresh', [False, True])
def test_each_task_is_done_once(fresh):
    pool = ProcessPool(Square(), 2, fresh=fresh)
    done = list(pool.run(iter([*range(20), 100])))
    assert sorted(each.task for each in done) == [*range(20), 100]
    for each in done:
        if each.task == 100:
            assert 'ValueError: 100 is too much' in each.error
        else:
            assert (each.result, each.error, each.death) == (each.task**2, '', '')


def test_nothing_to_do_starts_nothing():
    before = psutil.Process().children()
    assert list(ProcessPool(Square(), 2).run(iter(()))) == []
    assert psutil.Process().children() == before


def test_a_task_that_kills_is_given_to_others_and_then_given_up(tmp_path):
    pool = ProcessPool(Square(tmp_path), 2, most_deaths=3)
    tasks = [1, -1, 2, 3, -2, 4, 5, 6]
    done = list(pool.run(iter(tasks)))
    assert Counter(each.task for each in done) == Counter(tasks)
    deaths = {each.task: each.death for each in done}
    assert deaths.pop(-1) == 'was killed by signal 9'
    assert set(deaths.values()) == {''}
    assert os.path.getsize(tmp_path / '-1') == 3
    # ended by itself the first time, and no more
    assert os.path.getsize(tmp_path / '-2') == 2


class Sleep:
    """Sleeps until it is killed, the first time."""

    def __call__(self, path):
        try:
            open(path, 'x').close()
        except FileExistsError:
            return os.getpid()
        time.sleep(60)
        return 0


def test_one_that_is_killed_from_without_is_replaced(tmp_path):
    pool = ProcessPool(Sleep(), 2, tasks_each=1, most_deaths=2)
    paths = [str(tmp_path / name) for name in 'abc']
    with closing(pool.run(iter(paths))) as running:
        for path in paths[2:]:
            open(path, 'x').close()
        open(paths[1], 'x').close()
        first = next(running)
        assert first.task in paths[1:]
        while not os.path.exists(paths[0]):
            time.sleep(0.01)
        sleeping = [
            child
            for child in psutil.Process().children()
            if child.pid != first.result and child.status() != psutil.STATUS_ZOMBIE
        ]
        for child in sleeping:
            child.kill()
        rest = list(running)
    assert {each.task for each in [first, *rest]} == set(paths)
    assert not any(each.death for each in rest)


def test_all_are_gone_when_it_is_closed():
    pool = ProcessPool(Sleep(), 2, tasks_each=1)
    before = set(psutil.Process().children())
    with closing(pool.run(iter(['/dev/null', '/dev/null', '/nowhere/a']))) as running:
        next(running)
        assert set(psutil.Process().children()) - before
    assert not set(psutil.Process().children()) - before
