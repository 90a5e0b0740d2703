"""The index as others use it: one process opens it, any number of threads add and search."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.excepts import ConfigError, ConflictError, TooLargeError, unknown_name
from finetuner.vector_index.checking import bytes_in, check_ids, checked_embeddings, lock_directory
from finetuner.vector_index.exact import DISTANCES, GrowingVectors, Nearest, Vectors, nearest, rank
from finetuner.vector_index.graph_keeper import GraphKeeper
from finetuner.vector_index.rows import Item, Rows, Scalar

APPROXIMATE_ABOVE = 20_000
_ATTEMPTS = 3


@dataclass(frozen=True)
class Hit:
    """What a search found.

    Attributes:
        item: the Document.
        distance: to the query; the smaller, the nearer.
    """

    item: Item
    distance: float


@dataclass(frozen=True)
class IndexState:
    """How an index stands.

    Attributes:
        count: Documents in it.
        dimension: of the embeddings; None where there was none yet.
        distance: that it measures.
        model: that made the embeddings, as the first add said; None where it said nothing.
        num_bytes: on the disk.
        approximate: whether searches without filter go through a graph.
    """

    count: int
    dimension: int | None
    distance: str
    model: str | None
    num_bytes: int
    approximate: bool


@dataclass(frozen=True)
class _Held:
    """What is searched, and what made it."""

    vectors: GrowingVectors
    model: str | None

    @property
    def dimension(self) -> int:
        return self.vectors.now.values.shape[1]


class VectorIndex:
    """Embeddings of Documents and how to find the nearest, in a directory.

    All that `add` and `delete` did when they return is on the disk, and each does all it was asked
    or nothing, whenever the process ends. Threads may share an index; of processes one may have it
    open. A forked child must not use it.
    """

    def __init__(
        self,
        directory: str | Path,
        distance: str = 'cosine',
        *,
        keep_contents: bool = False,
        max_documents: int | None = None,
        approximate_above: int = APPROXIMATE_ABOVE,
        recall: float = 0.98,
    ) -> None:
        """Open the index, or begin an empty one.

        Args:
            directory: its own, where nothing else lies.
            distance: `'cosine'`, `'euclidean'` or `'inner_product'` (1 - a·b).
            keep_contents: whether the contents of items are stored.
            max_documents: add no more than so many; None for no limit.
            approximate_above: with more Documents than so many a graph proposes candidates; it
                is built in the background, and until then all are compared.
            recall: share of the true ten nearest that the graph has to find of embeddings in the
                index; where it does not, all are compared.

        Raises:
            ConfigError: an argument is out of range, the index measures another distance, or its
                files are damaged.
            ConflictError: another process, or this one, has it open.
        """
        if distance not in DISTANCES:
            raise ConfigError(unknown_name('distance', distance, DISTANCES))
        if max_documents is not None and max_documents < 1:
            raise ConfigError(f'max_documents={max_documents} must be 1 or more')
        if approximate_above < 0 or not 0 < recall <= 1:
            raise ConfigError(
                f'approximate_above={approximate_above} must be 0 or more, and recall={recall} '
                'more than 0 and at most 1'
            )
        self.distance = distance
        self._directory = Path(directory).expanduser().absolute()
        self._keep_contents = keep_contents
        self._max_documents = max_documents
        self._changing = threading.Lock()
        self._held: _Held | None = None
        self._open = True
        with contextlib.ExitStack() as opened:
            opened.callback(lock_directory(self._directory).release)
            self._rows = Rows(self._directory / 'index.db')
            opened.callback(self._rows.close)
            self._load()
            self._graph = GraphKeeper(
                self._directory, self._rows, distance, approximate_above, recall
            )
            opened.callback(self._graph.close)
            self._graph.open(self._held.vectors.now if self._held else None)
            # all of them are closed, the last one first, also where one fails
            self._opened = opened.pop_all()

    def _load(self) -> None:
        facts = self._rows.facts()
        stored = facts.get('distance')
        if stored is None:
            self._rows.set_facts({'distance': self.distance, 'index': uuid.uuid4().hex})
        elif stored != self.distance:
            raise ConfigError(
                f'the index {self._directory} measures the distance {stored!r}, not '
                f'{self.distance!r}: open it with distance={stored!r}, or give another directory'
            )
        if 'dimension' not in facts:
            return
        vectors = GrowingVectors(int(facts['dimension']))
        for keys, values in self._rows.embeddings(int(facts['dimension'])):
            vectors.change(keys, values, np.empty(0, np.int64))
        self._held = _Held(vectors, facts.get('model') or None)

    def __len__(self) -> int:
        """Return how many Documents it holds."""
        return self._held.vectors.now.num_alive if self._held else 0

    def __enter__(self) -> VectorIndex:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Keep the graph for the next time and let another process open the index.

        No thread may be searching any more.
        """
        with self._changing:
            if not self._open:
                return
            self._open = False
            self._opened.close()

    def add(self, items: Sequence[Item], embeddings: Any, model: str | None = None) -> int:
        """Add Documents, in place of those with the same ids; all or none.

        Args:
            items: of an id given twice the last one stays.
            embeddings: `[len(items), dimension]`, any numbers; kept as float32.
            model: what made the embeddings; None where nobody says. The first that is named is
                the only one from then on until the index is empty, as is the first dimension.

        Returns:
            How many replaced one that was there before.

        Raises:
            DataError: an embedding is not finite, of length 0 under cosine, or an id or tag
                cannot be kept.
            ConflictError: the index holds embeddings of another dimension or model.
            TooLargeError: there would be more than `max_documents`.
            ServerError: the disk is full or broken.
        """
        items = list(items)
        values = checked_embeddings(embeddings, self.distance, 'Document')
        check_ids([item.id for item in items], len(values))
        last = {item.id: position for position, item in enumerate(items)}
        kept = sorted(last.values())
        items, values = [items[position] for position in kept], values[kept]
        if not self._keep_contents:
            items = [Item(item.id, item.text, item.uri, item.tags) for item in items]
        if not items:
            return 0
        with self._changing:
            self._refuse_closed()
            held = self._held
            if held is not None and held.vectors.now.num_alive:
                self._refuse_others(held, values.shape[1], model)
            else:
                held = _Held(GrowingVectors(values.shape[1]), model)
                self._graph.forget()
            self._refuse_too_many(items)
            held.vectors.reserve(len(items))
            model = held.model or model
            facts = {'dimension': str(values.shape[1]), 'model': model or ''}
            keys, removed = self._rows.replace(items, values, facts)
            held.vectors.change(keys, values, removed)
            self._held = _Held(held.vectors, model)
            self._graph.follow(held.vectors.now)
            return len(removed)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete Documents.

        Args:
            ids: those that are not there are passed over.

        Returns:
            How many were there.
        """
        ids = list(dict.fromkeys(ids))
        with self._changing:
            self._refuse_closed()
            removed = self._rows.delete(ids)
            if self._held is not None and len(removed):
                vectors = self._held.vectors
                vectors.change(np.empty(0, np.int64), vectors.now.values[:0], removed)
                self._graph.follow(vectors.now)
            return len(removed)

    def clear(self) -> int:
        """Delete all Documents, so that those of another model can be added.

        Returns:
            How many there were.
        """
        with self._changing:
            self._refuse_closed()
            count = len(self)
            self._graph.forget()
            self._rows.delete_all()
            self._held = None
            return count

    def search(
        self,
        embeddings: Any,
        limit: int = 10,
        *,
        where: Mapping[str, Scalar | Sequence[Scalar]] | None = None,
        model: str | None = None,
        with_contents: bool = False,
    ) -> list[list[Hit]]:
        """Find the Documents nearest to each query.

        Args:
            embeddings: `[num_queries, dimension]`.
            limit: at most so many for each.
            where: by tag the value it has, or a list of values of which it has one; all must
                hold. 1, 1.0 and true are one value; of a tag that is a list any member counts.
            model: what made the embeddings; None where nobody says.
            with_contents: whether hits carry their contents.

        Returns:
            For each query its hits, nearest first; equal distances in the order of adding.

        Raises:
            ConfigError: limit is less than 1, or a value of `where` is none that a filter takes.
            DataError: an embedding is not finite, or of length 0 under cosine.
            ConflictError: the index holds embeddings of another dimension or model.
        """
        if limit < 1:
            raise ConfigError(f'limit={limit} must be 1 or more')
        queries = checked_embeddings(embeddings, self.distance, 'query')
        self._refuse_closed()
        for _ in range(_ATTEMPTS):
            hits, is_complete = self._search_once(queries, limit, where, model, with_contents)
            if is_complete:
                return hits
        # others change more than this can follow: have them wait
        with self._changing:
            return self._search_once(queries, limit, where, model, with_contents)[0]

    def _search_once(
        self,
        queries: np.ndarray,
        limit: int,
        where: Mapping[str, Scalar | Sequence[Scalar]] | None,
        model: str | None,
        with_contents: bool,
    ) -> tuple[list[list[Hit]], bool]:
        """Search what is there now; false when a Document was changed before it was read."""
        held = self._held
        if held is None or not len(queries) or not held.vectors.now.num_alive:
            return [[] for _ in queries], True
        self._refuse_others(held, queries.shape[1], model)
        vectors = held.vectors.now
        rows = None
        if where:
            wanted = self._rows.keys_where(where)
            if wanted.max(initial=-1) > vectors.keys[-1]:
                return [], False  # replaced since: what is searched here has only the old one
            rows = vectors.rows_of(wanted)
        found = self._nearest(vectors, queries, limit, rows)
        keys = np.unique(np.concatenate([vectors.keys[rows] for rows, _ in found]))
        items = self._rows.read(keys.tolist(), with_contents)
        hits = [
            [
                Hit(items[key], float(distance))
                for key, distance in zip(vectors.keys[rows].tolist(), distances, strict=True)
                if key in items
            ]
            for rows, distances in found
        ]
        return hits, len(items) == len(keys)

    def _nearest(
        self, vectors: Vectors, queries: np.ndarray, limit: int, rows: np.ndarray | None
    ) -> list[Nearest]:
        graph = self._graph.now
        if rows is not None or graph is None or not graph.serves(queries.shape[1]):
            return nearest(vectors, queries, limit, self.distance, rows)
        later = np.arange(np.searchsorted(vectors.keys, graph.last_key, 'right'), len(vectors))
        later = later[vectors.alive[later]]
        wanted = min(limit, vectors.num_alive - len(later))
        latest = nearest(vectors, queries, limit, self.distance, later)
        found = []
        for query, (those, _) in zip(queries, latest, strict=True):
            proposed = vectors.rows_of(graph.candidates(query, limit))
            proposed = proposed[vectors.keys[proposed] <= graph.last_key]
            if len(proposed) < wanted:  # too many of them are deleted
                found += nearest(vectors, query[None], limit, self.distance)
                continue
            together = np.concatenate([proposed, np.sort(those)])
            found.append(rank(vectors, together, query, limit, self.distance))
        return found

    def state(self) -> IndexState:
        """How it stands now."""
        self._refuse_closed()
        held, graph = self._held, self._graph.now
        return IndexState(
            count=len(self),
            dimension=held.dimension if held else None,
            distance=self.distance,
            model=held.model if held else None,
            num_bytes=bytes_in(self._directory),
            approximate=bool(graph and graph.width),
        )

    def settle(self, seconds: float | None = None) -> bool:
        """Wait for the graph that is being built, if any.

        Returns:
            Whether none is being built any more.
        """
        return self._graph.settle(seconds)

    def _refuse_closed(self) -> None:
        if not self._open:
            raise ConflictError('the index is closed')

    def _refuse_others(self, held: _Held, dimension: int, model: str | None) -> None:
        mend = 'delete all Documents (`clear`, or /delete with all: true) and index them again'
        if model and held.model and model != held.model:
            raise ConflictError(
                f'the index holds embeddings of {held.model!r}, these are of {model!r}, and they '
                f'cannot be compared: {mend}'
            )
        if dimension != held.dimension:
            raise ConflictError(
                f'the index holds embeddings of {held.dimension} dimensions, these have '
                f'{dimension}: use the model that made them, or {mend}'
            )

    def _refuse_too_many(self, items: Sequence[Item]) -> None:
        most = self._max_documents
        if most is None or len(self) + len(items) <= most:
            return
        total = len(self) + len(items) - self._rows.ids_there([item.id for item in items])
        if total > most:
            raise TooLargeError(
                f'the index would hold {total:,} Documents, and max_documents is {most:,}: delete '
                'some first, or start it with a higher limit'
            )
