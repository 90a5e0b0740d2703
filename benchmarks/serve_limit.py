"""The limit of a machine: ONNX Runtime with reading overlapped, by hand, without a server.

It knows everything beforehand: no checks, no Documents, full batches always. Of the ways that two
kinds of threads can share the cores, the fastest on this machine is taken. It talks as
`serve_clients.py` does, a batch being a request.

    python benchmarks/serve_limit.py FOLDER   # as serve.py fills it: pictures or texts, a graph

With `--script` it is what a good script does without such a search: ONNX Runtime as it comes, batches
of 32, reading overlapped.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from serve_clients import Seen

# larger batches leave the caches of a core (benchmarks/capacity.py)
BATCH_SIZE = 8
SCRIPT_BATCH_SIZE = 32
NUM_TOKENS_A_DOCUMENT = 64
NUM_TEXTS_AT_ONCE = 128
MAX_LENGTH = 256
_TRIAL_SECONDS = 1.2
# a batch for the graph, and the positions of its items
Batch = tuple[dict[str, np.ndarray], Sequence[int]]
Prepare = Callable[[Sequence[int]], list[Batch]]
# runs until a moment; tells the size of each batch that is through
Way = Callable[[float, Callable[[int], None]], None]


def prepare_pictures(pictures: list[bytes], size: int) -> Prepare:
    """Decode at the least scale that will do, resize and stack."""
    import cv2
    import simplejpeg

    def load(data: bytes) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(data, 'RGB', min_height=size, min_width=size)
        return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)

    def prepare(positions: Sequence[int]) -> list[Batch]:
        return [({'pictures': np.stack([load(pictures[i]) for i in positions])}, positions)]

    return prepare


def prepare_as_peers(pictures: list[bytes], size: int) -> Prepare:
    """Open and resize as tutorials do, for what their vectors are compared with."""
    from PIL import Image

    def load(data: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert('RGB')
        return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))

    def prepare(positions: Sequence[int]) -> list[Batch]:
        return [({'pictures': np.stack([load(pictures[i]) for i in positions])}, positions)]

    return prepare


def prepare_texts(texts: list[str], tokenizer_file: Path, num_tokens: int) -> Prepare:
    """Tokenise many, sort by length, and cut where that costs least."""
    from tokenizers import Tokenizer

    from finetuner.inputs import divide_by_length

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)

    def prepare(positions: Sequence[int]) -> list[Batch]:
        tokens = [found.ids for found in tokenizer.encode_batch_fast([texts[i] for i in positions])]
        batches = []
        for chosen in divide_by_length([len(each) for each in tokens], num_tokens):
            ids = np.zeros((len(chosen), len(tokens[chosen[0]])), np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(tokens[i])] = tokens[i]
                mask[row, : len(tokens[i])] = 1
            inputs = {'input_ids': ids, 'attention_mask': mask}
            batches.append((inputs, [positions[i] for i in chosen]))
        # whoever stops in their middle should not have had the long ones only
        random.Random(0).shuffle(batches)
        return batches

    return prepare


def open_session(graph: Path, num_threads: int, spins: bool) -> onnxruntime.InferenceSession:
    """A session that all ways can share the memory of."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry('session.intra_op.allow_spinning', '1' if spins else '0')
    return onnxruntime.InferenceSession(str(graph), options, providers=['CPUExecutionProvider'])


def one_after_another(num_items: int, lot: int) -> Iterator[list[int]]:
    """Positions without end, so many at a time."""
    for start in itertools.count(0, lot):
        yield [i % num_items for i in range(start, start + lot)]


def read_ahead(session: Any, prepare: Prepare, num_items: int, lot: int, num_readers: int) -> Way:
    """Some threads read, this one runs the graph, whose operators take all cores."""

    def run(until: float, done: Callable[[int], None]) -> None:
        lots = one_after_another(num_items, lot)
        with ThreadPoolExecutor(num_readers) as pool:
            ready: queue.Queue[Any] = queue.Queue()
            for _ in range(num_readers + 1):
                ready.put(pool.submit(prepare, next(lots)))
            while time.monotonic() < until:
                batches = ready.get().result()
                ready.put(pool.submit(prepare, next(lots)))
                for inputs, positions in batches:
                    if time.monotonic() < until:
                        session.run(None, inputs)
                        done(len(positions))

    return run


def side_by_side(session: Any, prepare: Prepare, num_items: int, lot: int, num_threads: int) -> Way:
    """Each thread reads and runs its own batches, on one core."""

    def run(until: float, done: Callable[[int], None]) -> None:
        lots = one_after_another(num_items, lot)
        lock = threading.Lock()

        def work() -> None:
            while time.monotonic() < until:
                with lock:
                    mine = next(lots)
                for inputs, positions in prepare(mine):
                    if time.monotonic() < until:
                        session.run(None, inputs)
                        done(len(positions))

        with ThreadPoolExecutor(num_threads) as pool:
            for future in [pool.submit(work) for _ in range(num_threads)]:
                future.result()

    return run


def all_ways(folder: Path, is_script: bool) -> dict[str, Way]:
    """By name; and what the others' vectors are compared with is written."""
    size = SCRIPT_BATCH_SIZE if is_script else BATCH_SIZE
    graph = folder / 'model.onnx'
    cores = len(os.sched_getaffinity(0))
    if (folder / 'texts.json').exists():
        texts = json.loads((folder / 'texts.json').read_text())
        num_items = len(texts)
        prepare = prepare_texts(texts, folder / 'tokenizer.json', size * NUM_TOKENS_A_DOCUMENT)
        lot = min(NUM_TEXTS_AT_ONCE, num_items)
    else:
        task = json.loads((folder / 'pictures.json').read_text())
        pictures = [file.read_bytes() for file in sorted((folder / 'pictures').iterdir())]
        prepare, num_items = prepare_pictures(pictures, task['size']), len(pictures)
        lot = size
        peers = prepare_as_peers(pictures, task['size'])
        if not is_script:
            write_vectors(graph, peers, num_items, folder / 'pillow.npy')
    work = (prepare, num_items, lot)
    if is_script:
        return {'a script': read_ahead(open_session(graph, 0, True), *work, cores)}
    write_vectors(graph, prepare, num_items, folder / 'limit.npy')
    return {
        'read ahead, threads that spin': read_ahead(open_session(graph, cores, True), *work, cores),
        'read ahead': read_ahead(open_session(graph, cores, False), *work, cores),
        'a thread a core': side_by_side(open_session(graph, 1, False), *work, cores),
    }


def speed(way: Way, seconds: float) -> float:
    """Items a second."""
    sizes: list[int] = []
    begin = time.monotonic()
    way(begin + seconds, sizes.append)
    return sum(sizes) / (time.monotonic() - begin)


def write_vectors(graph: Path, prepare: Prepare, num_items: int, path: Path) -> None:
    """Embed all once."""
    session = open_session(graph, len(os.sched_getaffinity(0)), False)
    found: dict[int, np.ndarray] = {}
    for start in range(0, num_items, BATCH_SIZE):
        for inputs, positions in prepare(range(start, min(start + BATCH_SIZE, num_items))):
            found.update(zip(positions, session.run(None, inputs)[0], strict=True))
    np.save(path, np.stack([found[i] for i in range(num_items)]))


def main() -> None:
    """Choose a way, then run it whenever told to."""
    folder = Path(sys.argv[1])
    ways = all_ways(folder, '--script' in sys.argv[2:])
    for way in ways.values():
        speed(way, _TRIAL_SECONDS / 3)
    speeds = {name: speed(way, _TRIAL_SECONDS) for name, way in ways.items()}
    chosen = max(speeds, key=lambda name: speeds[name])
    way = ways[chosen]
    ways.clear()
    print(json.dumps({'way': chosen, 'speeds': speeds}), flush=True)
    for line in sys.stdin:
        begin, end = map(float, line.split())
        requests: list[tuple[float, float]] = []
        print(json.dumps(asdict(_timed(way, begin, end, requests))), flush=True)


def _timed(way: Way, begin: float, end: float, requests: list[tuple[float, float]]) -> Seen:
    """Batches as requests; one takes from the last batch's end to its own."""
    last = [time.monotonic()]
    lock = threading.Lock()

    def note(size: int) -> None:
        with lock:
            now = time.monotonic()
            # in shares of an item, so that batches of texts may differ in size
            seconds = (now - last[0]) / size
            requests.extend((last[0] + i * seconds, seconds) for i in range(size))
            last[0] = now

    time.sleep(max(0.0, begin - time.monotonic()))
    last[0] = time.monotonic()
    before = time.process_time()
    way(end, note)
    return Seen(requests, time.process_time() - before)


if __name__ == '__main__':
    main()
