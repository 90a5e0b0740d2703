"""Time our encoding against plain loops in ONNX Runtime and torch, and our servers against both.

EfficientNet-Lite0 in batches of 32. The peers are what one writes by hand: Pillow opens and resizes,
NumPy normalises, the model runs, then the next batch. Ours is `encode_documents` in this process, and
a Flow with our gateway and Executor on this machine, asked with batches of 64 Documents. Everybody
gets the same encoded pictures and ends with embeddings; only ratios travel between machines.

    python benchmarks/encode.py
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')
warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)

import httpx  # noqa: E402
import numpy as np  # noqa: E402
from decode import generate_photo  # noqa: E402
from docarray import Document, DocumentArray  # noqa: E402
from jina import Client, Flow  # noqa: E402
from PIL import Image  # noqa: E402
from rounds import Contestant, print_head, print_speeds, take_turns  # noqa: E402

from finetuner.inference import InferenceEngine, build_engine  # noqa: E402
from finetuner.server.encoder import FinetunerExecutor  # noqa: E402

EMOJI = Path(__file__).parents[1] / 'examples' / 'emoji' / 'test'
MODEL = 'efficientnet-lite0'
BATCH_SIZE = 32
REQUEST_SIZE = 64
SERVED_SIZE = 224
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
PLAIN_ONNX = 'plain ONNX Runtime loop'
PLAIN_TORCH = 'plain torch loop'
IN_PROCESS = 'encode_documents, this process'
MIN_COSINE = 0.9999
# float32 [n, 3, size, size] to float32 [n, dimension]
Runner = Callable[[np.ndarray], np.ndarray]


def plain_loop(pictures: list[bytes], size: int, run: Runner) -> Contestant:
    """Write the loop by hand, around a model that takes normalised floats."""

    def load(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert('RGB')
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32)
        return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)

    def encode() -> int:
        found = [
            run(np.stack([load(data) for data in pictures[start : start + BATCH_SIZE]]))
            for start in range(0, len(pictures), BATCH_SIZE)
        ]
        return len(np.concatenate(found))

    return encode


def plain_runners(size: int) -> tuple[Runner, Runner]:
    """The network in ONNX Runtime and in torch, each as it comes."""
    import onnxruntime
    import torch

    from finetuner.models.tailor import build_embedding_model
    from finetuner.models.zoo import get_backbone

    # contiguous, as a model is before anybody thinks of its memory format
    network = build_embedding_model(get_backbone(MODEL)).backbone.eval()
    network = network.to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # torch calls this exporter old, and regrets a slice that it leaves in the graph
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.filterwarnings('ignore', 'Constant folding', UserWarning)
        path = str(Path(folder) / 'plain.onnx')
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, size, size),),
            path,
            input_names=['pictures'],
            dynamic_axes={'pictures': {0: 'batch'}},
            dynamo=False,
        )
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])

    def run_onnx(batch: np.ndarray) -> np.ndarray:
        return session.run(None, {'pictures': batch})[0]

    def run_torch(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(batch)).numpy()

    return run_onnx, run_torch


def encoder(engine: InferenceEngine, pictures: list[bytes]) -> Contestant:
    """Our way: Documents in, embeddings on them."""
    docs = DocumentArray(Document(blob=data) for data in pictures)

    def encode() -> int:
        if engine.encode_documents(docs, BATCH_SIZE):
            raise RuntimeError('a picture of the benchmark could not be opened')
        return len(docs)

    return encode


def compare_engines(title: str, pictures: list[bytes], size: int, num_rounds: int) -> None:
    """Print a table of both engines against both loops."""
    run_onnx, run_torch = plain_runners(size)
    options = {'input_size': size}
    contestants = {
        PLAIN_ONNX: plain_loop(pictures, size, run_onnx),
        'finetuner, ONNX engine': encoder(build_engine(MODEL, options, is_onnx=True), pictures),
        PLAIN_TORCH: plain_loop(pictures, size, run_torch),
        'finetuner, torch engine': encoder(build_engine(MODEL, options), pictures),
    }
    speeds = take_turns(contestants, num_rounds)
    print_head(title, 'plain ONNX', 'plain torch')
    print_speeds(speeds, PLAIN_ONNX, PLAIN_TORCH)


@contextmanager
def served() -> Iterator[tuple[int, int]]:
    """Serve /encode; gives the ports of gRPC and HTTP."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(('127.0.0.1', 0))
        other.bind(('127.0.0.1', 0))
        ports = [one.getsockname()[1], other.getsockname()[1]]
    flow = Flow(host='127.0.0.1', retries=0).config_gateway(
        uses='finetuner.server.gateway.Gateway', protocol=['grpc', 'http'], port=ports
    )
    flow = flow.add(uses=FinetunerExecutor, uses_with={'artifact': MODEL, 'is_onnx': True})
    with flow:
        yield ports[0], ports[1]


def over_jina(pictures: list[bytes], protocol: str, port: int) -> Callable[[], np.ndarray]:
    """Ask with Jina's client; gives the embeddings."""
    client = Client(host='127.0.0.1', port=port, protocol=protocol)

    def encode() -> np.ndarray:
        docs = DocumentArray(Document(blob=data) for data in pictures)
        return client.post('/encode', inputs=docs, request_size=REQUEST_SIZE).embeddings

    return encode


def over_json(pictures: list[bytes], port: int) -> Callable[[], np.ndarray]:
    """Ask with plain JSON over a connection kept open; gives the embeddings."""
    client = httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=300)

    def encode() -> np.ndarray:
        found: list[list[float]] = []
        for start in range(0, len(pictures), REQUEST_SIZE):
            batch = pictures[start : start + REQUEST_SIZE]
            body = {'data': [{'blob': base64.b64encode(data).decode()} for data in batch]}
            answer = client.post('/encode', json=body)
            answer.raise_for_status()
            found += [doc['embedding'] for doc in answer.json()['data']]
        return np.array(found, np.float32)

    return encode


def compare_servers(
    title: str, pictures: list[bytes], ports: tuple[int, int], num_rounds: int
) -> None:
    """Print a table of the servers against the plain loop and against our own process."""
    run_onnx, _ = plain_runners(SERVED_SIZE)
    engine = build_engine(MODEL, {'input_size': SERVED_SIZE}, is_onnx=True)
    grpc_port, http_port = ports
    answers = {
        'Flow, gRPC, jina.Client': over_jina(pictures, 'grpc', grpc_port),
        'Flow, HTTP, JSON': over_json(pictures, http_port),
        'Flow, HTTP, jina.Client': over_jina(pictures, 'http', http_port),
    }
    docs = DocumentArray(Document(blob=data) for data in pictures)
    engine.encode_documents(docs)
    for name, answer in answers.items():
        check_same(name, answer(), docs.embeddings)
    contestants: dict[str, Contestant] = {
        PLAIN_ONNX: plain_loop(pictures, SERVED_SIZE, run_onnx),
        IN_PROCESS: encoder(engine, pictures),
    }
    for name, answer in answers.items():
        contestants[name] = lambda answer=answer: len(answer())
    speeds = take_turns(contestants, num_rounds)
    print_head(title, 'plain ONNX', 'in process')
    print_speeds(speeds, PLAIN_ONNX, IN_PROCESS)


def check_same(name: str, given: np.ndarray, expected: np.ndarray) -> None:
    """Stop a benchmark that would compare different things."""
    products = (given * expected).sum(1)
    cosines = products / np.linalg.norm(given, axis=1) / np.linalg.norm(expected, axis=1)
    if not cosines.min() >= MIN_COSINE:
        raise RuntimeError(f'{name} gives other embeddings: cosine {cosines.min():.5f}')


def main() -> None:
    """Encode in turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--pictures', type=int, default=64, help='of each contestant in a round')
    arguments = parser.parse_args()
    photos = [generate_photo(640, 480, seed) for seed in range(arguments.pictures)]
    emoji = [path.read_bytes() for path in sorted(EMOJI.glob('*/*.webp'))]
    print(
        f'EfficientNet-Lite0, batches of {BATCH_SIZE}, {len(os.sched_getaffinity(0))} cores, '
        f'median of {arguments.rounds} alternating rounds of {arguments.pictures} pictures'
    )
    # first of all: Jina forks its processes, best from one whose models are not yet at work
    with served() as ports:
        title = f'serving JPEG 640 x 480 at {SERVED_SIZE} px'
        compare_servers(title, photos, ports, arguments.rounds)
    compare_engines('emoji WebP at 96 px', emoji[: arguments.pictures], 96, arguments.rounds)
    compare_engines(f'JPEG 640 x 480 at {SERVED_SIZE} px', photos, SERVED_SIZE, arguments.rounds)


if __name__ == '__main__':
    main()
