"""Batches declared as classes: columns of a batch are functions of columns of a dataset, or of each other.

A random column draws from a generator that is seeded by (seed, epoch, batch, column), so that an epoch
can be repeated exactly, whatever else is computed beside it.
"""

from __future__ import annotations

import functools
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetuner.columns.batch_plans import Plan, generator_of, plan_of
from finetuner.columns.computing import Values
from finetuner.columns.dataset import DatasetType
from finetuner.columns.picturing import graph_of_batches
from finetuner.columns.rows import Rows
from finetuner.columns.types import shown
from finetuner.excepts import ConfigError


class BatchColumn:
    """A column of batches: gives iterators over batches of rows.

    Attributes:
        name: of it.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.name = name
        self._plan = plan

    def range(self, start: int, stop: int, batch_size: int) -> Batches:
        """Batches of the rows at places start to stop, the last of which may be smaller.

        Args:
            start: place of the first row.
            stop: place after the last; what is beyond the last row is left out.
            batch_size: rows a batch.

        Raises:
            ConfigError: a number is out of range.
        """
        for name, value in (('start', start), ('stop', stop)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f'{name}={value!r}: it is the place of a row, 0 or more')
        return self._batches(lambda rows: rows[start:stop], batch_size)

    def all(self, batch_size: int) -> Batches:
        """Batches of all rows."""
        return self._batches(lambda rows: rows, batch_size)

    def where(self, batch_size: int, **conditions: Any) -> Batches:
        """Batches of the rows that `Rows.where` finds."""
        return self._batches(lambda rows: rows.where(**conditions), batch_size)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function by itself, as in a test of it."""
        return self._plan.functions[self.name].function(*args, **kwargs)

    def __repr__(self) -> str:
        """Its name."""
        return f'<column {self.name} of batches of {self._plan.dataset.__name__}>'

    def _batches(self, choose: Callable[[Rows], Rows], batch_size: int) -> Batches:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f'batch_size={batch_size!r}: it is 1 or more')
        return Batches(self._plan, self.name, choose, batch_size)


@dataclass(frozen=True)
class Batches:
    """Batches of a column; each time that it is iterated over is an epoch.

    Rows are those that are there when an epoch begins.
    """

    _plan: Plan
    _name: str
    _choose: Callable[[Rows], Rows]
    _batch_size: int
    _seed: int | None = None
    _is_shuffled: bool = False
    _num_ahead: int = 0
    _shard: tuple[int, int] = (0, 1)
    _first_epoch: int = 0

    def randomize(self, seed: int | None = None) -> Batches:
        """Rows in another order in each epoch.

        Args:
            seed: the same one gives the same epochs; None takes one by chance.
        """
        given = random.SystemRandom().getrandbits(63) if seed is None else _whole('seed', seed, 0)
        return replace(self, _seed=given, _is_shuffled=True)

    def seeded(self, seed: int) -> Batches:
        """Rows in their order, with random columns that are drawn by this seed."""
        return replace(self, _seed=_whole('seed', seed, 0))

    def prefetch(self, num_batches: int) -> Batches:
        """Compute batches ahead, in a thread."""
        return replace(self, _num_ahead=_whole('num_batches', num_batches, 0))

    def shard(self, rank: int, world: int) -> Batches:
        """One of several equal shares of the rows, as each of several processes takes.

        Shares differ by one row at most; all together are all rows, each once.

        Args:
            rank: which of them, 0 to world - 1.
            world: how many.
        """
        world = _whole('world', world, 1)
        rank = _whole('rank', rank, 0)
        if rank >= world:
            raise ConfigError(f'rank={rank} of world={world}: it is 0 to {world - 1}')
        return replace(self, _shard=(rank, world))

    def from_epoch(self, number: int) -> Batches:
        """Begin with this epoch, counted from 0, as where training is resumed."""
        return replace(self, _first_epoch=_whole('number', number, 0))

    def __len__(self) -> int:
        """How many batches an epoch has now."""
        return -(-len(self._ids(self._first_epoch)) // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch."""
        epoch = self._first_epoch + self._count()
        batches = self._epoch(epoch)
        return _ahead(batches, self._num_ahead) if self._num_ahead else batches

    # below

    def _count(self) -> int:
        """How many epochs were begun."""
        begun = self.__dict__.get('_num_begun', 0)
        object.__setattr__(self, '_num_begun', begun + 1)
        return begun

    def _ids(self, epoch: int) -> Sequence[int]:
        ids = self._choose(self._plan.dataset.rows).ids
        if self._is_shuffled:
            order = np.random.default_rng([self._seed or 0, epoch]).permutation(len(ids))
            ids = [ids[place] for place in order]
        rank, world = self._shard
        return ids[rank::world]

    def _epoch(self, epoch: int) -> Iterator[Any]:
        ids = self._ids(epoch)
        order = self._plan.order(self._name)
        names = list(dict.fromkeys(name for each in order for name in each.of_rows))
        values = Values(self._plan.dataset.store, names)
        seed = random.SystemRandom().getrandbits(63) if self._seed is None else self._seed
        for number, columns in enumerate(values.batches(ids, self._batch_size)):
            computed: dict[str, Any] = {}
            for each in order:
                given = {name: list(columns[name]) for name in each.of_rows}
                given.update((name, computed[name]) for name in each.of_batch)
                place = (seed, epoch, self._shard[0], number, each.name)
                for name, kind in each.generators.items():
                    given[name] = generator_of(kind, place)
                computed[each.name] = each.function(**given)
            yield computed[self._name]


def batch(dataset: DatasetType) -> Callable[[type], type]:
    """Make a class one of batches: its functions are columns of batches.

    A parameter `name: list[X]` receives the values of the dataset's column of this name for the rows of
    the batch; one that is a `numpy.random.Generator`, `random.Random`, `torch.Generator` or
    `tensorflow.random.Generator` receives one that is seeded; any other is another column of batches.

    Args:
        dataset: that the rows are of.

    Raises:
        ConfigError: a parameter is no column, a type does not fit, or columns need each other in a
            circle; it names file and line.
    """
    if not isinstance(dataset, DatasetType):
        raise ConfigError(f'@batch takes a dataset, not {shown(dataset)}: @batch(Dataset)')
    scope = dict(sys._getframe(1).f_locals)

    def make(cls: type) -> type:
        plan = plan_of(cls, dataset, {**scope, **vars(cls)})
        kept = {
            name: BatchColumn(plan, name) if name in plan.functions else value
            for name, value in vars(cls).items()
            if name not in ('__dict__', '__weakref__')
        }
        kept['graph'] = staticmethod(functools.partial(graph_of_batches, cls.__name__, plan))
        return type(cls.__name__, cls.__bases__, kept)

    return make


# ---- ahead of time

_END = object()


def _ahead(batches: Iterator[Any], num_ahead: int) -> Iterator[Any]:
    """The same, some of them computed before they are asked for."""
    waiting: queue.Queue[Any] = queue.Queue(num_ahead)
    is_over = threading.Event()

    def put(item: Any) -> bool:
        while not is_over.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for each in batches:
                if not put((each, None)):
                    return
            put((_END, None))
        except BaseException as error:  # noqa: BLE001 - raised again where batches are asked for
            put((_END, error))

    thread = threading.Thread(target=run, name='batches', daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        is_over.set()
        thread.join()


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f'{name}={value!r}: it is a whole number, {least} or more')
    return value
