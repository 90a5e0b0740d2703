"""Documents in a file: what is read one by one is what a list would give, in every process."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuner.data.stored import files
from finetuner.data.stored.files import DocumentsView, StoredDocuments, spool_documents
from finetuner.data.stored.storing import (
    documents_hash,
    load_documents,
    save_documents,
    write_documents,
)
from finetuner.excepts import DataError
from tests.unit.concurrent_reading import forked_readers, reader

NUM_DOCS = 50


def documents(num_docs=NUM_DOCS):
    return [
        Document(id=f'id {i}', text='x' * (i % 7), tags={'finetuner_label': i % 5})
        for i in range(num_docs)
    ]


def ids(docs):
    return [doc.id for doc in docs]


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('stored') / 'docs'
    save_documents(documents(), path)
    return path


@pytest.fixture(scope='module')
def docs(path):
    with StoredDocuments(path) as docs:
        yield docs


def test_documents_are_those_of_the_file(docs, path):
    assert len(docs) == NUM_DOCS
    assert ids(docs) == ids(documents()) == ids(load_documents(path))
    assert docs[3].tags == {'finetuner_label': 3}
    assert docs[-1].id == docs[np.int64(NUM_DOCS - 1)].id == 'id 49'
    assert ids(reversed(docs)) == ids(documents())[::-1]
    assert repr(docs) == '<StoredDocuments of 50 Documents>'
    for index in (NUM_DOCS, -NUM_DOCS - 1, np.int64(1000)):
        with pytest.raises(IndexError, match=f'no Document {index} of 50'):
            docs[index]
    for index in ('id 3', 1.0, None):
        with pytest.raises(TypeError):
            docs[index]


def test_a_document_set_anew_does_not_come_back(docs):
    docs[0].text = 'changed'
    assert docs[0].text == ''


@settings(deadline=None)
@given(st.slices(NUM_DOCS), st.slices(NUM_DOCS))
def test_slices_and_slices_of_slices_are_those_of_a_list(docs, first, second):
    naive = ids(documents())[first]
    view = docs[first]
    assert isinstance(view, DocumentsView)
    assert len(view) == len(naive)
    assert ids(view) == naive
    assert ids(view[second]) == naive[second]
    assert view[second].docs is docs


@settings(deadline=None)
@given(st.lists(st.integers(0, NUM_DOCS - 1)), st.data())
def test_views_are_in_the_order_asked_for(docs, positions, data):
    view = DocumentsView(docs, positions)
    naive = [documents()[position].id for position in positions]
    assert ids(view) == naive == [view[i].id for i in range(len(view))]
    inner = data.draw(st.lists(st.integers(0, len(view) - 1)) if positions else st.just([]))
    again = DocumentsView(view, inner)
    assert ids(again) == [naive[i] for i in inner]
    assert again.docs is docs


def test_views_of_arrays_in_memory():
    whole = DocumentArray(documents())
    view = DocumentsView(whole, np.arange(NUM_DOCS)[::-2])
    assert ids(view) == ids(whole)[::-2]
    assert view[0].id == whole[-1].id


def test_views_keep_an_array_as_it_is_and_pickle(docs):
    positions = np.array([4, 4, 0])
    view = DocumentsView(docs, positions)
    assert np.shares_memory(view.positions, positions)
    with pytest.raises(ValueError, match='read-only'):
        view.positions[0] = 1
    assert ids(pickle.loads(pickle.dumps(view))) == ['id 4', 'id 4', 'id 0']


@pytest.mark.parametrize('positions', [[50], [-1], [0, 2**40]])
def test_positions_out_of_range_are_refused(docs, positions):
    with pytest.raises(IndexError, match='there are 50 Documents'):
        DocumentsView(docs, positions)


@pytest.mark.parametrize('positions', [[0.5], [True], [[1]], ['a'], 3])
def test_positions_that_are_none_are_refused(docs, positions):
    with pytest.raises(ValueError, match='one list of ints'):
        DocumentsView(docs, positions)


@pytest.mark.parametrize('read_at', [files._read_at, files._seek_and_read])
@pytest.mark.parametrize('sizes', [[0], [5, 40_000, 3], [40_000] * 5, [1_100_000, 1, 1_100_000]])
def test_records_of_every_size(tmp_path, monkeypatch, sizes, read_at):
    monkeypatch.setattr(files, '_read_at', read_at)
    naive = [Document(id=str(i), blob=bytes(size)) for i, size in enumerate(sizes * 4)]
    save_documents(naive, tmp_path / 'docs')
    with StoredDocuments(tmp_path / 'docs') as docs:
        assert [doc.blob for doc in docs] == [doc.blob for doc in naive]
        assert [docs[i].blob for i in range(len(docs))] == [doc.blob for doc in naive]


def test_no_documents(tmp_path):
    save_documents([], tmp_path / 'docs')
    docs = StoredDocuments(tmp_path / 'docs')
    assert len(docs) == 0
    assert list(docs) == list(docs[:]) == []
    assert ids(DocumentsView(docs, [])) == []


def test_threads_and_forked_processes_read_one_object(docs):
    read = reader(docs, ids(documents()), num_rounds=20)
    children = forked_readers(read)
    for child in children:
        child.start()
    failures = []
    read(failures)
    for child in children:
        child.join()
    assert not failures
    assert [child.exitcode for child in children] == [0] * 4


def test_another_process_opens_it_by_its_path(docs, path):
    code = 'import pickle, sys; print(pickle.load(sys.stdin.buffer)[7].id)'
    done = subprocess.run(
        [sys.executable, '-c', code],
        input=pickle.dumps(docs),
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])},
        capture_output=True,
        check=True,
    )
    assert done.stdout.strip() == b'id 7'


def test_every_cut_and_every_addition_is_noticed(tmp_path):
    path = tmp_path / 'docs'
    save_documents(documents(2), path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match='holds no Documents') as ours:
            StoredDocuments(path)
        with pytest.raises(DataError) as theirs:
            load_documents(path)
        assert str(ours.value) == str(theirs.value)
    path.write_bytes(data + b'x')
    with pytest.raises(DataError, match='1 bytes follow its last Document'):
        StoredDocuments(path)
    with pytest.raises(FileNotFoundError):
        StoredDocuments(tmp_path / 'absent')


def test_pickle_is_refused(tmp_path):
    docs = DocumentArray(documents(2))
    (tmp_path / 'array').write_bytes(pickle.dumps(docs))
    with pytest.raises(DataError, match='looks like pickle'):
        StoredDocuments(tmp_path / 'array')
    docs.save_binary(str(tmp_path / 'stream'), protocol='pickle')
    with pytest.raises(DataError, match='cannot read Document 0'):
        StoredDocuments(tmp_path / 'stream')[0]


def test_a_bad_record_names_its_document(tmp_path):
    path = tmp_path / 'docs'
    save_documents(documents(3), path)
    with StoredDocuments(path) as docs:
        start = int(docs._offsets[1])
        length = int(docs._offsets[2]) - start - 4
    data = bytearray(path.read_bytes())
    data[start + 4 : start + 4 + length] = b'\xff' * length
    path.write_bytes(data)
    docs = StoredDocuments(path)
    assert (docs[0].id, docs[2].id) == ('id 0', 'id 2')
    with pytest.raises(DataError, match=r'cannot read Document 1 of .*docs'):
        docs[1]
    with pytest.raises(DataError, match='cannot read Document 1'):
        list(docs)


def test_a_file_written_into_is_refused_and_one_replaced_is_read_as_it_was(tmp_path):
    path = tmp_path / 'docs'
    save_documents(documents(3), path)
    docs = StoredDocuments(path)
    sent = pickle.dumps(docs)
    save_documents([Document(id='other')], path)
    assert ids(docs) == ['id 0', 'id 1', 'id 2']
    with pytest.raises(DataError, match='was changed since it was opened'):
        pickle.loads(sent)
    docs = StoredDocuments(path)
    reading = iter(StoredDocuments(path))
    DocumentArray(documents(3)).save_binary(str(path), protocol='protobuf')
    for read in (lambda: docs[0], lambda: list(docs), lambda: next(reading)):
        with pytest.raises(DataError, match='was changed since it was opened'):
            read()


def test_a_length_that_does_not_fit_is_noticed(tmp_path):
    path = tmp_path / 'docs'
    save_documents(documents(3), path)
    docs = StoredDocuments(path)
    status = path.stat()
    with path.open('r+b') as file:
        file.seek(9)
        file.write(b'\0\0\0\1')
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match='was changed since it was opened'):
        docs[0]


def test_closed_documents_say_so(path):
    docs = StoredDocuments(path)
    view = docs[3:]
    docs.close()
    docs.close()
    with pytest.raises(DataError, match='was closed'):
        docs[0]
    with pytest.raises(DataError, match='was closed'):
        list(view)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(st.lists(st.integers(0, 300), max_size=60))
def test_any_sizes_come_back(tmp_path, sizes):
    naive = [Document(id=str(i), text='ü' * size) for i, size in enumerate(sizes)]
    save_documents(iter(naive), tmp_path / 'docs')
    with StoredDocuments(tmp_path / 'docs') as docs:
        assert [(d.id, d.text or '') for d in docs] == [(d.id, d.text or '') for d in naive]


def test_little_stays_in_memory(tmp_path):
    num_docs = 50_000
    docs = spool_documents(
        (Document(uri=f'{i}.png', tags={'finetuner_label': i % 9}) for i in range(num_docs)),
        tmp_path,
    )
    assert docs.nbytes / num_docs < 8.1
    assert docs[::2].positions.nbytes == 8 * num_docs / 2
    status = Path('/proc/self/status')
    before = int(status.read_text().split('VmRSS:')[1].split()[0])
    assert sum(1 for _ in docs) == num_docs
    grown = int(status.read_text().split('VmRSS:')[1].split()[0]) - before
    # The file has 6 MB, and the Documents would take a hundred.
    assert grown < 8 * 1024


def test_spooled_documents_are_there_until_closed(tmp_path):
    docs = spool_documents(iter(documents()), tmp_path)
    assert ids(docs) == ids(documents())
    assert len(os.listdir(tmp_path)) == 1
    docs.close()
    assert os.listdir(tmp_path) == []
    view = spool_documents(documents(), tmp_path)[3:5]
    assert ids(view) == ['id 3', 'id 4']
    del view
    assert os.listdir(tmp_path) == []


def test_a_forked_process_neither_removes_the_spooled_file_nor_loses_it(tmp_path):
    docs = spool_documents(documents(), tmp_path)
    context = multiprocessing.get_context('fork')
    go_on = context.Event()

    def read_and_close():
        go_on.wait(10)
        right = ids(docs) == ids(documents())
        docs.close()
        os._exit(0 if right else 1)

    early, late = (context.Process(target=read_and_close) for _ in range(2))
    early.start()
    go_on.set()
    early.join()
    assert len(os.listdir(tmp_path)) == 1
    go_on.clear()
    late.start()
    docs.close()
    assert os.listdir(tmp_path) == []
    go_on.set()
    late.join()
    assert (early.exitcode, late.exitcode) == (0, 0)


def failing(error):
    yield from documents(3)
    raise error


@pytest.mark.parametrize('error', [RuntimeError('midway'), KeyboardInterrupt()])
def test_an_iterator_that_fails_leaves_no_file(tmp_path, error):
    with pytest.raises(type(error)):
        spool_documents(failing(error), tmp_path)
    with pytest.raises(type(error)):
        save_documents(failing(error), tmp_path / 'docs')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('element', ['text', None, {'text': 'a'}])
def test_an_element_that_is_no_document_is_named(tmp_path, element):
    with pytest.raises(DataError, match='Document 1 is of type'):
        spool_documents([Document(), element], tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_has_no_length_is_written_as_what_has_one(tmp_path):
    whole = save_documents(documents(), tmp_path / 'whole')
    assert save_documents(iter(documents()), tmp_path / 'streamed') == whole
    assert (tmp_path / 'streamed').read_bytes() == (tmp_path / 'whole').read_bytes()
    docs = StoredDocuments(tmp_path / 'whole')
    assert documents_hash(docs) == documents_hash(docs[:]) == whole
    with (tmp_path / 'inside').open('w+b') as file:
        file.write(b'before')
        assert write_documents(iter(documents()), file) == whole
    assert (tmp_path / 'inside').read_bytes() == b'before' + (tmp_path / 'whole').read_bytes()


def test_a_length_that_lies_is_noticed(tmp_path):
    class Liar(list):
        def __len__(self):
            return 7

    with pytest.raises(DataError, match='said to be 7 and were 3'):
        save_documents(Liar(documents(3)), tmp_path / 'docs')
    assert os.listdir(tmp_path) == []
