"""What a function computes, as a key: it changes when the function does, or a function that it calls.

The key is taken from the code that runs, not from the file that it once came from: that may have been
edited since. Where the file still says the same, its syntax tree is taken instead of the bytecode, so
that neither comments nor another Python change the key.
"""

from __future__ import annotations

import ast
import builtins
import copy
import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import linecache
import os
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

_LIBRARIES = tuple(
    f'{Path(path).resolve()}{os.sep}'
    for path in (
        *(sysconfig.get_path(name) for name in ('stdlib', 'purelib', 'platlib')),
        # this one, wherever it runs from
        str(Path(__file__).parent.parent),
    )
)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, PurePath)
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_LOADS = {'LOAD_GLOBAL', 'LOAD_NAME'}
_ATTRIBUTES = {'LOAD_ATTR', 'LOAD_METHOD'}


def fingerprint(function: Callable[..., Any]) -> str:
    """The key of a function: of its code, defaults and closure, and of the functions it calls.

    What it uses of its module counts: functions and classes by their code, numbers, texts, containers
    and arrays by their values, models by their weights. Libraries count by name, and so does anything
    else, such as an open file, by its class.

    Args:
        function: written in Python.

    Returns:
        64 hexadecimal digits.
    """
    reading = _Reading()
    reading.function(function)
    return reading.digest.hexdigest()


class _Reading:
    """Feeds all that a function depends on to a digest."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        # what was read already counts by its number: functions call each other in circles
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []

    def function(self, function: Any) -> None:
        """Read a function with all that it uses."""
        if self._is_known(function):
            return
        self._put('function', _text_of(function))
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._put('closure', name)
            try:
                self.value(cell.cell_contents)
            except ValueError:
                self._put('empty')
        for chain in sorted(_globals_of(function.__code__)):
            self._put('global', '.'.join(chain))
            self._chain(function.__globals__, chain)

    def value(self, value: Any) -> None:
        """Read anything that a function may use."""
        if isinstance(value, enum.Enum):
            self._put('enum', type(value).__qualname__, value.name)
        elif isinstance(value, _PLAIN):
            self._put(type(value).__name__, repr(value))
        elif isinstance(value, types.FunctionType):
            if _is_of_a_library(value):
                self._put('library', value.__module__, value.__qualname__)
            else:
                self.function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self._put('module', value.__name__)
        elif not self._is_known(value):
            self._object(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            self._put(type(value).__name__, str(len(value)))
            for each in value:
                self.value(each)
        elif isinstance(value, set | frozenset):
            # in the order of their keys: that of the set changes from process to process
            self._put(type(value).__name__, *sorted(map(_key_of, value)))
        elif isinstance(value, dict):
            self._put(type(value).__name__, str(len(value)))
            for key, each in value.items():
                self.value(key)
                self.value(each)
        elif isinstance(value, functools.partial):
            self._put('partial')
            self.value((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._put('method')
            self.value((value.__func__, value.__self__))
        elif dataclasses.is_dataclass(value):
            self.value(type(value))
            self.value({each.name: getattr(value, each.name) for each in dataclasses.fields(value)})
        else:
            self._other(value)

    def _other(self, value: Any) -> None:
        """Arrays and models by what they hold, anything else by what it is."""
        wrapped = getattr(value, '__wrapped__', None)
        if isinstance(wrapped, types.FunctionType):
            # such as what functools.cache returns
            self.value(wrapped)
            return
        name = getattr(value, '__name__', None)
        if callable(value) and isinstance(name, str) and not hasattr(value, 'state_dict'):
            self._put('callable', str(getattr(value, '__module__', '')), name)
            return
        self.value(type(value))
        if hasattr(value, 'state_dict') and callable(value.state_dict):
            self.value(dict(value.state_dict()))
        elif hasattr(value, '__array__'):
            array = _as_array(value)
            self._put(str(array.dtype), str(array.shape))
            self.digest.update(array.tobytes())
        elif type(value).__module__ in ('datetime', 're', 'decimal', 'fractions', 'uuid'):
            self._put(repr(value))

    def _class(self, value: type) -> None:
        self._put('class', value.__module__, value.__qualname__)
        if _is_of_a_library(value) or self._is_known(value):
            return
        for base in value.__bases__:
            self.value(base)
        for name, each in sorted(vars(value).items()):
            plain = each.__func__ if isinstance(each, staticmethod | classmethod) else each
            plain = plain.fget if isinstance(plain, property) else plain
            is_code = isinstance(plain, types.FunctionType) and not _is_of_a_library(plain)
            if is_code or (not name.startswith('__') and isinstance(plain, _PLAIN)):
                self._put('attribute', name)
                self.value(plain)

    def _chain(self, found: dict[str, Any], chain: tuple[str, ...]) -> None:
        """What a name stands for, through modules that are no library's."""
        name, *rest = chain
        if name not in found:
            self._put('builtin' if hasattr(builtins, name) else 'unknown')
            return
        value = found[name]
        if isinstance(value, types.ModuleType) and rest and not _is_of_a_library(value):
            self._chain(vars(value), tuple(rest))
        else:
            self.value(value)

    def _is_known(self, value: Any) -> bool:
        number = self._numbers.get(id(value))
        if number is not None:
            self._put('again', str(number))
            return True
        self._numbers[id(value)] = len(self._numbers)
        # its id is nobody else's as long as it lives
        self._kept.append(value)
        return False

    def _put(self, *texts: str) -> None:
        for text in texts:
            data = text.encode('utf-8', 'surrogatepass')
            self.digest.update(len(data).to_bytes(8, 'big') + data)


def _key_of(value: Any) -> str:
    reading = _Reading()
    reading.value(value)
    return reading.digest.hexdigest()


def _as_array(value: Any) -> Any:
    import numpy as np

    if hasattr(value, 'detach'):
        value = value.detach().cpu()
    return np.ascontiguousarray(value)


def _is_of_a_library(value: Any) -> bool:
    """Whether it comes with Python or an installed package."""
    module = value if isinstance(value, types.ModuleType) else inspect.getmodule(value)
    path = getattr(module, '__file__', None)
    if path is None:
        # built in; what is typed at a prompt is one's own
        return getattr(module, '__name__', '__main__') != '__main__' and module is not None
    return str(Path(path).resolve()).startswith(_LIBRARIES)


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> set[tuple[str, ...]]:
    """The global names that code uses, each with the attributes that it takes of it."""
    found: set[tuple[str, ...]] = set()
    chain: list[str] = []
    for step in dis.get_instructions(code):
        if chain and step.opname in _ATTRIBUTES:
            chain.append(step.argval)
            continue
        if chain:
            found.add(tuple(chain))
        chain = [step.argval] if step.opname in _LOADS else []
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            found |= _globals_of(each)
    return found


# ---- the text of a function


# by function, with the code that it then had: equal code may come from texts with other defaults
_texts: weakref.WeakKeyDictionary[types.FunctionType, tuple[types.CodeType, str]] = (
    weakref.WeakKeyDictionary()
)


def _text_of(function: types.FunctionType) -> str:
    """Its syntax tree where its file says what runs, else its bytecode.

    Read once: a file that is edited while its functions are used changes nothing of them.
    """
    code, known = function.__code__, _texts.get(function)
    if known is None or known[0] is not code:
        node = _node_of(code)
        text = _bytecode(code, skip_docstring=True) if node is None else _tree(node)
        known = _texts[function] = (code, text)
    return known[1]


def _node_of(code: types.CodeType) -> _Function | None:
    """The part of the file that a function was compiled from, if that is what it says today."""
    # a module that was edited and imported again is another text of the same name
    linecache.checkcache(code.co_filename)
    text = ''.join(linecache.getlines(code.co_filename))
    wanted = _bytecode(code)
    for node, compiled in _compiled(code.co_filename, text):
        if compiled.co_name == code.co_name and _bytecode(compiled) == wanted:
            return node
    return None


@functools.lru_cache(maxsize=64)
def _compiled(filename: str, text: str) -> list[tuple[_Function, types.CodeType]]:
    """All functions of a file, each as a syntax tree and as code."""
    try:
        tree = ast.parse(text)
        whole = compile(text, filename, 'exec', dont_inherit=True)
    except (SyntaxError, ValueError):
        return []
    nodes: dict[tuple[int, str], list[_Function]] = {}
    for node in ast.walk(tree):
        if isinstance(node, _Function):
            first = min(
                [node.lineno, *(each.lineno for each in getattr(node, 'decorator_list', []))]
            )
            nodes.setdefault((first, getattr(node, 'name', '<lambda>')), []).append(node)
    found = []
    for code in _nested(whole):
        here = nodes.get((code.co_firstlineno, code.co_name), [])
        # two on one line cannot be told apart
        found += [(here[0], code)] if len(here) == 1 else []
    return found


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield each
            yield from _nested(each)


def _tree(node: _Function) -> str:
    """A function without its name, decorators, annotations and documentation."""
    arguments, body = copy.deepcopy(node.args), node.body
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    parts = [ast.dump(arguments, annotate_fields=False)]
    for each in body if isinstance(body, list) else [body]:
        parts.append(ast.dump(each, annotate_fields=False))
    if not isinstance(node, ast.Lambda) and ast.get_docstring(node) is not None:
        del parts[1]
    return '\n'.join(parts)


def _bytecode(code: types.CodeType, skip_docstring: bool = False) -> str:
    constants = []
    for number, each in enumerate(code.co_consts):
        if isinstance(each, types.CodeType):
            constants.append(_bytecode(each))
        elif isinstance(each, frozenset):
            constants.append(repr(sorted(map(repr, each))))
        elif not (skip_docstring and number == 0 and isinstance(each, str)):
            constants.append(repr(each))
    table = getattr(code, 'co_exceptiontable', b'')
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return repr((code.co_code.hex(), table.hex(), code.co_flags, names, constants))
