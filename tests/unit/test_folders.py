"""Folders of pictures: classes by folder, instances, and what is neither."""

import os
from pathlib import Path

import pytest

from finetuner.data.documents import data_kind
from finetuner.data.folders import picture_uri, read_folder
from finetuner.excepts import DataError


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'not looked at')
    return root


def found(root):
    return [
        (Path(doc.uri).relative_to(root).as_posix(), doc.tags.get('finetuner_label'))
        for doc in read_folder(root)
    ]


def test_folders_are_classes(tmp_path):
    fill(tmp_path, 'dog/b.JPG', 'dog/a.png', 'cat/old/x.webp', 'cat/y.TIFF', '10/z.gif')
    assert found(tmp_path) == [
        ('10/z.gif', '10'),
        ('cat/y.TIFF', 'cat'),
        ('cat/old/x.webp', 'cat'),
        ('dog/a.png', 'dog'),
        ('dog/b.JPG', 'dog'),
    ]
    assert data_kind(list(read_folder(tmp_path))) == 'class'


def test_a_flat_folder_is_instances(tmp_path):
    fill(tmp_path, 'b.png', 'a.jpeg')
    (tmp_path / 'empty').mkdir()
    assert found(tmp_path) == [('a.jpeg', None), ('b.png', None)]


def test_uris_are_absolute_wherever_one_stands(tmp_path, monkeypatch):
    fill(tmp_path, 'data/a.png')
    monkeypatch.chdir(tmp_path)
    docs = list(read_folder('data'))
    monkeypatch.chdir('/')
    assert [doc.uri for doc in docs] == [str(tmp_path / 'data' / 'a.png')]


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path, caplog):
    fill(
        tmp_path, 'a/1.png', 'a/.2.png', 'a/Thumbs.db', '.git/3.png', 'a/.DS_Store', 'a/notes.txt',
        'b/4.png', 'b/5.svg', 'README', 'c/only.txt',
    )  # fmt: skip
    assert found(tmp_path) == [('a/1.png', 'a'), ('b/4.png', 'b')]
    assert '4 files' in caplog.text
    assert "'README'" in caplog.text
    assert 'Thumbs' not in caplog.text
    assert "hold no pictures and are no classes: 'c'" in caplog.text


def test_pictures_beside_folders_of_pictures_are_refused(tmp_path):
    fill(tmp_path, 'a.png', 'cat/deep/b.png')
    with pytest.raises(DataError, match=r'beside folders of pictures .*cat/deep/b\.png'):
        found(tmp_path)


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    fill(tmp_path, 'train/cat/a.png', 'val/cat/b.png')
    with pytest.raises(DataError, match='parts of a data set'):
        found(tmp_path)
    fill(tmp_path / 'flat', 'train/a.png', 'bus/b.png')
    assert len(found(tmp_path / 'flat')) == 2


@pytest.mark.parametrize('names', [(), ('a.txt',), ('a/b.txt', 'c/d.txt')])
def test_a_folder_without_pictures_is_refused(tmp_path, names):
    fill(tmp_path, *names)
    with pytest.raises(DataError, match='no picture'):
        found(tmp_path)


def test_no_such_folder(tmp_path):
    fill(tmp_path, 'a.png')
    for path in (tmp_path / 'none', tmp_path / 'a.png', ''):
        with pytest.raises(DataError, match='no folder'):
            read_folder(path)


def test_links_that_loop_end(tmp_path):
    fill(tmp_path, 'data/a/1.png', 'data/b/2.png')
    os.symlink(tmp_path / 'data', tmp_path / 'data/a/up')
    os.symlink('/', tmp_path / 'data/a/root')
    os.symlink(tmp_path / 'data/b', tmp_path / 'data/b/self')
    os.symlink(tmp_path / 'data/none', tmp_path / 'data/b/broken')
    assert found(tmp_path / 'data') == [('a/1.png', 'a'), ('b/2.png', 'b')]


def test_linked_folders_are_read(tmp_path):
    fill(tmp_path, 'elsewhere/1.png')
    (tmp_path / 'data').mkdir()
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'data/cat')
    assert found(tmp_path / 'data') == [('cat/1.png', 'cat')]


def test_a_pipe_named_like_a_picture_is_none(tmp_path):
    fill(tmp_path, 'a.png')
    os.mkfifo(tmp_path / 'b.png')
    assert found(tmp_path) == [('a.png', None)]


@pytest.mark.skipif(os.geteuid() == 0, reason='root reads every folder')
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    fill(tmp_path, 'a/1.png', 'b/2.png')
    (tmp_path / 'b').chmod(0)
    try:
        with pytest.raises(DataError, match=r"folder '.*b' cannot be read"):
            found(tmp_path)
    finally:
        (tmp_path / 'b').chmod(0o700)


def test_a_name_that_no_document_can_hold_is_named(tmp_path):
    fill(tmp_path, 'a.png')
    (Path(os.fsdecode(os.fsencode(tmp_path) + b'/\xff.png'))).write_bytes(b'x')
    with pytest.raises(DataError, match='not UTF-8'):
        found(tmp_path)


def test_picture_uris(tmp_path):
    fill(tmp_path, 'data/a b.png')
    folder = tmp_path / 'data'
    path = str(folder / 'a b.png')
    for name in ('a b.png', '../data/./a b.png', path, f'file://{path.replace(" ", "%20")}'):
        assert picture_uri(name, folder) == path
    for uri in ('https://example.org/a.png', 'data:image/png;base64,AAAA'):
        assert picture_uri(uri, folder) == uri
    for name, reason in (
        ('b.png', 'no file'),
        ('.', 'no file'),
        ('s3://bucket/a.png', 'scheme'),
        ('file://host/a.png', 'host'),
        ('file://[a.png', 'not a valid uri'),
        ('a\0.png', 'no file'),
    ):
        with pytest.raises(DataError, match=reason):
            picture_uri(name, folder)
