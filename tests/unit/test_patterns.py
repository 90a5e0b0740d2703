"""Several files as one data set: which a pattern names, in which order, and as one sequence."""

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from docarray import Document
from pyarrow import parquet

from finetuner.data import CSVOptions, open_documents, save_documents
from finetuner.data.documents import data_kind
from finetuner.data.patterns import expand_patterns, is_pattern
from finetuner.data.sources import are_shards, is_source_path
from finetuner.data.stored.files import StoredDocuments
from finetuner.excepts import ConfigError, DataError
from finetuner.runs.submission import opened
from tests.unit.test_webdataset import shard


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


@pytest.mark.parametrize(
    ('pattern', 'expected'),
    [
        ('x-*.tar', ['x-1.tar', 'x-10.tar', 'x-2.tar']),
        ('x-?.tar', ['x-1.tar', 'x-2.tar']),
        ('x-[2-9].tar', ['x-2.tar']),
        ('x-{1..2}.tar', ['x-1.tar', 'x-2.tar']),
        ('x-{10,2}.tar', ['x-10.tar', 'x-2.tar']),
        ('{a,b}/y-{08..10}.tar', [f'{f}/y-{n}.tar' for f in 'ab' for n in ('08', '09', '10')]),
        ('{a,b}/y-*8.tar', ['a/y-08.tar', 'b/y-08.tar']),
        ('**/y-08.tar', ['a/y-08.tar', 'b/y-08.tar']),
        (['x-2.tar', Path('x-1.tar')], ['x-2.tar', 'x-1.tar']),
        ('odd[1]{2}.tar', ['odd[1]{2}.tar']),
        ('z-{0..10}.tar', [f'z-{n}.tar' for n in range(11)]),
    ],
)
def test_what_a_pattern_names(pattern, expected):
    touch('x-1.tar', 'x-2.tar', 'x-10.tar', 'odd[1]{2}.tar', '.x-3.tar')
    touch(*(f'{f}/y-{n:02}.tar' for f in 'ab' for n in (8, 9, 10)))
    touch(*(f'z-{n}.tar' for n in range(11)))
    assert [str(path) for path in expand_patterns(pattern)] == expected


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ('y-*.tar', r"no file is called 'y-\*\.tar'"),
        ('x-{1..5}.tar', "there is no file 'x-2.tar', 'x-3.tar', 'x-4.tar' and 1 more"),
        ('x-{5..1}.tar', 'neither a range'),
        ('x-{a..c}.tar', 'neither a range'),
        ('x-{1,{2,3}}.tar', 'a brace stands alone'),
        ('x-{0..999999999}.tar', 'more than 100,000 files'),
        (['x-1.tar', 'x-1.tar'], 'given twice'),
        (['x-1.tar', './x-*.tar'], 'given twice'),
        (['x-1.tar', 5], '5 is no path'),
        ([], 'the list of files is empty'),
        ('nul\0*.tar', 'there is no file'),
    ],
)
def test_what_no_pattern_names(given, words):
    touch('x-1.tar')
    with pytest.raises(DataError, match=words):
        expand_patterns(given)


def test_patterns_are_sources():
    for text in ('a-*.parquet', 'a/*', 'x-{1..2}', 'x[12]'):
        assert is_pattern(text)
        assert are_shards(text)
    assert is_source_path('a-*.parquet')
    assert is_source_path('./a-*')
    # what may be the name of pushed data is a pattern where there are such files
    for text in ('data [v2]', 'x-{1..2}', 'a{b', 'a/*'):
        assert not is_source_path(text)
    touch('x-1', 'a/b')
    assert is_source_path('x-{1..2}')
    assert is_source_path('a/*')
    touch('x[12]')
    assert not is_pattern('x[12]')
    for source in ('a.parquet', [], [Document(text='a')], ['a', 'b'], None, b'a*'):
        assert not are_shards(source), source
    assert are_shards([Path('a'), 'b.tar'])
    assert are_shards(('a.tar',))


def write(name, numbers):
    """A shard of texts, in the form that the ending says."""
    texts = [f'text {number}' for number in numbers]
    if name.endswith('.parquet'):
        parquet.write_table(pa.table({'text': texts, 'label': list(numbers)}), name)
    elif name.endswith('.tar'):
        files = ((f'{n}.{end}', str(v)) for n, t in zip(numbers, texts, strict=True)
                 for end, v in (('txt', t), ('cls', n)))  # fmt: skip
        shard(name, *files)
    elif name.endswith('.docs'):
        save_documents(
            [Document(text=t, tags={'finetuner_label': n})
             for n, t in zip(numbers, texts, strict=True)], name)  # fmt: skip
    else:
        lines = (json.dumps({'text': t, 'label': n}) for n, t in zip(numbers, texts, strict=True))
        Path(name).write_text('\n'.join(lines))
    return name


@pytest.mark.parametrize('ending', ['parquet', 'tar', 'jsonl', 'ndjson', 'docs'])
def test_shards_are_one_sequence(ending):
    for number in range(3):
        write(f'x-{number}.{ending}', range(number * 10, number * 10 + 10))
    for source in (f'x-*.{ending}', f'x-{{0..2}}.{ending}', [f'x-{n}.{ending}' for n in range(3)]):
        docs = opened(source, None)
        assert isinstance(docs, StoredDocuments)
        assert [doc.text for doc in docs] == [f'text {n}' for n in range(30)]
        assert [doc.tags['finetuner_label'] for doc in docs] == list(range(30))
        assert docs[17].text == 'text 17'


def test_pairs_are_joined_over_shards():
    for number, (query, document) in enumerate([('q1', 'd1'), ('q2', 'd2'), ('q2', 'd1')]):
        Path(f'{number}.jsonl').write_text(json.dumps({'query': query, 'document': document}))
    docs = open_documents('*.jsonl')
    assert data_kind(docs) == 'class'
    assert {(doc.text, doc.tags['finetuner_label']) for doc in docs} == {
        ('q1', 0), ('d1', 0), ('q2', 0), ('d2', 0),
    }  # fmt: skip


def test_a_pattern_of_one_file_is_that_file():
    Path('x-1.csv').write_text('a,b\nc,d\n')
    docs = opened('x-*.csv', CSVOptions(is_labeled=True))
    assert [doc.tags['finetuner_label'] for doc in docs] == ['b', 'd']


def test_shards_of_other_forms_are_refused():
    write('a.parquet', range(2))
    write('a.tar', range(2))
    touch('a.csv', 'b.csv', 'c.tar')
    with pytest.raises(DataError, match=r'end in \.parquet and \.tar'):
        open_documents(['a.parquet', 'a.tar'])
    with pytest.raises(DataError, match=r"'a\.csv' is no shard: .*\.parquet"):
        open_documents('?.csv')
    with pytest.raises(ConfigError, match='leave them out'):
        open_documents('?.csv', content='text')
    with pytest.raises(DataError, match=r'element 0 is a str'):
        open_documents(['a', 'b'])
    write('b.parquet', range(2))
    with pytest.raises(ConfigError, match='WebDataset'):
        open_documents('?.parquet', label='cls')


def test_an_empty_shard_among_others():
    write('a.parquet', [])
    write('b.parquet', range(2))
    assert len(open_documents('?.parquet')) == 2
    write('b.parquet', [])
    with pytest.raises(DataError, match=r"'a\.parquet' and 1 more hold no records"):
        open_documents('?.parquet')


def test_content_and_label_go_to_webdataset_shards():
    files = [('a.json', '{"kind": "x"}'), ('a.txt', 'b')]
    shard('a.tar', *files)
    shard('b.tar', *files)
    for source in ('a.tar', '?.tar', ['a.tar', Path('b.tar')]):
        docs = opened(source, None, 'stop', 'text', 'kind')
        assert {doc.tags['finetuner_label'] for doc in docs} == {'x'}


def test_shards_are_not_held_in_memory():
    big = 'x' * 20_000
    for number in range(4):
        shard(f'{number}.tar', *((f'{n}.txt', big) for n in range(400)))
    tracemalloc.start()
    docs = open_documents('*.tar')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(docs) == 1600
    # of 32 MB
    assert peak < 8_000_000


def test_the_command_takes_patterns(capsys):
    from typer.testing import CliRunner

    from finetuner.data_cli import app

    for number in range(2):
        write(f'x-{number}.parquet', range(number * 10, number * 10 + 10))
    done = CliRunner().invoke(app, ['check', 'x-*.parquet'])
    assert '20' in done.stdout
    assert CliRunner().invoke(app, ['check', 'y.parquet']).exit_code == 2
    assert CliRunner().invoke(app, ['check', 'y-*.parquet']).exit_code == 1
