"""WebDataset shards: what each sample becomes, what is refused, and files told by key."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest

from finetuner.data import open_documents
from finetuner.data.contents import content_of
from finetuner.data.documents import data_kind
from finetuner.excepts import ConfigError, DataError
from finetuner.storage import archives
from tests.conftest import png

PICTURE = png(np.zeros((2, 2, 3), np.uint8))


def shard(path, *files, **headers):
    with tarfile.open(path, 'w', **headers) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def opened(tmp_path, *files, **options):
    return open_documents(shard(tmp_path / 'x.tar', *files), **options)


def labels(docs):
    return [doc.tags.get('finetuner_label') for doc in docs]


def test_pictures_with_classes(tmp_path):
    docs = opened(
        tmp_path,
        ('000.jpg', PICTURE),
        ('000.cls', '3'),
        ('001.CLS', ' 7\n'),
        ('001.PNG', PICTURE),
        ('sub.dir/001.webp', PICTURE),
        ('sub.dir/001.cls', '-1'),
    )
    assert data_kind(docs) == 'class'
    assert labels(docs) == [3, 7, -1]
    assert [doc.tags['__key__'] for doc in docs] == ['000', '001', 'sub.dir/001']
    assert all(doc.blob == PICTURE for doc in docs)
    assert len({doc.id for doc in docs}) == 3


def test_texts(tmp_path):
    docs = opened(tmp_path, ('a.txt', 'ä b'), ('a.cls', '0'), ('b.txt', 'c'), ('b.cls', '1'))
    assert [(doc.text, doc.tags['finetuner_label']) for doc in docs] == [('ä b', 0), ('c', 1)]


def test_without_labels(tmp_path):
    docs = opened(tmp_path, ('a.jpg', PICTURE), ('b.txt', 'c'))
    assert data_kind(docs) == 'instance'


def test_pairs_of_text_and_picture(tmp_path):
    docs = opened(tmp_path, ('a.txt', 'x'), ('a.jpg', PICTURE), ('b.jpg', PICTURE), ('b.txt', 'y'))
    assert data_kind(docs) == 'text_image_pair'
    assert [[c.modality for c in doc.chunks] for doc in docs] == [['text', 'image']] * 2
    assert [doc.chunks[0].text for doc in docs] == ['x', 'y']
    assert docs[0].chunks[1].blob == PICTURE


EVERYTHING = (
    ('a.jpg', PICTURE),
    ('a.cls', '3'),
    ('a.txt', 'x'),
    ('a.json', json.dumps({'kind': 'shoe', 'size': {'w': 1.5}, 'no': None})),
)


def test_of_everything_one_says_what_counts(tmp_path):
    with pytest.raises(DataError, match=r"sample 'a' of 'x.tar': .*content='image'"):
        opened(tmp_path, *EVERYTHING)
    for content, label, expected in [
        ('image', None, (PICTURE, 3)),
        ('image', 'cls', (PICTURE, 3)),
        ('text', 'kind', ('x', 'shoe')),
    ]:
        (doc,) = opened(tmp_path, *EVERYTHING, content=content, label=label)
        assert (content_of(doc), doc.tags['finetuner_label']) == expected
        assert doc.tags['size'] == {'w': 1.5}
    (pair,) = opened(tmp_path, *EVERYTHING, content='pair')
    assert data_kind([pair]) == 'text_image_pair'
    assert 'finetuner_label' not in pair.tags


def test_a_label_may_be_a_file_of_any_ending(tmp_path):
    files = (('a.jpg', PICTURE), ('a.top.cls', '4'), ('a.cls', '1'))
    assert labels(opened(tmp_path, *files, label='top.cls')) == [4]
    assert labels(opened(tmp_path, *files)) == [1]


def test_other_files_are_skipped_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        docs = opened(
            tmp_path,
            ('__meta__', 'x'), ('__m__/a.txt', 'x'), ('README', 'x'), ('.hidden', 'x'), ('d/._a.jpg', 'x'),
            ('a.jpg', PICTURE), ('a.seg.png', PICTURE), ('a.npy', b'x'), ('b.jpg', PICTURE),
        )  # fmt: skip
    assert [doc.tags['__key__'] for doc in docs] == ['a', 'b']
    assert '2 files in' in caplog.text
    assert '(npy, seg.png)' in caplog.text


@pytest.mark.parametrize(
    ('files', 'options', 'words'),
    [
        ([('a.cls', '1')], {}, r"sample 'a' of 'x.tar': there is no content: .*cls is there"),
        ([('a.npy', b'')], {}, 'nothing that is read is there'),
        ([('a.jpg', PICTURE)], {'content': 'text'}, 'txt is needed'),
        ([('a.jpg', PICTURE)], {'content': 'pair'}, 'a picture and txt is needed, and jpg is there'),
        ([('a.jpg', PICTURE), ('a.png', PICTURE)], {}, 'several pictures, png and jpg'),
        ([('a.jpg', PICTURE), ('a.JPG', PICTURE)], {}, 'its jpg is there twice'),
        ([('a.jpg', b'')], {}, 'its jpg is empty'),
        ([('a.txt', ' \n')], {}, 'its txt is empty'),
        ([('a.txt', b'\xff')], {}, 'its txt is not UTF-8'),
        ([('a.txt', 'x'), ('a.cls', 'shoe')], {}, "its cls is 'shoe', not a whole number"),
        ([('a.txt', 'x'), ('a.cls', str(2**60))], {}, 'not a whole number below'),
        ([('a.txt', 'x')], {'label': 'kind'}, r"neither a file that ends in \.kind nor a key 'kind'"),
        ([('a.txt', 'x'), ('a.json', '{"k": []}')], {'label': 'k'}, 'neither an int nor a str'),
        ([('a.txt', 'x'), ('a.json', '{')], {}, 'its json is not valid'),
        ([('a.txt', 'x'), ('a.json', '[1]')], {}, 'its json is a list'),
        ([('a.txt', 'x'), ('a.json', '{"a": NaN}')], {}, 'NaN is no JSON number'),
        ([('a.txt', 'x'), ('a.json', '"\\ud800"')], {}, 'its json is not valid'),
        ([('a.txt', 'x'), ('a.json', '[' * 10_000)], {}, 'its json is not valid'),
        ([(f'a.{n}', 'x') for n in range(101)], {}, 'more than 100 files'),
        ([], {}, 'holds no records'),
        ([('a\udcff.txt', 'x')], {}, 'not UTF-8'),
    ],
)  # fmt: skip
def test_broken_samples_are_named_by_shard_and_key(tmp_path, files, options, words):
    good = [('0.txt', 'x')] if files and not options and files[0][0] != 'a.npy' else []
    with pytest.raises(DataError, match=words):
        opened(tmp_path, *good, *files, **options)


def test_options_that_nothing_has(tmp_path):
    for options in ({'content': 'jpg'}, {'content': 'pair', 'label': 'x'}, {'label': ''}):
        with pytest.raises(ConfigError, match=r'content=|label='):
            opened(tmp_path, ('a.txt', 'x'), **options)
    (tmp_path / 'x.jsonl').write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match='WebDataset shards'):
        open_documents(tmp_path / 'x.jsonl', label='cls')


def link(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, '/etc/passwd'
    return info


@pytest.mark.parametrize(
    ('info', 'words'),
    [
        (link('b.txt', tarfile.SYMTYPE), 'is a link'),
        (link('b.txt', tarfile.LNKTYPE), 'is a link'),
        (link('b.txt', tarfile.FIFOTYPE), 'no plain file'),
        (link('b.txt', tarfile.BLKTYPE), 'no plain file'),
    ],
)
def test_links_and_devices_are_refused(tmp_path, info, words):
    path = shard(tmp_path / 'x.tar', ('a.txt', 'x'))
    with tarfile.open(path, 'a') as archive:
        archive.addfile(info)
    with pytest.raises(DataError, match=words):
        open_documents(path)


def test_names_are_not_used_as_paths(tmp_path):
    docs = opened(tmp_path, ('../../etc/a.txt', 'x'), ('/abs/b:c.txt', 'y'), ('./d.txt', 'z'))
    assert [doc.tags['__key__'] for doc in docs] == ['../../etc/a', '/abs/b:c', './d']
    assert [path.name for path in tmp_path.iterdir()] == ['x.tar']


def test_what_is_too_much_is_refused(tmp_path, monkeypatch):
    path = shard(tmp_path / 'x.tar', *((f'{n}.txt', 'x') for n in range(5)))
    monkeypatch.setattr(archives, 'MAX_DATA_FILES', 4)
    with pytest.raises(DataError, match='more than 4 files'):
        open_documents(path)
    monkeypatch.undo()
    shard(path, ('a.txt', b'x' * (16 * 2**20 + 1)))
    with pytest.raises(DataError, match=r"sample 'a' .*its txt has 16,777,217 bytes"):
        open_documents(path)
    shard(path, (f'{"a" * 2**21}.txt', 'x'), format=tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match='a header of it has'):
        open_documents(path)


def test_no_tar_and_damaged_tars(tmp_path):
    path = tmp_path / 'x.tar'
    for data in (b'', b'abc', b'\x1f\x8b' + bytes(2000), b'x' * 5000):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r'x\.tar'):
            open_documents(path)
    shard(path, *((f'{n}.txt', f'text {n}') for n in range(8)))
    whole = path.read_bytes()
    # the first and the last byte of a header, and whatever lies between
    for place in range(4 * 1024, 4 * 1024 + 500, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r'damaged|cannot be read as tar'):
            open_documents(path)
    for size in (*range(1, 8 * 1024, 293), 2048, 8 * 1024):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r'incomplete|damaged|cannot be read as tar'):
            open_documents(path)
