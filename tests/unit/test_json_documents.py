"""JSON that protobuf could not carry is refused at the door, saying where."""

import json

import pytest

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


def test_what_is_sent_as_it_came():
    tags = {**nested(9), 'large': 10**300, 'flag': True, 'none': None}
    docs, parameters, _, _ = read_body(body(data=[{'tags': tags}], parameters={'x': -1.5e300}))
    assert docs[0].tags == tags
    assert parameters == {'x': -1.5e300}
