"""A graph of near neighbours (HNSW) that proposes candidates where comparing all takes too long."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.vector_index.exact import Vectors, nearest

if TYPE_CHECKING:
    import faiss

logger = logging.getLogger('finetuner.vector_index')

_LINKS = 32
_BUILD_WIDTH = 128
_WIDTHS = (64, 128, 256, 512, 1024)
# so many embeddings are compared in order in the time of one step of a search through the graph:
# 20,000 random ones of 384 dimensions take as long as a width of 512
_STEP_COST = 40
_SAMPLES = 128
_SAMPLE_NEIGHBOURS = 10
_ADDED_AT_ONCE = 256
_TRAINED_ON = 20_000
_SEED = 0
# embeddings to propose beside those asked for, since theirs are rounded to a byte a dimension
_SPARE = 20


class GraphStoppedError(Exception):
    """The index is closing: the graph is not needed any more."""


@dataclass(frozen=True)
class Graph:
    """Embeddings linked to their neighbours; never changed.

    Attributes:
        index: FAISS's, which knows the embeddings by their keys.
        last_key: the newest key it was told of: later ones are searched without it.
        width: how many candidates a search keeps in sight; 0 where comparing all is as fast or
            nothing else finds enough.
        distance: it was built for.
    """

    index: faiss.Index
    last_key: int
    width: int
    distance: str

    def __len__(self) -> int:
        """Return how many embeddings it holds."""
        return self.index.ntotal

    def serves(self, dimension: int) -> bool:
        """Whether it is to be searched with queries of that many dimensions."""
        return self.width > 0 and self.index.d == dimension

    def candidates(self, query: np.ndarray, count: int, width: int = 0) -> np.ndarray:
        """Keys of embeddings that are probably the nearest, deleted ones among them.

        Args:
            query: `[dimension]` float32.
            count: how many are asked for; somewhat more come, or fewer.
            width: in place of its own.
        """
        import faiss

        count = min(count + max(count, _SPARE), len(self))
        width = max(width or self.width, count)
        options = faiss.SearchParametersHNSW(efSearch=width)  # type: ignore[attr-defined]
        # one at a time: FAISS would search several in threads of its own, which need not survive
        # a fork and do not know of each other
        _, keys = self.index.search(_prepared(query[None], self.distance), count, params=options)
        return keys[0][keys[0] >= 0]

    def save(self, path: Path) -> str:
        """Write it to a file of its own, whole or not at all.

        Returns:
            What `load` checks the file against.
        """
        import faiss

        raw = faiss.serialize_index(self.index)
        staging = path.with_suffix('.part')
        with open(os.open(staging, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), 'wb') as file:
            file.write(raw.data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
        return _digest(raw)

    @classmethod
    def load(
        cls, path: Path, digest: str, last_key: int, width: int, distance: str
    ) -> Graph | None:
        """Read a graph back; None where the file is not the one that was written."""
        try:
            raw = np.fromfile(path, np.uint8)
        except OSError:
            return None
        # before FAISS sees it, which trusts what it reads
        if _digest(raw) != digest:
            return None
        import faiss

        return cls(faiss.deserialize_index(raw), last_key, width, distance)


def build_graph(
    vectors: Vectors,
    distance: str,
    recall: float,
    base: Graph | None = None,
    stop: threading.Event | None = None,
) -> Graph:
    """Link embeddings, and find out how wide to search them.

    Args:
        vectors: all that are alive go in.
        distance: one of `exact.DISTANCES`.
        recall: share of the true neighbours of its own embeddings that it has to find.
        base: a graph to copy and go on from, so that only later embeddings are linked.
        stop: when set, building ends early.

    Raises:
        GraphStoppedError: it was.
    """
    import faiss

    # of this thread: what is served meanwhile needs the other cores
    faiss.omp_set_num_threads(1)
    rows = np.flatnonzero(vectors.alive)
    if base is None:
        index = _empty_index(vectors, rows, distance)
    else:
        index = faiss.clone_index(base.index)
        rows = rows[vectors.keys[rows] > base.last_key]
    # what is searched for to find the width must be no part of the graph yet: of an embedding that
    # is, the neighbours are found more easily than of a query
    random = np.random.default_rng(_SEED)
    held_out = np.sort(random.choice(rows, min(_SAMPLES, len(rows) // 2), replace=False))
    rows = np.setdiff1d(rows, held_out, assume_unique=True)
    for start in range(0, len(rows), _ADDED_AT_ONCE):
        if stop is not None and stop.is_set():
            raise GraphStoppedError
        some = rows[start : start + _ADDED_AT_ONCE]
        index.add_with_ids(_prepared(vectors.values[some], distance), vectors.keys[some])
    last_key = int(vectors.keys[-1])
    width = find_width(Graph(index, last_key, 0, distance), vectors, held_out, recall)
    index.add_with_ids(_prepared(vectors.values[held_out], distance), vectors.keys[held_out])
    logger.info('linked %d embeddings; searched with a width of %d', index.ntotal, width)
    return Graph(index, last_key, width, distance)


def _empty_index(vectors: Vectors, rows: np.ndarray, distance: str) -> faiss.Index:
    import faiss

    metric = faiss.METRIC_L2 if distance == 'euclidean' else faiss.METRIC_INNER_PRODUCT
    dimension = vectors.values.shape[1]
    bits: Any = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexHNSWSQ(dimension, bits, _LINKS, metric)
    index.hnsw.efConstruction = _BUILD_WIDTH
    sample = rows
    if len(rows) > _TRAINED_ON:
        sample = np.random.default_rng(_SEED).choice(rows, _TRAINED_ON, replace=False)
    # the range of each dimension, which a byte divides
    index.train(_prepared(vectors.values[sample], distance))
    return faiss.IndexIDMap2(index)


def find_width(
    graph: Graph,
    vectors: Vectors,
    samples: np.ndarray,
    recall: float,
    step_cost: int = _STEP_COST,
) -> int:
    """Find the narrowest search that finds enough of the true neighbours.

    Args:
        graph: over all that are alive but the samples.
        vectors: the embeddings.
        samples: rows to search for, by the graph and exactly; ascending.
        recall: share of each one's ten nearest that has to be found, in the mean.
        step_cost: embeddings that can be compared in the time of a step through the graph.

    Returns:
        The width; 0 where none finds enough in less time than comparing all takes.
    """
    others = np.setdiff1d(np.flatnonzero(vectors.alive), samples, assume_unique=True)
    queries = vectors.values[samples]
    true = nearest(vectors, queries, _SAMPLE_NEIGHBOURS, graph.distance, others)
    for width in _WIDTHS:
        if width * step_cost > len(others):
            break
        shares = [
            np.isin(vectors.keys[rows], graph.candidates(query, len(rows), width)).mean()
            for query, (rows, _) in zip(queries, true, strict=True)
        ]
        if np.mean(shares) >= recall:
            return width
    return 0


def _prepared(values: np.ndarray, distance: str) -> np.ndarray:
    """Float32 rows as the graph holds them: of length 1 for the cosine."""
    if distance == 'cosine':
        values = values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    return np.ascontiguousarray(values, np.float32)


def _digest(raw: np.ndarray) -> str:
    return hashlib.blake2b(raw.data, digest_size=32).hexdigest()
