"""What is given as data and holds no Documents, fails on the way, or holds what cannot be kept."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
from docarray import Document

from tests.unit.bad_data_cases_values import good, text


def case(name, make, expected, **options):
    return pytest.param(make, expected, options, id=name)


def nested_in_itself():
    doc = Document(text='root', tags={'finetuner_label': 1})
    doc.matches = [doc]
    return iter([doc])


def deep_tags():
    value = []
    for _ in range(5000):
        value = [value]
    return iter([text(0), text(1, tags={'deep': value})])


def failing(after):
    for number in range(after):
        yield text(number)
    raise KeyError('row 7 of my table')


def closed_file():
    file = io.StringIO('a,b')
    file.close()
    return file


BAD_SOURCES = [
    case('closed-file', closed_file, "'the CSV' cannot be read: .*closed file"),
    case('binary-file', lambda: io.BytesIO(b'a,b'), 'is open in binary mode: open it with mode'),
    case('empty-text-file', io.StringIO, "'the CSV' holds no rows"),
    case('data-int', lambda: 5, 'data is a int; allowed are Documents'),
    case('data-none', lambda: None, 'data is a NoneType; allowed are Documents'),
    case('data-bytes', lambda: b'abc', 'data is a bytes; allowed are Documents'),
    case('data-dict', lambda: {'text': 'a'}, 'data is a dict; allowed are Documents'),
    case('data-function', lambda: good, 'data is a function; allowed are Documents'),
    case('data-document', text, 'data is a Document: put it into a DocumentArray'),
    case('data-name', lambda: 'my-data', "there is no file or folder 'my-data'"),
    case('data-empty-name', lambda: '', "there is no file or folder ''"),
    case('data-nul-name', lambda: 'a\0b.csv', r"there is no file or folder 'a\\x00b.csv'"),
    case('data-long-name', lambda: 'x' * 10_000, "there is no file or folder 'x{60,200}\\.\\.\\."),
    case('elements-str', lambda: ['a', 'b'], 'element 0 is a str, not a Document: wrap it'),
    case('elements-int', lambda: [text(), 5], 'element 1 is a int, not a Document'),
    case('elements-none', lambda: (text(), None), 'element 1 is a NoneType, not a Document'),
    case('elements-dict', lambda: [{'text': 'a'}], 'element 0 is a dict, not a Document'),
    case('elements-array', lambda: np.zeros(3), 'element 0 is a float64, not a Document'),
    case('elements-lists', lambda: [good()], 'element 0 is a list, not a Document'),
    case('yields-str', lambda: iter([text(), text(), 'a']), 'element 2 is a str, not a Document'),
    case('yields-none', lambda: iter([None]), 'element 0 is a NoneType, not a Document'),
    case(
        'yields-then-fails',
        partial(failing, 3),
        "the iterator of the data failed after 3 Documents: KeyError: 'row 7 of my table'",
    ),
    case('fails-at-once', partial(failing, 0), 'the iterator of the data failed after 0 Documents'),
    case('deep-tags', deep_tags, '^Document 1 is nested too deep'),
    case(
        'nan-in-tags-of-an-iterator',
        lambda: iter([text(tags={'price': float('nan')})]),
        '^Document 0: a tag holds nan, and tags take finite numbers only',
    ),
    case(
        'object-in-tags-of-an-iterator',
        lambda: iter([text(tags={'made': object()})]),
        '^Document 0 cannot be stored: .* Tags take numbers, str, bool',
    ),
    case('session-in-itself', nested_in_itself, '^Document 0 is nested too deep, or holds itself'),
]
