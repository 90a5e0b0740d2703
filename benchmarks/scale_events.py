"""A simulation of runs that wait for slots, and of a data set that workers encode shard by shard.

Time is simulated by SimPy: nothing here computes embeddings or waits. `scale_simulation.py` feeds it
with what `scale_costs.py` measured.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import math
import random
from collections.abc import Callable, Generator
from typing import Any

import simpy
from scale_model import Machines, Outcome, Work

_Events = Generator[Any, Any, None]
# threads of a worker that decode, as in `finetuner.engines`
_MOST_DECODERS = 8


def simulate_queue(
    arrivals_per_second: float,
    duration: Callable[[random.Random], float],
    num_slots: int,
    num_runs: int,
    seed: int = 0,
) -> list[float]:
    """Let runs arrive at random and wait for a slot, first come, first served.

    Args:
        arrivals_per_second: the mean; the times between them are exponential.
        duration: seconds of a run, drawn from a generator of random numbers.
        num_slots: runs that are computed at a time.
        num_runs: how many arrive.
        seed: of all draws.

    Returns:
        Seconds that each run waited, in the order of their arrival.
    """
    draw = random.Random(seed)
    env = simpy.Environment()
    slots = simpy.Resource(env, num_slots)
    waits = [0.0] * num_runs

    def run(number: int, seconds: float) -> _Events:
        arrived = env.now
        with slots.request() as request:
            yield request
            waits[number] = env.now - arrived
            yield env.timeout(seconds)

    def arrive() -> _Events:
        for number in range(num_runs):
            yield env.timeout(draw.expovariate(arrivals_per_second))
            env.process(run(number, duration(draw)))

    env.process(arrive())
    env.run()
    return waits


class SharedStorage:
    """A storage whose bandwidth is divided evenly among all transfers of the moment."""

    def __init__(self, env: simpy.Environment, total: float, each: float = math.inf) -> None:
        """Take its limits.

        Args:
            env: of the simulation.
            total: bytes a second of all transfers.
            each: bytes a second at most of one.
        """
        self._env, self._total, self._each = env, total, each
        self.bytes_moved = 0.0
        self._moved = 0.0  # by a transfer that has been there all the time
        self._since = 0.0
        self._waiting: list[tuple[float, int, simpy.Event]] = []
        self._numbers = itertools.count()
        self._version = 0

    def move(self, num_bytes: float) -> _Events:
        """Read or write so many bytes, to be yielded from."""
        if num_bytes <= 0 or math.isinf(min(self._total, self._each)):
            self.bytes_moved += num_bytes
            return
        self._advance()
        done = self._env.event()
        entry = (self._moved + num_bytes, next(self._numbers), done)
        heapq.heappush(self._waiting, entry)
        self._plan()
        try:
            yield done
        except simpy.Interrupt:
            self._advance()
            if not done.triggered:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
                self._plan()
            raise

    def _rate(self) -> float:
        return min(self._each, self._total / len(self._waiting))

    def _advance(self) -> None:
        """Count what was moved since the last change."""
        if self._waiting:
            step = (self._env.now - self._since) * self._rate()
            self._moved += step
            self.bytes_moved += step * len(self._waiting)
        self._since = self._env.now

    def _plan(self) -> None:
        """Wake up when the next transfer is through, unless something changes before."""
        self._version += 1
        if not self._waiting:
            return
        version = self._version
        left = max(0.0, self._waiting[0][0] - self._moved) / self._rate()
        self._env.timeout(left).callbacks.append(lambda _: self._finish(version))

    def _finish(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        # rounding must not keep the one back that this is about
        self._moved = max(self._moved, self._waiting[0][0])
        while self._waiting and self._waiting[0][0] <= self._moved:
            heapq.heappop(self._waiting)[2].succeed()
        self._plan()


class _Node:
    """Workers that fail together, share cores, and slow one another's cores down."""

    def __init__(self, env: simpy.Environment, machines: Machines) -> None:
        self.cores = simpy.Resource(env, machines.cores)
        self._crowded = machines.crowded_speed

    def speed(self) -> float:
        """Of a core that begins to compute now, relative to when it is alone."""
        if self.cores.capacity == 1:
            return 1.0
        others = (self.cores.count - 1) / (self.cores.capacity - 1)
        return 1.0 - (1.0 - self._crowded) * others


class _Encoding:
    def __init__(self, work: Work, machines: Machines, num_ahead: int, seed: int) -> None:
        self._work, self._machines, self._num_ahead = work, machines, num_ahead
        # as many threads decode as there are cores for a worker, eight at most
        threads = machines.cores // machines.workers_per_node
        self._num_decoders = max(1, min(_MOST_DECODERS, threads))
        self._draw = random.Random(seed)
        self._shards = work.shards
        self._env = simpy.Environment()
        self._storage = SharedStorage(self._env, machines.storage_bytes, machines.client_bytes)
        self._driver = simpy.Resource(self._env)
        self._pending = collections.deque(range(len(self._shards)))
        self._is_done = self._env.event()
        self._is_more = self._env.event()
        self._busy = dict.fromkeys(('cores', 'accelerators', 'driver'), 0.0)
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Encode everything."""
        if self._shards:
            self._env.process(self._drive())
            self._env.run(until=self._is_done)
        machines, seconds = self._machines, self._env.now
        capacity = {
            'cores': machines.num_nodes * machines.cores * seconds,
            'accelerators': machines.num_workers * machines.has_accelerator * seconds,
            'driver': seconds,
        }
        shares = {k: self._busy[k] / capacity[k] if capacity[k] else 0.0 for k in capacity}
        moved = machines.storage_bytes * seconds
        shares['storage'] = self._storage.bytes_moved / moved if moved else 0.0
        self.outcome.seconds, self.outcome.busy = seconds, shares
        return self.outcome

    def _drive(self) -> _Events:
        self._busy['driver'] += self._machines.plan_seconds
        yield self._env.timeout(self._machines.plan_seconds)
        for _ in range(self._machines.num_nodes):
            self._env.process(self._live())

    def _live(self) -> _Events:
        """A node: its workers, until it fails; then again."""
        while not self._is_done.triggered:
            node = _Node(self._env, self._machines)
            workers = [
                self._env.process(self._work_until_done(node))
                for _ in range(self._machines.workers_per_node)
            ]
            if math.isinf(self._machines.mean_life_seconds):
                return
            life = self._draw.expovariate(1 / self._machines.mean_life_seconds)
            yield self._env.timeout(life) | self._is_done
            if self._is_done.triggered:
                return
            self.outcome.failures += 1
            for worker in workers:
                if worker.is_alive:
                    worker.interrupt()
            yield self._env.timeout(self._machines.repair_seconds)

    def _work_until_done(self, node: _Node) -> _Events:
        shard = None
        accelerator = simpy.Resource(self._env) if self._machines.has_accelerator else None
        try:
            yield self._env.timeout(self._machines.start_seconds)
            while not self._is_done.triggered:
                if not self._pending:
                    yield self._is_more | self._is_done
                    continue
                shard = self._pending.popleft()
                with self._driver.request() as turn:
                    yield turn
                    yield self._env.timeout(self._machines.dispatch_seconds)
                    self._busy['driver'] += self._machines.dispatch_seconds
                yield from self._encode(shard, node, accelerator)
                self.outcome.written[shard] += 1
                shard = None
                if len(self.outcome.written) == len(self._shards):
                    self._is_done.succeed()
        except simpy.Interrupt:
            if shard is not None:
                self.outcome.repeated += 1
                self._pending.appendleft(shard)
                self._is_more.succeed()
                self._is_more = self._env.event()

    def _encode(self, shard: int, node: _Node, accelerator: simpy.Resource | None) -> _Events:
        """One thread reads a lot, embeds the one before it and writes that; others decode."""
        work, left = self._work, self._shards[shard]
        held: collections.deque[tuple[int, simpy.Process]] = collections.deque()
        try:
            while left or held:
                while left and len(held) <= self._num_ahead:
                    lot = min(left, work.rows_per_lot)
                    left -= lot
                    yield from self._storage.move(lot * work.bytes_in)
                    yield from self._compute(node, lot * work.read_seconds)
                    held.append((lot, self._env.process(self._decode(node, lot))))
                    self.outcome.most_held = max(self.outcome.most_held, len(held))
                lot, decoded = held[0]
                yield decoded
                yield from self._compute(node, lot * work.embed_seconds, accelerator)
                yield from self._compute(node, lot * work.write_seconds)
                yield from self._storage.move(lot * work.bytes_out)
                held.popleft()
            yield from self._compute(node, work.shard_seconds)
        except simpy.Interrupt:
            for _, decoded in held:
                if decoded.is_alive:
                    decoded.interrupt()
            raise

    def _decode(self, node: _Node, lot: int) -> _Events:
        seconds = lot * self._work.decode_seconds / self._num_decoders
        threads: list[simpy.Process] = []
        try:
            if self._num_decoders == 1:
                yield from self._compute(node, seconds)
                return
            for _ in range(self._num_decoders):
                threads.append(self._env.process(self._decode_part(node, seconds)))
            yield self._env.all_of(threads)
        except simpy.Interrupt:
            for thread in threads:
                if thread.is_alive:
                    thread.interrupt()

    def _decode_part(self, node: _Node, seconds: float) -> _Events:
        with contextlib.suppress(simpy.Interrupt):
            yield from self._compute(node, seconds)

    def _compute(
        self, node: _Node, seconds: float, accelerator: simpy.Resource | None = None
    ) -> _Events:
        if seconds <= 0:
            return
        with (accelerator or node.cores).request() as turn:
            yield turn
            begun = self._env.now
            try:
                yield self._env.timeout(seconds if accelerator else seconds / node.speed())
            finally:
                self._busy['accelerators' if accelerator else 'cores'] += self._env.now - begun


def simulate_encoding(work: Work, machines: Machines, num_ahead: int = 1, seed: int = 0) -> Outcome:
    """Encode a data set: shards go to workers that are free, and again if their node fails.

    Args:
        work: the data set.
        machines: that encode it.
        num_ahead: lots that a worker reads before the one that it embeds.
        seed: of the failures.

    Returns:
        How long it took, and what was busy.
    """
    return _Encoding(work, machines, num_ahead, seed).run()
