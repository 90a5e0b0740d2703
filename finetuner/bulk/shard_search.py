"""One task of a search: some queries against some shards of the index."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from finetuner.bulk.reading import EncodedDataset
from finetuner.bulk.stored_columns import read_column, row_starts
from finetuner.evaluation import plain_labels
from finetuner.excepts import DataError
from finetuner.search import Nearest, k_smallest

NONE = -1


@dataclass(frozen=True)
class Queries:
    """Some of the queries.

    Attributes:
        number: which lot of them, from 0.
        first: position of the first one among all.
        embeddings: `[num_queries, dimension]`, where they are at hand; or
        dataset: that holds them, in
        places: of its shards.
    """

    number: int
    first: int
    embeddings: NDArray[Any] | None = None
    dataset: EncodedDataset | None = None
    places: Sequence[int] = ()

    def read(self) -> NDArray[Any]:
        """The embeddings."""
        if self.dataset is None:
            return np.asarray(self.embeddings)
        return np.concatenate([self.dataset.shard(place)[1] for place in self.places])

    def column(self, name: str) -> list[Any]:
        """A column of the data set."""
        if self.dataset is None:
            return []
        return [value for p in self.places for value in read_column(self.dataset, p, name)]


@dataclass(frozen=True)
class SearchTask:
    """Queries, and shards of the index to look through for them.

    Attributes:
        queries: whose neighbours are looked for.
        index: where.
        places: of its shards.
        k: how many are to be found.
        distance: as for `finetuner.search.search`.
        engine: `'exact'` or `'faiss'`.
        leave_out: `'position'` where a query is the row of the same position, `'id'` where it is the
            row of the same id, and is not to be found; None where all are.
        unlike: column of labels, where rows of a query's own label are not to be found.
    """

    queries: Queries
    index: EncodedDataset
    places: Sequence[int]
    k: int
    distance: str
    engine: str
    leave_out: str | None = None
    unlike: str | None = None


class Found(NamedTuple):
    """What came of a task.

    Attributes:
        number: of the lot of queries.
        squared: `[num_queries, k]` float64, before the root is taken of euclidean distances; infinity
            where there is nothing.
        positions: `[num_queries, k]` int64, in the whole index.
        own: `[num_queries]` int64, position of the row that is the query; -1 where none is.
    """

    number: int
    squared: NDArray[np.float64]
    positions: NDArray[np.int64]
    own: NDArray[np.int64]


class _Finder(Protocol):
    """What looks through rows part by part: `Nearest`, or faiss."""

    squared: torch.Tensor
    positions: torch.Tensor

    def add(self, embeddings: Any, exclude: Any = None, unlike: Any = None) -> None: ...


def search_shard(task: SearchTask) -> Found:
    """Find the nearest rows of some shards; one shard is held at a time.

    Raises:
        DataError: a shard is not what was written, or an id is held by several rows.
        ConfigError: there is no such column.
    """
    queries = task.queries.read()
    starts = row_starts(task.index)
    own = np.full(len(queries), NONE, np.int64)
    numbers: dict[Hashable, int] = {}
    labels: NDArray[np.int64] | None = None
    if task.unlike is not None:
        wanted = plain_labels('query', task.queries.column(task.unlike), task.queries.first)
        labels = np.array([numbers.setdefault(each, len(numbers)) for each in wanted])
    by_id: dict[str, list[int]] = {}
    if task.leave_out == 'id':
        for number, id_ in enumerate(task.queries.column('id')):
            by_id.setdefault(id_, []).append(number)
    if task.leave_out == 'position':
        own = np.arange(len(queries)) + task.queries.first
    squared: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    for place in task.places:
        first = int(starts[place])
        ids, rows = task.index.shard(place)
        if not len(rows):
            continue
        _note_own(own, by_id, ids, first)
        unlike = None
        if labels is not None:
            theirs = plain_labels('index', read_column(task.index, place, str(task.unlike)), first)
            unlike = labels, np.array([numbers.get(each, NONE) for each in theirs])
        # positions of a finder count from the first of its rows
        finder: _Finder = _finder(task, queries)
        finder.add(rows, np.where(own >= first, own - first, NONE), unlike)
        here, there = finder.squared, finder.positions + first
        if squared is not None and positions is not None:
            here, there = k_smallest(
                torch.cat([squared, here], 1), torch.cat([positions, there], 1), task.k
            )
        squared, positions = here, there
    if squared is None or positions is None:
        squared = torch.empty(len(queries), 0, dtype=torch.float64)
        positions = squared.long()
    return Found(task.queries.number, squared.numpy(), positions.numpy(), own)


def _note_own(
    own: NDArray[np.int64], by_id: dict[str, list[int]], ids: Sequence[str], first: int
) -> None:
    """Note which rows are queries, by their ids."""
    for row, id_ in enumerate(ids if by_id else ()):
        for number in by_id.get(id_, ()):
            if own[number] != NONE:
                raise held_twice(id_)
            own[number] = first + row


def held_twice(id_: str) -> DataError:
    """Say that a query cannot be told from other rows."""
    return DataError(
        f'the id {id_!r} of a query is held by several rows of the index, so it cannot be left out of '
        'its own results: give each row its own id, or leave none out'
    )


def _finder(task: SearchTask, queries: NDArray[Any]) -> _Finder:
    if task.engine == 'faiss':
        return FaissFinder(queries, task.k, task.distance)
    return Nearest(queries, task.k, task.distance)


class FaissFinder:
    """Nearest neighbours by a flat index of faiss, in float32.

    Attributes:
        squared: as of `Nearest`.
        positions: the same.
    """

    def __init__(self, queries: NDArray[Any], k: int, distance: str) -> None:
        """Take the queries."""
        self._distance = distance
        self._queries = self._prepared('query', queries)
        self._k = k
        self.squared = torch.empty(len(queries), 0, dtype=torch.float64)
        self.positions = self.squared.long()

    def add(self, embeddings: Any, exclude: Any = None, unlike: Any = None) -> None:
        """Look through rows, once; see `Nearest.add`."""
        import faiss

        rows = self._prepared('index', embeddings)
        if rows.shape[1] != self._queries.shape[1]:
            raise DataError(
                f'query embeddings have {self._queries.shape[1]} dimensions, index embeddings '
                f'{rows.shape[1]}: both must come from the same model'
            )
        faiss.omp_set_num_threads(torch.get_num_threads())
        is_cosine = self._distance == 'cosine'
        index = (faiss.IndexFlatIP if is_cosine else faiss.IndexFlatL2)(rows.shape[1])
        index.add(rows)
        # one more than wanted: the query itself may be among them
        found, positions = index.search(self._queries, min(self._k + 1, len(rows)))
        distances = 1.0 - found.astype(np.float64) if is_cosine else found.astype(np.float64)
        distances = np.maximum(distances, 0.0)
        if exclude is not None:
            distances[positions == np.asarray(exclude)[:, None]] = np.inf
        self.squared, self.positions = k_smallest(
            torch.from_numpy(distances), torch.from_numpy(positions.astype(np.int64)), self._k
        )

    def _prepared(self, side: str, embeddings: NDArray[Any]) -> NDArray[np.float32]:
        vectors = np.ascontiguousarray(embeddings, np.float32)
        if not np.isfinite(vectors.sum(axis=1, dtype=np.float64)).all():
            raise DataError(f'an embedding of the {side} holds nan or infinity')
        if self._distance == 'cosine':
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
            vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        return vectors
