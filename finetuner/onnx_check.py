"""Look at an ONNX graph before ONNX Runtime opens it: what could do harm is refused.

ONNX Runtime opens any file that a graph names as the place of its weights, and follows loops and
nested functions as far as they go. The graphs that this library writes hold all their weights, have
neither, and are made of plain operators, so that nothing is lost by demanding it. The file is walked,
not parsed: weights are stepped over, which takes milliseconds where reading them takes as long as
loading the model. What two readers of protobuf could understand in two ways is refused: ONNX Runtime's
must see what this one saw.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from finetuner.excepts import ArtifactError

MAX_NODES = 100_000
# values of one tensor that the graph makes of nothing but sizes it holds; 1 GiB of float32
MAX_VALUES = 1 << 28
# What torch's exporter writes for networks, and ONNX Runtime's quantisation makes of it. None draws
# at random, holds a graph, or opens files.
_NAMES = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
BitShift Cast CastLike Ceil Celu Clip Compress Concat Constant ConstantOfShape Conv ConvInteger
ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Det Div Dropout
DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather
GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
GreaterOrEqual GridSample GroupNormalization GRU HardSigmoid HardSwish Hardmax Identity
InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log
LogSoftmax LpNormalization LpPool MatMul MatMulInteger Max MaxPool Mean
MeanVarianceNormalization Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow
QLinearConv QLinearMatMul QuantizeLinear RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax
Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
Transpose Trilu Unsqueeze Upsample Where Xor
"""
_PLAIN = frozenset(_NAMES.split())
# '' is ONNX itself
_OPERATORS = {
    '': _PLAIN,
    'ai.onnx': _PLAIN,
    'com.microsoft': frozenset(('MatMulNBits', 'QuantizeLinear', 'DequantizeLinear')),
}
# which input of an operator is the shape, or the factors, of what it makes
_SHAPES = {'ConstantOfShape': 0, 'Expand': 1, 'Tile': 1, 'Range': 1, 'OneHot': 1, 'Pad': 1}
# what hands a shape on, and what joins several
_HAND_ON = ('Identity', 'Cast', 'Reshape', 'Squeeze', 'Unsqueeze', 'Flatten', 'Concat')
_INT64 = 7
_MOST_DIMENSIONS = 16

# numbers of the fields in onnx.proto
_GRAPH, _TRAINING, _FUNCTIONS = 7, 20, 25
_NODE, _INITIALIZER, _SPARSE_INITIALIZER, _GRAPH_INPUT = 1, 5, 15, 11
_INPUT, _OUTPUT, _OPERATOR, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7
_ONE_INT, _ONE_TENSOR, _ONE_GRAPH, _INTS, _TENSORS, _GRAPHS = 3, 5, 6, 8, 10, 11
_ONE_SPARSE, _SPARSE = 22, 23
_DIMS, _TYPE, _INT64_DATA, _TENSOR_NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 7, 8, 9, 13, 14
# Those that a message has once. Of two, readers take the last, or join them.
_ONCE_IN_MODEL = (_GRAPH,)
_ONCE_IN_NODE = (3, _OPERATOR, _DOMAIN, 8)
_ONCE_IN_ATTRIBUTE = (1, 2, _ONE_INT, 4, _ONE_TENSOR, _ONE_GRAPH, 20, 21, _ONE_SPARSE)
_ONCE_IN_TENSOR = (_TYPE, 3, _TENSOR_NAME, _RAW, _LOCATION)
_ONCE_IN_PAIR = (1, 2)
_MOST_KEY = 0xFFFFFFFF

Field = tuple[int, int, int, int]


def check_graph(path: Path) -> None:
    """Refuse a graph that ONNX Runtime had better not open.

    Args:
        path: of an ONNX file.

    Raises:
        ArtifactError: it is none, keeps weights in other files, has operators, functions or inner
            graphs that this library's graphs have not, goes round in circles, or is written in a
            way that no writer of ONNX has.
    """
    with path.open('rb') as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise ArtifactError(f'{path.name} is refused: it is empty') from error
        with data:
            try:
                _Walk(data).model()
            except _RefusedError as error:
                raise ArtifactError(f'{path.name} is refused: {error}') from error


class _RefusedError(Exception):
    pass


class _Walk:
    """One look through a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._growth = 1

    def model(self) -> None:
        graphs = []
        for number, _, start, end in self._fields(0, len(self._data), _ONCE_IN_MODEL):
            if number in (_TRAINING, _FUNCTIONS):
                raise _RefusedError('it has functions or training steps of its own')
            if number == _GRAPH:
                graphs.append((start, end))
        if not graphs:
            raise _RefusedError('it is no ONNX model: it has no graph')
        self._graph(*graphs[0])

    def _graph(self, start: int, end: int) -> None:
        known: set[str] = set()
        sizes: dict[str, int] = {}
        nodes = []
        for number, _, first, last in self._fields(start, end):
            if number == _NODE:
                nodes.append((first, last))
            elif number == _INITIALIZER:
                name, values = self._tensor(first, last)
                known.add(name)
                sizes[name] = values
            elif number == _SPARSE_INITIALIZER:
                known.add(self._sparse(first, last))
            elif number == _GRAPH_INPUT:
                pair = self._fields(first, last, _ONCE_IN_PAIR)
                known.update(self._text(field) for field in pair if field[0] == 1)
        if len(nodes) > MAX_NODES:
            raise _RefusedError(f'it has more than {MAX_NODES:,} nodes')
        for first, last in nodes:
            self._node(first, last, known, sizes)

    def _node(self, start: int, end: int, known: set[str], sizes: dict[str, int]) -> None:
        operator, domain = '', ''
        inputs, outputs, attributes = [], [], []
        for field in self._fields(start, end, _ONCE_IN_NODE):
            if field[0] == _INPUT:
                inputs.append(self._text(field))
            elif field[0] == _OUTPUT:
                outputs.append(self._text(field))
            elif field[0] == _OPERATOR:
                operator = self._text(field)
            elif field[0] == _DOMAIN:
                domain = self._text(field)
            elif field[0] == _ATTRIBUTE:
                attributes.append(field)
        if operator not in _OPERATORS.get(domain, ()):
            named = f'{domain}.{operator}' if domain else operator
            raise _RefusedError(
                f'operator {named[:100]!r} is not among those that are run here, which are the '
                "plain ones that this library's exports are made of"
            )
        for name in inputs:
            if name and name not in known:
                raise _RefusedError(
                    f'a node of {operator!r} takes {name!r}, which nothing before it gives'
                )
        self._check_size(operator, inputs, sizes)
        for _, _, first, last in attributes:
            values = self._attribute(first, last)
            if operator == 'Constant' and outputs and values is not None:
                sizes[outputs[0]] = values
        if operator in _HAND_ON and outputs:
            handed = inputs if operator == 'Concat' else inputs[:1]
            sizes[outputs[0]] = _product(sizes.get(name, 1) for name in handed)
        known.update(outputs)

    def _check_size(self, operator: str, inputs: list[str], sizes: dict[str, int]) -> None:
        place = _SHAPES.get(operator)
        if place is None or place >= len(inputs):
            return
        values = sizes.get(inputs[place], 1)
        if operator == 'Tile':
            # one after another they multiply
            self._growth *= max(values, 1)
            values = self._growth
        if values > MAX_VALUES:
            raise _RefusedError(
                f'{operator!r} would make a tensor of more than {MAX_VALUES:,} values'
            )

    def _attribute(self, start: int, end: int) -> int | None:
        """Check what a node holds; the product of its values where they can be a shape."""
        product = None
        values: list[int] = []
        for number, wire, first, last in self._fields(start, end, _ONCE_IN_ATTRIBUTE):
            if number in (_ONE_TENSOR, _TENSORS):
                product = self._tensor(first, last)[1]
            elif number in (_ONE_SPARSE, _SPARSE):
                self._sparse(first, last)
            elif number in (_ONE_GRAPH, _GRAPHS):
                raise _RefusedError('a node of it holds a graph of its own')
            elif number in (_ONE_INT, _INTS):
                values += [_signed(first)] if wire == 0 else self._packed(first, last)
        return _size(values) if values else product

    def _sparse(self, start: int, end: int) -> str:
        """Name of a sparse tensor, that of its values."""
        names = [
            self._tensor(first, last)[0]
            for number, _, first, last in self._fields(start, end, _ONCE_IN_PAIR)
            if number in (1, 2)
        ]
        return names[0] if names else ''

    def _tensor(self, start: int, end: int) -> tuple[str, int]:
        """Name of a tensor, and the product of its values where it can be a shape."""
        name, kind = '', 0
        values: list[int] = []
        for field in self._fields(start, end, _ONCE_IN_TENSOR):
            number, wire, first, last = field
            if number == _EXTERNAL or (number == _LOCATION and first != 0):
                raise _RefusedError('it keeps weights in another file')
            if number == _TENSOR_NAME:
                name = self._text(field)
            elif number == _TYPE and wire == 0:
                # as ONNX Runtime reads an enumeration
                kind = first & 0xFFFFFFFF
            elif number == _INT64_DATA:
                values += [_signed(first)] if wire == 0 else self._packed(first, last)
            elif number == _RAW:
                raw = self._data[first : min(last, first + 8 * (_MOST_DIMENSIONS + 1))]
                values += [
                    int.from_bytes(raw[at : at + 8], 'little', signed=True)
                    for at in range(0, len(raw) - 7, 8)
                ]
        return name, _size(values) if kind == _INT64 else 1

    def _packed(self, start: int, end: int) -> list[int]:
        values: list[int] = []
        while start < end and len(values) <= _MOST_DIMENSIONS:
            value, start = self._varint(start, end)
            values.append(_signed(value))
        return values

    def _text(self, field: Field) -> str:
        _, wire, start, end = field
        if wire != 2:
            raise _RefusedError('a name in it is none')
        return self._data[start:end].decode('utf-8', 'backslashreplace')

    def _fields(self, start: int, end: int, once: Collection[int] = ()) -> Iterator[Field]:
        """Number, wire type, and where the value stands; of a varint the value itself, and 0."""
        met: set[int] = set()
        while start < end:
            before = start
            key, start = self._varint(start, end)
            number, wire = key >> 3, key & 7
            # ONNX Runtime cuts keys to 32 bits: a field unknown here would be one of ONNX there
            if key > _MOST_KEY or start - before > 5 or number == 0:
                raise _RefusedError('it is no ONNX model: a key of a field in it is none')
            if number in once and number in met:
                raise _RefusedError(f'field {number} stands twice where ONNX has it once')
            met.add(number)
            if wire == 0:
                value, start = self._varint(start, end)
                yield number, wire, value, 0
                continue
            length = {1: 8, 5: 4}.get(wire)
            if wire == 2:
                length, start = self._varint(start, end)
            if length is None or length > end - start:
                raise _RefusedError('it is no ONNX model, or cut short')
            yield number, wire, start, start + length
            start += length

    def _varint(self, start: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if start >= end:
                break
            byte = self._data[start]
            start += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, start
        raise _RefusedError('it is no ONNX model, or cut short')


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _size(shape: Sequence[int]) -> int:
    """How many values a tensor of such a shape has; of too many dimensions, too many."""
    return MAX_VALUES + 1 if len(shape) > _MOST_DIMENSIONS else _product(shape)


def _product(values: Iterable[int]) -> int:
    """As far as it matters: else one could ask for numbers that take up the memory themselves."""
    product = 1
    for value in values:
        product = min(product * max(value, 1), MAX_VALUES + 1)
    return product
