"""What each step of a request costs by itself: microseconds of CPU a Document, in this process.

CPU and not time, so that it holds on a machine that others use as well; but for inference with more
than one thread, which then waits for them busily.

    python benchmarks/serve_costs.py
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')
warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)

import numpy as np  # noqa: E402
from docarray import Document, DocumentArray  # noqa: E402
from jina.types.request.data import DataRequest  # noqa: E402
from serve_limit import open_session  # noqa: E402
from serve_work import DOORS, SIZE, generate_pictures, write_graph  # noqa: E402

from finetuner.config import Settings  # noqa: E402
from finetuner.images import load_picture  # noqa: E402
from finetuner.server.identity import IdentitySeal  # noqa: E402
from finetuner.server.json_documents import read_body, write_documents  # noqa: E402
from finetuner.server.security import TokenCheck  # noqa: E402

_NUM_PICTURES = 32
_DIMENSION = 1280
_SECONDS = 0.5


def cost(step: Callable[[], Any], num_documents: int) -> float:
    """Microseconds of CPU a Document."""
    step()
    begin, count = time.process_time(), 0
    while count < 2 or time.process_time() - begin < _SECONDS:
        step()
        count += 1
    return (time.process_time() - begin) / count / num_documents * 1e6


def parse(raw: bytes) -> DataRequest:
    """A request of its bytes."""
    request = DataRequest()
    request.proto.ParseFromString(raw)
    return request


def of_requests(pictures: list[bytes], vectors: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Steps of protobuf and JSON."""
    proto, text = DOORS['grpc'].write(pictures), DOORS['http'].write(pictures)
    embedded = DocumentArray(Document(embedding=vector) for vector in vectors[: len(pictures)])

    def answer() -> bytes:
        request = parse(proto)
        docs = request.docs
        for doc, vector in zip(docs, vectors, strict=False):
            doc.embedding = vector
            doc.pop('blob')
        request.data.docs = docs
        return request.proto.SerializeToString()

    return {
        'protobuf of a request': lambda: parse(proto),
        'Documents of protobuf': lambda: parse(proto).docs,
        'Documents of protobuf and back, embeddings for blobs': answer,
        'JSON to Documents': lambda: read_body(text),
        'Documents to JSON': lambda: json.dumps(write_documents(embedded)),
    }


def of_a_request(home: Path) -> dict[str, Callable[[], Any]]:
    """Steps that come once, however many Documents there are."""
    os.environ['FINETUNER_HOME'] = str(home)
    token = TokenCheck.from_environment()
    seal = IdentitySeal.of_home(Settings.from_environment().home)
    identity = token.identify(None)
    if identity is None:
        raise RuntimeError('a home without tokens takes everybody')

    def start_pool() -> None:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(int) for _ in range(2)]:
                future.result()

    async def hop() -> None:
        for _ in range(100):
            await asyncio.to_thread(int)

    return {
        'the check of the token': lambda: token.identify(None),
        'the seal of the identity, put and read': lambda: seal.open(seal.seal(identity)),
        'two threads, started and joined': start_pool,
        'a hundred hops to a thread': lambda: asyncio.run(hop()),
    }


def main() -> None:
    """Print a table."""
    pictures = generate_pictures()[:_NUM_PICTURES]
    vectors = np.random.default_rng(0).random((_NUM_PICTURES, _DIMENSION), np.float32)
    print('| microseconds of CPU a Document | 1 a request | 32 a request |\n|---|---|---|')
    few, many = of_requests(pictures[:1], vectors), of_requests(pictures, vectors)
    for name, step in few.items():
        costs = cost(step, 1), cost(many[name], _NUM_PICTURES)
        print(f'| {name} | {costs[0]:,.0f} | {costs[1]:,.0f} |', flush=True)
    opened = cost(lambda: [load_picture(each, SIZE) for each in pictures], _NUM_PICTURES)
    print(f'| decode and resize, JPEG 640 x 480 | {opened:,.0f} | {opened:,.0f} |')
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_graph('pictures', home)
        pixels = np.stack([load_picture(each, SIZE) for each in pictures])
        for num_threads in sorted({1, len(os.sched_getaffinity(0))}):
            session = open_session(home / 'model.onnx', num_threads, False)

            def run(num: int, session: Any = session) -> float:
                return cost(lambda: session.run(None, {'pictures': pixels[:num]}), num)

            name = f'inference, {num_threads} thread{"s" if num_threads > 1 else ""}'
            print(f'| {name} | {run(1):,.0f} | {run(_NUM_PICTURES):,.0f} |', flush=True)
        for name, step in of_a_request(home / 'home').items():
            once = cost(step, 1)
            print(f'| {name} | {once:,.0f} | {once / _NUM_PICTURES:,.0f} |', flush=True)


if __name__ == '__main__':
    main()
