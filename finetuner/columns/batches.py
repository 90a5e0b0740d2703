"""Batches declared as classes: columns of a batch are functions of columns of a dataset, or of each other.

A random column draws from a generator that is seeded by (seed, epoch, batch, column), so that an epoch
can be repeated exactly, whatever else is computed beside it.
"""

from __future__ import annotations

import graphlib
import hashlib
import inspect
import queue
import random
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetuner.columns.computing import Values
from finetuner.columns.dataset import DatasetType
from finetuner.columns.declaring import where
from finetuner.columns.rows import Rows
from finetuner.columns.types import ColumnType, column_type, shown
from finetuner.excepts import ConfigError, unknown_name

# a parameter of one of these types is given a generator
_GENERATORS = ('numpy.random.Generator', 'random.Random', 'torch.Generator')


@dataclass(frozen=True)
class _BatchFunction:
    """A column of batches.

    Attributes:
        name: of it.
        function: that computes it.
        of_rows: parameters that are lists of a dataset's column.
        of_batch: parameters that are other columns of batches.
        generators: parameters that are given a generator, with the type of it.
    """

    name: str
    function: types.FunctionType
    of_rows: tuple[str, ...]
    of_batch: tuple[str, ...]
    generators: Mapping[str, str]


@dataclass(frozen=True)
class _Plan:
    """What a class of batches declares."""

    dataset: DatasetType
    functions: Mapping[str, _BatchFunction]

    def order(self, name: str) -> list[_BatchFunction]:
        """What is computed for a column, each after those that it needs; each once."""
        wanted, waiting = set(), [name]
        while waiting:
            each = waiting.pop()
            if each not in wanted:
                wanted.add(each)
                waiting += self.functions[each].of_batch
        return [self.functions[each] for each in self.functions if each in wanted]


class BatchColumn:
    """A column of batches: gives iterators over batches of rows.

    Attributes:
        name: of it.
    """

    def __init__(self, plan: _Plan, name: str) -> None:
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

    _plan: _Plan
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
        values = Values(self._plan.dataset.store)
        seed = random.SystemRandom().getrandbits(63) if self._seed is None else self._seed
        for number, start in enumerate(range(0, len(ids), self._batch_size)):
            rows = values.of(ids[start : start + self._batch_size], names)
            computed: dict[str, Any] = {}
            for each in order:
                given = {name: [row[name] for row in rows] for name in each.of_rows}
                given.update((name, computed[name]) for name in each.of_batch)
                place = (seed, epoch, self._shard[0], number, each.name)
                for name, kind in each.generators.items():
                    given[name] = _generator(kind, place)
                computed[each.name] = each.function(**given)
            yield computed[self._name]


def batch(dataset: DatasetType) -> Callable[[type], type]:
    """Make a class one of batches: its functions are columns of batches.

    A parameter `name: list[X]` receives the values of the dataset's column of this name for the rows of
    the batch; one that is a `numpy.random.Generator`, `random.Random` or `torch.Generator` receives one
    that is seeded; any other is another column of batches.

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
        plan = _plan_of(cls, dataset, {**scope, **vars(cls)})
        kept = {
            name: BatchColumn(plan, name) if name in plan.functions else value
            for name, value in vars(cls).items()
            if name not in ('__dict__', '__weakref__')
        }
        return type(cls.__name__, cls.__bases__, kept)

    return make


def _plan_of(cls: type, dataset: DatasetType, scope: Mapping[str, Any]) -> _Plan:
    functions = {
        name: value
        for name, value in vars(cls).items()
        if isinstance(value, types.FunctionType) and not name.startswith('_')
    }
    annotations = {name: _annotations(cls, each, scope) for name, each in functions.items()}
    read = {
        name: _read(cls, each, functions, dataset, annotations) for name, each in functions.items()
    }
    try:
        graph = {name: each.of_batch for name, each in read.items()}
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        circle = ' -> '.join(error.args[1])
        function = functions[error.args[1][0]]
        raise _error(cls, function, f'it is computed from itself: {circle}') from error
    return _Plan(dataset, {name: read[name] for name in order})


def _read(
    cls: type,
    function: types.FunctionType,
    functions: Mapping[str, types.FunctionType],
    dataset: DatasetType,
    annotations: Mapping[str, Mapping[str, Any]],
) -> _BatchFunction:
    declaration = dataset.declaration
    columns = [*declaration.fields, *declaration.derived]
    mine = annotations[function.__name__]
    of_rows, of_batch, generators = [], [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = mine.get(name, Any)
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise _error(cls, function, f'it takes names of columns, not {parameter}')
        if _generator_name(annotation):
            generators[name] = _generator_name(annotation)
        elif typing.get_origin(annotation) is list and name not in functions:
            if name not in columns:
                raise _error(cls, function, unknown_name('column', name, columns))
            _check_rows(cls, function, name, annotation, declaration.type_of(name))
            of_rows.append(name)
        elif name in functions:
            given = annotations[name].get('return', Any)
            if not _fits(given, annotation):
                raise _error(
                    cls, function, f'{name} is {shown(given)}, and it takes {shown(annotation)}'
                )
            of_batch.append(name)
        elif parameter.default is parameter.empty:
            hint = ''
            if name in columns:
                hint = f'; for the column of the rows write `{name}: list[...]`'
            known = unknown_name('column of batches', name, functions)
            raise _error(cls, function, known + hint)
    return _BatchFunction(function.__name__, function, tuple(of_rows), tuple(of_batch), generators)


def _check_rows(
    cls: type, function: types.FunctionType, name: str, annotation: Any, given: ColumnType
) -> None:
    (inner,) = typing.get_args(annotation)
    if inner is Any:
        return
    try:
        wanted = column_type(inner)
    except ConfigError as error:
        raise _error(cls, function, f'{name}: {error}') from error
    if not wanted.takes(given):
        raise _error(cls, function, f'{name} is {given.name}, and it takes lists of {wanted.name}')


def _fits(given: Any, wanted: Any) -> bool:
    """Whether a value of one type is one of another, as far as that can be told."""
    if given is Any or wanted is Any or given == wanted:
        return True
    if isinstance(given, type) and isinstance(wanted, type):
        return issubclass(given, wanted)
    plain = (typing.get_origin(given) or given, typing.get_origin(wanted) or wanted)
    if all(isinstance(each, type) for each in plain):
        # what is in them is not compared
        return issubclass(*plain) and None in (typing.get_origin(given), typing.get_origin(wanted))
    return True


def _annotations(
    cls: type, function: types.FunctionType, scope: Mapping[str, Any]
) -> Mapping[str, Any]:
    try:
        return inspect.get_annotations(
            function, globals=function.__globals__, locals=dict(scope), eval_str=True
        )
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise _error(cls, function, f'an annotation cannot be read: {error}') from error


def _error(cls: type, function: types.FunctionType, what: str) -> ConfigError:
    return ConfigError(f'{where(function)}: {cls.__name__}.{function.__name__}: {what}')


# ---- random columns


def _generator_name(annotation: Any) -> str:
    """Which kind of generator a parameter is given; '' for any other."""
    module, name = getattr(annotation, '__module__', ''), getattr(annotation, '__name__', '')
    if module.startswith('numpy.random') and name == 'Generator':
        return _GENERATORS[0]
    if (module, name) == ('random', 'Random'):
        return _GENERATORS[1]
    if module.partition('.')[0] == 'torch' and name == 'Generator':
        return _GENERATORS[2]
    return ''


def _generator(kind: str, place: tuple[Any, ...]) -> Any:
    seed = int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], 'big')
    if kind == _GENERATORS[0]:
        return np.random.default_rng(seed)
    if kind == _GENERATORS[1]:
        return random.Random(seed)
    import torch

    return torch.Generator().manual_seed(seed >> 1)


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
