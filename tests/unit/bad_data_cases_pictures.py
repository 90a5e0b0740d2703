"""Pictures that cannot be opened, with what is said of each; and odd ones that can."""

from __future__ import annotations

import base64
import functools
import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
import scipy.sparse
import torch
from docarray import Document
from PIL import Image

DAMAGED = 'not a picture, or too damaged to be one'
CANNOT = 'the picture cannot be opened: '
TOO_MANY = 'pixels, more than the 64,000,000 allowed: make it smaller'
TOO_MANY_FOR_PILLOW = 'it has more pixels than the 64,000,000 allowed: make it smaller'


def case(name, make, expected, **marks):
    return pytest.param(make, expected, id=name, **marks)


@functools.cache
def encoded(kind='PNG', mode='RGB', size=(48, 40), **options):
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def animated(kind):
    frames = [Image.new('RGB', (40, 40), colour) for colour in ('red', 'green', 'blue')]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=50)
    return buffer.getvalue()


def cut(kind, keep=0.5):
    data = encoded(kind)
    return data[: int(len(data) * keep)]


def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def png_of(width, height, rows, bits=8, colour=2, before=b''):
    """A PNG that says it is of this size; `rows` are its bytes, compressed."""
    header = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
    start = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + before
    return start + chunk(b'IDAT', zlib.compress(rows, 9)) + chunk(b'IEND', b'')


@functools.cache
def huge_png():
    """30,000 x 30,000 pixels of one bit, all there: 112 MB of rows in 110 kB."""
    return png_of(30_000, 30_000, bytes(30_000 * (1 + 30_000 // 8)), bits=1, colour=0)


def grey16():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(buffer, 'PNG')
    return buffer.getvalue()


def blob(data):
    return lambda folder: Document(blob=data() if callable(data) else data)


def array(values):
    return lambda folder: Document(tensor=values)


def uri(text):
    """A Document with a uri, in which FOLDER stands for the folder of the test."""
    return lambda folder: Document(uri=text.replace('FOLDER', str(folder)))


def file(data, name='a.jpg', address='FOLDER/{name}'):
    def make(folder):
        path = folder / name
        path.write_bytes(data() if callable(data) else data)
        return Document(uri=address.format(name=name).replace('FOLDER', str(folder)))

    return make


def fifo(folder):
    os.mkfifo(folder / 'pipe.png')
    return Document(uri=str(folder / 'pipe.png'))


def unix_socket(folder):
    # the path of a socket is at most 108 bytes
    here = os.open('.', os.O_RDONLY)
    try:
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind('socket.png')
    finally:
        os.fchdir(here)
        os.close(here)
    return Document(uri=str(folder / 'socket.png'))


def loop_of_links(folder):
    (folder / 'a.png').symlink_to(folder / 'b.png')
    (folder / 'b.png').symlink_to(folder / 'a.png')
    return Document(uri=str(folder / 'a.png'))


def unreadable(folder):
    doc = file(encoded())(folder)
    os.chmod(doc.uri, 0)
    return doc


def closed_port(scheme='http'):
    def make(folder):
        with socket.socket() as server:
            server.bind(('127.0.0.1', 0))
            port = server.getsockname()[1]
        return Document(uri=f'{scheme}://127.0.0.1:{port}/a.png')

    return make


def text_chunk_bomb():
    bomb = zlib.compress(bytes(200_000_000), 9)
    return png_of(40, 40, bytes(40 * 121), before=chunk(b'zTXt', b'Comment\0\0' + bomb))


def data_uri(data, kind='image/png'):
    return f'data:{kind};base64,{base64.b64encode(data).decode()}'


HTML = b'<!DOCTYPE html><html><body>404 Not Found</body></html>'
GREY = np.full((40, 40, 3), 128, dtype=np.uint8)
as_root = pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root reads everything'
)

BROKEN = [
    # files
    case('0-bytes', file(b''), r'file .*a\.jpg.* is empty \(0 bytes\)'),
    case('html-named-jpg', file(HTML), rf"{DAMAGED}: its 54 bytes start with b'<!DOCTYPE"),
    case('text', file(b'a dog on a lawn\n'), DAMAGED),
    case('one-byte', file(b'\xff'), f'{DAMAGED}: its 1 bytes'),
    case('random', file(np.random.default_rng(0).bytes(5000)), DAMAGED),
    case('zeros', file(bytes(5000)), DAMAGED),
    case('zip', file(b'PK\x03\x04' + bytes(200)), DAMAGED),
    case('svg', file(b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'a.svg'), DAMAGED),
    case('missing', uri('FOLDER/gone.png'), r'there is no file .*gone\.png'),
    case('missing-relative', uri('no/such/a.png'), "there is no file 'no/such/a.png'"),
    case('missing-home', uri('~/no/such/a.png'), "there is no file '~/no/such/a.png'"),
    case('missing-user', uri('~nobody-of-that-name/a.png'), 'there is no file'),
    case('folder', uri('FOLDER'), 'cannot be opened: it is a folder'),
    case('folder-slash', uri('FOLDER/'), 'cannot be opened: it is a folder'),
    case('below-a-file', file(encoded(), address='FOLDER/{name}/b.png'), 'cannot be opened: '),
    case('fifo', fifo, 'is not a regular file'),
    case('socket', unix_socket, 'cannot be opened: '),
    case('device-zero', uri('/dev/zero'), 'is not a regular file'),
    case('device-null', uri('/dev/null'), 'is not a regular file'),
    case('process', uri('/proc/self/mem'), 'is empty|cannot be opened'),
    case('loop-of-links', loop_of_links, 'cannot be opened: '),
    case('no-permission', unreadable, 'cannot be opened: Permission denied', marks=as_root),
    case('long-uri', uri('x' * 10_000), r"file 'x{200}\.\.\.' cannot be opened: File name too"),
    case('nul', uri('a\0.png'), r"path 'a\\x00.png' holds a zero byte"),
    case('surrogate', uri('\ud800.png'), r"path '\\ud800.png' .*no UTF-8"),
    # uris
    case('file-of-host', uri('file://host/a.png'), "names the host 'host': files are local"),
    case('file-nul', uri('file:///a%00.png'), 'holds a zero byte'),
    case('file-missing', uri('file:///no/such/a%20b.png'), "there is no file 'file:///no/such"),
    case('file-bad-host', uri('file://[1/a.png'), 'is not a valid uri'),
    case('ftp', uri('ftp://example.org/a.png'), "has the scheme 'ftp': .* file, http, https, data"),
    case('s3', uri('s3://bucket/a.png'), "has the scheme 's3'"),
    case('gs', uri('gs://bucket/a.png'), "has the scheme 'gs'"),
    case('http-closed', closed_port(), 'cannot be fetched: .*refused'),
    case('https-closed', closed_port('https'), 'cannot be fetched: .*refused'),
    case('http-no-network', uri('http://example.org/a.png'), 'cannot be fetched: '),
    case('http-no-host', uri('http:///a.png'), r'is not a plain http\(s\) address'),
    case('http-bad-port', uri('http://127.0.0.1:99999999/a.png'), 'valid uri|cannot be fetched'),
    case('http-bad-brackets', uri('http://[::1/a.png'), 'is not a valid uri'),
    case('http-space', uri('http://a b/c.png'), 'is not a valid uri|cannot be fetched'),
    case('http-password', uri('http://me:secret@127.0.0.1/a.png'), r'not a plain http\(s\)'),
    case(
        'http-long',
        uri(f'http://127.0.0.1/{"x" * 100_000}'),
        'letters, more than the 8,192 allowed',
    ),
    case('data-no-comma', uri('data:image/png;base64'), 'has no comma before its content'),
    case('data-bad-base64', uri('data:image/png;base64,*'), 'is not valid base64'),
    case('data-cut-base64', uri(data_uri(encoded())[:-3]), 'is not valid base64'),
    case('data-empty', uri('data:image/png;base64,'), r'the picture is empty \(0 bytes\)'),
    case('data-text', uri('data:text/plain,a%20dog'), DAMAGED),
    case('data-cut-picture', uri(data_uri(cut('PNG'))), CANNOT),
    # cut and damaged
    case('cut-jpeg', file(lambda: cut('JPEG')), f'{CANNOT}Premature end'),
    case('cut-jpeg-late', file(lambda: cut('JPEG', 0.95)), f'{CANNOT}Premature end'),
    case('cut-jpeg-early', file(lambda: cut('JPEG', 0.05)), f'{CANNOT}|{DAMAGED}'),
    case('cut-png', file(lambda: cut('PNG')), CANNOT),
    case('cut-png-late', file(lambda: cut('PNG', 0.95)), CANNOT),
    case('cut-png-header', blob(encoded()[:20]), f'{CANNOT}|{DAMAGED}'),
    case('cut-webp', file(lambda: cut('WEBP')), CANNOT),
    case('cut-webp-header', blob(lambda: encoded('WEBP')[:14]), f'{CANNOT}|{DAMAGED}'),
    case('cut-gif', file(lambda: cut('GIF')), CANNOT),
    case('cut-animated-gif', blob(lambda: animated('GIF')[:60]), f'{CANNOT}|{DAMAGED}'),
    case('cut-animated-webp', blob(lambda: animated('WEBP')[:70]), f'{CANNOT}|{DAMAGED}'),
    case('cut-bmp', file(lambda: cut('BMP')), CANNOT),
    case('cut-tiff', file(lambda: cut('TIFF')), f'{CANNOT}|{DAMAGED}'),
    case('png-bad-checksum', blob(encoded()[:60] + b'\0\0\0\0' + encoded()[64:]), CANNOT),
    case('png-no-rows', blob(png_of(40, 40, b'')), CANNOT),
    case('png-0-wide', blob(png_of(0, 40, b'')), f'{CANNOT}|{DAMAGED}|is empty'),
    case('ico', blob(lambda: encoded('ICO')), f'{CANNOT}format ICO is not one of JPEG, PNG'),
    case('tiff-floats', blob(lambda: encoded('TIFF', 'F')), 'mode F .* no fixed range'),
    # large
    case('30000-header', blob(png_of(30_000, 30_000, b'')), TOO_MANY_FOR_PILLOW),
    case('30000-bomb', file(huge_png, 'a.png'), TOO_MANY_FOR_PILLOW),
    case('10000-header', blob(png_of(10_000, 10_000, b'')), f'10000 x 10000 .*{TOO_MANY}'),
    case(
        '2-billion-wide',
        blob(png_of(2**31 - 1, 2**31 - 1, b'')),
        f'{TOO_MANY_FOR_PILLOW}|{DAMAGED}',
    ),
    case(
        'gif-65535',
        blob(lambda: b'GIF89a\xff\xff\xff\xff' + encoded('GIF')[10:]),
        TOO_MANY_FOR_PILLOW,
    ),
    case('text-bomb', blob(text_chunk_bomb), f'{CANNOT}.*|{DAMAGED}'),
    case('too-many-bytes', blob(lambda: bytes(64 * 2**20 + 1)), 'larger than 67,108,864 bytes'),
    # arrays
    case('array-1d', array(np.zeros(40)), r'shape \[40\] is not a picture: \[H, W, 3\]'),
    case('array-4d', array(GREY[None]), r'shape \[1, 40, 40, 3\] is not a picture'),
    case('array-2-channels', array(GREY[..., :2]), r'shape \[40, 40, 2\] is not a picture'),
    case('array-5-channels', array(np.zeros((5, 40, 40))), r'shape \[5, 40, 40\] is not'),
    case('floats-above', array(GREY / 100), 'floats in 0..1'),
    case('floats-0-255', array(GREY.astype(float)), 'values from 128 to 128 .*floats in 0..1'),
    case('floats-minus', array(GREY / 255.0 - 1), 'floats in 0..1'),
    case('nan', array(np.full((40, 40, 3), np.nan)), 'values from nan to nan'),
    case('one-nan', array(np.where(np.arange(40) == 3, np.nan, np.eye(40))), 'values from nan'),
    case('inf', array(np.full((40, 40), np.inf)), 'values from inf to inf'),
    case('ints-above', array(GREY.astype(int) * 3), 'integers are in 0..255'),
    case('ints-minus', array(-GREY.astype(int)), 'integers are in 0..255'),
    case('bool-array', array(GREY > 3), 'an array of bool is not a picture'),
    case('complex-array', array(GREY * 1j), 'an array of complex128 is not a picture'),
    case('object-array', array(GREY.astype(object)), 'an array of object is not a picture'),
    case('str-array', array(GREY.astype(str)), 'an array of <U3 is not a picture'),
    case('list', array(GREY.tolist()), 'a list is not a picture'),
    case('ragged-list', array([[1], [1, 2]]), 'a list is not a picture'),
    case('scipy-sparse', array(scipy.sparse.csr_matrix(np.eye(40))), 'is not a picture'),
    case('torch-sparse', array(torch.eye(40).to_sparse()), 'is not a picture'),
    case('torch-nan', array(torch.full((3, 40, 40), torch.nan)), 'values from nan to nan'),
    case('torch-meta', array(torch.empty(3, 40, 40, device='meta')), 'is not a picture'),
    case('torch-bfloat16', array(torch.full((3, 40, 40), 0.5, dtype=torch.bfloat16)), 'BFloat16'),
    case('blob-of-arrays', lambda folder: Document(blob=GREY[None]), r'\[1, 40, 40, 3\] is not'),
    # no pictures
    case('a-text', lambda folder: Document(text='a dog'), r"holds text \('a dog'\), .*text model"),
]

OPENED = [
    case('cmyk-jpeg', file(lambda: encoded('JPEG', 'CMYK')), None),
    case('progressive-jpeg', file(lambda: encoded('JPEG', progressive=True)), None),
    case('grey-jpeg', file(lambda: encoded('JPEG', 'L')), None),
    case('16-bit-png', blob(grey16), None),
    case('1-bit-png', blob(lambda: encoded('PNG', '1')), None),
    case('palette-png', blob(lambda: encoded('PNG', 'P')), None),
    case('transparent-png', blob(lambda: encoded('PNG', 'RGBA')), None),
    case('1x1', blob(lambda: encoded(size=(1, 1))), None),
    case('1x60000', blob(lambda: encoded(size=(1, 60_000))), None),
    case('60000x1', blob(lambda: encoded('PNG', size=(60_000, 1))), None),
    case('animated-gif', blob(lambda: animated('GIF')), None),
    case('animated-webp', blob(lambda: animated('WEBP')), None),
    case('animated-png', blob(lambda: animated('PNG')), None),
    case('bytes-after-the-end', blob(encoded() + b'more'), None),
    case('png-named-jpg', file(encoded(), 'a.jpg'), None),
    case('no-ending', file(encoded(), 'picture'), None),
    case('spaces-and-umlauts', file(encoded(), 'schöne Bilder?#%41.png'), None),
    case('file-uri', file(encoded(), 'a.png', 'file://FOLDER/{name}'), None),
    case('file-uri-escaped', file(encoded(), 'a b%.png', 'file://FOLDER/a%20b%25.png'), None),
    case('file-uri-host', file(encoded(), 'a.png', 'FILE://localhost/FOLDER/{name}'), None),
    case('relative', file(encoded(), 'a.png', '{name}'), None),
    case('home', file(encoded(), 'a.png', '~/{name}'), None),
    case('data-uri', uri(data_uri(encoded())), None),
    case('data-uri-plain', uri(data_uri(encoded(), 'text/plain')), None),
    case('array', array(GREY), None),
    case('array-floats', array(GREY / 255), None),
    case('array-grey', array(GREY[..., 0]), None),
    case('array-channels-first', array(GREY.transpose(2, 0, 1)), None),
    case('array-int64', array(GREY.astype(np.int64)), None),
    case('array-big-endian', array(GREY.astype('>i4')), None),
    case('array-read-only', array(np.broadcast_to(GREY[:1], (40, 40, 3))), None),
    case('torch', array(torch.full((3, 40, 40), 0.5)), None),
    case('torch-with-gradient', array(torch.full((3, 40, 40), 0.5, requires_grad=True)), None),
    case('blob-ndarray', lambda folder: Document(blob=GREY), None),
    case('bytearray', blob(bytearray(encoded())), None),
]
