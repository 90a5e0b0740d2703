"""docarray's SQLite storage, used in place: the same Documents, and no pickle from a path."""

import multiprocessing
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuner.data.stored.files import SQLiteDocuments
from finetuner.excepts import DataError
from tests.unit.concurrent_reading import forked_readers, reader
from tests.unit.sqlite_arrays import NUM_DOCS, PROTOBUF, array, documents, ids, written


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('sqlite') / 'a ü%.db'
    written(path, documents())
    return path


@pytest.fixture(scope='module')
def docs(path):
    with SQLiteDocuments(path) as docs:
        yield docs


def test_documents_are_those_of_the_array(docs, path):
    assert (len(docs), docs.table, docs.path) == (NUM_DOCS, 'train', str(path))
    assert ids(docs) == ids(documents())
    assert docs[np.int64(-1)].text == 'x' * 39
    assert docs[3].tags == {'label': 3}
    assert docs.nbytes == 8 * NUM_DOCS
    with pytest.raises(IndexError):
        docs[NUM_DOCS]


@settings(deadline=None)
@given(st.slices(NUM_DOCS))
def test_slices_are_those_of_a_list(docs, where):
    assert ids(docs[where]) == ids(documents())[where]


def test_it_is_only_read(path):
    before = path.read_bytes()
    with SQLiteDocuments(path) as docs:
        list(docs)
        with pytest.raises(sqlite3.OperationalError, match='readonly'):
            docs._connection.execute('DELETE FROM train')
    assert path.read_bytes() == before


def test_threads_and_forked_processes_read_one_object(docs):
    read = reader(docs, ids(documents()), num_rounds=10)
    failures = []
    beside = threading.Thread(target=read, args=(failures,))
    beside.start()
    children = forked_readers(read)
    for child in children:
        child.start()
    read(failures)
    beside.join()
    for child in children:
        child.join(60)
    assert not failures
    assert [child.exitcode for child in children] == [0] * 4


def test_a_forked_process_leaves_the_connection_of_its_parent_alone(path):
    docs = SQLiteDocuments(path)
    inherited = docs._connection

    def read():
        docs[0]
        own = docs._connection
        docs.close()
        # Not closed: it belongs to the parent.
        os._exit(0 if own is not inherited and inherited.execute('SELECT 1').fetchone() else 1)

    child = multiprocessing.get_context('fork').Process(target=read)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert docs._connection is inherited
    assert docs[0].id == 'id 0'


def test_another_process_opens_it_by_its_path(docs):
    code = 'import pickle, sys; print(pickle.load(sys.stdin.buffer)[7].id)'
    done = subprocess.run(
        [sys.executable, '-c', code],
        input=pickle.dumps(docs),
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])},
        capture_output=True,
        check=True,
    )
    assert done.stdout.strip() == b'id 7'


class Boom:
    """Leaves a folder behind when unpickled."""

    def __reduce__(self):
        return os.mkdir, ('unpickled',)


def test_pickled_rows_are_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    live = array('a.db', documents(2), serialize_config={})
    for protocol in ('protobuf', 'pickle'):
        with pytest.raises(DataError, match=r"'serialize_config': \{'protocol': 'protobuf'\}"):
            SQLiteDocuments('a.db', protocol=protocol)
    array('b.db', documents(3))
    with sqlite3.connect('b.db') as connection:
        connection.execute(
            'UPDATE train SET serialized_value = ? WHERE item_order = 2', (pickle.dumps(Boom()),)
        )
    with pytest.raises(DataError, match="table 'train' of .*b.db' holds pickled"):  # noqa: RUF043
        list(SQLiteDocuments('b.db'))
    assert not Path('unpickled').exists()
    assert ids(SQLiteDocuments.of(live)) == ['id 0', 'id 1']


@pytest.mark.parametrize(
    'serialize_config',
    [{}, PROTOBUF, {'compress': 'gzip'}, {'protocol': 'protobuf', 'compress': 'zlib'}],
)
def test_a_live_array_is_read_as_it_was_opened(tmp_path, monkeypatch, serialize_config):
    monkeypatch.chdir(tmp_path)
    live = array('a.db', documents(), serialize_config=serialize_config)
    # docarray keeps one way to read rows for the whole process: that of the last array opened.
    array('b.db', documents(1))
    docs = SQLiteDocuments.of(live)
    monkeypatch.chdir('/')
    assert ids(docs) == ids(documents())
    assert ids(pickle.loads(pickle.dumps(docs))) == ids(docs)


def test_the_temporary_file_docarray_makes_by_itself():
    live = DocumentArray(documents(3), storage='sqlite')
    assert ids(SQLiteDocuments.of(live)) == ids(documents(3))


def test_a_row_of_another_kind_that_a_live_array_holds(tmp_path):
    live = array(tmp_path / 'a.db', documents(1), serialize_config={})
    docs = SQLiteDocuments.of(live)
    for value, message in ((pickle.dumps('no'), 'pickled str'), (b'\x80x', 'cannot unpickle')):
        live._connection.execute('UPDATE train SET serialized_value = ?', (value,))
        live._connection.commit()
        with pytest.raises(DataError, match=message):
            docs[0]


def test_arrays_that_have_no_file_are_refused(tmp_path):
    with pytest.raises(DataError, match='is in memory'):
        SQLiteDocuments.of(array(':memory:', documents(2)))
    with pytest.raises(DataError, match='has no SQLite storage'):
        SQLiteDocuments.of(DocumentArray(documents(2)))
    live = array(tmp_path / 'a.db', documents(2))
    live._connection.execute('DELETE FROM train')
    with pytest.raises(DataError, match='not committed'):
        SQLiteDocuments.of(live)


def test_removed_and_inserted_documents_and_arrays_without_order(tmp_path):
    live = array(tmp_path / 'a.db', documents(5))
    del live[1]
    live.insert(0, Document(id='first'))
    assert ids(SQLiteDocuments.of(live)) == ids(live) == ['first', 'id 0', 'id 2', 'id 3', 'id 4']
    unordered = array(tmp_path / 'b.db', documents(5), list_like=False)
    del unordered['id 1']
    docs = SQLiteDocuments.of(unordered)
    assert ids(docs) == ids(docs[:]) == ['id 0', 'id 2', 'id 3', 'id 4']
    assert docs[1].id == 'id 2'


def test_subindices_are_no_data_of_their_own(tmp_path):
    live = DocumentArray(
        storage='sqlite',
        config={
            'connection': str(tmp_path / 'a.db'),
            'table_name': 't',
            'serialize_config': PROTOBUF,
        },
        subindex_configs={'@c': None},
    )
    live.extend([Document(id='root', chunks=[Document(id='chunk')])])
    assert ids(SQLiteDocuments(tmp_path / 'a.db')) == ids(SQLiteDocuments.of(live)) == ['root']


def test_rows_that_were_moved_are_noticed_and_other_writes_do_no_harm(tmp_path):
    path = tmp_path / 'a.db'
    live = array(path, documents(6))
    docs = SQLiteDocuments(path)
    sent = pickle.dumps(docs)
    array(path, documents(3), 'other').extend([Document(id='x')])
    live['id 4'] = Document(id='id 4', text='new')
    assert ids(docs) == ids(documents(6))
    assert docs[4].text == 'new'
    reading = iter(docs)
    next(reading)
    del live[1]
    live.append(Document(id='last'))
    assert len(live) == 6
    for read in (lambda: docs[0], lambda: list(docs), lambda: docs[:][2]):
        with pytest.raises(DataError, match='were changed since it was opened'):
            read()
    with pytest.raises(DataError, match='were changed since it was opened'):
        pickle.loads(sent)
    assert ids(SQLiteDocuments(path, 'train')) == ids(live)


def test_a_database_replaced_or_gone_is_noticed(tmp_path):
    path = tmp_path / 'a.db'
    written(path, documents(6))
    docs = SQLiteDocuments(path)
    written(tmp_path / 'b.db', [Document(id=f'other {i}') for i in range(6)])
    (tmp_path / 'b.db').replace(path)
    with pytest.raises(DataError, match='were changed'):
        docs[0]
    path.unlink()
    with pytest.raises(DataError, match='cannot read table'):
        docs[0]


def test_closed_documents_say_so(path):
    docs = SQLiteDocuments(path)
    view = docs[2:]
    docs.close()
    docs.close()
    for read in (lambda: docs[0], lambda: list(view)):
        with pytest.raises(DataError, match='was closed'):
            read()


def test_long_rows_are_read_a_few_at_a_time(tmp_path):
    naive = [Document(id=str(i), blob=bytes(300_000)) for i in range(40)]
    array(tmp_path / 'a.db', naive)
    docs = SQLiteDocuments(tmp_path / 'a.db')
    asked = []
    records = docs._records
    docs._records = lambda start, stop: asked.append(stop - start) or records(start, stop)
    assert [doc.blob for doc in docs] == [doc.blob for doc in naive]
    assert asked[0] == 16
    assert set(asked[1:]) == {3}


def test_no_documents(tmp_path):
    array(tmp_path / 'a.db')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        docs = SQLiteDocuments(tmp_path / 'a.db')
        assert (len(docs), list(docs), list(docs[1:])) == (0, [], [])
