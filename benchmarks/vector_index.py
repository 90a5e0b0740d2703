"""Time the vector index beside FAISS's flat index and HNSW, and docarray's match, in one run.

python benchmarks/vector_index.py                  # 10,000 and 100,000 vectors of 384 dimensions
python benchmarks/vector_index.py --sizes 10000    # some minutes less
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import faiss
import numpy as np
import psutil
from docarray import Document, DocumentArray
from rounds import NAME_WIDTH, ratio, take_turns

from finetuner.vector_index import Item, VectorIndex

DIMENSION = 384
LIMIT = 10
ADDED_AT_ONCE = 100
NUM_QUERIES = 100
# vectors as embeddings are: most of their spread is in few dimensions
TRUE_DIMENSIONS = 32
NOISE = 0.5
NAMES = ('VectorIndex, exact', 'VectorIndex, graph', 'FAISS flat', 'FAISS HNSW', 'docarray match')
PEER = 'FAISS flat'


def make_vectors(count: int, seed: int) -> np.ndarray:
    """Vectors of length 1, `[count, DIMENSION]` float32."""
    basis = np.random.default_rng(0).normal(size=(TRUE_DIMENSIONS, DIMENSION))
    random = np.random.default_rng(seed)
    values = random.normal(size=(count, TRUE_DIMENSIONS)) @ basis
    values += NOISE * random.normal(size=values.shape)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def build(name: str, vectors: np.ndarray, folder: str) -> tuple[Callable, float]:
    """Fill one of them; give its search and the seconds until it had answered all adds."""
    start = time.perf_counter()
    if name.startswith('VectorIndex'):
        above = len(vectors) if name.endswith('exact') else 1000
        index = VectorIndex(folder, approximate_above=above)
        for first in range(0, len(vectors), ADDED_AT_ONCE):
            some = vectors[first : first + ADDED_AT_ONCE]
            index.add([Item(str(first + i)) for i in range(len(some))], some)
        seconds = time.perf_counter() - start
        index.settle()

        def search(queries: np.ndarray) -> list[list[int]]:
            found = index.search(queries, LIMIT)
            return [[int(hit.item.id) for hit in hits] for hits in found]

    elif name.startswith('FAISS'):
        flat, graph = faiss.IndexFlatIP(DIMENSION), None
        if name.endswith('HNSW'):
            flat = graph = faiss.IndexHNSWFlat(DIMENSION, 32, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction, graph.hnsw.efSearch = 128, 128
        for first in range(0, len(vectors), ADDED_AT_ONCE):
            flat.add(vectors[first : first + ADDED_AT_ONCE])
        seconds = time.perf_counter() - start

        def search(queries: np.ndarray) -> list[list[int]]:
            return flat.search(queries, LIMIT)[1].tolist()

    else:
        docs = DocumentArray(
            Document(id=str(i), embedding=vector) for i, vector in enumerate(vectors)
        )
        seconds = time.perf_counter() - start

        def search(queries: np.ndarray) -> list[list[int]]:
            asked = DocumentArray(Document(embedding=query) for query in queries)
            asked.match(docs, metric='cosine', limit=LIMIT)
            return [[int(match.id) for match in doc.matches] for doc in asked]

    return search, seconds


def measure_memory(name: str, size: int) -> None:
    """Print the megabytes that one of them takes when it is filled, in this process alone."""
    vectors = make_vectors(size, 1)
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        before = process.memory_info().rss
        search, seconds = build(name, vectors, folder)
        search(make_vectors(1, 2))
        print((process.memory_info().rss - before) / 2**20, size / seconds)


def compare(size: int, num_rounds: int) -> None:
    """Print the table of one size."""
    vectors, queries = make_vectors(size, 1), make_vectors(NUM_QUERIES, 2)
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :LIMIT].tolist()
    searches, adds, memory, recall = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            command = [sys.executable, __file__, '--memory', name, '--sizes', str(size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            memory[name], adds[name] = map(float, done.stdout.split())
            searches[name], _ = build(name, vectors, f'{folder}/{name}')
            pairs = zip(searches[name](queries), true, strict=True)
            recall[name] = np.mean([len(set(own) & set(wanted)) / LIMIT for own, wanted in pairs])

    def one_by_one(name: str) -> Callable[[], int]:
        def run() -> int:
            few = queries[:10] if name == 'docarray match' else queries
            for query in few:
                searches[name](query[None])
            return len(few)

        return run

    def together(name: str) -> Callable[[], int]:
        def run() -> int:
            searches[name](queries)
            return len(queries)

        return run

    single = take_turns({name: one_by_one(name) for name in NAMES}, num_rounds)
    batch = take_turns({name: together(name) for name in NAMES}, num_rounds)
    print(f'\n{size:,} vectors of {DIMENSION} dimensions; ratios to {PEER}')
    captions = ('adds/s', 'one/s', 'ratio', f'{NUM_QUERIES}/s', 'ratio', 'MB', 'recall')
    print(f'{"":<{NAME_WIDTH}}' + ''.join(f'{caption:>10}' for caption in captions))
    for name in NAMES:
        figures = (
            f'{adds[name]:,.0f}',
            f'{np.median(single[name]):,.0f}',
            f'{ratio(single[name], single[PEER]):.2f}',
            f'{np.median(batch[name]):,.0f}',
            f'{ratio(batch[name], batch[PEER]):.2f}',
            f'{memory[name]:,.0f}',
            f'{recall[name]:.3f}',
        )
        print(f'{name:<{NAME_WIDTH}}' + ''.join(f'{each:>10}' for each in figures), flush=True)


def main() -> None:
    """Compare at each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', type=int, nargs='+', default=[10_000, 100_000])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--memory', choices=NAMES, help='measure one, in this process')
    arguments = parser.parse_args()
    for size in arguments.sizes:
        if arguments.memory:
            measure_memory(arguments.memory, size)
        else:
            compare(size, arguments.rounds)


if __name__ == '__main__':
    main()
