"""Messages of Jina: Documents in them are read, pickles never."""

import os
import pickle

import numpy as np
import pytest
from docarray import Document, DocumentArray
from jina.proto.serializer import DataRequestProto
from jina.types.request.data import DataRequest

import finetuner.server.messages  # noqa: F401  as gateway and Executors do
from finetuner.excepts import DataError


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def received(request: DataRequest) -> DataRequest:
    """The request as a server has it: its bytes, not yet read."""
    return DataRequest(request.SerializeToString())


def test_pickled_documents_are_refused_and_not_opened(tmp_path):
    trace = tmp_path / 'executed'
    request = DataRequest()
    request.data.docs_bytes = pickle.dumps(Payload(trace))
    for read in (
        lambda: received(request).docs,
        lambda: received(request).data.docs,
        lambda: received(request).data.docs[0],
    ):
        with pytest.raises(DataError, match='would be unpickled: send them as messages'):
            read()
    assert not trace.exists()


def test_documents_in_messages_are_read():
    request = DataRequest()
    request.data.docs = DocumentArray([Document(text='one'), Document(text='two')])
    assert received(request).docs.texts == ['one', 'two']
    assert received(request).data.docs[1].text == 'two'
    assert len(DataRequest().docs) == 0


@pytest.mark.parametrize('nested', [False, True])
def test_arrays_that_say_they_are_large_and_hold_nothing(nested):
    request = DataRequest()
    request.data.docs = DocumentArray([Document(chunks=[Document()])])
    doc = request.proto.data.docs.docs[0]
    tensor = (doc.chunks[0] if nested else doc).tensor
    tensor.dense.shape.extend([1 << 20, 1 << 14])
    tensor.dense.dtype, tensor.cls_name = '<f8', 'numpy'
    with pytest.raises(DataError, match=r'`tensor` of Document .* has the shape .* and no values'):
        received(request).docs[0]


def test_arrays_are_read():
    request = DataRequest()
    request.data.docs = DocumentArray([Document(tensor=np.arange(3)), Document(tensor=np.zeros(0))])
    found = received(request).docs
    assert found[0].tensor.tolist() == [0, 1, 2]
    assert len(found) == 2


def test_counting_the_bytes_of_messages_leaves_the_environment_alone():
    # each value that a variable of it ever had stays in memory
    before = dict(os.environ)
    request = DataRequest()
    request.data.docs = DocumentArray([Document(text='a')])
    for _ in range(3):
        assert DataRequestProto.FromString(DataRequestProto.SerializeToString(request)).docs.texts
    assert dict(os.environ) == before
