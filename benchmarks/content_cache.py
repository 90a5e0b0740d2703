"""Time the second epoch of loading: pictures decoded anew, and pictures kept from the first.

python benchmarks/content_cache.py
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

from data import (
    BATCH_SIZE,
    EMOJI,
    ITEMS_PER_CLASS,
    PHOTO_SIZE,
    SIZE,
    an_epoch_of,
    documents,
    write_photos,
)
from docarray import DocumentArray
from rounds import print_head, print_speeds, take_turns

from finetuner.data.content_cache import FreshContents, KeptContents
from finetuner.data.loading import build_dataset, build_loader
from finetuner.data.samplers import ClassSampler
from finetuner.images import picture_of

PEER = 'decoded in each epoch'
OURS = 'kept in memory'


def compare(title: str, docs: DocumentArray, size: int, num_rounds: int, num_workers: int) -> None:
    """Print the throughput of both; the round for practice is the first epoch."""
    dataset = build_dataset(docs)
    sampler = ClassSampler(dataset.labels, BATCH_SIZE, ITEMS_PER_CLASS)
    read = functools.partial(picture_of, size=size)
    for count in sorted({0, num_workers}):
        loaders = {
            name: build_loader(contents.prepared(dataset, read), sampler, num_workers=count)
            for name, contents in ((PEER, FreshContents()), (OURS, KeptContents()))
        }
        contestants = {name: an_epoch_of(loader) for name, loader in loaders.items()}
        speeds = take_turns(contestants, num_rounds)
        for loader in loaders.values():
            loader.close()
        print_head(f'{title} at {size} px, {count} loader processes', PEER[:10])
        print_speeds(speeds, PEER)


def main() -> None:
    """Load in turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--num-workers', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        for title, source, size in (
            ('emoji WebP', EMOJI, SIZE),
            ('JPEG 640 x 480', Path(folder), PHOTO_SIZE),
        ):
            docs = DocumentArray(documents(8 * BATCH_SIZE, source))
            compare(title, docs, size, arguments.rounds, arguments.num_workers)


if __name__ == '__main__':
    main()
