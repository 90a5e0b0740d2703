"""Any graph of columns, edited in any order: nothing stale is served, and nothing is computed twice."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from finetuner.columns import batch, dataset
from tests.integration.column_graphs import EDITS, HARMLESS, Module, edits, harmless_edits, modules
from tests.integration.column_values import (
    ANNOTATIONS,
    CALLS,
    calls,
    made,
    plain,
)

KINDS = list(ANNOTATIONS)
NUM_ROWS = 5
COMMON = {
    'deadline': None,
    'derandomize': True,
    # each example is a dataset of its own: making them smaller would take minutes
    'phases': [Phase.generate],
    'suppress_health_check': list(HealthCheck),
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders that nothing is in, and a file that calls are noted in."""
    monkeypatch.setenv(CALLS, str(tmp_path / 'calls'))
    numbers = itertools.count()

    def folder() -> Path:
        path = tmp_path / str(next(numbers))
        path.mkdir()
        return path

    return folder


@pytest.fixture
def counted(tmp_path):
    """Calls since this was last asked."""
    return lambda: dict(calls(tmp_path / 'calls'))


def numbers_of(module: Module, row: int) -> dict[str, int]:
    """From which numbers the fields of a row are made; each of them once."""
    return {each.name: 8 * row + place for place, each in enumerate(module.fields)}


def filled(module: Module, folder: Path, num_rows: int = NUM_ROWS) -> Any:
    """What is imported, with rows."""
    loaded = module.load(folder)
    loaded.Graph.extend(
        {each.name: made(each.kind, numbers_of(module, row)[each.name]) for each in module.fields}
        for row in range(num_rows)
    )
    return loaded


def naive(module: Module, num_rows: int = NUM_ROWS) -> list[dict[str, Any]]:
    rows = [module.naive(numbers_of(module, row)) for row in range(num_rows)]
    return [{name: plain(value) for name, value in row.items()} for row in rows]


# ---- each way of reading them


def by_attribute(loaded: Any, names: list[str]) -> list[dict[str, Any]]:
    return [{name: plain(getattr(row, name)) for name in names} for row in loaded.Graph]


def by_column(loaded: Any, names: list[str]) -> list[dict[str, Any]]:
    columns = [map(plain, loaded.Graph.rows.column(name)) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def by_batches(loaded: Any, names: list[str]) -> list[dict[str, Any]]:
    columns = []
    for name in names:
        batches = getattr(loaded.Batches, f'batch_of_{name}').range(0, 10**6, 3)
        columns.append([plain(value) for (part,) in batches for value in part])
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def by_one(loaded: Any, names: list[str]) -> list[dict[str, Any]]:
    assert loaded.Graph.materialize(workers=0, progress=False) == 0
    return by_column(loaded, names)


def by_several(loaded: Any, names: list[str]) -> list[dict[str, Any]]:
    assert loaded.Graph.materialize(workers=2, progress=False) == 0
    return by_attribute(loaded, names)


WAYS = {
    'attribute': (by_attribute, 20),
    'column': (by_column, 20),
    'batches': (by_batches, 20),
    'one process': (by_one, 20),
    'several processes': (by_several, 12),
}


@pytest.mark.parametrize('way', WAYS)
def test_any_graph_gives_what_naive_computing_gives(way, folders, counted):
    read, max_examples = WAYS[way]

    @settings(max_examples=max_examples, **COMMON)
    @given(module=modules(KINDS), data=st.data())
    def check(module, data):
        loaded = filled(module, folders())
        expected = naive(module)
        names = data.draw(st.permutations(list(module.kinds)))
        assert counted() == {}
        assert read(loaded, names) == [{name: row[name] for name in names} for row in expected]
        assert counted() == {each.name: NUM_ROWS for each in module.functions}
        # all are kept now: each other way finds them, and so does another process
        for other in (by_attribute, by_column, by_batches, by_one):
            assert other(module.load(Path(loaded.__file__).parent), list(module.kinds)) == expected
        assert counted() == {}

    check()


def test_columns_that_are_asked_for_are_computed_with_what_they_need_and_no_more(folders, counted):
    @settings(max_examples=20, **COMMON)
    @given(module=modules(KINDS), data=st.data())
    def check(module, data):
        loaded = filled(module, folders())
        expected = naive(module)
        known: set[str] = set()
        for _ in range(3):
            name = data.draw(st.sampled_from(module.functions)).name
            first = data.draw(st.integers(0, NUM_ROWS - 1))
            loaded.Graph.rows[first:].materialize(name, workers=0, progress=False)
            assert set(counted()) <= module.ancestors([name])
            assert [plain(value) for value in loaded.Graph.rows.column(name)] == [
                row[name] for row in expected
            ]
            assert set(counted()) <= module.ancestors([name]) - known
            known |= module.ancestors([name])

    check()


# ---- edits


@pytest.mark.parametrize('what', EDITS)
def test_an_edit_has_exactly_its_descendants_computed_again(what, folders, counted):
    @settings(max_examples=8, **COMMON)
    @given(module=modules(KINDS, fewest=3), data=st.data(), num_workers=st.sampled_from([0, 0, 2]))
    def check(module, data, num_workers):
        folder = folders()
        filled(module, folder).Graph.materialize(workers=0, progress=False)
        counted()
        edit = data.draw(edits(module, what))
        loaded = edit.module.load(folder)
        assert loaded.Graph.materialize(workers=num_workers, progress=False) == 0
        changed = edit.module.descendants(edit.changed)
        assert counted() == dict.fromkeys(changed, NUM_ROWS)
        assert by_column(loaded, list(module.kinds)) == naive(edit.module)
        # back to the old code: all is there
        loaded = module.load(folder)
        assert loaded.Graph.materialize(workers=num_workers, progress=False) == 0
        assert by_attribute(loaded, list(module.kinds)) == naive(module)
        assert counted() == {}

    check()


@pytest.mark.parametrize('what', HARMLESS)
def test_edits_that_change_nothing_have_nothing_computed_again(what, folders, counted):
    @settings(max_examples=8, **COMMON)
    @given(module=modules(KINDS, fewest=3), data=st.data())
    def check(module, data):
        folder = folders()
        filled(module, folder).Graph.materialize(workers=0, progress=False)
        counted()
        edit = data.draw(harmless_edits(module, what))
        loaded = edit.module.load(folder)
        assert loaded.Graph.materialize(workers=0, progress=False) == 0
        assert counted() == dict.fromkeys(edit.changed, NUM_ROWS)
        assert by_column(loaded, list(module.kinds)) == [
            {name: row[name] for name in module.kinds} for row in naive(edit.module)
        ]

    check()


# ---- batches


NUM_BATCHED = 41


@pytest.fixture
def numbered(tmp_path):
    """Batches of rows of numbers."""

    @dataset(sql_file=tmp_path / 'numbers.sql', data_dir=tmp_path / 'numbers')
    class Numbers:
        number: int

        def squared(number: int) -> int:
            return number * number

    @batch(Numbers)
    class Batches:
        def numbers(number: list[int], squared: list[int]) -> list:
            assert [each * each for each in number] == squared
            return number

        def noisy(numbers: list, generator: np.random.Generator) -> tuple:
            return numbers, generator.random(len(numbers)).tolist()

    Numbers.extend({'number': number} for number in range(NUM_BATCHED))
    return Batches


@settings(max_examples=60, **COMMON)
@given(
    start=st.integers(0, NUM_BATCHED + 3),
    stop=st.integers(0, NUM_BATCHED + 3),
    batch_size=st.integers(1, NUM_BATCHED + 3),
    world=st.integers(1, 6),
    seed=st.none() | st.integers(0, 2**63),
    num_ahead=st.integers(0, 3),
    few=st.none() | st.sets(st.integers(0, NUM_BATCHED - 1)),
)
def test_shares_of_batches_cover_each_row_once(
    numbered, start, stop, batch_size, world, seed, num_ahead, few
):
    if few is None:
        batches = numbered.numbers.range(start, stop, batch_size)
        expected = list(range(NUM_BATCHED))[start:stop]
    else:
        batches = numbered.numbers.where(batch_size, number=sorted(few))
        expected = sorted(few)
    batches = batches if seed is None else batches.randomize(seed)
    seen, num_rows = [], []
    for rank in range(world):
        mine = batches.shard(rank, world).prefetch(num_ahead)
        for _ in range(2):
            epoch = list(mine)
            assert len(epoch) == len(mine)
            assert all(len(part) == batch_size for part in epoch[:-1])
            assert all(1 <= len(part) <= batch_size for part in epoch[-1:])
            seen.append([number for part in epoch for number in part])
        num_rows.append(len(seen[-1]))
    for epoch in (0, 1):
        together = [number for rank in range(world) for number in seen[2 * rank + epoch]]
        assert sorted(together) == expected
        if seed is None:
            # in their order, dealt one by one
            dealt = itertools.zip_longest(*(seen[2 * rank + epoch] for rank in range(world)))
            assert [each for some in dealt for each in some if each is not None] == expected
    assert max(num_rows) - min(num_rows) <= 1


@settings(max_examples=30, **COMMON)
@given(
    seed=st.integers(0, 2**63),
    batch_size=st.integers(1, 12),
    world=st.integers(1, 3),
    data=st.data(),
)
def test_epochs_are_repeated_by_seed_and_differ_from_each_other(
    numbered, seed, batch_size, world, data
):
    rank = data.draw(st.integers(0, world - 1))

    def some(seed: int) -> Any:
        return numbered.noisy.all(batch_size).randomize(seed).shard(rank, world)

    batches, again = some(seed), some(seed).prefetch(2)
    epochs = [list(batches) for _ in range(3)]
    assert [list(again) for _ in range(3)] == epochs
    assert list(some(seed).from_epoch(2)) == epochs[2]
    others = [*epochs, list(some(seed + 1))]
    for one, another in itertools.combinations(others, 2):
        assert one != another
        # neither the order of the rows nor what is drawn is the same
        assert [rows for rows, _ in one] != [rows for rows, _ in another]
        drawn = {number for _, noise in one for number in noise}
        assert drawn.isdisjoint(number for _, noise in another for number in noise)
