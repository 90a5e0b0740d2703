"""Add rows, derive a cheap column, iterate in batches, beside sqlite3 and multiprocessing by hand.

python benchmarks/column_rates.py                # 100,000 rows, seven rounds: half a minute
python benchmarks/column_rates.py --rows 10000
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rounds import PAUSE_SECONDS

from finetuner.columns import batch, dataset

BATCH_SIZE = 100
NUM_WORKERS = 2
STEPS = ('add', 'derive', 'batches in order', 'batches shuffled')


def texts(number: int) -> str:
    """The name of a row."""
    return f'number {number}'


def half(number: int) -> float:
    """What is derived of a row."""
    return number / 2


def declared(folder: Path, num_rows: int) -> Iterator[None]:
    """A dataset declared as a class, step by step."""

    @dataset(sql_file=folder / 'declared.sql', data_dir=folder / 'declared')
    class Numbers:
        number: int
        name: str

        def halved(number: int) -> float:
            return half(number)

    @batch(Numbers)
    class NumberBatch:
        def array(halved: list[float]) -> np.ndarray:
            return np.array(halved)

    yield
    Numbers.extend({'number': number, 'name': texts(number)} for number in range(num_rows))
    yield
    Numbers.materialize('halved', workers=NUM_WORKERS, progress=False)
    yield
    check(sum(each.sum() for each in NumberBatch.array.all(BATCH_SIZE)), num_rows)
    yield
    batches = NumberBatch.array.all(BATCH_SIZE).randomize(seed=0)
    check(sum(each.sum() for each in batches), num_rows)
    yield


def by_hand(folder: Path, num_rows: int) -> Iterator[None]:
    """The same by a plain script: tables of rows and of values, and a pool of processes."""
    database = sqlite3.connect(folder / 'hand.sql')
    database.execute('PRAGMA journal_mode = WAL')
    database.execute('PRAGMA synchronous = NORMAL')
    database.execute('CREATE TABLE rows (id INTEGER PRIMARY KEY, number INTEGER, name TEXT)')
    database.execute('CREATE TABLE halved (id INTEGER PRIMARY KEY, value REAL)')
    yield
    with database:
        rows = ((number, texts(number)) for number in range(num_rows))
        database.executemany('INSERT INTO rows (number, name) VALUES (?, ?)', rows)
    yield
    with multiprocessing.get_context('fork').Pool(NUM_WORKERS) as pool, database:
        rows = database.execute('SELECT id, number FROM rows').fetchall()
        values = pool.imap(half_of_row, rows, chunksize=1000)
        database.executemany('INSERT INTO halved VALUES (?, ?)', values)
    yield
    total = 0.0
    for start in range(1, num_rows + 1, BATCH_SIZE):
        sql = 'SELECT value FROM halved WHERE id BETWEEN ? AND ?'
        values = database.execute(sql, (start, start + BATCH_SIZE - 1))
        total += np.array([value for (value,) in values]).sum()
    check(total, num_rows)
    yield
    total = 0.0
    ids = list(range(1, num_rows + 1))
    random.Random(0).shuffle(ids)
    for start in range(0, num_rows, BATCH_SIZE):
        some = ids[start : start + BATCH_SIZE]
        sql = f'SELECT value FROM halved WHERE id IN ({", ".join("?" * len(some))})'
        total += np.array([value for (value,) in database.execute(sql, some)]).sum()
    check(total, num_rows)
    database.close()
    yield


def half_of_row(row: tuple[int, int]) -> tuple[int, float]:
    """What a process of the pool computes."""
    return row[0], half(row[1])


def check(total: float, num_rows: int) -> None:
    """Stop where something else came out."""
    if total != num_rows * (num_rows - 1) / 4:
        raise SystemExit(f'{total}: that is not the sum of {num_rows:,} rows')


def seconds_of_steps(num_rows: int, order: Sequence[str]) -> dict[str, list[float]]:
    """Let both take turns, step by step; seconds of each step by contestant."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: CONTESTANTS[name](Path(folder), num_rows) for name in order}
        seconds: dict[str, list[float]] = {name: [] for name in order}
        for name in order:
            next(steps[name])
        for _ in STEPS:
            for name in order:
                time.sleep(PAUSE_SECONDS)
                start = time.perf_counter()
                next(steps[name])
                seconds[name].append(time.perf_counter() - start)
    for each in seconds.values():
        each.append(sum(each))
    return seconds


def main() -> None:
    """Print a table: rows a second, and the median of the ratios within a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, default=100_000)
    parser.add_argument('--rounds', type=int, default=7)
    arguments = parser.parse_args()
    seconds_of_steps(arguments.rows, list(CONTESTANTS))
    rounds = []
    for number in range(arguments.rounds):
        order = list(CONTESTANTS) if number % 2 else list(CONTESTANTS)[::-1]
        rounds.append(seconds_of_steps(arguments.rows, order))
    print(f'{arguments.rows:,} rows, batches of {BATCH_SIZE}, {NUM_WORKERS} processes')
    print(f'{"rows/s":<20} {"declared":>12} {"by hand":>12} {"times as long":>14}')
    for place, step in enumerate((*STEPS, 'all of it')):
        ours = [each['declared'][place] for each in rounds]
        theirs = [each['by hand'][place] for each in rounds]
        speeds = [arguments.rows / statistics.median(each) for each in (ours, theirs)]
        longer = statistics.median(own / peer for own, peer in zip(ours, theirs, strict=True))
        print(f'{step:<20} {speeds[0]:>12,.0f} {speeds[1]:>12,.0f} {longer:>14.2f}')


CONTESTANTS = {'declared': declared, 'by hand': by_hand}

if __name__ == '__main__':
    main()
