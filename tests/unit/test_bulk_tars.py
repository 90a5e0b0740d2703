"""WebDataset shards are encoded: rows in order of their samples, called by their keys."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from pyarrow import parquet

import finetuner
from finetuner.bulk import open_encoded
from finetuner.bulk.inputs import open_input
from finetuner.bulk.rows import Columns
from finetuner.excepts import ConfigError
from finetuner.inference import load_engine
from tests.conftest import make_picture_docs
from tests.unit.bulk_cases import (
    encode,
    files_of,
    some_texts,
    write_picture_artifact,
    write_text_artifact,
)
from tests.unit.test_webdataset import PICTURE, shard

DOCS = make_picture_docs()
TEXTS = some_texts(len(DOCS))


@pytest.fixture(scope='module')
def texts_model(tmp_path_factory):
    return write_text_artifact(tmp_path_factory.mktemp('tars'))


@pytest.fixture(scope='module')
def pictures_model(tmp_path_factory):
    return write_picture_artifact(tmp_path_factory.mktemp('tars'))


def write_both(path):
    """Samples of a picture, a text, a class and a json each."""
    files = []
    for number, (doc, text) in enumerate(zip(DOCS, TEXTS, strict=True)):
        files.append((f's/{number:03}.txt', text))
        files.append((f's/{number:03}.json', json.dumps({'n': number})))
        files.append((f's/{number:03}.png', doc.blob))
        files.append((f's/{number:03}.cls', f'{number % 3}'))
    return shard(path, *files)


def read_all(output):
    found = list(open_encoded(output))
    ids = [name for some, _ in found for name in some]
    return ids, np.concatenate([embeddings for _, embeddings in found])


def failures(output):
    return [
        (row['row'], row['id'], row['reason'])
        for path in sorted(output.glob('part-*.json'))
        for row in json.loads(path.read_bytes())['failed']
    ]


@pytest.mark.parametrize('content', [None, 'own'])
def test_the_model_says_whether_pictures_or_texts_are_meant(
    texts_model, pictures_model, tmp_path, content
):
    source = write_both(tmp_path / 'a.tar')
    cases = [(texts_model, 'text', TEXTS, {}), (pictures_model, 'image', DOCS, {})]
    for model, name, data, options in cases:
        options = {'content': name} if content else options
        summary = encode(source, tmp_path / name, model, rows_per_shard=10, **options)
        assert (summary.num_rows, summary.num_failed, summary.num_shards) == (24, 0, 3)
        ids, embeddings = read_all(tmp_path / name)
        assert ids == [f's/{number:03}' for number in range(24)]
        expected = finetuner.encode(load_engine(model, is_onnx=True), data)
        expected = getattr(expected, 'embeddings', expected)
        np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_what_is_done_again_has_the_same_bytes(texts_model, tmp_path):
    source = write_both(tmp_path / 'a.tar')
    encode(source, tmp_path / 'out', texts_model, rows_per_shard=7, keep=['n', 'finetuner_label'])
    before = files_of(tmp_path / 'out')
    table = parquet.read_table(tmp_path / 'out' / 'part-00001.parquet')
    assert table['n'].to_pylist() == [str(n) for n in range(7, 14)]
    assert table['finetuner_label'].to_pylist() == [str(n % 3) for n in range(7, 14)]
    for name in ('manifest.json', 'part-00001.parquet', 'part-00003.json'):
        (tmp_path / 'out' / name).unlink()
    encode(source, tmp_path / 'out', texts_model, rows_per_shard=7, keep=['n', 'finetuner_label'])
    assert files_of(tmp_path / 'out') == before


def test_a_broken_sample_is_one_failed_row_and_what_is_not_needed_breaks_none(
    texts_model, tmp_path, monkeypatch
):
    monkeypatch.setattr('finetuner.data.webdataset._MAX_TEXT_BYTES', 100)
    source = shard(
        tmp_path / 'a.tar',
        ('good.txt', 'red shoe'),
        ('empty.txt', ' '),
        ('none.png', PICTURE),
        ('large.txt', 'x' * 101),
        ('bytes.txt', b'\xff'),
        ('twice.txt', 'a'),
        ('twice.txt', 'b'),
        ('name\udcff.txt', 'a'),
        ('tags.txt', 'blue shoe'),
        ('tags.json', '{'),
        ('tags.cls', 'no number'),
        format=1,
        errors='surrogateescape',
    )
    reasons = {
        'empty': 'its txt is empty',
        'none': 'there is no content: txt is needed',
        'large': 'its txt has 101 bytes',
        'bytes': 'its txt is not UTF-8',
        'twice': 'its txt is there twice',
        'a.tar:6': 'its name is not UTF-8',
    }
    summary = encode(source, tmp_path / 'out', texts_model, rows_per_shard=3)
    assert (summary.num_rows, summary.num_failed, summary.missing) == (8, 6, ())
    assert read_all(tmp_path / 'out')[0] == ['good', 'tags']
    found = failures(tmp_path / 'out')
    assert [(row, name) for row, name, _ in found] == list(enumerate(reasons, 1))
    for said, (_, _, reason) in zip(reasons.values(), found, strict=True):
        assert said in reason
    # tags that are to be copied have to be right
    encode(source, tmp_path / 'kept', texts_model, keep='n')
    assert [name for _, name, _ in failures(tmp_path / 'kept')] == [*reasons, 'tags']


def test_of_a_picture_and_a_text_one_has_to_be_named_where_the_model_takes_both(tmp_path):
    source = open_input(
        shard(tmp_path / 'a.tar', ('a.txt', 'x'), ('a.png', PICTURE), ('b.txt', 'y')), Columns()
    )

    def rows(content):
        columns = Columns(content)
        return [
            (r.id, r.doc.text or r.doc.blob, r.doc.modality, r.error)
            for r in source.rows(0, source.num_rows(columns), columns)
        ]

    both, single = rows(None)
    assert "say content='image' or 'text'" in both[3]
    assert single == ('b', 'y', 'text', '')
    assert rows('text') == [('a', 'x', 'text', ''), single]
    picture, none = rows('image')
    assert picture == ('a', PICTURE, 'image', '')
    assert 'a picture is needed' in none[3]


def test_a_damaged_tar_is_missing_and_a_folder_of_tars_stands_for_them(texts_model, tmp_path):
    (tmp_path / 'data').mkdir()
    for name in 'abc':
        write_both(tmp_path / 'data' / f'{name}.tar')
    damaged = tmp_path / 'data' / 'b.tar'
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    summary = encode(tmp_path / 'data', tmp_path / 'out', texts_model)
    assert (summary.num_rows, summary.num_failed, len(summary.missing)) == (48, 0, 1)
    assert summary.missing[0].source == str(damaged)
    assert 'b.tar is incomplete' in summary.missing[0].reason
    damaged.write_bytes(whole)
    summary = encode(tmp_path / 'data', tmp_path / 'out', texts_model)
    assert (summary.num_rows, summary.missing) == (72, ())


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'content': 'pair'}, "content='pair': of the samples of a.tar it is one of image, text"),
        ({'id': 'n'}, "id='n': the ids of a.tar are the keys"),
    ],
)
def test_options_that_no_sample_has_are_refused(texts_model, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        encode(write_both(tmp_path / 'a.tar'), tmp_path / 'out', texts_model, **options)


def test_memory_does_not_grow_with_the_tar(tmp_path):
    large = b'x' * (128 << 10)
    source = open_input(
        shard(tmp_path / 'a.tar', *((f'{n}.png', large) for n in range(400))), Columns()
    )
    tracemalloc.start()
    try:
        names = [row.id for row in source.rows(20, 400, Columns(modality='image'))]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert names == [str(n) for n in range(20, 400)]
    # of 50 MB: a Document is part of a cycle, and some 200 wait to be collected
    assert most < 36 << 20
