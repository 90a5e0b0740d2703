"""Encode a data set in shards, beside the same work done by hand with Ray Data and a plain ONNX session.

python benchmarks/bulk_encoding.py                               # 5,000 texts, 500 pictures: some minutes
python benchmarks/bulk_encoding.py --texts 200000 --pictures 20000 --folder big --workers 2 --only texts
python benchmarks/bulk_encoding.py --folder big --report         # the table of all parts run there

Each part is a process of its own, from its start to the last file, at the same niceness; all use the
ONNX graph of one artifact, one thread a worker, and the same batches. What they took is added to
results.json in the folder, so that a large run can be done in parts. `--kills 3` kills ours at random,
goes on, and compares the files with those of the run that was not killed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
from pyarrow import parquet

EMOJI = Path(__file__).resolve().parents[1] / 'examples' / 'emoji'
MODELS = {'texts': 'all-MiniLM-L6-v2', 'pictures': 'efficientnet-lite0'}
# the pictures are of 96 pixels themselves
OPTIONS = {'texts': None, 'pictures': {'input_size': 96}}
# rows of an input file, which is a shard
ROWS = {'texts': 10_000, 'pictures': 1_000}
CONTESTANTS = ('finetuner', 'finetuner on ray', 'ray by hand')
BATCH_SIZE = 32
TOKENS_AT_ONCE = 64 * BATCH_SIZE
TEXTS_AT_ONCE = 32 * BATCH_SIZE
LOOK_SECONDS = 0.5


# ---- what is encoded


def make_texts(number: int) -> list[str]:
    """Names and keywords of emojis, put together anew: 1 to 24 words."""
    with (EMOJI / 'concepts.csv').open(encoding='utf-8', newline='') as file:
        words = sorted({w for row in csv.DictReader(file) for w in row['keywords'].split('; ')})
    draw = random.Random(0)
    return [' '.join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(number)]


def make_pictures(number: int) -> Iterator[bytes]:
    """The files of the emoji pictures, over and over."""
    contents = [path.read_bytes() for path in sorted(EMOJI.glob('*/*/*.webp'))]
    return (contents[place % len(contents)] for place in range(number))


def write_inputs(folder: Path, kind: str, number: int, rows: int) -> None:
    """Write Parquet files of so many rows."""
    if len(list(folder.glob('*.parquet'))) == -(-number // rows):
        return
    folder.mkdir(parents=True, exist_ok=True)
    column = 'text' if kind == 'texts' else 'image'
    contents: list[Any] = list(make_texts(number) if kind == 'texts' else make_pictures(number))
    for start in range(0, number, rows):
        some = contents[start : start + rows]
        ids = [f'{kind} {n}' for n in range(start, start + len(some))]
        table = pyarrow.table({'id': ids, column: some})
        parquet.write_table(table, folder / f'{start:09d}.parquet', row_group_size=250)


def write_artifact(folder: Path, kind: str) -> None:
    """The pretrained model with its ONNX graph."""
    if folder.exists():
        return
    from finetuner.artifact import save_artifact
    from finetuner.inference import build_engine

    engine = build_engine(MODELS[kind], OPTIONS[kind], device='cpu')
    save_artifact(folder, engine.model, engine.spec, onnx_inputs=engine.reader.example())  # type: ignore[attr-defined]


# ---- those who do it, each in a process


def finetuner_encodes(task: dict[str, Any], ray_address: str | None) -> None:
    """Ours, on this machine or on a Ray cluster of its own."""
    import finetuner

    finetuner.encode_dataset(
        task['input'],
        task['output'],
        task['artifact'],
        device='cpu',
        engine='onnx',
        precision='fp32',
        rows_per_shard=task['rows'],
        batch_size=BATCH_SIZE,
        num_workers=task['workers'],
        num_threads=1,
        ray_address=ray_address,
        show_progress=False,
    )


class ByHand:
    """An actor with a plain session: of the rows of a block, ids and embeddings."""

    def __init__(self, kind: str, artifact: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry('session.force_spinning_stop', '1')
        self.session = onnxruntime.InferenceSession(f'{artifact}/model.onnx', options)
        self.kind = kind
        model = json.loads(Path(artifact, 'artifact.json').read_text())['model']
        inputs = model['text' if kind == 'texts' else 'picture']
        if kind == 'texts':
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(f'{artifact}/tokenizer.json')
            self.tokenizer.enable_truncation(inputs['max_length'])
            self.tokenizer.no_padding()
        else:
            self.size = inputs['input_size']

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed the rows of a batch."""
        embed = self.texts if self.kind == 'texts' else self.pictures
        column = 'text' if self.kind == 'texts' else 'image'
        return {'id': batch['id'], 'embedding': embed(list(batch[column]))}

    def texts(self, texts: list[str]) -> np.ndarray:
        """Embed texts, those of like length together."""
        from finetuner.inputs import divide_by_length

        found = None
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        for chosen in divide_by_length([len(ids) for ids in tokens], TOKENS_AT_ONCE):
            width = max(len(tokens[place]) for place in chosen)
            ids = np.zeros((len(chosen), width), np.int64)
            mask = np.zeros((len(chosen), width), np.int64)
            for row, place in enumerate(chosen):
                ids[row, : len(tokens[place])] = tokens[place]
                mask[row, : len(tokens[place])] = 1
            out = self.session.run(None, {'input_ids': ids, 'attention_mask': mask})[0]
            found = np.empty((len(texts), out.shape[1]), np.float32) if found is None else found
            found[chosen] = out
        return found

    def pictures(self, contents: list[bytes]) -> np.ndarray:
        """Embed pictures, the next being decoded meanwhile."""
        from concurrent.futures import ThreadPoolExecutor

        from finetuner.images import load_picture

        name = self.session.get_inputs()[0].name
        found = []
        with ThreadPoolExecutor(2) as pool:
            decoded = pool.map(lambda content: load_picture(content, self.size), contents)
            for start in range(0, len(contents), BATCH_SIZE):
                some = [next(decoded) for _ in range(min(BATCH_SIZE, len(contents) - start))]
                found.append(self.session.run(None, {name: np.stack(some)})[0])
        return np.concatenate(found)


def by_hand(task: dict[str, Any]) -> None:
    """Ray Data reads, actors embed, Ray Data writes."""
    from finetuner.ray_cluster import driver

    with driver('local', show_logs=False):
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        num_files = len(list(Path(task['input']).glob('*.parquet')))
        cpus = 0.5
        ray.data.read_parquet(task['input'], override_num_blocks=num_files).map_batches(
            ByHand,
            fn_constructor_args=(task['kind'], task['artifact']),
            batch_size=TEXTS_AT_ONCE if task['kind'] == 'texts' else 256,
            compute=ray.data.ActorPoolStrategy(size=task['workers']),
            num_cpus=cpus,
        ).write_parquet(task['output'])


def do(task: dict[str, Any]) -> None:
    """Do one part, in this process."""
    # Ray's own spelling
    os.environ.update({'RAY_worker_niceness': '0'})
    if task['contestant'] == 'ray by hand':
        by_hand(task)
    else:
        finetuner_encodes(task, 'local' if task['contestant'].endswith('ray') else None)


# ---- measuring


def start(task: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A process that does a part."""
    return subprocess.Popen([sys.executable, __file__, '--task', json.dumps(task)])


def watched(process: subprocess.Popen[bytes]) -> list[float]:
    """Megabytes of all its processes, each half a second, until it ends."""
    sizes = []
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for one in [root, *root.children(recursive=True)]:
                total += one.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        sizes.append(total / 2**20)
        time.sleep(LOOK_SECONDS)
    return sizes


def measure(task: dict[str, Any], number: int) -> dict[str, Any]:
    """Do a part, and say what it took."""
    begun = time.perf_counter()
    process = start(task)
    sizes = watched(process)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f'{task} ended with {process.returncode}')
    quarter = max(1, len(sizes) // 4)
    return {
        **{name: task[name] for name in ('kind', 'contestant', 'workers')},
        'rows': number,
        'seconds': round(seconds, 2),
        'rows_per_second': round(number / seconds, 1),
        'peak_mb': round(max(sizes), 1),
        # of the last quarter of the time to the second: 1 is flat
        'growth': round(
            statistics.median(sizes[-quarter:]) / statistics.median(sizes[quarter : 2 * quarter]), 3
        ),
    }


def kill_and_go_on(task: dict[str, Any], kills: int, seconds: float) -> str:
    """Kill it at random moments, go on, and compare what came of it with what was not killed."""
    whole = Path(task['output'])
    killed = {**task, 'output': f'{task["output"]} killed'}
    draw = random.Random(1)
    for _ in range(kills):
        process = start(killed)
        time.sleep(draw.uniform(0.2, 0.8) * seconds)
        process.kill()
        process.wait()
    if start(killed).wait():
        raise SystemExit('it did not go on')
    names = sorted(path.name for path in whole.glob('part-*'))
    other = Path(killed['output'])
    same = [n for n in names if (whole / n).read_bytes() == (other / n).read_bytes()]
    return f'{len(same)} of {len(names)} files are the same after {kills} kills'


def check_vectors(task: dict[str, Any], by_hand_output: Path | None) -> str:
    """Compare the first shard with `finetuner.encode`, and all with those by hand."""
    from docarray import Document, DocumentArray

    import finetuner
    from finetuner.bulk import open_encoded
    from finetuner.inference import load_engine

    ids, found = open_encoded(task['output']).shard(0)
    first = sorted(Path(task['input']).glob('*.parquet'))[0]
    table = parquet.read_table(first)
    name = 'text' if task['kind'] == 'texts' else 'image'
    field = 'text' if name == 'text' else 'blob'
    docs = DocumentArray(Document(**{field: value}) for value in table[name].to_pylist())
    model = load_engine(
        task['artifact'], device='cpu', engine='onnx', precision='fp32', num_threads=1
    )
    expected = finetuner.encode(model, docs, BATCH_SIZE).embeddings
    said = (
        f'shard 0: {"the same bits" if np.array_equal(found, expected) else "OTHER BITS"} as encode'
    )
    if by_hand_output is not None and by_hand_output.exists():
        table = parquet.read_table(by_hand_output)
        place = {one: row for row, one in enumerate(table['id'].to_pylist())}
        chosen = [place[one] for one in ids]
        theirs = np.stack(table['embedding'].take(chosen).to_pylist())
        said += f'; by hand differs by {np.abs(theirs - found).max():.1e} at most'
    return said


# ---- the table


def report(results: Sequence[dict[str, Any]]) -> None:
    """Print all parts, with the ratio to one worker and to that by hand of as many."""
    rate = {(r['kind'], r['rows'], r['contestant'], r['workers']): r for r in results}
    head = f'{"rows":>16} {"workers":>7} {"who":<18} {"rows/s":>8} {"to 1":>6} {"to hand":>7}'
    print(f'{head} {"peak MB":>8} {"growth":>6}')
    for (kind, rows, who, workers), part in sorted(rate.items()):

        def ratio(other: tuple[Any, ...], part: dict[str, Any] = part) -> str:
            found = rate.get(other)
            if found is None:
                return '-'
            return f'{part["rows_per_second"] / found["rows_per_second"]:.2f}'

        print(
            f'{rows:>7,} {kind:<8} {workers:>7} {who:<18} {part["rows_per_second"]:>8.1f} '
            f'{ratio((kind, rows, who, 1)):>6} {ratio((kind, rows, "ray by hand", workers)):>7} '
            f'{part["peak_mb"]:>8.0f} {part["growth"]:>6.2f}'
        )


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--texts', type=int, default=5_000)
    parser.add_argument('--pictures', type=int, default=500)
    parser.add_argument('--workers', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--only', choices=list(MODELS), help='texts or pictures; else both')
    parser.add_argument('--contestants', nargs='+', choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument('--kills', type=int, default=0, help='of ours, with the most workers')
    parser.add_argument('--folder', type=Path, help='kept; else a temporary one')
    parser.add_argument('--report', action='store_true', help='print what was measured there')
    parser.add_argument('--task', help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        do(json.loads(given.task))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        file = folder / 'results.json'
        if not given.report:
            for kind in [given.only] if given.only else MODELS:
                run_parts(given, folder, file, kind)
        report(json.loads(file.read_text()))


def run_parts(given: argparse.Namespace, folder: Path, file: Path, kind: str) -> None:
    """Run the parts of one kind, and add what they took to the file."""
    number = getattr(given, kind)
    rows = min(ROWS[kind], max(1, number // 10))
    inputs = folder / f'{number} {kind}'
    write_inputs(inputs, kind, number, rows)
    write_artifact(folder / f'{kind} model', kind)
    task: dict[str, Any] = {}
    for workers in given.workers:
        for contestant in given.contestants:
            output = folder / f'{kind} {number} {contestant} {workers}'
            subprocess.run(['rm', '-rf', str(output), f'{output} killed'], check=True)
            each = {'kind': kind, 'contestant': contestant, 'workers': workers, 'rows': rows}
            each |= {'input': str(inputs), 'output': str(output)}
            each |= {'artifact': str(folder / f'{kind} model')}
            part = measure(each, number)
            if contestant == 'finetuner':
                task, seconds = each, part['seconds']
            measured = json.loads(file.read_text()) if file.exists() else []
            file.write_text(json.dumps([*measured, part], indent=1))
            print(part, flush=True)
    if task:
        hand = folder / f'{kind} {number} ray by hand {task["workers"]}'
        print(check_vectors(task, hand), flush=True)
        if given.kills:
            print(kill_and_go_on(task, given.kills, seconds), flush=True)


if __name__ == '__main__':
    main()
