"""Datasets declared as classes: rows, derived columns, files, migrations."""

from __future__ import annotations

import datetime
import math
import sqlite3
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from finetuner.columns import File, dataset, version
from finetuner.columns.types import column_type
from finetuner.excepts import ConfigError, DataError, NotFoundError


@pytest.fixture
def place(tmp_path):
    """Arguments of a dataset of its own."""
    return {'sql_file': tmp_path / 'dataset.sql', 'data_dir': tmp_path / 'dataset'}


def numbers(place, factor=2, count=0, **more):
    """A dataset of numbers; `calls` counts how often each column was computed."""
    calls = Calls()

    @dataset(**place, **more)
    class Numbers:
        number: int
        name: str = 'none'

        def doubled(number: int) -> float:
            calls('doubled')
            return float(number * factor)

        def text(doubled: float, name: str) -> str:
            calls('text')
            return f'{name} {doubled}'

    Numbers.extend({'number': number, 'name': f'n{number}'} for number in range(count))
    return Numbers, calls


class Calls:
    """Counts by name; what is counted is none of what a function depends on."""

    def __init__(self):
        self.counts = {}

    def __call__(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1

    def __reduce__(self):
        return Calls, ()


# ---- rows


def test_rows_are_added_found_and_deleted(place):
    made, _ = numbers(place)
    row = made.add(number=3, name='three')
    assert (row.id, row.number, row.name) == (1, 3, 'three')
    assert made.add(number=4).name == 'none'
    assert made.extend({'number': number} for number in range(5, 8)) == 3
    assert len(made) == 5
    assert [each.number for each in made] == [3, 4, 5, 6, 7]
    assert made[-1].number == 7
    assert [each.number for each in made[1:4:2]] == [4, 6]
    assert [each.number for each in made.where(name='none', number=[4, 6, 9])] == [4, 6]
    assert [each.number for each in made.where(number=lambda number: number > 5)] == [6, 7]
    assert [each.number for each in made.where(doubled=12.0)] == [6]
    assert made.where(number=5).delete() == 1
    assert made.delete(name='three') == 1
    assert [each.number for each in made] == [4, 6, 7]
    # ids are never used again
    made.rows.delete()
    assert made.add(number=1).id == 6
    assert bool(made)
    with pytest.raises(IndexError):
        made[5]
    gone = made.rows
    made.rows.delete()
    with pytest.raises(NotFoundError, match='no row 6'):
        gone[0]
    assert list(gone) == []
    with pytest.raises(ConfigError, match='conditions'):
        made.delete()


def test_any_tool_opens_the_file(place):
    made, _ = numbers(place, count=3)
    assert list(made.rows.column('doubled')) == [0, 2, 4]
    with sqlite3.connect(place['sql_file']) as connection:
        assert connection.execute('SELECT id, number, name FROM Numbers').fetchall() == [
            (1, 0, 'n0'),
            (2, 1, 'n1'),
            (3, 2, 'n2'),
        ]
        values = connection.execute('SELECT value FROM Numbers__doubled ORDER BY value').fetchall()
        assert values == [(0.0,), (2.0,), (4.0,)]


@pytest.mark.parametrize(
    ('row', 'words'),
    [
        ({}, "'number' is missing"),
        ({'number': 1, 'nmae': 'x'}, "'nmae' is no field"),
        ({'number': '1'}, "number: it takes int, not str '1'"),
        ({'number': 1.0}, 'it takes int'),
        ({'number': True}, 'it takes int'),
        ({'number': 2**63}, '64 bits'),
        ({'number': None}, 'Optional'),
        ({'number': 1, 'name': '\ud800'}, 'name: it takes str'),
        ([1], 'by name of field'),
    ],
)
def test_a_row_that_is_none_is_told_and_those_before_it_stay(row, words, place):
    made, _ = numbers(place)
    with pytest.raises(DataError, match=words) as told:
        made.extend([{'number': 1}, {'number': 2}, row, {'number': 3}])
    assert 'row 2' in str(told.value)
    assert [each.number for each in made] == [1, 2]


VALUES = [
    (str, 'ä\n\0', 'x'),
    (int, -(2**63), 2**63 - 1),
    (float, 0.1, math.inf),
    (bool, True, False),
    (bytes, b'\0\xff', b''),
    (datetime.datetime, datetime.datetime(2020, 1, 2, 3, 4, 5, 6), datetime.datetime.min),
    (datetime.datetime, datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc), None),
    (dict, {'a': [1, None, {'b': 'ü'}]}, {}),
    (list[int], [1, 2], []),
    (Optional[int], None, 3),  # noqa: UP045 - as many write it
    (str | None, None, 'x'),
    (float, 3, 2),
]


@pytest.mark.parametrize(('kind', 'first', 'second'), VALUES)
def test_every_type_comes_back_as_it_was(kind, first, second, place):
    made = dataset(**place)(type('Typed', (), {'__annotations__': {'value': kind}}))
    for value in (first, second):
        if value is None and not column_type(kind).is_optional:
            continue
        found = made.add(value=value).value
        assert found == value
        assert found is None or isinstance(found, column_type(kind).python)
        assert [row.value for row in made.where(value=[value])] == [value]


def test_arrays_and_what_is_no_number(place):
    torch = pytest.importorskip('torch')

    @dataset(**place)
    class Arrays:
        array: np.ndarray
        score: float
        maybe: float | None = None

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array) * 2

        def mean(array: np.ndarray) -> float:
            return float(array.mean()) if array.size else math.nan

    array = np.arange(6, dtype='>u2').reshape(2, 3)
    row = Arrays.add(array=array, score=math.nan)
    assert row.array.dtype == array.dtype
    assert (row.array == array).all()
    assert math.isnan(row.score)
    assert row.maybe is None
    assert math.isnan(Arrays.add(array=np.empty(0), score=1).mean)
    assert (Arrays.add(array=array.astype(np.float32), score=1).tensor.numpy() == array * 2).all()
    with pytest.raises(DataError, match='nan'):
        Arrays.add(array=array, score=1, maybe=math.nan)
    with pytest.raises(DataError, match='object'):
        Arrays.add(array=np.array([object()]), score=1)


# ---- what a class may declare


def declare(place, text):
    """A dataset whose class says this."""
    namespace = {'File': File, 'np': np, 'Optional': Optional}
    path = Path(place['sql_file']).with_name('declared.py')
    source = f'class Declared:\n{text}\n'
    path.write_text(source)
    exec(compile(source, str(path), 'exec', dont_inherit=True), namespace)
    return dataset(**place)(namespace['Declared'])


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('    a: complex', 'Declared.a: complex is no type of columns'),
        ("    a: int = 'x'", 'Declared.a: it takes int'),
        ('    _a: int', "called '_a'"),
        ('    id: int', "called 'id'"),
        ('    where: int', "called 'where'"),
        ("    a: 'Missing'", "name 'Missing' is not defined"),
        ('    a: int\n    def b(a): return a', 'declared.py:3: .*b: say what it returns'),
        ('    a: int\n    def b(a) -> set: return a', 'declared.py:3: .*returns set is no type'),
        ('    a: int\n    def b(aa) -> int: return a', "declared.py:3: .*'aa'.*'?a'?"),
        ('    a: int\n    def b(self) -> int: return a', 'no self'),
        ('    a: int\n    def b(*a) -> int: return a', 'not \\*a'),
        ('    a: int\n    def b(a: str) -> int: return a', 'a is int, and it takes str'),
        ('    a: Optional[int]\n    def b(a: int) -> int: return a', 'is Optional'),
        ("    a: File\n    def b(a: File['png']) -> int: return 1", "takes File\\['png'\\]"),
        (
            '    def b(c: int) -> int: return c\n    def c(b: int) -> int: return b',
            'declared.py:[23]: .*from itself: [bc] -> [bc] -> [bc]',
        ),
        ('    def b(b: int) -> int: return b', 'from itself'),
        ('    a: int\n    a = 5\n    def b(a: int, x) -> int: return a', "column 'x'"),
    ],
)
def test_what_is_none_of_a_dataset_is_told_when_the_class_is_defined(text, words, place):
    with pytest.raises(ConfigError, match=words):
        declare(place, text)


def test_what_is_wider_takes_what_is_narrower(place):
    made = declare(
        place,
        '    a: int\n'
        '    def b(a: float, extra: int = 3) -> Optional[float]: return a + extra\n'
        '    def c(b) -> str: return str(b)\n',
    )
    assert made.add(a=1).c == '4.0'
    assert made.b(2, extra=1) == 3


# ---- derived columns


def test_values_are_computed_once_and_kept(place):
    made, calls = numbers(place, count=3)
    assert [row.text for row in made] == ['n0 0.0', 'n1 2.0', 'n2 4.0']
    assert list(made.rows.column('text')) == ['n0 0.0', 'n1 2.0', 'n2 4.0']
    assert made.materialize(workers=0) == 0
    assert calls.counts == {'doubled': 3, 'text': 3}
    again, calls = numbers(place)
    assert [row.text for row in again] == ['n0 0.0', 'n1 2.0', 'n2 4.0']
    assert calls.counts == {}
    # another factor is another function; the first one finds what it had
    other, calls = numbers(place, factor=3)
    assert [row.text for row in other] == ['n0 0.0', 'n1 3.0', 'n2 6.0']
    assert calls.counts == {'doubled': 3, 'text': 3}
    assert [row.text for row in numbers(place)[0]] == ['n0 0.0', 'n1 2.0', 'n2 4.0']


def test_a_version_has_values_of_its_own(place):
    def made(name):
        @dataset(**place)
        class Versioned:
            number: int

            @version(name)
            def again(number: int) -> int:
                calls(name)
                return number

        return Versioned

    calls = Calls()
    made(1).add(number=1)
    assert [made(1)[0].again, made(2)[0].again, made(1)[0].again] == [1, 1, 1]
    assert calls.counts == {1: 1, 2: 1}


def test_errors_are_kept_and_the_others_go_on(place):
    @dataset(**place)
    class Failing:
        number: int

        def inverse(number: int) -> float:
            return 1 / number

        def text(inverse: float) -> str:
            return str(inverse)

    Failing.extend({'number': number} for number in (1, 0, 2, 0))
    assert Failing.materialize(workers=0) == 2
    errors = Failing.errors('text')
    assert [(each.row, each.column) for each in errors] == [(2, 'inverse'), (4, 'inverse')]
    assert errors[0].message == 'ZeroDivisionError: division by zero'
    assert 'return 1 / number' in errors[0].traceback
    assert Failing[0].text == '1.0'
    with pytest.raises(DataError, match=r'inverse of row 2.*division') as told:
        _ = Failing[1].text
    assert isinstance(told.value.__cause__, ZeroDivisionError)
    assert Failing.materialize(workers=2) == 2
    Failing.where(number=0).delete()
    assert Failing.errors('text') == []


@pytest.mark.parametrize('workers', [0, 2])
def test_a_row_that_fails_in_one_column_has_the_others(workers, place):
    @dataset(**place)
    class Failing:
        number: int

        def plain(number: int) -> int:
            return number

        def odd(number: int) -> int:
            if number % 2 == 0:
                raise ValueError('it is even')
            return number

        def again(odd: int) -> int:
            return odd

        def good(number: int, plain: int) -> int:
            return number + plain

        def both(again: int, good: int) -> int:
            return again + good

    Failing.extend({'number': number} for number in range(6))
    for _ in range(2):
        assert Failing.materialize(workers=workers) == 3
        assert [failure.row for failure in Failing.errors('both')] == [1, 3, 5]
        with sqlite3.connect(place['sql_file']) as connection:
            counts = [
                connection.execute(f'SELECT count(*) FROM Failing__{name}').fetchone()[0]
                for name in ('plain', 'odd', 'again', 'good', 'both')
            ]
        assert counts == [6, 3, 3, 6, 3]
    assert [row.both for row in Failing.rows[1::2]] == [3, 9, 15]


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_processes_compute_what_one_does(workers, place):
    made, calls = numbers(place, count=700)
    assert made.materialize('text', workers=workers) == 0
    assert calls.counts == ({'doubled': 700, 'text': 700} if workers == 0 else {})
    assert list(made.rows.column('text')) == [f'n{n} {n * 2.0}' for n in range(700)]
    assert 'doubled' not in calls.counts or workers == 0


def test_what_any_tool_changes_of_a_row_is_computed_again(place):
    made, calls = numbers(place, count=4)
    made.materialize(workers=0)
    with sqlite3.connect(place['sql_file']) as connection:
        connection.execute("UPDATE Numbers SET name = 'new' WHERE id = 2")
        connection.execute("INSERT OR REPLACE INTO Numbers VALUES (3, 7, 'other')")
        connection.execute('DELETE FROM Numbers WHERE id = 4')
        connection.execute("INSERT INTO Numbers (number, name) VALUES (9, 'more')")
    assert [row.text for row in made] == ['n0 0.0', 'new 2.0', 'other 14.0', 'more 18.0']
    assert calls.counts == {'doubled': 7, 'text': 7}


def test_what_a_function_returns_may_change(place):
    for kind, value in ((float, 1.5), (str, '1e3'), (int, 2), (bytes, b'1'), (float, 1.5)):
        namespace = {'value': value, 'kind': kind}
        source = 'def changing(number: int) -> kind:\n    return value\n'
        exec(compile(source, f'{kind.__name__}.py', 'exec', dont_inherit=True), namespace)
        body = {'__annotations__': {'number': int}, 'changing': namespace['changing']}
        made = dataset(**place)(type('Changing', (), body))
        if not len(made):
            made.add(number=1)
        assert made[0].changing == value
        assert type(made[0].changing) is kind


# ---- files


def pictures(place):
    @dataset(**place)
    class Pictures:
        image: File['txt']  # noqa: F821, UP037
        other: File | None = None

        def twice(image: File) -> File:
            with File.make_tmp('.txt') as file:
                Path(file.path).write_text(image.open('r').read() * 2)
                return file

        def length(twice: File) -> int:
            return twice.size

    return Pictures


@pytest.mark.parametrize('workers', [None, 0])
def test_files_are_copied_in_and_named_by_their_content(workers, place, tmp_path):
    made = pictures(place)
    paths = [tmp_path / f'{number}.TXT' for number in range(5)]
    for number, path in enumerate(paths):
        path.write_text('abc' * number)
    made.extend({'image': path} for path in paths)
    made.add(image=str(paths[2]), other=File(paths[1]))
    for path in paths:
        path.unlink()
    if workers is None:
        made.materialize(workers=2)
    row = made[2]
    assert row.image.read() == b'abcabc'
    assert row.image.hash == made[5].image.hash
    assert Path(row.image.path).is_relative_to(place['data_dir'] / 'image')
    assert (row.image.size, row.image.media_type, row.image.suffix) == (6, 'text/plain', '.txt')
    assert row.twice.read() == b'abcabcabcabc'
    assert [each.length for each in made] == [0, 6, 12, 18, 24, 12]
    assert made[0].other is None
    assert made[5].other.read() == b'abc'
    assert [each.id for each in made.where(image=made[5].image)] == [3, 6]
    with pytest.raises(ConfigError, match='only read'):
        row.image.open('w')
    assert len(list((place['data_dir'] / 'image').rglob('*.txt'))) == 5


def test_files_that_are_none_are_refused(place, tmp_path):
    made = pictures(place)
    (tmp_path / 'a.png').write_bytes(b'')
    with pytest.raises(DataError, match=r"takes File\['txt'\].*'\.png'"):
        made.add(image=tmp_path / 'a.png')
    with pytest.raises(DataError, match='there is no such file'):
        made.add(image=tmp_path / 'none.txt')
    with pytest.raises(DataError, match='there is no such file'):
        made.add(image=tmp_path)
    with pytest.raises(DataError, match='give a File'):
        made.add(image=b'abc')
    with pytest.raises(ConfigError, match='ending'):
        File.make_tmp('../x')
    assert len(made) == 0


def test_a_file_that_was_not_finished_is_gone():
    with pytest.raises(ValueError, match='no'), File.make_tmp('.txt') as file:
        raise ValueError('no')
    assert not Path(file.path).exists()


# ---- migrations


def fields(place, annotations, defaults=None, **more):
    return dataset(**place, **more)(
        type('Fields', (), {'__annotations__': annotations, **(defaults or {})})
    )


def test_fields_are_added_removed_and_renamed_without_loss(place):
    made = fields(place, {'a': int, 'b': str})
    made.extend([{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}])
    with pytest.raises(ConfigError, match=r'c is new.*default'):
        fields(place, {'a': int, 'b': str, 'c': float})
    more = fields(place, {'a': int, 'b': str, 'c': float, 'd': str | None}, {'c': 0.5})
    assert [(row.c, row.d) for row in more] == [(0.5, None), (0.5, None)]
    less = fields(place, {'b': str})
    less.add(b='z')
    assert [row.b for row in less] == ['x', 'y', 'z']
    renamed = fields(place, {'title': str}, renamed={'title': 'b'})
    assert [row.title for row in renamed] == ['x', 'y', 'z']
    back = fields(place, {'a': int | None, 'title': str}, renamed={'title': 'b'})
    assert [row.a for row in back] == [1, 2, None]
    with pytest.raises(ConfigError, match='a is str, and was'):
        fields(place, {'a': str, 'title': str})
    assert [row.a for row in fields(place, {'a': float | None, 'title': str})] == [1, 2, None]
