"""Processes that share a dataset: readers and writers at once, and one that is killed while it sends."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from finetuner.columns import File, batch, dataset
from finetuner.excepts import DataError, NotFoundError
from tests.integration.test_column_kills import session_of

SECONDS = float(os.environ.get('COLUMN_SECONDS', '3'))
MOST_ROWS = 3000
NUM_FILES = 30
FORK = multiprocessing.get_context('fork')


def opened(folder: Path, **more: Any) -> Any:
    """The dataset that is shared."""

    @dataset(sql_file=folder / 'shared.sql', data_dir=folder / 'shared', **more)
    class Shared:
        number: int
        text: str
        picture: File

        def squared(number: int) -> int:
            return number * number

        def told(squared: int, picture: File) -> str:
            return f'{squared} {picture.read().decode()}'

        def copied(number: int, picture: File) -> File:
            with File.make_tmp('.txt') as file:
                Path(file.path).write_text(f'{number % 7} {picture.read().decode()}')
                return file

    return Shared


def content_of(number: int) -> str:
    return f'file {number % NUM_FILES}'


def naive(number: int) -> tuple[str, bytes, int, str, bytes]:
    """All other columns of a row of this number."""
    content = content_of(number)
    squared = number * number
    copied = f'{number % 7} {content}'.encode()
    return f'row {number}', content.encode(), squared, f'{squared} {content}', copied


def rows_of(folder: Path, numbers: range) -> Iterator[dict[str, Any]]:
    files = [File(folder / f'{place}.txt') for place in range(NUM_FILES)]
    for number in numbers:
        picture = files[number % NUM_FILES]
        yield {'number': number, 'text': f'row {number}', 'picture': picture}


# ---- what processes do


def check_row(row: Any, is_whole: bool) -> None:
    text, content, squared, told, copied = naive(row.number)
    assert (row.text, row.picture.read()) == (text, content)
    if is_whole:
        assert (row.squared, row.told, row.copied.read()) == (squared, told, copied)


def read(folder: Path, seed: int, until: float, deletes: bool) -> None:
    """Look at rows and columns in every way: all that is seen is right."""
    shared = opened(folder)
    rng = random.Random(seed)

    @batch(shared)
    class Batches:
        def pairs(number: list[int], told: list[str]) -> list:
            return list(zip(number, told, strict=True))

    def all_rows() -> None:
        rows = shared.rows
        assert list(rows.ids) == sorted(set(rows.ids))
        found = list(rows)
        assert [row.id for row in found] == list(rows.ids) or deletes
        for row in found:
            check_row(row, is_whole=False)

    def some_rows() -> None:
        rows = shared.rows
        for _ in range(20 if len(rows) else 0):
            check_row(rows[rng.randrange(len(rows))], is_whole=True)

    def columns() -> None:
        rows = shared.rows[-500:]
        names = ('text', 'picture', 'squared', 'told', 'copied')
        read = [rows.column(name) for name in ('number', *names)]
        for number, *values in zip(*read, strict=True):
            plain = [value.read() if isinstance(value, File) else value for value in values]
            assert tuple(plain) == naive(number)

    def batches() -> None:
        for pairs in Batches.pairs.all(64).randomize(rng.randrange(1000)):
            assert [told for _, told in pairs] == [naive(number)[3] for number, _ in pairs]

    def chosen() -> None:
        wanted = rng.sample(range(MOST_ROWS), 5)
        for row in shared.where(number=wanted):
            assert row.number in wanted
            check_row(row, is_whole=False)

    while time.monotonic() < until:
        try:
            rng.choice((all_rows, some_rows, columns, batches, chosen))()
        except (DataError, NotFoundError) as error:
            # a row that was deleted since `rows` were found is told: values of several columns belong
            # together
            if not deletes or 'any more' not in str(error):
                raise


def write(folder: Path, seed: int, until: float, deletes: bool) -> None:
    """Add, compute and delete."""
    shared = opened(folder)
    rng = random.Random(seed)
    number = max(shared.rows.column('number'), default=0) + 1
    while time.monotonic() < until:
        what = rng.choice(('add', 'extend', 'delete', 'materialize'))
        count = rng.choice((1, 5, 300))
        if what == 'delete' or len(shared) > MOST_ROWS:
            first = rng.randrange(len(shared)) if len(shared) else 0
            if deletes:
                shared.rows[first : first + 2 * count].delete()
        elif what == 'materialize':
            workers = rng.choice((0, 2))
            assert shared.rows[-400:].materialize(workers=workers, progress=False) == 0
        elif what == 'add':
            (row,) = rows_of(folder, range(number, number + 1))
            check_row(shared.add(**row), is_whole=True)
            number += 1
        else:
            assert shared.extend(rows_of(folder, range(number, number + count))) == count
            number += count


def extend(folder: Path, writer: int, _: float, __: bool) -> None:
    """Add rows of one's own, many at a time and one by one."""
    shared = opened(folder)
    start = writer * 10_000
    for first in range(start, start + 800, 200):
        assert shared.extend(rows_of(folder, range(first, first + 200))) == 200
        (row,) = rows_of(folder, range(first + 5000, first + 5001))
        assert shared.add(**row).number == first + 5000


def compute(folder: Path, _: int, __: float, ___: bool) -> None:
    """Compute all, as others do."""
    assert opened(folder).materialize(workers=2, progress=False) == 0


def together(
    folder: Path,
    *what: tuple[Callable[..., None], int],
    seconds: float = 0.0,
    deletes: bool = False,
) -> None:
    """Run these at once, each in a process of its own, and wait for their end."""
    until = time.monotonic() + seconds
    processes = [
        FORK.Process(target=each, args=(folder, seed, until, deletes)) for each, seed in what
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    left = [process for process in processes if process.is_alive()]
    for process in left:
        process.kill()
    assert not left, 'processes wait for each other'
    assert [process.exitcode for process in processes] == [0] * len(processes), 'see above'


def run(home: str, name: str) -> None:
    """A test, in a process without threads, that can be forked."""
    folder = Path(home)
    for place in range(NUM_FILES):
        (folder / f'{place}.txt').write_text(content_of(place))
    TESTS[name](folder)


# ---- and what holds then


def readers_and_a_writer(folder: Path) -> None:
    for deletes in (False, True):
        what = ((write, 1), (read, 2), (read, 3), (read, 4))
        together(folder, *what, seconds=SECONDS, deletes=deletes)


def writers(folder: Path) -> None:
    # the dataset is made by whoever comes first
    together(folder, *((extend, number) for number in range(3)))
    together(folder, (compute, 0), (compute, 1))
    together(folder, (check_writers, 0))


def check_writers(folder: Path, *_: Any) -> None:
    shared = opened(folder)
    for row in shared:
        check_row(row, is_whole=False)
    numbers = list(shared.rows.column('number'))
    for writer in range(3):
        start = writer * 10_000
        mine = [number for number in numbers if start <= number < start + 10_000]
        expected = []
        for first in range(start, start + 800, 200):
            expected += [*range(first, first + 200), first + 5000]
        assert mine == expected
    for name, place in (('squared', 2), ('told', 3), ('copied', 4)):
        for number, value in zip(numbers, shared.rows.column(name), strict=True):
            plain = value.read() if isinstance(value, File) else value
            assert plain == naive(number)[place]


def openers(folder: Path) -> None:
    """Many make the same dataset at once, and then add the same field at once."""
    together(folder, *((opening, 0) for _ in range(6)))
    together(folder, (extend, 0))
    together(folder, *((adding, 0) for _ in range(6)))


def opening(folder: Path, *_: Any) -> None:
    assert len(opened(folder)) == 0


def adding(folder: Path, *_: Any) -> None:
    @dataset(sql_file=folder / 'shared.sql', data_dir=folder / 'shared')
    class Shared:
        number: int
        text: str
        picture: File
        weight: float = 0.5

        def squared(number: int, weight: float) -> float:
            return number * weight

    assert set(Shared.rows.column('weight')) == {0.5}
    numbers = list(Shared.rows.column('number'))
    assert list(Shared.rows.column('squared')) == [number / 2 for number in numbers]


TESTS = {
    'readers and a writer': readers_and_a_writer,
    'writers': writers,
    'openers': openers,
}


@pytest.mark.parametrize('name', TESTS)
def test_processes_share_a_dataset(name, tmp_path):
    process = multiprocessing.get_context('spawn').Process(target=run, args=(str(tmp_path), name))
    process.start()
    process.join()
    assert process.exitcode == 0


# ---- a process that is killed while it sends what it computed


def compute_large(told: Connection, folder: Path) -> None:
    os.setsid()

    @dataset(sql_file=folder / 'large.sql', data_dir=folder / 'large')
    class Large:
        number: int

        def large(number: int) -> bytes:
            return bytes(4_000_000)

    Large.extend({'number': number} for number in range(100))
    told.send('begin')
    try:
        Large.materialize(workers=2, progress=False)
        told.send('end')
    except DataError as error:
        told.send(str(error))


def writes(pid: int) -> bool:
    """Whether a process waits for another one to read what it writes."""
    with suppress(OSError):
        for path in Path(f'/proc/{pid}/task').glob('*/syscall'):
            # of x86-64 and arm64
            if path.read_text().split()[0] in ('1', '64'):
                return True
    return False


def test_a_process_that_is_killed_while_it_sends_hangs_nobody(tmp_path):
    ours, theirs = FORK.Pipe()
    context = multiprocessing.get_context('spawn')
    process = context.Process(target=compute_large, args=(theirs, tmp_path))
    process.start()
    theirs.close()
    assert ours.poll(60)
    assert ours.recv() == 'begin'
    until = time.monotonic() + 20
    while time.monotonic() < until:
        waiting = [pid for pid in session_of(process.pid) if writes(pid)]
        if waiting:
            os.kill(waiting[0], signal.SIGKILL)
            break
    try:
        if not waiting:
            pytest.skip('this machine does not tell what processes wait for')
        assert ours.poll(8), 'a process was killed, and the others wait for ever'
        assert 'was killed' in ours.recv()
    finally:
        left = session_of(process.pid)
        for pid in (*left, process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.join()


INTERRUPTED = """
import sys, time
from pathlib import Path
from finetuner.columns import dataset

folder = Path(sys.argv[1])

@dataset(sql_file=folder / 'rows.sql', data_dir=folder / 'rows')
class Slow:
    number: int

    def later(number: int) -> int:
        time.sleep(0.05)
        return number

Slow.extend({'number': number} for number in range(1000))
print('begin', flush=True)
try:
    Slow.materialize(workers=2, progress=False)
except KeyboardInterrupt:
    print('interrupted', flush=True)
"""


def test_who_is_interrupted_ends_with_all_its_processes(tmp_path):
    script = tmp_path / 'slow.py'
    script.write_text(INTERRUPTED)
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == 'begin\n'
    time.sleep(1.5)
    # as a terminal does: to the whole group
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (out, errors) == ('interrupted\n', '')
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    with sqlite3.connect(tmp_path / 'rows.sql') as connection:
        (count,) = connection.execute('SELECT count(*) FROM Slow__later').fetchone()
    assert 5 < count < 500
