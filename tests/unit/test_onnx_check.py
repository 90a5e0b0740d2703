"""Graphs that ONNX Runtime had better not open are refused, and ours are not."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from finetuner.artifact import load_artifact, save_artifact
from finetuner.excepts import ArtifactError
from finetuner.onnx_check import check_graph
from finetuner.onnx_export import export_onnx
from tests.unit.tiny_artifacts import make_model, make_spec, pictures


def tensor(name='w', location=None, **options):
    made = numpy_helper.from_array(np.ones((4, 2), np.float32), name)
    if location is not None:
        made.ClearField('raw_data')
        made.data_location = TensorProto.EXTERNAL
        for key, value in {'location': location, **options}.items():
            made.external_data.add(key=key, value=str(value))
    return made


def model(nodes=None, initializers=None, **parts):
    nodes = nodes or [helper.make_node('MatMul', ['x', 'w'], ['y'])]
    graph = helper.make_graph(
        nodes,
        'g',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['n', 4])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        [tensor()] if initializers is None else initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], **parts)


def constant(output, values):
    value = numpy_helper.from_array(np.asarray(values, np.int64))
    return helper.make_node('Constant', [], [output], value=value)


def inner(depth):
    if depth == 0:
        node = helper.make_node('Identity', ['x'], ['z'])
    else:
        node = helper.make_node(
            'If', ['c'], ['z'], then_branch=inner(depth - 1), else_branch=inner(0)
        )
    return helper.make_graph([node], f'g{depth}', [], [helper.make_empty_tensor_value_info('z')])


def branching(depth, node=None):
    graph = inner(depth)
    if node is not None:
        graph.node.insert(0, node)
    condition = numpy_helper.from_array(np.array(True), 'c')
    made = helper.make_node('If', ['c'], ['y'], then_branch=graph, else_branch=inner(0))
    return model([made], [condition])


def encoded(number, value, key_above=0):
    """A field of protobuf: bytes, or a whole number; its key with more bits than keys have."""
    wire = 2 if isinstance(value, bytes) else 0
    key = varint(number << 3 | wire | key_above << 32)
    return key + (varint(len(value)) + value if wire else varint(value))


def varint(value):
    found = b''
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def written(node, initializers=(), again=b''):
    """A model of one node, of bytes that no writer of protobuf would write."""
    value = helper.make_tensor_value_info('x', TensorProto.FLOAT, [1]).SerializeToString()
    out = helper.make_tensor_value_info('y', TensorProto.FLOAT, None).SerializeToString()
    graph = encoded(1, node) + encoded(2, b'g') + encoded(11, value) + encoded(12, out)
    graph += b''.join(encoded(5, each) for each in initializers)
    opset = encoded(8, encoded(1, b'') + encoded(2, 17))
    return encoded(1, 8) + opset + encoded(7, graph) + again


def hidden_place(key_above):
    """Weights in another file, said with keys that ONNX Runtime cuts to those of ONNX."""
    place = encoded(1, b'location') + encoded(2, b'/etc/passwd')
    weights = encoded(1, 1) + encoded(2, 1) + encoded(8, b'w')
    weights += encoded(13, place, key_above) + encoded(14, 1, key_above)
    return written(helper.make_node('Add', ['x', 'w'], ['y']).SerializeToString(), [weights])


def hidden_loop():
    node = encoded(1, b'x') + encoded(2, b'y') + encoded(4, b'Identity')
    return written(node + encoded(4, b'Loop', 1))


def sized_twice():
    """A shape whose values stand in one field of two, of which the last counts."""
    huge, junk = (np.array(each, np.int64).tobytes() for each in ([1 << 42], [1] * 17))
    shape = encoded(1, 1) + encoded(2, 7) + encoded(8, b's') + encoded(9, junk) + encoded(9, huge)
    node = helper.make_node('ConstantOfShape', ['s'], ['y'])
    return written(node.SerializeToString(), [shape])


def handed_on(*operators, **values):
    """A shape that comes over other operators."""
    nodes = [helper.make_node('Constant', [], ['s0'], **values)]
    for number, name in enumerate(operators):
        options = {'to': 7} if name == 'Cast' else {'axis': 0} if name == 'Concat' else {}
        taken = [f's{number}'] * (2 if name == 'Concat' else 1)
        nodes.append(helper.make_node(name, taken, [f's{number + 1}'], **options))
    return model([*nodes, helper.make_node('ConstantOfShape', [f's{len(operators)}'], ['y'])])


def function_model():
    made = model([helper.make_node('Mine', ['x'], ['y'], domain='')])
    identity = helper.make_node('Identity', ['a'], ['b'])
    opsets = [helper.make_opsetid('', 17)]
    made.functions.append(helper.make_function('', 'Mine', ['a'], ['b'], [identity], opsets))
    return made


def sized(operator, *shapes):
    nodes, last = [], 'x'
    for number, shape in enumerate(shapes):
        nodes.append(constant(f's{number}', shape))
        inputs = [f's{number}'] if operator == 'ConstantOfShape' else [last, f's{number}']
        nodes.append(helper.make_node(operator, inputs, [last := f't{number}']))
    return model([*nodes, helper.make_node('Identity', [last], ['y'])])


REFUSED = {
    'an absolute place': (model(initializers=[tensor('w', '/etc/passwd')]), 'another file'),
    'a place above': (model(initializers=[tensor('w', '../../w')]), 'another file'),
    'a place beside': (model(initializers=[tensor('w', 'w.bin', offset=1 << 60)]), 'another file'),
    'in an attribute': (
        model([helper.make_node('Constant', [], ['y'], value=tensor('w', '/etc/passwd'))]),
        'another file',
    ),
    'in a branch': (
        branching(1, helper.make_node('Constant', [], ['k'], value=tensor('w', '/etc/passwd'))),
        "'If' is not among",
    ),
    'an operator of its own': (
        model([helper.make_node('Evil', ['x'], ['y'], domain='custom')]),
        r"'custom.Evil' is not among",
    ),
    'a loop': (model([helper.make_node('Loop', ['x'], ['y'])]), "'Loop' is not among"),
    'a file of an execution provider': (
        model([helper.make_node('EPContext', ['x'], ['y'], domain='com.microsoft')]),
        'EPContext',
    ),
    'a function': (function_model(), 'functions'),
    'a circle': (
        model([helper.make_node('Add', ['x', 'b'], ['a']), helper.make_node('Neg', ['a'], ['b'])]),
        "takes 'b', which nothing before it gives",
    ),
    'a branch': (branching(1), "'If' is not among"),
    'a graph in a node': (
        model([helper.make_node('Neg', ['x'], ['y'], body=inner(0))]),
        'holds a graph of its own',
    ),
    'numbers drawn': (
        model([helper.make_node('RandomNormal', [], ['y'], shape=[1 << 42])]),
        "'RandomNormal' is not among",
    ),
    'a place behind a key of 33 bits': (hidden_place(1), 'a key of a field in it is none'),
    'a place behind a key of 64 bits': (hidden_place(1 << 31), 'a key of a field in it is none'),
    'a loop behind a key of 33 bits': (hidden_loop(), 'a key of a field in it is none'),
    'field 0': (written(b'', again=b'\0\0'), 'a key of a field in it is none'),
    'a key of six bytes': (
        written(b'', again=b'\x88\x80\x80\x80\x80\0\0'),
        'a key of a field in it is none',
    ),
    'two graphs': (written(b'', again=encoded(7, b'')), 'field 7 stands twice'),
    'two operators': (
        written(encoded(4, b'Loop') + encoded(4, b'Identity')),
        'field 4 stands twice',
    ),
    'two shapes in one': (sized_twice(), 'field 9 stands twice'),
    'a shape in the node': (handed_on(value_ints=[1 << 42]), 'would make a tensor of'),
    'a shape handed on': (
        handed_on('Identity', 'Cast', value_ints=[1 << 42]),
        'would make a tensor of',
    ),
    'a shape joined': (
        handed_on(*['Concat'] * 60, value_ints=[1 << 8]),
        'would make a tensor of',
    ),
    'a shape of many dimensions': (handed_on(value_ints=[2] * 40), 'would make a tensor of'),
    'an endless range': (
        model(
            [
                helper.make_node('Constant', [], ['a'], value_int=0),
                helper.make_node('Constant', [], ['b'], value_int=1 << 42),
                helper.make_node('Constant', [], ['c'], value_int=1),
                helper.make_node('Range', ['a', 'b', 'c'], ['y']),
            ]
        ),
        'would make a tensor of',
    ),
    'a huge tensor': (sized('ConstantOfShape', [1 << 20, 1 << 20]), 'would make a tensor of'),
    'tiles of tiles': (sized('Tile', [1 << 12, 1], [1 << 12, 1], [1 << 12, 1]), "'Tile' would"),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, tmp_path):
    made, says = REFUSED[name]
    data = made if isinstance(made, bytes) else made.SerializeToString()
    (tmp_path / 'model.onnx').write_bytes(data)
    with pytest.raises(ArtifactError, match=rf'model.onnx is refused: .*{says}'):
        check_graph(tmp_path / 'model.onnx')


def test_what_is_no_graph(tmp_path):
    path = tmp_path / 'model.onnx'
    whole = model().SerializeToString()
    for data in (b'', b'\xff' * 100, whole[:-3], b'nothing of the kind', b'\x3a\xff\xff\xff\x7f'):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r'model.onnx is refused'):
            check_graph(path)


def test_too_many_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr('finetuner.onnx_check.MAX_NODES', 10)
    nodes = [helper.make_node('Neg', [f'x{i}' if i else 'x'], [f'x{i + 1}']) for i in range(11)]
    (tmp_path / 'model.onnx').write_bytes(model(nodes).SerializeToString())
    with pytest.raises(ArtifactError, match='more than 10 nodes'):
        check_graph(tmp_path / 'model.onnx')


@pytest.mark.parametrize(
    'made', [model(), handed_on('Identity', value_ints=[4]), sized('Expand', [32, 4])]
)
def test_harmless(made, tmp_path):
    (tmp_path / 'model.onnx').write_bytes(made.SerializeToString())
    check_graph(tmp_path / 'model.onnx')


def test_our_own(tmp_path):
    export_onnx(make_model(), tmp_path / 'model.onnx', pictures())
    check_graph(tmp_path / 'model.onnx')


def test_a_place_that_is_said_plainly_is_refused_as_before(tmp_path):
    (tmp_path / 'model.onnx').write_bytes(hidden_place(0))
    with pytest.raises(ArtifactError, match='another file'):
        check_graph(tmp_path / 'model.onnx')


def test_what_would_be_refused_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr('finetuner.onnx_check.MAX_NODES', 3)
    with pytest.raises(ArtifactError, match='more than 3 nodes'):
        export_onnx(make_model(), tmp_path / 'model.onnx', pictures())
    assert not (tmp_path / 'model.onnx').exists()


def test_an_artifact_is_not_opened_with_such_a_graph(tmp_path):
    save_artifact(tmp_path / 'a', make_model(), make_spec(), onnx_inputs=pictures())
    assert load_artifact(tmp_path / 'a').onnx_path
    graph = onnx.load(tmp_path / 'a' / 'model.onnx')
    graph.graph.initializer[0].CopyFrom(tensor(graph.graph.initializer[0].name, '/etc/passwd'))
    (tmp_path / 'a' / 'model.onnx').write_bytes(graph.SerializeToString())
    from tests.unit.test_artifact import rehash

    rehash(tmp_path / 'a', 'model.onnx')
    with pytest.raises(ArtifactError, match='another file'):
        load_artifact(tmp_path / 'a')
