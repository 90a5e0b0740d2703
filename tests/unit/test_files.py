"""Stored files: whole or not there, never outside their root, on a disk and elsewhere."""

import hashlib
import os
import uuid

import pytest

from finetuner.excepts import ArtifactError, ConfigError, ConflictError, NotFoundError
from finetuner.storage.files import FileStore


@pytest.fixture(params=['local', 'memory'])
def store(request, tmp_path):
    if request.param == 'local':
        return FileStore(tmp_path / 'root')
    return FileStore(f'memory://{uuid.uuid4().hex}', cache=tmp_path / 'cache')


def _everything(store):
    """Names of all that lies in a store, unfinished things too."""
    return sorted(str(path) for path in store._fs.find(store._root, withdirs=False))


def test_write_read_and_hash(store):
    sha256 = store.write('a/b.bin', [b'one', b'', b'two'])
    assert sha256 == hashlib.sha256(b'onetwo').hexdigest() == store.sha256('a/b.bin')
    assert b''.join(store.read('a/b.bin')) == b'onetwo'
    assert store.local_path('a/b.bin').read_bytes() == b'onetwo'
    assert store.exists('a/b.bin')
    assert not store.exists('a/c.bin')


def test_failed_write_leaves_what_was_there(store):
    store.write('file', [b'old'])

    def breaks_off():
        yield b'new'
        raise OSError('no space left')

    with pytest.raises(OSError, match='no space'):
        store.write('file', breaks_off())
    with pytest.raises(OSError, match='no space'):
        store.write('other', breaks_off())
    assert b''.join(store.read('file')) == b'old'
    assert len(_everything(store)) == 1


@pytest.mark.parametrize('move', [False, True])
def test_put_file(store, tmp_path, move):
    source = tmp_path / 'source'
    source.write_bytes(b'content')
    store.put_file(source, 'kept', move=move)
    assert b''.join(store.read('kept')) == b'content'
    assert source.exists() is not move


def test_directory_appears_whole(store):
    with store.staged_directory('tuned') as directory:
        (directory / 'deep').mkdir()
        (directory / 'deep' / 'weights').write_bytes(b'w' * 3_000_000)
        (directory / 'manifest').write_bytes(b'm')
        assert not store.exists('tuned')
    assert store.exists('tuned')
    local = store.local_path('tuned')
    found = {
        p.relative_to(local).as_posix(): p.read_bytes() for p in local.rglob('*') if p.is_file()
    }
    assert found == {'deep/weights': b'w' * 3_000_000, 'manifest': b'm'}


def test_failed_directory_leaves_nothing(store):
    seen = []

    def breaks_off():
        with store.staged_directory('tuned') as directory:
            seen.append(directory / 'half')
            seen[0].write_bytes(b'h')
            raise RuntimeError('stop')

    with pytest.raises(RuntimeError, match='stop'):
        breaks_off()
    assert not store.exists('tuned')
    assert not seen[0].parent.exists()
    with pytest.raises(NotFoundError):
        store.local_path('tuned')


def test_unfinished_directory_of_a_killed_process_is_cleared(store):
    killed = store.staged_directory('tuned')
    left = killed.__enter__() / 'half'
    left.write_bytes(b'h')
    assert not store.exists('tuned')
    store.delete('tuned')
    assert not left.exists()
    with store.staged_directory('tuned') as directory:
        assert list(directory.iterdir()) == []


def test_directory_is_never_overwritten(store, tmp_path):
    source = tmp_path / 'source'
    source.mkdir()
    (source / 'f').write_bytes(b'first')
    store.put_directory(source, 'tuned')
    (source / 'f').write_bytes(b'second')
    with pytest.raises(ConflictError, match='never overwritten'):
        store.put_directory(source, 'tuned')
    assert (store.local_path('tuned') / 'f').read_bytes() == b'first'


def test_delete(store):
    store.write('file', [b'x'])
    with store.staged_directory('tuned') as directory:
        (directory / 'f').write_bytes(b'x')
    store.local_path('tuned')
    for key in ('file', 'tuned', 'never-there'):
        store.delete(key)
        assert not store.exists(key)
        with pytest.raises(NotFoundError):
            store.local_path(key)
    assert _everything(store) == []


@pytest.mark.parametrize(
    'key',
    ['../x', 'a/../../x', '/etc/passwd', '', '.', 'a//b', 'a\\b', 'a\0b', 'a*', 'a?b', '[ab]'],
)
def test_keys_that_leave_the_root_are_refused(store, key):
    for call in (store.exists, store.delete, store.local_path, store.sha256):
        with pytest.raises(ConfigError, match='not a name in the store'):
            call(key)
    with pytest.raises(ConfigError):
        store.write(key, [b'x'])


@pytest.mark.parametrize('key', ['%2e%2e', 'a#b', 'ünïcode', '\N{GRINNING FACE}', ' a ', 'x' * 200])
def test_odd_names_are_only_names(store, key):
    store.write(key, [b'x'])
    assert b''.join(store.read(key)) == b'x'
    assert len(_everything(store)) == 1


def test_links_do_not_lead_out(tmp_path):
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'secret').write_text('s')
    store = FileStore(tmp_path / 'root')
    store.write('a', [b'x'])
    os.symlink(outside, tmp_path / 'root' / 'link')
    with pytest.raises(ConfigError, match='leaves the store'):
        store.local_path('link/secret')
    with pytest.raises(ConfigError, match='leaves the store'):
        store.write('link/secret', [b'y'])
    os.symlink(outside / 'secret', outside / 'again')
    with pytest.raises(ArtifactError, match='is a link'):
        store.put_directory(outside, 'copied')
    assert (outside / 'secret').read_text() == 's'


def test_remote_directory_without_its_list_is_not_there(tmp_path):
    store = FileStore(f'memory://{uuid.uuid4().hex}', cache=tmp_path / 'cache')
    with store.staged_directory('tuned') as directory:
        (directory / 'f').write_bytes(b'x')
    store._fs.rm(f'{store._root}/tuned/.complete')  # as when the upload was broken off
    assert not store.exists('tuned')
    with pytest.raises(NotFoundError):
        store.local_path('tuned')


def test_remote_file_that_was_changed_is_noticed(tmp_path):
    store = FileStore(f'memory://{uuid.uuid4().hex}', cache=tmp_path / 'cache')
    with store.staged_directory('tuned') as directory:
        (directory / 'f').write_bytes(b'x')
    store._fs.pipe_file(f'{store._root}/tuned/f', b'y')
    with pytest.raises(ArtifactError, match='hash differs'):
        store.local_path('tuned')
    assert not any(p.is_file() for p in (tmp_path / 'cache').rglob('*'))


def test_remote_copy_is_made_once(tmp_path):
    store = FileStore(f'memory://{uuid.uuid4().hex}', cache=tmp_path / 'cache')
    store.write('f', [b'x'])
    first = store.local_path('f')
    assert store.local_path('f') == first
    assert first.is_relative_to(tmp_path / 'cache')


@pytest.mark.parametrize('url', ['nonsense://x', 'memory://x'])
def test_unusable_addresses_are_refused(url):
    with pytest.raises(ConfigError):
        FileStore(url)
