"""Compare our loader and its memory with a plain torch DataLoader over a DocumentArray.

Throughput: emoji pictures at 96 px, and JPEG files as large as photographs at 224 px, opened anew in
each epoch. The peer is what a tutorial leads to: a Dataset that keeps a DocumentArray, opens each
picture with Pillow and resizes it. Ours is the real path of a run: dataset, sampler, loader. Both
yield batches of uint8 tensors.

Memory: the same number of Documents, each with a `uri` and a label, in a `.docs` file, in docarray's
SQLite storage, and in a DocumentArray in memory for the peer. Each count runs in a fresh process:
open, build the dataset, the sampler and a loader, load some batches. "main" is the resident set of the
process, "private" what its loader processes have for themselves alone (USS), "all" what the three take
together, each page that they share counted once (the sum of their PSS). Only ratios and bytes a
Document travel between machines. A full garbage collection in a loader process copies the heap it
shares, some 45 MB whatever the count, so that "private" and "all" jump where one happens in one run and
not in the other: bytes a Document are those of "main" unless both runs had the same collections.

    python benchmarks/data.py
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from decode import generate_photo
from docarray import Document, DocumentArray
from PIL import Image
from rounds import Contestant, print_head, print_speeds, take_turns
from torch.utils.data import DataLoader, Dataset

from finetuner.data.documents import save_documents
from finetuner.data.loading import build_dataset, build_loader
from finetuner.data.samplers import ClassSampler
from finetuner.data.stored.files import SQLiteDocuments, StoredDocuments
from finetuner.images import picture_of

EMOJI = Path(__file__).parents[1] / 'examples' / 'emoji' / 'train'
SIZE = 96
PHOTO_SIZE = 224
BATCH_SIZE = 64
ITEMS_PER_CLASS = 4
PEER = 'plain DataLoader'
OURS = 'finetuner'
STORED = 'finetuner, .docs file'
SQLITE = 'finetuner, SQLite'
TABLE = 'train'
KIND_WIDTH = 30


def documents(num_docs: int, folder: Path = EMOJI) -> Iterator[Document]:
    """So many Documents, each with the uri of a picture and its class; few files come often."""
    files = sorted(folder.glob('*/*'))
    for number, file in zip(range(num_docs), itertools.cycle(files), strict=False):
        yield Document(
            id=f'{number:032x}', uri=str(file), tags={'finetuner_label': file.parent.name}
        )


def write_photos(folder: Path) -> None:
    """Write JPEG files of 640 x 480, four of each of so many classes that they fill a batch."""
    for number in range(BATCH_SIZE):
        photo = folder / str(number // ITEMS_PER_CLASS) / f'{number}.jpg'
        photo.parent.mkdir(exist_ok=True)
        photo.write_bytes(generate_photo(640, 480, number))


class PlainDataset(Dataset):
    """What a tutorial would write."""

    def __init__(self, docs: DocumentArray, size: int) -> None:
        """Keep the Documents, and number their labels."""
        self.docs = docs
        self.size = size
        labels = [doc.tags['finetuner_label'] for doc in docs]
        numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
        self.labels = [numbers[label] for label in labels]

    def __len__(self) -> int:
        """How many Documents there are."""
        return len(self.docs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Open and resize a picture."""
        picture = Image.open(self.docs[index].uri).convert('RGB')
        resized = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)), self.labels[index]


def plain_loader(dataset: PlainDataset, num_workers: int) -> DataLoader:
    """Shuffled batches, the workers kept between epochs."""
    return DataLoader(
        dataset,
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def an_epoch_of(loader: Any) -> Contestant:
    """Load all batches once."""
    return lambda: sum(len(labels) for _, labels in loader)


def compare_speed(
    title: str, docs: DocumentArray, size: int, num_rounds: int, num_workers: int
) -> None:
    """Print the throughput of both, without loader processes and with them."""
    dataset = build_dataset(docs, functools.partial(picture_of, size=size))
    sampler = ClassSampler(dataset.labels, BATCH_SIZE, ITEMS_PER_CLASS)
    for count in sorted({0, num_workers}):
        loader = build_loader(dataset, sampler, num_workers=count)
        contestants = {
            PEER: an_epoch_of(plain_loader(PlainDataset(docs, size), count)),
            OURS: an_epoch_of(loader),
        }
        speeds = take_turns(contestants, num_rounds)
        loader.close()
        print_head(f'{title} at {size} px, {count} loader processes', PEER)
        print_speeds(speeds, PEER)


def write_files(folder: Path, num_docs: int) -> None:
    """Write so many Documents to a `.docs` file and to a table as docarray makes it."""
    save_documents(documents(num_docs), folder / f'{num_docs}.docs')
    path = str(folder / f'{num_docs}.db')
    config = {
        'connection': path,
        'table_name': TABLE,
        'serialize_config': {'protocol': 'protobuf'},
    }
    # The table is docarray's own, its rows are not: it counts all rows again for each it adds.
    DocumentArray(storage='sqlite', config=config)._connection.close()
    with sqlite3.connect(path) as connection:
        connection.executemany(
            f'INSERT INTO {TABLE} (doc_id, serialized_value, item_order) VALUES (?, ?, ?)',
            (
                (doc.id, doc.to_bytes(protocol='protobuf'), number)
                for number, doc in enumerate(documents(num_docs))
            ),
        )
    connection.close()


def measure(name: str, folder: Path, num_docs: int, num_batches: int, num_workers: int) -> dict:
    """Open, build and load in this process, which must be fresh.

    Returns:
        Seconds by step, and megabytes of memory at the end.
    """
    seconds: dict[str, float] = {}
    docs = _timed(seconds, 'open', functools.partial(_open, name, folder, num_docs))
    if name == PEER:
        plain = _timed(seconds, 'dataset', functools.partial(PlainDataset, docs, SIZE))
        loader: Any = plain_loader(plain, num_workers)
        _timed(seconds, 'sampler', lambda: list(iter(loader.batch_sampler))[-1:])
    else:
        preprocess_fn = functools.partial(picture_of, size=SIZE)
        dataset = _timed(seconds, 'dataset', lambda: build_dataset(docs, preprocess_fn))

        def draw_an_epoch() -> ClassSampler:
            sampler = ClassSampler(dataset.labels, BATCH_SIZE, ITEMS_PER_CLASS)
            for _ in sampler:
                pass
            return sampler

        sampler = _timed(seconds, 'sampler', draw_an_epoch)
        loader = build_loader(dataset, sampler, num_workers=num_workers)
    batches = iter(loader)
    for _ in range(num_batches):
        next(batches)
    return {'seconds': seconds, **_memory()}


def _open(name: str, folder: Path, num_docs: int) -> Any:
    if name == SQLITE:
        return SQLiteDocuments(folder / f'{num_docs}.db', TABLE)
    path = folder / f'{num_docs}.docs'
    if name == PEER:
        return DocumentArray.load_binary(path, protocol='protobuf')
    return StoredDocuments(path)


def _timed(seconds: dict[str, float], name: str, step: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    made = step()
    seconds[name] = time.perf_counter() - start
    return made


def _memory() -> dict[str, float]:
    main = psutil.Process().memory_full_info()
    workers = [
        psutil.Process(child.pid).memory_full_info() for child in multiprocessing.active_children()
    ]
    # of this program alone: what `resource` tells also counts the process that started it
    peak = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())
    return {
        'main': main.rss / 1e6,
        'peak': int(peak[1]) * 1024 / 1e6,
        'private': sum(info.uss for info in workers) / 1e6,
        'all': sum(info.pss for info in (main, *workers)) / 1e6,
    }


def in_fresh_process(*arguments: object) -> dict:
    """Run `measure` in a new interpreter."""
    done = subprocess.run(
        [sys.executable, __file__, '--measure', *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare_memory(
    few: int, many: int, many_of_peer: int, num_batches: int, num_workers: int, num_rounds: int
) -> None:
    """Print what each keeps in memory at a small and a large number of Documents."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for num_docs in sorted({few, many, many_of_peer}):
            write_files(folder, num_docs)
        title = f'{num_batches} batches of {BATCH_SIZE}, {num_workers} loader processes'
        print(f'\n{title:<41} {"MB:":>8}{"":>27}{"seconds:":>10}')
        print(
            f'{"":<{KIND_WIDTH}} {"Documents":>10} {"main":>8} {"peak":>8} {"private":>8} '
            f'{"all":>8} {"open":>9} {"dataset":>9} {"sampler":>9}'
        )
        growth = {}
        for kind, most in ((STORED, many), (SQLITE, many), (PEER, many_of_peer)):
            few_take, many_take = (
                _print_memory(kind, num_docs, num_batches, num_workers, folder, num_rounds)
                for num_docs in (few, most)
            )
            growth[kind] = [
                (b - a) * 1e6 / (most - few) for a, b in zip(few_take, many_take, strict=True)
            ]
    print(f'\n{"bytes a Document":<41} {"main":>8} {"all":>8} {f"main to {PEER}":>24}')
    for kind, (main, whole) in growth.items():
        print(f'{kind:<41} {main:>8,.1f} {whole:>8,.1f} {main / growth[PEER][0]:>24.3f}')


def _print_memory(
    kind: str, num_docs: int, num_batches: int, num_workers: int, folder: Path, num_rounds: int
) -> tuple[float, float]:
    runs = [
        in_fresh_process(kind, folder, num_docs, num_batches, num_workers)
        for _ in range(num_rounds)
    ]
    columns = [
        statistics.median(run[key] for run in runs) for key in ('main', 'peak', 'private', 'all')
    ]
    steps = [
        statistics.median(run['seconds'][step] for run in runs)
        for step in ('open', 'dataset', 'sampler')
    ]
    print(
        f'{kind:<{KIND_WIDTH}} {num_docs:>10,} '
        + ' '.join(f'{megabytes:>8,.1f}' for megabytes in columns)
        + ''.join(f' {took:>9.2f}' for took in steps),
        flush=True,
    )
    return columns[0], columns[3]


def main() -> None:
    """Compare both, or take one measurement for the process that asked for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--num-workers', type=int, default=2, help='loader processes')
    parser.add_argument('--rounds', type=int, default=5, help='of the comparison of speed')
    parser.add_argument('--memory-rounds', type=int, default=3, help='fresh processes a line')
    parser.add_argument('--quick', action='store_true', help='small counts, to see that it runs')
    parser.add_argument('--measure', nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, folder, *counts = arguments.measure
        print(json.dumps(measure(name, Path(folder), *map(int, counts))))
        return
    torch.manual_seed(0)
    num_rounds, memory_rounds = arguments.rounds, arguments.memory_rounds
    num_pictures, num_photos = 4_000, 512
    counts = (10_000, 1_000_000, 100_000, 50)
    if arguments.quick:
        num_rounds = memory_rounds = 1
        num_pictures = num_photos = 128
        counts = (500, 2_000, 1_000, 2)
    print(
        f'batches of {BATCH_SIZE}, {torch.get_num_threads()} threads; medians of {num_rounds} '
        f'alternating rounds, and of {memory_rounds} fresh processes'
    )
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name))
        for title, docs, size in (
            ('emoji WebP', DocumentArray(documents(num_pictures)), SIZE),
            ('JPEG 640 x 480', DocumentArray(documents(num_photos, Path(name))), PHOTO_SIZE),
        ):
            compare_speed(title, docs, size, num_rounds, arguments.num_workers)
    compare_memory(*counts, arguments.num_workers, memory_rounds)


if __name__ == '__main__':
    main()
