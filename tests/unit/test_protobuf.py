"""One Document as bytes: what comes back is what docarray makes of them."""

import numpy as np
import pytest
from docarray import Document
from docarray.score import NamedScore
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuner.data.stored.protobuf import decode_record, encode_record
from finetuner.excepts import DataError


def every_kind_of_document():
    nested = {'a': [1, None, True, 'x', {'b': 2.5}], 'c': {}, 'd': []}
    return [
        Document(text='ä', tags=nested, modality='text', weight=0.5, granularity=2, adjacency=1),
        Document(uri='a.webp', tags={'finetuner_label': 'a'}, parent_id='p', offset=1.5),
        Document(uri='a.unheard-of'),
        Document(uri='data:text/plain,a', mime_type='text/plain'),
        Document(uri='a.txt', mime_type='png'),
        Document(blob=b'\x80\x04', mime_type='image/png'),
        Document(tensor=np.arange(6, dtype=np.uint8).reshape(2, 3), uri='a.png'),
        Document(embedding=np.ones(3), location=[1, 2]),
        Document(text='root', matches=[Document(text='a', tags={'finetuner_label': -1})]),
        Document(chunks=[Document(uri='b.png', modality='image')]),
        Document(scores={'cos': NamedScore(value=0.5)}),
        Document(),
    ]


def test_documents_are_decoded_as_docarray_decodes_them():
    for position, doc in enumerate(every_kind_of_document()):
        record = encode_record(doc, position)
        ours = decode_record(record, position, 'a')
        theirs = Document.from_bytes(record, protocol='protobuf')
        assert ours.non_empty_fields == theirs.non_empty_fields
        assert ours.to_dict() == theirs.to_dict()
        assert encode_record(ours, 0) == record == encode_record(theirs, 0)
        assert ours._data._reference_doc is ours


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_tags_are_decoded_as_docarray_decodes_them(value):
    record = Document(tags={'x': value}).to_bytes(protocol='protobuf')
    ours = decode_record(record, 0, 'a')
    assert repr(ours.tags) == repr(Document.from_bytes(record, protocol='protobuf').tags)


@pytest.mark.parametrize('number', [np.inf, -np.inf, np.nan])
def test_tags_that_are_not_finite_are_refused(number):
    record = Document(tags={'x': [number]}).to_bytes(protocol='protobuf')
    with pytest.raises(DataError, match='cannot read Document 4 of here'):
        decode_record(record, 4, 'here')
