"""Measure the release of a collection: memory, and its speed beside tarfile used by hand.

python benchmarks/release_memory.py                 # 100,000 pairs of 32 x 32: some minutes
python benchmarks/release_memory.py --pairs 2000
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from rounds import peak_resident_mb

from finetuner.collections import TrainingSet
from finetuner.collections.caching import stop_all_caching

SIZE = 32
BANDS = 3
CLASSES = ['even', 'odd']


def image_of(number: int) -> np.ndarray:
    """An image, always the same."""
    return np.random.default_rng(number).integers(0, 256, (BANDS, SIZE, SIZE), np.uint8)


def label_of(number: int) -> list[int]:
    """Whether a number is even or odd."""
    return [int(number % 2 == each) for each in range(2)]


def collection_of(count: int) -> TrainingSet:
    """A saved collection."""
    made = TrainingSet('pairs', tile_size=(SIZE, SIZE), classes=CLASSES)
    made.feed((image_of(number), label_of(number)) for number in range(count))
    made.save()
    # nothing else shall run meanwhile
    stop_all_caching()
    return made


def write_by_hand(count: int, path: Path) -> None:
    """A GeoTIFF and a JSON a pair, as one writes them: no hashes, bounds, or order."""
    with tarfile.open(path, 'w') as archive:
        for number in range(1, count + 1):
            with rasterio.MemoryFile() as file:
                options = {'count': BANDS, 'height': SIZE, 'width': SIZE, 'compress': 'deflate'}
                with file.open(driver='GTiff', dtype='uint8', **options) as dataset:
                    dataset.write(image_of(number))
                add(archive, f'pairs/images/train/{number}.tif', file.read())
            label = {'id': number, 'label': label_of(number), 'classes': CLASSES}
            add(archive, f'pairs/labels/train/{number}.json', json.dumps(label).encode())
        archive.fileobj.flush()
        os.fsync(archive.fileobj.fileno())


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file of a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that it takes, and MB that memory grows by at most; Linux only."""
    # from here on the peak is counted anew
    Path('/proc/self/clear_refs').write_text('5')
    before = peak_resident_mb()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, peak_resident_mb() - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pairs', type=int, default=100_000)
    count = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        os.environ['FINETUNER_HOME'] = str(Path(folder) / 'home')
        # imports, and what is made once
        collection_of(10).release('first')
        TrainingSet.from_name('pairs').remove()
        made = collection_of(count)
        ours, grown = measure(lambda: made.release('1.0'))
        by_hand, grown_by_hand = measure(lambda: write_by_hand(count, Path(folder) / 'x.tar'))
    print(
        f'release of {count:,} pairs: {count / ours:,.0f} pairs/s, {by_hand / ours:.2f} of rasterio '
        f'and tarfile by hand ({count / by_hand:,.0f}/s); memory grew by {grown:.0f} MB '
        f'({grown_by_hand:.0f} MB by hand)'
    )


if __name__ == '__main__':
    main()
