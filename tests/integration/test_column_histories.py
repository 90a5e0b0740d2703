"""Any history of a dataset: code that is edited and rolled back, rows, fields and columns that come and go."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.integration.column_graphs import (
    SMALL,
    Module,
    Stored,
    edits,
    functions,
    harmless_edits,
    modules,
)
from tests.integration.column_values import CALLS, calls, made, plain

KINDS = ['int', 'str', 'optional', 'file']
FIELD_KINDS = ['int', 'optional', 'str']
MOST_ROWS = 8


class History(RuleBasedStateMachine):
    """A dataset and what it should be.

    Fields have an identity besides their name. `kept` are the values that were asked for once, each by
    its row and by all that its function depends on: they are never computed again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix='columns-'))
        os.environ[CALLS] = str(self.folder / 'calls')
        self.history: list[Module] = []
        self.identities: dict[str, int] = {}
        self.removed: dict[str, tuple[int, Stored]] = {}
        self.first_defaults: dict[int, int | None] = {}
        self.rows: dict[int, dict[int, int]] = {}
        self.kept: set[tuple[int, Any]] = set()
        self.num_rows = self.num_fields = self.num_names = 0

    def teardown(self) -> None:
        os.environ.pop(CALLS, None)
        shutil.rmtree(self.folder)

    # ---- what is there

    def load(self, module: Module) -> None:
        """Write this code and import it."""
        self.module = module
        self.history.append(module)
        self.graph = module.load(self.folder).Graph

    def numbers(self, row: int) -> dict[str, int]:
        """From which numbers the fields of a row are made."""
        return {
            each.name: self.rows[row][self.identities[each.name]] for each in self.module.fields
        }

    def expected(self, name: str, rows: list[int]) -> list[Any]:
        return [plain(self.module.naive(self.numbers(row))[name]) for row in rows]

    def check_calls(self, names: list[str], rows: list[int]) -> None:
        """What was called is what was never asked for before."""
        allowed: Counter[str] = Counter()
        for name in self.module.ancestors(names):
            signature = self.module.signature(name, self.identities)
            new = {(row, signature) for row in rows} - self.kept
            allowed[name] = len(new)
            self.kept |= new
        found = calls(self.folder / 'calls')
        assert found <= allowed, f'{found - allowed} were computed again'

    @initialize(module=modules(FIELD_KINDS, most=4))
    def begin(self, module: Module) -> None:
        for each in module.fields:
            self.identities[each.name] = self.num_fields
            self.first_defaults[self.num_fields] = each.default
            self.num_fields += 1
        self.load(module)
        self.add(3)

    # ---- rows

    @rule(count=st.integers(1, 3))
    def add(self, count: int) -> None:
        new = []
        for _ in range(min(count, MOST_ROWS - len(self.rows))):
            new.append(
                {
                    each.name: 4 * self.num_rows + place
                    for place, each in enumerate(self.module.fields)
                }
            )
            self.num_rows += 1
        self.graph.extend(
            {each.name: made(each.kind, row[each.name]) for each in self.module.fields}
            for row in new
        )
        ids = list(self.graph.rows.ids)
        assert ids[: len(self.rows)] == list(self.rows)
        assert not set(ids[len(self.rows) :]) & {row for row, _ in self.kept}
        for row, numbers in zip(ids[len(self.rows) :], new, strict=True):
            self.rows[row] = {self.identities[name]: number for name, number in numbers.items()}

    @precondition(lambda self: len(self.rows) > 1)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        place = data.draw(st.integers(0, len(self.rows) - 1))
        last = data.draw(st.integers(place, len(self.rows)))
        gone = list(self.rows)[place:last]
        assert self.graph.rows[place:last].delete() == len(gone)
        for row in gone:
            del self.rows[row]

    # ---- code

    @rule(data=st.data())
    def edit(self, data: Any) -> None:
        if self.module.functions:
            self.load(data.draw(edits(self.module)).module)

    @rule(data=st.data())
    def change_nothing(self, data: Any) -> None:
        if self.module.functions and 'another' not in self.module.kinds:
            self.load(data.draw(harmless_edits(self.module)).module)

    @rule(data=st.data())
    def roll_back(self, data: Any) -> None:
        """Functions as they were, as far as the fields are there that they are computed from."""
        old = data.draw(st.sampled_from(self.history))
        there = {each.name: each.kind for each in self.module.fields}
        functions = [each for each in old.functions if each.name not in there]
        self.load(
            replace(self.module, functions=self.possible(old, functions), helpers=old.helpers)
        )

    @rule(data=st.data(), kind=st.sampled_from(KINDS))
    def add_column(self, data: Any, kind: str) -> None:
        name = f'e{self.num_names}'
        self.num_names += 1
        helpers = [each.name for each in self.module.helpers]
        new = data.draw(functions(name, list(self.module.kinds), [kind], helpers))
        self.load(replace(self.module, functions=(*self.module.functions, new)))

    @precondition(lambda self: self.module.functions)
    @rule(data=st.data())
    def remove_column(self, data: Any) -> None:
        gone = self.module.descendants({data.draw(st.sampled_from(self.module.functions)).name})
        left = tuple(each for each in self.module.functions if each.name not in gone)
        self.load(replace(self.module, functions=left))

    def possible(self, old: Module, functions: list[Any]) -> tuple[Any, ...]:
        """Those of which all that they are computed from is there, as it was."""
        kinds = {each.name: each.kind for each in self.module.fields}
        known, left, is_more = dict(kinds), [], True
        while is_more:
            is_more = False
            for each in functions:
                if each not in left and all(
                    known.get(name) == old.kinds[name] for name in each.inputs
                ):
                    known[each.name] = each.kind
                    left.append(each)
                    is_more = True
        return tuple(left)

    # ---- fields

    @rule(kind=st.sampled_from(FIELD_KINDS), default=SMALL)
    def add_field(self, kind: str, default: int) -> None:
        if len(self.module.fields) >= 4:
            return
        new = Stored(f'g{self.num_names}', kind, 0 if kind == 'optional' else default)
        self.num_names += 1
        self.identities[new.name] = self.num_fields
        self.num_fields += 1
        self.declare(new)

    @precondition(lambda self: self.removed)
    @rule(data=st.data(), default=SMALL)
    def restore_field(self, data: Any, default: int) -> None:
        """One that was removed is there again, with what was in it."""
        name = data.draw(st.sampled_from(sorted(self.removed)))
        identity, old = self.removed[name]
        is_lacking = any(identity not in row for row in self.rows.values())
        if old.kind == 'float' and is_lacking and self.first_defaults[identity] is None:
            # SQL cannot tell rows without a number from those whose number is none
            return
        del self.removed[name]
        self.identities[name] = identity
        self.declare(replace(old, default=0 if old.kind == 'optional' else default))

    def declare(self, new: Stored) -> None:
        # rows that were added without the field have the default that it had first, if it had one
        identity = self.identities[new.name]
        first = self.first_defaults.setdefault(identity, new.default)
        for row, numbers in self.rows.items():
            if identity not in numbers and first is None:
                # it is changed now
                self.kept = {each for each in self.kept if each[0] != row}
            numbers.setdefault(identity, new.default if first is None else first)
        self.load(replace(self.module, fields=(*self.module.fields, new)))

    @precondition(lambda self: len(self.module.fields) > 1)
    @rule(data=st.data())
    def remove_field(self, data: Any) -> None:
        gone = data.draw(st.sampled_from(self.module.fields))
        names = self.module.descendants({gone.name})
        self.removed[gone.name] = self.identities.pop(gone.name), gone
        fields = tuple(each for each in self.module.fields if each != gone)
        left = tuple(each for each in self.module.functions if each.name not in names)
        self.load(replace(self.module, fields=fields, functions=left))

    @rule(data=st.data(), keeps_its_history=st.booleans())
    def rename_field(self, data: Any, keeps_its_history: bool) -> None:
        """A field has another name, and so have the parameters; its new name may be an old one of it."""
        old = data.draw(st.sampled_from(self.module.fields))
        taken = {*self.module.kinds, *self.removed}
        names = {each.name for module in self.history for each in module.fields} - taken
        new = data.draw(st.sampled_from([f'r{self.num_names}', *sorted(names)]))
        self.num_names += 1
        self.identities[new] = self.identities.pop(old.name)
        fields = tuple(
            replace(each, name=new) if each == old else each for each in self.module.fields
        )
        functions = tuple(
            replace(each, inputs=tuple(new if name == old.name else name for name in each.inputs))
            for each in self.module.functions
        )
        renamed = ((new, old.name),)
        self.load(replace(self.module, fields=fields, functions=functions, renamed=renamed))
        if not keeps_its_history:
            self.module = replace(self.module, renamed=())

    @precondition(lambda self: len(self.module.fields) > 1)
    @rule(data=st.data())
    def swap_fields(self, data: Any) -> None:
        """Two fields change names; the functions stay, and are computed from the other one now."""
        fields = self.module.fields
        one, other = data.draw(st.permutations(fields))[:2]
        if one.kind != other.kind:
            return
        functions = self.module.functions
        kept = tuple(each for each in fields if each not in (one, other))
        between = replace(one, name=f's{self.num_names}')
        self.num_names += 1
        for some, renamed in (
            ((between, other), (between.name, one.name)),
            ((between, replace(other, name=one.name)), (one.name, other.name)),
            (
                (replace(one, name=other.name), replace(other, name=one.name)),
                (other.name, between.name),
            ),
        ):
            step = Module((*some, *kept), (), self.module.helpers, renamed=(renamed,))
            step.load(self.folder)
        identities = self.identities
        identities[one.name], identities[other.name] = identities[other.name], identities[one.name]
        swapped = (replace(one, name=other.name), replace(other, name=one.name), *kept)
        self.load(replace(self.module, fields=swapped, functions=functions, renamed=()))

    # ---- reading

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def read_one(self, data: Any) -> None:
        place = data.draw(st.integers(0, len(self.rows) - 1))
        name = data.draw(st.sampled_from(list(self.module.kinds)))
        row = list(self.rows)[place]
        found = plain(getattr(self.graph[place], name))
        assert [found] == self.expected(name, [row])
        self.check_calls([name], [row])

    @rule(data=st.data())
    def read_column(self, data: Any) -> None:
        name = data.draw(st.sampled_from(list(self.module.kinds)))
        rows = list(self.rows)
        found = [plain(value) for value in self.graph.rows.column(name)]
        assert found == self.expected(name, rows)
        self.check_calls([name], rows)

    @precondition(lambda self: self.module.functions)
    @rule(data=st.data(), num_workers=st.sampled_from([0, 0, 0, 2]))
    def materialize(self, data: Any, num_workers: int) -> None:
        names = data.draw(
            st.lists(st.sampled_from([each.name for each in self.module.functions]), unique=True)
        )
        assert self.graph.materialize(*names, workers=num_workers, progress=False) == 0
        names = names or [each.name for each in self.module.functions]
        self.check_calls(names, list(self.rows))

    @rule()
    def prune(self) -> None:
        """Nothing is kept but what the functions compute as they are now."""
        self.graph.prune()
        now = {self.module.signature(each.name, self.identities) for each in self.module.functions}
        self.kept = {(row, signature) for row, signature in self.kept if signature in now}

    @rule()
    def read_all(self) -> None:
        for name in self.module.kinds:
            found = [plain(value) for value in self.graph.rows.column(name)]
            assert found == self.expected(name, list(self.rows)), name
        self.check_calls(list(self.module.kinds), list(self.rows))

    @invariant()
    def rows_are_there(self) -> None:
        if self.history:
            assert list(self.graph.rows.ids) == list(self.rows)
            assert len(self.graph) == len(self.rows)


def test_no_history_serves_what_is_stale_or_computes_it_again():
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=int(os.environ.get('COLUMN_HISTORIES', '25')),
            stateful_step_count=40,
            deadline=None,
            derandomize='COLUMN_HISTORIES' not in os.environ,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
