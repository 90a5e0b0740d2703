"""An embedded, persisted index of embeddings: add, replace, delete, find the nearest.

SQLite holds the truth: each Document's id, embedding, text, uri and tags. What searches run on is
made of it when the index is opened: the embeddings as one matrix in memory, compared exactly, and
above some thousands of them a graph (HNSW) that proposes candidates. Whatever proposes, distances
are computed in float64 from the embeddings as they were given, so that exact and approximate
searches, before and after a restart, tell the same distance.

The graph is FAISS's, over vectors of one byte a dimension. Compared with usearch 2.26 on 20,000
vectors of 384 dimensions and one core, it was built 1.8 times as fast, answered 6 times as fast at
the same recall (8 bits each), gives the interpreter's lock free while it builds and searches, and
runs on Python 3.10, which usearch no longer does; both are free (MIT, Apache 2.0) and have wheels
for the usual systems. usearch can remove from its graph and map it into memory, and FAISS's HNSW
cannot remove; but here a graph never changes once it is built: what was deleted is passed over,
what was added since is compared exactly, and when either grows a new graph takes its place. So
searches need no lock beside adds, and a filtered search compares what the filter leaves, exactly.
"""

from finetuner.vector_index.index import Hit, IndexState, VectorIndex
from finetuner.vector_index.rows import Item

__all__ = ['Hit', 'IndexState', 'Item', 'VectorIndex']
