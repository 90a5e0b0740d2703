"""Messages that mean harm: pickles in every place for one, broken protobuf, broken JSON."""

import base64
import contextlib
import gzip
import io
import pickle
import random
from pathlib import Path

import numpy as np
from docarray import Document, DocumentArray
from jina.proto import jina_pb2

from tests.integration.hostile_table import GOOD


class Payload:
    """What, unpickled, writes a file."""

    def __init__(self, trace: Path, way: int) -> None:
        self.trace = trace
        self.way = way

    def __reduce__(self):
        code = f'open({str(self.trace)!r}, "w").write("x")'
        return ((exec, (code,)), (eval, (code,)), (open, (str(self.trace), 'w')))[self.way]


def compressed(data, way):
    return gzip.compress(data) if way else data


def pickle_files(payload):
    """Files of many names with a pickle in them, in all the shapes that docarray writes."""
    plain = pickle.dumps(payload, protocol=payload.way + 2)
    stream = b'\x00' + (1).to_bytes(8, 'big') + len(plain).to_bytes(4, 'big') + plain
    stream_1 = b'\x01' + stream[1:]
    array = io.BytesIO()
    np.save(array, np.array([payload], dtype=object), allow_pickle=True)
    torch_like = io.BytesIO()
    import torch

    torch.save({'w': payload}, torch_like)
    for ending in ('.docs', '.csv', '.parquet', '.jsonl', '.db'):
        for content in (plain, stream, stream_1, gzip.compress(plain)):
            yield f'data{ending}', content
    yield 'data.docs', array.getvalue()
    for ending in ('.safetensors', '.pt', '.bin'):
        for content in (plain, torch_like.getvalue()):
            yield f'weights{ending}', content


def pickle_documents(payload):
    plain = pickle.dumps(payload)
    array = io.BytesIO()
    np.save(array, np.array([payload], dtype=object), allow_pickle=True)
    for content in (plain, gzip.compress(plain), array.getvalue()):
        yield Document(blob=content)
        yield Document(
            uri=f'data:application/octet-stream;base64,{base64.b64encode(content).decode()}'
        )


def raw_requests(payload):
    """Requests of gRPC that carry pickles where Jina or numpy might take them for one."""
    for protocol in ('pickle', 'pickle-array'):
        for way in (None, 'gzip', 'lz4'):
            request = jina_pb2.DataRequestProto()
            request.header.exec_endpoint = '/encode'
            docs = DocumentArray([Document(text='x', tags={'a': 1})])
            with contextlib.suppress(ImportError):
                docs.to_bytes(protocol=protocol, compress=way)
            request.data.docs_bytes = compressed(pickle.dumps(payload), way)
            yield request
    for dtype in ('O', 'object', '|O8', 'V8'):
        request = jina_pb2.DataRequestProto()
        request.header.exec_endpoint = '/encode'
        doc = request.data.docs.docs.add(id='a')
        doc.tensor.dense.buffer = pickle.dumps(payload)
        doc.tensor.dense.dtype = dtype
        doc.tensor.dense.shape.extend([1])
        doc.tensor.cls_name = 'numpy'
        yield request


def deep_document(levels):
    """Chunks in chunks, built from the inside: no library nests them so deep."""
    inner = b'\x0a\x01a'
    for _ in range(levels):
        size, length = len(inner), b''
        while True:
            size, low = size >> 7, size & 0x7F
            length += bytes([low | (0x80 if size else 0)])
            if not size:
                break
        inner = b'\x62' + length + inner
    return inner


def broken_messages():
    rng = random.Random(3)
    request = jina_pb2.DataRequestProto()
    request.header.exec_endpoint = '/encode'
    request.data.docs.docs.add(id='a', blob=GOOD[0].blob)
    whole = request.SerializeToString()
    for _ in range(60):
        yield rng.randbytes(rng.randrange(1, 500))
    for _ in range(60):
        yield whole[: rng.randrange(len(whole))]
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(3):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        yield bytes(changed)
    for levels in (50, 90, 150, 1_000, 10_000):
        nested = jina_pb2.DataRequestProto()
        nested.header.exec_endpoint = '/encode'
        document = deep_document(levels)
        data = jina_pb2.DataRequestProto.DataContentProto.DESCRIPTOR.fields_by_name['docs'].number
        array = _field(1, document)
        body = _field(data, array)
        number = jina_pb2.DataRequestProto.DESCRIPTOR.fields_by_name['data'].number
        yield nested.SerializeToString() + _field(number, body)
    tags = jina_pb2.DataRequestProto()
    tags.CopyFrom(request)
    tags.data.docs.docs[0].tags.update({f'tag {i}': float('nan') for i in range(50_000)})
    yield tags.SerializeToString()
    many = jina_pb2.DataRequestProto()
    many.CopyFrom(request)
    many.parameters.update({f'parameter {i}': i for i in range(50_000)})
    yield many.SerializeToString()
    huge = jina_pb2.DataRequestProto()
    huge.CopyFrom(request)
    tensor = huge.data.docs.docs[0].tensor
    tensor.dense.shape.extend([1 << 20, 1 << 20])
    tensor.dense.dtype, tensor.cls_name = '<f8', 'numpy'
    yield huge.SerializeToString()


def _field(number, payload):
    size, length = len(payload), b''
    while True:
        size, low = size >> 7, size & 0x7F
        length += bytes([low | (0x80 if size else 0)])
        if not size:
            break
    return bytes([number << 3 | 2]) + length + payload


def broken_json():
    good = base64.b64encode(GOOD[0].blob).decode()
    doc = f'{{"blob": "{good}"}}'
    deep = '[' * 100_000
    yield from (
        '', '{', '[]', '3', 'null', '"text"', deep, '{"data": ' + deep, '{"data":' * 50_000, '{"data": 3}',
        '{"data": [3]}', '{"data": [[]]}', '{"data": [null]}', '{"data": {"docs": 3}}', '{"data": "x"}',
        '{"parameters": 3}', '{"parameters": []}', '{"exec_endpoint": 3}', '{"unknown": 1}',
        f'{{"data": [{doc}], "data": [{doc}]}}', f'{{"data": [{doc}], "parameters": {{"batch_size": 1e400}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": NaN}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": Infinity}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": {"9" * 4000}}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": {"9" * 100_000}}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": -0.5}}}}',
        f'{{"data": [{doc}], "parameters": {{"batch_size": {{"a": 1}}}}}}',
        '{"data": [{"tags": {"a": NaN}, "text": "x"}]}', '{"data": [{"tags": 3}]}',
        '{"data": [{"tags": ' + '{"a":' * 500 + '1' + '}' * 500 + '}]}',
        '{"data": [{"chunks": ' + '[{"chunks": ' * 300 + '[]' + '}]' * 300 + '}]}',
        '{"data": [{"tensor": ' + '[' * 200 + '1' + ']' * 200 + '}]}',
        '{"data": [{"tensor": [1, [2]]}]}', '{"data": [{"tensor": ["x"]}]}',
        '{"data": [{"tensor": [NaN, Infinity, 1e999]}]}', '{"data": [{"tensor": [' + '9' * 400 + ']}]}',
        '{"data": [{"blob": "=%"}]}', '{"data": [{"blob": 3}]}', '{"data": [{"blob": "_-"}]}',
        '{"data": [{"text": "\\ud800"}]}', '{"data": [{"id": "\\u0000"}]}', '{"data": [{"weight": 1e999}]}',
        '{"data": [{"offset": 99999999999999999999999}]}', '{"data": [{"__class__": "x"}]}',
        '{"data": [{"embedding": [[[]]]}]}', '{"data": [{"mime_type": "' + 'x' * 100_000 + '"}]}',
    )  # fmt: skip
    yield from (
        b'\xff\xfe{}',
        b'{"data": "\xff"}',
        b'\xef\xbb\xbf{}',
        b'\0',
        '{"data": []}'.encode('utf-32'),
    )
