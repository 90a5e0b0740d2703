"""A search of one's own in place of ours: any store that takes ids, embeddings and tags.

In a Flow behind the encoder: `uses: NumpyIndexer` and `py_modules: [own_index.py]`.
"""

# no postponed annotations: Jina reads those of endpoints as types
import numpy as np
from docarray import Document, DocumentArray
from jina import Executor, requests


class NumpyIndexer(Executor):
    """Keeps everything in memory; a client of a vector database would stand where the dict does."""

    def __init__(self, **kwargs):
        """Begin with nothing."""
        super().__init__(**kwargs)
        self.held = {}

    @requests(on='/index')
    def index(self, docs: DocumentArray, **_):
        """Store what was embedded, by id."""
        for doc in docs:
            if doc.embedding is not None:  # else its tag finetuner_error says why
                unit = doc.embedding / np.linalg.norm(doc.embedding)
                self.held[doc.id] = (unit, doc.text, dict(doc.tags))
        return DocumentArray([Document(id=doc.id, tags=doc.tags) for doc in docs])

    @requests(on='/search')
    def search(self, docs: DocumentArray, parameters: dict, **_):
        """Give each query its nearest."""
        ids, vectors = list(self.held), np.array([unit for unit, _, _ in self.held.values()])
        for doc in filter(lambda doc: doc.embedding is not None, docs):
            unit = doc.embedding / np.linalg.norm(doc.embedding)
            distances = 1 - vectors.reshape(len(ids), len(unit)) @ unit  # none before /index
            for row in np.argsort(distances)[: int(parameters.get('limit', 10))]:
                _, text, tags = self.held[ids[row]]
                match = Document(id=ids[row], text=text, tags=tags)
                match.scores['cosine'].value = float(distances[row])
                doc.matches.append(match)
            doc.pop('embedding', 'blob')
        return docs
