"""Time `load_picture` against Pillow alone: decoding and resizing to what a model takes.

Both open the same bytes in the same run, in alternating rounds; only the ratios travel from one
machine to another. The peer is what most training scripts do: open, convert to RGB, resize with
Pillow's antialiased bilinear filter. The difference is in grey levels of 255, as a mean.

    python benchmarks/decode.py
"""

import io
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from finetuner.images import load_picture

EMOJI = Path(__file__).parents[1] / 'examples' / 'emoji' / 'test'
NUM_ROUNDS = 5
NUM_THREADS = 2
Loader = Callable[[bytes, int], np.ndarray]


def with_pillow(data: bytes, size: int) -> np.ndarray:
    """Decode the whole picture, then resize it."""
    image = Image.open(io.BytesIO(data)).convert('RGB')
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def generate_photo(width: int, height: int, seed: int) -> bytes:
    """Encode noise that, like a photograph's, is stronger the coarser it is."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for level in range(1, 8):
        cells = rng.integers(0, 256, (2**level, 2**level, 3), dtype=np.uint8)
        layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, dtype=float) / 2 ** min(level, 7)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, 'JPEG', quality=88)
    return buffer.getvalue()


def seconds(loader: Loader, pictures: list[bytes], size: int, pool: ThreadPoolExecutor) -> float:
    """Time one pass over all pictures, by as many threads as the pool has."""
    start = time.perf_counter()
    for _ in pool.map(lambda data: loader(data, size), pictures):
        pass
    return time.perf_counter() - start


def compare(name: str, pictures: list[bytes], size: int) -> None:
    """Print one line of the table."""
    times: dict[Loader, list[float]] = {with_pillow: [], load_picture: []}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for loader in times:
            seconds(loader, pictures[:8], size, pool)
        for _ in range(NUM_ROUNDS):
            for loader, spent in times.items():
                spent.append(seconds(loader, pictures, size, pool))
    peer, ours = (statistics.median(spent) for spent in times.values())
    differences = [
        np.abs(load_picture(data, size).astype(float) - with_pillow(data, size)).mean()
        for data in pictures[:20]
    ]
    print(
        f'{name:<24} {size:>4} px {len(pictures) / peer:>9,.0f} {len(pictures) / ours:>12,.0f} '
        f'{peer / ours:>7.2f} {statistics.mean(differences):>11.2f}'
    )


def main() -> None:
    """Compare on generated photographs and on the pictures of the example."""
    print(f'{NUM_THREADS} threads, pictures a second, median of {NUM_ROUNDS} alternating rounds')
    print(f'{"":<32} {"Pillow":>9} {"load_picture":>12} {"ratio":>7} {"difference":>11}')
    for width, height in ((640, 480), (1280, 960), (1920, 1280)):
        photos = [generate_photo(width, height, seed) for seed in range(12)]
        compare(f'JPEG {width} x {height}', photos, 224)
    emoji = [path.read_bytes() for path in sorted(EMOJI.glob('*/*.webp'))]
    compare('emoji WebP 96 x 96', emoji, 96)
    compare('emoji WebP 96 x 96', emoji, 160)


if __name__ == '__main__':
    main()
