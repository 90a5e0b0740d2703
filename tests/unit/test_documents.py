"""Labels, kinds, checks at the door, and Documents on disk."""

import math

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.data.contents import content_of, copy_document, is_local_file, positions_text
from finetuner.data.documents import (
    data_kind,
    has_content,
    load_contents,
    read_label,
)
from finetuner.excepts import DataError


def labelled(label, **content):
    return Document(tags={'finetuner_label': label}, **(content or {'text': 'content'}))


def class_data(*labels):
    return DocumentArray([labelled(label) for label in labels])


def session(*labels):
    return Document(text='root', matches=[labelled(label) for label in labels])


@pytest.mark.parametrize('value', [1, 1.0, True, np.int64(1), np.float32(1), np.bool_(True)])
def test_numbers_and_true_are_one_int_label(value):
    label = read_label(labelled(value))
    assert label == 1
    assert type(label) is int


def test_strings_stay_strings():
    assert read_label(labelled('1')) == '1'
    assert read_label(labelled('cat')) == 'cat'


def test_older_nested_form_is_read():
    assert read_label(Document(tags={'finetuner': {'label': 7.0}})) == 7
    assert read_label(Document(tags={'finetuner': 'something else'})) is None
    assert read_label(Document(tags={'other': 1})) is None


@pytest.mark.parametrize(
    'value', [5.5, math.nan, math.inf, None, [1], {'a': 1}, '', 2**53 + 1, 1e300, 1j, b'cat']
)
def test_what_is_no_label_is_refused_with_its_position(value):
    with pytest.raises(DataError, match=r'^Document 17: label'):
        read_label(labelled(value), position=17)


def test_positions_text():
    assert positions_text([3]) == 'Document 3'
    assert positions_text([3, 9]) == 'Documents 3, 9'
    assert positions_text(range(100)) == 'Documents 0, 1, 2, 3, 4 and 95 more'


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ({'text': 'a'}, 'a'),
        ({'blob': b'a'}, b'a'),
        ({'uri': 'a.png'}, 'a.png'),
        ({'uri': 'a.png', 'blob': b'a'}, b'a'),
        ({}, None),
        ({'text': '', 'blob': b''}, None),
        ({'tensor': np.zeros((0, 3))}, None),
        ({'blob': np.zeros(0)}, None),
    ],
)
def test_content(content, expected):
    doc = Document(**content)
    assert content_of(doc) == expected
    assert has_content(doc) == (expected is not None)


def test_content_of_arrays():
    array = np.arange(6).reshape(2, 3)
    assert content_of(Document(tensor=array)) is array
    assert content_of(Document(blob=array)) is array
    assert has_content(Document(tensor=np.zeros(())))


def test_copy_leaves_the_original_alone():
    doc = Document(blob=np.ones(3), tags={'finetuner_label': 1})
    twin = copy_document(doc)
    assert twin.id == doc.id
    twin.tensor = np.zeros(2)
    twin.tags['finetuner_label'] = 2
    assert doc.tensor is None
    assert doc.tags == {'finetuner_label': 1}


def test_five_kinds_are_told_apart():
    pair = [Document(text='a', modality='text'), Document(uri='b.png', modality='image')]
    scored = Document(chunks=[Document(text='a'), Document(text='b')], finetuner_score=0.5)
    assert data_kind(class_data(1, 'a', True)) == 'class'
    assert data_kind(DocumentArray([session(1, -1.0), session(True)])) == 'session'
    assert data_kind(DocumentArray([Document(text='a'), Document(blob=b'b')])) == 'instance'
    assert data_kind(DocumentArray([scored])) == 'scored_pair'
    assert data_kind(DocumentArray([Document(chunks=pair)])) == 'text_image_pair'


def test_no_documents():
    with pytest.raises(DataError, match='no Documents'):
        data_kind(DocumentArray())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({7: Document(text='a')}, r'^Document 7: label is missing, while 9 others have one'),
        ({2: labelled(1, text=''), 5: labelled(1, text='')}, r'^Documents 2, 5: content is empty'),
        ({4: labelled(5.5)}, r'^Document 4: label 5\.5 is not a whole number.*data\.md#class'),
        ({4: labelled(None)}, r'^Document 4: label None is neither'),
        ({9: session(1)}, r'Documents 0, 1, 2, 3, 4 and 4 more.*Document 9: these are sessions'),
    ],
)
def test_every_document_is_looked_at(change, message):
    docs = class_data(*range(10))
    for position, doc in change.items():
        docs[position] = doc
    with pytest.raises(DataError, match=message):
        data_kind(docs)


@pytest.mark.parametrize('label', ['maybe', 0, 2, -1.5, None, '1', [1]])
def test_session_labels_are_1_or_minus_1(label):
    docs = DocumentArray([session(1, -1), session(1, label, label)])
    with pytest.raises(DataError, match=r'^Document 1: a match has the label .*data\.md#session'):
        data_kind(docs)


def test_session_parts_need_content_and_label():
    docs = DocumentArray([Document(matches=[Document(uri='a')])])
    with pytest.raises(DataError) as caught:
        data_kind(docs)
    assert 'Document 0: content is empty' in str(caught.value)
    assert 'a match has no label' in str(caught.value)
    with pytest.raises(DataError, match='content of a match is empty'):
        data_kind(DocumentArray([Document(text='a', matches=[Document(finetuner_label=1)])]))


@pytest.mark.parametrize(
    ('doc', 'message'),
    [
        (Document(chunks=[Document(text='a')] * 2, finetuner_score=1.5), '1.5 is not a number'),
        (Document(chunks=[Document(text='a')] * 2, finetuner_score='x'), "'x' is not a number"),
        (Document(chunks=[Document(text='a')], finetuner_score=1), 'two chunks, not 1'),
        (Document(chunks=[Document(text='a'), Document()], finetuner_score=1), 'chunk is empty'),
        (Document(chunks=[Document(text='a'), Document(text='b')]), 'modality'),
    ],
)
def test_pairs_are_checked(doc, message):
    with pytest.raises(DataError, match=f'^Document 0: .*{message}'):
        data_kind([doc])


def test_local_files_become_blobs(tmp_path):
    (tmp_path / 'a b.png').write_bytes(b'one')
    docs = DocumentArray(
        [
            Document(uri=str(tmp_path / 'a b.png'), tags={'finetuner_label': 1}),
            Document(uri=(tmp_path / 'a b.png').as_uri()),
            Document(uri='https://example.com/a.png'),
            Document(uri='data:image/png;base64,AAAA'),
            Document(uri='absent.png', text='loaded already'),
            Document(text='r', matches=[Document(uri=str(tmp_path / 'a b.png'))]),
            Document(blob=np.ones(2)),
        ]
    )
    loaded = load_contents(docs)
    assert [doc.blob for doc in loaded[:2]] == [b'one', b'one']
    assert [doc.uri for doc in loaded[:2]] == ['', '']
    assert loaded[0].tags == {'finetuner_label': 1}
    assert loaded[0].id == docs[0].id
    assert [doc.uri for doc in loaded[2:4]] == [doc.uri for doc in docs[2:4]]
    assert loaded[4].text == 'loaded already'
    assert loaded[5].matches[0].blob == b'one'
    assert loaded[6].to_bytes('protobuf')
    assert docs[0].blob == b''
    assert docs[0].uri
    assert docs[5].matches[0].uri


def test_unreadable_files_name_their_document(tmp_path):
    good, empty = tmp_path / 'good', tmp_path / 'empty'
    good.write_bytes(b'a')
    empty.touch()
    for path, reason in ((empty, 'is empty'), (tmp_path / 'no', 'there is no'), (tmp_path, 'fold')):
        with pytest.raises(DataError, match=f'^Document 1: .*{reason}'):
            load_contents([Document(uri=str(good)), Document(uri=str(path))])
    root = Document(text='r', matches=[Document(uri=str(good)), Document(uri='no')])
    with pytest.raises(DataError, match=r'^Document 0, match 1: '):
        load_contents([root])


@pytest.mark.parametrize(
    ('uri', 'local'),
    [
        ('a/b.png', True),
        ('/a/b.png', True),
        ('~/b.png', True),
        ('file:///a/b.png', True),
        ('FILE:/a', True),
        ('note:1.png', True),
        ('http://a/b', False),
        ('HTTPS://a/b', False),
        ('data:,a', False),
        ('s3://a/b', False),
    ],
)
def test_which_uris_are_local_files(uri, local):
    assert is_local_file(uri) == local
