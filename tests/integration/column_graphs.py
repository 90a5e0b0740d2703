"""Graphs of columns: drawn by chance, written as a module, imported, and computed naively beside it."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.integration.column_values import ANNOTATIONS, made, number_of

MODULE = 'columns_under_test'
LARGEST = 10007
_HEAD = '''"""Columns, as they are written by chance ({note})."""

from datetime import datetime
from typing import Optional

import numpy as np

from finetuner.columns import File, batch, dataset, version
from tests.integration.column_values import called, made, number_of


def unrelated(x):
    return x - {note}
'''


@dataclass(frozen=True)
class Stored:
    """A field: of which kind, and from which number its default is made, if it has one."""

    name: str
    kind: str
    default: int | None = None

    def text(self) -> str:
        default = '' if self.default is None else f' = made({self.kind!r}, {self.default})'
        return f'    {self.name}: {ANNOTATIONS[self.kind]}{default}'


@dataclass(frozen=True)
class Helper:
    """A function of the module, which may call another."""

    name: str
    constant: int
    calls: str = ''

    def text(self) -> str:
        more = f' + {self.calls}(x + 1)' if self.calls else ''
        return f'def {self.name}(x):\n    return 5 * x + {self.constant}{more}\n'


@dataclass(frozen=True)
class Function:
    """A derived column; the last attributes change nothing of what it computes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constant: int = 1
    factor: int = 1
    default: int = 0
    closure: int | None = None
    helper: str = ''
    version: str = ''
    comment: int = 0
    documentation: int = 0
    is_annotated: bool = True

    def text(self, kinds: dict[str, str]) -> str:
        """As it is written at the beginning of a line; kinds of all columns by name."""
        given = [
            f'{name}: {ANNOTATIONS[kinds[name]]}' if self.is_annotated else name
            for name in self.inputs
        ]
        terms = [
            str(self.constant),
            'by_default',
            *(f'{place} * number_of({name})' for place, name in enumerate(self.inputs, 2)),
            *(['enclosed'] if self.closure is not None else []),
        ]
        lines = [
            *([f'@version({self.version!r})'] if self.version else []),
            f'def {self.name}({", ".join(given)}, by_default={self.default}) -> {ANNOTATIONS[self.kind]}:',
            *([f'    """It is {self.documentation}."""'] if self.documentation else []),
            *['' for _ in range(self.comment)],
            *([f'    # comment {self.comment}'] if self.comment else []),
            f'    called({self.name!r})',
            f'    total = {self.factor} * ({" + ".join(terms)})',
            *([f'    total += {self.helper}(total)'] if self.helper else []),
            f'    return made({self.kind!r}, total % {LARGEST})',
        ]
        return '\n'.join(lines) + '\n'


@dataclass(frozen=True)
class Module:
    """What is written: fields, functions in the order in which they stand there, helpers."""

    fields: tuple[Stored, ...]
    functions: tuple[Function, ...]
    helpers: tuple[Helper, ...] = ()
    note: int = 0
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def kinds(self) -> dict[str, str]:
        """Of all columns by name."""
        return {each.name: each.kind for each in (*self.fields, *self.functions)}

    def function(self, name: str) -> Function:
        return next(each for each in self.functions if each.name == name)

    def with_function(self, changed: Function) -> Module:
        functions = (changed if each.name == changed.name else each for each in self.functions)
        return replace(self, functions=tuple(functions))

    def with_helper(self, changed: Helper) -> Module:
        helpers = (changed if each.name == changed.name else each for each in self.helpers)
        return replace(self, helpers=tuple(helpers))

    def text(self, place: dict[str, Path]) -> str:
        """As it is written."""
        outside, inside = [], []
        for each in self.functions:
            text = each.text(self.kinds)
            if each.closure is None:
                inside.append(_indented(text))
            else:
                body = f'{_indented(text)}    return {each.name}\n'
                outside.append(f'def making_{each.name}(enclosed):\n{body}')
                inside.append(f'    {each.name} = making_{each.name}({each.closure})\n')
        arguments = [f'{name}={str(value)!r}' for name, value in place.items()]
        arguments += [f'renamed={dict(self.renamed)!r}'] if self.renamed else []
        batches = [
            f'    def batch_of_{name}({name}: list[{ANNOTATIONS[kind]}]) -> list:\n        return [{name}]\n'
            for name, kind in self.kinds.items()
        ]
        return '\n'.join(
            [
                _HEAD.format(note=self.note),
                *(each.text() for each in self.helpers),
                *outside,
                f'@dataset({", ".join(arguments)})\nclass Graph:',
                *(each.text() for each in self.fields),
                *inside,
                '@batch(Graph)\nclass Batches:',
                *batches,
            ]
        )

    def load(self, folder: Path) -> types.ModuleType:
        """Write it over what was there, and import it anew; its dataset is beside it."""
        place = {'sql_file': folder / 'graph.sql', 'data_dir': folder / 'graph'}
        path = folder / f'{MODULE}.py'
        path.write_text(self.text(place))
        spec = importlib.util.spec_from_file_location(MODULE, path)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[MODULE] = loaded
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            spec.loader.exec_module(loaded)
        finally:
            sys.dont_write_bytecode = writes
        return loaded

    # ---- beside it

    def naive(self, numbers: dict[str, int]) -> dict[str, Any]:
        """All columns of a row, from the numbers that its fields are made from."""
        found = {each.name: made(each.kind, numbers[each.name]) for each in self.fields}
        waiting = list(self.functions)
        while waiting:
            each = waiting.pop(0)
            if not found.keys() >= set(each.inputs):
                waiting.append(each)
                continue
            total = each.constant + each.default + (each.closure or 0)
            for place, name in enumerate(each.inputs, 2):
                total += place * number_of(found[name])
            total *= each.factor
            total += self._helped(each.helper, total)
            found[each.name] = made(each.kind, total % LARGEST)
        return found

    def _helped(self, name: str, x: int) -> int:
        if not name:
            return 0
        helper = next(each for each in self.helpers if each.name == name)
        return 5 * x + helper.constant + self._helped(helper.calls, x + 1)

    def descendants(self, names: set[str]) -> set[str]:
        """These functions, and those that are computed from them."""
        found = set(names)
        while True:
            more = {each.name for each in self.functions if found & set(each.inputs)} - found
            if not more:
                return found
            found |= more

    def calling(self, helper: str) -> set[str]:
        """Functions that call a helper, or one that calls it."""
        helpers = {helper}
        for _ in self.helpers:
            helpers |= {each.name for each in self.helpers if each.calls in helpers}
        return {each.name for each in self.functions if each.helper in helpers}

    def signature(self, name: str, identities: dict[str, Any]) -> Any:
        """All that a function depends on: two of the same signature have the same values."""
        if name in identities:
            return name, identities[name]
        each = replace(self.function(name), comment=0, documentation=0, is_annotated=True)
        helpers, helper = [], each.helper
        while helper:
            helpers.append(next(one for one in self.helpers if one.name == helper))
            helper = helpers[-1].calls
        inputs = tuple(self.signature(each, identities) for each in each.inputs)
        return each, tuple(helpers), inputs

    def ancestors(self, names: list[str]) -> set[str]:
        """These functions, and those that they are computed from."""
        derived = {each.name for each in self.functions}
        found, waiting = set(), [name for name in names if name in derived]
        while waiting:
            name = waiting.pop()
            found.add(name)
            waiting += [each for each in self.function(name).inputs if each in derived - found]
        return found


def _indented(text: str) -> str:
    return ''.join(f'    {line}\n' if line else '\n' for line in text.splitlines())


# ---- drawn by chance


SMALL = st.integers(0, 50)


@st.composite
def functions(draw: Any, name: str, inputs: list[str], kinds: list[str], helpers: list[str]) -> Any:
    """A function of some of these columns."""
    return Function(
        name,
        draw(st.sampled_from(kinds)),
        tuple(draw(st.lists(st.sampled_from(inputs), min_size=1, max_size=3, unique=True))),
        constant=draw(SMALL),
        factor=draw(st.integers(1, 5)),
        default=draw(SMALL),
        closure=draw(st.none() | SMALL),
        helper=draw(st.sampled_from(['', *helpers])),
        version=draw(st.sampled_from(['', 'a'])),
    )


@st.composite
def modules(draw: Any, kinds: list[str], fewest: int = 1, most: int = 8) -> Any:
    """Any graph that has no circle, its functions in any order; the first has all that can be edited."""
    fields = [
        Stored(f'f{number}', draw(st.sampled_from(kinds)))
        for number in range(draw(st.integers(1, 4)))
    ]
    helpers: list[Helper] = []
    for number in range(draw(st.integers(1, 3))):
        calls = draw(st.sampled_from(['', *(each.name for each in helpers)]))
        helpers.append(Helper(f'helper{number}', draw(SMALL), calls))
    names = [each.name for each in fields]
    made_functions = []
    for number in range(draw(st.integers(fewest, most))):
        name = f'd{number}'
        inputs = [*names, *names[-2:], *names[-1:]]
        called = [each.name for each in helpers]
        function = draw(functions(name, inputs, kinds, called))
        if number == 0:
            closure = draw(SMALL) if function.closure is None else function.closure
            function = replace(function, helper=called[-1], closure=closure)
        made_functions.append(function)
        names.append(name)
    in_any_order = draw(st.permutations(made_functions))
    return Module(tuple(fields), tuple(in_any_order), tuple(helpers))


@dataclass
class Edit:
    """A module that was edited, and the functions whose results that may change."""

    module: Module
    changed: set[str] = field(default_factory=set)


EDITS = ('constant', 'factor', 'default', 'closure', 'version', 'helper', 'calls')


@st.composite
def edits(draw: Any, module: Module, what: str = '') -> Any:
    """A change of one function, or of one that it calls."""
    what = what or draw(st.sampled_from(EDITS))
    used = [each for each in module.helpers if module.calling(each.name)]
    enclosing = [each for each in module.functions if each.closure is not None]
    each = draw(st.sampled_from(enclosing if what == 'closure' and enclosing else module.functions))
    if what == 'helper' and used:
        helper = draw(st.sampled_from(used))
        changed = module.with_helper(replace(helper, constant=helper.constant + 1))
        return Edit(changed, module.calling(helper.name))
    if what == 'calls' and module.helpers:
        names = ['', *(helper.name for helper in module.helpers)]
        changes = {'helper': draw(st.sampled_from([name for name in names if name != each.helper]))}
    elif what == 'version':
        versions = [name for name in ('', 'a', 'b') if name != each.version]
        changes = {'version': draw(st.sampled_from(versions))}
    else:
        # of what has none, the constant
        name = what if isinstance(getattr(each, what, None), int) else 'constant'
        changes = {name: getattr(each, name) + draw(st.integers(1, 3))}
    return Edit(module.with_function(replace(each, **changes)), {each.name})


HARMLESS = ('comment', 'documentation', 'is_annotated', 'order', 'unrelated', 'new')


@st.composite
def harmless_edits(draw: Any, module: Module, what: str = '') -> Any:
    """Changes of what is written that change nothing of what is computed."""
    what = what or draw(st.sampled_from(HARMLESS))
    each = draw(st.sampled_from(module.functions))
    if what == 'order':
        order = draw(st.permutations(module.functions))
        return Edit(replace(module, functions=tuple(order)))
    if what == 'unrelated':
        helper = Helper('nobody_calls_it', draw(SMALL))
        return Edit(replace(module, note=module.note + 1, helpers=(*module.helpers, helper)))
    if what == 'new':
        new = draw(functions('another', list(module.kinds), ['int', 'str'], []))
        return Edit(replace(module, functions=(new, *module.functions)), {'another'})
    value = getattr(each, what)
    changed = not value if isinstance(value, bool) else value + 1
    return Edit(module.with_function(replace(each, **{what: changed})))
