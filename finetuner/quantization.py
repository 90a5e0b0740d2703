"""Write int8 graphs in which an embedding is the same whoever its neighbours in the batch are.

ONNX's dynamic quantisation takes one scale of activations over the whole batch, so a text's vector
would depend on the texts beside it. Two ways do not:

- convolutions: scales measured beforehand on real pictures (static quantisation, `QDQ`);
- transformers, whose activations differ too much from token to token for that: eight-bit weights in
  blocks, and scales of activations taken for each token and block while it runs (`MatMulNBits`).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.excepts import ArtifactError

if TYPE_CHECKING:
    import onnx

    from finetuner.inputs import ModelInputs

# So many values of a weight, and of an activation, have a scale of their own. With 128, ONNX Runtime
# 1.31 computes a text by itself otherwise than among others: its vector moves by 0.02.
BLOCK_SIZE = 64
# `MatMulNBits`: activations in int8, too
_INT8_ACTIVATIONS = 4
_CONTRIB = 'com.microsoft'
_LEVELS = 127
_MIDDLE = 128


def write_int8(source: Path, target: Path, batches: Sequence[ModelInputs]) -> bool:
    """Write a graph in int8.

    Args:
        source: the graph in fp32, as `export_onnx` writes it.
        target: the file to write.
        batches: real inputs, from which the ranges of a network of convolutions are taken; of
            other networks, nothing is taken from them.

    Returns:
        Whether ranges were taken from the inputs.

    Raises:
        ArtifactError: there is nothing in the graph that int8 would make faster, there are no
            inputs to take ranges from, or ONNX Runtime cannot quantise it; no file is left.
    """
    import onnx

    graph = onnx.load(str(source))
    convolutions = sum(node.op_type == 'Conv' for node in graph.graph.node)
    try:
        if convolutions > 1:
            _write_static(source, target, batches)
        else:
            # the only one, if any, cuts a picture into the tokens of a transformer
            _write_blocks(graph, target)
    except (ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        target.unlink(missing_ok=True)
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f'the graph cannot be written in int8: {error}') from error
    return convolutions > 1


class _Batches:
    """Inputs as ONNX Runtime's calibration asks for them, one after the other."""

    def __init__(self, batches: Sequence[ModelInputs], name: str) -> None:
        self._left: Iterator[ModelInputs] = iter(batches)
        self._name = name

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by the names of the graph's inputs, None at the end."""
        batch = next(self._left, None)
        if batch is None or isinstance(batch, Mapping):
            return None if batch is None else dict(batch)
        return {self._name: batch}


def _write_static(source: Path, target: Path, batches: Sequence[ModelInputs]) -> None:
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not batches:
        raise ArtifactError('int8 of a network of convolutions takes its ranges from real pictures')

    class Reader(_Batches, CalibrationDataReader):
        """Both at once: the base class would make ONNX Runtime a heavy import of this module."""

    with tempfile.TemporaryDirectory() as folder, _quiet_tools():
        prepared = str(Path(folder) / 'prepared.onnx')
        # operators that become one are quantised as one; shapes are in the graph already
        quant_pre_process(str(source), prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared)
        _fold_normalizer(graph)
        onnx.save(graph, prepared)
        quantize_static(
            prepared,
            str(target),
            Reader(batches, graph.graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=_behind_convolutions(graph),
            calibrate_method=CalibrationMethod.MinMax,
        )


@contextlib.contextmanager
def _quiet_tools() -> Iterator[None]:
    """Keep what ONNX Runtime's tools tell the root logger, which is not theirs, to themselves."""
    root, handler = logging.getLogger(), logging.NullHandler()
    was = root.disabled
    # one that has a handler is not given another
    root.addHandler(handler)
    # what other loggers pass on to the root's handlers is not held up
    root.disabled = True
    try:
        yield
    finally:
        root.disabled = was
        root.removeHandler(handler)


def _fold_normalizer(graph: onnx.ModelProto) -> None:
    """Make the normalisation of pictures a convolution of its own, which int8 runs, too.

    Left as a difference and a quotient in fp32, it takes a fifth of the time of the int8 graph.
    """
    from onnx import helper, numpy_helper

    weights = {each.name: each for each in graph.graph.initializer}
    nodes = graph.graph.node
    for place, (less, by) in enumerate(pairwise(nodes)):
        if (less.op_type, by.op_type) != ('Sub', 'Div') or by.input[0] != less.output[0]:
            continue
        if less.input[1] not in weights or by.input[1] not in weights:
            continue
        mean, std = (numpy_helper.to_array(weights[each.input[1]]).ravel() for each in (less, by))
        if mean.shape != std.shape:
            continue
        weight = np.diag(1 / std).astype(np.float32)[:, :, None, None]
        names = [f'{less.name}_weight', f'{less.name}_bias']
        graph.graph.initializer.extend(
            numpy_helper.from_array(array, name)
            for array, name in zip((weight, -mean / std), names, strict=True)
        )
        folded = helper.make_node('Conv', [less.input[0], *names], [by.output[0]], name=less.name)
        nodes[place].CopyFrom(folded)
        del nodes[place + 1]
        _drop_unused(graph)
        return


def _drop_unused(graph: onnx.ModelProto) -> None:
    """Leave out weights that no node takes any more."""
    taken = {name for node in graph.graph.node for name in node.input}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in taken]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def _behind_convolutions(graph: onnx.ModelProto) -> list[str]:
    """Pooling and head: they take no time, and a few values there carry what a picture is."""
    nodes = list(graph.graph.node)
    last = max(place for place, node in enumerate(nodes) if node.op_type == 'Conv')
    reduced = (
        place
        for place, node in enumerate(nodes)
        if place > last and node.op_type in ('GlobalAveragePool', 'ReduceMean', 'Flatten', 'Pow')
    )
    first = next(reduced, len(nodes))
    return [node.name for node in nodes[first:]]


def _write_blocks(graph: onnx.ModelProto, target: Path) -> None:
    import onnx

    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    uses = [
        (node, weights[node.input[1]])
        for node in graph.graph.node
        if node.op_type == 'MatMul'
        and node.input[1] in weights
        and len(weights[node.input[1]].dims) == 2
    ]
    if not uses:
        raise ArtifactError(
            'the graph has neither convolutions nor products with weights, which int8 makes faster'
        )
    written: dict[str, list[str]] = {}
    for node, weight in uses:
        if weight.name not in written:
            written[weight.name] = _add_blocks(graph, weight)
        _become_blocks(node, written[weight.name], weight.dims)
    _drop_unused(graph)
    if all(each.domain != _CONTRIB for each in graph.opset_import):
        graph.opset_import.append(onnx.helper.make_opsetid(_CONTRIB, 1))
    onnx.save(graph, str(target))


def _add_blocks(graph: onnx.ModelProto, weight: Any) -> list[str]:
    """Add a weight in eight bits; returns the names of its values and of their scales."""
    from onnx import numpy_helper

    values, scales = blocks_of(numpy_helper.to_array(weight))
    names = [f'{weight.name}_int8', f'{weight.name}_scales']
    graph.graph.initializer.extend(
        numpy_helper.from_array(array, name)
        for array, name in zip((values, scales), names, strict=True)
    )
    return names


def blocks_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut a weight into blocks along its inputs, each with its scale.

    Args:
        weight: `[num_inputs, num_outputs]` float32.

    Returns:
        `[num_outputs, num_blocks, BLOCK_SIZE]` uint8, 128 being 0, and `[num_outputs, num_blocks]`
        float32: a value is `(uint8 - 128) * scale`.
    """
    num_inputs, num_outputs = weight.shape
    num_blocks = -(-num_inputs // BLOCK_SIZE)
    padded = np.zeros((num_blocks * BLOCK_SIZE, num_outputs), np.float32)
    padded[:num_inputs] = weight
    blocks = padded.T.reshape(num_outputs, num_blocks, BLOCK_SIZE)
    scales = np.abs(blocks).max(axis=2) / _LEVELS
    scales[scales == 0] = 1
    values = np.round(blocks / scales[:, :, None]).clip(-_LEVELS, _LEVELS) + _MIDDLE
    return values.astype(np.uint8), scales.astype(np.float32)


def _become_blocks(node: Any, names: Sequence[str], shape: Sequence[int]) -> None:
    """Make a product with a weight one with its blocks."""
    from onnx import helper

    node.CopyFrom(
        helper.make_node(
            'MatMulNBits',
            [node.input[0], *names],
            list(node.output),
            name=node.name,
            domain=_CONTRIB,
            K=shape[0],
            N=shape[1],
            bits=8,
            block_size=BLOCK_SIZE,
            accuracy_level=_INT8_ACTIVATIONS,
        )
    )
