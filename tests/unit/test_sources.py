"""Training data in every form ends as a sequence of Documents, or in an error that says why not."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from docarray import Document, DocumentArray
from pyarrow import parquet

from finetuner.data.csv import CSVOptions
from finetuner.data.documents import data_kind, save_documents
from finetuner.data.sources import is_csv, is_source_path, open_documents
from finetuner.data.stored.files import SQLiteDocuments, StoredDocuments
from finetuner.excepts import ConfigError, DataError
from tests.conftest import png

TEXTS = ['a', 'b', 'c']


def documents():
    return DocumentArray(
        Document(text=text, tags={'finetuner_label': text.upper()}) for text in TEXTS
    )


def write(path):
    """Write the same three Documents in the form that the ending says."""
    labels = [text.upper() for text in TEXTS]
    if path.suffix in ('.csv', '.tsv'):
        delimiter = ',' if path.suffix == '.csv' else '\t'
        path.write_text(''.join(f'{t}{delimiter}{t.upper()}\n' for t in TEXTS))
    elif path.suffix in ('.jsonl', '.ndjson'):
        records = [{'text': t, 'label': t.upper()} for t in TEXTS]
        path.write_text('\n'.join(map(json.dumps, records)))
    elif path.suffix == '.parquet':
        parquet.write_table(pa.table({'text': TEXTS, 'label': labels}), path)
    elif path.suffix in ('.db', '.sqlite', '.sqlite3'):
        config = {'connection': str(path), 'serialize_config': {'protocol': 'protobuf'}}
        docs = DocumentArray(storage='sqlite', config=config)
        docs.extend(documents())
        docs.sync()
    else:
        save_documents(documents(), path)
    return path


@pytest.mark.parametrize(
    'name',
    [
        'x.csv', 'x.tsv', 'x.jsonl', 'x.ndjson', 'x.parquet', 'x.db', 'x.sqlite', 'x.sqlite3',
        'x.docs', 'x.bin', 'x', 'X.CSV.docs',
    ],
)  # fmt: skip
@pytest.mark.parametrize('as_text', [True, False])
def test_files(tmp_path, name, as_text):
    path = write(tmp_path / name)
    options = CSVOptions(is_labeled=True) if name.endswith(('csv', 'tsv')) else None
    docs = open_documents(str(path) if as_text else path, options)
    assert len(docs) == 3
    assert [doc.text for doc in docs] == TEXTS
    assert docs[-1].tags['finetuner_label'] == 'C'
    assert data_kind(docs) == 'class'


def test_a_folder(tmp_path):
    for label in 'ba':
        (tmp_path / label).mkdir()
        (tmp_path / label / 'x.png').write_bytes(png(np.zeros((2, 2, 3), np.uint8)))
    docs = open_documents(tmp_path)
    assert [doc.tags['finetuner_label'] for doc in docs] == ['a', 'b']


def test_documents_in_memory():
    docs = documents()
    assert open_documents(docs) is docs
    for sequence in (list(docs), tuple(docs)):
        opened = open_documents(sequence)
        assert isinstance(opened, DocumentArray)
        assert [doc.id for doc in opened] == [doc.id for doc in docs]


def test_stored_documents_are_given_back(tmp_path):
    stored = open_documents(write(tmp_path / 'x.docs'))
    assert isinstance(stored, StoredDocuments)
    assert open_documents(stored) is stored
    half = stored[1:]
    assert open_documents(half) is half


def test_sqlite_storage_is_used_in_place(tmp_path):
    docs = DocumentArray(storage='sqlite', config={'connection': str(tmp_path / 'a.db')})
    docs.extend(documents())
    opened = open_documents(docs)
    assert isinstance(opened, SQLiteDocuments)
    assert [doc.text for doc in opened] == TEXTS
    assert open_documents(opened) is opened


@pytest.mark.parametrize(
    'make', [iter, lambda docs: (doc for doc in docs), lambda docs: map(Document, docs)]
)
def test_iterators_are_streamed(make):
    docs = open_documents(make(documents()))
    assert isinstance(docs, StoredDocuments)
    assert [doc.text for doc in docs] == TEXTS
    assert docs[1].text == 'b'


def test_an_open_csv():
    docs = open_documents(io.StringIO('a,b\nc,d\n'), CSVOptions(is_labeled=True))
    assert [doc.tags['finetuner_label'] for doc in docs] == ['b', 'd']


@pytest.mark.parametrize(
    ('source', 'reason'),
    [
        ([Document(text='a'), 'b'], 'element 1 is a str'),
        (iter([Document(text='a'), None]), 'element 1 is a NoneType'),
        (Document(text='a'), 'put it into a DocumentArray'),
        (None, 'a NoneType'),
        (b'abc', 'a bytes'),
        ({'a': Document()}, 'a dict'),
        (5, 'a int'),
        ('none.csv', 'no file or folder'),
        ('', 'no file or folder'),
        ('~nobody-here/x.csv', 'no file or folder'),
        ('a\0.csv', 'no file or folder'),
    ],
)
def test_other_sources_are_refused(source, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=reason):
        open_documents(source)


@pytest.mark.parametrize(
    ('name', 'content', 'reason'),
    [
        ('x.txt', b'a,b\n', r"ending '\.txt' .*\.csv .*\.parquet"),
        ('x', b'', "ending ''"),
        ('x.pkl', b'\x80\x04abc', 'pickle'),
        ('x.docs', b'\x80\x04abc', 'pickle'),
        ('x.docs', b'abc', 'no Documents'),
        ('x.jpg', b'\x01' + b'\xff' * 50, "ending '.jpg'"),
        ('x.db', b'abc' * 100, r'x\.db'),
        ('x.csv', b'', 'no rows'),
        ('x.jsonl', b'{', 'not valid JSON'),
    ],
)
def test_files_that_hold_something_else(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        open_documents(tmp_path / name)


def test_csv_options_are_for_csv(tmp_path):
    for source in (documents(), [Document()], tmp_path, write(tmp_path / 'x.jsonl'), iter([])):
        with pytest.raises(ConfigError, match='csv_options are for CSV files'):
            open_documents(source, CSVOptions())
    with pytest.raises(ConfigError, match='not CSVOptions'):
        open_documents(tmp_path / 'x.csv', {'is_labeled': True})


def test_what_a_text_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'pictures').mkdir()
    for text in ('pictures', 'none.csv', 'X.Parquet', '~/pictures', './a', '/a/b', str(tmp_path)):
        assert is_source_path(text), text
    for text in ('', 'my-data', 'data.v1', f'sha256:{"0" * 64}', 'sha256:x.csv', 'a\0', 'x' * 9000):
        assert not is_source_path(text), text


def test_what_is_csv(tmp_path):
    (tmp_path / 'folder.csv').mkdir()
    assert is_csv('a.CSV')
    assert is_csv(tmp_path / 'a.tsv')
    assert is_csv(io.StringIO())
    for source in ('a.jsonl', tmp_path / 'folder.csv', documents(), None, 'csv'):
        assert not is_csv(source)


def test_sources_are_light_to_import():
    code = 'import finetuner.data.sources, sys; print([m for m in ("scipy", "pyarrow", "torch", "PIL") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
