"""Good Documents of every kind, and the values that make them bad."""

from __future__ import annotations

import numpy as np
import torch
from docarray import Document

EMPTY = 'is empty: set text, tensor, blob or uri'


def text(number=0, label=None, **fields):
    tags = {} if label is None else {'finetuner_label': label}
    return Document(**{'text': f'text {number}', 'tags': tags, **fields})


def good(count=6):
    return [text(n, label=n % 2) for n in range(count)]


def with_label(value):
    docs = good()
    docs[3].tags['finetuner_label'] = value
    return docs


def with_field(make=good, **fields):
    docs = make()
    docs[3] = Document(**{'tags': docs[3].tags, **fields})
    return docs


def session(number=0, labels=(1, -1), **fields):
    matches = [text(f'{number}, {n}', label=label) for n, label in enumerate(labels)]
    return Document(**{'text': f'root {number}', 'matches': matches, **fields})


def sessions(count=4, **third):
    docs = [session(n) for n in range(count)]
    if third:
        docs[3] = session(3, **third)
    return docs


def pair(number=0, score=None, chunks=None, **fields):
    if chunks is None:
        chunks = [text(f'{number} one'), text(f'{number} other')]
    tags = {} if score is None else {'finetuner_score': score}
    return Document(**{'chunks': chunks, 'tags': tags, **fields})


def scored_pairs(count=4, **third):
    docs = [pair(n, n / 10) for n in range(count)]
    if third:
        docs[3] = pair(3, **{'score': 0.5, **third})
    return docs


def captioned(number=0, modalities=('text', 'image'), **fields):
    chunks = [text(number, modality=modalities[0]), Document(uri='a.png', modality=modalities[1])]
    return pair(number, chunks=chunks, **fields)


def text_image_pairs(count=4):
    return [captioned(n) for n in range(count)]


KINDS = {
    'class': good,
    'session': sessions,
    'instance': lambda: [text(n) for n in range(6)],
    'scored_pair': scored_pairs,
    'text_image_pair': text_image_pairs,
}


BAD_LABELS = {
    'float': (5.5, 'label 5.5 is not a whole number'),
    'float32': (np.float32(0.5), 'label .*0.5.* is not a whole number'),
    'nan': (float('nan'), 'label nan is not a whole number'),
    'inf': (float('inf'), 'label inf is not a whole number'),
    'minus-inf': (float('-inf'), 'label -inf is not a whole number'),
    'none': (None, 'label None is neither'),
    'list': ([1], r'label \[1\] is neither'),
    'tuple': ((1, 2), r'label \(1, 2\) is neither'),
    'dict': ({'name': 1}, "label {'name': 1} is neither"),
    'set': ({1}, 'label .1. is neither'),
    'bytes': (b'cat', "label b'cat' is neither"),
    'empty': ('', "label '' is empty"),
    'space': (' ', "label ' ' is empty"),
    'newline': ('\n', r"label '\\n' is empty"),
    'beyond-2-53': (2**53 + 1, r'label 9007199254740993 is beyond 2\*\*53, .* use a str'),
    'beyond-minus-2-53': (-(2**53) - 1, r'label -9007199254740993 is beyond 2\*\*53, .* use a str'),
    'float-1e300': (1e300, r'label .* is beyond 2\*\*53, .* use a str'),
    '5000-digits': (10**5000, r'label a very long int is beyond 2\*\*53, .* use a str'),
    'ndarray': (np.array([1]), r'label array\(\[1\]\) is neither'),
    'ndarray-0d': (np.array(1), r'label array\(1\) is neither'),
    'ndarray-large': (np.zeros((999, 9)), r'label array\(.{50,90}\.\.\. is neither'),
    'tensor': (torch.tensor(1), 'label tensor.1. is neither'),
    'complex': (1 + 0j, r'label \(1\+0j\) is neither'),
    'object': (object(), 'label <object object at .*> is neither'),
    'datetime': (np.datetime64('2026-01-01'), 'label .*datetime64.* is neither'),
    'long-text-in-list': (['x' * 10_000], r"label \['x{20,78}\.\.\. is neither"),
}

BAD_MATCH_LABELS = {
    'zero': 0, 'two': 2, 'text-1': '1', 'text-minus-1': '-1', 'half': 0.5, 'nan': float('nan'),
    'inf': float('inf'), 'none': None, 'false': False, 'list': [1], 'dict': {}, 'word': 'positive',
    'empty': '', 'bytes': b'1', 'ndarray': np.array([1]), 'ndarrays': np.array([1, -1]),
    'ndarray-0': np.array([]), 'tensor': torch.tensor(1), 'huge': 10**5000,
}  # fmt: skip

BAD_SCORES = {
    'nan': float('nan'), 'nan32': np.float32('nan'), 'inf': float('inf'), 'minus-inf': -float('inf'),
    'minus': -0.1, 'above': 1.1, 'percent': 50, 'text': '0.5', 'list': [0.5], 'dict': {'value': 1},
    'bytes': b'1', 'ndarray': np.array([0.5]), 'ndarrays': np.array([0.5, 0.6]),
    'tensor': torch.tensor(0.5), 'complex': 0.5j, 'huge': 10**5000,
}  # fmt: skip

WRONG_FIELDS = {
    'text-int': ({'text': 5}, 'its text is 5, and takes a str'),
    'text-bytes': ({'text': b'a'}, "its text is b'a', and takes a str"),
    'text-list': ({'text': ['a']}, r"its text is \['a'\], and takes a str"),
    'text-ndarray': ({'text': np.ones(3)}, r'its text is array.*, and takes a str'),
    'tensor-str': ({'tensor': 'abc'}, "its tensor is 'abc', and takes an array"),
    'tensor-int': ({'tensor': 5}, 'its tensor is 5, and takes an array'),
    'tensor-dict': ({'tensor': {'a': 1}}, 'its tensor is .*, and takes an array'),
    'tensor-object': ({'tensor': object()}, 'its tensor is <object.*, and takes an array'),
    'tensor-generator': ({'tensor': (n for n in 'ab')}, 'its tensor is <gen.*, and takes an array'),
    'blob-str': ({'blob': 'abc'}, "its blob is 'abc', and takes an array or bytes"),
    'blob-int': ({'blob': 5}, 'its blob is 5, and takes an array or bytes'),
    'blob-list': ({'blob': [1, 2]}, r'its blob is \[1, 2\], and takes an array or bytes'),
    'id-int': ({'id': 5, 'text': 'a'}, 'its id is 5, and takes a str'),
    'id-list': ({'id': ['x'], 'text': 'a'}, r"its id is \['x'\], and takes a str"),
    'modality': ({'text': 'a', 'modality': 5}, 'its modality is 5, and takes a str'),
    'empty': ({}, f'content {EMPTY}'),
    'text-blank': ({'text': ' \t\n'}, f'content {EMPTY}'),
    'uri-blank': ({'uri': '  '}, f'content {EMPTY}'),
    'blob-0-bytes': ({'blob': b''}, f'content {EMPTY}'),
    'tensor-0': ({'tensor': np.zeros((0, 32, 3))}, f'content {EMPTY}'),
    'tensor-empty-list': ({'tensor': []}, f'content {EMPTY}'),
    'tensor-torch-0': ({'tensor': torch.zeros(0)}, f'content {EMPTY}'),
    'blob-ndarray-0': ({'blob': np.zeros(0)}, f'content {EMPTY}'),
}  # fmt: skip
