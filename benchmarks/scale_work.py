"""What `scale_costs.py` measures: data, engines, and what it lets processes of their own do.

python benchmarks/scale_work.py worker texts   # and the like; for `scale_costs.py` alone
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')

SCRIPT = Path(__file__)
_BATCH_SIZE = 32
_NUM_TASKS = 300
_NUM_WARM_TASKS = 30
_MOST_WORKERS = 16
_BUSY_SECONDS = 3.0


@dataclass(frozen=True)
class Kind:
    """A kind of documents, and the model that embeds them.

    Attributes:
        model: name of a pretrained model whose weights install as a package.
        modality: of the documents.
        options: of the model.
    """

    model: str
    modality: str
    options: dict[str, Any] = field(default_factory=dict)


KINDS = {
    'texts': Kind('all-MiniLM-L6-v2', 'text'),
    'pictures': Kind('efficientnet-lite0', 'image'),
}


def open_engine(kind: str) -> Any:
    """The engine that encodes a data set of a kind, with one thread."""
    from finetuner.inference import build_engine

    one = KINDS[kind]
    engine = build_engine(
        one.model, one.options, _BATCH_SIZE, is_onnx=None, num_threads=1, precision='auto'
    )
    engine.warm_up()
    return engine


def batches(engine: Any, items: Sequence[Any]) -> Iterator[Any]:
    """Inputs as an engine divides them, lot by lot."""
    lot = engine.batch_size * engine.reader.batches_at_once
    for start in range(0, len(items), lot):
        some = items[start : start + lot]
        for chosen in engine.reader.batches(some, engine.batch_size):
            yield engine.reader.batch([some[place] for place in chosen])


def write_input(
    kind: str, folder: Path, num_documents: int, name: str = 'in', rows_per_group: int = 10_000
) -> Path:
    """Write a Parquet file of documents; their texts are as long as sentences are."""
    import pyarrow
    from capacity import WORDS
    from decode import generate_photo
    from pyarrow import parquet

    if kind == 'texts':
        import numpy as np

        rng = np.random.default_rng(0)
        lengths = rng.lognormal(2.8, 0.8, num_documents).clip(2, 200).astype(int)
        values: dict[str, list[Any]] = {'text': [' '.join(rng.choice(WORDS, n)) for n in lengths]}
    else:
        photos = [generate_photo(640, 480, seed) for seed in range(min(num_documents, 64))]
        values = {'image': [photos[i % len(photos)] for i in range(num_documents)]}
    values['id'] = [str(i) for i in range(num_documents)]
    path = folder / f'{kind}-{name}.parquet'
    # each row is as large as if there were no other like it
    parquet.write_table(
        pyarrow.table(values),
        path,
        row_group_size=rows_per_group,
        use_dictionary=False,
        compression='none',
    )
    return path


def work(kind: str) -> None:
    """Load an engine, and embed for as long as each line says."""
    import psutil
    from pyarrow import parquet

    import finetuner

    engine = open_engine(kind)

    with tempfile.TemporaryDirectory() as folder:
        path = write_input(kind, Path(folder), 1024 if kind == 'texts' else 64)
        contents = parquet.read_table(path)['text' if kind == 'texts' else 'image'].to_pylist()
    key = 'text' if kind == 'texts' else 'blob'
    docs = [finetuner.Document(**{key: content}) for content in contents]
    inputs = list(batches(engine, [engine.reader.read(doc) for doc in docs]))
    print(json.dumps({'bytes': psutil.Process().memory_info().rss}), flush=True)
    for line in sys.stdin:
        begin, count, end = time.perf_counter(), 0, time.perf_counter() + float(line)
        while time.perf_counter() < end:
            for batch in inputs:
                engine.embed(batch)
                count += len(batch['input_ids'] if isinstance(batch, dict) else batch)
        answer = {'documents': count, 'seconds': time.perf_counter() - begin}
        print(json.dumps(answer), flush=True)


class Worker:
    """A process of its own that loads an engine, and then embeds as long as it is told to."""

    def __init__(self, kind: str) -> None:
        """Start it."""
        command = [sys.executable, str(SCRIPT), 'worker', kind]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._input, self._output = self._process.stdin, self._process.stdout
        self.num_bytes = 0

    def wait(self) -> None:
        """Wait until it is ready to embed."""
        self.num_bytes = self._answer()['bytes']

    def _answer(self) -> dict[str, Any]:
        line = self._output.readline() if self._output else ''
        if not line:
            raise SystemExit(f'a worker ended with {self._process.wait()}')
        return json.loads(line)

    def begin(self, seconds: float) -> None:
        """Let it embed for so long."""
        print(seconds, file=self._input, flush=True)

    def rate(self) -> float:
        """Documents a second of what it did."""
        answer = self._answer()
        return answer['documents'] / answer['seconds']

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def crowd(kind: str, num_cores: int) -> tuple[float, int]:
    """The speed of a core when all of them embed, relative to one alone; and a worker's memory."""
    first = Worker(kind)
    first.wait()
    others = [Worker(kind) for _ in range(min(num_cores, _MOST_WORKERS) - 1)]
    for worker in others:
        worker.wait()
    ratios = []
    for _ in range(3):
        first.begin(_BUSY_SECONDS)
        alone = first.rate()
        for worker in (first, *others):
            worker.begin(_BUSY_SECONDS)
        ratios.append(statistics.mean(worker.rate() for worker in (first, *others)) / alone)
    for worker in (first, *others):
        worker.end()
    return min(1.0, statistics.median(ratios)), first.num_bytes


def encode_case(case: str, source: str, output: str) -> None:
    """Encode a data set as a whole, in a process that has not imported what that needs."""
    import finetuner

    given = json.loads(case)
    summary = finetuner.encode_dataset(
        source,
        output,
        model=KINDS[given['kind']].model,
        rows_per_shard=given['rows_per_shard'],
        num_workers=given['workers'],
        num_threads=1,
        ray_address='local' if given['how'] == 'ray' else None,
        show_progress=False,
    )
    print(json.dumps({'seconds': summary.seconds, 'core_seconds': time.process_time()}))


class Echo:
    """An actor that does nothing."""

    def __call__(self, batch: Any) -> Any:
        """Give back what came."""
        return batch


def time_ray() -> None:
    """How long Ray takes to start, an actor, and a task of Ray Data."""
    from finetuner.ray_cluster import LOCAL, driver

    begin = time.perf_counter()
    with driver(LOCAL) as ray:
        import ray.data as ray_data

        one = ray_data.ActorPoolStrategy(size=1)
        dataset = ray_data.from_items([{'shard': 0}])
        dataset = dataset.map_batches(Echo, batch_size=1, num_cpus=0.5, compute=one)
        dataset.context.enable_progress_bars = False
        dataset.materialize()
    ray_seconds = time.perf_counter() - begin
    with driver(LOCAL) as ray:
        begin = time.perf_counter()
        actor = ray.remote(_Asked).remote()
        ray.get(actor.ask.remote())
        actor_seconds = time.perf_counter() - begin
        ray.kill(actor)

        def tasks(count: int) -> float:
            begin = time.perf_counter()
            dataset = ray_data.from_items(
                [{'shard': i} for i in range(count)], override_num_blocks=count
            ).map_batches(
                Echo, batch_size=1, num_cpus=0.5, compute=ray_data.ActorPoolStrategy(size=1)
            )
            dataset.context.enable_progress_bars = False
            for _ in dataset.iter_rows():
                pass
            return time.perf_counter() - begin

        tasks(_NUM_WARM_TASKS)
        seconds = (tasks(_NUM_TASKS) - tasks(_NUM_WARM_TASKS)) / (_NUM_TASKS - _NUM_WARM_TASKS)
    answer = {
        'ray_seconds': ray_seconds,
        'actor_seconds': actor_seconds,
        'dispatch_seconds': max(0.0, seconds),
    }
    print(json.dumps(answer))


class _Asked:
    def ask(self) -> None:
        """Answer."""


def _busy_seconds() -> float:
    """Of cores, by whatever runs on this machine: workers are not this process's own children."""
    import psutil

    used = psutil.cpu_times()
    return used.user + used.system


def time_queue() -> None:
    """Four runs that share two slots, then one by itself, when the disk has been read before."""
    from docarray import Document, DocumentArray

    from finetuner.client import LocalClient
    from finetuner.config import Settings
    from finetuner.runs.dispatcher import Dispatcher
    from finetuner.runs.workspace import Workspace

    docs = DocumentArray(
        Document(text=f'{word} {i}', tags={'finetuner_label': word})
        for word in ('shoe', 'hat', 'coat', 'dog')
        for i in range(4)
    )
    found = []
    for num_runs, num_slots in ((4, 2), (1, 1)):
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings.from_environment(Path(folder))
            client = LocalClient(settings, max_retries=0)
            dispatcher = Dispatcher(Workspace(settings), num_slots)
            parameters = {'model': KINDS['texts'].model, 'epochs': 1, 'batch_size': 8}
            runs = [client.fit(parameters, {'train_data': docs}) for _ in range(num_runs)]
            begin, busy = time.perf_counter(), _busy_seconds()
            dispatcher.start()
            store = client.workspace.runs
            ids = [(run['experiment_name'], run['name']) for run in runs]
            while any(store.get_run(*each).is_going for each in ids):
                time.sleep(0.05)
            seconds, busy = time.perf_counter() - begin, _busy_seconds() - busy
            states = {store.get_run(*each).status for each in ids}
            dispatcher.drain(1)
            if states != {'FINISHED'}:
                raise SystemExit(f'runs ended as {states}')
        case = {'runs': num_runs, 'slots': num_slots, 'seconds': seconds}
        found.append({**case, 'core_seconds': busy})
    print(json.dumps({'queue': found}))


_COMMANDS = {'worker': work, 'case': encode_case, 'ray': time_ray, 'queue': time_queue}

if __name__ == '__main__':
    _COMMANDS[sys.argv[1]](*sys.argv[2:])
