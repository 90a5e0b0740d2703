"""Datasets declared as classes: what they say of themselves, and what they delete."""

import os
import shutil
import signal
import sqlite3
import tempfile
import threading
from pathlib import Path

import fsspec
import pytest

from finetuner import process_pool
from finetuner.columns import File, dataset, version
from finetuner.columns.inspecting import DatasetFile
from finetuner.columns.locking import writing
from finetuner.excepts import ConfigError, ConflictError, DataError, NotFoundError


@pytest.fixture
def place(tmp_path):
    """Arguments of a dataset of its own."""
    return {'sql_file': tmp_path / 'dataset.sql', 'data_dir': tmp_path / 'dataset'}


def texts(place, number=1):
    """A dataset of files and what is derived from them."""

    @dataset(**place)
    class Texts:
        text: File
        name: str = 'none'

        @version(number)
        def twice(text: File) -> File:
            with File.make_tmp('.txt') as file:
                Path(file.path).write_bytes(text.read() * (number + 1))
                return file

        def length(twice: File) -> int:
            if not twice.size:
                raise ValueError('it is empty')
            return twice.size

        def letters(name: str) -> int:
            return len(name)

    return Texts


def filled(place, tmp_path, count=4):
    made = texts(place)
    for number in range(count):
        (tmp_path / f'{number}.txt').write_text('x' * number)
    made.extend({'text': tmp_path / f'{number}.txt'} for number in range(count))
    return made


def kept(place):
    return sorted(path.name for path in place['data_dir'].rglob('*.txt'))


def test_a_file_tells_what_is_cached_and_stale(place, tmp_path):
    made = filled(place, tmp_path)
    made.materialize(workers=0, progress=False)
    file = DatasetFile(place['sql_file'])
    (state,) = file.states()
    assert (state.name, state.num_rows, state.num_files) == ('Texts', 4, 8)
    assert state.data_dir == str(place['data_dir'])
    found = {
        each.name: (each.kind, each.num_kept, each.num_stale, each.num_errors)
        for each in state.columns
    }
    assert found == {
        'text': ('field', 4, 0, 0),
        'name': ('field', 4, 0, 0),
        'twice': ('derived', 4, 0, 0),
        'length': ('derived', 3, 0, 1),
        'letters': ('derived', 4, 0, 0),
    }
    sizes = {each.name: each.num_bytes for each in state.columns}
    assert (sizes['text'], sizes['twice'], sizes['name']) == (6, 12, 16)
    assert {each.name: each.inputs for each in state.columns}['length'] == ('twice',)

    changed = texts(place, 2)
    assert changed[1].length == 3
    (state,) = file.states()
    found = {each.name: (each.num_kept, each.num_stale) for each in state.columns}
    assert found['twice'] == (1, 4)
    assert found['length'] == (1, 3)
    assert found['letters'] == (4, 0)
    assert state.num_bytes > 6 + 12 + 3


def test_rows_are_read_without_the_class(place, tmp_path):
    made = filled(place, tmp_path)
    made.rows[:3].materialize('twice', workers=0)
    file = DatasetFile(place['sql_file'])
    rows = file.rows('Texts', 1, 3)
    assert [row['id'] for row in rows] == [2, 3, 4]
    assert list(rows[0]) == ['id', 'text', 'name', 'twice']
    assert 'twice' not in rows[2]
    assert b''.join(file.files('Texts').read(rows[1]['twice'])) == b'xxxx'
    for call in (file.state, file.rows, file.files):
        with pytest.raises(NotFoundError, match=r"'Text'.*'Texts'"):
            call('Text')


def test_other_files_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match='no such file'):
        DatasetFile(tmp_path / 'none.sql')
    (tmp_path / 'text.sql').write_text('this is no database' * 100)
    with pytest.raises(DataError, match=r'as a SQLite file.*not a database'):
        DatasetFile(tmp_path / 'text.sql')
    with sqlite3.connect(tmp_path / 'other.sql') as connection:
        connection.execute('CREATE TABLE other (id)')
    with pytest.raises(DataError, match='no dataset'):
        DatasetFile(tmp_path / 'other.sql')
    assert (tmp_path / 'other.sql').read_bytes()[18:20] == b'\x01\x01'  # no log was begun


def test_a_dataset_can_be_moved(place, tmp_path):
    made = filled(place, tmp_path)
    made.materialize(workers=0)
    # as when its process ends
    made.store.database.close()
    moved = tmp_path / 'moved'
    moved.mkdir()
    for path in (place['sql_file'], place['data_dir']):
        path.rename(moved / path.name)
    file = DatasetFile(moved / 'dataset.sql')
    assert file.state('Texts').data_dir == str(moved / 'dataset')
    row = file.rows('Texts')[2]
    assert b''.join(file.files('Texts').read(row['text'])) == b'xx'
    there = texts({'sql_file': moved / 'dataset.sql', 'data_dir': moved / 'dataset'})
    assert [row.text.size for row in there] == [0, 1, 2, 3]
    there.rows[3:].delete()
    assert there.prune().num_files == 2


def test_prune_deletes_what_is_stale_and_nothing_else(place, tmp_path):
    made = filled(place, tmp_path)
    made.materialize(workers=0)
    before = kept(place)
    pruned = made.prune()
    assert (pruned.num_values, pruned.num_files, pruned.shared_with) == (0, 0, ())
    changed = texts(place, 2)
    changed.materialize(workers=0)
    assert len(kept(place)) > len(before)
    pruned = changed.prune()
    # of four files the empty one and that of six letters are those of both versions
    assert (pruned.num_values, pruned.num_files, pruned.num_bytes) == (4 + 3, 2, 2 + 4)
    assert [row.twice.size for row in changed] == [0, 3, 6, 9]
    assert [row.length for row in changed.rows[1:]] == [3, 6, 9]
    assert len(changed.errors('length')) == 1
    # the values of the old code are computed again
    assert [row.twice.size for row in texts(place)] == [0, 2, 4, 6]


def test_prune_drops_removed_columns_and_what_deleted_rows_left(place, tmp_path):
    made = filled(place, tmp_path)
    made.materialize(workers=0)
    (place['data_dir'] / 'twice' / 'ab').mkdir(exist_ok=True)
    (place['data_dir'] / 'twice' / 'ab' / 'killed.txt').write_text('of a killed process')

    @dataset(**place)
    class Texts:
        text: File

    Texts.rows[:1].delete()
    file = DatasetFile(place['sql_file'])
    kinds = {each.name: each.kind for each in file.state('Texts').columns}
    assert kinds['name'] == 'removed field'
    assert kinds['twice'] == 'removed derived'
    pruned = Texts.prune()
    assert pruned.num_values == 3 + 3 + 3
    assert kept(place) == sorted(Path(row.text.path).name for row in Texts)
    assert [each.name for each in file.state('Texts').columns] == ['text', 'name']
    assert [row.name for row in texts(place)] == ['none'] * 3
    with sqlite3.connect(place['sql_file']) as connection:
        assert connection.execute('PRAGMA foreign_key_check').fetchall() == []


def test_prune_leaves_files_of_other_datasets(place, tmp_path):
    made = filled(place, tmp_path)

    @dataset(**place)
    class Others:
        text: File

    Others.add(text=tmp_path / '3.txt')
    Others.add(text=tmp_path / '2.txt')
    made.rows.delete()
    pruned = made.prune()
    assert pruned.num_files == 2
    assert [row.text.read() for row in Others] == [b'xxx', b'xx']

    elsewhere = {**place, 'sql_file': tmp_path / 'other.sql'}
    more = texts(elsewhere)
    more.add(text=tmp_path / '1.txt')
    Others.rows.delete()
    pruned = Others.prune()
    assert pruned.num_files == 0
    assert pruned.shared_with == (str(tmp_path / 'other.sql'),)
    assert more[0].text.read() == b'x'
    for path in tmp_path.glob('other.sql*'):
        path.unlink()
    assert Others.prune().num_files == 3


def test_prune_does_not_run_while_rows_are_added(place, tmp_path):
    made = filled(place, tmp_path)
    with writing(place['sql_file']), pytest.raises(ConflictError, match='prune when that is done'):
        made.prune()
    begun, goes_on = threading.Event(), threading.Event()

    def rows():
        yield {'text': tmp_path / '1.txt'}
        begun.set()
        goes_on.wait()

    thread = threading.Thread(target=made.extend, args=(rows(),))
    thread.start()
    begun.wait()
    with pytest.raises(ConflictError):
        made.prune()
    goes_on.set()
    thread.join()
    assert made.prune().num_files == 0
    assert len(made) == 5


def test_files_elsewhere_are_fetched_when_they_are_read(tmp_path):
    place = {'sql_file': tmp_path / 'dataset.sql', 'data_dir': 'memory://columns-elsewhere'}
    memory = fsspec.filesystem('memory')
    if memory.exists('/columns-elsewhere'):
        memory.rm('/columns-elsewhere', recursive=True)
    made = filled(place, tmp_path)
    assert [row.length for row in made.rows[1:]] == [2, 4, 6]
    assert len(memory.glob('/columns-elsewhere/text/*/*.txt')) == 4
    copies = tmp_path / '.dataset.sql.files'
    shutil.rmtree(copies, ignore_errors=True)
    again = texts(place)
    assert [row.text.read() for row in again] == [b'', b'x', b'xx', b'xxx']
    assert len(list(copies.rglob('*.txt'))) == 4
    assert Path(again[1].text.path).is_relative_to(copies)
    state = DatasetFile(place['sql_file']).state('Texts')
    assert (state.data_dir, state.num_files) == ('memory://columns-elsewhere', 7)
    again.rows[:2].delete()
    assert again.prune().num_files == 3
    assert len(memory.glob('/columns-elsewhere/t*/*/*.txt')) == 4
    assert len(list(copies.rglob('*.txt'))) == 2


def test_an_address_of_local_files_is_a_folder(tmp_path):
    data_dir = tmp_path / 'dataset'
    place = {'sql_file': tmp_path / 'dataset.sql', 'data_dir': data_dir.as_uri()}
    made = filled(place, tmp_path)
    assert sorted(path.name for path in data_dir.iterdir()) == ['.used-by', 'text', 'twice']
    assert made.materialize('twice', workers=2) == 0
    assert Path(made[3].twice.path).is_relative_to(data_dir)
    assert DatasetFile(place['sql_file']).state('Texts').data_dir == str(data_dir)


def test_names_in_the_file_do_not_leave_the_data_directory(place, tmp_path):
    made = filled(place, tmp_path)
    (tmp_path / 'secret.txt').write_text('secret')
    for name in ('../secret.txt', str(tmp_path / 'secret.txt'), 'text/../../secret.txt'):
        with sqlite3.connect(place['sql_file']) as connection:
            connection.execute('UPDATE Texts__files SET path = ? WHERE id = 2', (name,))
        with pytest.raises(ConfigError, match='not a name in the store'):
            made[1].text.read()
    (place['data_dir'] / 'text' / 'link.txt').symlink_to(tmp_path / 'secret.txt')
    with sqlite3.connect(place['sql_file']) as connection:
        connection.execute("UPDATE Texts__files SET path = 'text/link.txt' WHERE id = 2")
    with pytest.raises(ConfigError, match='leaves the store'):
        made[1].text.read()


def test_processes_that_are_not_forked_compute_too(place, tmp_path, monkeypatch):
    made = filled(place, tmp_path, 20)
    monkeypatch.setattr(process_pool, 'forks', lambda: False)
    assert made.materialize('length', workers=1) == 1
    state = DatasetFile(place['sql_file']).state('Texts')
    assert {each.name: each.num_kept for each in state.columns}['length'] == 19
    assert [row.length for row in made.rows[1:]] == [2 * number for number in range(1, 20)]


def test_processes_leave_no_temporary_files(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    (tmp_path / 'temporary').mkdir()
    made = filled(place, tmp_path, 40)
    kept = []

    @dataset(**place)
    class Texts:
        text: File

        def careless(text: File) -> File:
            with File.make_tmp('.txt') as file:
                Path(file.path).write_bytes(text.read())
            Path(tempfile.mkstemp()[1]).write_bytes(b'forgotten')
            kept.append(file)
            if text.size == 30:
                os.kill(os.getpid(), signal.SIGKILL)
            return file

    with pytest.raises(DataError, match='was killed by signal 9'):
        Texts.materialize(workers=2)
    assert len(made) == 40
    assert list((tmp_path / 'temporary').iterdir()) == []
