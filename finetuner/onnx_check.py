"""Look at an ONNX graph before ONNX Runtime opens it: what could do harm is refused.

ONNX Runtime opens any file that a graph names as the place of its weights, and follows loops and
nested functions as far as they go. The graphs that this library writes hold all their weights and
have neither, so that nothing is lost by demanding it. The file is walked, not parsed: weights are
stepped over, which takes milliseconds where reading them takes as long as loading the model.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from finetuner.excepts import ArtifactError

MAX_NODES = 100_000
MAX_DEPTH = 8
# values of one tensor that the graph makes of nothing but sizes it holds; 1 GiB of float32
MAX_VALUES = 1 << 28
# '' is ONNX itself; ONNX Runtime's own operators stand in graphs that it optimised or quantised
_DOMAINS = ('', 'ai.onnx', 'com.microsoft')
# without an end of their own; and the last opens files
_REFUSED = ('Loop', 'Scan', 'SequenceMap', 'EPContext')
# which input of an operator is the shape, or the factors, of what it makes
_SHAPES = {'ConstantOfShape': 0, 'Expand': 1, 'Tile': 1}
_INT64 = 7
_MOST_DIMENSIONS = 16

# numbers of the fields in onnx.proto
_GRAPH, _TRAINING, _FUNCTIONS = 7, 20, 25
_NODE, _INITIALIZER, _SPARSE_INITIALIZER, _GRAPH_INPUT = 1, 5, 15, 11
_INPUT, _OUTPUT, _OPERATOR, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7
_ONE_TENSOR, _ONE_GRAPH, _TENSORS, _GRAPHS, _ONE_SPARSE, _SPARSE = 5, 6, 10, 11, 22, 23
_DIMS, _TYPE, _INT64_DATA, _TENSOR_NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 7, 8, 9, 13, 14

Field = tuple[int, int, int, int]


def check_graph(path: Path) -> None:
    """Refuse a graph that ONNX Runtime had better not open.

    Args:
        path: of an ONNX file.

    Raises:
        ArtifactError: it is none, keeps weights in other files, has operators or functions that
            this library's graphs have not, or goes round in circles.
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
        self._nodes = 0
        self._growth = 1

    def model(self) -> None:
        graphs = 0
        for number, _, start, end in self._fields(0, len(self._data)):
            if number in (_TRAINING, _FUNCTIONS):
                raise _RefusedError('it has functions or training steps of its own')
            if number == _GRAPH:
                graphs += 1
                self._graph(start, end, 0, set())
        if graphs != 1:
            raise _RefusedError(f'it is no ONNX model: it has {graphs} graphs')

    def _graph(self, start: int, end: int, depth: int, outside: set[str]) -> None:
        if depth > MAX_DEPTH:
            raise _RefusedError(f'graphs stand in graphs, more than {MAX_DEPTH} deep')
        known = set(outside)
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
                known.update(self._text(f) for f in self._fields(first, last) if f[0] == 1)
        self._nodes += len(nodes)
        if self._nodes > MAX_NODES:
            raise _RefusedError(f'it has more than {MAX_NODES:,} nodes')
        for first, last in nodes:
            self._node(first, last, depth, known, sizes)

    def _node(
        self, start: int, end: int, depth: int, known: set[str], sizes: dict[str, int]
    ) -> None:
        operator, domain = '', ''
        inputs, outputs, attributes = [], [], []
        for field in self._fields(start, end):
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
        if domain not in _DOMAINS or operator in _REFUSED:
            named = f'{domain}.{operator}' if domain else operator
            raise _RefusedError(f'operator {named!r} is not among those that are run here')
        for name in inputs:
            if name and name not in known:
                raise _RefusedError(
                    f'a node of {operator!r} takes {name!r}, which nothing before it gives'
                )
        self._check_size(operator, inputs, sizes)
        for _, _, first, last in attributes:
            values = self._attribute(first, last, depth, known)
            if operator == 'Constant' and outputs and values is not None:
                sizes[outputs[0]] = values
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
            raise _RefusedError(f'{operator!r} would make a tensor of {values:,} values')

    def _attribute(self, start: int, end: int, depth: int, known: set[str]) -> int | None:
        """Check what a node holds; the product of its tensor's values where that is a shape."""
        product = None
        for number, _, first, last in self._fields(start, end):
            if number in (_ONE_TENSOR, _TENSORS):
                product = self._tensor(first, last)[1]
            elif number in (_ONE_SPARSE, _SPARSE):
                self._sparse(first, last)
            elif number in (_ONE_GRAPH, _GRAPHS):
                self._graph(first, last, depth + 1, known)
        return product

    def _sparse(self, start: int, end: int) -> str:
        """Name of a sparse tensor, that of its values."""
        names = [
            self._tensor(first, last)[0]
            for number, _, first, last in self._fields(start, end)
            if number in (1, 2)
        ]
        return names[0] if names else ''

    def _tensor(self, start: int, end: int) -> tuple[str, int]:
        """Name of a tensor, and the product of its values where it can be a shape."""
        name, kind, product = '', 0, 1
        values: list[int] = []
        for field in self._fields(start, end):
            number, wire, first, last = field
            if number == _EXTERNAL or (number == _LOCATION and first != 0):
                raise _RefusedError('it keeps weights in another file')
            if number == _TENSOR_NAME:
                name = self._text(field)
            elif number == _TYPE and wire == 0:
                kind = first
            elif number == _INT64_DATA:
                values += [_signed(first)] if wire == 0 else self._packed(first, last)
            elif number == _RAW and last - first <= 8 * _MOST_DIMENSIONS:
                raw = self._data[first:last]
                values += [
                    int.from_bytes(raw[at : at + 8], 'little', signed=True)
                    for at in range(0, len(raw) - 7, 8)
                ]
        if kind == _INT64 and len(values) <= _MOST_DIMENSIONS:
            for value in values:
                product *= max(value, 1)
        return name, product

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

    def _fields(self, start: int, end: int) -> Iterator[Field]:
        """Number, wire type, and where the value stands; of a varint the value itself, and 0."""
        while start < end:
            key, start = self._varint(start, end)
            wire = key & 7
            if wire == 0:
                value, start = self._varint(start, end)
                yield key >> 3, wire, value, 0
                continue
            length = {1: 8, 5: 4}.get(wire)
            if wire == 2:
                length, start = self._varint(start, end)
            if length is None or length > end - start:
                raise _RefusedError('it is no ONNX model, or cut short')
            yield key >> 3, wire, start, start + length
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
