"""JSON Lines and Parquet: what each record becomes, and which are refused by their number."""

import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from finetuner.data.documents import data_kind
from finetuner.data.records import read_json_lines, read_parquet
from finetuner.excepts import ConfigError, DataError
from tests.conftest import png

PICTURE = png(np.zeros((2, 2, 3), np.uint8))


def lines_of(tmp_path, *records):
    path = tmp_path / 'x.jsonl'
    texts = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text('\n'.join(texts), encoding='utf-8')
    return path


def read(tmp_path, *records):
    return list(read_json_lines(lines_of(tmp_path, *records)))


def table(tmp_path, **columns):
    path = tmp_path / 'x.parquet'
    parquet.write_table(pa.table(columns), path)
    return path


def test_class_data(tmp_path):
    (tmp_path / 'a.png').write_bytes(PICTURE)
    docs = read(
        tmp_path,
        {'text': 'ä', 'label': 'x', 'id': 'one', 'tags': {'n': [1, None]}},
        {'uri': 'a.png', 'finetuner_label': 3, 'id': 7},
        {'image': 'https://h/a.png', 'label': 1.0, 'text': None},
        {'tensor': [[1, 2.5]], 'label': True},
    )
    assert data_kind(docs) == 'class'
    assert [doc.tags['finetuner_label'] for doc in docs] == ['x', 3, 1, 1]
    assert [doc.id for doc in docs[:2]] == ['one', '7']
    assert docs[0].tags['n'] == [1, None]
    assert [doc.uri for doc in docs[1:3]] == [str(tmp_path / 'a.png'), 'https://h/a.png']
    assert (docs[3].tensor.tolist(), docs[3].tensor.dtype) == ([[1, 2.5]], np.float32)


def test_sessions(tmp_path):
    matches = [{'text': 'b', 'label': 1}, {'text': 'c', 'label': -1}]
    docs = read(tmp_path, {'text': 'a', 'matches': matches})
    assert data_kind(docs) == 'session'
    assert [match.tags['finetuner_label'] for match in docs[0].matches] == [1, -1]


def test_instances(tmp_path):
    assert data_kind(read(tmp_path, {'text': 'a'}, {'tensor': [1]})) == 'instance'


@pytest.mark.parametrize(
    'record',
    [
        {'image': 'http://h/a.png', 'text': 'a'},
        {'pair': ['a', {'image': 'http://h/a.png'}]},
        {'pair': [{'uri': 'http://h/a.png'}, {'text': 'a'}]},
        {'chunks': [
            {'text': 'a', 'modality': 'text'}, {'uri': 'http://h/a.png', 'modality': 'image'},
        ]},
    ],
)  # fmt: skip
def test_text_image_pairs(tmp_path, record):
    docs = read(tmp_path, record)
    assert data_kind(docs) == 'text_image_pair'
    assert [(c.modality, c.text or c.uri) for c in docs[0].chunks] == [
        ('text', 'a'), ('image', 'http://h/a.png'),
    ]  # fmt: skip


@pytest.mark.parametrize(
    'record',
    [
        {'pair': ['a', 'b'], 'score': 0.5, 'id': 'x'},
        {'sentence1': 'a', 'sentence2': 'b', 'score': 0.5, 'id': 'x'},
        {'query': 'a', 'document': 'b', 'finetuner_score': 0.5, 'id': 'x'},
        {'chunks': [{'text': 'a'}, {'text': 'b'}], 'score': 0.5, 'id': 'x'},
    ],
)
def test_scored_pairs(tmp_path, record):
    docs = read(tmp_path, record)
    assert data_kind(docs) == 'scored_pair'
    assert docs[0].tags == {'finetuner_score': 0.5}
    assert docs[0].id == 'x'
    assert [chunk.text for chunk in docs[0].chunks] == ['a', 'b']


@pytest.mark.parametrize(
    'keys', [('query', 'document'), ('anchor', 'positive'), ('sentence1', 'sentence2'), None]
)
def test_query_document_pairs_become_classes(tmp_path, keys):
    pairs = [('q1', 'd1'), ('q2', 'd2'), ('q2', 'd1'), ('q3', 'd3')]
    records = [dict(zip(keys, p, strict=True)) if keys else {'pair': list(p)} for p in pairs]
    docs = read(tmp_path, *records)
    assert [(doc.text, doc.tags['finetuner_label']) for doc in docs] == [
        ('q1', 0), ('d1', 0), ('q2', 0), ('d2', 0), ('q3', 1), ('d3', 1),
    ]  # fmt: skip


def test_bom_line_ends_and_empty_lines(tmp_path):
    path = tmp_path / 'x.jsonl'
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n\r\n  \n{"text": "c", "text": "d"}'
    )
    assert [doc.text for doc in read_json_lines(path)] == ['a\u2028b', 'd']
    path.write_bytes(b'\n')
    with pytest.raises(DataError, match='no records'):
        list(read_json_lines(path))


@pytest.mark.parametrize(
    ('record', 'reason'),
    [
        ('{"text": "a"', 'not valid JSON'),
        ('{"text": NaN}', 'NaN'),
        ('[{"text": "a"}]', 'a list, not an object'),
        ('"text"', 'a str, not an object'),
        ('[' * 100_000, 'not valid JSON'),
        ('{"text": "\\ud800"}', 'not UTF-8'),
        ({'txt': 'a'}, "'txt': did you mean 'text'"),
        ({'text': 'a', 'extra': None}, 'unknown key'),
        ({}, 'no content'),
        ({'text': '', 'label': 1}, 'no content'),
        ({'text': '  '}, '`text` is empty'),
        ({'text': 5}, '`text` is 5'),
        ({'text': 'a', 'tensor': [1]}, 'several contents, text and tensor'),
        ({'text': 'a', 'uri': 'http://h/a.png', 'label': 1}, 'several contents'),
        ({'text': 'a', 'label': 1, 'finetuner_label': 1}, 'mean the same'),
        ({'text': 'a', 'label': 1.5}, 'label 1.5'),
        ({'text': 'a', 'label': [1]}, 'label'),
        ('{"text": "a", "label": 1e999}', 'label inf'),
        ({'text': 'a', 'id': 1.5}, '`id` is 1.5'),
        ({'text': 'a', 'tags': ['ab', 'cd']}, '`tags`'),
        ({'text': 'a', 'matches': {'text': 'b'}}, '`matches`'),
        ({'text': 'a', 'matches': [{'text': 'b'}, 'c']}, "match 1 is 'c'"),
        ({'text': 'a', 'matches': [{'label': 1}]}, 'match 0: there is no content'),
        ({'uri': 'none.png'}, "no file 'none.png'"),
        ({'image': 's3://b/a.png'}, 'scheme'),
        ({'image': [1, 2]}, '`image`'),
        ({'image': {'bytes': None, 'path': None}}, '`image`'),
        ({'tensor': [[1], [2, 3]]}, 'differ in length'),
        ({'tensor': ['a']}, '`tensor`'),
        ({'tensor': []}, '`tensor`'),
        ({'tensor': [True]}, '`tensor`'),
        ('{"tensor": [1e300]}', 'not finite'),
        ({'pair': ['a']}, '`pair`'),
        ({'pair': ['a', '']}, 'side 1: there is no content'),
        ({'pair': ['a', 'b'], 'score': 2}, 'score 2'),
        ({'pair': ['a', 'b'], 'score': '0.5'}, 'score'),
        ({'pair': ['a', 'b'], 'score': True}, 'score'),
        ({'pair': ['a', 'b'], 'label': 1}, 'call a score `score`'),
        ({'pair': ['a', 'b'], 'query': 'c'}, 'several pairs'),
        ({'pair': ['a', 'b'], 'id': 'x'}, 'takes no id'),
        ({'query': 'a'}, '`document` is missing'),
        ({'pair': [{'pair': ['a', 'b']}, 'c']}, 'side 0: a pair stands at the top'),
        ({'pair': ['a', 'b']}, 'do not mix'),
    ],
)
def test_what_does_not_fit_is_refused_by_its_line(tmp_path, record, reason):
    path = lines_of(tmp_path, {'text': 'fine'}, '', record)
    with pytest.raises(DataError, match=r"^line 3 of 'x\.jsonl'") as caught:
        list(read_json_lines(path))
    assert reason in str(caught.value)


def test_other_files_are_refused(tmp_path):
    for read_file in (read_json_lines, read_parquet):
        with pytest.raises(DataError, match='no file'):
            read_file(tmp_path / 'none')
    path = tmp_path / 'x'
    path.write_bytes('{"text": "a"}'.encode('utf-16'))
    with pytest.raises(DataError, match=r'line 1 .*not UTF-8'):
        list(read_json_lines(path))
    with pytest.raises(DataError, match='as Parquet'):
        list(read_parquet(path))
    whole = table(tmp_path, text=['a'] * 1000).read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match='as Parquet'):
        list(read_parquet(path))


def test_parquet_of_hugging_face(tmp_path):
    (tmp_path / 'b.png').write_bytes(PICTURE)
    images = [{'bytes': PICTURE, 'path': 'a.png'}, {'bytes': None, 'path': 'b.png'}]
    docs = list(read_parquet(table(tmp_path, image=images, label=[0, 1])))
    assert data_kind(docs) == 'class'
    assert [(doc.blob, doc.uri) for doc in docs] == [
        (PICTURE, ''), (b'', str(tmp_path / 'b.png')),
    ]  # fmt: skip
    assert docs[0].tags == {'file': 'a.png', 'finetuner_label': 0}
    docs = list(read_parquet(table(tmp_path, image=[PICTURE], text=['a caption'])))
    assert data_kind(docs) == 'text_image_pair'


def test_parquet_columns(tmp_path):
    count = 200
    path = table(
        tmp_path,
        id=list(range(count)),
        tensor=pa.array([[number, 0.5] for number in range(count)], pa.list_(pa.float32())),
        tags=pa.array([[('a', number)] for number in range(count)], pa.map_('string', 'int64')),
        label=[None if number == 150 else 'x' for number in range(count)],
    )
    docs = list(read_parquet(path))
    assert [doc.id for doc in docs] == [str(number) for number in range(count)]
    assert docs[7].tensor.tolist() == [7, 0.5]
    assert docs[7].tags == {'a': 7, 'finetuner_label': 'x'}
    assert 'finetuner_label' not in docs[150].tags


def test_parquet_rows_are_named(tmp_path):
    scores = [0.5] * 100
    scores[70] = float('nan')
    path = table(tmp_path, sentence1=['a'] * 100, sentence2=['b'] * 100, score=scores)
    with pytest.raises(DataError, match=r"row 71 of 'x\.parquet': score nan"):
        list(read_parquet(path))


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    path = table(tmp_path, text=['a'])
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ConfigError, match=r"pip install 'finetuner\[parquet\]'"):
        list(read_parquet(path))


def test_pictures_that_are_not_there_are_left_to_be_skipped(tmp_path):
    path = lines_of(tmp_path, {'image': 'absent.png', 'matches': [{'uri': 'b.png', 'label': 1}]})
    with pytest.raises(DataError, match=r"line 1 of 'x.jsonl', match 0: there is no file 'b.png'"):
        list(read_json_lines(path))
    (doc,) = read_json_lines(path, on_broken='skip')
    assert [doc.uri, doc.matches[0].uri] == [str(tmp_path / n) for n in ('absent.png', 'b.png')]
    path = table(tmp_path, image=['absent.png'])
    (doc,) = read_parquet(path, on_broken='skip')
    assert doc.uri == str(tmp_path / 'absent.png')
