"""An engine whose every move a test can see: embeddings are the Documents' own tensors, doubled."""

from __future__ import annotations

import threading

import numpy as np
from docarray import Document, DocumentArray

from finetuner.artifact import ModelSpec
from finetuner.engines import InferenceEngine
from finetuner.excepts import ContentError
from finetuner.inputs import InputReader
from finetuner.models.backbones import PictureSpec

DIMENSION = 4


class PlainReader(InputReader):
    failure = 'tensors cannot be read'
    error = ContentError

    def __init__(self):
        self.may_read = threading.Event()
        self.may_read.set()

    def read(self, doc, position=None):
        if doc.tags.get('slow'):
            self.may_read.wait()
        if doc.tags.get('unreadable'):
            raise ContentError(f'Document {position} cannot be read')
        return np.asarray(doc.tensor, np.float32)

    def batch(self, items):
        return np.stack(items)

    def example(self):
        return np.zeros((1, DIMENSION), np.float32)


class PlainEngine(InferenceEngine):
    """Doubles; a batch with a number of 666 breaks as a model would that runs out of memory.

    Attributes:
        batches: the sizes of those embedded so far.
        may_embed: while it is clear, embedding waits.
        is_embedding: set when a batch has begun.
    """

    def __init__(self, batch_size=8, factor=2.0, dimension=DIMENSION, num_bytes=0):
        super().__init__(
            ModelSpec('plain', dimension, PictureSpec(4)), PlainReader(), 'cpu', batch_size
        )
        self.factor = factor
        self.num_bytes = num_bytes
        self.batches = []
        self.may_embed = threading.Event()
        self.may_embed.set()
        self.is_embedding = threading.Event()

    def embed(self, inputs):
        self.is_embedding.set()
        self.may_embed.wait()
        if (inputs == 666).any():
            raise RuntimeError('the model broke')
        self.batches.append(len(inputs))
        with np.errstate(invalid='ignore'):
            return inputs * np.float32(self.factor)


def documents(*numbers):
    return DocumentArray(
        [Document(tensor=np.full(DIMENSION, number, np.float32)) for number in numbers]
    )
