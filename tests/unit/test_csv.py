"""CSV files: what each form of row becomes, and which rows are refused by their line."""

import csv
import io
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest

from finetuner.data.csv import CSVOptions, is_picture_cell, read_csv
from finetuner.data.documents import data_kind
from finetuner.excepts import ConfigError, DataError
from tests.conftest import png


def read(text, **options):
    return list(read_csv(io.StringIO(text), CSVOptions(**options)))


def written(tmp_path, text, encoding='utf-8', name='x.csv'):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(np.full((2, 2, 3), value, np.uint8)))
    return path


def labelled(docs):
    return [(doc.text, doc.tags['finetuner_label']) for doc in docs]


def test_options_are_those_of_finetuner():
    assert [(field.name, field.default) for field in fields(CSVOptions)] == [
        ('size', None), ('sampling_rate', None), ('dialect', 'auto'), ('encoding', 'utf-8'),
        ('is_labeled', False), ('convert_to_blob', True), ('create_point_clouds', True),
        ('point_cloud_size', 2048),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('size', 0), ('size', 1.5), ('size', True), ('sampling_rate', 1.1), ('sampling_rate', 'x'),
        ('sampling_rate', float('nan')), ('dialect', 'excell'), ('dialect', 5),
        ('dialect', csv.Dialect), ('encoding', 'nope'), ('encoding', 'base64'), ('encoding', None),
        ('is_labeled', 'yes'), ('convert_to_blob', None), ('point_cloud_size', -1),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name if name != 'dialect' else 'ialect'):
        CSVOptions(**{name: value})
    options = CSVOptions()
    setattr(options, name, value)
    with pytest.raises(ConfigError):
        read_csv(io.StringIO('a,b'), options)


def test_options_of_another_type_are_refused():
    with pytest.raises(ConfigError, match='dict'):
        read_csv(io.StringIO('a'), {'size': 3})


def test_labelled_texts():
    docs = read('a red fox,fox\n"a cat, asleep", 1 \n', is_labeled=True)
    assert labelled(docs) == [('a red fox', 'fox'), ('a cat, asleep', '1')]
    assert data_kind(docs) == 'class'


def test_labelled_pictures_are_relative_to_the_file(tmp_path, monkeypatch):
    content = picture(tmp_path / 'data/pictures/a.PNG').read_bytes()
    path = written(tmp_path / 'data', 'pictures/a.PNG,cat\n')
    monkeypatch.chdir(tmp_path)
    (doc,) = read_csv('data/x.csv', CSVOptions(is_labeled=True))
    assert (doc.blob, doc.uri) == (content, '')
    assert doc.tags == {'file': 'pictures/a.PNG', 'finetuner_label': 'cat'}
    (doc,) = read_csv(path, CSVOptions(is_labeled=True, convert_to_blob=False))
    assert (doc.blob, doc.uri) == (b'', str(tmp_path / 'data/pictures/a.PNG'))
    # for an open file they are relative to where one stands
    with path.open() as file, pytest.raises(DataError, match='no file'):
        list(read_csv(file, CSVOptions(is_labeled=True)))


def test_one_column_is_instances():
    docs = read('one thing\nanother, "quoted"\n', dialect='excel-tab')
    assert [doc.text for doc in docs] == ['one thing', 'another, "quoted"']
    assert data_kind(docs) == 'instance'


@pytest.mark.parametrize('text', ['http://h/a.png,"a, b"\n', '"a, b",http://h/a.png\n'])
def test_text_image_pairs_in_either_order(text):
    docs = read(text)
    assert data_kind(docs) == 'text_image_pair'
    assert [(c.modality, c.text, c.uri) for c in docs[0].chunks] == [
        ('text', 'a, b', ''), ('image', '', 'http://h/a.png'),
    ]  # fmt: skip


def test_query_document_pairs_become_classes():
    docs = read('q1,d1\nq2,d2\nq3,d3\nq2,d1\n')
    assert labelled(docs) == [('q1', 0), ('d1', 0), ('q2', 0), ('d2', 0), ('q3', 1), ('d3', 1)]
    assert data_kind(docs) == 'class'


def test_pairs_of_pictures_are_joined_by_file(tmp_path):
    for number, name in enumerate('abc'):
        picture(tmp_path / f'{name}.png', number)
    docs = list(read_csv(written(tmp_path, 'a.png,b.png\n./b.png,c.png\n')))
    assert [doc.tags['finetuner_label'] for doc in docs] == [0, 0, 0]
    assert [doc.blob for doc in docs] == [(tmp_path / f'{n}.png').read_bytes() for n in 'abc']
    assert not any(doc.uri for doc in docs)


def test_scored_pairs():
    docs = read('a,b,0.5\nc,d,1\n"e\nf",g, 1e-1\n')
    assert data_kind(docs) == 'scored_pair'
    assert [doc.tags['finetuner_score'] for doc in docs] == [0.5, 1.0, 0.1]
    assert [(c.modality, c.text) for c in docs[2].chunks] == [('text', 'e\nf'), ('text', 'g')]


@pytest.mark.parametrize('score', ['NaN', 'inf', '1.01', '-0.1', 'high', '0,5'])
def test_scores_out_of_range_name_their_line(score):
    with pytest.raises(DataError, match=r'row at line 5 .*score') as caught:
        read(f'"a\nb";c;0.5\n\n  \nd;e;{score}\n')
    assert 'header' not in str(caught.value)
    with pytest.raises(DataError, match=r'row at line 1 .*header'):
        read(f'd;e;{score}\na;b;0.5\n')


def test_a_header_is_refused():
    for text in ('text,label\na,b\n', 'Label\n', 'query,document,score\n'):
        with pytest.raises(DataError, match=r'line 1 .*header'):
            read(text)
    with pytest.raises(DataError, match=r'line 2 .*header'):
        read('my pictures,my texts\nhttp://h/a.png,a\n')


@pytest.mark.parametrize(
    ('text', 'cells'),
    [
        ('a\tb\n', ['a', 'b']),
        ('Hello, world\tgreeting\nBye, you\tparting\n', ['Hello, world', 'greeting']),
        ('a, b;c\nd;e\n', ['a, b', 'c']),
        ('a|b\n"c|d"|e\n', ['a', 'b']),
        ('"a", "b, c"\nd, e\n', ['a', 'b, c']),
        ('"a ""b""",c\n', ['a "b"', 'c']),
    ],
)
def test_the_dialect_is_found(text, cells):
    doc = read(text, is_labeled=True)[0]
    assert [doc.text, doc.tags['finetuner_label']] == cells


@pytest.mark.parametrize(
    ('dialect', 'text'),
    [
        ('excel', 'a;x,b'), ('excel-tab', 'a;x\tb'), ('unix', '"a;x","b"\n'),
        (csv.excel_tab, 'a;x\tb'), (csv.excel(), 'a;x,b'), (csv.get_dialect('unix'), '"a;x","b"'),
    ],
)  # fmt: skip
def test_dialects_that_are_given(dialect, text):
    assert labelled(read(text, is_labeled=True, dialect=dialect)) == [('a;x', 'b')]


def test_prose_is_one_column():
    lines = ['Hello there.', 'It is, as they say, over.', 'Well', 'One, two']
    assert [doc.text for doc in read('\n'.join(lines))] == lines


def test_a_tsv_is_cut_at_tabs(tmp_path):
    docs = read_csv(written(tmp_path, 'a, b\nc, d\n', name='x.tsv'))
    assert [doc.text for doc in docs] == ['a, b', 'c, d']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'latin-1'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    text = end.join(['"ä, ö","b ""c"" d"', '', '   ', '"e\r\nf",ß', ''])
    path = written(tmp_path, text, encoding)
    options = CSVOptions(is_labeled=True, encoding='utf-8' if 'utf-8' in encoding else encoding)
    assert labelled(read_csv(path, options)) == [('ä, ö', 'b "c" d'), ('e\r\nf', 'ß')]


def test_a_bom_in_an_open_file():
    assert labelled(read('\ufeff"a,b",c', is_labeled=True)) == [('a,b', 'c')]


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('', 'no rows'),
        ('\n  \n\n', 'no rows'),
        ('a,b\nc,d\n\ne\n', r'row at line 4 .*1 column, the first row has 2'),
        ('a,b\n"c\n\n",d\n\ne,f,g\n', r'row at line 6 .*3 columns'),
        ('a,b\nc\n', r'row at line 2 .*1 column,'),
        ('a,b\nc,\n', r'row at line 2 .*column 2 is empty'),
        ('a,b\n  ,c\n', r'row at line 2 .*column 1 is empty'),
        ('a,b\n,\n', r'row at line 2 .*column 1 is empty'),
        ('a,b,c,d\ne,f,g,h\n', r'row at line 1 .*4 columns'),
        ('a,b\nc,d\ne,"f\ng,h\n', r'row at line 3 .*unexpected end of data'),
        ('a,b\nc,d\n"e" f,g\n', r'row at line 3 .*QUOTE_NONE'),
        ('a,b\nc\0,d\n', r'line 2 .*zero byte'),
        ('mesh.OBJ,b\n', r'row at line 1 .*3D mesh'),
        ('a,b\nx.png,c\n', r'row at line 2 .*is a picture'),
        ('http://h/x.png,b\nc,d\n', r'row at line 2 .*no picture'),
        ('a.png,b\n', r'row at line 1 .*no file'),
        ('s3://bucket/a.png,b\n', r'row at line 1 .*scheme'),
    ],
)
def test_what_does_not_fit_is_refused_by_its_line(text, reason):
    with pytest.raises(DataError, match=reason):
        read(text)


def test_labelled_files_have_two_columns():
    for text in ('a\nb\n', 'a,b,c\n'):
        with pytest.raises(DataError, match='content and label'):
            read(text, is_labeled=True)


def test_a_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(DataError, match=r"no CSV file '.*none\.csv'"):
        read_csv(tmp_path / 'none.csv')
    (tmp_path / 'empty.png').touch()
    with pytest.raises(DataError, match=r'row at line 1 .*0 bytes'):
        list(read_csv(written(tmp_path, 'empty.png,a\n')))
    (tmp_path / 'a.heic').touch()
    with pytest.raises(DataError, match=r'row at line 1 .*no picture that is read'):
        list(read_csv(written(tmp_path, 'a.heic,a\n')))
    with (tmp_path / 'x.csv').open('rb') as file, pytest.raises(DataError, match='binary'):
        list(read_csv(file))


@pytest.mark.parametrize('bom', [b'', b'\xef\xbb\xbf'])
def test_another_encoding_is_named_with_its_byte(tmp_path, bom):
    content = bom + b'a,b\n' * 50_000 + b'\xe4,b\n'
    with pytest.raises(DataError, match=f'0xe4 at position {len(content) - 4} .*encoding='):
        list(read_csv(written(tmp_path, content)))
    with pytest.raises(DataError, match=r'encoding='):
        list(read_csv(written(tmp_path, 'a,b\n', 'utf-16')))
    with pytest.raises(DataError, match=r'not utf-16'):
        list(read_csv(written(tmp_path, b'a,b\n'), CSVOptions(encoding='utf-16')))


def test_long_cells_are_read():
    docs = read(f'{"x" * 300_000},b\n', is_labeled=True)
    assert len(docs[0].text) == 300_000


def test_size_and_sampling_rate():
    text = ''.join(f'text {number},{number}\n' for number in range(1000))
    everything = labelled(read(text, is_labeled=True))
    assert labelled(read(text, is_labeled=True, size=3)) == everything[:3]
    drawn = labelled(read(text, is_labeled=True, sampling_rate=0.2))
    assert 150 < len(drawn) < 250
    assert drawn == [row for row in everything if row in drawn]
    assert labelled(read(text, is_labeled=True, sampling_rate=0.2)) == drawn
    assert labelled(read(text, is_labeled=True, sampling_rate=0.2, size=5)) == drawn[:5]
    assert len(read(text, is_labeled=True, sampling_rate=1)) == 1000
    with pytest.raises(DataError, match='sampling_rate leaves no row'):
        read(text, is_labeled=True, sampling_rate=0)


@pytest.mark.parametrize(
    ('cell', 'expected'),
    [
        ('a.png', True), ('A B.JPeG', True), ('/x/y.tif', True), ('a.png ', True),
        ('data:image/png;base64,AA', True), ('https://h/a.webp?size=3#x', True),
        ('https://h/?a=b.png', False), ('https://[h/a.png', False), ('png', False),
        ('a.png.txt', False), ('a\nb.png', False), ('.', False), ('data:text/plain,a.txt', False),
    ],
)  # fmt: skip
def test_picture_cells(cell, expected):
    assert is_picture_cell(cell) is expected


def test_rows_stream(tmp_path):
    path = written(tmp_path, ''.join(f'"some text {n}",{n % 7}\n' for n in range(20_000)))
    rows = read_csv(path, CSVOptions(is_labeled=True))
    next(rows)
    tracemalloc.start()
    assert sum(1 for _ in rows) == 19_999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize('convert_to_blob', [True, False])
def test_pictures_that_are_not_there_are_left_to_be_skipped(tmp_path, convert_to_blob):
    picture(tmp_path / 'good.png')
    (tmp_path / 'empty.png').write_bytes(b'')
    path = written(tmp_path, 'good.png,a\nempty.png,b\nabsent.png,c\n')
    options = CSVOptions(is_labeled=True, convert_to_blob=convert_to_blob)
    with pytest.raises(DataError, match=r'row at line [23]'):
        list(read_csv(path, options))
    docs = list(read_csv(path, options, on_broken='skip'))
    assert [doc.tags['finetuner_label'] for doc in docs] == ['a', 'b', 'c']
    assert [doc.uri for doc in docs[1:]] == [
        str(tmp_path / f'{n}.png') for n in ('empty', 'absent')
    ]
    assert bool(docs[0].blob) == convert_to_blob
