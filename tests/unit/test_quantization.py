"""Int8 graphs: near fp32, and the same vector whoever the neighbours are, in every engine."""

import logging

import numpy as np
import onnx
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.artifact import ModelSpec
from finetuner.engines import OnnxEngine, TorchEngine
from finetuner.excepts import ArtifactError
from finetuner.inputs import PictureReader, build_reader
from finetuner.models.tailor import build_embedding_model
from finetuner.models.zoo import (
    PictureSpec,
    backbone_tokenizer,
    get_backbone,
    input_spec,
    parse_options,
)
from finetuner.onnx_export import export_onnx
from finetuner.openvino_engine import OpenvinoEngine
from finetuner.precision_record import GRAPH_ENGINES
from finetuner.quantization import BLOCK_SIZE, blocks_of, write_int8
from tests.conftest import make_picture_docs
from tests.unit.tiny_artifacts import assert_same_vectors, cosine, make_model, pictures
from tests.unit.tiny_encoder import write_tiny_encoder

SIZE = 64
WORDS = ['the', 'red', 'dog', 'and', 'a', 'small', 'cat', 'of', 'blue', 'coat', 'left', 'shoe']


def texts(number, longest=30, seed=0):
    rng = np.random.default_rng(seed)
    return [' '.join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(number)]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Exported:
    """A model in all engines and precisions."""

    def __init__(self, name, options, folder, docs):
        backbone = get_backbone(name)
        inputs = input_spec(backbone, parse_options(backbone, options))
        self.model = build_embedding_model(backbone, options).eval()
        self.reader = build_reader(inputs, backbone_tokenizer(backbone))
        self.spec = ModelSpec(name, backbone.dimension, inputs)
        self.items = [self.reader.read(doc) for doc in docs]
        self.graphs = {each: folder / f'{each}.onnx' for each in ('fp32', 'int8')}
        export_onnx(self.model, self.graphs['fp32'], self.reader.batch(self.items[:8]))
        batches = [self.reader.batch(self.items[start : start + 8]) for start in range(0, 64, 8)]
        self.takes_ranges = write_int8(self.graphs['fp32'], self.graphs['int8'], batches)
        self._engines = {}

    def engine(self, name, precision='fp32'):
        key = name, precision
        if key not in self._engines:
            if name == 'torch':
                built = TorchEngine(self.model, self.spec, self.reader)
            elif name == 'openvino':
                built = OpenvinoEngine(
                    self.graphs[precision], self.spec, self.reader, precision=precision
                )
            else:
                built = OnnxEngine(
                    self.graphs[precision], self.spec, self.reader, precision=precision
                )
            self._engines[key] = built
        return self._engines[key]

    def embed(self, engine, items):
        return engine.embed(self.reader.batch(items))


def picture_documents():
    return make_picture_docs(num_classes=16, items_per_class=5)


def text_documents():
    return DocumentArray(Document(text=text) for text in texts(80))


@pytest.fixture(scope='module', params=['tiny texts', 'MiniLM', 'EfficientNet'])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    if request.param == 'EfficientNet':
        return Exported('efficientnet-lite0', {'input_size': SIZE}, folder, picture_documents())
    name = 'all-MiniLM-L6-v2'
    if request.param == 'tiny texts':
        name = str(write_tiny_encoder(folder / 'encoder'))
    return Exported(name, {}, folder, text_documents())


@pytest.mark.parametrize('precision', ['fp32', 'int8'])
@pytest.mark.parametrize('name', GRAPH_ENGINES)
def test_the_neighbours_do_not_show(exported, name, precision):
    """A batch of 1, and of 64 with the item first and last, of any length and neighbours."""
    engine = exported.engine(name, precision)
    items = sorted(exported.items, key=len)
    for place in (0, len(items) // 2, len(items) - 1):
        one, others = items[place], [*items[:place], *items[place + 1 :]][:63]
        alone = unit(exported.embed(engine, [one])[0])
        for batch, position in (([one, *others], 0), ([*others, one], -1), ([one, one], 1)):
            found = unit(exported.embed(engine, batch)[position])
            assert np.abs(found - alone).max() <= 1e-4


def test_engines_agree_in_fp32(exported):
    expected = exported.embed(exported.engine('torch'), exported.items)
    for name in GRAPH_ENGINES:
        assert_same_vectors(exported.embed(exported.engine(name), exported.items), expected)


def test_int8_is_near_fp32_and_another_graph(exported):
    expected = exported.embed(exported.engine('onnx'), exported.items)
    for name in GRAPH_ENGINES:
        found = exported.embed(exported.engine(name, 'int8'), exported.items)
        assert cosine(found, expected).mean() > 0.95
        # and it is not fp32 under another name
        assert np.abs(unit(found) - unit(expected)).max() > 1e-5
    of_pictures = isinstance(exported.reader, PictureReader)
    assert exported.takes_ranges == of_pictures
    kinds = {node.op_type for node in onnx.load(str(exported.graphs['int8'])).graph.node}
    assert ('QuantizeLinear' if of_pictures else 'MatMulNBits') in kinds
    # one scale over the whole batch is what must not be
    assert 'DynamicQuantizeLinear' not in kinds


def test_real_graphs_are_smaller_and_take_uint8(exported):
    sizes = [exported.graphs[each].stat().st_size for each in ('fp32', 'int8')]
    if exported.model.backbone.__class__.__name__ == 'TextEncoder':
        if sizes[0] > 10**6:
            assert sizes[1] < 0.7 * sizes[0]
        return
    assert sizes[1] < 0.35 * sizes[0]
    entry = onnx.load(str(exported.graphs['int8'])).graph.input[0].type.tensor_type
    assert entry.elem_type == onnx.TensorProto.UINT8


def test_blocks_give_the_weight_back():
    weight = np.random.default_rng(0).normal(size=(2 * BLOCK_SIZE + 5, 7)).astype(np.float32)
    weight[:BLOCK_SIZE, 3] = 0
    values, scales = blocks_of(weight)
    assert (values.shape, values.dtype) == ((7, 3, BLOCK_SIZE), np.uint8)
    assert scales.shape == (7, 3)
    again = ((values.astype(np.float32) - 128) * scales[:, :, None]).reshape(7, -1)
    assert not again[:, len(weight) :].any()
    assert np.abs(again[:, : len(weight)].T - weight).max() <= np.abs(weight).max() / 254 * 1.001
    assert not again[3, :BLOCK_SIZE].any()


def test_a_graph_that_has_nothing_to_quantise(tmp_path):
    class Sum(torch.nn.Module):
        def forward(self, pixels):
            return pixels.float().mean(dim=(1, 2)) + 1

    export_onnx(Sum(), tmp_path / 'a.onnx', np.ones((2, 4, 4, 3), np.uint8))
    with pytest.raises(ArtifactError, match='neither convolutions nor products'):
        write_int8(tmp_path / 'a.onnx', tmp_path / 'b.onnx', [])
    assert not (tmp_path / 'b.onnx').exists()


def test_convolutions_need_pictures(tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(2)), torch.nn.Flatten())

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model(pixels.float())

    export_onnx(Network(), tmp_path / 'a.onnx', np.ones((2, 4, 4, 3), np.uint8))
    with pytest.raises(ArtifactError, match='ranges from real pictures'):
        write_int8(tmp_path / 'a.onnx', tmp_path / 'b.onnx', [])
    assert not (tmp_path / 'b.onnx').exists()


def test_quantising_leaves_the_log_alone(tmp_path, caplog):
    """ONNX Runtime's tools write to the root logger, which is the run's."""
    with caplog.at_level(logging.INFO):
        export_onnx(make_model(), tmp_path / 'a.onnx', pictures())
        assert write_int8(tmp_path / 'a.onnx', tmp_path / 'b.onnx', [pictures(8, seed=1)])
    assert [record.message for record in caplog.records if record.name == 'root'] == []


def test_openvino_opens_no_other_file(tmp_path):
    path = tmp_path / 'a.onnx'
    model = torch.nn.Linear(3, 2).eval()

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model(pixels.float().mean(dim=(1, 2)))

    export_onnx(Network(), path, np.ones((2, 4, 4, 3), np.uint8))
    graph = onnx.load(str(path))
    onnx.save(graph, str(path), save_as_external_data=True, location='weights', size_threshold=0)
    spec = ModelSpec('linear', 2, PictureSpec(4))
    with pytest.raises(ArtifactError, match='keeps weights in other files'):
        OpenvinoEngine(path, spec, PictureReader(spec.inputs))
    with pytest.raises(ArtifactError, match=r'OpenVINO cannot load|cannot be read'):
        OpenvinoEngine(b'no graph', spec, PictureReader(spec.inputs))
