"""Counting Documents in the bytes of a request, without opening any."""

import asyncio
import contextlib
import tracemalloc

import numpy as np
import pytest
from docarray import Document, DocumentArray
from hypothesis import given
from hypothesis import strategies as st
from jina.logging.logger import JinaLogger
from jina.types.request.data import DataRequest

from finetuner.excepts import ConfigError, FinetunerError, TooLargeError
from finetuner.server.calls import Call
from finetuner.server.dispatch import Dispatcher
from finetuner.server.identity import IdentitySeal
from finetuner.server.limits import Limits, Slots
from finetuner.server.telemetry import GatewayMetrics
from finetuner.server.wire import find_documents


def message(docs: DocumentArray, **parameters) -> bytes:
    request = DataRequest()
    request.header.exec_endpoint = '/encode'
    request.parameters = parameters
    request.data.docs = docs
    return request.proto.SerializeToString()


@pytest.mark.parametrize('count', [0, 1, 3, 200])
def test_all_kinds_of_documents_are_counted(count):
    kinds = [
        lambda: Document(text='a'),
        lambda: Document(blob=bytes(3000), tags={'a': {'b': [1, 'c']}}, weight=0.5),
        lambda: Document(tensor=np.ones((4, 4)), embedding=np.ones(3), mime_type='a/b'),
        lambda: Document(text='root', matches=[Document(text='b')], chunks=[Document(text='c')]),
    ]
    docs = DocumentArray([kinds[i % len(kinds)]() for i in range(count)])
    assert find_documents(message(docs, a=1, b={'c': 'd'}), 1000).count == count


def test_a_message_may_come_in_parts():
    parts = message(DocumentArray([Document(text='a')])) * 3
    assert find_documents(parts, 1000).count == 3


def test_counting_ends_where_there_are_too_many():
    docs = b'\x0a\x00' * 5_000_000
    data = b'\x0a' + varint(len(docs)) + docs
    assert find_documents(b'\x22' + varint(len(data)) + data, 10).count == 11


def varint(number: int) -> bytes:
    written = b''
    while number >= 128:
        written += bytes((number & 127 | 128,))
        number >>= 7
    return written + bytes((number,))


def delimited(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def in_request(doc: bytes) -> bytes:
    return delimited(4, delimited(1, delimited(1, doc)))


@pytest.mark.parametrize(
    ('raw', 'words'),
    [
        (in_request(delimited(14, b'') * 200_000), 'chunks and matches'),
        (in_request(delimited(17, bytes(9 << 20))), 'tags'),
        (delimited(2, bytes(5 << 20)), 'parameters'),
        (delimited(2, bytes(1 << 20)) * 5, 'parameters'),
        (in_request(b'\x48\x01' * 300_000), 'more than 210,000 fields'),
    ],
)
def test_small_messages_that_make_many_objects_are_refused(raw, words):
    with pytest.raises(TooLargeError, match=words):
        find_documents(raw, 1000)


@pytest.mark.parametrize('doc', [b'\x48\x01' * 3_000_000, delimited(14, b'') * 3_000_000])
def test_nothing_is_kept_of_what_is_refused(doc):
    raw = in_request(doc)
    tracemalloc.start()
    with pytest.raises(TooLargeError):
        find_documents(raw, 100)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


def test_the_largest_legal_request_has_few_enough_fields():
    chunk = Document(text='a', uri='b', mime_type='c/d', weight=1.0, offset=2.0, modality='e')
    root = Document(chunks=[Document(chunk, copy=True) for _ in range(10)], tags={'a': 1})
    docs = DocumentArray([Document(root, copy=True) for _ in range(100)])
    assert find_documents(message(docs), 100).count == 100


def test_documents_within_each_other_without_end_are_walked_without_recursion():
    doc = b''
    for _ in range(2000):
        doc = delimited(14, doc)
    assert find_documents(in_request(doc), 1000).count == 1


def test_many_empty_fields_are_refused():
    with pytest.raises(ConfigError, match='more than 10,000 fields'):
        find_documents(delimited(3, b'') * 20_000, 1000)


def test_other_requests_go_on_while_a_large_message_is_counted(tmp_path):
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def run() -> DataRequest:
        seal = IdentitySeal.of_home(tmp_path)
        dispatcher = Dispatcher(
            None,
            seal,
            Limits(),
            Slots(1),
            None,
            JinaLogger('test'),
            GatewayMetrics(),
        )
        ticking = asyncio.create_task(tick())
        request = DataRequest(in_request(b'\x48\x01' * 2_100_000))
        before = ticks
        answer = await dispatcher.answer(request, Call('grpc', 'id'))
        assert ticks > before
        ticking.cancel()
        return answer

    answer = asyncio.run(run())
    assert answer.header.status.exception.name == 'TooLargeError'


@given(st.binary(max_size=300))
def test_any_bytes_are_counted_or_refused_on_purpose(raw):
    with contextlib.suppress(FinetunerError):
        assert find_documents(raw, 100).count >= 0


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_does_no_harm(position, value):
    raw = bytearray(message(DocumentArray([Document(text='a' * 20, tags={'b': 1})] * 3)))
    raw[position % len(raw)] = value
    with contextlib.suppress(FinetunerError):
        find_documents(bytes(raw), 100)
