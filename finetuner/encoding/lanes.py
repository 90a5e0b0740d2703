"""The Documents that wait for one model: to be read, and read."""

from __future__ import annotations

import bisect
import heapq
import itertools

from finetuner.encoding.jobs import Item
from finetuner.engines import InferenceEngine

# texts are tokenised in less time than it takes to ask for the next one
_TEXTS_AT_ONCE = 16


class Lane:
    """What waits for one model, in order of turn; used under the batcher's lock.

    Attributes:
        engine: the model.
        name: what others call it.
        waiting: a heap of what is not read yet.
        ready: sorted, what is read.
        num_reading: how many are being read.
        num_embedding: how many are being embedded.
    """

    def __init__(self, engine: InferenceEngine, name: str) -> None:
        """Nothing waits yet."""
        self.engine = engine
        self.name = name
        self.waiting: list[Item] = []
        self.ready: list[Item] = []
        self.num_reading = 0
        self.num_embedding = 0
        batches = engine.reader.batches_at_once
        self._read_at_once = 1 if batches == 1 else _TEXTS_AT_ONCE
        # as many as make a good choice of batches, and for pictures the next one beside the current
        self._window = engine.batch_size * batches
        self._most_read = engine.batch_size * (batches + 1)

    @property
    def may_read(self) -> bool:
        """Whether there is something to read, and room for it."""
        return bool(self.waiting) and len(self.ready) + self.num_reading < self._most_read

    @property
    def has_all(self) -> bool:
        """Whether nothing is on its way that could join what is ready."""
        return not self.waiting and not self.num_reading

    @property
    def is_full(self) -> bool:
        """Whether a batch would have no room for more."""
        return len(self.ready) >= self._window

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of all that came."""
        return self.has_all and not self.ready and not self.num_embedding

    @property
    def oldest_ready_at(self) -> float:
        """When the first of those that are ready was read."""
        return self.ready[0].ready_at

    def add(self, item: Item) -> None:
        """Let a Document wait."""
        heapq.heappush(self.waiting, item)

    def take_to_read(self) -> list[Item]:
        """Those whose turn it is to be read."""
        count = min(self._read_at_once, len(self.waiting))
        return [heapq.heappop(self.waiting) for _ in range(count)]

    def put_ready(self, item: Item) -> None:
        """A Document was read."""
        bisect.insort(self.ready, item)

    def take_batch(self) -> list[Item]:
        """A batch with the Document in it whose turn it is, and with those that go best with it."""
        asked = self.ready[0].job.batch_size
        # who asks for smaller batches gets them without others in them
        alike = (item for item in self.ready if item.job.batch_size == asked)
        window = list(itertools.islice(alike, self._window))
        size = min(asked or self.engine.batch_size, self.engine.batch_size)
        contents = [item.content for item in window]
        places = next(each for each in self.engine.reader.batches(contents, size) if 0 in each)
        chosen = [window[place] for place in places]
        taken = {item.number for item in chosen}
        self.ready = [item for item in self.ready if item.number not in taken]
        return chosen

    def drop_those_over(self) -> list[Item]:
        """Take out the Documents whose requests nobody waits for any more."""
        over = [item for item in (*self.waiting, *self.ready) if item.job.is_over]
        if over:
            self.waiting = [item for item in self.waiting if not item.job.is_over]
            heapq.heapify(self.waiting)
            self.ready = [item for item in self.ready if not item.job.is_over]
        return over
