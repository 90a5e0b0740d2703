"""What a class declares: stored columns, and columns that are functions of others."""

from __future__ import annotations

import graphlib
import inspect
import keyword
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from finetuner.columns.ingesting import Ingest
from finetuner.columns.types import ColumnType, column_type
from finetuner.excepts import ConfigError, DataError, unknown_name

_VERSION = '_finetuner_version'
_MOST_LETTERS = 63

Function = TypeVar('Function', bound=Callable[..., Any])


class _Missing:
    def __repr__(self) -> str:
        return 'no default'


MISSING = _Missing()


@dataclass(frozen=True)
class Field:
    """A stored column.

    Attributes:
        name: of it.
        type: of its values.
        default: of rows that give none; `MISSING` where they have to.
    """

    name: str
    type: ColumnType
    default: Any = MISSING

    @property
    def is_required(self) -> bool:
        """Whether a row must give it."""
        return self.left_out is MISSING

    @property
    def left_out(self) -> Any:
        """The value of rows that give none; `MISSING` where they have to."""
        return None if self.default is MISSING and self.type.is_optional else self.default


@dataclass(frozen=True)
class Derived:
    """A column that is a function of others.

    Attributes:
        name: of it.
        function: that computes a value.
        inputs: names of the columns that it is computed from.
        type: of its values.
        version: what its maker calls it; another one has it computed anew.
    """

    name: str
    function: types.FunctionType
    inputs: tuple[str, ...]
    type: ColumnType
    version: str = ''

    @property
    def call(self) -> Callable[..., Any]:
        """The function, called with its inputs in their order."""
        names = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]
        if names[: len(self.inputs)] == self.inputs:
            return self.function
        return lambda *values: self.function(**dict(zip(self.inputs, values, strict=True)))


@dataclass(frozen=True)
class Declaration:
    """What a class declares.

    Attributes:
        name: of the class.
        fields: stored columns by name.
        derived: the others by name, each after those that it is computed from.
    """

    name: str
    fields: Mapping[str, Field]
    derived: Mapping[str, Derived]

    def type_of(self, name: str) -> ColumnType:
        """The type of a column."""
        return self.fields[name].type if name in self.fields else self.derived[name].type

    def ancestors(self, names: Iterable[str]) -> list[str]:
        """Derived columns that these are computed from, and they themselves, in order of computing."""
        wanted: set[str] = set()
        waiting = [name for name in names if name in self.derived]
        while waiting:
            name = waiting.pop()
            if name not in wanted:
                wanted.add(name)
                waiting += [each for each in self.derived[name].inputs if each in self.derived]
        return [name for name in self.derived if name in wanted]


def version(name: object) -> Callable[[Function], Function]:
    """Say which version a derived column is of: another one has it computed anew.

    For what its code does not say, such as the release of a library or what a server answers.

    Args:
        name: anything that is written as text.
    """

    def mark(function: Function) -> Function:
        setattr(function, _VERSION, str(name))
        return function

    return mark


def declaration_of(
    cls: type, scope: Mapping[str, Any] | None = None, reserved: Iterable[str] = ()
) -> Declaration:
    """Read a class.

    Args:
        cls: with annotations for fields, and functions for derived columns.
        scope: names that annotations may use besides those of the module.
        reserved: names that no column may have.

    Raises:
        ConfigError: a name, a type or a function is none of a column; it names file and line.
    """
    reading = _Reading(cls, dict(scope or {}), frozenset(reserved))
    fields = reading.fields()
    functions = reading.functions()
    reading.check_ingests()
    seen: dict[str, str] = {}
    for name in (*fields, *functions):
        if name.casefold() in seen:
            # SQL tells no `a` from `A`
            raise ConfigError(
                f'{cls.__name__}: {seen[name.casefold()]!r} and {name!r} are one name, and columns have '
                'one each'
            )
        seen[name.casefold()] = name
    inputs = {name: reading.inputs(each, {*fields, *functions}) for name, each in functions.items()}
    derived = {
        name: reading.derived(name, functions[name], inputs[name])
        for name in reading.in_order(inputs, functions)
    }
    if not fields:
        raise ConfigError(f'{cls.__name__} has no field: write `image: File`, for example')
    declaration = Declaration(cls.__name__, fields, derived)
    reading.check_types(declaration)
    return declaration


def where(function: types.FunctionType) -> str:
    """File and line of a function."""
    return f'{function.__code__.co_filename}:{function.__code__.co_firstlineno}'


class _Reading:
    def __init__(self, cls: type, scope: dict[str, Any], reserved: frozenset[str]) -> None:
        self._cls = cls
        self._scope = {**scope, **vars(cls)}
        self._reserved = reserved

    def fields(self) -> dict[str, Field]:
        found = {}
        for name, annotation in self._annotations(self._cls, self._cls.__name__).items():
            if typing.get_origin(annotation) is typing.ClassVar or annotation is typing.ClassVar:
                continue
            self._check_name(name, self._cls.__name__)
            default = vars(self._cls).get(name, MISSING)
            function = default.function if isinstance(default, Ingest) else default
            if isinstance(function, types.FunctionType):
                raise self._error(function, 'it is a field and a function')
            try:
                kind = column_type(annotation)
                if default is not MISSING and not (default is None and kind.is_optional):
                    kind.encoded(default)
            except (ConfigError, DataError) as error:
                raise ConfigError(f'{self._cls.__name__}.{name}: {error}') from error
            found[name] = Field(name, kind, default)
        return found

    def functions(self) -> dict[str, types.FunctionType]:
        found = {}
        for name, value in vars(self._cls).items():
            if isinstance(value, types.FunctionType) and not name.startswith('_'):
                self._check_name(name, where(value))
                found[name] = value
        return found

    def check_ingests(self) -> None:
        for name, value in vars(self._cls).items():
            if not isinstance(value, Ingest):
                continue
            self._check_name(name, where(value.function))
            first = next(iter(inspect.signature(value.function).parameters), None)
            if first in ('self', 'cls'):
                raise self._error(value.function, f'functions of datasets take no {first}')

    def inputs(self, function: types.FunctionType, known: set[str]) -> tuple[str, ...]:
        found = []
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise self._error(function, f'it takes names of columns, not {parameter}')
            if name in known:
                found.append(name)
            elif parameter.default is parameter.empty:
                hint = ' (functions of columns take no self)' if name == 'self' else ''
                raise self._error(function, unknown_name('column', name, known) + hint)
        return tuple(found)

    def in_order(
        self, inputs: dict[str, tuple[str, ...]], functions: dict[str, types.FunctionType]
    ) -> list[str]:
        graph = {name: [each for each in given if each in inputs] for name, given in inputs.items()}
        try:
            return list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            # the order of the error is that of computing: each is needed by the next
            circle = ' -> '.join(error.args[1])
            raise self._error(
                functions[error.args[1][0]], f'it is computed from itself: {circle}'
            ) from error

    def derived(self, name: str, function: types.FunctionType, inputs: tuple[str, ...]) -> Derived:
        annotations = self._annotations(function, where(function))
        if 'return' not in annotations:
            raise self._error(function, 'say what it returns: `-> float`, for example')
        try:
            kind = column_type(annotations['return'])
        except ConfigError as error:
            raise self._error(function, f'it returns {error}') from error
        return Derived(name, function, inputs, kind, getattr(function, _VERSION, ''))

    def check_types(self, declaration: Declaration) -> None:
        """Each parameter that has a type takes all values of its column."""
        for each in declaration.derived.values():
            annotations = self._annotations(each.function, where(each.function))
            for name in each.inputs:
                if annotations.get(name, Any) is Any:
                    continue
                try:
                    wanted = column_type(annotations[name])
                except ConfigError as error:
                    raise self._error(each.function, f'{name}: {error}') from error
                given = declaration.type_of(name)
                if not wanted.takes(given):
                    raise self._error(
                        each.function, f'{name} is {given.name}, and it takes {wanted.name}'
                    )

    def _annotations(self, owner: Any, place: str) -> dict[str, Any]:
        module = inspect.getmodule(self._cls)
        names = {**vars(module)} if module is not None else {}
        if isinstance(owner, types.FunctionType):
            names = {**names, **owner.__globals__}
        try:
            return inspect.get_annotations(
                owner, globals=names, locals={**self._scope}, eval_str=True
            )
        except (NameError, AttributeError, SyntaxError, TypeError) as error:
            raise ConfigError(f'{place}: an annotation cannot be read: {error}') from error

    def _check_name(self, name: str, place: str) -> None:
        if (
            name.startswith('_')
            or '__' in name
            or keyword.iskeyword(name)
            or len(name) > _MOST_LETTERS
        ):
            raise ConfigError(
                f'{place}: nothing of a dataset can be called {name!r}: names have at most '
                f'{_MOST_LETTERS} letters, begin with none of `_`, and have no two of them side by side'
            )
        if name in self._reserved:
            raise ConfigError(
                f'{place}: nothing of a dataset can be called {name!r}, which datasets have for '
                'something else: choose another name'
            )

    def _error(self, function: types.FunctionType, what: str) -> ConfigError:
        return ConfigError(f'{where(function)}: {self._cls.__name__}.{function.__name__}: {what}')


__all__ = [
    'MISSING',
    'Declaration',
    'Derived',
    'Field',
    'declaration_of',
    'version',
    'where',
]
