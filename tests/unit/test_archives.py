"""Zips from outside: only one folder of plain files comes out, whatever the zip says."""

import stat
import struct
import warnings
import zipfile

import pytest

from finetuner.excepts import ArtifactError, DataError
from finetuner.storage import archives
from finetuner.storage.archives import unzip, unzip_data


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / 'target'
    folder.mkdir()
    return folder


@pytest.fixture
def archive(tmp_path):
    return tmp_path / 'given.zip'


def write(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as zipped:
        for name, data in members.items():
            info = zipfile.ZipInfo('x')
            info.filename = name  # ZipInfo itself would mend some names
            info.compress_type = compression
            zipped.writestr(info, data)
    return path


def central_directory(data):
    return data.index(b'PK\x01\x02')


@pytest.mark.parametrize('folder', ['folder/', ''])
def test_plain_files_come_out(archive, target, folder):
    write(archive, {f'{folder}a.txt': b'one', f'{folder}b.bin': b'\x00' * 5})
    unzip(archive, target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {
        'a.txt': b'one',
        'b.bin': b'\x00' * 5,
    }


def test_compressed_files_and_folder_entries(archive, target):
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as zipped:
        zipped.mkdir('folder')
        zipped.writestr('folder/a.txt', b'x' * 3_000_000)
    unzip(archive, target)
    assert (target / 'a.txt').read_bytes() == b'x' * 3_000_000
    assert [p.name for p in target.iterdir()] == ['a.txt']


@pytest.mark.parametrize(
    'name',
    [
        '../evil',
        'a/../../evil',
        '/etc/evil',
        '\\evil',
        'a\\..\\evil',
        'C:/evil',
        'a/C:evil',
        'a/x:y',
        'a/..',
        '',
        '.',
    ],
)
def test_paths_that_leave(archive, target, name):
    write(archive, {name: b'evil'})
    with pytest.raises(ArtifactError, match=r'given.zip is refused'):
        unzip(archive, target)
    assert not list(target.iterdir())
    assert not (target.parent / 'evil').exists()


def test_links(archive, target):
    info = zipfile.ZipInfo('folder/link')
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, 'w') as zipped:
        zipped.writestr('folder/a', b'x')
        zipped.writestr(info, '/etc/passwd')
    with pytest.raises(ArtifactError, match=r"'folder/link' is a link"):
        unzip(archive, target)
    assert not list(target.iterdir())


@pytest.mark.parametrize('names', [['a/x', 'b/y'], ['a/b/x'], []])
def test_more_or_less_than_one_folder(archive, target, names):
    write(archive, dict.fromkeys(names, b'x'))
    with pytest.raises(ArtifactError, match='do not lie in one folder'):
        unzip(archive, target)


@pytest.mark.parametrize('root', ['', 'a/'])
def test_folders_in_the_folder(archive, target, root):
    write(archive, {f'{root}x': b'1', f'{root}1_Pooling/x': b'2', f'{root}2_Dense/x': b'3'})
    unzip(archive, target)
    found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob('x')}
    assert found == {'x': b'1', '1_Pooling/x': b'2', '2_Dense/x': b'3'}


def test_folders_too_deep(archive, target):
    write(archive, {'a/x': b'', 'a/b/c/d/x': b''})
    with pytest.raises(ArtifactError, match='go too deep'):
        unzip(archive, target)
    assert not list(target.iterdir())


def test_too_many_files(archive, target):
    write(archive, {f'a/{number}': b'' for number in range(archives.MAX_FILES + 1)})
    with pytest.raises(ArtifactError, match='more than 64 files'):
        unzip(archive, target)
    assert not list(target.iterdir())


def test_a_bomb_is_refused_before_it_is_unpacked(archive, target, monkeypatch):
    write(archive, {'a/x': b'\x00' * 2_000_000, 'a/y': b'\x00' * 2_000_000}, zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 10_000
    monkeypatch.setattr(archives, 'MAX_BYTES', 3_000_000)
    with pytest.raises(ArtifactError, match='holds more than'):
        unzip(archive, target)
    assert not list(target.iterdir())


def test_a_bomb_that_lies_about_its_size(archive, target):
    write(archive, {'a/x': b'\x00' * 5_000_000}, zipfile.ZIP_DEFLATED)
    data = bytearray(archive.read_bytes())
    at = central_directory(data)
    data[at + 24 : at + 28] = struct.pack('<I', 100)
    archive.write_bytes(bytes(data))
    with pytest.raises(ArtifactError):
        unzip(archive, target)
    assert sum(path.stat().st_size for path in target.iterdir()) <= 100


def test_what_is_no_zip(archive, target):
    archive.write_bytes(b'PK\x03\x04 not really')
    with pytest.raises(ArtifactError, match=r'given.zip cannot be unzipped'):
        unzip(archive, target)


@pytest.mark.parametrize('compression', [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions(archive, target, compression):
    write(archive, {'a/x': bytes(100)}, compression)
    with pytest.raises(ArtifactError, match=r"'a/x' is compressed in a way other than deflate"):
        unzip(archive, target)
    assert not list(target.iterdir())


@pytest.mark.parametrize('kind', [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_devices(archive, target, kind):
    info = zipfile.ZipInfo('a/device')
    info.external_attr = (kind | 0o666) << 16
    with zipfile.ZipFile(archive, 'w') as zipped:
        zipped.writestr(info, b'')
    with pytest.raises(ArtifactError, match=r"'a/device' is no plain file"):
        unzip(archive, target)
    assert not list(target.iterdir())


@pytest.mark.parametrize('other', ['a/x', 'a//x', 'a\\x', './a/x'])
def test_one_file_twice(archive, target, other):
    with zipfile.ZipFile(archive, 'w') as zipped:
        for name in ('a/x', other):
            info = zipfile.ZipInfo('x')
            info.filename = name
            with warnings.catch_warnings(action='ignore'):
                zipped.writestr(info, b'')
    with pytest.raises(ArtifactError, match='more than once'):
        unzip(archive, target)
    assert not list(target.iterdir())


def test_mostly_air(archive, target, monkeypatch):
    write(archive, {'a/x': bytes(2_000_000)}, zipfile.ZIP_DEFLATED)
    unzip(archive, target)
    monkeypatch.setattr(archives, 'FREE_BYTES', 1_000_000)
    with pytest.raises(ArtifactError, match='2,000,000 bytes, more than 100 times its size'):
        unzip(archive, target)


def test_broken_data(archive, target):
    write(archive, {'a/x': bytes(range(256)) * 20}, zipfile.ZIP_DEFLATED)
    data = bytearray(archive.read_bytes())
    data[44:54] = b'\xff' * 10
    archive.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r'given.zip cannot be unzipped'):
        unzip(archive, target)


def test_encrypted(archive, target):
    write(archive, {'a/x': b'secret'})
    data = bytearray(archive.read_bytes())
    data[6] |= 1
    data[central_directory(data) + 8] |= 1
    archive.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match='encrypted'):
        unzip(archive, target)


def test_a_name_that_is_no_text(archive, target):
    write(archive, {'a/ü': b'x'})
    archive.write_bytes(archive.read_bytes().replace('ü'.encode(), b'\xff\xff'))
    with pytest.raises(ArtifactError, match=r'given.zip cannot be unzipped'):
        unzip(archive, target)


def test_cut_off(archive, target):
    write(archive, {'a/x': b'x' * 1000})
    archive.write_bytes(archive.read_bytes()[:500])
    with pytest.raises(ArtifactError, match=r'given.zip cannot be unzipped'):
        unzip(archive, target)


def test_data_lies_in_many_folders(archive, target):
    names = [f'class {i}/more/{j}.png' for i in range(30) for j in range(5)]
    write(archive, {name: name.encode() for name in names})
    unzip_data(archive, target)
    assert {str(p.relative_to(target)) for p in target.rglob('*.png')} == set(names)
    with pytest.raises(ArtifactError, match='more than 64 files'):
        unzip(archive, target)


@pytest.mark.parametrize('name', ['../evil', '/etc/evil', 'a\\..\\evil', 'C:/evil'])
def test_data_does_not_leave_its_place(archive, target, name):
    write(archive, {'a/good.png': b'', name: b'evil'})
    with pytest.raises(DataError, match=r'given.zip is refused'):
        unzip_data(archive, target)
    assert not list(target.iterdir())


def test_data_that_is_too_much(archive, target, monkeypatch):
    monkeypatch.setattr(archives, 'MAX_DATA_FILES', 3)
    write(archive, {f'{i}.png': b'' for i in range(4)})
    with pytest.raises(DataError, match='more than 3 files'):
        unzip_data(archive, target)
    archive.write_bytes(b'no zip')
    with pytest.raises(DataError, match=r'given.zip cannot be unzipped'):
        unzip_data(archive, target)
