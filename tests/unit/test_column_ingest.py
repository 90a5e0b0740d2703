"""How rows come into datasets of columns: functions that yield them, CSV files, folders of files."""

from __future__ import annotations

import base64
import csv
import datetime
import inspect
import io
import json
import math
import os
import shutil
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuner.columns import File, dataset, ingest
from finetuner.columns.folder_import import natural
from finetuner.excepts import ConfigError, DataError

EMOJI = Path(__file__).parents[2] / 'examples' / 'emoji'


@pytest.fixture
def place(tmp_path):
    """Arguments of a dataset of its own."""
    return {'sql_file': tmp_path / 'kept' / 'rows.sql', 'data_dir': tmp_path / 'kept' / 'files'}


@pytest.fixture(autouse=True)
def _kept(tmp_path):
    (tmp_path / 'kept').mkdir()


def declare(place, text):
    """A dataset whose class says this."""
    names = {
        'File': File,
        'np': np,
        'Optional': Optional,
        'ingest': ingest,
        'datetime': datetime.datetime,
    }
    path = Path(place['sql_file']).with_name('declared.py')
    source = f'class Declared:\n{text}\n'
    path.write_text(source)
    exec(compile(source, str(path), 'exec', dont_inherit=True), names)
    return dataset(**place)(names['Declared'])


def fields(place, **kinds):
    """A dataset of fields: a type, or a type and a default."""
    plain = {name: each if isinstance(each, tuple) else (each,) for name, each in kinds.items()}
    body = {'__annotations__': {name: each[0] for name, each in plain.items()}}
    body.update((name, each[1]) for name, each in plain.items() if len(each) == 2)
    return dataset(**place)(type('Typed', (), body))


def values(made, *names):
    return [tuple(getattr(row, name) for name in names) for row in made]


# ---- @ingest


def numbers(place):
    @dataset(**place)
    class Numbers:
        number: int
        name: str = 'none'

        def doubled(number: int) -> int:
            return 2 * number

        @ingest
        def count_up(stop: int, *, bad: int = -1):
            """Numbers from 0."""
            for number in range(stop):
                yield {'number': 'bad' if number == bad else number}

        @ingest
        def given(rows):
            return rows

        @ingest
        def broken(at):
            for number in range(at):
                yield {'number': number}
            raise ZeroDivisionError('by the function itself')

    return Numbers


def test_what_a_function_yields_is_added_and_counted(place):
    made = numbers(place)
    assert made.count_up(2_500) == 2_500
    assert made.count_up(stop=2) == 2
    assert made.given([{'number': 7, 'name': 'seven'}]) == 1
    assert made.given(iter([])) == 0
    assert [row.number for row in made] == [*range(2_500), 0, 1, 7]
    assert made[-1].name == 'seven'
    assert made[3].doubled == 6
    assert list(made.declaration.fields) == ['number', 'name']
    assert list(made.declaration.derived) == ['doubled']


def test_the_function_is_as_it_was_written(place):
    made = numbers(place)
    assert made.count_up.__name__ == 'count_up'
    assert made.count_up.__doc__ == 'Numbers from 0.'
    assert str(inspect.signature(made.count_up)) == "(stop: 'int', *, bad: 'int' = -1)"
    assert list(made.count_up.__wrapped__(2)) == [{'number': 0}, {'number': 1}]
    with pytest.raises(TypeError, match='stop'):
        made.count_up()
    assert len(made) == 0


def test_a_row_that_is_none_is_told_by_its_position_and_those_before_it_stay(place):
    made = numbers(place)
    with pytest.raises(DataError, match="row 1,200: number: it takes int, not str 'bad'"):
        made.count_up(2_000, bad=1_200)
    assert len(made) == 1_200
    with pytest.raises(ZeroDivisionError):
        made.broken(3)
    assert len(made) == 1_203


@pytest.mark.parametrize('rows', [None, 3, 'text', {'number': 1}])
def test_a_function_that_returns_no_rows_is_told(rows, place):
    made = numbers(place)
    with pytest.raises(DataError, match=r'Numbers.given\(\) returned .*yields each'):
        made.given(rows)


def test_rows_go_to_the_class_that_is_asked(place, tmp_path):
    class Counting:
        @ingest
        def count_up(stop):
            return ({'number': number} for number in range(stop))

    class One(Counting):
        number: int

    class Two(Counting):
        number: int

    first = dataset(**place)(One)
    second = dataset(**place)(Two)
    assert (first.count_up(2), second.count_up(3)) == (2, 3)
    assert (len(first), len(second)) == (2, 3)
    with pytest.raises(ConfigError, match='count_up is of no dataset'):
        Counting.count_up(2)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('    a: int\n    @ingest\n    def add(): ...', "declared.py:3: .*called 'add'"),
        (
            '    a: int\n    @ingest\n    def import_csv(): ...',
            "declared.py:3: .*called 'import_csv'",
        ),
        ('    a: int\n    @ingest\n    def _b(): ...', "declared.py:3: .*called '_b'"),
        ('    a: int\n    @ingest\n    def a(): ...', 'declared.py:3: .*a field and a function'),
        ('    a: int\n    def a() -> int: ...', 'declared.py:3: .*a field and a function'),
        ('    a: int\n    @ingest\n    def b(self): ...', 'declared.py:3: .*b: .*take no self'),
        (
            '    a: int\n    @ingest\n    def b(): ...\n    def c(b: int) -> int: ...',
            "declared.py:5: .*unknown column 'b'",
        ),
        ('    a: int\n    b = ingest(int)', '@ingest takes a function, not type'),
        (
            '    a: int\n    @ingest\n    @staticmethod\n    def b(): ...',
            '@ingest takes a function, not staticmethod',
        ),
    ],
)
def test_what_cannot_bring_rows_in_is_told_when_the_class_is_defined(text, words, place):
    with pytest.raises(ConfigError, match=words):
        declare(place, text)


# ---- CSV


def written(tmp_path, text, name='rows.csv', encoding='utf-8'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


CELLS = [
    (str, 'a ', 'a '),
    (str, '12', '12'),
    (int, ' 12 ', 12),
    (int, '-9223372036854775808', -(2**63)),
    (float, '1', 1.0),
    (float, '-.5e3', -500.0),
    (float, 'inf', math.inf),
    *((bool, word, True) for word in ('true', 'True', 'YES', '1', 't', 'y', 'on')),
    *((bool, word, False) for word in ('false', 'No', '0', 'F', 'n', 'off')),
    (bytes, base64.b64encode(b'\0\xff!').decode(), b'\0\xff!'),
    (datetime.datetime, '2024-05-01', datetime.datetime(2024, 5, 1)),
    (
        datetime.datetime,
        '2024-05-01T12:30:00.250',
        datetime.datetime(2024, 5, 1, 12, 30, 0, 250000),
    ),
    (
        datetime.datetime,
        '2024-05-01 12:30:00Z',
        datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.timezone.utc),
    ),
    (dict, '{"a": [1, null]}', {'a': [1, None]}),
    (list[int], '[1, 2]', [1, 2]),
    (Optional[int], '12', 12),  # noqa: UP045 - as many write it
]


@pytest.mark.parametrize(('kind', 'cell', 'value'), CELLS)
def test_a_cell_is_read_as_the_type_of_its_field_says(kind, cell, value, place, tmp_path):
    made = fields(place, value=kind, other=(int, 0))
    with (tmp_path / 'rows.csv').open('w', newline='') as file:
        csv.writer(file).writerows([['value', 'other'], [cell, 1]])
    assert made.import_csv(tmp_path / 'rows.csv') == 1
    assert made[0].value == value
    assert type(made[0].value) is type(value)


@pytest.mark.parametrize(
    ('kind', 'cell', 'words'),
    [
        (int, '1.0', 'int, such as'),
        (int, '1_000', 'int'),
        (int, '9223372036854775808', '64 bits'),
        (int, '9' * 5_000, '4300 digits'),
        (float, '0,5', 'float, such as'),
        (float, '1_0', 'float'),
        (Optional[float], 'nan', 'nan cannot be told'),  # noqa: UP045
        (bool, 'perhaps', 'true, t, yes'),
        (datetime.datetime, 'yesterday', 'datetime, such as'),
        (bytes, 'not base64!', 'base64'),
        (bytes, 'a', 'base64'),
        (dict, '[1]', 'JSON of list'),
        (dict, '{"a": NaN}', 'not JSON compliant'),
        (dict, "{'a': 1}", 'dict, as JSON'),
        (list, '[' * 100_000, 'list, as JSON'),
        (str, '', "'value' has no default"),
        (int, '  ', "'value' has no default"),
    ],
)
def test_a_cell_that_is_none_of_its_type_is_told_with_file_line_and_column(
    kind, cell, words, place, tmp_path
):
    made = fields(place, value=kind, other=str)
    with (tmp_path / 'rows.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        good = {
            int: '1',
            float: '1',
            bool: '1',
            dict: '{}',
            list: '[]',
            bytes: 'aGk=',
            str: 'x',
        }.get(kind, '2024-05-01' if kind is datetime.datetime else '')
        writer.writerows([['other', 'value'], ['two\nlines', good], ['x', cell], ['x', good]])
    with pytest.raises(DataError, match=words) as told:
        made.import_csv(tmp_path / 'rows.csv')
    message = str(told.value)
    assert message.startswith(f"row at line 4 of '{tmp_path / 'rows.csv'}': column 'value': ")
    assert message.endswith('; 1 row was added before it')
    assert len(message) < 500
    assert len(made) == 1


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters='\0', codec='utf-8'), min_size=1),
            st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False),
            st.one_of(st.none(), st.booleans()),
        ),
        min_size=1,
        max_size=20,
    ),
    delimiter=st.sampled_from(',;\t|'),
    encoding=st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16']),
    told=st.booleans(),
    newline=st.sampled_from(['\n', '\r\n']),
)
def test_what_was_written_comes_back(rows, delimiter, encoding, told, newline, made, tmp_path):
    text = io.StringIO(newline='')
    writer = csv.writer(
        text, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC, lineterminator=newline
    )
    writer.writerow(['text', 'number', 'score', 'flag'])
    writer.writerows([[*row[:3], '' if row[3] is None else str(row[3])] for row in rows])
    path = written(tmp_path, text.getvalue(), encoding=encoding)
    made.rows.delete()
    given_encoding = 'utf-8' if encoding.startswith('utf-8') else encoding
    added = made.import_csv(path, delimiter=delimiter if told else None, encoding=given_encoding)
    assert added == len(rows)
    assert values(made, 'text', 'number', 'score', 'flag') == rows


@pytest.fixture
def made(place):
    return fields(place, number=int, text=(str, ''), score=(float, 0.0), flag=bool | None)


def test_an_empty_cell_is_the_default_or_none(place, tmp_path):
    made = fields(place, a=(str, 'x'), b=int | None, c=(int | None, 3), d=(str, 'left out'))
    path = written(tmp_path, 'a,b,c\n1,2,4\n,,\n"",""," "\n\n   \n')
    assert made.import_csv(path) == 3
    assert values(made, 'a', 'b', 'c', 'd') == [
        ('1', 2, 4, 'left out'),
        ('x', None, 3, 'left out'),
        ('x', None, 3, 'left out'),
    ]


def test_a_row_of_one_empty_cell_is_a_row(place, tmp_path):
    made = fields(place, a=(str, 'x'))
    text = io.StringIO(newline='')
    csv.writer(text).writerows([['a'], ['1'], [''], ['2']])
    assert made.import_csv(written(tmp_path, text.getvalue())) == 3
    assert values(made, 'a') == [('1',), ('x',), ('2',)]


def test_newlines_quotes_and_huge_cells_are_cells(place, tmp_path):
    made = fields(place, text=str, number=int)
    huge = 'x' * 3_000_000
    cells = ['two\r\nlines', 'a "quoted" word', 'comma, semicolon; tab\t|', huge]
    with (tmp_path / 'rows.csv').open('w', newline='') as file:
        csv.writer(file).writerows([['text', 'number'], *([cell, 1] for cell in cells)])
    assert made.import_csv(tmp_path / 'rows.csv') == 4
    assert [row.text for row in made] == cells


def test_the_header_finds_the_delimiter(place, tmp_path):
    # cut by commas the rows are even as well, and there are more of them
    made = fields(place, **dict.fromkeys('abcdef', str))
    text = 'f;e;d;c;b;a\n' + '1,5;2,5;3,5;4,5;5,5;6,5\n' * 3
    assert made.import_csv(written(tmp_path, text)) == 3
    assert values(made, 'a', 'f')[0] == ('6,5', '1,5')
    one = fields({**place, 'sql_file': place['sql_file'].with_name('one.sql')}, text=str)
    text = 'text\nprose, with a comma\nand without\n'
    assert one.import_csv(written(tmp_path, text)) == 2
    assert one[0].text == 'prose, with a comma'
    assert one.import_csv(written(tmp_path, 'text\na\tb\n'), delimiter=',') == 1
    with pytest.raises(DataError, match='2 columns, the first row has 1'):
        one.import_csv(written(tmp_path, 'text\na\tb\n', 'rows.tsv'))


def test_columns_say_what_the_header_calls_fields(place, tmp_path):
    made = fields(place, label=str, split=(str, 'train'), other=(int, 0))
    path = written(tmp_path, ',label, The class ,split,more\n0,wrong,cat,test,x\n')
    with pytest.raises(DataError, match=r"unknown field ''.*columns=.*left out"):
        made.import_csv(path)
    assert made.import_csv(path, columns={'label': 'The class'}) == 1
    assert values(made, 'label', 'split', 'other') == [('cat', 'test', 0)]
    with pytest.raises(DataError, match="no 'Nope', for the field 'split'"):
        made.import_csv(path, columns={'split': 'Nope'})


def test_twice_adds_twice(made, tmp_path):
    path = written(tmp_path, 'number\n1\n2\n')
    assert made.import_csv(path) + made.import_csv(str(path)) == 4
    assert [row.number for row in made] == [1, 2, 1, 2]


def test_rows_before_an_error_stay_and_are_counted(made, tmp_path):
    text = 'number\n' + ''.join(f'{number}\n' for number in range(2_345)) + 'x\n5\n'
    with pytest.raises(DataError, match=r'line 2347 .*; 2,345 rows were added before it'):
        made.import_csv(written(tmp_path, text))
    assert [row.number for row in made] == list(range(2_345))


@pytest.mark.parametrize(
    ('text', 'arguments', 'words'),
    [
        ('', {}, 'holds no header'),
        ('\n \n', {}, 'holds no header'),
        ('number,text\n1,a\n2\n', {}, 'line 3 .*1 column, the first row has 2.*delimiter='),
        ('number,text\n1,"a\n2,b\n', {}, 'line 2 .*unexpected end'),
        ('number,text\n1,a\0b\n', {}, "line 2 .*zero byte.*Set encoding=..., such as 'utf-16'"),
        (b'number,text\n1,\xff\n', {}, 'byte 0xff at position 14.*Set encoding='),
        ('numbr,text\n1,a\n', {}, "line 1 .*unknown field 'numbr': did you mean 'number'"),
        ('1,2\n', {}, 'The first row has to be a header'),
        ('text\na\n', {}, "no 'number', for the field 'number'.*columns="),
        ('number,number\n1,2\n', {}, "names 'number' twice"),
        ('number\n1\n', {'delimiter': ';;'}, 'one character'),
        ('number\n1\n', {'delimiter': '"'}, 'one character'),
        ('number\n1\n', {'encoding': 'klingon'}, "encoding='klingon'"),
        ('number\n1\n', {'columns': ['number']}, 'by field'),
        ('number\n1\n', {'columns': {'number': 3}}, 'by field'),
        ('number\n1\n', {'columns': {'nmber': 'number'}}, "columns: unknown field 'nmber'"),
        ('number\n1\n', {'base_dir': 'nowhere'}, "base_dir='nowhere': there is no such folder"),
    ],
)
def test_a_file_or_an_argument_that_is_wrong_is_told(text, arguments, words, made, tmp_path):
    with pytest.raises((DataError, ConfigError), match=words):
        made.import_csv(written(tmp_path, text), **arguments)
    with pytest.raises(DataError, match='there is no CSV file'):
        made.import_csv(tmp_path)
    with pytest.raises(ConfigError, match='not int'):
        made.import_csv(3)


def test_a_field_that_no_cell_can_be_is_told(place, tmp_path):
    made = declare(
        place,
        '    a: int\n    array: Optional[np.ndarray]\n    def double(a: int) -> int: return 2 * a\n',
    )
    with pytest.raises(ConfigError, match=r"'array' is Optional\[numpy.ndarray\].*@ingest"):
        made.import_csv(written(tmp_path, 'a,array\n1,\n'))
    with pytest.raises(DataError, match="'double' is a derived column, which is computed"):
        made.import_csv(written(tmp_path, 'a,double\n1,2\n'))
    assert made.import_csv(written(tmp_path, 'a\n1\n')) == 1
    assert made[0].array is None


def test_files_are_found_from_the_folder_of_the_csv(place, tmp_path, monkeypatch):
    made = fields(place, image=File['webp'], concept=(str, ''))
    folder = tmp_path / 'data'
    shutil.copytree(EMOJI / 'train' / 'alien-monster', folder / 'pictures')
    outside = tmp_path / 'outside.webp'
    shutil.copy(EMOJI / 'train' / 'angry-face' / 'noto.webp', outside)
    monkeypatch.chdir('/')
    with (folder / 'rows.csv').open('w', newline='') as file:
        csv.writer(file).writerows(
            [
                ['image', 'concept'],
                ['pictures/noto.webp', 'a'],
                [str(outside), 'b'],
                ['pictures/../pictures/./noto.webp', 'c'],
                [outside.as_uri(), 'd'],
            ]
        )
    assert made.import_csv(folder / 'rows.csv') == 4
    noto = (EMOJI / 'train' / 'alien-monster' / 'noto.webp').read_bytes()
    assert [row.image.read() for row in made] == [noto, outside.read_bytes()] * 1 + [
        noto,
        outside.read_bytes(),
    ]
    # what leaves the folder is named, and taken only where that is said
    for cell in ('../outside.webp', 'pictures/../../outside.webp', 'file:../outside.webp'):
        path = written(folder, f'image\n{cell}\n', 'leaving.csv')
        with pytest.raises(DataError, match=r'line 2 .*leaves the folder.*base_dir='):
            made.import_csv(path)
        assert made.import_csv(path, base_dir=folder) == 1
    path = written(tmp_path, 'image\nnoto.webp\n', 'elsewhere.csv')
    assert made.import_csv(path, base_dir=folder / 'pictures') == 1


@pytest.mark.parametrize(
    ('cell', 'words'),
    [
        ('https://example.com/a.webp', 'is an address.*download it'),
        ('s3://bucket/a.webp', 'is an address'),
        ('data:image/webp;base64,aGk=', 'is an address'),
        ('missing.webp', "no file 'missing.webp'"),
        ('kept', "no file 'kept'"),
        ('/dev/zero', "no file '/dev/zero'"),
        ('rows.csv', "its ending is '.csv'"),
    ],
)
def test_a_cell_that_names_no_file_is_told(cell, words, place, tmp_path):
    made = fields(place, image=File['webp'])
    with pytest.raises(DataError, match=f"line 2 .*column 'image': .*{words}"):
        made.import_csv(written(tmp_path, f'image\n"{cell}"\n'))
    assert len(made) == 0


# ---- folders


def laid_out(folder, *names):
    """Files that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_classes_are_those_of_torchvision(place, tmp_path):
    from finetuner.models.torchvision_import import import_torchvision

    made = fields(place, image=File['webp'], concept=str, split=(str, ''))
    for concept in sorted(os.listdir(EMOJI / 'train'))[:20]:
        shutil.copytree(EMOJI / 'train' / concept, tmp_path / 'pictures' / concept)
    laid_out(tmp_path / 'pictures', '.hidden/a.webp', 'alien-monster/.b.webp')
    shutil.rmtree(tmp_path / 'pictures' / '.hidden')
    peer = import_torchvision().datasets.ImageFolder(
        tmp_path / 'pictures', is_valid_file=lambda path: not Path(path).name.startswith('.')
    )
    added = made.import_folder(tmp_path / 'pictures', label='concept', values={'split': 'train'})
    assert added == len(peer) == 80
    assert [(row.concept, row.image.read()) for row in made] == [
        (peer.classes[target], Path(path).read_bytes()) for path, target in peer.samples
    ]
    assert {row.split for row in made} == {'train'}


def test_files_of_a_name_are_one_row(place, tmp_path):
    made = fields(place, image=File['jpg', 'png'], mask=File['png'], note=File | None)
    folder = laid_out(
        tmp_path / 'scenes',
        *(f'image/{name}' for name in ('10.jpg', '2.png', 'b/1.v2.jpg', '1.PNG')),
        *(f'mask/{name}' for name in ('10.png', '2.png', 'b/1.v2.png', '1.png')),
        'note/2.txt',
        'README.md',
        '.git/config',
        'mask/.DS_Store',
        'image/Thumbs.db',
    )
    assert made.import_folder(folder) == 4
    found = [
        (row.image.read().decode(), row.mask.read().decode(), row.note and row.note.read().decode())
        for row in made
    ]
    assert found == [
        ('image/1.PNG', 'mask/1.png', None),
        ('image/2.png', 'mask/2.png', 'note/2.txt'),
        ('image/10.jpg', 'mask/10.png', None),
        ('image/b/1.v2.jpg', 'mask/b/1.v2.png', None),
    ]


def test_folders_may_be_called_otherwise_and_have_classes(place, tmp_path):
    made = fields(place, image=File, mask=File, note=File | None, kind=(str, 'none'))
    folder = laid_out(
        tmp_path / 'voc', 'JPEG/cat/1.jpg', 'SEG/all/cat/1.png', 'SEG/all/dog/1.png',
        'JPEG/dog/1.jpg', 'other/x.txt',
    )  # fmt: skip
    names = {'mask': 'SEG/all', 'image': 'JPEG'}
    assert made.import_folder(folder, folders=names, label='kind') == 2
    assert [(row.kind, row.mask.read()) for row in made] == [
        ('cat', b'SEG/all/cat/1.png'),
        ('dog', b'SEG/all/dog/1.png'),
    ]
    with pytest.raises(DataError, match=r"in no folder.*'kind': 'JPEG/2.jpg'"):
        made.import_folder(laid_out(folder, 'JPEG/2.jpg'), folders=names, label='kind')
    assert len(made) == 2


@pytest.mark.parametrize(
    ('names', 'words'),
    [
        (['image/1.png', 'image/2.png', 'mask/1.png'], "1 file has no partner in 'mask': 'image/2"),
        (['image/1.png', 'mask/1.png', 'mask/3.png'], "no partner in 'image': 'mask/3.png'"),
        (['image/1.png'], "no folder 'mask'.*folders=.*field="),
        (['image/1.png', 'mask/1.png', 'image/1.jpg'], "'image/1.*' and 'image/1.*' would be"),
        (['image/1.png', 'mask/1.png', 'notes/1.png'], "of no field: .*'notes'.*'note'"),
        (['image/1.png', 'mask/1.png', 'mask/1.txt'], "'mask' does not take.*'mask/1.txt'"),
        (['image/.1.png', 'mask/.1.png'], 'there is no file'),
    ],
)
def test_what_is_no_pair_is_told_before_a_row_is_added(names, words, place, tmp_path):
    made = fields(place, image=File, mask=File['png'], note=File | None)
    with pytest.raises(DataError, match=words):
        made.import_folder(laid_out(tmp_path / 'scenes', *names))
    assert len(made) == 0


def test_one_folder_has_the_files_of_one_field(place, tmp_path):
    made = fields(place, scan=File, name=str, note=File | None)
    folder = laid_out(tmp_path / 'scans', '10.png', '9.png', 'more/1.png', '9.json')
    for name in ('more/1.json', '10.json'):
        laid_out(folder, name)

    def others(path):
        assert path.is_absolute()
        return {'name': path.stem, 'note': path.with_suffix('.json')}

    with pytest.raises(DataError, match=r"'more'.*field='...' where all files are of one"):
        made.import_folder(folder, values=others)
    typed = fields(
        {**place, 'sql_file': place['sql_file'].with_name('typed.sql')},
        scan=File['png'],
        name=str,
        note=File | None,
    )
    with pytest.raises(DataError, match=r"3 files .*'scan' does not take.*on_other='skip'"):
        typed.import_folder(folder, field='scan', values=others)
    added = typed.import_folder(folder, field='scan', values=others, on_other='skip')
    assert added == 3
    assert [(row.name, row.note.read().decode()) for row in typed] == [
        ('9', '9.json'),
        ('10', '10.json'),
        ('1', 'more/1.json'),
    ]
    assert typed.import_folder(folder, field='scan', values=others, on_other='skip') == 3
    assert len(typed) == 6


def test_what_was_skipped_is_told(place, tmp_path, caplog):
    made = fields(place, image=File['png'], kind=(str, ''))
    folder = laid_out(tmp_path / 'pets', 'cat/1.png', 'cat/2.jpg', 'README.md')
    (folder / 'cat' / 'gone.png').symlink_to(folder / 'nowhere.png')
    with pytest.raises(DataError, match=r"1 file .*would be their 'kind': 'README.md'"):
        made.import_folder(folder, label='kind')
    assert made.import_folder(folder, label='kind', on_other='skip') == 1
    for name in ('2.jpg', 'README.md', 'gone.png'):
        assert name in caplog.text


def test_links_are_followed_and_each_folder_once(place, tmp_path):
    made = fields(place, image=File, kind=(str, ''))
    folder = laid_out(tmp_path / 'pets', 'cat/1.png')
    laid_out(tmp_path / 'elsewhere', '2.png')
    (folder / 'dog').symlink_to(tmp_path / 'elsewhere')
    (folder / 'cat' / 'up').symlink_to(folder)
    (tmp_path / 'elsewhere' / 'round').symlink_to(folder)
    (folder / 'cat' / '3.png').symlink_to(tmp_path / 'elsewhere' / '2.png')
    assert made.import_folder(folder, label='kind') == 3
    assert [(row.kind, row.image.read()) for row in made] == [
        ('cat', b'cat/1.png'),
        ('cat', b'2.png'),
        ('dog', b'2.png'),
    ]
    assert made.import_folder(folder) == 3


def test_parts_of_a_data_set_are_no_classes(place, tmp_path):
    made = fields(place, image=File['webp'], concept=str, split=(str, ''))
    with pytest.raises(DataError, match=r"parts of a data set.*values=\{'split': 'test'\}"):
        made.import_folder(EMOJI, label='concept', on_other='skip')
    assert len(made) == 0


def test_a_dataset_is_not_added_to_itself(tmp_path):
    place = {'sql_file': tmp_path / 'kept' / 'rows.sql', 'data_dir': tmp_path / 'pets' / 'files'}
    made = fields(place, image=File['png'])
    laid_out(tmp_path / 'pets', 'cat/1.png')
    assert made.import_folder(tmp_path / 'pets' / 'cat') == 1
    with pytest.raises(DataError, match='keeps its own'):
        made.import_folder(tmp_path / 'pets')
    with pytest.raises(DataError, match='keeps its own'):
        made.import_folder(laid_out(tmp_path / 'kept', '1.png'))
    assert len(made) == 1


def test_a_row_that_is_none_names_its_file_and_those_before_it_stay(place, tmp_path):
    made = fields(place, image=File, name=str)
    folder = laid_out(tmp_path / 'pets', *(f'{number}.png' for number in range(30)))

    def others(path):
        return {'name': path.stem if path.stem != '12' else 12}

    with pytest.raises(DataError, match=r"'12.png': name: it takes str.*; 12 rows were added"):
        made.import_folder(folder, values=others)
    assert [row.name for row in made] == [str(number) for number in range(12)]
    for wrong, words in [({'nme': ''}, "field 'nme'"), ({}, "'name' is missing"), (3, 'no values')]:
        with pytest.raises(DataError, match=words):
            made.import_folder(folder, values=lambda path, wrong=wrong: wrong)
    with pytest.raises(DataError, match="'image' is what the folder says"):
        made.import_folder(folder, values=lambda path: {'image': path})


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({}, "'name' has no default: give values"),
        ({'label': 'nme'}, "label='nme': unknown field 'nme': did you mean 'name'"),
        ({'label': 'number'}, "label='number': names of folders are str"),
        ({'label': 'image'}, "label='image': names of folders are str"),
        ({'label': ['name']}, 'the name of a field'),
        ({'field': 'name'}, "field='name': unknown File field"),
        ({'field': 'image', 'folders': {'image': 'a'}}, 'folders or field'),
        ({'folders': {}}, 'folders by File field'),
        ({'folders': {'name': 'a'}}, 'unknown File field'),
        ({'folders': {'image': 3}}, 'the path of a folder'),
        ({'values': {'name': 3}}, 'values: name: it takes str'),
        ({'values': {'nme': 'x'}}, "values: unknown field 'nme'"),
        ({'values': 3}, 'values: int'),
        ({'values': {'name': 'x'}, 'label': 'name'}, "'name' is what the folder says"),
        ({'values': {'name': 'x'}, 'on_other': 'ignore'}, "on_other='ignore'"),
    ],
)
def test_an_argument_that_is_wrong_is_told_at_the_door(arguments, words, place, tmp_path):
    made = fields(place, image=File, name=str, number=(int, 0))
    folder = laid_out(tmp_path / 'pets', 'cat/1.png')
    with pytest.raises(ConfigError, match=words):
        made.import_folder(folder, **arguments)
    with pytest.raises(DataError, match='there is no folder'):
        made.import_folder(folder / 'cat' / '1.png', values={'name': 'x'})
    with pytest.raises(ConfigError, match='the path of a folder, not int'):
        made.import_folder(3)
    assert len(made) == 0


def test_a_dataset_without_files_has_no_folders(made, tmp_path):
    with pytest.raises(ConfigError, match='has no File field'):
        made.import_folder(laid_out(tmp_path / 'pets', '1.png'))


@given(st.lists(st.integers(0, 10**6), unique=True), st.sampled_from(['', 'a', '7/']))
def test_the_natural_order_is_that_of_numbers(numbers, start):
    names = [f'{start}{number}.png' for number in sorted(numbers, key=str)]
    assert sorted(names, key=natural) == [f'{start}{number}.png' for number in sorted(numbers)]


@given(st.lists(st.text(st.sampled_from('a1٣².0/'), min_size=1), min_size=2))
def test_the_natural_order_is_one(names):
    backwards = names[::-1]
    assert sorted(names, key=natural) == sorted(backwards, key=natural)


def test_an_import_is_read_as_json_says(place, tmp_path):
    """What one dataset kept, another reads from a CSV file that was made of it."""
    made = fields(place, tags=dict, size=list)
    given_rows = [{'tags': {'ä': [number, None]}, 'size': [number, 2.5]} for number in range(5)]
    made.extend(given_rows)
    with (tmp_path / 'rows.csv').open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['tags', 'size'])
        writer.writerows([json.dumps(row.tags), json.dumps(row.size)] for row in made)
    assert made.import_csv(tmp_path / 'rows.csv') == 5
    assert values(made, 'tags', 'size') == [(row['tags'], row['size']) for row in given_rows] * 2
