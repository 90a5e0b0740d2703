"""The servers that `serve.py` compares ours with, as people write them.

- `naive`: a Jina Executor with Pillow, torchvision's transforms and torch, a request a batch.
- `dynamic`: a Jina Executor with `@dynamic_batching`, Pillow, NumPy and ONNX Runtime.
- `sentence-transformers`: its `encode` behind FastAPI.

    python benchmarks/serve_peers.py naive|dynamic|sentence-transformers PORT FOLDER
"""

# no postponed annotations: Jina and FastAPI read those of endpoints as types
import io
import os
import sys
import threading
import warnings
from typing import Any

os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')
warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)

import numpy as np  # noqa: E402
from docarray import DocumentArray  # noqa: E402
from jina import Executor, Flow, dynamic_batching, requests  # noqa: E402
from PIL import Image  # noqa: E402
from serve_work import MODELS, SIZE, minilm_folder  # noqa: E402

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_BATCH_SIZE = 32
_WAIT_MS = 5


class NaiveExecutor(Executor):
    """What the first page of a tutorial leads to."""

    def __init__(self, **kwargs: Any) -> None:
        """Build the network and the transforms."""
        super().__init__(**kwargs)
        import torch

        from finetuner.models.tailor import build_embedding_model
        from finetuner.models.torchvision_import import import_torchvision
        from finetuner.models.zoo import get_backbone

        transforms = import_torchvision().transforms
        self._network = build_embedding_model(get_backbone(MODELS['pictures'])).backbone.eval()
        self._network = self._network.to(memory_format=torch.contiguous_format)
        self._transform = transforms.Compose(
            [
                transforms.Resize((SIZE, SIZE)),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    @requests(on='/encode')
    def encode(self, docs: DocumentArray, **_: Any) -> None:
        """Open, transform, stack, run."""
        import torch

        pictures = [Image.open(io.BytesIO(doc.blob)).convert('RGB') for doc in docs]
        batch = torch.stack([self._transform(picture) for picture in pictures])
        with torch.inference_mode():
            docs.embeddings = self._network(batch).numpy()


class DynamicExecutor(Executor):
    """What Jina's page on dynamic batching leads to, with ONNX Runtime."""

    def __init__(self, graph: str, **kwargs: Any) -> None:
        """Open the graph."""
        super().__init__(**kwargs)
        import onnxruntime

        self._session = onnxruntime.InferenceSession(graph, providers=['CPUExecutionProvider'])

    @requests(on='/encode')
    @dynamic_batching(preferred_batch_size=_BATCH_SIZE, timeout=_WAIT_MS)
    def encode(self, docs: DocumentArray, **_: Any) -> DocumentArray:
        """Open, resize, stack, run; at most so many at a time, so that memory stays bounded."""
        for start in range(0, len(docs), _BATCH_SIZE):
            chosen = docs[start : start + _BATCH_SIZE]
            pixels = [
                np.asarray(
                    Image.open(io.BytesIO(doc.blob))
                    .convert('RGB')
                    .resize((SIZE, SIZE), Image.Resampling.BILINEAR)
                )
                for doc in chosen
            ]
            chosen.embeddings = self._session.run(None, {'pictures': np.stack(pixels)})[0]
        for doc in docs:
            doc.pop('blob')
        return docs


def serve_flow(executor: type[Executor], port: int, **uses_with: Any) -> None:
    """A plain Flow, until Ctrl+C."""
    flow = Flow(host='127.0.0.1', port=port, protocol='grpc')
    with flow.add(uses=executor, uses_with=uses_with) as running:
        running.block()


def serve_sentence_transformers(port: int) -> None:
    """A path that takes texts; one request at a time, since more would share the cores."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    from finetuner.models.torchvision_import import import_torchvision

    import_torchvision()  # transformers would stop at it
    from sentence_transformers import SentenceTransformer

    class Body(BaseModel):
        """What is asked."""

        model: str
        input: list[str]

    model = SentenceTransformer(str(minilm_folder()), device='cpu')
    lock = threading.Lock()
    app = FastAPI()

    @app.get('/health')
    def health() -> dict[str, str]:
        return {}

    @app.post('/embed')
    def embed(body: Body) -> dict[str, list[list[float]]]:
        with lock:
            found = model.encode(body.input, show_progress_bar=False)
        return {'embeddings': found.tolist()}

    uvicorn.run(app, host='127.0.0.1', port=port, log_level='warning')


def main() -> None:
    """Serve one of them."""
    name, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if name == 'naive':
        serve_flow(NaiveExecutor, port)
    elif name == 'dynamic':
        serve_flow(DynamicExecutor, port, graph=f'{folder}/model.onnx')
    elif name == 'sentence-transformers':
        serve_sentence_transformers(port)
    else:
        sys.exit(f'{name} is none of naive, dynamic, sentence-transformers')


if __name__ == '__main__':
    main()
