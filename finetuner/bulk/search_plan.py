"""A search over an encoded data set: lots of queries, parts of the index, and what comes of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetuner.bulk.reading import EncodedDataset, open_encoded
from finetuner.bulk.shard_search import (
    NONE,
    Found,
    Queries,
    SearchTask,
    held_twice,
    search_shard,
)
from finetuner.bulk.stored_columns import row_starts, take_column
from finetuner.bulk.tasks import check_workers, run_tasks
from finetuner.excepts import ConfigError, DataError, unknown_name
from finetuner.search import DISTANCES, k_smallest

Encoded = str | os.PathLike[str] | EncodedDataset

_ENGINES = ('exact', 'faiss')
_QUERIES_AT_ONCE = 16_384
# for a worker: so that none waits long for the last one, and one that dies costs little
_TASKS_EACH = 4
_MANY = 1_000_000


@dataclass(frozen=True)
class SearchPlan:
    """A whole search: lots of queries, each against parts of the index."""

    lots: tuple[Queries, ...]
    index: EncodedDataset
    k: int
    distance: str
    engine: str
    num_workers: int
    ray_address: str | None
    leave_out: str | None = None
    unlike: str | None = None

    @classmethod
    def of(
        cls,
        query: Encoded | NDArray[Any],
        index: EncodedDataset,
        k: int,
        distance: str,
        engine: str,
        num_workers: int,
        ray_address: str | None,
    ) -> SearchPlan:
        """Check what is asked for.

        Raises:
            ConfigError: an argument is wrong.
            DataError: there are no queries, or the index is empty.
        """
        if distance not in DISTANCES:
            raise ConfigError(unknown_name('distance', distance, DISTANCES))
        if engine not in _ENGINES:
            raise ConfigError(unknown_name('engine', engine, _ENGINES))
        check_whole('k', k, 1)
        check_workers(num_workers, ray_address)
        lots = tuple(_lots(query))
        if not lots:
            raise DataError('there are no queries: none has an embedding')
        if not len(index):
            raise DataError(f'{str(index.folder)!r} holds no embeddings: there is nothing to find')
        k = min(k, len(index))
        return cls(lots, index, k, distance, engine, num_workers, ray_address)

    def leaving_out(self, leave_out: str | None) -> SearchPlan:
        """The same, with queries that are not to be found.

        Raises:
            DataError: the index holds nothing but the query itself.
        """
        if leave_out is None or self.k < len(self.index):
            return replace(self, leave_out=leave_out)
        # of a whole index one less can be found, where one is left out at all
        ids = {id_ for place in range(self.index.num_shards) for id_ in self.index.shard(place)[0]}
        is_any = leave_out == 'position' or any(
            not ids.isdisjoint(lot.column('id')) for lot in self.lots
        )
        if is_any and self.k == 1:
            raise DataError('the index holds nothing but the query itself')
        return replace(self, leave_out=leave_out, k=self.k - is_any)

    def distances(self, squared: NDArray[np.float64]) -> torch.Tensor:
        """What neighbours were ordered by, as the distances that were asked for."""
        # by torch, as `finetuner.search` does: NumPy's roots differ in the last bit
        found = torch.from_numpy(np.ascontiguousarray(squared))
        return found.sqrt() if self.distance == 'euclidean' else found

    def tasks(self) -> Iterator[SearchTask]:
        """All of them, those of a lot of queries one after the other."""
        parts = self._parts()
        for lot in self.lots:
            for places in parts:
                yield SearchTask(
                    lot,
                    self.index,
                    places,
                    self.k,
                    self.distance,
                    self.engine,
                    self.leave_out,
                    self.unlike,
                )

    def _parts(self) -> list[list[int]]:
        """The shards of the index, in as many parts as keep the workers busy."""
        places = np.arange(self.index.num_shards)
        most = _TASKS_EACH * self.num_workers
        return [part.tolist() for part in np.array_split(places, min(most, len(places)))]

    def run(
        self,
    ) -> Generator[tuple[Queries, NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]]:
        """Search.

        Yields:
            Of each lot, in order: itself, squared distances `[num_queries, k]`, positions, and the
            positions of the queries themselves `[num_queries]`.
        """
        num_parts = len(self._parts())
        merged: dict[int, Found] = {}
        counts: Counter[int] = Counter()
        following = 0
        tasks = run_tasks(search_shard, self.tasks(), self.num_workers, self.ray_address)
        with closing(tasks) as results:
            for found in results:
                number = found.number
                if number in merged:
                    found = _merged(merged[number], found, self)
                merged[number] = found
                counts[number] += 1
                while counts[following] == num_parts:
                    whole = merged.pop(following)
                    yield self.lots[following], whole.squared, whole.positions, whole.own
                    following += 1


def _merged(one: Found, other: Found, plan: SearchPlan) -> Found:
    twice = (one.own != other.own) & (one.own != NONE) & (other.own != NONE)
    if twice.any():
        place = one.own[np.flatnonzero(twice)[:1]]
        raise held_twice(str(take_column(plan.index, place, 'id')[0]))
    squared = torch.from_numpy(np.concatenate([one.squared, other.squared], 1))
    positions = torch.from_numpy(np.concatenate([one.positions, other.positions], 1))
    squared, positions = k_smallest(squared, positions, plan.k)
    own = np.maximum(one.own, other.own)
    return Found(one.number, squared.numpy(), positions.numpy(), own)


def _lots(query: Encoded | NDArray[Any]) -> Iterator[Queries]:
    """Queries, as many at a time as are looked for at once."""
    if not isinstance(query, str | os.PathLike | EncodedDataset):
        embeddings = np.asarray(query)
        if embeddings.ndim != 2:
            raise DataError(
                f'query embeddings have the shape {list(embeddings.shape)}: [n, dimension] is needed'
            )
        for number, first in enumerate(range(0, len(embeddings), _QUERIES_AT_ONCE)):
            yield Queries(number, first, embeddings[first : first + _QUERIES_AT_ONCE])
        return
    dataset = opened_encoded(query)
    starts = row_starts(dataset).tolist()
    places: list[int] = []
    number = 0
    for place in range(dataset.num_shards):
        places.append(place)
        first, stop = starts[places[0]], starts[place + 1]
        is_last = place + 1 == dataset.num_shards
        if stop > first and (is_last or starts[place + 2] - first > _QUERIES_AT_ONCE):
            yield Queries(number, first, None, dataset, tuple(places))
            number, places = number + 1, []


def opened_encoded(encoded: Encoded) -> EncodedDataset:
    """Open an encoded data set that may be open."""
    return encoded if isinstance(encoded, EncodedDataset) else open_encoded(encoded)


def check_whole(name: str, value: Any, least: int) -> None:
    """Check a number of an argument.

    Raises:
        ConfigError: it is none, or out of range.
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not least <= value <= _MANY:
        raise ConfigError(f'{name}={value!r} is not a whole number from {least} to {_MANY:,}')
