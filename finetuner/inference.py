"""Turn Documents into embeddings: torch and ONNX Runtime behind one interface."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from docarray import DocumentArray

from finetuner.artifact import Artifact, ModelSpec, load_artifact
from finetuner.config import whole_number
from finetuner.excepts import ArtifactError, ConfigError, FinetunerError, PictureError, unknown_name
from finetuner.images import picture_of
from finetuner.models.zoo import get_backbone, parse_options, picture_spec
from finetuner.uris import DEFAULT_POLICY, PicturePolicy

if TYPE_CHECKING:
    from finetuner.models.tailor import EmbeddingModel

DEVICES = ('cpu', 'cuda')
PRECISIONS = ('fp32',)
# more decoding threads than this only wait for each other, and more than there are cores take turns
# with the model's own
_MAX_DECODERS = 8


class InferenceEngine(abc.ABC):
    """A model that embeds.

    Attributes:
        name: of its backbone.
        spec: how it is built and what it takes in.
        dimension: length of its embeddings.
        device: `cpu` or `cuda`.
        is_onnx: whether ONNX Runtime runs it.
        batch_size: inputs embedded at a time unless told otherwise.
        policy: which pictures it opens.
    """

    is_onnx = False

    def __init__(
        self, spec: ModelSpec, device: str, batch_size: int, policy: PicturePolicy = DEFAULT_POLICY
    ) -> None:
        """Keep what all engines share."""
        self.spec = spec
        self.name = spec.backbone
        self.dimension = spec.dimension
        self.device = device
        self.batch_size = _at_least_one('batch_size', batch_size)
        self.policy = policy

    @abc.abstractmethod
    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """Embed a batch.

        Args:
            pictures: uint8 `[n, size, size, 3]`.

        Returns:
            float32 `[n, dimension]`.
        """

    def encode_documents(
        self, docs: DocumentArray, batch_size: int | None = None
    ) -> list[tuple[int, FinetunerError]]:
        """Fill the embeddings of Documents, in order, leaving their contents as they are.

        The next batch is decoded while the current one is embedded. A Document whose picture
        cannot be opened gets no embedding and leaves its neighbours' as they would be without it.

        Args:
            docs: Documents with a picture each.
            batch_size: embedded at a time; None takes the engine's own.

        Returns:
            (position, error) of each Document that failed.

        Raises:
            ConfigError: `batch_size` is no whole number of at least 1.
        """
        failures: list[tuple[int, FinetunerError]] = []
        size = self.batch_size if batch_size is None else _at_least_one('batch_size', batch_size)
        for start, results in self._decoded(docs, size):
            good = [i for i, result in enumerate(results) if isinstance(result, np.ndarray)]
            for offset, result in enumerate(results):
                if isinstance(result, PictureError):
                    docs[start + offset].embedding = None
                    failures.append((start + offset, result))
            if good:
                embeddings = self.embed(np.stack([r for r in results if isinstance(r, np.ndarray)]))
                for offset, embedding in zip(good, embeddings, strict=True):
                    docs[start + offset].embedding = embedding
        return failures

    def _decoded(
        self, docs: DocumentArray, batch_size: int
    ) -> Iterator[tuple[int, list[np.ndarray | PictureError]]]:
        """Batches of pictures, the next always being decoded while one is used."""
        starts = range(0, len(docs), batch_size)
        with ThreadPoolExecutor(min(_MAX_DECODERS, _num_cores(), batch_size)) as pool:

            def submit(start: int) -> list[Future[np.ndarray | PictureError]]:
                positions = range(start, min(start + batch_size, len(docs)))
                return [pool.submit(self._decode, docs[i], i) for i in positions]

            pending = submit(0) if len(docs) else []
            for start in starts:
                current, following = pending, start + batch_size
                pending = submit(following) if following < len(docs) else []
                yield start, [future.result() for future in current]

    def _decode(self, doc: Any, position: int) -> np.ndarray | PictureError:
        try:
            return picture_of(doc, self.spec.picture.input_size, position, self.policy)
        except PictureError as error:
            return error


class TorchEngine(InferenceEngine):
    """Runs an embedding model in torch."""

    def __init__(
        self,
        model: EmbeddingModel,
        spec: ModelSpec,
        device: str = 'cpu',
        batch_size: int = 32,
        policy: PicturePolicy = DEFAULT_POLICY,
    ) -> None:
        """Move the model to the device, in evaluation mode."""
        super().__init__(spec, device, batch_size, policy)
        self.model = model.to(device).eval()

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """Embed a batch; see `InferenceEngine.embed`."""
        import torch

        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device)
            return self.model(inputs).float().cpu().numpy()


class OnnxEngine(InferenceEngine):
    """Runs an exported graph in ONNX Runtime."""

    is_onnx = True

    def __init__(
        self,
        graph: Path | bytes,
        spec: ModelSpec,
        device: str = 'cpu',
        batch_size: int = 32,
        num_threads: int | None = None,
        policy: PicturePolicy = DEFAULT_POLICY,
    ) -> None:
        """Load the graph.

        Args:
            graph: ONNX file, or its bytes.
            spec: what it was exported from.
            device: `cpu` or `cuda`; the latter needs onnxruntime-gpu.
            batch_size: inputs embedded at a time.
            num_threads: of one operator; None lets ONNX Runtime choose.
            policy: which pictures are opened.

        Raises:
            ArtifactError: ONNX Runtime cannot load the graph.
            ConfigError: this ONNX Runtime has no CUDA.
        """
        import onnxruntime

        super().__init__(spec, device, batch_size, policy)
        providers = ['CPUExecutionProvider']
        if device == 'cuda':
            if 'CUDAExecutionProvider' not in onnxruntime.get_available_providers():
                raise ConfigError(
                    "this ONNX Runtime has no CUDA: pip install onnxruntime-gpu, or device='cpu'"
                )
            providers.insert(0, 'CUDAExecutionProvider')
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # between batches its threads would go on looking for work, on cores that decoding, another
        # engine or the gateway could use
        options.add_session_config_entry('session.force_spinning_stop', '1')
        if num_threads is not None:
            options.intra_op_num_threads = int(num_threads)
        try:
            self._session = onnxruntime.InferenceSession(
                graph if isinstance(graph, bytes) else str(graph), options, providers=providers
            )
        except Exception as error:
            raise ArtifactError(f'ONNX Runtime cannot load the graph: {error}') from error
        self._input = self._session.get_inputs()[0].name

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """Embed a batch; see `InferenceEngine.embed`."""
        return self._session.run(None, {self._input: np.ascontiguousarray(pictures)})[0]


def load_engine(
    artifact: str | Path | Artifact,
    batch_size: int = 32,
    select_model: str | None = None,
    device: str | None = None,
    is_onnx: bool | None = None,
    num_threads: int | None = None,
    precision: str = 'fp32',
    policy: PicturePolicy = DEFAULT_POLICY,
) -> InferenceEngine:
    """Load an artifact for encoding.

    Args:
        artifact: its directory, its zip, or an artifact already loaded.
        batch_size: inputs embedded at a time unless told otherwise.
        select_model: which of several models; picture artifacts have one.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        is_onnx: True for ONNX Runtime, False for torch; None takes ONNX Runtime on a CPU when the
            artifact has a graph, since it is several times faster there.
        num_threads: for one operator of ONNX Runtime, or for torch as a whole; None is its choice.
        precision: `fp32`.
        policy: which pictures are opened.

    Returns:
        An engine.

    Raises:
        ArtifactError: there is no artifact, it is damaged, or it has no ONNX graph.
        ConfigError: an argument is out of range.
    """
    _check_arguments(batch_size, select_model, device, num_threads, precision)
    opened = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
    device = device or _best_device()
    if is_onnx is None:
        is_onnx = device == 'cpu' and opened.onnx_path is not None
    if is_onnx:
        if opened.onnx_path is None:
            raise ArtifactError(
                'the artifact has no ONNX graph: train with to_onnx=True, or pass is_onnx=False'
            )
        return OnnxEngine(opened.onnx_path, opened.spec, device, batch_size, num_threads, policy)
    _set_torch_threads(num_threads)
    return TorchEngine(opened.build_model(), opened.spec, device, batch_size, policy)


def build_engine(
    name: str,
    model_options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    device: str | None = None,
    is_onnx: bool | None = False,
    num_threads: int | None = None,
    policy: PicturePolicy = DEFAULT_POLICY,
) -> InferenceEngine:
    """Load a pretrained backbone for encoding, as it was before any fine-tuning.

    Args:
        name: of the backbone.
        model_options: its options.
        batch_size: inputs embedded at a time unless told otherwise.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        is_onnx: export it and run it in ONNX Runtime; None does so on a CPU.
        num_threads: see `load_engine`.
        policy: which pictures are opened.

    Returns:
        An engine.

    Raises:
        ConfigError: the name, an option or an argument is wrong, or weights cannot be had.
    """
    from finetuner.models.tailor import build_embedding_model

    _check_arguments(batch_size, None, device, num_threads, 'fp32')
    backbone = get_backbone(name)
    picture = picture_spec(backbone, parse_options(backbone, model_options))
    spec = ModelSpec(backbone.name, backbone.dimension, picture)
    model = build_embedding_model(backbone, dict(model_options or {})).eval()
    device = device or _best_device()
    if not (device == 'cpu' if is_onnx is None else is_onnx):
        _set_torch_threads(num_threads)
        return TorchEngine(model, spec, device, batch_size, policy)
    graph = _export_to_bytes(model, picture.input_size)
    return OnnxEngine(graph, spec, device, batch_size, num_threads, policy)


def _export_to_bytes(model: EmbeddingModel, size: int) -> bytes:
    import tempfile

    from finetuner.artifact import export_onnx

    probe = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        export_onnx(model, path, probe)
        return path.read_bytes()


def _check_arguments(
    batch_size: int,
    select_model: str | None,
    device: str | None,
    num_threads: int | None,
    precision: str,
) -> None:
    _at_least_one('batch_size', batch_size)
    if num_threads is not None:
        _at_least_one('num_threads', num_threads)
    if select_model is not None:
        raise ConfigError(f'select_model={select_model!r}: this artifact holds a single model')
    if device is not None and device not in DEVICES:
        raise ConfigError(unknown_name('device', device, DEVICES))
    if precision not in PRECISIONS:
        raise ConfigError(unknown_name('precision', precision, PRECISIONS))


def _at_least_one(name: str, number: Any) -> int:
    try:
        whole = whole_number(number)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{name}: {error}') from error
    if whole < 1:
        raise ConfigError(f'{name}: {number} is less than 1')
    return whole


def _num_cores() -> int:
    affinity = getattr(os, 'sched_getaffinity', None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _best_device() -> str:
    import torch

    return 'cuda' if torch.cuda.is_available() else 'cpu'


def _set_torch_threads(num_threads: int | None) -> None:
    if num_threads is not None:
        import torch

        torch.set_num_threads(int(num_threads))
