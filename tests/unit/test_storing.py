"""Documents on disk: they come back as they were, and nothing else is taken for them."""

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.data.documents import documents_hash, load_documents, save_documents
from finetuner.excepts import DataError


def labelled(label):
    return Document(text='content', tags={'finetuner_label': label})


def class_data(*labels):
    return DocumentArray([labelled(label) for label in labels])


def many_kinds_of_documents():
    return DocumentArray(
        [
            Document(text='ä 🎍', tags={'finetuner_label': 'a', 'nested': {'x': [1, None, True]}}),
            Document(blob=b'\x80\x04', tags={'finetuner_label': 3}),
            Document(tensor=np.arange(6, dtype=np.uint8).reshape(1, 2, 3)),
            Document(uri='a.png', matches=[labelled(1), labelled(-1)]),
            Document(chunks=[Document(text='a', modality='text')]),
            Document(),
        ]
    )


def assert_same(one, other):
    assert [doc.id for doc in one] == [doc.id for doc in other]
    for left, right in zip(one, other, strict=True):
        assert (left.text, left.blob, left.uri) == (right.text, right.blob, right.uri)
        assert left.tags == right.tags
        np.testing.assert_array_equal(left.tensor, right.tensor)
        assert [m.tags for m in left.matches] == [m.tags for m in right.matches]
        assert [c.modality for c in left.chunks] == [c.modality for c in right.chunks]


def test_saved_documents_come_back(tmp_path):
    docs = many_kinds_of_documents()
    digest = save_documents(docs, tmp_path / 'docs')
    loaded = load_documents(tmp_path / 'docs')
    assert_same(docs, loaded)
    assert loaded[2].tensor.dtype == np.uint8
    assert digest == documents_hash(docs) == documents_hash(loaded)
    assert os.listdir(tmp_path) == ['docs']


def test_docarray_reads_ours_and_we_read_docarrays(tmp_path):
    docs = many_kinds_of_documents()
    save_documents(docs, tmp_path / 'ours')
    assert_same(docs, DocumentArray.load_binary(tmp_path / 'ours', protocol='protobuf'))
    docs.save_binary(str(tmp_path / 'theirs'), protocol='protobuf')
    assert_same(docs, load_documents(tmp_path / 'theirs'))


def test_hash_is_of_the_file_and_the_same_in_every_process(tmp_path):
    code = (
        'import sys; from docarray import Document; from finetuner.data.documents import *\n'
        "docs = [Document(id=str(i), tags={f'tag {j}': j for j in range(30)}) for i in range(3)]\n"
        'print(save_documents(docs, sys.argv[1]))'
    )
    root = Path(__file__).parents[2]
    digests = set()
    for seed in ('1', '2'):
        done = subprocess.run(
            [sys.executable, '-c', code, str(tmp_path / seed)],
            env={**os.environ, 'PYTHONHASHSEED': seed, 'PYTHONPATH': str(root)},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    shown = subprocess.run(
        ['sha256sum', str(tmp_path / '1')], capture_output=True, text=True, check=True
    )
    assert digests == {shown.stdout.split()[0]}


def test_numpy_in_tags_and_blobs_is_stored(tmp_path):
    docs = [Document(blob=np.ones((2, 2)), tags={'finetuner_label': np.int64(3), 'x': np.ones(2)})]
    save_documents(docs, tmp_path / 'docs')
    loaded = load_documents(tmp_path / 'docs')[0]
    np.testing.assert_array_equal(loaded.tensor, np.ones((2, 2)))
    assert loaded.tags == {'finetuner_label': 3, 'x': [1, 1]}
    assert isinstance(docs[0].blob, np.ndarray)


class Boom:
    """Leaves a file behind when unpickled."""

    def __reduce__(self):
        return os.mkdir, ('unpickled',)


def test_pickle_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docs = class_data(1, 2)
    record = pickle.dumps(Boom())
    header = b'\x01' + (1).to_bytes(8, 'big') + len(record).to_bytes(4, 'big')
    files = {
        'array.pickle': pickle.dumps(docs),
        'boom.pickle': record,
        'boom.protobuf': record,
        'stream.pickle': header + record,
        'stream.pickle.gz': header + record,
    }
    for name, data in files.items():
        Path(name).write_bytes(data)
        with pytest.raises(DataError):
            load_documents(name)
    docs.save_binary('theirs', protocol='pickle')
    with pytest.raises(DataError, match='Document 0'):
        load_documents('theirs')
    with pytest.raises(DataError, match='looks like pickle'):
        load_documents('boom.protobuf')
    assert not Path('unpickled').exists()


def test_names_of_files_mean_nothing(tmp_path):
    docs = class_data(1, 2)
    save_documents(docs, tmp_path / 'docs.pickle.gz')
    assert_same(docs, load_documents(tmp_path / 'docs.pickle.gz'))


def test_every_cut_and_every_addition_is_noticed(tmp_path):
    path = tmp_path / 'docs'
    save_documents(class_data(1, 'b'), path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError):
            load_documents(path)
    path.write_bytes(data + b'x')
    with pytest.raises(DataError, match='1 bytes follow its last Document'):
        load_documents(path)


def test_garbage_is_refused(tmp_path):
    path = tmp_path / 'docs'
    generator = np.random.default_rng(0)
    for size in (0, 1, 9, 100, 10_000):
        path.write_bytes(generator.bytes(size))
        with pytest.raises(DataError):
            load_documents(path)
        path.write_bytes(b'\x01' + generator.bytes(size))
        with pytest.raises(DataError):
            load_documents(path)
        path.write_bytes(
            b'\x01' + (1).to_bytes(8, 'big') + size.to_bytes(4, 'big') + generator.bytes(size)
        )
        with pytest.raises(DataError, match='Document 0'):
            load_documents(path)
    with pytest.raises(FileNotFoundError):
        load_documents(tmp_path / 'absent')


@pytest.mark.parametrize('bad', [{'x': math.nan}, {'x': object()}, {'x': 1j}])
def test_what_cannot_be_stored_names_its_document_and_leaves_no_file(tmp_path, bad):
    path = tmp_path / 'docs'
    save_documents(class_data(1), path)
    before = path.read_bytes()
    with pytest.raises(
        DataError, match=r'^Document 1( cannot be stored: Field `tags`|: a tag holds nan)'
    ):
        save_documents([Document(), Document(tags=bad)], path)
    assert os.listdir(tmp_path) == ['docs']
    assert path.read_bytes() == before
