"""What the page of a finished run shows of its model: a map of embeddings, and what is nearest.

The index data of a run is embedded once, in a process of its own
(`python -m finetuner.server.exploring <run id>`), and kept in the run's directory.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from docarray import Document, DocumentArray
from numpy.typing import NDArray

from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.excepts import ConflictError, DataError, FinetunerError
from finetuner.runs.processes import run_directory, worker_environment
from finetuner.runs.records import RunRecord

if TYPE_CHECKING:
    from finetuner.inference import InferenceEngine

logger = logging.getLogger('finetuner.server')

MAX_DOCUMENTS = 1_000
_NUM_NEIGHBOURS = 12
_NUM_ENGINES = 2
METHOD = 't-SNE'


@dataclass(frozen=True)
class ExploredIndex:
    """Embedded index data of a run.

    Attributes:
        reference: the data, as `sha256:...`.
        positions: `[n]` int, of the Documents in it.
        embeddings: `[n, dimension]` float32.
        places: `[n, 2]` float32, on the map.
    """

    reference: str
    positions: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    places: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write it; there whole under its name or not at all."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = path.with_name(f'.{path.name}.{os.getpid()}.npz')
        np.savez(unfinished, reference=np.array(self.reference), **self._arrays())
        unfinished.replace(path)

    def _arrays(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ('positions', 'embeddings', 'places')}

    @classmethod
    def load(cls, path: Path) -> ExploredIndex:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(
                str(arrays['reference']),
                arrays['positions'],
                arrays['embeddings'],
                arrays['places'],
            )

    def nearest(self, embedding: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
        """Positions of the nearest Documents by cosine, with that, nearest first."""
        norms = np.linalg.norm(self.embeddings, axis=1) * np.linalg.norm(embedding)
        cosines = self.embeddings @ embedding / np.maximum(norms, 1e-12)
        order = np.argsort(-cosines, kind='stable')[:count]
        return [(int(self.positions[i]), float(cosines[i])) for i in order]


def index_reference(config: dict[str, Any]) -> str:
    """The data of a run that its model is shown on: what it was evaluated on, or trained."""
    for callback in config.get('callbacks') or ():
        options = callback['options']
        if callback['name'] == 'EvaluationCallback' and options.get('query_data'):
            return options.get('index_data') or options['query_data']
    return config['train_data']


class Explorer:
    """Embeds index data in the background and answers what is nearest.

    Args:
        settings: where all is kept.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._working: dict[int, subprocess.Popen[bytes]] = {}
        self._engines: OrderedDict[str, InferenceEngine] = OrderedDict()
        self._lock = threading.Lock()
        self._encoding = threading.Lock()

    def state(self, run: RunRecord) -> Literal['ready', 'working', 'failed']:
        """Whether the index data of a finished run is embedded; begins that when it is not."""
        path = _path(self._settings, run.id)
        if path.exists():
            return 'ready'
        with self._lock:
            process = self._working.get(run.id)
            if process is not None:
                if process.poll() is None:
                    return 'working'
                # between the look above and this one it may have written it
                return 'ready' if path.exists() else 'failed'
            if any(each.poll() is None for each in self._working.values()):
                return 'working'  # one at a time: runs want the cores too
            self._working[run.id] = self._launch(run)
        return 'working'

    def index(self, run: RunRecord) -> ExploredIndex:
        """The embedded index data; ConflictError when it is not there yet."""
        path = _path(self._settings, run.id)
        if not path.exists():
            raise ConflictError('the index data is being embedded: try again in a moment')
        return ExploredIndex.load(path)

    def nearest(
        self, client: LocalClient, run: RunRecord, doc: Document
    ) -> list[tuple[int, float]]:
        """Positions of the Documents nearest to a text or picture, with their cosines.

        Raises:
            DataError: the content cannot be read.
        """
        index = self.index(run)
        docs = DocumentArray([doc])
        with self._encoding:
            failures = self._engine(client, run.artifact_id).encode_documents(docs, 1)
        if failures:
            raise DataError(str(failures[0][1]))
        return index.nearest(np.asarray(docs[0].embedding, np.float32), _NUM_NEIGHBOURS)

    def close(self) -> None:
        """End what is being embedded."""
        for process in self._working.values():
            if process.poll() is None:
                process.terminate()

    def _engine(self, client: LocalClient, artifact_id: str) -> InferenceEngine:
        from finetuner.inference import load_engine

        if artifact_id not in self._engines:
            self._engines[artifact_id] = load_engine(
                client.find_artifact(artifact_id), device='cpu'
            )
            while len(self._engines) > _NUM_ENGINES:
                self._engines.popitem(last=False)
        self._engines.move_to_end(artifact_id)
        return self._engines[artifact_id]

    def _launch(self, run: RunRecord) -> subprocess.Popen[bytes]:
        log = _path(self._settings, run.id).with_suffix('.log')
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open('wb') as output:
            return subprocess.Popen(
                [sys.executable, '-m', 'finetuner.server.exploring', str(run.id)],
                env=worker_environment(self._settings, os.environ, 1),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )


def _path(settings: Settings, run_id: int) -> Path:
    return run_directory(settings, run_id) / 'explored.npz'


def explore(client: LocalClient, run: RunRecord) -> ExploredIndex:
    """Embed the index data of a run with its model, and lay it out on a map.

    Args:
        client: of the run's owner.
        run: a finished one.

    Raises:
        DataError: nothing of the data can be embedded.
        NotFoundError: the run, its artifact or its data is gone.
    """
    from finetuner.inference import load_engine

    reference = index_reference(run.config)
    stored = client.load_data(reference)
    positions = np.arange(len(stored))
    if len(stored) > MAX_DOCUMENTS:
        drawn = np.random.default_rng(0).choice(len(stored), MAX_DOCUMENTS, replace=False)
        positions = np.sort(drawn)
    engine = load_engine(client.find_artifact(run.artifact_id), device='cpu')
    docs = DocumentArray(stored[int(position)] for position in positions)
    broken = {position for position, _ in engine.encode_documents(docs, 32)}
    kept = [i for i in range(len(docs)) if i not in broken]
    if not kept:
        raise DataError('nothing of the index data can be embedded by this model')
    embeddings = np.stack([np.asarray(docs[i].embedding, np.float32) for i in kept])
    return ExploredIndex(reference, positions[kept], embeddings, lay_out(embeddings))


def lay_out(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Places `[n, 2]` where what is near stays near: t-SNE (van der Maaten and Hinton, 2008)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = len(embeddings)
    if count < 5:
        flat = np.zeros((count, 2), np.float32)
        flat[:, 0] = np.arange(count)
        return flat
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    scaled = embeddings / np.maximum(norms, 1e-12)
    if scaled.shape[1] > 50 and count > 50:
        scaled = PCA(50, random_state=0).fit_transform(scaled)
    perplexity = min(30.0, (count - 1) / 3)
    return TSNE(perplexity=perplexity, init='pca', random_state=0).fit_transform(scaled)


def main() -> int:
    """Embed the index data of the run whose number is the only argument."""
    settings = Settings.from_environment()
    client = LocalClient(settings)
    try:
        run = client.workspace.runs.read_run(int(sys.argv[1]))
        explored = explore(client.for_owner(run.owner or ''), run)
    except FinetunerError as error:
        print(error, file=sys.stderr)
        return 1
    explored.save(_path(settings, run.id))
    return 0


if __name__ == '__main__':
    sys.exit(main())
