"""`finetuner data` as people call it: what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from docarray import Document, DocumentArray
from PIL import Image
from typer.testing import CliRunner

from finetuner.data.documents import save_documents
from finetuner.data_cli import app

EMOJI = Path(__file__).resolve().parents[2] / 'examples' / 'emoji'


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def labelled_csv(tmp_path):
    path = tmp_path / 'labels.csv'
    path.write_text('good,yes\nfine,yes\nbad,no\nawful,no\n')
    return path


def test_check_of_good_data(labelled_csv):
    done = run('check', '--labeled', labelled_csv)
    assert done.exit_code == 0, done.output
    assert 'class data' in done.output
    assert 'No problems found.' in done.output


def test_check_reads_a_folder_of_pictures():
    done = run('check', EMOJI / 'test')
    assert done.exit_code == 0, done.output
    assert '250, of 4' in done.output
    assert 'WEBP 1,000' in done.output


def test_check_reads_all_forms(tmp_path):
    docs = DocumentArray(
        Document(text=f'text {n}', tags={'finetuner_label': n % 2}) for n in range(6)
    )
    save_documents(docs, tmp_path / 'data.docs')
    lines = [json.dumps({'text': d.text, 'label': d.tags['finetuner_label']}) for d in docs]
    (tmp_path / 'data.jsonl').write_text('\n'.join(lines))
    config = {
        'connection': str(tmp_path / 'data.db'),
        'table_name': 'data',
        'serialize_config': {'protocol': 'protobuf'},
    }
    stored = DocumentArray(docs, storage='sqlite', config=config)
    stored.sync()
    for name in ('data.docs', 'data.jsonl', 'data.db'):
        done = run('check', tmp_path / name)
        assert done.exit_code == 0, done.output
        assert '2, of 3' in done.output


def test_check_of_a_missing_picture_is_1(tmp_path):
    Image.new('RGB', (9, 9)).save(tmp_path / 'there.png')
    path = tmp_path / 'data.csv'
    path.write_text('there.png,a\ngone.png,a\nthere.png,b\n')
    done = run('check', '--labeled', path)
    assert done.exit_code == 1
    assert 'gone.png' in done.output
    assert 'Traceback' not in done.output


def test_check_of_damaged_files_is_1(tmp_path):
    for ending in ('.docs', '.db', '.parquet', '.jsonl', '.csv', '.xyz'):
        path = tmp_path / f'data{ending}'
        path.write_bytes(bytes(range(255, 0, -1)))
        done = run('check', path)
        assert done.exit_code == 1, f'{ending}: {done.output}'
        assert 'Problems' in done.output
        assert isinstance(done.exception, SystemExit), done.exception


def test_strict_counts_what_is_worth_a_look(labelled_csv):
    labelled_csv.write_text('a,x\nb,x\nc,y\n')
    assert run('check', '--labeled', labelled_csv).exit_code == 0
    assert run('check', '--labeled', '--strict', labelled_csv).exit_code == 1


def test_csv_options_are_used(tmp_path):
    path = tmp_path / 'data.csv'
    path.write_bytes('grün;a\nblau;a\nrot;b\ngelb;b\n'.encode('utf-16'))
    assert run('check', '--labeled', path).exit_code == 1
    done = run('check', '--labeled', '--encoding', 'utf-16', path)
    assert done.exit_code == 0, done.output
    assert '2, of 2' in done.output


@pytest.mark.parametrize(
    'arguments',
    [
        ('check',),
        ('check', 'no/such/file.csv'),
        ('check', EMOJI / 'test', '--labeled'),
        ('check', EMOJI / 'concepts.csv', '--dialect', 'exel'),
        ('check', EMOJI / 'concepts.csv', '--size', '-1'),
        ('sheet', EMOJI / 'test', 'sheet.gif'),
        ('sheet', EMOJI / 'test', 'no/such/sheet.png'),
        ('sheet', EMOJI / 'test', 'sheet.png', '--columns', '0'),
        ('sheet', EMOJI / 'test', 'sheet.png', '--seed', '-1'),
        ('unknown',),
    ],
)
def test_unusable_arguments_are_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert not list(tmp_path.iterdir())


def test_sheet_is_written(tmp_path):
    path = tmp_path / 'sheet.png'
    done = run('sheet', EMOJI / 'test', path, '--rows', 3, '--tile', 48)
    assert done.exit_code == 0, done.output
    with Image.open(path) as image:
        assert image.format == 'PNG'
        assert image.height < 300


def test_sheet_of_bad_data_is_1(tmp_path):
    path = tmp_path / 'data.csv'
    path.write_text('a,b\nc\n')
    done = run('sheet', path, tmp_path / 'sheet.png')
    assert done.exit_code == 1
    assert 'line 2' in done.output


def test_as_a_process(labelled_csv):
    labelled_csv.write_text('good,yes\nfine,\n')
    command = [sys.executable, '-c', 'from finetuner.data_cli import app; app()', 'check']
    done = subprocess.run(
        [*command, '--labeled', str(labelled_csv)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'Problems' in done.stdout
    assert 'line 2' in done.stdout
    assert 'Traceback' not in done.stdout + done.stderr
