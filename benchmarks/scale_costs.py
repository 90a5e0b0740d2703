"""What encoding, searching and runs cost a document, a shard, a worker and a run, on this machine.

Rates are medians over some rounds, of one core that is alone unless it says otherwise. What
`scale_simulation.py` needs goes to a file:

    python benchmarks/scale_costs.py                  # a table; five minutes on two cores
    python benchmarks/scale_costs.py --json benchmarks/scale_costs.json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')

from scale_model import KindCosts, UnitCosts
from scale_work import KINDS, SCRIPT, batches, crowd, open_engine, write_input

_ROUNDS = 3
_DISK_BYTES = 256 << 20
_INDEX_ROWS = 200_000
_MANY_SHARDS = 200
_STARTS = 3
# documents and rows a shard of what is encoded as a whole
CASES = {'texts': (4000, 400), 'pictures': (480, 48)}


def median_seconds(step: Callable[[], Any], rounds: int = _ROUNDS) -> float:
    """Seconds of a step, after one for practice."""
    step()
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def kind_costs(kind: str, folder: Path, crowded_speed: float) -> KindCosts:
    """Each stage of a lot of documents, by the code that encodes data sets."""
    import numpy as np

    from finetuner.bulk.inputs import open_input
    from finetuner.bulk.rows import Columns
    from finetuner.bulk.writing import open_writer

    engine = open_engine(kind)
    path = write_input(kind, folder, 1024 if kind == 'texts' else 128)
    columns = Columns(modality=KINDS[kind].modality)
    source = open_input(path, columns)
    num_rows = source.num_rows(columns)
    rows = list(source.rows(0, num_rows, columns))
    items = [engine.reader.read(row.doc, i) for i, row in enumerate(rows)]
    vectors = np.concatenate([engine.embed(inputs) for inputs in batches(engine, items)])
    output = folder / f'{kind}-out.parquet'

    def write() -> None:
        with open_writer([output], engine.dimension, num_rows, (), []) as writer:
            for row, vector in zip(rows, vectors, strict=True):
                writer.add(row, vector)

    def embed() -> None:
        for inputs in batches(engine, items):
            engine.embed(inputs)

    def seconds(step: Callable[[], Any]) -> float:
        return median_seconds(step) / num_rows

    held = [_num_bytes(inputs) for inputs in batches(engine, items)]
    return KindCosts(
        read_seconds=seconds(lambda: list(source.rows(0, num_rows, columns))),
        decode_seconds=seconds(lambda: [engine.reader.read(row.doc) for row in rows]),
        embed_seconds=seconds(embed),
        write_seconds=seconds(write),
        crowded_speed=crowded_speed,
        bytes_in=path.stat().st_size / num_rows,
        bytes_held=sum(held) / num_rows,
        bytes_out=output.stat().st_size / num_rows,
        bytes_indexed=_index_of(vectors).nbytes / num_rows,
        dimension=engine.dimension,
        rows_per_lot=engine.batch_size * engine.reader.batches_at_once,
    )


def _num_bytes(inputs: Any) -> int:
    return sum(each.nbytes for each in (inputs.values() if isinstance(inputs, dict) else [inputs]))


def _index_of(vectors: Any) -> Any:
    import numpy as np

    from finetuner.vector_index.exact import GrowingVectors

    index = GrowingVectors(vectors.shape[1])
    index.change(np.arange(len(vectors)), vectors, np.array([], np.int64))
    return index.now


def answer_of(*arguments: object) -> dict[str, Any]:
    """What a process of its own says: of what imports and starts are a part."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def shard_costs(folder: Path) -> tuple[float, float, float]:
    """Seconds of a worker and of the driver, and bytes, a shard; of shards of one row."""
    import finetuner
    from finetuner.bulk.options import BulkOptions
    from finetuner.bulk.plan import load_plan
    from finetuner.bulk.shard_encoding import ShardEncoder

    source = write_input('texts', folder, _MANY_SHARDS, 'shards')
    output = folder / 'shards'

    def encode() -> None:
        finetuner.encode_dataset(
            source, output, model=KINDS['texts'].model, rows_per_shard=1, show_progress=False
        )

    encode()
    written = [*output.glob('*.json')]
    plan = load_plan(output / 'plan.json')
    options = BulkOptions(output, model=KINDS['texts'].model, rows_per_shard=1)
    encoder = ShardEncoder(options, plan.job, 1)
    engine = open_engine('texts')
    words = next(iter(batches(engine, [engine.reader.read(finetuner.Document(text='a shoe'))])))
    alone = median_seconds(lambda: engine.embed(words), 20)
    shards = iter(plan.shards)
    whole = median_seconds(lambda: encoder(next(shards)), _MANY_SHARDS // 2)
    # the second time everything is there: planned, looked at and listed
    driver = median_seconds(encode, 3) / _MANY_SHARDS
    num_bytes = sum(path.stat().st_size for path in written) / _MANY_SHARDS
    return max(0.0, whole - alone), driver, num_bytes


def process_dispatch() -> float:
    """Seconds that a task costs a pool of processes."""
    from finetuner.process_pool import ProcessPool

    pool = ProcessPool(abs, 1, tasks_each=1)
    begin = time.perf_counter()
    count = sum(1 for _ in pool.run(iter(range(2000))))
    return (time.perf_counter() - begin) / count


def disk_rates(folder: Path) -> tuple[float, float, float]:
    """Bytes a second written with fsync, read from the disk, and hashed."""
    from finetuner.artifact_files import hash_file

    path, block = folder / 'disk', os.urandom(1 << 20)

    def write() -> None:
        with path.open('wb') as file:
            for _ in range(_DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        with path.open('rb') as file:
            # or the memory answers
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 20):
                pass

    written = median_seconds(write, 3)
    taken = median_seconds(read, 3)
    hashed = median_seconds(lambda: hash_file(path), 3)
    path.unlink()
    return _DISK_BYTES / written, _DISK_BYTES / taken, _DISK_BYTES / hashed


def search_seconds() -> float:
    """Seconds of a core that a query takes over 1e9 bytes of embeddings, all compared."""
    import numpy as np

    from finetuner.vector_index.exact import nearest

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((_INDEX_ROWS, 384), np.float32)
    index, queries = _index_of(vectors), vectors[:8] + 0.1

    def search() -> None:
        for query in queries:
            nearest(index, query[None], 10, 'cosine')

    search()
    begin = time.process_time()
    for _ in range(3):
        search()
    seconds = (time.process_time() - begin) / (3 * len(queries))
    return seconds / vectors.nbytes * 1e9


def store_seconds(folder: Path) -> float:
    """Seconds of a write of a line and a sign of life to the run store."""
    from finetuner.config import RunConfig, Settings
    from finetuner.runs.processes import this_host, this_process
    from finetuner.runs.records import LogLine, now
    from finetuner.runs.store import RunStore
    from finetuner.storage.database import open_database

    database = open_database(Settings.from_environment(folder / 'store').database_url)
    try:
        store, worker = RunStore(database), this_process()
        config = RunConfig(train_data='sha256:' + '0' * 64)
        run = store.create_run(config, 'run', worker, this_host())
        store.mark_started(run.id, worker)
        lines = [LogLine(now(), 'INFO', 'a line')]
        return median_seconds(lambda: store.record(run.id, lines, worker=worker, beats=True), 200)
    finally:
        database.close()


def start_costs(kind: str, folder: Path) -> tuple[float, ...]:
    """Seconds until an engine has answered, until a new process has, and of cores that takes."""
    path = write_input(kind, folder, 1, 'one')
    case = json.dumps({'kind': kind, 'rows_per_shard': 1, 'workers': 1, 'how': 'here'})
    found = []
    for number in range(_STARTS):
        begin = time.perf_counter()
        answer = answer_of('case', case, path, folder / f'{kind}-one-{number}')
        found.append((answer['seconds'], time.perf_counter() - begin, answer['core_seconds']))
    return tuple(min(each) for each in zip(*found, strict=True))


def measured_cases(folder: Path, num_cores: int) -> Iterator[dict[str, Any]]:
    """Data sets encoded as a whole, by one worker, by two, and by two actors of Ray."""
    for kind, (documents, rows) in CASES.items():
        path = write_input(kind, folder, documents, 'case', rows)
        ways = [('here', 1), ('processes', 2)] + ([('ray', 2)] if kind == 'texts' else [])
        for how, workers in ways:
            case = {
                'kind': kind,
                'documents': documents,
                'rows_per_shard': rows,
                'workers': workers,
                'how': how,
            }
            output = folder / f'{kind}-{how}'
            answer = answer_of('case', json.dumps(case), path, output)
            yield {**case, 'seconds': answer['seconds']}


@contextmanager
def _said(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    print(f'{what} ...', file=sys.stderr, end=' ', flush=True)
    yield
    print(f'{time.perf_counter() - begin:.0f} s', file=sys.stderr, flush=True)


def measure(folder: Path) -> UnitCosts:
    """All of it."""
    from finetuner.cores import num_cores

    cores = num_cores()
    starts = ('load_seconds', 'worker_seconds', 'worker_core_seconds')
    found: dict[str, Any] = {'cores': cores, 'kinds': {}, **{name: {} for name in starts}}
    for kind in KINDS:
        with _said(f'{kind}: cores side by side'):
            crowded, found['worker_bytes'] = crowd(kind, cores)
        with _said(f'{kind}: starts'):
            for name, seconds in zip(starts, start_costs(kind, folder), strict=True):
                found[name][kind] = seconds
        with _said(f'{kind}: stages'):
            found['kinds'][kind] = kind_costs(kind, folder, crowded)
    with _said('shards'):
        found['shard_seconds'], found['plan_seconds'], found['shard_bytes'] = shard_costs(folder)
    with _said('Ray'):
        ray = answer_of('ray')
    found |= {'ray_seconds': ray['ray_seconds'], 'actor_seconds': ray['actor_seconds']}
    found['dispatch_seconds'] = {
        'processes': process_dispatch(),
        'ray': ray['dispatch_seconds'],
    }
    with _said('disk, hashes, search and run store'):
        rates = disk_rates(folder)
        found['disk_write'], found['disk_read'], found['hash_bytes'] = rates
        found['search_seconds'] = search_seconds()
        found['store_seconds'] = store_seconds(folder)
    with _said('runs in a queue'):
        *found['queue'], one = answer_of('queue')['queue']
        found['run_seconds'], found['run_core_seconds'] = one['seconds'], one['core_seconds']
    with _said('small cases'):
        found['measured'] = list(measured_cases(folder, cores))
    return UnitCosts(**found)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', type=Path, help='file to write the costs to')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(dataclasses.asdict(costs), indent=1) + '\n')
    from scale_tables import small_cases, unit_costs

    for line in itertools.chain(unit_costs(costs), [''], small_cases(costs)):
        print(line)


if __name__ == '__main__':
    main()
