"""What one request asks the batcher for, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from docarray import Document

from finetuner.engines import InferenceEngine
from finetuner.excepts import FinetunerError


@dataclass
class Embedded:
    """The embeddings of a request's Documents.

    Attributes:
        embeddings: float32 `[dimension]` for each Document, None where it failed.
        failures: (position, error) of each Document that could not be read, in order.
        num_tokens: of its texts, as many as the model was given.
        stages: when its Documents were waiting (`queue`), being read (`read`) and being embedded
            (`embed`): from the first of them to the last, seconds since the epoch.
    """

    embeddings: list[np.ndarray | None]
    failures: list[tuple[int, FinetunerError]] = field(default_factory=list)
    num_tokens: int = 0
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)


class Job:
    """Documents of one request on their way through the batcher.

    Only the batcher touches it, under its lock; `future` is for whoever waits.

    Attributes:
        docs: what is embedded.
        engines: which model embeds each of them.
        turn: rank of its first Document among those of all requests.
        num_waiting: Documents of it that are not embedded yet.
        batch_size: most of its pictures in a batch, None for the engine's own.
        future: gets an `Embedded`.
    """

    def __init__(
        self,
        docs: Sequence[Document],
        engines: Sequence[InferenceEngine],
        turn: float,
        batch_size: int | None,
    ) -> None:
        """Nothing is read yet."""
        self.docs = docs
        self.engines = engines
        self.turn = turn
        self.num_waiting = len(docs)
        self.num_bytes = sum(bytes_of(doc) for doc in docs)
        self.batch_size = batch_size
        self.future: Future[Embedded] = Future()
        self._came_at = time.time()
        self._result = Embedded([None] * len(docs))
        self._num_missing = len(docs)
        self._is_over = not docs
        if self._is_over:
            self.future.set_result(self._result)

    @property
    def is_over(self) -> bool:
        """Whether nobody waits any more: it is answered, or whoever asked has gone."""
        if not self._is_over and self.future.cancelled():
            self._is_over = True
        return self._is_over

    def note(self, stage: str, start: float, end: float) -> None:
        """Some of the Documents were in a stage."""
        stages = self._result.stages
        if not stages:
            stages['queue'] = (self._came_at, start)
        stages[stage] = (stages[stage][0] if stage in stages else start, end)

    def fill(self, position: int, embedding: np.ndarray, num_tokens: int = 0) -> None:
        """One Document is embedded."""
        self._result.embeddings[position] = embedding
        self._result.num_tokens += num_tokens
        self._finish_one()

    def refuse(self, position: int, error: FinetunerError) -> None:
        """One Document cannot be read; the others go on."""
        self._result.failures.append((position, error))
        self._finish_one()

    def fail(self, error: BaseException) -> None:
        """Something is wrong that is no fault of a Document."""
        if not self._is_over:
            self._is_over = True
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)

    def _finish_one(self) -> None:
        self._num_missing -= 1
        if not self._num_missing and not self._is_over:
            self._is_over = True
            self._result.failures.sort(key=lambda failure: failure[0])
            if self.future.set_running_or_notify_cancel():
                self.future.set_result(self._result)


@dataclass(order=True, slots=True)
class Item:
    """One Document of a job; they are ordered by whose turn it is.

    A request that asks for one picture is not kept waiting by one that asked for a thousand before:
    a Document's rank is its place in its request, plus what each of the others had been given when
    it came (start-time fair queueing, Goyal et al. 1996).
    """

    turn: float
    number: int
    job: Job = field(compare=False)
    position: int = field(compare=False)
    content: Any = field(compare=False, default=None)
    ready_at: float = field(compare=False, default=0.0)


def bytes_of(doc: Document) -> int:
    """About what a waiting Document takes of memory."""
    size = len(doc.text or '') + len(doc.blob or b'')
    tensor = doc.tensor
    return size + (0 if tensor is None else int(getattr(tensor, 'nbytes', 0)))
