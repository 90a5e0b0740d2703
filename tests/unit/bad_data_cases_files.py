"""Files and folders of training data that nobody can learn from, with what is said of each."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sqlite3

import pyarrow as pa
import pytest
from docarray import Document, DocumentArray
from pyarrow import parquet

from finetuner.data.csv import CSVOptions
from finetuner.data.documents import save_documents
from tests.unit.bad_data_cases_pictures import encoded, huge_png
from tests.unit.bad_data_cases_values import good, session, text

LABELED = CSVOptions(is_labeled=True)


def case(name, write, expected, options=None):
    return pytest.param(write, expected, options, id=name)


def file(name, data):
    def write(folder):
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def csv_case(name, data, expected, options=LABELED):
    return case(f'csv-{name}', file('x.csv', data), expected, options)


def json_case(name, *lines, expected):
    written = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    data = b'\n'.join(line if isinstance(line, bytes) else line.encode() for line in written)
    return case(f'json-{name}', file('x.jsonl', data), expected)


def parquet_case(name, columns, expected):
    def write(folder):
        parquet.write_table(pa.table(columns), folder / 'x.parquet')
        return folder / 'x.parquet'

    return case(f'parquet-{name}', write, expected)


def docs_case(name, change, expected):
    """A `.docs` file of six good Documents, its bytes changed."""

    def write(folder):
        path = folder / 'x.docs'
        save_documents(good(), path)
        path.write_bytes(change(path.read_bytes()))
        return path

    return case(f'docs-{name}', write, expected)


def saved_case(name, make, expected):
    """A `.docs` file that is whole, of Documents that are wrong."""

    def write(folder):
        save_documents(make(), folder / 'x.docs')
        return folder / 'x.docs'

    return case(f'docs-of-{name}', write, expected)


def database(*statements):
    def write(folder):
        connection = sqlite3.connect(folder / 'x.db')
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()
        return folder / 'x.db'

    return write


def tables(protocol, *names):
    def write(folder):
        for name in names:
            config = {
                'connection': str(folder / 'x.db'),
                'table_name': name,
                'serialize_config': {'protocol': protocol},
            }
            docs = DocumentArray(storage='sqlite', config=config)
            docs.extend(good())
            docs.sync()
        return folder / 'x.db'

    return write


def folder_of(*names, data=None):
    def write(folder):
        root = folder / 'pictures'
        root.mkdir()
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith('/'):
                path.mkdir()
            else:
                path.write_bytes(encoded() if data is None else data())
        return root

    return write


def loop_of_folders(folder):
    root = folder / 'pictures'
    (root / 'class').mkdir(parents=True)
    (root / 'class' / 'again').symlink_to(root)
    (root / 'other').symlink_to(root / 'class')
    return root


def fifo(name):
    def write(folder):
        os.mkfifo(folder / name)
        return folder / name

    return write


def broken_link(folder):
    (folder / 'x.csv').symlink_to(folder / 'gone.csv')
    return folder / 'x.csv'


def pickled(folder):
    DocumentArray(good()).save_binary(str(folder / 'x.docs'), protocol='pickle-array')
    return folder / 'x.docs'


def csv_with_pictures(*rows):
    def write(folder):
        (folder / 'good.png').write_bytes(encoded())
        (folder / 'empty.png').write_bytes(b'')
        (folder / 'notes.txt').write_text('a dog')
        (folder / 'x.csv').write_text('\n'.join(rows))
        return folder / 'x.csv'

    return write


ROW = r"^row at line {} of 'x.csv': "
LINE = r"^line {} of 'x.jsonl'"
UNKNOWN_TABLE = 'CREATE TABLE a (x INTEGER)'
DOCS_TABLE = 'CREATE TABLE {} (doc_id TEXT, serialized_value BLOB, item_order INTEGER)'
GOOD_ROWS = 'a,1\nb,1\nc,2\nd,2\n'

TEXT_OF_BAD_BYTES = pa.StringArray.from_buffers(
    1, pa.py_buffer(b'\0\0\0\0\1\0\0\0'), pa.py_buffer(b'\xff')
)

FILES = [
    # CSV
    csv_case('empty', '', "^'x.csv' holds no rows"),
    csv_case('only-newlines', '\n\r\n  \n', "^'x.csv' holds no rows"),
    csv_case('only-a-mark', b'\xef\xbb\xbf', "^'x.csv' holds no rows"),
    csv_case('only-a-header', 'text,label\n', f'{ROW.format(1)}it looks like a header .*remove it'),
    csv_case('a-header', f'text,label\n{GOOD_ROWS}', f'{ROW.format(1)}it looks like a header'),
    csv_case('short-row', f'{GOOD_ROWS}e\n', f'{ROW.format(5)}1 column, the first row has 2'),
    csv_case('long-row', f'{GOOD_ROWS}e,f,g\n', f'{ROW.format(5)}3 columns, the first row has 2'),
    csv_case('short-row-crlf', 'a,1\r\n\r\nb,1\r\nc\r\n', f'{ROW.format(4)}1 column'),
    csv_case('empty-cell', 'a,1\n,1\n', f'{ROW.format(2)}column 1 is empty'),
    csv_case('empty-label', 'a,1\nb, \n', f'{ROW.format(2)}column 2 is empty'),
    csv_case('one-column', 'a\nb\n', f'{ROW.format(1)}1 column: a labelled file'),
    csv_case('four-columns', 'a,b,1,2\n', f'{ROW.format(1)}4 columns: .*one to three', None),
    csv_case('one-class', 'a,1\nb,1\n', "all 2 Documents have the label '1'"),
    csv_case('ids-for-labels', 'a,1\nb,2\nc,3\n', 'each of the 3 labels occurs once'),
    csv_case('one-class-and-bom', b'\xef\xbb\xbfa,1\r\nb,1\r\n', "all 2 Documents have .* '1'"),
    csv_case('zero-byte', 'a,1\nb,\0\n', "^line 2 of 'x.csv' holds a zero byte: .*encoding"),
    csv_case('utf-16', GOOD_ROWS.encode('utf-16'), "^'x.csv' is not utf-8: byte 0xff at position 0"),
    csv_case('latin-1', 'Käse,1\n'.encode('latin-1'), 'byte 0xe4 at position 1 .*CSVOptions'),
    csv_case('is-a-picture', encoded(), 'is not utf-8: byte 0x89 at position 0'),
    csv_case('is-gzip', gzip.compress(GOOD_ROWS.encode()), 'is not utf-8: byte 0x8b|zero byte'),
    csv_case('unclosed-quote', 'a,1\n"b,1\nc,2\n', f'{ROW.format(2)}unexpected end of data'),
    csv_case('text-after-quote', 'a,1\n"b"c,1\n', f"{ROW.format(2)}.*expected after"),
    csv_case('scores-in-words', 'a,b,high\n', f"{ROW.format(1)}score 'high' is not a number", None),
    csv_case('score-above', 'a,b,0\nc,d,1.5\n', f"{ROW.format(2)}score '1.5' is not a num", None),
    csv_case('score-nan', 'a,b,0\nc,d,nan\n', f"{ROW.format(2)}score 'nan' is not a number", None),
    csv_case('score-comma', 'a;b;0,5\n', f"{ROW.format(1)}score '0,5' is not a number", None),
    csv_case('score-header', 'a,b,s\nc,d,1\n', f'{ROW.format(1)}.*If it is a header, rem', None),
    csv_case('one-score', 'a,b,1\nc,d,1\ne,f,1\n', 'all 3 pairs have the score 1', None),
    csv_case('mesh', 'a.glb,1\n', f"{ROW.format(1)}'a.glb' is a 3D mesh, .* not supported"),
    csv_case('unlabelled-one-row', 'a\n', 'there is one Document only', None),
    case('csv-missing-picture', csv_with_pictures('good.png,a', 'gone.png,a'),
         f"{ROW.format(2)}there is no file 'gone.png' in the folder", LABELED),
    case('csv-missing-absolute', csv_with_pictures('good.png,a', '/no/such/a.png,a'),
         f"{ROW.format(2)}there is no file '/no/such/a.png'", LABELED),
    case('csv-empty-picture', csv_with_pictures('good.png,a', 'empty.png,a'),
         f'{ROW.format(2)[:-2]}.*is empty .0 bytes', LABELED),
    case('csv-picture-then-text', csv_with_pictures('good.png,a', 'a dog,a'),
         f"{ROW.format(2)}column 1 .'a dog'. is no picture, unlike that of the first row", LABELED),
    case('csv-text-then-picture', csv_with_pictures('a dog,a', 'good.png,a'),
         f'{ROW.format(2)}column 1 .* is a picture, unlike that of the first row', LABELED),
    case('csv-other-file', csv_with_pictures('notes.txt,a'),
         f"{ROW.format(1)}'notes.txt' is a file, but no picture that is read", LABELED),
    case('csv-s3', csv_with_pictures('s3://bucket/a.png,a'),
         f'{ROW.format(1)}.*has a scheme that is not read', LABELED),
    case('csv-folder', csv_with_pictures('good.png,a', '../,a'), f'{ROW.format(2)}.*no pict', LABELED),
    case('csv-broken-link', broken_link, 'there is no file or folder', LABELED),
    case('csv-fifo', fifo('x.csv'), 'there is no file or folder', LABELED),
    case('tsv-commas', file('x.tsv', GOOD_ROWS), "'x.tsv': 1 column: a labelled file", LABELED),
    # JSON Lines
    json_case('empty', '', expected="^'x.jsonl' holds no records"),
    json_case('broken', {'text': 'a'}, '{"text": ', expected=f'{LINE.format(2)} is not valid JSON'),
    json_case('array', '[1]', expected=f'{LINE.format(1)} is a list, not an object'),
    json_case('number', '5', expected=f'{LINE.format(1)} is a int, not an object'),
    json_case('null', 'null', expected=f'{LINE.format(1)} is a NoneType, not an object'),
    json_case('one-array', '[{"text": "a"}, {"text": "b"}]', expected='is a list, not an object'),
    json_case('pretty', '{', '  "text": "a"', '}', expected=f'{LINE.format(1)} is not valid JSON'),
    json_case('nan', '{"text": "a", "score": NaN}', expected='NaN is no JSON number'),
    json_case('infinity', '{"tensor": [Infinity]}', expected='Infinity is no JSON number'),
    json_case('huge-float', '{"tensor": [1e999]}', expected='holds numbers that are not finite'),
    json_case('huge-int', '{"text": "a", "label": 1%s}' % ('0' * 5000), expected='not valid JSON'),
    json_case('large-int', '{"text": "a", "label": 1%s}' % ('0' * 50), expected=r'beyond 2\*\*53'),
    json_case('unknown-key', {'txt': 'a'}, expected="unknown key 'txt': did you mean 'text'"),
    json_case('no-content', {'label': 1}, expected=f'{LINE.format(1)}: there is no content'),
    json_case('blank-text', {'text': ' '}, expected=f'{LINE.format(1)}: `text` is empty'),
    json_case('text-number', {'text': 5}, expected='`text` is 5, not a text'),
    json_case('text-list', {'text': ['a']}, expected='`text` is .*, not a text'),
    json_case('uri-number', {'uri': 5}, expected='`uri` is 5, not a path or uri'),
    json_case('uri-missing', {'uri': 'gone.png'}, expected="there is no file 'gone.png'"),
    json_case('uri-s3', {'uri': 's3://b/a.png'}, expected='has a scheme that is not read'),
    json_case('label-half', {'text': 'a', 'label': 0.5}, expected='0.5 is not a whole number'),
    json_case('label-list', {'text': 'a', 'label': [1]}, expected=r'label \[1\] is neither'),
    json_case('label-blank', {'text': 'a', 'label': ' '}, expected="label ' ' is empty"),
    json_case('two-labels', {'text': 'a', 'label': 1, 'finetuner_label': 2}, expected='the same'),
    json_case('score-word', {'pair': ['a', 'b'], 'score': 'x'}, expected="score 'x' is not a num"),
    json_case('score-true', {'pair': ['a', 'b'], 'score': True}, expected='score True is not'),
    json_case('pair-of-1', {'pair': ['a']}, expected='not a list of two texts or records'),
    json_case('pair-of-numbers', {'pair': [1, 2]}, expected='side 0 is 1, not a record'),
    json_case('pair-mixed', {'pair': ['a', 'b']}, {'text': 'c'}, expected=f'{LINE.format(2)}: query-'),
    json_case('tensor-ragged', {'tensor': [[1], [1, 2]]}, expected='its lists differ in length'),
    json_case('tensor-words', {'tensor': ['a']}, expected='not a nested list of numbers'),
    json_case('tensor-number', {'tensor': 5}, expected='not a nested list of numbers'),
    json_case('matches-dict', {'text': 'a', 'matches': {}}, expected='not a list of records'),
    json_case('match-text', {'text': 'a', 'matches': ['b']}, expected="match 0 is 'b', not a record"),
    json_case('match-label', {'text': 'a', 'matches': [{'text': 'b', 'label': 3}]},
              expected='^Document 0: a match has the label 3'),
    json_case('id-list', {'text': 'a', 'id': []}, expected=r'`id` is \[\], neither a str nor an int'),
    json_case('ids-repeat', {'text': 'a', 'id': 7}, {'text': 'b', 'id': '7'},
              expected="^Document 1: the id '7' is that of Document 0 too"),
    json_case('tags-list', {'text': 'a', 'tags': 5}, expected='`tags` is 5, not an object'),
    json_case('mixed', {'text': 'a'}, {'text': 'b', 'label': 1}, expected='^Document 0: label is mi'),
    json_case('deep', f'{{"text": "a", "tags": {{"x": {"[" * 9000}1{"]" * 9000}}}}}',
              expected=f'{LINE.format(1)} is (nested too deep|not valid JSON)'),
    json_case('deep-matches', '{"text": "a", "matches": [' * 900 + ']}' * 900, expected='^(line|Doc)'),
    json_case('latin-1', '{"text": "Käse"}'.encode('latin-1'), expected=f'{LINE.format(1)} is not UTF'),
    json_case('surrogate', r'{"text": "\ud800"}', expected=f'{LINE.format(1)} is not UTF-8'),
    json_case('zero-bytes', b'\0\0\0', expected=f'{LINE.format(1)} is not valid JSON'),
    # Parquet
    case('parquet-empty-file', file('x.parquet', b''), 'cannot be read as Parquet'),
    case('parquet-text', file('x.parquet', GOOD_ROWS), 'cannot be read as Parquet'),
    case('parquet-cut', file('x.parquet', b'PAR1' + bytes(99)), 'cannot be read as Parquet'),
    case('parquet-marks', file('x.parquet', b'PAR1' + bytes(99) + b'PAR1'), 'cannot be read as Parq'),
    parquet_case('no-rows', {'text': pa.array([], pa.string())}, "^'x.parquet' holds no records"),
    parquet_case('no-columns', {}, "^'x.parquet' holds no records"),
    parquet_case('unknown-column', {'sentence': ['a']}, "^row 1 .*unknown key 'sentence'"),
    parquet_case('text-numbers', {'text': [1, 2]}, "^row 1 of 'x.parquet': `text` is 1, not a text"),
    parquet_case('label-nulls', {'text': ['a', 'b'], 'label': [1, None]}, '^Document 1: label is mi'),
    parquet_case('label-nan', {'text': ['a'], 'label': [float('nan')]}, 'label nan is not a whole'),
    parquet_case('score-nan', {'query': ['a'], 'document': ['b'], 'score': [float('nan')]},
                 "^row 1 of 'x.parquet': score nan is not a number"),
    parquet_case('image-numbers', {'image': [5]}, '`image` is 5, not a path or uri'),
    parquet_case('image-nulls', {'image': pa.array([b'x', None], pa.binary())}, '^row 2 .*no content'),
    parquet_case('bad-text', {'text': TEXT_OF_BAD_BYTES}, 'holds values that Python cannot read'),
    # .docs
    case('docs-pickle', pickled, 'It looks like pickle, .* is never read. Write it with'),
    case('docs-pickle-list', file('x.docs', pickle.dumps([1])), 'It looks like pickle'),
    case('docs-pickle-other-name', file('x.bin', pickle.dumps([1])), 'It looks like pickle'),
    case('docs-empty', file('x.docs', b''), 'holds no Documents: its first bytes are not'),
    case('docs-text', file('x.docs', GOOD_ROWS), 'holds no Documents: its first bytes are not'),
    docs_case('gzip', gzip.compress, 'holds no Documents: its first bytes are not'),
    docs_case('cut', lambda data: data[:-7], 'it ends within Document 5 of 6: it was cut short'),
    docs_case('cut-early', lambda data: data[:40], 'it ends within Document 0 of 6'),
    docs_case('only-a-header', lambda data: data[:9], 'it says 6 Documents but 0 bytes follow'),
    docs_case('trailing', lambda data: data + b'more', '4 bytes follow its last Document'),
    docs_case('zeros', lambda data: data[:13] + bytes(len(data) - 13), 'cannot read Docum|bytes follow|it ends'),
    docs_case('no-documents', lambda data: b'\1' + bytes(8), 'there are no Documents'),
    docs_case('billions', lambda data: b'\1' + b'\x7f' * 8 + data[9:], 'Documents but .* bytes foll'),
    saved_case('text-image', lambda: [text()], 'there is one Document only'),
    saved_case('wrong-labels', lambda: [text(0, 0.5)], '^Document 0: label 0.5'),
    saved_case('mixed', lambda: [*good(), session(7)], '^Document 6|must be of one kind'),
    saved_case('missing-pictures', lambda: [Document(uri='/no/such/a.png') for _ in range(2)], None),
    saved_case('bombs', lambda: [Document(blob=huge_png()) for _ in range(2)], None),
    # SQLite
    case('sqlite-no-table', database(), 'has no table of Documents: write one with'),
    case('sqlite-other-table', database(UNKNOWN_TABLE), 'has no table of Documents'),
    case('sqlite-no-rows', database(DOCS_TABLE.format('a')), 'there are no Documents'),
    case('sqlite-two-tables', tables('protobuf', 'one', 'two'), 'has 2 tables of Docum.*one, two'),
    case('sqlite-pickled', tables('pickle', 'one'), "table 'one' of .*pickle"),
    case('sqlite-text', file('x.db', GOOD_ROWS * 999), "x.db'.*(not a database|cannot be read)"),
    case('sqlite-empty', file('x.db', b''), 'has no table of Documents'),
    case('sqlite-rows-of-text', database(
        DOCS_TABLE.format('a'), "INSERT INTO a VALUES ('i', 'abc', 1)"), "table 'a' of"),
    case('sqlite-rows-of-null', database(
        DOCS_TABLE.format('a'), "INSERT INTO a VALUES ('i', NULL, 1)"), "table 'a' of"),
    case('sqlite-order-of-text', database(
        DOCS_TABLE.format('a'), "INSERT INTO a VALUES ('i', x'00', 'b')"), "table 'a'"),
    # folders
    case('folder-empty', folder_of(), 'there is no picture in the folder'),
    case('folder-of-empty-folders', folder_of('a/', 'b/'), 'there is no picture in the folder'),
    case('folder-no-pictures', folder_of('a.txt', 'b/c.pdf'), 'there is no picture in the folder'),
    case('folder-hidden', folder_of('.a.png', '.b/c.png'), 'there is no picture in the folder'),
    case('folder-mixed', folder_of('a.png', 'b/c.png'), 'holds pictures .* beside folders of pict'),
    case('folder-one-class', folder_of('a/b.png', 'a/c.png'), "have the label 'a'"),
    case('folder-classes-of-one', folder_of('a/b.png', 'b/c.png'), 'labels occurs once'),
    case('folder-one-picture', folder_of('a.png'), 'there is one Document only'),
    case('folder-splits', folder_of('train/a/1.png', 'test/a/1.png'), 'parts of a data set and not'),
    case('folder-loop', loop_of_folders, 'there is no picture in the folder'),
    case('folder-0-bytes', folder_of('a/b.png', 'a/c.png', 'b/d.png', data=bytes), None),
    # others
    case('ending-unknown', file('x.xyz', GOOD_ROWS), "the ending '.xyz' .* none that is known"),
    case('ending-xlsx', file('x.xlsx', b'PK\3\4'), "the ending '.xlsx' .* allowed are .csv"),
    case('ending-json', file('x.json', '[]'), "the ending '.json' .* allowed are"),
    case('ending-none', file('x', GOOD_ROWS), "the ending '' of 'x'"),
    case('picture-as-data', file('x.png', encoded()), "the ending '.png' .* none that is known"),
    case('fifo-as-data', fifo('x.docs'), 'there is no file or folder'),
    case('device-as-data', lambda folder: '/dev/zero', "there is no file or folder '/dev/zero'"),
    case('path-missing', lambda folder: folder / 'gone.csv', 'there is no file or folder'),
    case('options-without-csv', file('x.jsonl', '{}'), 'csv_options are for CSV files', LABELED),
]  # fmt: skip
