"""Engines that embed Documents: torch and ONNX Runtime behind one interface."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from docarray import Document, DocumentArray

from finetuner.artifact import ModelSpec
from finetuner.config import whole_number
from finetuner.cores import num_cores
from finetuner.data.contents import is_text
from finetuner.excepts import ArtifactError, ConfigError, ContentError, FinetunerError
from finetuner.inputs import InputReader, ModelInputs, TextImageReader
from finetuner.models.backbones import (
    TEXT_TOWER,
    TOWERS,
    VISION_TOWER,
)

if TYPE_CHECKING:
    from finetuner.models.embedding_model import EmbeddingModel

# more decoding threads than this only wait for each other, and more than there are cores take turns
# with the model's own
_MAX_DECODERS = 8


class InferenceEngine(abc.ABC):
    """A model that embeds.

    Attributes:
        name: of its backbone.
        spec: how it is built and what it takes in.
        reader: makes its inputs of Documents.
        dimension: length of its embeddings.
        device: `cpu` or `cuda`.
        engine: name of what runs it, such as `torch` or `onnx`.
        precision: what it computes in, such as `fp32`.
        is_onnx: whether it runs the exported graph.
        num_bytes: of the weights or the graph that it loaded.
        batch_size: inputs embedded at a time unless told otherwise.
    """

    engine = 'torch'
    precision = 'fp32'
    is_onnx = False
    num_bytes = 0

    def __init__(self, spec: ModelSpec, reader: InputReader, device: str, batch_size: int) -> None:
        """Keep what all engines share."""
        self.spec = spec
        self.reader = reader
        self.name = spec.backbone
        self.dimension = spec.dimension
        self.device = device
        self.batch_size = at_least_one('batch_size', batch_size)

    @abc.abstractmethod
    def embed(self, inputs: ModelInputs) -> np.ndarray:
        """Embed a batch.

        Args:
            inputs: as the reader batches them: pictures, uint8 `[n, size, size, 3]`, or of texts
                `input_ids` and `attention_mask`, int64 `[n, length]`.

        Returns:
            float32 `[n, dimension]`.
        """

    def engine_for(self, doc: Document) -> InferenceEngine:
        """The engine of one model that embeds a Document: of two towers, the one it is for."""
        return self

    def warm_up(self) -> None:
        """Embed something made up, so that the first that is asked for takes no longer."""
        self.embed(self.reader.example())

    def encode_documents(
        self, docs: DocumentArray, batch_size: int | None = None
    ) -> list[tuple[int, FinetunerError]]:
        """Fill the embeddings of Documents, in order, leaving their contents as they are.

        The next Documents are read while the current ones are embedded. One that cannot be read
        gets no embedding and leaves its neighbours' as they would be without it.

        Args:
            docs: Documents with a content of the model's kind each.
            batch_size: embedded at a time; of texts, as many tokens as so many Documents of middle
                length have. None takes the engine's own.

        Returns:
            (position, error) of each Document that failed.

        Raises:
            ConfigError: `batch_size` is no whole number of at least 1.
        """
        failures: list[tuple[int, FinetunerError]] = []
        results = chain.from_iterable(self.embed_documents(docs, batch_size))
        for position, result in enumerate(results):
            if isinstance(result, ContentError):
                docs[position].embedding = None
                failures.append((position, result))
            else:
                docs[position].embedding = result
        return failures

    def embed_documents(
        self,
        docs: Iterable[Document],
        batch_size: int | None = None,
        positions: Iterable[int] | None = None,
    ) -> Iterator[list[np.ndarray | ContentError]]:
        """Embed Documents as they come, holding few of them: what `encode_documents` fills in.

        Args:
            docs: as for `encode_documents`, in any number.
            batch_size: as there.
            positions: by which errors call the Documents; None counts them from 0.

        Yields:
            Lots of results, one for each Document in order: its embedding, float32 `[dimension]`, or
            why it has none.

        Raises:
            ConfigError: `batch_size` is no whole number of at least 1.
        """
        size = self.batch_size if batch_size is None else at_least_one('batch_size', batch_size)
        for results in self._read_ahead(docs, size, positions or count()):
            good = [p for p, result in enumerate(results) if not isinstance(result, ContentError)]
            items = [results[place] for place in good]
            for chosen in self.reader.batches(items, size):
                embeddings = self.embed(self.reader.batch([items[place] for place in chosen]))
                for place, embedding in zip(chosen, embeddings, strict=True):
                    results[good[place]] = embedding
            yield results

    def _read_ahead(
        self, docs: Iterable[Document], batch_size: int, positions: Iterable[int]
    ) -> Iterator[list[Any | ContentError]]:
        """Inputs of so many Documents, the next always being read while one lot is used."""
        lot = batch_size * self.reader.batches_at_once
        numbered = zip(docs, positions, strict=False)
        with ThreadPoolExecutor(min(_MAX_DECODERS, num_cores(), lot)) as pool:

            def submit() -> list[Future[Any | ContentError]]:
                return [pool.submit(self._read, *each) for each in islice(numbered, lot)]

            pending = submit()
            while pending:
                current, pending = pending, submit()
                yield [future.result() for future in current]

    def _read(self, doc: Any, position: int) -> Any | ContentError:
        try:
            return self.reader.read(doc, position)
        except ContentError as error:
            return error


class TorchEngine(InferenceEngine):
    """Runs an embedding model in torch."""

    def __init__(
        self,
        model: EmbeddingModel,
        spec: ModelSpec,
        reader: InputReader,
        device: str = 'cpu',
        batch_size: int = 32,
        precision: str = 'fp32',
        compile_backend: str | Callable[..., Any] | None = None,
    ) -> None:
        """Move the model to the device, in evaluation mode.

        Args:
            model: the embedding model.
            spec: how it is built.
            reader: makes its inputs of Documents.
            device: `cpu` or `cuda`.
            batch_size: inputs embedded at a time.
            precision: `fp32`; on a GPU also `fp16` or `bf16`, which torch then computes in where it
                keeps what they lose small.
            compile_backend: of `torch.compile`, such as `inductor`: compile the model, here and now,
                which takes a minute or more; None does not.

        Raises:
            ConfigError: it cannot be compiled.
        """
        super().__init__(spec, reader, device, batch_size)
        self.precision = precision
        self.model = model.to(device).eval()
        self._run: Callable[[Any], Any] = self.model
        held = (*self.model.parameters(), *self.model.buffers())
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
        if compile_backend is not None:
            self.engine = 'torch-compiled'
            self._compile(compile_backend)

    def _compile(self, backend: str | Callable[..., Any]) -> None:
        import torch

        # one program for all batches, whatever their size
        self._run = torch.compile(self.model, dynamic=True, backend=backend)
        try:
            self.warm_up()
        except RuntimeError as error:
            reason = ' '.join(str(error).split())[:300]
            raise ConfigError(
                f"torch cannot compile {self.name}: {reason}. Take engine='torch'"
            ) from error

    def embed(self, inputs: ModelInputs) -> np.ndarray:
        """Embed a batch; see `InferenceEngine.embed`."""
        import torch

        def moved(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

        with torch.inference_mode(), self._autocast():
            tensors: Any = (
                {name: moved(array) for name, array in inputs.items()}
                if isinstance(inputs, Mapping)
                else moved(inputs)
            )
            return self._run(tensors).float().cpu().numpy()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        kinds = {'fp16': torch.float16, 'bf16': torch.bfloat16}
        if self.precision not in kinds:
            return contextlib.nullcontext()
        return torch.autocast(self.device, kinds[self.precision])


class OnnxEngine(InferenceEngine):
    """Runs an exported graph in ONNX Runtime."""

    engine = 'onnx'
    is_onnx = True

    def __init__(
        self,
        graph: Path | bytes,
        spec: ModelSpec,
        reader: InputReader,
        device: str = 'cpu',
        batch_size: int = 32,
        num_threads: int | None = None,
        precision: str = 'fp32',
    ) -> None:
        """Load the graph.

        Args:
            graph: ONNX file, or its bytes.
            spec: what it was exported from.
            reader: makes its inputs of Documents.
            device: `cpu` or `cuda`; the latter needs onnxruntime-gpu.
            batch_size: inputs embedded at a time.
            num_threads: of one operator; None lets ONNX Runtime choose.
            precision: that the graph was written in.

        Raises:
            ArtifactError: ONNX Runtime cannot load the graph.
            ConfigError: this ONNX Runtime has no CUDA.
        """
        import onnxruntime

        super().__init__(spec, reader, device, batch_size)
        self.precision = precision
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
        self.num_bytes = len(graph) if isinstance(graph, bytes) else graph.stat().st_size

    def embed(self, inputs: ModelInputs) -> np.ndarray:
        """Embed a batch; see `InferenceEngine.embed`."""
        named = inputs if isinstance(inputs, Mapping) else {self._input: inputs}
        arrays = {name: np.ascontiguousarray(array) for name, array in named.items()}
        return self._session.run(None, arrays)[0]


class TextImageEngine(InferenceEngine):
    """Two engines, one for texts and one for pictures, whose embeddings can be compared.

    Attributes:
        towers: the engines under the names of `TOWERS`.
        engine: the names of both, with a `/` between them where they differ; so `precision`.
    """

    def __init__(self, towers: Mapping[str, InferenceEngine], spec: ModelSpec) -> None:
        """Join the two.

        Args:
            towers: under each of `TOWERS`.
            spec: of the two together.
        """
        text, vision = (towers[name] for name in TOWERS)
        reader = TextImageReader(text.reader, vision.reader)  # type: ignore[arg-type]
        super().__init__(spec, reader, text.device, text.batch_size)
        self.towers = dict(towers)
        self.engine = '/'.join(dict.fromkeys([text.engine, vision.engine]))
        self.precision = '/'.join(dict.fromkeys([text.precision, vision.precision]))
        self.is_onnx = text.is_onnx and vision.is_onnx
        self.num_bytes = text.num_bytes + vision.num_bytes

    def embed(self, inputs: ModelInputs) -> np.ndarray:
        """Embed a batch of texts, or one of pictures; see `InferenceEngine.embed`."""
        name = TEXT_TOWER if isinstance(inputs, Mapping) else VISION_TOWER
        return self.towers[name].embed(inputs)

    def engine_for(self, doc: Document) -> InferenceEngine:
        """That of texts for a Document with a text, unless its `modality` is `image`."""
        return self.towers[TEXT_TOWER if is_text(doc) else VISION_TOWER]

    def warm_up(self) -> None:
        """Warm up both towers."""
        for tower in self.towers.values():
            tower.warm_up()

    def embed_documents(
        self,
        docs: Iterable[Document],
        batch_size: int | None = None,
        positions: Iterable[int] | None = None,
    ) -> Iterator[list[np.ndarray | ContentError]]:
        """Embed Documents as they come, each by the tower that its content is for.

        A Document with a text is embedded as a text, unless its `modality` is `image`. See
        `InferenceEngine.embed_documents`.
        """
        size = self.batch_size if batch_size is None else at_least_one('batch_size', batch_size)
        lot = size * self.towers[TEXT_TOWER].reader.batches_at_once
        numbered = zip(docs, positions or count(), strict=False)
        while chosen := list(islice(numbered, lot)):
            is_of_text = [is_text(doc) for doc, _ in chosen]
            results: list[Any] = [None] * len(chosen)
            for name, of_text in ((TEXT_TOWER, True), (VISION_TOWER, False)):
                places = [place for place, is_one in enumerate(is_of_text) if is_one is of_text]
                found = self.towers[name].embed_documents(
                    [chosen[place][0] for place in places],
                    size,
                    [chosen[place][1] for place in places],
                )
                for place, result in zip(places, chain.from_iterable(found), strict=True):
                    results[place] = result
            yield results


def at_least_one(name: str, number: Any) -> int:
    """A whole number of at least 1; a ConfigError naming the argument where it is none."""
    try:
        whole = whole_number(number)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{name}: {error}') from error
    if whole < 1:
        raise ConfigError(f'{name}: {number} is less than 1')
    return whole
