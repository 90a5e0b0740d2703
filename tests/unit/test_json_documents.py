"""JSON that protobuf could not carry is refused at the door, saying where."""

import json

import pytest
from jina.types.request.data import DataRequest

from finetuner.excepts import ConfigError, DataError, TooLargeError
from finetuner.server.json_documents import read_body
from finetuner.server.limits import Limits
from finetuner.server.openai_api import read_embeddings


def nested(depth, value=1):
    for _ in range(depth):
        value = {'a': [value]}
    return value


def body(**values):
    return json.dumps(values).encode()


@pytest.mark.parametrize('number', ['NaN', 'Infinity', '-Infinity', '1e400', '9' * 400])
def test_numbers_that_cannot_be_sent(number):
    with pytest.raises(ConfigError, match=r'a parameter is (NaN|inf|an int).*cannot be sent'):
        read_body(b'{"parameters": {"batch_size": %b}}' % number.encode())
    with pytest.raises(DataError, match=r'document 1: a tag is (NaN|inf|an int)'):
        read_body(b'{"data": [{}, {"tags": {"a": [%b]}}]}' % number.encode())


def test_too_deep():
    with pytest.raises(ConfigError, match='a parameter nests more than 20 deep'):
        read_body(body(parameters=nested(11)))
    with pytest.raises(DataError, match='document 0: a tag nests more than 20 deep'):
        read_body(body(data=[{'tags': nested(11)}]))
    doc = {}
    for _ in range(20):
        doc = {'chunks': [doc]}
    assert len(read_body(body(data=[doc]))[0]) == 1
    with pytest.raises(DataError, match="'chunks' nest more than 20 deep"):
        read_body(body(data=[{'chunks': [doc]}]))


@pytest.mark.parametrize('wrap', [lambda docs: docs, lambda docs: {'docs': docs}])
def test_too_many_documents_are_refused_before_any_is_made(wrap):
    most = Limits(max_documents=5)
    assert len(read_body(body(data=wrap([{}] * 5)), most)[0]) == 5
    # what is no Document shows that none was looked at
    with pytest.raises(TooLargeError, match='has 6 Documents, and this server takes 5'):
        read_body(body(data=wrap([17] * 6)), most)


def test_documents_within_others_are_counted_before_they_are_made():
    most = Limits(max_documents=2)
    deep = {'chunks': [{'matches': [{}] * 9}]}
    assert len(read_body(body(data=[deep, deep]), most)[0]) == 2
    one_more = {'chunks': [{'matches': [17] * 10}]}
    with pytest.raises(TooLargeError, match=r'chunks and matches .* more than 2 times 10'):
        read_body(body(data=[deep, one_more]), most)


def test_too_many_inputs_of_openais_clients_are_refused_before_any_is_read():
    most = Limits(max_documents=2)
    assert len(read_embeddings(body(input=['a', 'b']), most).docs) == 2
    with pytest.raises(TooLargeError, match='has 3 Documents'):
        read_embeddings(body(input=['a', 'b', {}]), most)


@pytest.mark.parametrize(
    ('raw', 'words'),
    [
        (rb'{"data": [{"tags": {"a": ["\ud83d"]}}]}', 'document 0: a tag holds half a char'),
        (rb'{"data": [{"tags": {"\ud83d": 1}}]}', 'document 0: a tag holds half a char'),
        (rb'{"data": [{}, {"uri": "\ud83d"}]}', "document 1: 'uri' holds half a char"),
        (rb'{"parameters": {"a": "\ud83d"}}', 'a parameter holds half a character'),
        (rb'{"parameters": {"a": {"\ud83d": 1}}}', 'a parameter holds half a character'),
        (rb'{"target_executor": "\ud83d"}', '`target_executor` holds half a character'),
        (rb'{"exec_endpoint": "\ud83d"}', '`exec_endpoint` holds half a character'),
    ],
)
def test_half_a_character(raw, words):
    with pytest.raises((ConfigError, DataError), match=words):
        read_body(raw)


@pytest.mark.parametrize('name', ['granularity', 'adjacency', 'weight', 'offset'])
@pytest.mark.parametrize(
    'number', ['-1', '1.5', '4294967296', '1e39', 'NaN', 'Infinity', '9' * 400]
)
def test_numbers_that_a_field_cannot_hold(name, number):
    raw = b'{"data": [{"%b": %b}]}' % (name.encode(), number.encode())
    if name in ('weight', 'offset') and number in ('-1', '1.5', '4294967296'):
        assert getattr(read_body(raw)[0][0], name) == float(number)
        return
    with pytest.raises(DataError, match=f'document 0: {name!r} is .*: it takes a .*number from'):
        read_body(raw)


def test_numbers_that_a_field_holds_reach_protobuf():
    given = {'granularity': (1 << 32) - 1, 'adjacency': 2.0, 'weight': -3.4e38, 'offset': 1e-300}
    docs = read_body(body(data=[given]))[0]
    request = DataRequest()
    request.data.docs = docs
    assert request.proto.SerializeToString()
    assert (docs[0].granularity, docs[0].adjacency) == ((1 << 32) - 1, 2)


def test_texts_of_openais_clients_may_begin_like_an_address_of_data():
    texts = ['data: the new oil', 'data:text/plain;base64,AAAA', 'data:']
    assert read_embeddings(body(input=texts), Limits()).docs.texts == texts
    picture = read_embeddings(body(input='data:image/png;base64,AAAA'), Limits()).docs[0]
    assert picture.blob == bytes(3)


@pytest.mark.parametrize(
    ('raw', 'words'),
    [
        (rb'{"input": "a", "model": "\ud800"}', '`model` holds half a character'),
        (b'{"input": "a", "dimensions": 1%b}' % (b'0' * 400), '`dimensions` is an integer beyond'),
        (b'{"input": "a", "encoding_format": ["x"]}', 'unknown encoding_format'),
        (rb'{"input": ["a", "\ud800"]}', 'input 1 holds half a character'),
    ],
)
def test_what_openais_clients_cannot_send(raw, words):
    with pytest.raises((ConfigError, DataError), match=words):
        read_embeddings(raw, Limits())


def test_what_is_sent_as_it_came():
    tags = {**nested(9), 'large': 10**300, 'flag': True, 'none': None}
    docs, parameters, _, _ = read_body(body(data=[{'tags': tags}], parameters={'x': -1.5e300}))
    assert docs[0].tags == tags
    assert parameters == {'x': -1.5e300}
