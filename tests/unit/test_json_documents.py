"""JSON that protobuf could not carry is refused at the door, saying where."""

import json

import pytest

from finetuner.excepts import ConfigError, DataError
from finetuner.server.json_documents import read_body


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


def test_what_is_sent_as_it_came():
    tags = {**nested(9), 'large': 10**300, 'flag': True, 'none': None}
    docs, parameters, _, _ = read_body(body(data=[{'tags': tags}], parameters={'x': -1.5e300}))
    assert docs[0].tags == tags
    assert parameters == {'x': -1.5e300}
