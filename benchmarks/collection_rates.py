"""Feed, save, cache and read a collection, beside h5py and .npy files by hand, in one run.

python benchmarks/collection_rates.py               # 20,000 pairs of 256 x 256: 12 GB, ten minutes
python benchmarks/collection_rates.py --pairs 500   # all of it in memory of the file system
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
from rounds import peak_resident_mb, print_head, print_speeds, take_turns

from finetuner.collections import TrainingSet
from finetuner.collections.batches import ImageTrainer

EMOJI = Path(__file__).parents[1] / 'examples' / 'emoji' / 'train'
BATCH_SIZE = 32
BANDS = 3
PEER = 'h5py by hand'
FILES = '.npy files'


class Images:
    """Images that are made when they are asked for, always the same."""

    def __init__(self, size: int, kind: str) -> None:
        """Note what to make."""
        self.shape = (BANDS, size, size)
        self._is_noise = kind == 'noise'
        self._paths = sorted(EMOJI.glob('*/*.webp'))

    def __getitem__(self, number: int) -> np.ndarray:
        """An image."""
        random = np.random.default_rng(number)
        if self._is_noise:
            return random.integers(0, 256, self.shape, dtype=np.uint8)
        pixels = cv2.imread(str(self._paths[number % len(self._paths)]))
        pixels = cv2.resize(pixels, self.shape[1:], interpolation=cv2.INTER_CUBIC)
        # no two alike: each moved, and in a light of its own
        pixels = np.roll(pixels, number, 1) * random.uniform(0.7, 1)
        return np.ascontiguousarray(pixels.astype(np.uint8).transpose(2, 0, 1))


class ByHand:
    """One file: a dataset of images, a chunk an image, compressed as in the cache, and one of labels."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        """Make the file."""
        self._file = h5py.File(path, 'w')
        self.images = self._file.create_dataset(
            'images',
            (0, *shape),
            np.uint8,
            maxshape=(None, *shape),
            chunks=(1, *shape),
            compression='gzip',
            compression_opts=1,
        )
        self.labels = self._file.create_dataset('labels', (0, 2), np.uint8, maxshape=(None, 2))

    def write(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Append pairs."""
        start = len(self.images)
        for dataset in (self.images, self.labels):
            dataset.resize(start + len(images), 0)
        for number, image in enumerate(images):
            self.images[start + number] = image
        self.labels[start:] = labels
        self._file.flush()

    def epoch(self) -> int:
        """Read a shuffled epoch, batch by batch and image by image."""
        labels = self.labels[()]
        order = np.random.default_rng(0).permutation(len(labels))
        for first in range(0, len(order), BATCH_SIZE):
            chosen = order[first : first + BATCH_SIZE]
            x = np.empty((len(chosen), *self.images.shape[1:]), np.uint8)
            for row, number in enumerate(chosen):
                self.images.read_direct(x, np.s_[number], np.s_[row])
            keep(x, labels[chosen])
        return len(order)


class OfFiles:
    """A .npy file an image, and the labels in memory."""

    def __init__(self, folder: Path) -> None:
        """Make the folder."""
        folder.mkdir()
        self._folder = folder
        self._labels = np.empty((0, 2), np.uint8)

    def write(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Append pairs."""
        start = len(self._labels)
        for number, image in enumerate(images):
            np.save(self._folder / f'{start + number}.npy', image)
        self._labels = np.concatenate([self._labels, labels])
        np.save(self._folder / 'labels.npy', self._labels)

    def epoch(self) -> int:
        """Read a shuffled epoch, batch by batch and image by image."""
        order = np.random.default_rng(0).permutation(len(self._labels))
        for first in range(0, len(order), BATCH_SIZE):
            chosen = order[first : first + BATCH_SIZE]
            x = np.stack([np.load(self._folder / f'{number}.npy') for number in chosen])
            keep(x, self._labels[chosen])
        return len(order)


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


def chunks_of(images: Images, count: int, num_chunks: int) -> Iterator[tuple[np.ndarray, ...]]:
    """All images and labels, in memory chunk by chunk: making them is not to be measured."""
    for numbers in np.array_split(np.arange(count), num_chunks):
        chunk = np.empty((len(numbers), *images.shape), np.uint8)
        for row, number in enumerate(numbers):
            chunk[row] = images[number]
        yield chunk, np.eye(2, dtype=np.uint8)[numbers % 2]


def write_all(
    chunks: Iterator[tuple[np.ndarray, ...]], ours: TrainingSet, hand: ByHand, files: OfFiles
) -> dict[str, list[float]]:
    """Write chunk by chunk in turns.

    Returns:
        Pairs a second of each, chunk by chunk.
    """
    speeds: dict[str, list[float]] = {}
    for images, labels in chunks:
        pairs = list(zip(images, labels.tolist(), strict=True))
        took = {
            'feed': seconds(lambda pairs=pairs: ours.feed(pairs)),
            'save': seconds(ours.save),
            # what the thread has not done by now that save() began
            'batch': seconds(ours.batch),
        }
        took['feed and save'] = took['feed'] + took['save']
        took['feed, save and batch'] = took['feed and save'] + took['batch']
        took[PEER] = seconds(lambda chunk=(images, labels): hand.write(*chunk))
        took[FILES] = seconds(lambda chunk=(images, labels): files.write(*chunk))
        for name, each in took.items():
            speeds.setdefault(name, []).append(len(images) / each)
    return speeds


def seconds(work: Callable[[], object]) -> float:
    """How long something takes; the disk has nothing to do before it."""
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Write the same images in all ways, and read them, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pairs', type=int, default=20_000)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--images', choices=('emoji', 'noise'), default='emoji')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--folder', type=Path, help='where to write; else where temporary files go')
    arguments = parser.parse_args()
    title = f'{arguments.pairs:,} {arguments.images}, {arguments.size} px'
    images = Images(arguments.size, arguments.images)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        os.environ['FINETUNER_HOME'] = str(folder / 'home')
        ours = TrainingSet('measured', tile_size=[arguments.size, arguments.size])
        hand, files = ByHand(folder / 'hand.h5', images.shape), OfFiles(folder / 'npy')
        chunks = chunks_of(images, arguments.pairs, arguments.rounds)
        print_head(f'writing {title}', 'by hand', '.npy')
        print_speeds(write_all(chunks, ours, hand, files), PEER, FILES)
        trainer = ours.batch(BATCH_SIZE)
        before = peak_resident_mb()
        contestants = {
            PEER: hand.epoch,
            FILES: files.epoch,
            'batch_generator': of_batches(trainer),
            'batch_generator, flips, rescale': of_batches(
                trainer, rescale=True, flip_horizontal=True, flip_vertical=True
            ),
            'pair by pair, in order': pair_by_pair(trainer),
        }
        speeds = take_turns(contestants, arguments.rounds)
        print_head(f'reading {title}', 'by hand', '.npy')
        print_speeds(speeds, PEER, FILES)
        print(f'memory grew by {peak_resident_mb() - before:.0f} MB while reading')


if __name__ == '__main__':
    main()
