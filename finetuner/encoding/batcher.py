"""Batches over the Documents of all requests: read in some threads, embedded in others.

Documents wait in lanes, one a model. Reading threads take those whose turn it is and decode or
tokenise them; an embedding thread that is free takes a batch of what is ready, whichever requests
it came from. It waits for a fuller batch only as long as Documents of that model are being
read, and never longer than `max_wait_ms`: while a batch is embedded, the next one gathers by itself.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from docarray import Document

from finetuner.cores import num_cores
from finetuner.encoding.jobs import Embedded, Item, Job
from finetuner.encoding.lanes import Lane
from finetuner.encoding.observer import EncodingObserver
from finetuner.encoding.rate import Rate
from finetuner.engines import InferenceEngine, at_least_one
from finetuner.excepts import ConfigError, ContentError, TooLargeError, TooManyRequestsError

logger = logging.getLogger(__name__)

_MEGABYTE = 2**20


@dataclass(frozen=True)
class BatcherConfig:
    """How much waits, and for how long.

    Attributes:
        max_wait_ms: milliseconds that a Document which is ready waits for others to join it.
        max_queue: Documents that may wait, of all requests; more are refused.
        max_queue_mb: megabytes that their contents may take.
        num_readers: threads that decode and tokenise; None is one a core.
        num_embedders: batches embedded at the same time; None is one. See `plan_capacity`.

    Raises:
        ConfigError: a number is out of range.
    """

    max_wait_ms: float = 5.0
    max_queue: int = 10_000
    max_queue_mb: int = 1024
    num_readers: int | None = None
    num_embedders: int | None = None

    def __post_init__(self) -> None:
        wait = self.max_wait_ms
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait < math.inf:
            raise ConfigError(f'max_wait_ms={wait!r}: it takes milliseconds, 0 or more')
        for name in ('max_queue', 'max_queue_mb'):
            object.__setattr__(self, name, at_least_one(name, getattr(self, name)))
        for name, default in (('num_readers', num_cores()), ('num_embedders', 1)):
            number = getattr(self, name)
            number = default if number is None else at_least_one(name, number)
            object.__setattr__(self, name, number)


class Batcher:
    """Embeds the Documents of many requests at a time.

    Args:
        config: how much waits, and for how long.
        observer: hears what happens.
    """

    def __init__(
        self, config: BatcherConfig | None = None, observer: EncodingObserver | None = None
    ) -> None:
        self.config = config or BatcherConfig()
        self._observer = observer or EncodingObserver()
        self._lock = threading.Lock()
        self._may_read = threading.Condition(self._lock)
        self._may_embed = threading.Condition(self._lock)
        self._lanes: dict[int, Lane] = {}
        self._numbers = itertools.count()
        self._num_waiting = 0
        self._bytes_waiting = 0
        # how many Documents of each request were embedded, if all had been here all the time
        self._turn = 0.0
        self._num_jobs = 0
        self._rate = Rate()
        self._has_cancelled = False
        self._is_closing = False
        self._threads = [
            threading.Thread(target=run, name=f'{name}-{i}', daemon=True)
            for name, run, count in (
                ('read', self._read_forever, self.config.num_readers),
                ('embed', self._embed_forever, self.config.num_embedders),
            )
            for i in range(count or 1)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Documents that are not embedded yet."""
        return self._num_waiting

    def submit(
        self,
        docs: Sequence[Document],
        engine: InferenceEngine,
        name: str,
        batch_size: int | None = None,
    ) -> Future[Embedded]:
        """Have Documents embedded.

        Args:
            docs: Documents with a content of the model's kind each.
            engine: the model.
            name: what the observer hears it called.
            batch_size: most pictures in a batch with one of these; of texts as many tokens as so
                many of middle length have. The engine's own is the most there is, and what None
                takes.

        Returns:
            What will hold an `Embedded`. Cancelling it takes the Documents that are not embedded
            yet out again.

        Raises:
            TooLargeError: these alone are more than may wait.
            TooManyRequestsError: with those that wait already they are more than may wait.
        """
        if batch_size is not None:
            batch_size = at_least_one('batch_size', batch_size)
        engines = [engine.engine_for(doc) for doc in docs]
        job = Job(docs, engines, self._turn, batch_size)
        with self._lock:
            if self._is_closing:
                raise RuntimeError('the service is ending')
            self._refuse_too_much(job)
            if not self._num_waiting:
                self._rate.resume()
            self._num_waiting += len(docs)
            self._num_jobs += bool(docs)
            self._bytes_waiting += job.num_bytes
            for position, its_engine in enumerate(engines):
                item = Item(job.turn + position, next(self._numbers), job, position)
                self._lane_of(its_engine, name).add(item)
            self._may_read.notify(min(len(docs), len(self._threads)))
        job.future.add_done_callback(self._note_cancelled)
        self._observer.queue_changed(self._num_waiting)
        return job.future

    def close(self) -> None:
        """Let what was taken be embedded, then end the threads."""
        with self._lock:
            self._is_closing = True
            self._may_read.notify_all()
            self._may_embed.notify_all()
        for thread in self._threads:
            thread.join()

    def _refuse_too_much(self, job: Job) -> None:
        config, num_docs = self.config, len(job.docs)
        limit_bytes = config.max_queue_mb * _MEGABYTE
        if num_docs > config.max_queue or job.num_bytes > limit_bytes:
            self._observer.request_refused('size')
            raise TooLargeError(
                f'{num_docs:,} Documents with {job.num_bytes / _MEGABYTE:,.0f} MB of contents in '
                f'one request are more than the {config.max_queue:,} Documents and '
                f'{config.max_queue_mb:,} MB that may wait: send fewer at a time'
            )
        if (
            self._num_waiting + num_docs > config.max_queue
            or self._bytes_waiting + job.num_bytes > limit_bytes
        ):
            self._observer.request_refused('queue')
            rate = self._rate.per_second
            seconds = max(1, math.ceil(self._num_waiting / rate)) if rate else 1
            raise TooManyRequestsError(
                f'{self._num_waiting:,} Documents wait already, and {config.max_queue:,} with '
                f'{config.max_queue_mb:,} MB may wait: ask again in {seconds} s',
                seconds,
            )

    def _lane_of(self, engine: InferenceEngine, name: str) -> Lane:
        lane = self._lanes.get(id(engine))
        if lane is None:
            lane = self._lanes[id(engine)] = Lane(engine, name)
        return lane

    # reading

    def _read_forever(self) -> None:
        while True:
            with self._lock:
                self._drop_cancelled()
                lane = self._lane_to_read()
                while lane is None:
                    if self._is_closing and not self._num_waiting:
                        return
                    self._may_read.wait()
                    self._drop_cancelled()
                    lane = self._lane_to_read()
                items = self._without_those_over(lane.take_to_read())
                lane.num_reading += len(items)
                self._tidy(lane)
            if items:
                self._read(lane, items)

    def _lane_to_read(self) -> Lane | None:
        open_lanes = [lane for lane in self._lanes.values() if lane.may_read]
        return min(open_lanes, key=lambda lane: lane.waiting[0]) if open_lanes else None

    def _read(self, lane: Lane, items: list[Item]) -> None:
        started = time.time()
        errors: dict[int, Exception] = {}
        for i, item in enumerate(items):
            try:
                item.content = lane.engine.reader.read(item.job.docs[item.position], item.position)
            except Exception as error:  # noqa: BLE001 - its request is told, the thread goes on
                errors[i] = error
        ended, now = time.time(), time.monotonic()
        with self._lock:
            lane.num_reading -= len(items)
            for i, item in enumerate(items):
                item.ready_at = now
                item.job.note('read', started, ended)
                if i in errors:
                    self._settle(item, errors[i])
                else:
                    lane.put_ready(item)
            self._may_embed.notify()
            self._tidy(lane)
        self._observer.documents_read(len(items), len(errors), ended - started)
        if errors:
            self._observer.queue_changed(self._num_waiting)

    # embedding

    def _embed_forever(self) -> None:
        while True:
            with self._lock:
                lane, seconds = self._lane_to_embed()
                while lane is None:
                    if self._is_closing and not self._num_waiting:
                        return
                    self._may_embed.wait(seconds)
                    lane, seconds = self._lane_to_embed()
                items = self._without_those_over(lane.take_batch())
                self._turn += len(items) / max(1, self._num_jobs)
                lane.num_embedding += len(items)
                self._tidy(lane)
                self._may_read.notify_all()
                if any(each.ready for each in self._lanes.values()):
                    # what is read at one time may be more than one batch: each wakes the next
                    self._may_embed.notify()
            if items:
                self._embed(lane, items)

    def _lane_to_embed(self) -> tuple[Lane | None, float | None]:
        """The lane whose turn it is among those with a batch, or the seconds until one has."""
        now = time.monotonic()
        chosen: Lane | None = None
        wait: float | None = None
        for lane in self._lanes.values():
            if not lane.ready:
                continue
            left = lane.oldest_ready_at + self.config.max_wait_ms / 1000 - now
            if left <= 0 or lane.is_full or lane.has_all:
                if chosen is None or lane.ready[0] < chosen.ready[0]:
                    chosen = lane
            else:
                wait = left if wait is None else min(wait, left)
        return chosen, wait

    def _embed(self, lane: Lane, items: list[Item]) -> None:
        started = time.time()
        embeddings = self._try(lane.engine, items)
        ended = time.time()
        with self._lock:
            lane.num_embedding -= len(items)
            for item, embedding in zip(items, embeddings, strict=True):
                item.job.note('embed', started, ended)
                self._settle(item, embedding)
            self._rate.count(len(items))
            self._tidy(lane)
        self._observer.batch_embedded(lane.name, len(items), ended - started)
        self._observer.queue_changed(self._num_waiting)

    def _try(self, engine: InferenceEngine, items: list[Item]) -> list[np.ndarray | Exception]:
        """The embeddings of a batch; where it fails, of each by itself or why there is none."""
        try:
            inputs = engine.reader.batch([item.content for item in items])
            # as each has its own, none keeps the others' memory
            return [row.copy() for row in engine.embed(inputs)]
        except Exception as error:  # noqa: BLE001 - its request is told, the thread goes on
            if len(items) == 1:
                return [error]
            logger.warning(
                'a batch of %d Documents failed, so each goes alone: %s', len(items), error
            )
            return [self._try(engine, [item])[0] for item in items]

    # what is left

    def _settle(self, item: Item, outcome: np.ndarray | Exception) -> None:
        """Hand a job what came of one of its Documents."""
        job = item.job
        self._leave(item)
        if isinstance(outcome, ContentError):
            job.refuse(item.position, outcome)
        elif isinstance(outcome, Exception):
            job.fail(outcome)
        elif not np.isfinite(outcome).all():
            message = f'Document {item.position}: its embedding is not finite: the content holds '
            message += 'NaN, infinity or numbers too large for the model'
            job.refuse(item.position, ContentError(message))
        else:
            num_tokens = len(item.content) if isinstance(item.content, list) else 0
            job.fill(item.position, outcome, num_tokens)
        item.content = None

    def _without_those_over(self, items: list[Item]) -> list[Item]:
        left = []
        for item in items:
            if item.job.is_over:
                self._leave(item)
            else:
                left.append(item)
        return left

    def _note_cancelled(self, future: Future[Embedded]) -> None:
        # whoever cancels need not wait until all are gone through
        if future.cancelled():
            with self._lock:
                self._has_cancelled = True
                self._may_read.notify()

    def _drop_cancelled(self) -> None:
        """Let go of Documents that nobody waits for, wherever they stand in line."""
        if not self._has_cancelled:
            return
        self._has_cancelled = False
        for lane in list(self._lanes.values()):
            for item in lane.drop_those_over():
                self._leave(item)
            self._tidy(lane)

    def _leave(self, item: Item) -> None:
        self._num_waiting -= 1
        item.job.num_waiting -= 1
        self._num_jobs -= not item.job.num_waiting
        # a share of the whole, since a Document may be asked for its bytes only while it is there
        self._bytes_waiting -= item.job.num_bytes // len(item.job.docs)
        if not self._num_waiting:
            self._bytes_waiting = 0

    def _tidy(self, lane: Lane) -> None:
        """Forget a lane where nothing is left, and with it a model that nobody else holds."""
        if lane.is_empty:
            self._lanes.pop(id(lane.engine), None)
        if self._is_closing and not self._num_waiting:
            self._may_read.notify_all()
            self._may_embed.notify_all()
