"""Databases as they come: the right table is found, and damage ends in an error of ours."""

import multiprocessing
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest
from docarray import Document

from finetuner.data.stored.files import SQLiteDocuments
from finetuner.excepts import ConfigError, DataError
from tests.unit.sqlite_arrays import PROTOBUF, array, documents, ids, written


def test_compressed_rows(tmp_path):
    array(tmp_path / 'a.db', documents(3), serialize_config={**PROTOBUF, 'compress': 'gzip'})
    assert ids(SQLiteDocuments(tmp_path / 'a.db', compress='gzip')) == ids(documents(3))
    with pytest.raises(DataError, match='cannot read Document 0 of table'):
        SQLiteDocuments(tmp_path / 'a.db')
    with pytest.raises(DataError, match='cannot be decompressed as zlib'):
        SQLiteDocuments(tmp_path / 'a.db', compress='zlib')
    with pytest.raises(ConfigError, match="unknown compress 'zip'"):
        SQLiteDocuments(tmp_path / 'a.db', compress='zip')
    with pytest.raises(ConfigError, match="unknown protocol 'json'"):
        SQLiteDocuments(tmp_path / 'a.db', protocol='json')


def test_the_table_is_the_only_one_or_named(tmp_path):
    path = tmp_path / 'a.db'
    array(path, documents(1), 'train')
    array(path, documents(2), 'test')
    with pytest.raises(DataError, match='has 2 tables of Documents: say which, test, train'):
        SQLiteDocuments(path)
    assert len(SQLiteDocuments(path, 'test')) == 2
    with pytest.raises(DataError, match=r"unknown table 'tset': did you mean 'test'"):
        SQLiteDocuments(path, 'tset')
    with pytest.raises(DataError, match="unknown table 'metadata'"):
        SQLiteDocuments(path, 'metadata')


def test_what_is_no_such_database_is_refused(tmp_path):
    path = tmp_path / 'a.db'
    for data in (b'', b'x' * 10_000):
        path.write_bytes(data)
        with pytest.raises(DataError):
            SQLiteDocuments(path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE a (b)')
    with pytest.raises(DataError, match='has no table of Documents'):
        SQLiteDocuments(path)
    with pytest.raises(FileNotFoundError):
        SQLiteDocuments(tmp_path / 'absent.db')
    assert not (tmp_path / 'absent.db').exists()


def test_a_damaged_database_ends_in_our_error(tmp_path):
    path = tmp_path / 'a.db'
    written(path, [Document(id=f'id {i}', text='x' * 500) for i in range(200)])
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(30):
        damaged = bytearray(data[: rng.integers(100, len(data) + 1)])
        for _ in range(20):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            list(SQLiteDocuments(path))
        except DataError:
            refused += 1
    assert refused > 15


@pytest.mark.parametrize(
    ('column', 'value', 'message'),
    [
        ('serialized_value', 'text', 'Document 0 of table .* is of type str'),
        ('serialized_value', 3, 'Document 0 of table .* is of type int'),
        ('serialized_value', b'', 'cannot read Document 0 of table'),
        ('serialized_value', b'\x0a\xff', 'cannot read Document 0 of table'),
    ],
)
def test_rows_that_are_no_documents_are_named(tmp_path, column, value, message):
    path = tmp_path / 'a.db'
    array(path, documents(2))
    with sqlite3.connect(path) as connection:
        connection.execute(f'UPDATE train SET {column} = ? WHERE item_order = 0', (value,))
    with pytest.raises(DataError, match=message):
        SQLiteDocuments(path)


def test_keys_that_are_no_numbers_are_refused(tmp_path):
    with sqlite3.connect(tmp_path / 'a.db') as connection:
        connection.execute('CREATE TABLE t (doc_id, serialized_value, item_order)')
        connection.execute("INSERT INTO t VALUES ('a', x'', 'b')")
    with pytest.raises(DataError, match='`item_order` of a row is no number'):
        SQLiteDocuments(tmp_path / 'a.db')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='drops rights')
def test_a_folder_that_cannot_be_written_to():
    # Not in tmp_path, where nobody but root may go.
    folder = Path(tempfile.mkdtemp())
    try:
        written(folder / 'a.db', documents(3))
        folder.chmod(0o555)
        (folder / 'a.db').chmod(0o444)

        def read_without_rights():
            os.setuid(65534)
            os._exit(0 if ids(SQLiteDocuments(folder / 'a.db')) == ids(documents(3)) else 1)

        child = multiprocessing.get_context('fork').Process(target=read_without_rights)
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert os.listdir(folder) == ['a.db']
    finally:
        shutil.rmtree(folder)
