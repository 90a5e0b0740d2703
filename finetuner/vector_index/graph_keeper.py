"""Building the graph in the background, and keeping it on the disk."""

from __future__ import annotations

import logging
import threading
import uuid
from pathlib import Path

from finetuner.vector_index.exact import Vectors
from finetuner.vector_index.graph import Graph, GraphStoppedError, build_graph
from finetuner.vector_index.rows import Rows

logger = logging.getLogger('finetuner.vector_index')

_FACTS = ('graph', 'graph_digest', 'graph_key', 'graph_width')
# a share of what the graph holds: so many later embeddings are compared in order, so many deleted
# ones are in the way, before it is built further or anew
_MOST_LATER = 0.2
_MOST_DELETED = 0.25


class GraphKeeper:
    """The graph of an index, never more than some way behind it.

    A graph that is there is not changed but replaced, so searches go on with the one they have.
    The file of it is a copy to start with: the index can always be searched without.

    Attributes:
        now: the newest graph; None where there is none.
    """

    def __init__(
        self, directory: Path, rows: Rows, distance: str, approximate_above: int, recall: float
    ) -> None:
        """Begin without a graph.

        Args:
            directory: where the file goes.
            rows: where it is noted which file it is.
            distance: one of `exact.DISTANCES`.
            approximate_above: no graph is built for fewer embeddings.
            recall: what it has to find.
        """
        self.now: Graph | None = None
        self._directory = directory
        self._rows = rows
        self._distance = distance
        self._approximate_above = approximate_above
        self._recall = recall
        self._stop = threading.Event()
        self._changing = threading.RLock()
        self._builder: threading.Thread | None = None
        self._saved: Graph | None = None
        self._vectors: Vectors | None = None
        self._era = 0

    def open(self, vectors: Vectors | None) -> None:
        """Read the graph of the last time, where it is whole, and go on from it.

        Args:
            vectors: of the index.
        """
        facts = self._rows.facts()
        name, digest, key, width = (facts.get(fact, '') for fact in _FACTS)
        if name and vectors is not None and vectors.num_alive > self._approximate_above:
            graph = Graph.load(self._directory / name, digest, int(key), int(width), self._distance)
            if graph is None:
                logger.warning('the graph of the index is damaged or gone: it is built again')
            self.now = self._saved = graph
        self._remove_files(keep=name if self.now else '')
        if vectors is not None:
            self.follow(vectors)

    def follow(self, vectors: Vectors) -> None:
        """Take note of a change; build a graph in the background when it is time.

        Args:
            vectors: all there are now.
        """
        with self._changing:
            self._vectors = vectors
            if self._builder is None and not self._stop.is_set() and self._is_behind(vectors):
                self._builder = threading.Thread(
                    target=self._build, name='vector-index-graph', daemon=True
                )
                self._builder.start()

    def forget(self) -> None:
        """Drop the graph, and the one being built: the index is empty."""
        with self._changing:
            if self.now is not None:
                self._rows.set_facts({'graph': ''})
            self.now = self._vectors = None
            self._era += 1

    def settle(self, seconds: float | None = None) -> bool:
        """Wait for the graph that is being built.

        Returns:
            Whether none is being built any more.
        """
        with self._changing:
            builder = self._builder
        if builder is not None:
            builder.join(seconds)
        return builder is None or not builder.is_alive()

    def close(self) -> None:
        """Stop building, and keep what is there for the next time."""
        self._stop.set()
        self.settle()
        self._save()

    def _is_behind(self, vectors: Vectors) -> bool:
        graph = self.now
        if vectors.num_alive <= self._approximate_above:
            return False
        return (
            graph is None
            or self._num_later(graph, vectors) > _MOST_LATER * len(graph)
            or (self._num_deleted(graph, vectors) > _MOST_DELETED * len(graph))
        )

    def _num_later(self, graph: Graph, vectors: Vectors) -> int:
        return int((vectors.alive & (vectors.keys > graph.last_key)).sum())

    def _num_deleted(self, graph: Graph, vectors: Vectors) -> int:
        return len(graph) - int((vectors.alive & (vectors.keys <= graph.last_key)).sum())

    def _build(self) -> None:
        """Build until it is not behind any more; the body of a thread."""
        while True:
            with self._changing:
                vectors = self._vectors
                if vectors is None or self._stop.is_set() or not self._is_behind(vectors):
                    self._builder = None
                    return
                base, era = self.now, self._era
            try:
                graph = self._built(vectors, base)
                with self._changing:
                    if era == self._era:
                        self.now = graph
                self._save()
            except GraphStoppedError:
                continue
            except ModuleNotFoundError as error:
                logger.warning(
                    'the index has %d Documents and compares all at each search: %s is missing, '
                    'pip install "finetuner[serve]"', vectors.num_alive, error.name,
                )  # fmt: skip
                self._stop.set()
            except Exception as error:  # whatever it is: without a graph all are compared
                logger.warning(
                    'the graph of the index cannot be built or kept; the next change tries again: %s: %s',
                    type(error).__name__, error, exc_info=True,
                )  # fmt: skip
                with self._changing:
                    self._builder = None
                return

    def _built(self, vectors: Vectors, base: Graph | None) -> Graph:
        if base is not None and self._num_deleted(base, vectors) > _MOST_DELETED * len(base):
            base = None
        graph = build_graph(vectors, self._distance, self._recall, base, self._stop)
        if base is not None and base.width and not graph.width:
            # it finds less than it did: its bytes were divided for other embeddings
            graph = build_graph(vectors, self._distance, self._recall, None, self._stop)
        return graph

    def _save(self) -> None:
        graph = self.now
        if graph is None or graph is self._saved:
            return
        name = f'graph-{uuid.uuid4().hex}.faiss'
        try:
            digest = graph.save(self._directory / name)
        except OSError as error:
            logger.warning('the graph of the index cannot be kept: %s', error)
            return
        values = (name, digest, str(graph.last_key), str(graph.width))
        with self._changing:
            if self.now is graph:
                self._rows.set_facts(dict(zip(_FACTS, values, strict=True)))
                self._saved = graph
                self._remove_files(keep=name)

    def _remove_files(self, keep: str) -> None:
        for path in self._directory.glob('graph-*'):
            if path.name != keep:
                path.unlink(missing_ok=True)
