"""Pictures that mean harm: mutations of real ones, and bombs; run, a mill that reads them all.

`python -m tests.integration.hostile_pictures SEED COUNT` prints what became of them as JSON. It is
a process of its own, since a decoder that crashes takes its process with it.
"""

import functools
import io
import json
import random
import resource
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from finetuner.excepts import PictureError
from finetuner.images import load_picture
from tests.unit.bad_data_cases_pictures import huge_png, png_of, text_chunk_bomb

EMOJI = Path(__file__).parents[2] / 'examples' / 'emoji'
# far above what any needs: a hang ends here, a slow machine does not
SECONDS_EACH = 60
MEMORY = 4 << 30
ENCODINGS: tuple[tuple[str, str, dict], ...] = (
    ('JPEG', 'RGB', {}),
    ('JPEG', 'L', {}),
    ('JPEG', 'CMYK', {}),
    ('JPEG', 'RGB', {'progressive': True}),
    ('PNG', 'RGB', {}),
    ('PNG', 'P', {}),
    ('PNG', 'RGBA', {}),
    ('PNG', 'LA', {}),
    ('PNG', '1', {}),
    ('PNG', 'I;16', {}),
    ('WEBP', 'RGB', {}),
    ('WEBP', 'RGBA', {}),
    ('WEBP', 'RGB', {'lossless': True}),
    ('GIF', 'P', {}),
    ('BMP', 'RGB', {}),
    ('BMP', 'P', {}),
    ('BMP', '1', {}),
    ('TIFF', 'RGB', {}),
    ('TIFF', 'CMYK', {}),
    ('TIFF', 'P', {}),
    ('TIFF', 'I;16', {}),
    ('TIFF', 'F', {}),
    ('TIFF', '1', {'compression': 'group3'}),
    ('TIFF', '1', {'compression': 'group4'}),
    *(
        ('TIFF', 'RGB', {'compression': name})
        for name in ('tiff_lzw', 'tiff_deflate', 'jpeg', 'packbits', 'zstd', 'lzma')
    ),
)


def encoded(image: Image.Image, kind: str, mode: str, options: dict) -> bytes:
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def healthy() -> list[bytes]:
    """Emoji pictures in every encoding there is, and each way round."""
    files = sorted(EMOJI.rglob('*.webp'))
    made = []
    for number, (kind, mode, options) in enumerate(ENCODINGS):
        for file in files[number :: len(files) // 3]:
            made += [file.read_bytes(), encoded(Image.open(file), kind, mode, options)]
    turned = Image.open(files[0]).convert('RGB')
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x112] = orientation
        made += [encoded(turned, kind, 'RGB', {'exif': exif}) for kind in ('JPEG', 'PNG', 'WEBP')]
    return made


def frames(kind: str, number: int) -> bytes:
    shades = [Image.new('L', (8, 8), shade % 256) for shade in range(number)]
    buffer = io.BytesIO()
    shades[0].save(buffer, kind, save_all=True, append_images=shades[1:])
    return buffer.getvalue()


def long_tiff(compression: str) -> bytes:
    """One pixel of data that says it is eight million rows."""
    mode = '1' if compression.startswith('group') else 'L'
    options = {'compression': compression}
    data = bytearray(encoded(Image.new('L', (8, 8)), 'TIFF', mode, options))
    (directory,) = struct.unpack_from('<I', data, 4)
    (number,) = struct.unpack_from('<H', data, directory)
    for at in range(directory + 2, directory + 2 + 12 * number, 12):
        if struct.unpack_from('<H', data, at)[0] in (257, 278):
            struct.pack_into('<HII', data, at + 2, 4, 1, 8_000_000)
    return bytes(data)


def many_scans() -> bytes:
    """A JPEG of 16 million pixels, decoded a thousand times over."""
    data = encoded(Image.new('L', (4000, 4000), 99), 'JPEG', 'L', {'progressive': True})
    return data[:-2] + data[data.rindex(b'\xff\xda') : -2] * 1000 + data[-2:]


def webp_of(width: int, height: int) -> bytes:
    """A lossless WebP of a few bytes that says it is this large."""
    bits = (width - 1) | (height - 1) << 14
    chunk = b'\x2f' + struct.pack('<I', bits) + bytes(20)
    body = b'WEBPVP8L' + struct.pack('<I', len(chunk)) + chunk + b'\x00' * (len(chunk) % 2)
    return b'RIFF' + struct.pack('<I', len(body)) + body


BOMBS: tuple[Callable[[], bytes], ...] = (
    huge_png,
    text_chunk_bomb,
    many_scans,
    lambda: png_of(7900, 8000, bytes(7901 * 8000), bits=8, colour=0),
    lambda: png_of(60_000, 1_000, bytes(60_000), bits=8, colour=2),
    lambda: webp_of(16_000, 16_000),
    lambda: webp_of(7_900, 8_000),
    *(
        functools.partial(frames, *args)
        for args in (('GIF', 4000), ('PNG', 1000), ('WEBP', 1000), ('TIFF', 1000))
    ),
    *(
        functools.partial(long_tiff, name)
        for name in ('group3', 'group4', 'tiff_lzw', 'tiff_deflate', 'packbits', 'lzma')
    ),
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One of many ways to damage a picture."""
    changed = bytearray(data)
    way, at = rng.randrange(7), rng.randrange(len(data))
    if way == 0:
        for _ in range(rng.choice((1, 2, 5, 20))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del changed[at:]
    elif way == 2:
        for _ in range(rng.choice((1, 2, 5))):
            changed[rng.randrange(min(len(changed), 200))] = rng.choice((0, 127, 128, 255))
    elif way == 3:
        del changed[at : at + rng.randrange(1, 64)]
    elif way == 4:
        changed[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif way == 5:
        width = rng.choice((2, 4))
        changed[at : at + width] = rng.choice((b'\xff', b'\0', b'\x7f', b'\x80')) * width
    else:
        other = rng.choice(healthy())
        changed[at:] = other[rng.randrange(len(other)) :]
    return bytes(changed)


def hostile(seed: int, count: int, bombs: bool = True) -> Iterator[bytes]:
    """Mutations, and among the first all bombs."""
    rng = random.Random(seed)
    special = list(BOMBS) if bombs else []
    for number in range(count):
        if number < len(special):
            yield special[number]()
        else:
            yield mutated(rng.choice(healthy()), rng)


def mill(seed: int, count: int) -> dict:
    """Read them all; whatever is neither a picture nor a clear refusal is told."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    found: Counter[str] = Counter()
    others = []
    for number, data in enumerate(hostile(seed, count, bombs=seed == 0)):
        signal.alarm(SECONDS_EACH)
        try:
            pixels = load_picture(data, 64)
            found['survived' if pixels.shape == (64, 64, 3) else 'other'] += 1
        except PictureError as error:
            found['refused' if len(str(error)) > 20 else 'other'] += 1
        except BaseException as error:
            found['other'] += 1
            others.append(f'{seed}/{number}: {error!r}'[:300])
    signal.alarm(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {**found, 'tried': count, 'others': others, 'peak': peak}


if __name__ == '__main__':
    print(json.dumps(mill(*map(int, sys.argv[1:]))))
