"""Whole data sets become shards: the vectors of `finetuner.encode`, whatever the input's form."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pyarrow
import pytest
from docarray import Document, DocumentArray
from pyarrow import parquet

import finetuner
from finetuner.artifact import zip_artifact
from finetuner.bulk import open_encoded
from finetuner.data.stored.storing import save_documents
from finetuner.excepts import (
    ArtifactError,
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
)
from finetuner.inference import load_engine
from tests.conftest import make_picture_docs
from tests.unit.bulk_cases import (
    encode,
    some_texts,
    write_parquet,
    write_picture_artifact,
    write_text_artifact,
)

TEXTS = some_texts(130)


@pytest.fixture(scope='module')
def texts_model(tmp_path_factory):
    return write_text_artifact(tmp_path_factory.mktemp('bulk'))


@pytest.fixture(scope='module')
def pictures_model(tmp_path_factory):
    return write_picture_artifact(tmp_path_factory.mktemp('bulk'))


@pytest.fixture
def source(tmp_path):
    ids = [f'row {n}' for n in range(len(TEXTS))]
    return write_parquet(tmp_path / 'a.parquet', id=ids, text=TEXTS, n=list(range(len(TEXTS))))


def read_all(output):
    found = list(open_encoded(output))
    ids = [name for some, _ in found for name in some]
    return ids, np.concatenate([embeddings for _, embeddings in found])


def vectors_of(artifact, data, is_onnx=True):
    return finetuner.encode(load_engine(artifact, is_onnx=is_onnx), data)


@pytest.mark.parametrize('format_name', ['parquet', 'numpy'])
@pytest.mark.parametrize('engine', ['onnx', 'torch'])
def test_vectors_of_a_shard_are_those_of_encode_to_the_bit(
    texts_model, source, tmp_path, format_name, engine
):
    summary = encode(source, tmp_path / 'out', texts_model, format=format_name, engine=engine)
    assert (summary.num_rows, summary.num_failed, summary.num_shards) == (130, 0, 4)
    opened = open_encoded(tmp_path / 'out')
    assert (len(opened), opened.num_shards, opened.dimension) == (130, 4, 16)
    model = load_engine(texts_model, is_onnx=engine == 'onnx')
    for place, (ids, embeddings) in enumerate(opened):
        rows = range(40 * place, min(40 * place + 40, 130))
        assert ids == [f'row {n}' for n in rows]
        expected = finetuner.encode(model, [TEXTS[n] for n in rows])
        assert embeddings.dtype == np.float32
        assert np.array_equal(embeddings, expected)
    _, embeddings = read_all(tmp_path / 'out')
    np.testing.assert_allclose(embeddings, finetuner.encode(model, TEXTS), atol=1e-6)


def test_what_is_written(texts_model, source, tmp_path):
    encode(source, tmp_path / 'out', texts_model, keep=['n'])
    table = parquet.read_table(tmp_path / 'out' / 'part-00001.parquet')
    assert table.column_names == ['id', 'n', 'embedding']
    assert table.schema.field('n').type == pyarrow.int64()
    assert table.schema.field('embedding').type == pyarrow.list_(pyarrow.float32(), 16)
    assert table['n'].to_pylist() == list(range(40, 80))
    whole = json.loads((tmp_path / 'out' / 'manifest.json').read_bytes())
    hashed = hashlib.sha256((texts_model / 'artifact.json').read_bytes()).hexdigest()
    assert whole['model_sha256'] == hashed
    assert (whole['model'], whole['engine'], whole['precision']) == (
        str(texts_model),
        'onnx',
        'fp32',
    )
    assert [shard['start'] for shard in whole['shards']] == [0, 40, 80, 120]
    for shard in whole['shards']:
        (file,) = shard['files']
        content = (tmp_path / 'out' / file['name']).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            file['num_bytes'],
            file['sha256'],
        )
        own = json.loads((tmp_path / 'out' / f'part-{shard["shard"]:05d}.json').read_bytes())
        assert own['files'] == shard['files']


def test_rows_that_cannot_be_embedded_are_listed_and_leave_their_neighbours_alone(
    texts_model, tmp_path
):
    texts = [None if n == 5 else '' if n == 50 else text for n, text in enumerate(TEXTS)]
    source = write_parquet(tmp_path / 'a.parquet', text=texts)
    for format_name in ('parquet', 'numpy'):
        out = tmp_path / format_name
        summary = encode(source, out, texts_model, format=format_name)
        assert (summary.num_rows, summary.num_failed, summary.missing) == (130, 2, ())
        listed = [json.loads((out / f'part-0000{n}.json').read_bytes())['failed'] for n in range(4)]
        assert [[row['row'] for row in rows] for rows in listed] == [[5], [50], [], []]
        assert listed[0][0]['id'] == 'a.parquet:5'
        assert 'no content in text' in listed[0][0]['reason']
        ids, embeddings = read_all(out)
        good = [n for n, text in enumerate(texts) if text]
        assert ids == [f'a.parquet:{n}' for n in good]
        expected = vectors_of(texts_model, [texts[n] for n in good])
        np.testing.assert_allclose(embeddings, expected, atol=1e-6)
    column = parquet.read_table(tmp_path / 'parquet' / 'part-00000.parquet')['embedding']
    assert column.is_null().to_pylist() == [n == 5 for n in range(40)]
    assert np.isnan(np.load(tmp_path / 'numpy' / 'part-00000.npy')[5]).all()


@pytest.mark.parametrize(('most', 'stops'), [(1, True), (2, False), (0.01, True), (0.1, False)])
def test_too_many_failed_rows_are_an_error(texts_model, tmp_path, most, stops):
    texts = ['' if n < 2 else text for n, text in enumerate(TEXTS)]
    source = write_parquet(tmp_path / 'a.parquet', text=texts)
    if not stops:
        assert encode(source, tmp_path / 'out', texts_model, max_failed=most).num_failed == 2
        return
    with pytest.raises(DataError, match=r'2 of 130 rows failed, more than max_failed'):
        encode(source, tmp_path / 'out', texts_model, max_failed=most)
    with pytest.raises(NotFoundError, match='not finished'):
        open_encoded(tmp_path / 'out')
    again = encode(source, tmp_path / 'out', texts_model)
    assert (again.num_failed, again.num_reused) == (2, 1)


def test_pictures_of_every_form(pictures_model, tmp_path):
    docs = make_picture_docs()
    expected = vectors_of(pictures_model, docs).embeddings
    folder = tmp_path / 'data'
    for doc in docs:
        path = folder / doc.id[2] / f'{doc.id}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(doc.blob)
    paths = [f'data/{doc.id[2]}/{doc.id}.png' for doc in docs]
    blobs = [{'bytes': doc.blob, 'path': None} for doc in docs]
    lines = [json.dumps({'id': doc.id, 'uri': path}) for doc, path in zip(docs, paths, strict=True)]
    (tmp_path / 'd.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'e.csv').write_text('\n'.join(paths))
    (tmp_path / 'f.csv').write_text(
        '\n'.join(['id,where', *(f'{d.id},{p}' for d, p in zip(docs, paths, strict=True))])
    )
    save_documents(docs, tmp_path / 'g.docs')
    own = [doc.id for doc in docs]
    cases = [
        (write_parquet(tmp_path / 'a.parquet', id=own, blob=[doc.blob for doc in docs]), own, {}),
        (write_parquet(tmp_path / 'b.parquet', x=own, image=blobs), own, {'id': 'x'}),
        (write_parquet(tmp_path / 'c.parquet', p=paths), [f'c.parquet:{n}' for n in range(24)], {'content': 'p'}),
        (tmp_path / 'd.jsonl', own, {}),
        (tmp_path / 'e.csv', [f'e.csv:{n}' for n in range(24)], {}),
        (tmp_path / 'f.csv', own, {'content': 'where'}),
        (tmp_path / 'g.docs', own, {}),
        (folder, paths, {}),
    ]  # fmt: skip
    for number, (source, ids, options) in enumerate(cases):
        out = tmp_path / f'out {number}'
        summary = encode(source, out, pictures_model, rows_per_shard=10, **options)
        assert (summary.num_shards, summary.num_failed) == (3, 0), source
        found = read_all(out)
        assert found[0] == ids, source
        np.testing.assert_allclose(found[1], expected, atol=1e-6)


def test_tags_and_keys_are_kept_as_texts(texts_model, tmp_path):
    docs = DocumentArray(Document(text=t, tags={'n': n}) for n, t in enumerate(TEXTS[:5]))
    save_documents(docs, tmp_path / 'a.docs')
    records = [{'text': t, 'n': n, 'more': [n]} for n, t in enumerate(TEXTS[:5])]
    (tmp_path / 'b.jsonl').write_text('\n'.join(map(json.dumps, records)))
    encode(tmp_path / 'a.docs', tmp_path / 'out a', texts_model, keep='n')
    encode(tmp_path / 'b.jsonl', tmp_path / 'out b', texts_model, keep=['more', 'n'])
    first = parquet.read_table(tmp_path / 'out a' / 'part-00000.parquet')
    assert first['id'].to_pylist() == [doc.id for doc in docs]
    assert first['n'].to_pylist() == ['0.0', '1.0', '2.0', '3.0', '4.0']
    second = parquet.read_table(tmp_path / 'out b' / 'part-00000.parquet')
    assert second['more'].to_pylist() == ['[0]', '[1]', '[2]', '[3]', '[4]']
    assert second['n'].to_pylist() == list('01234')


def test_a_broken_line_of_json_is_one_failed_row(texts_model, tmp_path):
    lines = ['{"text": "red shoe"}', '{"text": "blue', '', '{"text": 3}', '{"text": "a cat"}']
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    summary = encode(tmp_path / 'a.jsonl', tmp_path / 'out', texts_model)
    assert (summary.num_rows, summary.num_failed) == (4, 2)
    assert read_all(tmp_path / 'out')[0] == ['a.jsonl:0', 'a.jsonl:3']


def test_several_inputs_one_after_the_other(texts_model, tmp_path):
    (tmp_path / 'data').mkdir()
    for name, some in (('b', TEXTS[:50]), ('a', TEXTS[50:60]), ('c', TEXTS[60:])):
        write_parquet(tmp_path / 'data' / f'{name}.parquet', text=some)
    expected = [
        f'{name}.parquet:{n}' for name, m in (('a', 10), ('b', 50), ('c', 70)) for n in range(m)
    ]
    data = tmp_path / 'data'
    for number, source in enumerate([data, f'{data}/*.parquet', f'{data}/{{a,b,c}}.parquet']):
        assert encode(source, tmp_path / f'{number}', texts_model).num_shards == 5
        assert read_all(tmp_path / f'{number}')[0] == expected
    files = [tmp_path / 'data' / f'{name}.parquet' for name in 'cca']
    encode(files, tmp_path / 'chosen', texts_model)
    assert read_all(tmp_path / 'chosen')[0] == expected[60:] + expected[:10]


def test_a_shard_begins_where_it_begins_whatever_the_row_groups(texts_model, tmp_path):
    source = write_parquet(tmp_path / 'a.parquet', row_group_size=7, text=TEXTS)
    encode(source, tmp_path / 'out', texts_model, rows_per_shard=30)
    ids, embeddings = read_all(tmp_path / 'out')
    assert ids == [f'a.parquet:{n}' for n in range(130)]
    np.testing.assert_allclose(embeddings, vectors_of(texts_model, TEXTS), atol=1e-6)


def test_a_zip_and_two_processes_give_the_same_files(texts_model, source, tmp_path):
    from tests.unit.bulk_cases import files_of

    encode(source, tmp_path / 'one', texts_model)
    zipped = zip_artifact(texts_model, tmp_path / 'model.zip')
    encode(source, tmp_path / 'two', zipped, num_workers=2)
    assert files_of(tmp_path / 'one') == files_of(tmp_path / 'two')


def test_inputs_that_cannot_be_read_are_named_and_others_go_on(texts_model, source, tmp_path):
    out = tmp_path / 'out'
    (tmp_path / 'b.parquet').write_bytes(b'PAR1 no more')
    damaged = write_parquet(tmp_path / 'c.parquet', text=TEXTS[:90], row_group_size=40)
    content = bytearray(damaged.read_bytes())
    # within the pages of the second row group
    place = parquet.ParquetFile(damaged).metadata.row_group(1).column(0).data_page_offset
    content[place : place + 30] = b'\xff' * 30
    damaged.write_bytes(content)
    summary = encode([source, tmp_path / 'b.parquet', damaged], out, texts_model)
    assert (summary.num_shards, summary.num_rows) == (6, 180)
    assert [(lost.source, lost.start, lost.stop) for lost in summary.missing] == [
        (str(tmp_path / 'b.parquet'), None, None),
        (str(damaged), 40, 80),
    ]
    with pytest.raises(DataError, match=r"is without '.*b.parquet'.* and 1 others"):
        open_encoded(out)
    assert len(open_encoded(out, allow_missing=True)) == 180
    # one that is mended comes last, and nothing else is done again
    write_parquet(tmp_path / 'b.parquet', text=TEXTS[:50])
    again = encode([source, tmp_path / 'b.parquet', damaged], out, texts_model)
    assert (again.num_reused, again.num_shards, len(again.missing)) == (6, 8, 1)
    ids = [name for name in read_missing(out) if name.startswith('b')]
    assert ids == [f'b.parquet:{n}' for n in range(50)]


def read_missing(output):
    return [name for ids, _ in open_encoded(output, allow_missing=True) for name in ids]


def test_the_reader_notices_what_was_changed(texts_model, source, tmp_path):
    out = tmp_path / 'out'
    encode(source, out, texts_model)
    content = bytearray((out / 'part-00002.parquet').read_bytes())
    content[100] ^= 1
    (out / 'part-00002.parquet').write_bytes(content)
    (out / 'part-00003.parquet').unlink()
    opened = open_encoded(out)
    assert len(opened.shard(1)[0]) == 40
    with pytest.raises(DataError, match=r'part-00002.parquet.* is not what was written'):
        opened.shard(2)
    with pytest.raises(DataError, match=r'part-00003.parquet.* is missing'):
        opened.shard(3)
    assert encode(source, out, texts_model).num_reused == 2
    assert len(read_all(out)[0]) == 130
    (out / 'manifest.json').write_text('{"version": 9}')
    with pytest.raises(DataError, match='version 9'):
        open_encoded(out)


@pytest.mark.parametrize(
    ('options', 'error', 'said'),
    [
        ({'content': 'txet'}, ConfigError, "unknown column 'txet': did you mean 'text'"),
        ({'id': 'nr'}, ConfigError, "unknown column 'nr'"),
        ({'keep': ['m']}, ConfigError, "unknown column 'm'"),
        ({'keep': ['embedding']}, ConfigError, 'cannot be kept'),
        ({'keep': ['n', 'n']}, ConfigError, 'twice'),
        ({'format': 'csv'}, ConfigError, "unknown format 'csv'"),
        ({'rows_per_shard': 0}, ConfigError, 'rows_per_shard=0 is less than 1'),
        ({'num_workers': 1.5}, ConfigError, 'num_workers'),
        ({'engine': 'onxx'}, ConfigError, "did you mean 'onnx'"),
        ({'precision': 'fp8'}, ConfigError, "unknown precision 'fp8'"),
        ({'device': 'tpu'}, ConfigError, "unknown device 'tpu'"),
        ({'max_failed': -1}, ConfigError, 'max_failed=-1'),
        ({'model': 'x'}, ConfigError, 'one of artifact'),
        ({'artifact': None}, ConfigError, 'one of artifact'),
        ({'artifact': 'nowhere'}, ArtifactError, "'.*nowhere' is no artifact"),
        ({'source': 'none-*.parquet'}, DataError, "no file is called 'none-"),
        ({'source': 'x-{0..999999999}.tar'}, DataError, r"no file or folder 'x-0\.tar'"),
        ({'source': '{a..c}.csv'}, DataError, 'neither a range of numbers'),
        ({'source': []}, DataError, 'there is no input'),
        ({'ray_address': 'http://:8265'}, ConfigError, 'no address of the jobs API'),
        ({'ray_address': 'head'}, ConfigError, 'no address of a Ray cluster'),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_at_the_door(
    texts_model, source, tmp_path, options, error, said
):
    given = {'source': source, 'artifact': texts_model, **options}
    with pytest.raises(error, match=said):
        encode(given.pop('source'), tmp_path / 'out', given.pop('artifact'), **given)
    assert not (tmp_path / 'out' / 'manifest.json').exists()


def test_formats_without_columns_say_so(texts_model, tmp_path):
    save_documents(DocumentArray([Document(text='a')]), tmp_path / 'a.docs')
    with pytest.raises(ConfigError, match=r'a\.docs has no columns'):
        encode(tmp_path / 'a.docs', tmp_path / 'out', texts_model, content='text')
    (tmp_path / 'a.csv').write_text('red\nblue\n')
    with pytest.raises(ConfigError, match='nor tags'):
        encode(tmp_path / 'a.csv', tmp_path / 'out', texts_model, keep=['n'])
    write_parquet(tmp_path / 'a.parquet', body=['red'])
    with pytest.raises(ConfigError, match=r'name that of the contents as content\. Known: body'):
        encode(tmp_path / 'a.parquet', tmp_path / 'out', texts_model)


def test_nothing_to_encode_is_an_error(texts_model, tmp_path):
    write_parquet(tmp_path / 'a.parquet', text=pyarrow.array([], pyarrow.string()))
    with pytest.raises(DataError, match='no rows'):
        encode(tmp_path / 'a.parquet', tmp_path / 'out', texts_model)
    (tmp_path / 'b.parquet').write_bytes(b'no')
    with pytest.raises(DataError, match='cannot be read'):
        encode(tmp_path / 'b.parquet', tmp_path / 'out', texts_model)


def test_a_pretrained_model_as_it_comes(source, texts_model, tmp_path):
    folder = shutil.copytree(texts_model.parent / 'encoder', tmp_path / 'encoder')
    options = {'model': str(folder), 'engine': 'torch', 'model_options': {'pooler': 'max'}}
    encode(source, tmp_path / 'out', None, **options)
    engine = finetuner.build_model(str(folder), {'pooler': 'max'})
    expected = finetuner.encode(engine, TEXTS)
    np.testing.assert_allclose(read_all(tmp_path / 'out')[1], expected, atol=1e-6)
    (folder / 'config.json').write_text((folder / 'config.json').read_text() + ' ')
    with pytest.raises(ConflictError, match='the model is another'):
        encode(source, tmp_path / 'out', None, **options)
