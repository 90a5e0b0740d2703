"""Requests about collections that mean harm, or were made without care."""

import base64
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from docarray import Document
from docarray.proto.docarray_pb2 import DocumentProto
from PIL import Image

from finetuner.data.stored import storing

HEIGHT, WIDTH = 4, 5
BIG = '1' + '0' * 400
LONG = 'x' * 10**6


def picture(height: int = HEIGHT, width: int = WIDTH, mode: str = 'RGB', kind: str = 'PNG') -> str:
    """The file of a picture in base64."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 200, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def flat_picture(size: int) -> str:
    """One of a single colour: of few bytes, however large it is."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((size, size), np.uint8)).save(file, 'PNG')
    return base64.b64encode(file.getvalue()).decode()


PICTURE = picture()


def new_bodies() -> Iterator[str | bytes]:
    """Of `POST /data`; all but a few are wrong."""
    names = (r'\u0000', r'\ud800', r'\u202e x', 'a\\nb', LONG, '', ' ')
    yield from (f'{{"name":"{name}"}}' for name in names)
    for key, values in {
        'name': ('5', '["x"]', '1e999', 'null', '[' * 900 + ']' * 900),
        'mltype': ('5', r'"\ud800"', f'"{LONG}"'),
        'tile_size': (
            *('[0,5]', '[-1,5]', '[2.5,3]', '[true,true]', '["4","5"]', '[NaN,5]', '[Infinity,5]'),
            *('[1e308,5]', f'[{BIG},5]', '[1000000000,1000000000]', '[5]', '"55"', 'null'),
            *('[8001,8000]', f'[1{"0" * 5000},5]'),
        ),
        'partition': (
            *('[NaN,1,2]', '[Infinity,1,2]', '[-10,10,100]', '[50,10,10]', '["70",20,10]'),
            *('[1e308,1e308,10]', '[true,0,99]', '[]', '5'),
        ),
        'classes': (
            *('[]', '["a","a"]', '[""]', f'["{LONG}"]', r'["\u0000"]', r'["\ud800"]', '"abc"'),
            *('{"a":1}', '[null]', json.dumps([f'{i:020}' for i in range(100_001)])),
            json.dumps([f'{i:030}' for i in range(90_000)]),
        ),
        'public': ('"yes"', '1', 'null'),
        'description': (r'"\ud800"', f'"{LONG}"', r'"\u0000"', '5'),
        'pairs': (
            *(r'{"documents":"\ud800"}', r'{"documents":"\u0000"}', f'{{"documents":"{LONG}"}}'),
            *('{"documents":"../../etc/passwd"}', f'{{"documents":"sha256:{"0" * 64}"}}'),
            *('{"documents":5}', '{"documents":"x","classes":[]}', '[]'),
        ),
        r'\ud800': ('1',),
        'unknown': ('{}',),
    }.items():
        yield from (f'{{"name":"t{key}","{key}":{value}}}' for value in values)
    yield from ('[' * 100_000, '{"a":' * 100_000, '', 'null', '[]', '5', b'\xff\xfe')
    yield b'{"name":"\xff"}'


NUMBERS = (
    *('-1', '0', str(2**63 - 1), str(2**63), str(2**64), str(2**70), '9' * 5000, '%D9%A1', '1e3'),
    *('1_000', '+5', '%00', '0x1', '00000000000000000000001'),
)

TEXTS = (
    *('"', 'a"b', 'NEAR(a b)', '*', '-a', 'name:x', 'words:a', '^a', 'a AND', 'OR', '{a}:b', 'a*'),
    *('(', ')', "'", ';', '\\', '_', 'a_b', '\0', 'a\0b', 'x' * 1000, '漢' * 1000, '𠀀' * 1000),
    *('a ' * 500, '!!!', '²', '٣', '्', '\u200d', 'e\u0301', '\U0001f600', 'İ', 'a & b', 'a <-> b'),
    *('!a', 'a:*b', 'the', "a'; DROP TABLE collections", '\ufeff'),
)

QUERIES = (
    *(
        'bbox=nan,nan,nan,nan',
        'bbox=1,1,0,0',
        'bbox=-inf,-inf,inf,inf',
        'bbox=1e999,1,2,3',
        'bbox=',
    ),
    *('bbox=1,2,3', 'bbox=1,2,3,4,5', 'bbox=200,0,10,1', 'bbox=0,5,1,-5', 'mltype=x', 'mltype=%00'),
    *('classes=%00', 'classes=%FF', 'classes=', 'text=' + 'x' * 2000, 'limit=0', 'limit=1001'),
    '&'.join(f'classes=a{i}' for i in range(101)),
    '&'.join(['classes=a'] * 4000),
)

BANDS = (
    *(
        'nan,0,0',
        'inf,0,0',
        '1e308,0,0',
        '1000000000,0,0',
        '',
        '0,0',
        '-1,0,0',
        '0.5,0,0',
        '0,%00,1',
    ),
    *('%D9%A1,0,0', '1_0,0,0', ','.join(['0'] * 1000), f'{"9" * 5000},0,0'),
)


def pictures() -> Iterator[str]:
    """Files that are no pictures for a collection, in base64 or what is none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    for width, height in ((50_000, 50_000), (2**31 - 1, 1)):
        head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
        data = (
            chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(bytes(10**5))) + chunk(b'IEND', b'')
        )
        yield base64.b64encode(b'\x89PNG\r\n\x1a\n' + data).decode()
    tiff = bytearray(base64.b64decode(picture(kind='TIFF')))
    place = tiff.index(struct.pack('<HHI', 256, 4, 1))
    tiff[place + 8 : place + 12] = struct.pack('<I', 2**31 - 1)
    yield base64.b64encode(tiff).decode()
    yield PICTURE[:80]
    yield picture(8, 8)
    yield picture(mode='F', kind='TIFF')
    yield from ('', '!!', 'é', 'A', 'A' * 10**6, 'AAAA AAAA', f'data:image/png;base64,{PICTURE}')
    yield from ('/etc/passwd', 'http://127.0.0.1:1/x.png', r'\ud800')
    for text in (
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b'%!PS\n',
        b'/etc/passwd',
        b'\x89PNG',
    ):
        yield base64.b64encode(text).decode()


def _nested(depth: int) -> str:
    return '[' * depth + ']' * depth


VECTORS = (
    *('1', 'null', '[1,2]', '[NaN]', '[Infinity]', '[1e999]', f'[{BIG}]', '[[1]]', '{}', '{"a":1}'),
    *('""', '[]', r'"\ud800"', r'["\ud800"]', r'"\u0000"', '[{}]', '[0.5]', '["a",1]', f'"{LONG}"'),
    *(_nested(39), _nested(300), _nested(800), _nested(940), '{"a":' * 450 + '1' + '}' * 450),
)

BOXES = (
    *('1', 'null', '""', '[[[]]]', '{"a":[[NaN,0,1,1]]}', '{"a":[[0,0,Infinity,1]]}'),
    *('{"a":[[0,0,1e308,1]]}', f'{{"a":[[0,0,{BIG},1]]}}', '{"a":[["0","0","1","1"]]}'),
    *('{"a":[[true,false,1,1]]}', '{"a":[0,0,1,1]}', '{"a":{"b":1}}', '{"a":"abcd"}', '{"a":null}'),
    *('{"":[]}', r'{"\ud800":[]}', r'{"\u0000":[]}', f'{{"{LONG}":[]}}', f'[[{BIG}]]', f'[{BIG}]'),
    *('[null]', '["x"]', _nested(300), _nested(900), f'{{"a":{_nested(900)}}}'),
    f'{{"a":[[0,0,{_nested(900)},1]]}}',
    '[' + ','.join(['[0,0,1,1]'] * 100_001) + ']',
    json.dumps({f'c{i}': [] for i in range(10_001)}),
)
# a box of less than a pixel is one
TINY_BOX = '{"a":[[5e-324,0,1e-323,1]]}'


def _collections(depth: int) -> str:
    inner = '{"type":"Point","coordinates":[1,1]}'
    return '{"type":"GeometryCollection","geometries":[' * depth + inner + ']}' * depth


def _polygon(corner: str) -> str:
    return f'{{"type":"Polygon","coordinates":[[[0,0],{corner},[1,1],[0,0]]]}}'


GEOMETRIES = (
    *('null', '5', '[]', '{}', '{"type":"Polygon"}', '{"type":"Polygon","coordinates":null}'),
    *(
        f'{{"type":"Polygon","coordinates":{c}}}'
        for c in ('5', '[]', '[[]]', '[[[0,0]]]', '"[[]]"')
    ),
    *map(_polygon, ('["1","0"]', '[NaN,0]', '[Infinity,0]', '[1e308,0]', f'[{BIG},0]', '5', '{}')),
    *map(_polygon, ('[1,[1]]', '[1]', 'null', '[null,null]', '"ab"')),
    f'{{"type":"Polygon","coordinates":{_nested(900)}}}',
    *(f'{{"type":"Point","coordinates":{c}}}' for c in ('[1]', '{"0":1}', '"ab"', '[null,null]')),
    *(f'{{"type":"Point","coordinates":{c}}}' for c in ('[[1,1]]', '[1e308,1e308]', '5')),
    *('{"type":"MultiPoint","coordinates":[]}', '{"type":"LineString","coordinates":[[0,0]]}'),
    '{"type":"LineString","coordinates":[[-1e308,-1e308],[1e308,1e308]]}',
    '{"type":"MultiLineString","coordinates":[[[0,0],[1,1]],[]]}',
    *('{"type":["Polygon"],"coordinates":[]}', '{"type":{"a":1},"coordinates":[]}'),
    *('{"type":"Foo","coordinates":[1,1]}', '{"type":"polygon","coordinates":[[[0,0]]]}'),
    *('{"type":"GeometryCollection"}', '{"type":"GeometryCollection","geometries":null}'),
    '{"type":"GeometryCollection","geometries":[5]}',
    *map(_collections, (15, 50, 200, 455)),
)


def feature(geometry: str, properties: str = '{"label":"a"}') -> str:
    """GeoJSON."""
    return f'{{"type":"Feature","properties":{properties},"geometry":{geometry}}}'


def masks() -> Iterator[str]:
    """Labels that are no masks."""
    yield from ('1', 'null', '""', '"abc"', '{}', '[{}]', '[[1,2],[3]]', _nested(60), _nested(900))
    rows = '[0,0,0,0,0],' * 3
    for value in ('1e308', 'NaN', BIG, '"x"', '-1', '256', '[]', '0.5'):
        yield f'[{rows}[0,0,0,0,{value}]]'
    for features in ('null', '5', '[5]', '{}', '""'):
        yield f'{{"type":"FeatureCollection","features":{features}}}'
    point = '{"type":"Point","coordinates":[1,1]}'
    for properties in (
        '{"label":[5]}',
        r'{"label":"\ud800"}',
        f'{{"label":"{LONG}"}}',
        '{"label":{}}',
    ):
        yield feature(point, properties)
    yield from map(feature, GEOMETRIES)


def endless_shapes() -> Iterator[list[dict[str, Any]]]:
    """Features of a mask of 256 x 256 whose drawing would never end, though nothing is wrong with them."""

    def features(*geometries: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {'type': 'Feature', 'properties': {'label': 'a'}, 'geometry': each}
            for each in geometries
        ]

    line = [[1e9 * (-1) ** i, 1e9 * (-1) ** (i // 2)] for i in range(20_000)]
    yield features({'type': 'LineString', 'coordinates': line})
    yield features({'type': 'LineString', 'coordinates': [[-1e12, 3], [1e12, 5]]})
    far = {'type': 'LineString', 'coordinates': [[-2e9, -2e9], [-1e9, 2e9]]}
    yield features(*[far] * 1000)
    angles = np.arange(30_000) * 2.399963
    star = [[128 + 1e3 * math.cos(angle), 128 + 1e3 * math.sin(angle)] for angle in angles]
    yield features({'type': 'Polygon', 'coordinates': [[*star, star[0]]]})


def systems(port: int, fifo: str) -> Iterator[str]:
    """Names of coordinate systems that would have a file or a connection opened, or are none.

    Args:
        port: of this machine, where somebody listens.
        fifo: path of a named pipe: whoever opens it waits for ever.
    """
    yield from (f'http://127.0.0.1:{port}/x', f'https://127.0.0.1:{port}/x', fifo, f'file://{fifo}')
    yield from (f'+proj=longlat +nadgrids={fifo}', f'+proj=longlat +nadgrids=@null,{fifo}')
    yield from (f'+init={fifo}:1', f'+proj=longlat +geoidgrids=@{fifo}', f'ESRI::{fifo}')
    spheroid = 'SPHEROID["WGS84",6378137,298.257223563]'
    tail = 'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]'
    grids = f'EXTENSION["PROJ4_GRIDS","{fifo}"]'
    yield f'GEOGCS["x",DATUM["x",{spheroid},{grids}],{tail}]'
    yield f'GEOGCS["x",DATUM["x",{spheroid}],{tail},EXTENSION["PROJ4","+init={fifo}:1"]]'
    yield f'+proj=pipeline +step +proj=hgridshift +grids={fifo}'
    yield from (
        '[1]',
        '\0',
        'EPSG:4326:5',
        LONG,
        'PROJCS[' * 10**5,
        '{' * 10**5,
        'A[' * 300 + ']' * 300,
    )


TRANSFORMS: tuple[Any, ...] = (
    *([1e308] * 6, [1e308, 0, 1e308, 0, 1e308, 1e308], [1e200, 0, 0, 0, 1e200, 0], [0] * 6),
    *([1e-200, 0, 0, 0, 1e-200, 0], [1, 0, 0, 0, 1], 'x', [1, 0, 0, 0, 1, 'a'], {'a': 1}),
    [1e307, 0, 1.7e308, 0, 1e-9, 0],
)


def tensors() -> Iterator[np.ndarray]:
    """Images that none is."""
    good = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    yield from (np.array(5, np.uint8), good[:0], good[:, :0], good.astype(np.complex64), good[None])
    yield from (np.zeros(5), np.zeros((2000, HEIGHT, WIDTH), np.uint8))


def records() -> Iterator[bytes]:
    """Documents that no library would write."""
    for change in (
        *({'dtype': 'O'}, {'dtype': '|V4'}, {'dtype': 'f4,f4'}, {'dtype': 'zzz'}, {'buffer': b''}),
        *({'dtype': '<M8[s]', 'shape': (1,), 'buffer': bytes(8)}, {'dtype': '<U1', 'shape': (15,)}),
        *(
            {'buffer': b'', 'shape': (60_000, 60_000)},
            {'shape': (2**32 - 1, 4, 5)},
            {'shape': (2**31, 2**31 - 1, 4)},
            {'cls': 'tensorflow'},
        ),
        *(
            {'cls': 'os.system'},
            {'cls': 'scipy_csr', 'sparse': True},
            {'cls': 'torch', 'sparse': True},
        ),
    ):
        told = {'dtype': '|u1', 'shape': (3, 4, 5), 'buffer': bytes(60), 'cls': 'numpy', **change}
        message = DocumentProto(id='x')
        message.tags.update({'label': 'a'})
        message.tensor.cls_name = told['cls']
        message.tensor.dense.buffer, message.tensor.dense.dtype = told['buffer'], told['dtype']
        message.tensor.dense.shape.extend(told['shape'])
        if told.get('sparse'):
            message.tensor.sparse.shape.extend(told['shape'])
        record = message.SerializeToString()
        yield len(record).to_bytes(storing.LENGTH_BYTES, 'big') + record


def tags() -> Iterator[dict[str, Any]]:
    """Of Documents that are no pairs for what they say of themselves."""
    yield from ({'group': value} for value in (5, {'a': LONG}, LONG, 'a\0', '', True))
    yield from ({'label': value} for value in (None, LONG, [0.5], {'a': 1}, [[1]]))
    yield from ({'transform': value, 'crs': 'EPSG:32613'} for value in TRANSFORMS)
    place = [0.5, 0, 500_000, 0, -0.5, 4_400_000]
    yield from ({'transform': place, 'crs': value} for value in (5, True, ['EPSG:4326'], {'a': 1}))


def document(**more: Any) -> Document:
    """A pair, but for what is said otherwise."""
    told = {'label': 'a', **more.pop('tags', {})}
    return Document(**{'tensor': np.zeros((3, HEIGHT, WIDTH), np.uint8), 'tags': told, **more})


def floods(num_bytes: int) -> dict[str, bytes]:
    """Bodies of `POST /data` of some bytes that take many times as much memory, and time."""
    return {
        'lists in lists': b'{"name":"x","classes":[' + b'[],' * (num_bytes // 3) + b'[]]}',
        'numbers for names': b'{"name":"x","classes":[' + b'1,' * (num_bytes // 2) + b'1]}',
        'keys': b'{' + b','.join(b'"%d":1' % i for i in range(num_bytes // 12)) + b'}',
        'sensors': b'{"name":"x","pairs":{"documents":"x","sensors":['
        + b'1,' * (num_bytes // 2)
        + b'1]}}',
    }
