"""An engine that runs exported graphs in OpenVINO, where that is installed."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.artifact import ModelSpec
from finetuner.cores import num_cores
from finetuner.engines import InferenceEngine
from finetuner.excepts import ArtifactError, ConfigError
from finetuner.inputs import InputReader, ModelInputs

if TYPE_CHECKING:
    import onnx


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec('openvino') is not None


class OpenvinoEngine(InferenceEngine):
    """Runs an exported graph in OpenVINO, on the CPU."""

    engine = 'openvino'
    is_onnx = True

    def __init__(
        self,
        graph: Path | bytes,
        spec: ModelSpec,
        reader: InputReader,
        batch_size: int = 32,
        num_threads: int | None = None,
        precision: str = 'fp32',
    ) -> None:
        """Load and compile the graph.

        Args:
            graph: ONNX file, or its bytes.
            spec: what it was exported from.
            reader: makes its inputs of Documents.
            batch_size: inputs embedded at a time.
            num_threads: of one batch; None lets OpenVINO choose.
            precision: that the graph was written in.

        Raises:
            ArtifactError: OpenVINO cannot load the graph.
            ConfigError: it is not installed.
        """
        super().__init__(spec, reader, 'cpu', batch_size)
        if not has_openvino():
            raise ConfigError(
                "engine 'openvino' is not installed: pip install openvino, or take engine='onnx'"
            )
        openvino = _import_openvino()
        options: dict[str, Any] = {
            # bfloat16, where the CPU has it, would give other vectors
            'INFERENCE_PRECISION_HINT': 'f32',
            # one batch at a time, on all cores
            'PERFORMANCE_HINT': 'LATENCY',
        }
        if num_threads is not None:
            # else batches of other threads of ours would wait for each other
            streams = max(1, num_cores() // int(num_threads))
            options['NUM_STREAMS'] = streams
            options['INFERENCE_NUM_THREADS'] = streams * int(num_threads)
        contents = _contents(graph)

        def compile_graph() -> Any:
            core = openvino.Core()
            return core.compile_model(core.read_model(contents), 'CPU', options)

        try:
            self._compiled = _in_thread_that_ends(compile_graph)
        except RuntimeError as error:
            reason = ' '.join(str(error).split())[:300]
            raise ArtifactError(f'OpenVINO cannot load the graph: {reason}') from error
        self.precision = precision
        self.num_bytes = len(contents)
        self._requests = threading.local()

    def embed(self, inputs: ModelInputs) -> np.ndarray:
        """Embed a batch; see `InferenceEngine.embed`."""
        named: Any = dict(inputs) if isinstance(inputs, Mapping) else {0: inputs}
        arrays = {name: np.ascontiguousarray(array) for name, array in named.items()}
        # one for each thread: several may embed at once, as with the other engines
        request = getattr(self._requests, 'own', None)
        if request is None:
            request = self._requests.own = self._compiled.create_infer_request()
        # a copy: the next batch goes into the same memory
        return np.array(request.infer(arrays)[0], dtype=np.float32)


def _in_thread_that_ends(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises, in a thread that does nothing else.

    OpenVINO's CPU plugin gives the thread that loads it another stack for signals, and frees that
    stack with the plugin, in whatever thread that happens. The first signal that came to a thread
    that lives on, such as the end of a loader process, would then end ours.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work).result()


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry: at each import it would tell Google Analytics of it.

    It goes without where the package that does so is not installed.
    """
    telemetry = 'openvino_telemetry'
    if 'openvino' not in sys.modules and telemetry not in sys.modules:
        sys.modules[telemetry] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            del sys.modules[telemetry]
    import openvino

    return openvino


def _contents(graph: Path | bytes) -> bytes:
    """A graph that holds all its weights: OpenVINO would open whatever files another one names."""
    import onnx
    from google.protobuf.message import DecodeError

    data = graph if isinstance(graph, bytes) else graph.read_bytes()
    try:
        model = onnx.load_from_string(data)
    except DecodeError as error:
        raise ArtifactError(f'the ONNX graph cannot be read: {error}') from error
    if any(onnx.external_data_helper.uses_external_data(each) for each in _tensors(model.graph)):
        raise ArtifactError('the ONNX graph keeps weights in other files: export it in one')
    return data


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for each in graph.sparse_initializer:
        yield from (each.values, each.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
