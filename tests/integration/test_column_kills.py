"""Adding rows and computing columns are killed at any moment, again and again, over one dataset.

After each kill it opens, nothing is lost or half-written, no process is left over, and all goes on.
`COLUMN_KILLS=500 python -m pytest tests/integration/test_column_kills.py -s` kills more of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from finetuner.columns import File, dataset
from finetuner.excepts import DataError

NUM_KILLS = int(os.environ.get('COLUMN_KILLS', '50'))
CALLS = 'COLUMN_CALLS'
# rows of each call, and of each life
ADDED, COMPUTED = (1, 600, 40, 2500, 5100), 300
ROWS_A_FILE = 40
DERIVED = ('squared', 'told', 'small', 'both')
FORK = multiprocessing.get_context('fork')


def called(name: str, number: int) -> None:
    """Note it."""
    with open(os.environ[CALLS], 'ab', buffering=0) as file:
        file.write(f'{name} {number}\n'.encode())


def opened(folder: Path) -> Any:
    """The dataset that is added to and computed."""

    @dataset(sql_file=folder / 'graph.sql', data_dir=folder / 'graph')
    class Graph:
        number: int
        text: str
        picture: File

        def squared(number: int) -> int:
            called('squared', number)
            return number * number

        def told(number: int, picture: File, text: str) -> str:
            called('told', number)
            time.sleep(0.0005)
            return hashlib.sha256(picture.read() + text.encode()).hexdigest()

        def small(number: int, squared: int) -> File:
            called('small', number)
            with File.make_tmp('.txt') as file:
                Path(file.path).write_text(f'{number // 8} or more' * 500)
                return file

        def both(number: int, small: File, told: str) -> list:
            called('both', number)
            return [small.size, told[:8]]

    return Graph


def content_of(number: int) -> bytes:
    """Of the file of a row: some rows have the same."""
    return f'file {number // ROWS_A_FILE}\n'.encode() * 300


def naive(number: int) -> dict[str, Any]:
    """All that a row should be."""
    told = hashlib.sha256(content_of(number) + f'row {number}'.encode()).hexdigest()
    small = (f'{number // 8} or more' * 500).encode()
    return {
        'number': number,
        'text': f'row {number}',
        'picture': content_of(number),
        'squared': number * number,
        'told': told,
        'small': small,
        'both': [len(small), told[:8]],
    }


# ---- what is killed


@dataclass
class Life:
    """What is to be done, from how many rows on, and which rows are to be computed."""

    kind: str
    num_rows: int
    computed: tuple[int, int]


def rows_from(folder: Path, start: int, count: int, progress: Any) -> Iterator[dict[str, Any]]:
    """The rows that come next; tells how many were taken."""
    source = folder / 'sources'
    source.mkdir(exist_ok=True)
    for number in range(start, start + count):
        if number in (start, number // ROWS_A_FILE * ROWS_A_FILE):
            path = source / f'{number // ROWS_A_FILE}.txt'
            path.write_bytes(content_of(number))
            picture = File(path)
        progress[1] = number + 1
        yield {'number': number, 'text': f'row {number}', 'picture': picture}


def live(told: Connection, folder: Path, life: Life, progress: Any) -> None:
    """Add rows or compute columns, in a session of its own; tells when it begins, and how it ends."""
    os.setsid()
    graph = opened(folder)
    told.send('begin')
    if life.kind == 'add':
        for count in ADDED:
            assert graph.extend(rows_from(folder, progress[0], count, progress)) == count
            progress[0] += count
        told.send('end')
    else:
        first, last = life.computed
        try:
            graph.rows[first:last].materialize(workers=2, progress=False)
            told.send('end')
        except DataError as error:
            told.send(str(error))
    time.sleep(600)


def session_of(leader: int) -> list[int]:
    """Processes that a process started, and those that these started."""
    found = []
    for name in filter(str.isdigit, os.listdir('/proc')):
        with suppress(OSError):
            state = Path(f'/proc/{name}/stat').read_text().rpartition(')')[2].split()
            if int(name) != leader and int(state[3]) == leader and state[0] != 'Z':
                found.append(int(name))
    return found


@dataclass
class Kills:
    """What was seen of them.

    Attributes:
        seconds: that each kind of life takes.
        hits: lives of each kind that were killed before they ended.
        ends: seconds until the last process was gone.
        lost: values that were computed and not kept, and all that were computed by killed lives.
    """

    seconds: dict[str, float] = field(
        default_factory=lambda: {'add': 1.0, 'compute': 0.8, 'worker': 0.5}
    )
    hits: Counter[str] = field(default_factory=Counter)
    ends: list[float] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)


def killed(
    folder: Path, life: Life, kills: Kills, seconds: float, rng: random.Random
) -> tuple[int, int]:
    """Let it live so long, and kill it or one of its processes.

    Returns:
        How many rows there were as far as it was told, and how many with those that it was adding.
    """
    progress = FORK.RawArray('q', [life.num_rows, life.num_rows])
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=live, args=(theirs, folder, life, progress))
    process.start()
    theirs.close()
    assert ours.poll(30), 'a life has not begun'
    with suppress(EOFError):
        assert ours.recv() == 'begin'
    begun = time.monotonic()
    has_ended = ours.poll(None if math.isinf(seconds) else seconds)
    if has_ended:
        kills.seconds[life.kind] += 0.3 * (time.monotonic() - begun - kills.seconds[life.kind])
    elif life.kind == 'worker':
        end_of_worker(process.pid, ours, kills, rng)
    kills.hits[life.kind] += not has_ended
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f'{life} has failed: see above'
    since = time.monotonic()
    while left := session_of(process.pid):
        if time.monotonic() - since > 10:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f'{len(left)} processes of {life} were left over')
        time.sleep(0.02)
    kills.ends.append(time.monotonic() - since)
    return progress[0], progress[1]


def end_of_worker(leader: int, told: Connection, kills: Kills, rng: random.Random) -> None:
    """Kill one process of several that compute: the others go on, or it is told what happened."""
    workers = session_of(leader)
    if workers:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(workers), signal.SIGKILL)
    assert told.poll(20), 'a process that computed was killed, and the others wait for ever'
    message = told.recv()
    assert message == 'end' or 'was killed' in message, message


# ---- what is there then


@dataclass
class Found:
    """What a check found: how many rows, and how many values were lost of how many computed."""

    num_rows: int
    lost: int = 0
    computed: int = 0


def noted(path: Path) -> set[str]:
    """Calls since this was last asked."""
    found = path.read_text().splitlines() if path.exists() else []
    path.write_text('')
    assert len(set(found)) == len(found), 'a value was computed twice'
    return set(found)


def check_fields(graph: Any, first: int, last: int) -> None:
    """Rows are whole, and so are their files."""
    rows = graph.rows
    assert list(rows.ids) == list(range(1, last + 1))
    numbers = range(first, last)
    assert list(rows[first:].column('number')) == list(numbers)
    assert list(rows[first:].column('text')) == [f'row {number}' for number in numbers]
    seen: dict[str, bytes] = {}
    for number, file in zip(numbers, rows[first:].column('picture'), strict=True):
        if file.hash not in seen:
            seen[file.hash] = file.read()
            assert hashlib.sha256(seen[file.hash]).hexdigest() == file.hash
            assert file.size == len(seen[file.hash])
        assert seen[file.hash] == content_of(number)


def check_columns(graph: Any, first: int, last: int) -> None:
    """Derived values are right, computed now or before."""
    rows = graph.rows[first:last]
    seen: dict[str, bytes] = {}
    for name in DERIVED:
        for number, value in zip(range(first, last), rows.column(name), strict=True):
            expected = naive(number)[name]
            if isinstance(value, File):
                assert hashlib.sha256(expected).hexdigest() == value.hash
                if value.hash not in seen:
                    seen[value.hash] = value.read()
                value = seen[value.hash]
            assert value == expected, f'{name} of row {number}'


def check_files(folder: Path, since: float) -> None:
    """What has the name of a content has this content."""
    for path in (folder / 'graph').rglob('*.txt'):
        if path.stat().st_mtime >= since:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def check(
    told: Connection, folder: Path, life: Life, num_rows: tuple[int, int], since: float
) -> None:
    """All of it, in a process of its own, which goes on with what was killed."""
    with sqlite3.connect(folder / 'graph.sql') as connection:
        assert connection.execute('PRAGMA integrity_check').fetchall() == [('ok',)]
        assert connection.execute('PRAGMA foreign_key_check').fetchall() == []
    connection.close()
    calls = Path(os.environ[CALLS])
    before = noted(calls)
    graph = opened(folder)
    found = Found(len(graph))
    assert num_rows[0] <= found.num_rows <= num_rows[1]
    check_fields(graph, max(0, life.num_rows - 50), found.num_rows)
    check_files(folder, since - 1)
    if life.kind != 'add':
        first, last = life.computed
        # go on, in each way
        way = len(before) % 3
        if way < 2:
            assert graph.rows[first:last].materialize(workers=2 * way, progress=False) == 0
        check_columns(graph, first, last)
        again = noted(calls)
        found.lost, found.computed = len(before & again), len(before)
        everything = {f'{name} {number}' for name in DERIVED for number in range(first, last)}
        assert before | again == everything
        check_columns(graph, first, last)
        assert not noted(calls)
    told.send(found)


def checked(*arguments: Any) -> Found:
    """What `check` finds, in a process of its own: none is forked from one that opened anything."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=check, args=(theirs, *arguments))
    process.start()
    theirs.close()
    with suppress(EOFError):
        found = ours.recv()
        process.join()
        return found
    process.join()
    raise AssertionError(f'what {arguments[1]} left is not right: see above')


def check_all(folder: Path, num_rows: int, num_computed: int) -> None:
    """Everything is there at the end, and nothing besides."""
    graph = opened(folder)
    check_fields(graph, 0, num_rows)
    check_columns(graph, 0, num_computed)
    assert graph.rows[:num_computed].materialize(workers=0, progress=False) == 0
    assert not noted(Path(os.environ[CALLS]))
    graph.prune()
    check_files(folder, 0)
    check_fields(graph, 0, num_rows)
    check_columns(graph, 0, num_computed)
    assert not [path for path in (folder / 'graph').rglob('*') if path.suffix not in ('', '.txt')]


def kill_and_check(home: str, num_kills: int) -> None:
    """Kill, and check, and so on."""
    folder = Path(home)
    os.environ[CALLS] = str(folder / 'calls')
    temporary = folder / 'temporary'
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    rng = random.Random(0)
    kills = Kills()
    num_rows = num_computed = 0
    begun = time.monotonic()
    # whole lives first, to know how long they take
    kinds = ['add', 'compute', 'worker']
    for number in itertools.count():
        if kills.hits.total() == num_kills:
            break
        kind = kinds[number] if number < 3 else min(kinds, key=lambda each: kills.hits[each])
        if num_rows - num_computed < COMPUTED:
            kind = 'add'
        seconds = math.inf if number < 3 else rng.uniform(0, kills.seconds[kind])
        computed = (num_computed, num_computed + COMPUTED)
        life = Life(kind, num_rows, computed)
        since = time.time()
        found = checked(folder, life, killed(folder, life, kills, seconds, rng), since)
        num_rows = found.num_rows
        if kind != 'add':
            num_computed += COMPUTED
            kills.lost.append((found.lost, found.computed))
    process = FORK.Process(target=check_all, args=(folder, num_rows, num_computed))
    process.start()
    process.join()
    assert process.exitcode == 0
    report(kills, num_rows, num_computed, time.monotonic() - begun)


def report(kills: Kills, num_rows: int, num_computed: int, seconds: float) -> None:
    """What happened, as JSON."""
    lost, computed = (sum(each) for each in zip(*kills.lost, strict=True))
    told = {
        'seconds': round(seconds, 1),
        'rows': num_rows,
        'computed': num_computed,
        'kills': dict(kills.hits),
        'lives take': {kind: round(each, 2) for kind, each in kills.seconds.items()},
        'last process ended after': round(max(kills.ends), 2),
        'values computed by killed lives': computed,
        'of these not kept': lost,
    }
    print(json.dumps(told), flush=True)
    assert all(kills.hits[kind] for kind in kills.seconds)
    assert lost < computed / 2, 'what was killed went on from the beginning'


@pytest.mark.timeout(120 + 6 * NUM_KILLS)
def test_what_is_killed_leaves_a_dataset_that_opens_and_goes_on(tmp_path):
    # spawned: what it forks has no threads of other tests in it, whose locks nobody would release
    context = multiprocessing.get_context('spawn')
    process = context.Process(target=kill_and_check, args=(str(tmp_path), NUM_KILLS))
    process.start()
    process.join()
    assert process.exitcode == 0
