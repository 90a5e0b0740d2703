"""Embeddings in memory, and the exact search over them.

Distances are estimated in float32 for all, and computed in float64 for those that can be among the
nearest: the estimates' errors are bounded, so that no candidate is missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DISTANCES = ('cosine', 'euclidean', 'inner_product')

# as finetuner.search rounds, so that both order equal distances by position
_KEPT_BITS = 40
_BLOCK_NUMBERS = 1 << 24
_GATHERED_NUMBERS = 1 << 22
_COPY_COST = 8  # comparisons that take as long as to copy an embedding and compare the copy
_RANKED_AT_ONCE = 4096
_UNIT = 2.0**-24
_TINY = 1e-37
_SMALLEST_ROOM = 1024

Nearest = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Vectors:
    """Embeddings as one search sees them: nothing in here changes.

    Attributes:
        keys: `[n]` int64, ascending: the order in which they were added.
        values: `[n, dimension]` float32, as given.
        lengths: `[n]` float32, euclidean.
        alive: `[n]` bool, false where an embedding was deleted since.
        num_alive: how many are left.
    """

    keys: np.ndarray
    values: np.ndarray
    lengths: np.ndarray
    alive: np.ndarray
    num_alive: int

    @classmethod
    def empty(cls, dimension: int) -> Vectors:
        """No embeddings of that many dimensions."""
        return cls(
            np.empty(0, np.int64),
            np.empty((0, dimension), np.float32),
            np.empty(0, np.float32),
            np.empty(0, bool),
            0,
        )

    def __len__(self) -> int:
        """Return how many there are, deleted ones included."""
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.values.nbytes + self.keys.nbytes + self.lengths.nbytes + self.alive.nbytes

    def rows_of(self, keys: np.ndarray) -> np.ndarray:
        """Rows of those keys that are there and alive, ascending.

        Args:
            keys: int64, in any order.
        """
        keys = np.sort(keys)
        rows = np.searchsorted(self.keys, keys)
        rows = rows[rows < len(self.keys)]
        rows = rows[self.keys[rows] == keys[: len(rows)]] if len(rows) else rows
        return rows[self.alive[rows]]


class GrowingVectors:
    """Embeddings that are added to and deleted from by one thread, and searched by many.

    Attributes:
        now: what a search that begins now looks at.
    """

    def __init__(self, dimension: int) -> None:
        """Begin with none."""
        self.now = Vectors.empty(dimension)
        self._room = _arrays(self.now)

    def reserve(self, count: int) -> None:
        """Make room, so that adding so many cannot fail for want of memory.

        Args:
            count: how many embeddings come.
        """
        there = len(self.now)
        if there + count <= len(self._room[0]):
            return
        size = max(there + count, there + there // 2, _SMALLEST_ROOM)
        room = tuple(np.empty((size, *old.shape[1:]), old.dtype) for old in self._room)
        for old, new in zip(_arrays(self.now), room, strict=True):
            new[:there] = old
        self._room = room
        self.now = self._first(there, self.now.alive, self.now.num_alive)

    def change(self, keys: np.ndarray, values: np.ndarray, removed: np.ndarray) -> None:
        """Append embeddings and leave others out of what is searched from here on, in one step.

        Args:
            keys: larger than all there are.
            values: `[len(keys), dimension]` float32.
            removed: keys to delete.
        """
        self.reserve(len(keys))
        there, count = len(self.now), len(self.now) + len(keys)
        # beyond what any search looks at by now
        for array, new in zip(self._room, (keys, values, lengths_of(values)), strict=True):
            array[there:count] = new
        alive = np.concatenate([self.now.alive, np.ones(len(keys), bool)])
        rows = self.now.rows_of(removed)
        alive[rows] = False
        num_alive = self.now.num_alive + len(keys) - len(rows)
        self.now = self._first(count, alive, num_alive)
        if count - num_alive > max(_SMALLEST_ROOM, count // 4):
            self._compact()

    def _first(self, count: int, alive: np.ndarray, num_alive: int) -> Vectors:
        keys, values, lengths = self._room
        return Vectors(keys[:count], values[:count], lengths[:count], alive, num_alive)

    def _compact(self) -> None:
        kept, count = self.now.alive, self.now.num_alive
        self._room = tuple(array[kept] for array in _arrays(self.now))
        self.now = self._first(count, np.ones(count, bool), count)


def _arrays(vectors: Vectors) -> tuple[np.ndarray, ...]:
    return vectors.keys, vectors.values, vectors.lengths


def lengths_of(values: np.ndarray) -> np.ndarray:
    """Euclidean lengths, `[n]` float32, of `[n, dimension]` float32."""
    lengths = np.empty(len(values), np.float32)
    for start in range(0, len(values), _RANKED_AT_ONCE):
        block = values[start : start + _RANKED_AT_ONCE].astype(np.float64)
        lengths[start : start + _RANKED_AT_ONCE] = np.sqrt(np.square(block).sum(axis=1))
    return lengths


def nearest(
    vectors: Vectors, queries: np.ndarray, k: int, distance: str, rows: np.ndarray | None = None
) -> list[Nearest]:
    """Find each query's nearest embeddings, exactly; equal ones in the order they were added.

    Args:
        vectors: what to search.
        queries: `[num_queries, dimension]` float32.
        k: at most so many for each query.
        distance: one of `DISTANCES`.
        rows: search these alone; ascending, none deleted.

    Returns:
        For each query its rows and their distances, float64, smallest first.
    """
    first, last, absent, gathered = _searched(vectors, rows)
    size = last - first if gathered is None else len(gathered)
    found: list[Nearest] = []
    block_size = max(1, _BLOCK_NUMBERS // max(1, size))
    for start in range(0, len(queries), block_size):
        block = queries[start : start + block_size]
        if gathered is None:
            values, lengths = vectors.values[first:last], vectors.lengths[first:last]
            estimates, errors = _estimate(block, values, lengths, distance)
            estimates[:, absent] = np.inf
        else:
            estimates, errors = _estimate_of(vectors, gathered, block, distance)
        for number, query in enumerate(block):
            chosen = _candidates(estimates[number], errors[number], k)
            chosen = chosen + first if gathered is None else gathered[chosen]
            found.append(rank(vectors, chosen, query, k, distance))
    return found


def _searched(
    vectors: Vectors, rows: np.ndarray | None
) -> tuple[int, int, np.ndarray, np.ndarray | None]:
    """Which stretch to compare as it lies, and what of it to leave out; or what to gather instead.

    To copy rows takes several times as long as to compare them where they are.
    """
    if rows is None:
        return 0, len(vectors), np.flatnonzero(~vectors.alive), None
    first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
    if len(rows) * _COPY_COST < last - first:
        return first, last, rows[:0], rows
    is_absent = np.ones(last - first, bool)
    is_absent[rows - first] = False
    return first, last, np.flatnonzero(is_absent), None


def _estimate_of(
    vectors: Vectors, rows: np.ndarray, queries: np.ndarray, distance: str
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates for some rows, of which no more than a block is copied at a time."""
    estimates = np.empty((len(queries), len(rows)), np.float32)
    errors = np.empty_like(estimates)
    step = max(1, _GATHERED_NUMBERS // vectors.values.shape[1])
    for start in range(0, len(rows), step):
        some, there = rows[start : start + step], slice(start, start + step)
        estimates[:, there], errors[:, there] = _estimate(
            queries, vectors.values[some], vectors.lengths[some], distance
        )
    return estimates, errors


def _estimate(
    queries: np.ndarray, values: np.ndarray, lengths: np.ndarray, distance: str
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in float32 (euclidean: their squares), and by how much they can be wrong."""
    relative = np.float32((values.shape[1] + 16) * 2 * _UNIT)
    own = lengths_of(queries)
    if distance == 'cosine':
        estimates = _products(queries / own[:, None], values)
        estimates /= -lengths
        estimates += 1
        return estimates, np.full((len(queries), 1), relative, np.float32)
    estimates = _products(queries, values)
    if distance == 'inner_product':
        scales = own[:, None] * lengths
        np.subtract(1, estimates, out=estimates)
        return estimates, (scales + 1) * relative + _TINY
    scales = np.square(own)[:, None] + np.square(lengths)
    estimates *= -2
    estimates += scales
    return estimates, scales * relative + _TINY


def _products(queries: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Inner products, `[num_queries, n]` float32."""
    if len(queries) > 1:
        return queries @ values.T
    try:
        import faiss
    except ModuleNotFoundError:
        return queries @ values.T
    # of one query FAISS makes them in a third of the time that NumPy's matrix product takes
    query, rows = np.ascontiguousarray(queries[0]), np.ascontiguousarray(values)
    products = np.empty((1, len(rows)), np.float32)
    pointers = [faiss.swig_ptr(array) for array in (products, query, rows)]
    faiss.fvec_inner_products_ny(*pointers, rows.shape[1], len(rows))  # type: ignore[attr-defined]
    return products


def _candidates(estimates: np.ndarray, errors: np.ndarray, k: int) -> np.ndarray:
    """Positions of all that can be among the `k` nearest."""
    if k >= len(estimates):
        return np.flatnonzero(np.isfinite(estimates))
    last = np.partition(estimates + errors, k - 1)[k - 1]
    return np.flatnonzero((estimates - errors <= last) & np.isfinite(estimates))


def rank(vectors: Vectors, rows: np.ndarray, query: np.ndarray, k: int, distance: str) -> Nearest:
    """Sort rows by their distance to a query, computed in float64.

    Args:
        vectors: what they are rows of.
        rows: ascending.
        query: `[dimension]` float32.
        k: at most so many are kept.
        distance: one of `DISTANCES`.

    Returns:
        Rows and distances, smallest first; equal ones by row.
    """
    distances = np.concatenate(
        [
            distances_to(query, vectors.values[rows[start : start + _RANKED_AT_ONCE]], distance)
            for start in range(0, len(rows), _RANKED_AT_ONCE)
        ]
        or [np.empty(0)]
    )
    order = np.argsort(distances, kind='stable')[:k]
    return rows[order], distances[order]


def distances_to(query: np.ndarray, values: np.ndarray, distance: str) -> np.ndarray:
    """Distances of embeddings to one query, `[n]` float64, rounded as `finetuner.search` does.

    The inner product is turned into a distance as 1 - a·b, which is the cosine distance where
    both have length 1.

    Args:
        query: `[dimension]`.
        values: `[n, dimension]`.
        distance: one of `DISTANCES`.
    """
    wide, others = query.astype(np.float64), values.astype(np.float64)
    own, squares = np.square(wide).sum(), np.square(others).sum(axis=1)
    if distance == 'cosine':
        wide, others = wide / np.sqrt(own), others / np.sqrt(squares)[:, None]
        own, squares = np.float64(1.0), np.ones(len(others))
    # one sum a row, so that equal rows come to equal distances wherever they stand
    products = (others * wide).sum(axis=1)
    if distance == 'euclidean':
        raw = own + squares - 2 * products
        return np.sqrt(np.maximum(_rounded(raw, np.maximum(own, squares)), 0.0))
    if distance == 'cosine':
        return np.maximum(_rounded(1 - products, squares), 0.0)
    return _rounded(1 - products, np.maximum(1.0, np.sqrt(own * squares)))


def _rounded(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    steps = np.ldexp(1.0, np.frexp(scales)[1] - _KEPT_BITS)
    return np.where(scales > 0, np.rint(values / steps) * steps, values)
