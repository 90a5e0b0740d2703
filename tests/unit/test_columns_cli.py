"""`finetuner columns` as people call it: what it prints, what it deletes, and its exit codes."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetuner.cli import app
from finetuner.columns import File, dataset, version
from finetuner.columns.locking import writing
from finetuner.excepts import ConfigError, ConflictError, FinetunerError, NotFoundError
from finetuner.storage import database

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments, code: int = 0, **options) -> str:
    given = ['columns', *map(str, arguments)]
    done = CliRunner().invoke(app, given, env={'COLUMNS': '80'}, **options)
    if isinstance(done.exception, FinetunerError):
        raise done.exception
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def texts(sql_file, number=1):
    @dataset(sql_file=sql_file, data_dir=sql_file.parent / 'files')
    class Texts:
        text: File
        name_of_what_is_in_it_that_is_long: str = 'none'

        @version(number)
        def twice(text: File) -> File:
            with File.make_tmp('.txt') as file:
                Path(file.path).write_bytes(text.read() * (number + 1))
                return file

        def length(twice: File) -> int:
            if not twice.size:
                raise ValueError('it is empty\x1b[31m')
            return twice.size

    return Texts


@pytest.fixture
def path(tmp_path):
    """A SQLite file: of four rows three have all values, those of an older function are there too."""
    made = texts(tmp_path / 'dataset.sql')
    for number in range(4):
        (tmp_path / f'{number}.txt').write_text('x' * number)
    made.extend({'text': tmp_path / f'{number}.txt'} for number in range(4))
    made.materialize(workers=0, progress=False)
    texts(tmp_path / 'dataset.sql', 2).rows[:2].materialize(workers=0, progress=False)
    return tmp_path / 'dataset.sql'


@pytest.fixture
def two(path):
    """The same file with another dataset, which has a column of the same name."""

    @dataset(sql_file=path, data_dir=path.parent / 'files')
    class Other:
        number: int

        def length(number: int) -> int:
            return number

    Other.add(number=1)
    return path


def test_show_tells_what_there_is(path):
    out = call('show', path, '--rows', 2)
    table = out.partition('column ')[2].partition('What went wrong')[0]
    assert 60 < max(map(len, table.splitlines())) <= 80
    lines = [line.split() for line in out.splitlines()]
    assert ['Texts:', '4', 'rows'] in lines
    assert ['twice', 'File', 'text', '2', '4', '15', 'bytes'] in lines
    assert ['length', 'int', 'twice', '1', '3', '1', '4', 'bytes'] in lines
    assert f'9 files, 21 bytes, in {path.parent / "files"}' in out
    assert f'finetuner columns errors {path} length' in out
    assert f'finetuner columns prune {path}' in out
    first, second = out.partition('row 1\n')[2].split('row 2\n')
    assert first.split()[-6:-1] == ['length', 'error:', 'ValueError:', 'it', 'is']
    assert '\x1b' not in out
    assert [line.split() for line in second.splitlines()[-1:]] == [['length', '3']]


def test_show_is_readable_by_programs(two):
    found = json.loads(call('show', two, '--json', '--rows', 2))
    assert [each['name'] for each in found['datasets']] == ['Other', 'Texts']
    assert found['num_bytes'] >= two.stat().st_size
    shown = found['datasets'][1]
    columns = {each.pop('name'): each for each in shown['columns']}
    assert columns['twice']['inputs'] == ['text']
    assert (columns['twice']['num_kept'], columns['twice']['num_stale']) == (2, 4)
    assert (columns['length']['num_errors'], columns['text']['num_bytes']) == (1, 6)
    (first, second) = shown['rows']
    assert first['id'] == 1
    assert 'length' not in first['values']
    assert second['values']['length'] == 3
    key = second['values']['twice']['path']
    assert Path(shown['data_dir'], key).read_text() == 'xxx'
    only = json.loads(call('show', two, 'Other', '--json'))
    assert [each['name'] for each in only['datasets']] == ['Other']
    assert 'rows' not in only['datasets'][0]


def test_errors_are_listed(path):
    out = call('errors', path, 'length')
    assert out.startswith('row 1, length, ')
    assert 'ValueError: it is empty' in out
    assert '\x1b' not in out
    assert 'Traceback' not in out
    traced = call('errors', path, 'length', '--traceback')
    assert 'Traceback' in traced
    assert "raise ValueError('it is empty" in traced
    (found,) = json.loads(call('errors', path, 'length', '--json'))
    assert (found['row'], found['column']) == (1, 'length')
    assert 'Nothing went wrong with twice of Texts' in call('errors', path, 'twice')
    made = texts(path, 2)
    made.extend({'text': path.parent / '0.txt'} for _ in range(3))
    made.materialize(workers=0, progress=False)
    out = call('errors', path, 'length', '--count', 3)
    assert out.count('ValueError') == 3
    assert '--count 30' in out


def test_which_dataset_is_meant(two, tmp_path):
    with pytest.raises(ConfigError, match='say --dataset, one of Other, Texts'):
        call('errors', two, 'length')
    assert 'row 1' in call('errors', two, 'length', '--dataset', 'Texts')
    assert 'Nothing went wrong with twice of Texts' in call('errors', two, 'twice')
    with pytest.raises(NotFoundError, match="unknown derived column 'twist': did you mean 'twice'"):
        call('errors', two, 'twist', '-d', 'Texts')
    with pytest.raises(NotFoundError, match="unknown derived column 'none'"):
        call('errors', two, 'none')
    with pytest.raises(NotFoundError, match="unknown dataset 'Text': did you mean 'Texts'"):
        call('show', two, 'Text')
    with pytest.raises(ConfigError, match='--dataset'):
        call('graph', two, tmp_path / 'a.svg')


def test_the_graph_is_written(path, tmp_path):
    assert '4 columns of Texts' in call('graph', path, tmp_path / 'a.svg')
    drawn = ElementTree.parse(tmp_path / 'a.svg').getroot()
    named = {each.get('data-column') for each in drawn.iter()} - {None}
    assert named == {'text', 'name_of_what_is_in_it_that_is_long', 'twice', 'length'}
    call('graph', path, tmp_path / 'a.dot')
    assert '"twice" -> "length"' in (tmp_path / 'a.dot').read_text()
    for out in ('a.png', 'none/a.svg'):
        with pytest.raises(ConfigError, match=out):
            call('graph', path, tmp_path / out)


def test_prune_asks_and_tells(path):
    asked = call('prune', path, code=1, input='n\n')
    assert 'Delete 7 values of Texts' in asked
    assert 'stale' not in asked
    before = json.loads(call('show', path, '--json'))
    assert [each['num_stale'] for each in before['datasets'][0]['columns']] == [0, 0, 4, 3]
    files = path.parent / 'files'
    assert len(list(files.rglob('*.txt'))) == 9
    # of four old ones the empty one is a new one too
    assert '7 values and 3 files, 12 bytes, are deleted' in call('prune', path, input='y\n')
    assert len(list(files.rglob('*.txt'))) == 6
    after = json.loads(call('show', path, '--json'))['datasets'][0]['columns']
    assert [(each['num_kept'], each['num_stale']) for each in after] == [
        (4, 0),
        (4, 0),
        (2, 0),
        (1, 0),
    ]
    assert 'columns prune' not in call('show', path)
    assert [row.length for row in texts(path, 2).rows[1:]] == [3, 6, 9]


def test_prune_of_all_and_of_one(two):
    assert json.loads(call('prune', two, 'Other', '--yes', '--json')) == {
        'Other': {'num_values': 0, 'num_files': 0, 'num_bytes': 0, 'shared_with': []}
    }
    found = json.loads(call('prune', two, '--yes', '--json'))
    assert {name: each['num_values'] for name, each in found.items()} == {'Other': 0, 'Texts': 7}
    with pytest.raises(NotFoundError, match="unknown dataset 'None'"):
        call('prune', two, 'None', '--yes')


def test_prune_leaves_files_that_others_may_need(path):
    texts(path.with_name('second.sql'))
    out = call('prune', path, '--yes')
    assert '7 values and 0 files' in out
    assert f'are kept there too: {path.with_name("second.sql")}' in out


def test_prune_waits_for_nobody(path):
    with writing(path), pytest.raises(ConflictError, match='prune when that is done'):
        call('prune', path, '--yes')


def test_removed_columns_are_shown_and_pruned(path):
    @dataset(sql_file=path, data_dir=path.parent / 'files')
    class Texts:
        text: File

    assert len(Texts) == 4
    out = call('show', path)
    assert out.count('(removed)') == 3
    assert 'Delete 10 values of Texts' in call('prune', path, code=1, input='n\n')
    assert '10 values and' in call('prune', path, '--yes')
    assert call('show', path).count('(removed)') == 1, 'a field is data'


def failure(*arguments) -> str:
    """What the command says on stderr."""
    paths = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-m', 'finetuner.cli', 'columns', *map(str, arguments)],
        env={**os.environ, 'PYTHONPATH': paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ''), done
    return done.stderr


def test_what_cannot_be_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / 'text.sql').write_text('no database' * 100)
    with sqlite3.connect(tmp_path / 'other.sql') as connection:
        connection.execute('CREATE TABLE other (id)')
    name = tmp_path / 'none.sql'
    assert failure('show', name) == f'finetuner: {name}: there is no such file\n'
    for other, message in (
        ('text.sql', 'file is not a database'),
        ('other.sql', 'has no dataset of finetuner.columns'),
        ('.', 'there is no such file'),
    ):
        for command in (['show'], ['errors', 'x'], ['graph', 'a.svg'], ['prune', '--yes']):
            with pytest.raises(FinetunerError, match=message):
                call(command[0], tmp_path / other, *command[1:])
    assert not name.exists()
    assert not (tmp_path / 'other.sql-wal').exists()


def test_a_locked_file_is_told(tmp_path, monkeypatch):
    path = tmp_path / 'dataset.sql'
    made = texts(path)
    monkeypatch.setattr(database, 'BUSY_SECONDS', 0.1)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute('BEGIN IMMEDIATE')
    assert '0 rows' in call('show', path)
    with pytest.raises(ConflictError, match='is locked by another process: try again'):
        call('prune', path, '--yes')
    connection.execute('ROLLBACK')
    made.store.database.close()
    connection.execute('PRAGMA journal_mode = DELETE')
    connection.execute('BEGIN EXCLUSIVE')
    with pytest.raises(ConflictError, match='is locked by another process: try again'):
        call('show', path)
    connection.close()
