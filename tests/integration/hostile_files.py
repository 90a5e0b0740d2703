"""Zips, graphs and artifacts that mean harm, each under a name that says how."""

from __future__ import annotations

import io
import json
import shutil
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from onnx import helper

from finetuner.artifact_files import hash_file
from finetuner.model_spec import MANIFEST
from tests.conftest import png
from tests.unit.test_onnx_check import (
    branching,
    constant,
    function_model,
    handed_on,
    hidden_loop,
    hidden_place,
    model,
    sized,
    tensor,
)

PICTURE = png(np.zeros((4, 4, 3), np.uint8))


# zips: of one folder, as an artifact is, with what an artifact needs


def zip_of(
    members: Mapping[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action='ignore'), zipfile.ZipFile(buffer, 'w') as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = zipfile.ZipInfo('x')
            info.filename = name  # ZipInfo itself would mend some names
            info.compress_type = compression
            archive.writestr(info, data)
    return buffer.getvalue()


def special_member(kind: int, target: bytes = b'/etc/passwd') -> bytes:
    buffer = io.BytesIO()
    info = zipfile.ZipInfo('a/evil.png')
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('a/good.png', PICTURE)
        archive.writestr(info, target)
    return buffer.getvalue()


def patched(data: bytes, offset: int, value: bytes, local: int | None = None) -> bytes:
    """Change a field of the first entry in the zip's directory, and in the file's own header."""
    changed = bytearray(data)
    at = changed.index(b'PK\x01\x02') + offset
    changed[at : at + len(value)] = value
    if local is not None:
        changed[local : local + len(value)] = value
    return bytes(changed)


EVIL_NAMES = (
    '../evil', '../../../../../../tmp/evil', 'a/../../evil', 'a/../evil', '/tmp/evil', '//tmp/evil',
    '\\evil', '\\\\host\\share\\evil', 'a\\..\\..\\evil', 'C:/evil', 'C:evil', 'c:\\evil', 'a/C:/evil',
    'a/evil:stream', '..', '.', '', 'a/..', 'a/b/../../../evil', './../evil', '..\\evil', 'file:///evil',
    '\\\\?\\C:\\evil', 'a/./../../evil',
)  # fmt: skip


def hostile_zips() -> dict[str, bytes]:
    """50 zips; those of `harmless` in their names may be unpacked, as long as they stay inside."""
    plain = zip_of({'a/good.png': PICTURE}, zipfile.ZIP_DEFLATED)
    air = zip_of({'a/x.png': bytes(300 << 20)}, zipfile.ZIP_DEFLATED)
    zips = {f'path {name!r}': zip_of({'a/good.png': PICTURE, name: b'evil'}) for name in EVIL_NAMES}
    zips |= {
        f'member of kind {kind:o}': special_member(kind)
        for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
    }
    zips |= {
        'link to the root, and a file in it': zip_of(
            [('a/x/evil', b'x'), ('a/x', b'/tmp')]
        ),
        'one name twice': zip_of([('a/x', b'1'), ('a/x', b'2')]),
        'one name twice, written otherwise': zip_of([('a/x', b'1'), ('a//x', b'2')]),
        'a file that is a folder, too': zip_of([('a/x', b'1'), ('a/x/y', b'2')]),
        'names that differ in case (harmless)': zip_of({'a/x': b'1', 'a/X': b'2', 'A/x': b'3'}),
        '10,000:1 by bzip2': zip_of({'a/x.png': bytes(20 << 20)}, zipfile.ZIP_BZIP2),
        '7,000:1 by lzma': zip_of({'a/x.png': bytes(10 << 20)}, zipfile.ZIP_LZMA),
        '1,000:1': air,
        '1,000:1 that lies of its size': patched(air, 24, struct.pack('<I', 100)),
        'zip in zip (harmless)': zip_of({'a/x.zip': air}),
        'says it is larger': patched(plain, 24, struct.pack('<I', 1 << 30)),
        'says it is smaller': patched(plain, 24, struct.pack('<I', 3)),
        'wrong checksum': patched(plain, 16, b'\1\2\3\4', 14),
        'encrypted': patched(plain, 8, b'\1\0', 6),
        'an unknown compression': patched(plain, 10, b'\x63\0', 8),
        '2,000 members': zip_of({f'a/{number}/{number}': b'' for number in range(2_000)}),
        'a name of 60,000 letters': zip_of({'a/' + 'x' * 60_000: b''}),
        '5,000 folders deep': zip_of({'x/' * 5_000 + 'x': b''}),
        'data before and after (harmless)': b'MZ' * 1000 + plain + b'trailing',
        'cut short': plain[:-30],
        'no zip': b'PK\x03\x04' + bytes(100),
    }  # fmt: skip
    return zips


# graphs


def hostile_graphs() -> dict[str, bytes]:
    """35 graphs."""
    places = (
        '/etc/passwd', '../../../etc/passwd', 'weights.bin', '../model.safetensors', 'link', '.',
        '/dev/zero', '/proc/self/mem', 'C:\\x', '\\\\host\\x', 'file:///etc/passwd', '*/_ORT_MEM_ADDR_/*',
    )  # fmt: skip
    graphs = {f'weights in {place!r}': model(initializers=[tensor('w', place)]) for place in places}
    outside = helper.make_node('Constant', [], ['k'], value=tensor('w', '/etc/passwd'))
    circle = [
        helper.make_node('Add', ['x', 'b'], ['a']),
        helper.make_node('Neg', ['a'], ['b']),
        helper.make_node('Neg', ['b'], ['y']),
    ]
    graphs |= {
        'from the middle of a file': model(initializers=[tensor('w', 'w.bin', offset=1 << 62)]),
        'of a huge length': model(initializers=[tensor('w', 'w.bin', length=1 << 62)]),
        'of a negative length': model(initializers=[tensor('w', 'w.bin', length=-1)]),
        'in a constant': model([outside, helper.make_node('Neg', ['x'], ['y'])]),
        'in a branch': branching(2, outside),
        'an operator of its own': model([helper.make_node('Evil', ['x'], ['y'], domain='evil')]),
        'Python in it': model([helper.make_node('PyOp', ['x'], ['y'], domain='ai.onnx.contrib')]),
        'context of a provider': model(
            [helper.make_node('EPContext', ['x'], ['y'], domain='com.microsoft')]
        ),
        'endless loop': model([helper.make_node('Loop', ['x'], ['y'])]),
        'scan': model([helper.make_node('Scan', ['x'], ['y'])]),
        'function': function_model(),
        'circle': model(circle),
        'branches in branches': branching(15),
        '4 TB of zeros': model([
            constant('s', [1 << 20, 1 << 20]), helper.make_node('ConstantOfShape', ['s'], ['y']),
        ]),
        '4 TB of zeros, handed on': handed_on('Identity', value_ints=[1 << 40]),
        '4 TB of numbers drawn': model(
            [helper.make_node('RandomNormal', [], ['y'], shape=[1 << 40])]
        ),
        'tiles of tiles': sized('Tile', [1 << 12, 1], [1 << 12, 1], [1 << 12, 1]),
        '200,000 nodes': model(
            [helper.make_node('Neg', [f'x{i}' if i else 'x'], [f'x{i + 1}']) for i in range(200_000)]
        ),
    }  # fmt: skip
    encoded = {name: made.SerializeToString() for name, made in graphs.items()}
    whole = model().SerializeToString()
    return {
        **encoded,
        'weights elsewhere, behind keys of 33 bits': hidden_place(1),
        'weights elsewhere, behind keys of 64 bits': hidden_place(1 << 31),
        'loop, behind a key of 33 bits': hidden_loop(),
        'cut short': whole[:-5],
        'length of 2 GB': b'\x3a\xff\xff\xff\xff\x07' + whole,
    }


# artifacts: what is done to a good one whose hashes are then right again


def rehash(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest['files'] = {
        path.relative_to(directory).as_posix(): hash_file(path)
        for path in sorted(directory.rglob('*'))
        if path.is_file() and path.name != MANIFEST
    }
    (directory / MANIFEST).write_text(json.dumps(manifest))


def json_of(name: str, **values: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def file_of(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def safetensors_of(header: dict, data: bytes = b'', length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def manifest_of(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A change of the manifest after the hashes were made right."""

    def apply(directory: Path) -> None:
        path = directory / MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


def link_of(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        outside = directory.parent / f'outside-{name}'
        shutil.move(directory / name, outside)
        (directory / name).symlink_to(outside)

    return change


def not_a_number(directory: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = directory / 'model.safetensors'
    save_file({name: np.full_like(array, np.nan) for name, array in load_file(path).items()}, path)


F32 = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
WEIGHTS = 'model.safetensors'
CODE = b'open("EXECUTED", "w")'
MAP = {'AutoConfig': 'evil.X', 'AutoModel': 'evil.X', 'AutoTokenizer': ['evil.X', 'evil.X']}
# first what is done before the hashes are made right, then what is done after
TEXT_ARTIFACTS: dict[str, tuple[Callable[[Path], None] | None, Callable[[Path], None] | None]] = {
    'code beside the config': (file_of('evil.py', CODE), None),
    'a config of unknown code': (json_of('config.json', auto_map=MAP, model_type='evil'), None),
    'a config of known code': (json_of('config.json', auto_map=MAP, trust_remote_code=True), None),
    'a tokenizer of its own': (json_of('tokenizer_config.json', auto_map=MAP), None),
    'attention fetched elsewhere': (json_of('config.json', attn_implementation='evil/kernel'), None),
    'an adapter for other weights': (file_of('adapter_config.json', b'{"peft_type": "LORA"}'), None),
    'a million layers': (json_of('config.json', num_hidden_layers=10**6), None),
    'a vocabulary without end': (json_of('config.json', vocab_size=10**12), None),
    'a text before each text': (
        json_of('tokenizer.json', normalizer={'type': 'Prepend', 'prepend': 'a ' * 10**7}), None,
    ),
    'modules outside': (
        file_of('modules.json', b'[{"type": "Transformer", "path": "../../etc"}]'), None,
    ),
}  # fmt: skip
PICTURE_ARTIFACTS: dict[
    str, tuple[Callable[[Path], None] | None, Callable[[Path], None] | None]
] = {
    'a path that leaves': (None, manifest_of(lambda m: m['files'].update({'../outside': '0'}))),
    'an absolute path': (None, manifest_of(lambda m: m['files'].update({'/etc/passwd': '0'}))),
    'a link to its weights': (None, link_of(WEIGHTS)),
    'a wrong hash': (None, file_of(WEIGHTS, b'changed')),
    'a file that is missing': (None, lambda d: (d / WEIGHTS).unlink()),
    'a header longer than the file': (file_of(WEIGHTS, safetensors_of({}, length=1 << 60)), None),
    'tensors that overlap': (
        file_of(WEIGHTS, safetensors_of({'a': F32, 'b': {**F32, 'data_offsets': [4, 12]}}, bytes(12))),
        None,
    ),
    'a tensor larger than the file': (
        file_of(WEIGHTS, safetensors_of({'a': {**F32, 'shape': [1 << 60]}}, bytes(8))), None,
    ),
    'weights that are a pickle': (file_of(WEIGHTS, b'\x80\x04cposix\nsystem\n.'), None),
    'weights that are no numbers (harmless)': (not_a_number, None),
    'a dimension of 10^12': (None, manifest_of(lambda m: m['model'].update(dimension=10**12))),
    'a dimension that is a lie': (None, manifest_of(lambda m: m['model'].update(output_dim=60_000))),
    'a name twice in its manifest': (
        None,
        lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text()[:-1] + ', "files": {}}') and None,
    ),
    'a manifest of brackets': (None, file_of(MANIFEST, b'[' * 10**6)),
    'a file that nobody names': (None, file_of('config.json', b'{"auto_map": {}}')),
}  # fmt: skip


def with_graph(directory: Path, graph: bytes) -> None:
    """Put a graph into an artifact, hashes right."""
    (directory / 'model.onnx').write_bytes(graph)
    (directory / 'w.bin').unlink(missing_ok=True)
    rehash(directory)
