"""Find how many threads a batch takes best, and of how many Documents it is.

EfficientNet-Lite0 and all-MiniLM-L6-v2 in ONNX Runtime behind the batcher of the encoding service.
Each way is asked with two requests of 64 Documents at once, with Documents one after the other, and
with 64 requests of one Document at once; the first row is how ONNX Runtime comes. Last, what a batch of
texts costs beside its tokens, which is what `finetuner.inputs.divide_by_length` weighs.

    python benchmarks/capacity.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
from decode import generate_photo
from docarray import Document, DocumentArray

from finetuner.encoding.batcher import Batcher, BatcherConfig
from finetuner.inference import build_engine

WAYS = ((None, 1, 32), (1, None, 32), (1, None, 8), (1, None, 4), (1, None, 1))
KINDS = {
    'pictures, 224 px': ('efficientnet-lite0', {'input_size': 224}),
    'pictures, 96 px': ('efficientnet-lite0', {'input_size': 96}),
    'texts': ('all-MiniLM-L6-v2', {}),
}
WORDS = [
    'a',
    'red',
    'shoe',
    'and',
    'the',
    'small',
    'blue',
    'hat',
    'of',
    'a',
    'dog',
    'with',
    'its',
    'coat',
    'left',
    'beside',
    'large',
    'green',
    'cats',
]
NUM_ALONE = 16
# texts in a batch, and tokens of each
SHAPES = (
    (1, 6), (1, 16), (1, 64), (1, 200), (4, 8), (4, 32), (8, 8), (8, 16), (8, 32), (8, 64), (16, 8),
    (16, 16), (16, 32), (32, 8), (32, 16), (64, 8), (2, 256),
)  # fmt: skip


def make_documents(kind: str) -> list[DocumentArray]:
    """Two requests of 64 Documents; lengths of texts are spread as those of sentences are."""
    if kind != 'texts':
        blobs = [generate_photo(640, 480, seed) for seed in range(64)]
        return [DocumentArray([Document(blob=blob) for blob in blobs]) for _ in range(2)]
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(2.8, 0.8, 128).clip(2, 200).astype(int)
    texts = [Document(text=' '.join(rng.choice(WORDS, length))) for length in lengths]
    return [DocumentArray(texts[:64]), DocumentArray(texts[64:])]


def main() -> None:
    """Take turns and print a table a kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    rounds = parser.parse_args().rounds
    cores = len(os.sched_getaffinity(0))
    print(f'{cores} cores, median of {rounds} alternating rounds')
    for kind, (model, options) in KINDS.items():
        requests = make_documents(kind)
        found: dict[tuple[int | None, int, int], list[tuple[float, float, float]]] = {}
        engines = {}
        for num_threads, num_batches, size in WAYS:
            way = (num_threads, num_batches or cores, size)
            engine = build_engine(
                model, options, is_onnx=True, num_threads=num_threads, batch_size=size
            )
            engines[way] = engine, Batcher(BatcherConfig(num_embedders=way[1]))
            found[way] = []
        for _ in range(rounds):
            for way, (engine, batcher) in engines.items():
                found[way].append(measure(engine, batcher, requests))
        for _, batcher in engines.values():
            batcher.close()
        print_table(kind, found)
    print_cost_of_a_batch(rounds)


def print_cost_of_a_batch(rounds: int) -> None:
    """Fit milliseconds to tokens, with the least squares of relative errors."""
    engine = build_engine(*KINDS['texts'], is_onnx=True, num_threads=1)
    took: dict[tuple[int, int], list[float]] = {shape: [] for shape in SHAPES}
    for number in range(rounds + 1):
        for shape, seconds in took.items():
            inputs = {
                'input_ids': np.full(shape, 1000, np.int64),
                'attention_mask': np.ones(shape, np.int64),
            }
            started = time.perf_counter()
            engine.embed(inputs)
            if number:  # the first lays out memory
                seconds.append(time.perf_counter() - started)
    medians = np.array([statistics.median(seconds) for seconds in took.values()])
    tokens = np.array([texts * length for texts, length in took])
    columns = np.stack([np.ones(len(tokens)), tokens], axis=1)
    (alone, each), *_ = np.linalg.lstsq(
        columns / medians[:, None], np.ones(len(tokens)), rcond=None
    )
    print(
        f'\na batch of texts takes {alone * 1000:.2f} ms, and {each * 1000:.3f} ms a padded token: '
        f'by itself it costs as much as {alone / each:.0f} tokens'
    )


def measure(engine, batcher: Batcher, requests: list[DocumentArray]) -> tuple[float, float, float]:
    """Documents a second of large requests, milliseconds of one alone, Documents a second of many."""

    def together(parts: list[DocumentArray]) -> float:
        started = time.perf_counter()
        for future in [batcher.submit(part, engine, 'model') for part in parts]:
            future.result()
        return sum(map(len, parts)) / (time.perf_counter() - started)

    large = together(requests)
    started = time.perf_counter()
    for number in range(NUM_ALONE):
        batcher.submit(requests[0][number : number + 1], engine, 'model').result()
    alone = 1000 * (time.perf_counter() - started) / NUM_ALONE
    return large, alone, together([requests[0][number : number + 1] for number in range(64)])


def print_table(kind: str, found: dict) -> None:
    """Speeds, and their ratio to the first way."""
    print(f'\n{kind}\n')
    print('| threads of a batch | batches at once | batch size | requests of 64 | to first | ms alone '
          '| 64 requests of 1 | to first |')  # fmt: skip
    print('|---|---|---|---|---|---|---|---|')
    medians = {way: [statistics.median(each) for each in zip(*runs, strict=True)]
               for way, runs in found.items()}  # fmt: skip
    first = next(iter(medians.values()))
    for (threads, batches, size), (large, alone, many) in medians.items():
        print(
            f'| {threads or "all"} | {batches} | {size} | {large:.0f}/s | {large / first[0]:.2f} '
            f'| {alone:.1f} | {many:.0f}/s | {many / first[2]:.2f} |'
        )


if __name__ == '__main__':
    main()
