"""Time epochs read from the cache of a collection, beside h5py and .npy files used by hand, in one run.

python benchmarks/collection_cache.py               # 20,000 pairs of 256 x 256, some minutes to write
python benchmarks/collection_cache.py --pairs 500   # all of it in memory of the file system: seconds
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
from rounds import peak_resident_mb, print_head, print_speeds, take_turns

from finetuner.collections.batches import ImageTrainer
from finetuner.collections.cache import PairRow, open_cache, write_cache
from finetuner.collections.labels import build_label_kind

EMOJI = Path(__file__).parents[1] / 'examples' / 'emoji' / 'train'
BATCH_SIZE = 32
BANDS = 3
PEER = 'h5py by hand'
KEY = 'c0ffee'


class Pairs:
    """The collection: images that are made when they are asked for, of two classes."""

    key = KEY
    revision = 1
    dtype = np.dtype(np.uint8)

    def __init__(self, count: int, size: int, images: str) -> None:
        """Note what to make."""
        self.shape = (BANDS, size, size)
        self.kind = build_label_kind('classification', ('even', 'odd'))
        self._count = count
        self._is_noise = images == 'noise'
        self._paths = sorted(EMOJI.glob('*/*.webp'))

    def rows(self) -> Iterator[PairRow]:
        """All pairs."""
        for number in range(self._count):
            yield PairRow(number, 'train', self.kind.encode(label_of(number)))

    def read_image(self, pair_id: int) -> np.ndarray:
        """An image, always the same."""
        random = np.random.default_rng(pair_id)
        if self._is_noise:
            return random.integers(0, 256, self.shape, dtype=np.uint8)
        pixels = cv2.imread(str(self._paths[pair_id % len(self._paths)]))
        pixels = cv2.resize(pixels, self.shape[1:], interpolation=cv2.INTER_CUBIC)
        # no two alike: each moved, and in a light of its own
        pixels = np.roll(pixels, pair_id, 1) * random.uniform(0.7, 1)
        return np.ascontiguousarray(pixels.astype(np.uint8).transpose(2, 0, 1))


def label_of(number: int) -> np.ndarray:
    """Whether a pair's number is even or odd."""
    return np.eye(2, dtype=np.uint8)[number % 2]


def write_by_hand(pairs: Pairs, count: int, path: Path) -> None:
    """One dataset, a chunk an image, compressed as in the cache."""
    with h5py.File(path, 'w') as file:
        images = file.create_dataset(
            'images',
            (count, *pairs.shape),
            np.uint8,
            chunks=(1, *pairs.shape),
            compression='gzip',
            compression_opts=1,
        )
        for number in range(count):
            images[number] = pairs.read_image(number)
        file['labels'] = np.eye(2, dtype=np.uint8)[np.arange(count) % 2]


def by_hand(path: Path) -> Callable[[], int]:
    """A function that reads a shuffled epoch, batch by batch and image by image."""
    random = np.random.default_rng(0)
    file = h5py.File(path)
    images, labels = file['images'], file['labels'][()]

    def epoch() -> int:
        order = random.permutation(len(images))
        for first in range(0, len(order), BATCH_SIZE):
            chosen = order[first : first + BATCH_SIZE]
            x = np.empty((len(chosen), *images.shape[1:]), np.uint8)
            for row, number in enumerate(chosen):
                images.read_direct(x, np.s_[number], np.s_[row])
            keep(x, labels[chosen])
        return len(order)

    return epoch


def of_files(folder: Path, count: int) -> Callable[[], int]:
    """The same, of a .npy file an image."""
    random = np.random.default_rng(0)
    labels = np.eye(2, dtype=np.uint8)[np.arange(count) % 2]

    def epoch() -> int:
        order = random.permutation(count)
        for first in range(0, count, BATCH_SIZE):
            chosen = order[first : first + BATCH_SIZE]
            keep(np.stack([np.load(folder / f'{number}.npy') for number in chosen]), labels[chosen])
        return count

    return epoch


def of_batches(trainer: ImageTrainer, **options: bool) -> Callable[[], int]:
    """The same, of ours."""
    batches = trainer.train.batch_generator(BATCH_SIZE, seed=0, **options)

    def epoch() -> int:
        for x, y in batches:
            keep(x, y)
        return len(trainer.train)

    return epoch


def pair_by_pair(trainer: ImageTrainer) -> Callable[[], int]:
    """In order, a pair at a time."""

    def epoch() -> int:
        for x, y in trainer.train:
            keep(x, y)
        return len(trainer.train)

    return epoch


def keep(x: np.ndarray, y: np.ndarray) -> None:
    """What a model would do with a batch, cut down to looking at it."""
    if len(x) == 0 or len(y) == 0:
        raise SystemExit('an empty batch')


def main() -> None:
    """Write the same images in all ways, and read them in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pairs', type=int, default=20_000)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--images', choices=('emoji', 'noise'), default='emoji')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--folder', type=Path, help='where to write; else where temporary files go')
    arguments = parser.parse_args()
    pairs = Pairs(arguments.pairs, arguments.size, arguments.images)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        write_cache(pairs, folder)
        ours = time.perf_counter() - start
        write_by_hand(pairs, arguments.pairs, folder / 'hand.h5')
        hand = time.perf_counter() - start - ours
        (folder / 'npy').mkdir()
        for number in range(arguments.pairs):
            np.save(folder / 'npy' / f'{number}.npy', pairs.read_image(number))
        print(f'written in {ours:.1f} s, by hand in {hand:.1f} s: {ours / hand:.2f}')
        trainer = ImageTrainer(open_cache(folder, KEY), BATCH_SIZE)
        before = peak_resident_mb()
        contestants = {
            PEER: by_hand(folder / 'hand.h5'),
            '.npy files': of_files(folder / 'npy', arguments.pairs),
            'batch_generator': of_batches(trainer),
            'batch_generator, flips, rescale': of_batches(
                trainer, rescale=True, flip_horizontal=True, flip_vertical=True
            ),
            'pair by pair, in order': pair_by_pair(trainer),
        }
        speeds = take_turns(contestants, arguments.rounds)
        print_head(
            f'{arguments.pairs:,} {arguments.images}, {arguments.size} px', 'by hand', '.npy'
        )
        print_speeds(speeds, PEER, '.npy files')
        print(f'memory grew by {peak_resident_mb() - before:.0f} MB')


if __name__ == '__main__':
    main()
