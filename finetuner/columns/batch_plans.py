"""What a class of batches declares: functions of columns of rows, and of each other."""

from __future__ import annotations

import graphlib
import hashlib
import inspect
import random
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuner.columns.dataset import DatasetType
from finetuner.columns.declaring import where
from finetuner.columns.types import ColumnType, column_type, shown
from finetuner.excepts import ConfigError, unknown_name

# a parameter of one of these types is given a generator
_GENERATORS = (
    'numpy.random.Generator',
    'random.Random',
    'torch.Generator',
    'tensorflow.random.Generator',
)
_RESERVED = frozenset({'graph'})


@dataclass(frozen=True)
class BatchFunction:
    """A column of batches.

    Attributes:
        name: of it.
        function: that computes it.
        of_rows: parameters that are lists of a dataset's column.
        of_batch: parameters that are other columns of batches.
        generators: parameters that are given a generator, with the type of it.
        returns: its type, as it is written; '' where none is said.
    """

    name: str
    function: types.FunctionType
    of_rows: tuple[str, ...]
    of_batch: tuple[str, ...]
    generators: Mapping[str, str]
    returns: str = ''


@dataclass(frozen=True)
class Plan:
    """What a class of batches declares."""

    dataset: DatasetType
    functions: Mapping[str, BatchFunction]

    def order(self, name: str) -> list[BatchFunction]:
        """What is computed for a column, each after those that it needs; each once."""
        wanted, waiting = set(), [name]
        while waiting:
            each = waiting.pop()
            if each not in wanted:
                wanted.add(each)
                waiting += self.functions[each].of_batch
        return [self.functions[each] for each in self.functions if each in wanted]


def plan_of(cls: type, dataset: DatasetType, scope: Mapping[str, Any]) -> Plan:
    """Read a class of batches.

    Args:
        cls: its functions are columns.
        dataset: that rows are of.
        scope: names that annotations may use besides those of the module.

    Raises:
        ConfigError: a function is none of a column; it names file and line.
    """
    functions = {
        name: value
        for name, value in vars(cls).items()
        if isinstance(value, types.FunctionType) and not name.startswith('_')
    }
    for name in _RESERVED & functions.keys():
        what = 'no column of batches can be called so: it is what draws them'
        raise _error(cls, functions[name], what)
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
    return Plan(dataset, {name: read[name] for name in order})


def _read(
    cls: type,
    function: types.FunctionType,
    functions: Mapping[str, types.FunctionType],
    dataset: DatasetType,
    annotations: Mapping[str, Mapping[str, Any]],
) -> BatchFunction:
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
    returns = _written(mine['return']) if 'return' in mine else ''
    return BatchFunction(
        function.__name__, function, tuple(of_rows), tuple(of_batch), generators, returns
    )


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


def _written(annotation: Any) -> str:
    try:
        return column_type(annotation).name
    except ConfigError:
        return shown(annotation)


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
    if module.partition('.')[0] == 'tensorflow' and name == 'Generator':
        return _GENERATORS[3]
    return ''


def generator_of(kind: str, place: tuple[Any, ...]) -> Any:
    """A generator of random numbers.

    Args:
        kind: name of its type, as `BatchFunction.generators` has it.
        place: seed, epoch, batch and the like, which say what it draws.
    """
    seed = int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], 'big')
    if kind == _GENERATORS[0]:
        return np.random.default_rng(seed)
    if kind == _GENERATORS[1]:
        return random.Random(seed)
    if kind == _GENERATORS[2]:
        import torch

        return torch.Generator().manual_seed(seed >> 1)
    import tensorflow

    return tensorflow.random.Generator.from_seed(seed >> 1)
