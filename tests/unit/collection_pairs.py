"""Collections in memory for tests of the cache: pairs whose images follow from their ids."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from finetuner.collections.cache import OpenCache, PairRow
from finetuner.collections.caching import stop_all_caching
from finetuner.collections.labels import build_label_kind

KEY = 'ab12'
GROUPS = ('train', 'test', 'validate')
CLASSES = {
    'classification': ['a', 'b', 'c'],
    'object_detection': ['car', 'tree'],
    'segmentation': ['water', 'road', 'roof'],
}


@functools.cache
def _pool(shape: tuple[int, int, int], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Steps, which compress, and noise, which does not; both longer than an image."""
    random = np.random.default_rng(0)
    count = int(np.prod(shape)) + 4096
    limits = np.iinfo(dtype)
    noise = random.integers(limits.min, limits.max, count, dtype, endpoint=True)
    return (np.arange(count) // 16 % 100).astype(dtype), noise


def image_of(pair_id: int, shape: tuple[int, int, int], dtype: Any) -> np.ndarray:
    """Noise for odd ids, which no compression makes smaller, and steps for even ones; no two alike."""
    dtype = np.dtype(dtype)
    if dtype.kind not in 'ui':
        random = np.random.default_rng(pair_id)
        values = random.random(shape) < 0.5 if dtype.kind == 'b' else random.normal(size=shape)
        return values.astype(dtype)
    start = pair_id * 2_654_435_761 % 4096
    pool = _pool(shape, dtype.newbyteorder('='))[pair_id % 2]
    image = pool[start : start + int(np.prod(shape))].astype(dtype)
    image[:5] = [pair_id >> shift & 0x7F for shift in (0, 7, 14, 21, 28)]
    return image.reshape(shape)


def label_of(pair_id: int, mltype: str, shape: tuple[int, int, int], salt: int = 0) -> Any:
    """The label of a pair, in the form that its kind keeps."""
    _, height, width = shape
    if mltype == 'classification':
        number = 5 * pair_id + 3 * salt
        return np.array([number >> shift & 1 for shift in range(3)], np.uint8)
    random = np.random.default_rng([pair_id, salt])
    if mltype == 'segmentation':
        return random.integers(0, 4, (height, width)).astype(np.uint8)
    found: list[list[tuple[float, ...]]] = [[], []]
    for _ in range(random.integers(0, 4)):
        left, right = sorted(random.choice(width + 1, 2, replace=False).tolist())
        top, bottom = sorted(random.choice(height + 1, 2, replace=False).tolist())
        found[random.integers(0, 2)].append((float(left), float(top), float(right), float(bottom)))
    return found


class MemorySource:
    """A revision of a collection; `reads` notes which images were asked for."""

    def __init__(
        self,
        ids: Any = range(12),
        revision: int = 1,
        mltype: str = 'classification',
        shape: tuple[int, int, int] = (3, 8, 8),
        dtype: Any = np.uint8,
        salt: int = 0,
    ) -> None:
        self.key = KEY
        self.ids = sorted(ids)
        self.revision = revision
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.kind = build_label_kind(mltype, CLASSES[mltype])
        self.salt = salt
        self.reads: list[int] = []

    def group_of(self, pair_id: int) -> str:
        return GROUPS[pair_id % 3]

    def ids_of(self, group: str) -> list[int]:
        return [pair_id for pair_id in self.ids if self.group_of(pair_id) == group]

    def label_of(self, pair_id: int) -> Any:
        return label_of(pair_id, self.kind.mltype, self.shape, self.salt)

    def image_of(self, pair_id: int) -> np.ndarray:
        return image_of(pair_id, self.shape, self.dtype)

    def rows(self) -> Iterator[PairRow]:
        for pair_id in self.ids:
            label = self.kind.encode(self.label_of(pair_id))
            yield PairRow(pair_id, self.group_of(pair_id), label)

    def read_image(self, pair_id: int) -> np.ndarray:
        self.reads.append(pair_id)
        return self.image_of(pair_id)

    def read_images(self, pair_ids: Any) -> Iterator[np.ndarray]:
        return map(self.read_image, pair_ids)


def same_label(one: Any, other: Any) -> bool:
    """Whether two labels are equal, type for type."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and one == other


def assert_serves(cache: OpenCache, source: MemorySource, every: int = 1) -> None:
    """All that a cache serves is what its source has; all of it, where the cache is whole."""
    assert cache.revision == source.revision
    assert (cache.shape, cache.dtype, cache.kind) == (source.shape, source.dtype, source.kind)
    assert cache.ids.tolist() == source.ids
    served = 0
    for group in GROUPS:
        positions = cache.positions(group)
        ids = cache.ids[positions].tolist()
        wanted = source.ids_of(group)
        assert ids == (wanted if cache.is_whole else [each for each in wanted if each in set(ids)])
        served += len(ids)
        for pair_id, position in list(zip(ids, positions.tolist(), strict=True))[::every]:
            image = cache.read_image(position)
            assert image.dtype == source.dtype
            assert (image == source.image_of(pair_id)).all()
            assert same_label(cache.read_label(position), source.label_of(pair_id))
    assert len(cache) == served


def in_child(work: Callable[..., Any], *arguments: Any, method: str = 'fork') -> Any:
    """A process that does something; forked, it starts at once."""
    # what other tests left at work in the background would hold locks that the child waits for
    stop_all_caching()
    child = multiprocessing.get_context(method).Process(target=work, args=arguments)
    child.start()
    return child
