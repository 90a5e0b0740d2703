"""Export an embedding model to ONNX, and compare what comes out of it with torch."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetuner.excepts import ArtifactError
from finetuner.onnx_check import check_graph

if TYPE_CHECKING:
    import torch

    from finetuner.inputs import ModelInputs

LEAST_COSINE = 0.9999
_OUTPUT = 'embeddings'
_PICTURES = 'pictures'


def export_onnx(model: torch.nn.Module, path: Path, inputs: ModelInputs) -> None:
    """Export to ONNX with a dynamic batch, and compare with torch on real inputs.

    Args:
        model: an `EmbeddingModel`, in evaluation mode, on the CPU.
        path: of the file to write.
        inputs: pictures, uint8 `[n, size, size, 3]`; or of texts `input_ids` and
            `attention_mask`, int64 `[n, length]`, whose length is dynamic too.

    Raises:
        ArtifactError: the model cannot be exported, its graph is one that `check_graph` refuses, or
            an embedding's cosine with torch's is below `LEAST_COSINE`; no file is left.
    """
    import onnxruntime
    import torch

    named = inputs if isinstance(inputs, Mapping) else {_PICTURES: inputs}
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in named.values()]
    graph = _graph_of(model, tuple(named))
    with torch.inference_mode():
        expected = graph(*tensors).numpy()
    with _quiet_exporter():
        try:
            torch.onnx.export(
                graph,
                tuple(tensor[:2] for tensor in tensors),
                str(path),
                input_names=list(named),
                output_names=[_OUTPUT],
                dynamic_axes={
                    **{name: _dynamic_axes(name) for name in named},
                    _OUTPUT: {0: 'batch'},
                },
                opset_version=17,
                dynamo=False,
            )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            path.unlink(missing_ok=True)
            raise ArtifactError(f'the model cannot be exported to ONNX: {error}') from error
    try:
        # one that no artifact is opened with had better not be written
        check_graph(path)
    except ArtifactError:
        path.unlink()
        raise
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    (actual,) = session.run(None, dict(named))
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    cosine = float(np.min(np.sum(expected * actual, axis=1) / np.maximum(lengths, 1e-12)))
    if not cosine >= LEAST_COSINE:
        path.unlink()
        raise ArtifactError(
            f'the ONNX export differs from torch: cosine {cosine:.6f} on {len(expected)} inputs, '
            f'at least {LEAST_COSINE} is needed'
        )


def export_to_bytes(model: torch.nn.Module, inputs: ModelInputs) -> bytes:
    """The graph itself; see `export_onnx`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        export_onnx(model, path, inputs)
        return path.read_bytes()


def _graph_of(model: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module:
    """The model with as many arguments as the graph has inputs."""
    import torch

    if names == (_PICTURES,):
        return model

    class TextGraph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return self.model(dict(zip(names, tensors, strict=True)))

    return TextGraph().eval()


def _dynamic_axes(name: str) -> dict[int, str]:
    return {0: 'batch'} if name == _PICTURES else {0: 'batch', 1: 'length'}


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    import torch

    with warnings.catch_warnings():
        # the exporter through TorchScript is deprecated, but takes a tenth of the other's time
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.filterwarnings('ignore', category=torch.jit.TracerWarning)
        warnings.filterwarnings('ignore', 'Constant folding', UserWarning)
        # the comparison would find it out
        warnings.filterwarnings('ignore', 'Exporting aten::index', UserWarning)
        yield
