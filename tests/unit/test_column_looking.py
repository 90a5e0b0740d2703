"""What a SQLite file of datasets says without the classes, beside what the classes say."""

import json
import math
import os
import sqlite3
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from finetuner.columns import File, dataset, version
from finetuner.columns.inspecting import DatasetFile
from finetuner.columns.looking import SHORT, look
from finetuner.columns.states import Long
from finetuner.excepts import ConflictError, DataError, NotFoundError


@pytest.fixture
def place(tmp_path):
    """Arguments of a dataset of its own."""
    return {'sql_file': tmp_path / 'dataset.sql', 'data_dir': tmp_path / 'dataset'}


def many_kinds(place):
    """A dataset with a field of each type, and derived columns that depend on each other."""

    @dataset(**place)
    class Kinds:
        file: File
        text: str
        whole: int
        number: float
        flag: bool
        raw: bytes
        when: datetime
        array: np.ndarray
        record: dict
        maybe: float | None = None

        def copy(file: File) -> File:
            if file.read() == b'bad':
                raise ValueError('a bad file')
            return file

        def size(copy: File) -> int:
            return copy.size

        def double(array: np.ndarray) -> np.ndarray:
            return array * 2

    return Kinds


def row_of(tmp_path, number, content=b'good'):
    path = tmp_path / f'{number}.bin'
    path.write_bytes(content)
    return {
        'file': path,
        'text': 'ä' * number,
        'whole': -number,
        'number': math.nan if number == 1 else math.inf if number == 2 else number / 7,
        'flag': number % 2 == 0,
        'raw': bytes(number),
        'when': datetime(2024, 1, 1 + number),
        'array': np.full((number, 3), number, np.float32),
        'record': {'a': [number] * number},
    }


@pytest.fixture
def kinds(place, tmp_path):
    made = many_kinds(place)
    made.extend(row_of(tmp_path, each, b'bad' if each == 3 else b'good') for each in range(5))
    made.materialize(workers=0, progress=False)
    made.materialize('double', workers=0, progress=False)
    return made


def test_cells_are_what_the_class_gives(kinds, place):
    rows = look(DatasetFile(place['sql_file']), 'Kinds')
    assert [row.id for row in rows] == [row.id for row in kinds]
    for looked, row in zip(rows, kinds, strict=True):
        cells = looked.cells
        assert list(cells) == [*kinds.declaration.fields, *kinds.declaration.derived]
        assert cells['text'].plain == row.text
        assert cells['whole'].plain == row.whole
        assert cells['flag'].plain is row.flag
        assert cells['when'].text == str(row.when)
        assert cells['record'].plain == row.record
        assert cells['raw'].plain == {'num_bytes': len(row.raw)}
        assert cells['array'].plain['shape'] == list(row.array.shape)
        assert cells['array'].plain['dtype'] == 'float32'
        assert cells['double'].text.startswith(f'{row.id - 1} × 3, float32')
        assert (cells['maybe'].text, cells['maybe'].plain) == ('None', None)
        assert cells['file'].num_bytes == row.file.size
        assert Path(place['data_dir'], cells['file'].key).read_bytes() == row.file.read()
        json.dumps(looked.plain(), allow_nan=False)
    assert [row.cells['number'].text for row in rows[:3]] == ['0.0', 'nan', 'inf']
    assert [row.cells['copy'].kind for row in rows] == ['file'] * 3 + ['failed', 'file']
    assert rows[3].cells['copy'].text == 'ValueError: a bad file'
    assert rows[3].cells['size'].kind == 'missing'
    assert 'copy' not in rows[3].plain()['values']


def test_long_values_are_cut(place):
    @dataset(**place)
    class Texts:
        text: str
        raw: bytes
        record: list

    for length in (0, SHORT - 1, SHORT, SHORT + 1, 100_000):
        Texts.add(text='ä' * length, raw=b'x' * length, record=['x'] * length)
    Texts.add(text='a\0b' * SHORT, raw=b'', record=[])
    file = DatasetFile(place['sql_file'])
    whole = file.rows('Texts')
    for row, cut in zip(whole[:5], file.rows('Texts', most=SHORT), strict=False):
        for name in ('text', 'raw'):
            is_long = len(row[name]) > SHORT
            expected = Long(row[name][:SHORT], len(row[name])) if is_long else row[name]
            assert cut[name] == expected
    looked = look(file, 'Texts')
    assert looked[4].cells['text'].text == 'ä' * SHORT + '… (100,000 characters)'
    assert looked[4].cells['text'].plain == {'start': 'ä' * SHORT, 'num_characters': 100_000}
    assert looked[4].cells['raw'].text == 'bytes, 100.0 kB'
    assert looked[4].cells['record'].plain['num_characters'] == 500_000
    assert len(looked[5].cells['text'].text) < 2 * SHORT


def test_what_other_tools_wrote_is_shown_too(kinds, place):
    deep = '[' * 5000 + ']' * 5000
    with sqlite3.connect(place['sql_file']) as connection:
        connection.execute('UPDATE Kinds SET record = ? WHERE id = 1', ('no JSON',))
        connection.execute('UPDATE Kinds SET record = ? WHERE id = 2', ('{"a": NaN}',))
        connection.execute('UPDATE Kinds SET record = ? WHERE id = 3', (deep,))
        connection.execute('UPDATE Kinds SET array = ? WHERE id = 1', (b'no array',))
        bad = b"\x93NUMPY\x01\x00v\x00{'descr': 'zz', 'fortran_order': False, 'shape': (3,), }"
        connection.execute('UPDATE Kinds SET array = ? WHERE id = 2', (bad,))
        connection.execute("UPDATE Kinds SET whole = 'text', number = 'text' WHERE id = 1")
        connection.execute(
            'UPDATE Kinds SET record = ? WHERE id = 4', ('{"a": "\\ud800", "b": 1e400}',)
        )
    rows = look(DatasetFile(place['sql_file']), 'Kinds', most=20_000)
    assert [row.cells['record'].plain for row in rows[:3]] == ['no JSON', '{"a": NaN}', deep]
    assert [row.cells['array'].plain for row in rows[:2]] == [
        {'num_bytes': 8},
        {'num_bytes': len(bad)},
    ]
    assert rows[0].cells['whole'].plain == 'text'
    for row in rows:
        json.dumps(row.plain()).encode()


def test_files_that_are_gone_are_told(kinds, place, tmp_path):
    file = DatasetFile(place['sql_file'])
    keys = [row.cells['file'].key for row in look(file, 'Kinds')]
    (place['data_dir'] / keys[3]).unlink()
    path = place['data_dir'] / keys[0]
    path.unlink()
    path.mkdir()
    assert {row.cells['file'].text for row in look(file, 'Kinds')} == {'the file is gone'}
    for key in ('../secret', '/etc/passwd', 'a/../../b', '', 'x' * 300, 'a\\b'):
        with sqlite3.connect(place['sql_file']) as connection:
            connection.execute('UPDATE Kinds__files SET path = ? WHERE id = 1', (key,))
        cell = look(file, 'Kinds')[0].cells['file']
        assert (cell.kind, cell.key) == ('lost', ''), key
    with sqlite3.connect(place['sql_file']) as connection:
        connection.execute('PRAGMA foreign_keys = OFF')
        connection.execute('UPDATE Kinds SET file = 77 WHERE id = 1')
    assert look(file, 'Kinds')[0].cells['file'].text == 'None'


def test_counts_are_those_of_all_values(kinds, place, tmp_path):
    kinds.rows[1:3].delete()
    kinds.extend(row_of(tmp_path, each) for each in (9, 10))
    kinds.rows[:3].materialize(workers=0, progress=False)
    file = DatasetFile(place['sql_file'])
    state = file.state('Kinds')
    with sqlite3.connect(place['sql_file']) as connection:

        def all_of(column, table):
            return [value for (value,) in connection.execute(f'SELECT "{column}" FROM "{table}"')]

        sizes = dict(connection.execute('SELECT id, num_bytes FROM Kinds__files'))
        for each in state.columns:
            table = f'Kinds__{each.name}' + ('__file' if each.is_file else '')
            values = all_of(each.name, 'Kinds') if not each.is_derived else all_of('value', table)
            values = [value for value in values if value is not None]
            if each.is_file:
                expected = sum(sizes[number] for number in set(values))
            else:
                texts = [v if isinstance(v, bytes) else str(v).encode() for v in values]
                expected = sum(map(len, texts))
            # of numbers SQLite writes fewer digits
            assert each.num_bytes == expected or each.type == 'float', each.name
            if not each.is_derived:
                assert each.num_kept == len(values)
        assert state.num_rows == 5
        assert {each.name: each.num_kept for each in state.columns}['size'] == 2
    (summary,) = file.summaries()
    assert summary.num_errors == sum(each.num_errors for each in state.columns) == 1
    assert (summary.num_rows, summary.num_columns) == (5, 13)
    assert summary.num_bytes + file.num_bytes == state.num_bytes
    assert file.count('Kinds') == 5


def test_values_of_rows_that_are_gone_do_not_count(kinds, place):
    with sqlite3.connect(place['sql_file']) as connection:
        (number,) = connection.execute(
            "SELECT current FROM finetuner_columns WHERE name = 'size'"
        ).fetchone()
        for row in (99, 2):
            connection.execute('DELETE FROM Kinds WHERE id = ?', (row,))
            connection.execute('INSERT INTO Kinds__size VALUES (?, ?, 1)', (row, number))
    state = DatasetFile(place['sql_file']).state('Kinds')
    assert {each.name: each.num_kept for each in state.columns}['size'] == 3


def test_errors_are_those_of_the_class(kinds, place, tmp_path):
    file = DatasetFile(place['sql_file'])
    assert file.errors('Kinds', 'copy') == kinds.errors('copy')
    assert file.errors('Kinds', 'size') == kinds.errors('size') != []
    assert file.errors('Kinds', 'double') == kinds.errors('double') == []
    kinds.extend(row_of(tmp_path, each, b'bad') for each in (6, 7, 8))
    kinds.materialize(workers=0, progress=False)
    every = kinds.errors('copy')
    assert file.errors('Kinds') == every
    assert file.errors('Kinds', 'copy', start=1, count=2) == every[1:3]
    assert file.errors('Kinds', rows=[every[2].row, 1]) == [every[2]]
    for name in ('file', 'none'):
        with pytest.raises(NotFoundError, match=f'derived column {name!r}'):
            file.errors('Kinds', name)
    kinds.rows[3:4].delete()
    assert file.errors('Kinds') == every[1:]


def test_a_file_of_a_row_is_found(kinds, place):
    file = DatasetFile(place['sql_file'])
    key = file.file_of('Kinds', 2, 'copy')
    assert file.sizes('Kinds', [key, 'other']) == {key: 4}
    assert b''.join(file.files('Kinds').read(key)) == b'good'
    for row, column in ((99, 'file'), (4, 'copy'), (1, 'text'), (1, 'none'), (-1, 'file')):
        with pytest.raises(NotFoundError):
            file.file_of('Kinds', row, column)


def test_the_graph_is_that_of_the_class(kinds, place):
    found = DatasetFile(place['sql_file']).graph('Kinds')
    assert found.svg == kinds.graph().svg
    assert found.source == kinds.graph().source

    @dataset(**place)
    class Kinds:
        file: File

        @version(2)
        def copy(file: File) -> File:
            return file

    assert DatasetFile(place['sql_file']).graph('Kinds').svg == Kinds.graph().svg


def test_a_locked_or_damaged_file_is_told(kinds, place):
    kinds.store.database.close()
    path = place['sql_file']
    file = DatasetFile(path)
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute('PRAGMA journal_mode = DELETE')
        connection.execute('BEGIN EXCLUSIVE')
        with pytest.raises(ConflictError, match='is locked by another process'):
            file.names()
        connection.execute('ROLLBACK')
        connection.execute('DROP TABLE Kinds__files')
    connection.close()
    with pytest.raises(DataError, match='no such table'):
        look(file, 'Kinds')
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(DataError, match='cannot be read'):
        file.state('Kinds')
    path.unlink()
    with pytest.raises(DataError, match='unable to open'):
        file.names()
