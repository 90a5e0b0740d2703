"""Engines: order, batches, failures that stay alone, and torch and ONNX alike."""

import copy

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

import finetuner
from finetuner.artifact import TrainingRecord, save_artifact
from finetuner.engines import TorchEngine
from finetuner.excepts import ArtifactError, ConfigError, DataError, PictureError
from finetuner.images import load_picture
from finetuner.inference import build_engine, load_engine
from tests.conftest import make_picture_docs
from tests.unit.tiny_artifacts import (
    NAME,
    assert_same_vectors,
    cosine,
    make_model,
    make_spec,
    pictures,
)

SIZE = 32


@pytest.fixture(scope='module')
def artifact(tmp_path_factory):
    directory = tmp_path_factory.mktemp('inference') / 'made'
    save_artifact(directory, make_model(), make_spec(), TrainingRecord(), onnx_inputs=pictures())
    return directory


@pytest.fixture(scope='module', params=['torch', 'onnx'])
def engine(request, artifact):
    return load_engine(artifact, is_onnx=request.param == 'onnx', device='cpu')


@pytest.fixture(scope='module')
def pretrained():
    return build_engine('efficientnet-lite0', {'input_size': 64}, device='cpu')


def embeddings_of(engine, docs, batch_size=None):
    docs = DocumentArray(copy.deepcopy(list(docs)))
    assert engine.encode_documents(docs, batch_size) == []
    return docs.embeddings


def test_what_an_engine_says_of_itself(engine):
    assert (engine.name, engine.dimension, engine.device) == (NAME, 16, 'cpu')
    assert engine.batch_size == 32


def test_embeddings_are_those_of_the_pictures_in_order(engine, picture_docs):
    found = embeddings_of(engine, picture_docs, 5)
    stacked = np.stack([load_picture(doc.blob, SIZE) for doc in picture_docs])
    assert found.shape == (24, 16)
    assert found.dtype == np.float32
    assert_same_vectors(found, engine.embed(stacked))
    # and are not all the same
    assert np.linalg.norm(found[0] - found[-1]) > 1e-3


@pytest.mark.parametrize('batch_size', [1, 5, 24, 100])
def test_the_batch_size_changes_nothing(engine, picture_docs, batch_size):
    expected = embeddings_of(engine, picture_docs)
    found = embeddings_of(engine, picture_docs, batch_size)
    assert cosine(found, expected).min() > 1 - 1e-6
    assert_same_vectors(found, expected)


def test_torch_and_onnx_agree(artifact, picture_docs):
    torch_engine = load_engine(artifact, is_onnx=False, device='cpu')
    onnx_engine = load_engine(artifact, is_onnx=True, device='cpu')
    pair = [embeddings_of(e, picture_docs) for e in (torch_engine, onnx_engine)]
    assert cosine(*pair).min() >= 0.9999


def test_pretrained_torch_and_onnx_agree(pretrained, picture_docs):
    onnx_engine = build_engine('efficientnet-lite0', {'input_size': 64}, device='cpu', is_onnx=True)
    assert onnx_engine.is_onnx
    pair = [embeddings_of(e, picture_docs) for e in (pretrained, onnx_engine)]
    assert pair[0].shape == (24, 1280)
    assert cosine(*pair).min() >= 0.9999


def broken_blob():
    data = make_picture_docs(2, 2)[0].blob
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    'bad',
    [
        Document(blob=b'no picture'),
        Document(blob=broken_blob()),
        Document(text='words'),
        Document(),
        Document(uri='/nowhere/absent.png'),
        Document(tensor=np.zeros((2, 2, 7))),
    ],
    ids=['bytes', 'cut off', 'text', 'empty', 'no file', 'shape'],
)
def test_a_broken_picture_leaves_its_neighbours_alone(engine, picture_docs, bad):
    expected = embeddings_of(engine, picture_docs, 8)
    bad = copy.deepcopy(bad)
    bad.embedding = np.ones(16, np.float32)  # of an earlier model
    docs = DocumentArray([*picture_docs[:11], bad, *picture_docs[11:]])
    failures = engine.encode_documents(docs, 8)
    assert [position for position, _ in failures] == [11]
    assert isinstance(failures[0][1], PictureError)
    assert 'Document 11' in str(failures[0][1])
    assert docs[11].embedding is None
    found = np.stack([doc.embedding for position, doc in enumerate(docs) if position != 11])
    assert_same_vectors(found, expected, 1e-5)


def test_a_batch_that_fails_as_a_whole(engine, picture_docs):
    docs = DocumentArray([Document(blob=b'x'), Document(blob=b'y'), *picture_docs[:3]])
    failures = engine.encode_documents(docs, 2)
    assert [position for position, _ in failures] == [0, 1]
    assert all(doc.embedding is not None for doc in docs[2:])
    only = DocumentArray([Document(blob=b'x')])
    assert len(engine.encode_documents(only)) == 1


def test_contents_are_left_as_they_are(engine, tmp_path):
    file = tmp_path / 'one.png'
    file.write_bytes(make_picture_docs(2, 2)[0].blob)
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    docs = DocumentArray(
        [
            Document(uri=str(file), tags={'a': 1}),
            Document(blob=file.read_bytes(), text=''),
            Document(tensor=array.copy()),
        ]
    )
    engine.encode_documents(docs)
    assert (docs[0].uri, docs[0].blob, docs[0].tensor) == (str(file), b'', None)
    assert docs[0].tags == {'a': 1}
    assert docs[1].blob == file.read_bytes()
    assert np.array_equal(docs[2].tensor, array)
    # one picture by two ways in is one embedding
    assert_same_vectors(docs[0].embedding, docs[1].embedding, 1e-5)


def test_nothing_to_encode(engine):
    docs = DocumentArray()
    assert engine.encode_documents(docs) == []
    assert finetuner.encode(engine, docs) is docs
    assert finetuner.encode(engine, []).shape == (0, 16)


def test_encode_takes_paths(engine, picture_docs, tmp_path):
    paths = []
    for number, doc in enumerate(picture_docs[:6]):
        paths.append(str(tmp_path / f'{number}.png'))
        (tmp_path / f'{number}.png').write_bytes(doc.blob)
    found = finetuner.encode(model=engine, data=paths, batch_size=4)
    assert isinstance(found, np.ndarray)
    assert_same_vectors(found, embeddings_of(engine, picture_docs[:6]))


def test_encode_says_what_failed_and_embeds_the_others(engine, picture_docs):
    docs = DocumentArray([*picture_docs[:2], Document(blob=b'x'), Document(blob=b'y')])
    with pytest.raises(DataError, match=r'Document 2: .*and 1 others? failed'):
        finetuner.encode(engine, docs)
    assert docs[0].embedding is not None
    assert docs[1].embedding is not None


@pytest.mark.parametrize('batch_size', [0, -1, 2.5, True, 'x'])
def test_batch_sizes_out_of_range(engine, artifact, picture_docs, batch_size):
    with pytest.raises(ConfigError, match='batch_size'):
        engine.encode_documents(picture_docs, batch_size)
    with pytest.raises(ConfigError, match='batch_size'):
        load_engine(artifact, batch_size=batch_size)
    with pytest.raises(ConfigError, match='batch_size'):
        build_engine(NAME, {'weights': 'none'}, batch_size=batch_size)


@pytest.mark.parametrize('is_onnx', [True, False])
def test_numbers_that_came_as_floats(artifact, picture_docs, is_onnx):
    before = torch.get_num_threads()
    try:
        engine = load_engine(
            artifact, batch_size=4.0, num_threads=1.0, is_onnx=is_onnx, device='cpu'
        )
        assert embeddings_of(engine, picture_docs).shape == (24, 16)
        assert embeddings_of(engine, picture_docs, 7.0).shape == (24, 16)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'device': 'gpu'}, "unknown device 'gpu'.*cpu, cuda"),
        ({'precision': 'int7'}, "unknown precision 'int7'"),
        ({'select_model': 'clip-text'}, 'single model'),
        ({'num_threads': 0}, 'num_threads'),
        ({'num_threads': 1.5}, 'num_threads: 1.5 is not a whole number'),
    ],
)
def test_arguments_out_of_range(artifact, options, message):
    with pytest.raises(ConfigError, match=message):
        load_engine(artifact, **options)


def test_wrong_models():
    with pytest.raises(
        ConfigError, match=r"unknown model 'efficientnet-lite'.*'efficientnet-lite0'"
    ):
        build_engine('efficientnet-lite')
    with pytest.raises(ConfigError, match="did you mean 'input_size'"):
        finetuner.build_model(NAME, {'input_sise': 64})
    with pytest.raises(ArtifactError, match='no artifact at'):
        finetuner.get_model('absent/path')
    with pytest.raises(ConfigError, match=r'model is Linear.*finetuner.embed'):
        finetuner.encode(torch.nn.Linear(1, 1), [])


def test_on_a_cpu_the_graph_is_taken_where_there_is_one(artifact):
    assert load_engine(artifact, device='cpu').is_onnx
    assert not load_engine(artifact, device='cpu', is_onnx=False).is_onnx


def test_pretrained_weights_tell_pictures_apart(pretrained):
    docs = make_picture_docs(num_classes=4, items_per_class=3)
    vectors = embeddings_of(pretrained, docs)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    labels = np.repeat(np.arange(4), 3)
    assert np.mean(labels[similarity.argmax(1)] == labels) == 1.0


def test_an_engine_says_what_it_loaded_and_is_the_one_for_all_documents(engine, artifact):
    name = 'onnx' if engine.is_onnx else 'torch'
    assert (engine.engine, engine.precision) == (name, 'fp32')
    file = artifact / ('model.onnx' if engine.is_onnx else 'model.safetensors')
    # of weights, the file has a header and the state dict lacks mean and standard deviation
    assert engine.num_bytes == pytest.approx(file.stat().st_size, rel=0.05)
    assert engine.engine_for(Document(text='words')) is engine
    assert engine.warm_up() is None


def test_engines_by_name_agree(artifact, picture_docs):
    expected = embeddings_of(load_engine(artifact, engine='torch'), picture_docs)
    for name in ('onnx', 'openvino'):
        engine = load_engine(artifact, engine=name)
        assert (engine.engine, engine.is_onnx, engine.device) == (name, True, 'cpu')
        assert engine.num_bytes == (artifact / 'model.onnx').stat().st_size
        assert_same_vectors(embeddings_of(engine, picture_docs), expected)
    pretrained = build_engine('efficientnet-lite0', {'input_size': SIZE}, engine='openvino')
    assert (pretrained.engine, pretrained.precision) == ('openvino', 'fp32')


@pytest.mark.parametrize('kind', ['pictures', 'texts'])
def test_a_compiled_model_gives_the_same_for_batches_of_any_size(kind, tmp_path):
    """With a backend that counts: the one of runs takes minutes to compile."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if kind == 'texts':
        from tests.unit.tiny_encoder import write_tiny_encoder

        plain = build_engine(str(write_tiny_encoder(tmp_path)), device='cpu')
        docs = [Document(text=' '.join(['red', 'dog'] * (n % 9 + 1))) for n in range(24)]
    else:
        plain = build_engine('efficientnet-lite0', {'input_size': SIZE}, device='cpu')
        docs = make_picture_docs()[:24]
    expected = embeddings_of(plain, docs)
    engine = TorchEngine(plain.model, plain.spec, plain.reader, compile_backend=counting)
    assert (engine.engine, engine.is_onnx) == ('torch-compiled', False)
    assert graphs
    for batch_size in (24, 1, 7):
        assert_same_vectors(embeddings_of(engine, docs, batch_size), expected)
    # not one program for every size
    assert len(graphs) <= 4


def test_a_model_that_cannot_be_compiled_says_so(artifact):
    """No other engine takes its place unasked."""

    def broken(graph, inputs):
        raise OSError('no compiler of C++')

    torch._dynamo.reset()
    plain = load_engine(artifact, engine='torch', device='cpu')
    with pytest.raises(ConfigError, match=r"torch cannot compile.*no compiler.*engine='torch'"):
        TorchEngine(plain.model, plain.spec, plain.reader, compile_backend=broken)


def test_two_openvino_engines_at_once(artifact, picture_docs):
    from concurrent.futures import ThreadPoolExecutor

    engines = [load_engine(artifact, engine='openvino', num_threads=1) for _ in range(2)]
    engines.append(load_engine(artifact, engine='onnx'))
    expected = embeddings_of(engines[2], picture_docs)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(embeddings_of, engines[i % 3], picture_docs, 5) for i in range(12)]
        for each in asked:
            assert_same_vectors(each.result(), expected)


def test_signals_come_to_a_process_that_has_closed_an_openvino_engine(artifact):
    """Where signals go is left as it was: what OpenVINO puts in its place goes with its plugin."""
    import subprocess
    import sys

    code = f"""
import os, signal, threading
from finetuner.inference import load_engine
engines = [load_engine({str(artifact)!r}, engine='openvino')]
last = threading.Thread(target=engines.clear)
last.start()
last.join()
signal.signal(signal.SIGUSR2, lambda *caught: print('it came'))
os.kill(os.getpid(), signal.SIGUSR2)
"""
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, 'it came\n'), ran.stderr


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'engine': 'opnvino'}, "unknown engine 'opnvino'.*did you mean 'openvino'"),
        ({'engine': 'torch', 'is_onnx': True}, "engine='torch' and is_onnx=True contradict"),
        ({'engine': 'openvino', 'is_onnx': False}, "engine='openvino' and is_onnx=False"),
        ({'engine': 'torch', 'precision': 'int8'}, "precision='int8' is that of a graph"),
        ({'is_onnx': False, 'precision': 'int8'}, 'which torch does not run'),
        ({'engine': 'openvino', 'device': 'cuda'}, 'openvino is for CPUs'),
        ({'precision': 'int8', 'device': 'cuda'}, 'int8 is for CPUs'),
        ({'precision': 'fp16', 'device': 'cpu'}, "needs device='cuda'"),
        ({'precision': 'bf16', 'device': 'cuda', 'engine': 'onnx'}, 'that of torch on a GPU'),
        ({'precision': 'fp16', 'device': 'cuda', 'is_onnx': True}, 'that of torch on a GPU'),
    ],
)
def test_engines_and_precisions_that_do_not_fit(artifact, options, message):
    with pytest.raises(ConfigError, match=message):
        load_engine(artifact, **options)


def test_a_pretrained_model_has_no_int8():
    with pytest.raises(ConfigError, match=r"no int8 graph.*export_precision='int8' or 'auto'"):
        build_engine(NAME, {'weights': 'none'}, precision='int8')
    with pytest.raises(ConfigError, match="unknown precision 'int9'"):
        build_engine(NAME, {'weights': 'none'}, precision='int9')


def test_openvino_that_is_not_installed(artifact):
    """As where only the other extras are: `auto` goes without, and who asks is told how."""
    import subprocess
    import sys

    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'openvino':
            raise ModuleNotFoundError(name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'openvino' else found(name, *a)
sys.meta_path.insert(0, Absent())
from finetuner.excepts import ConfigError
from finetuner.inference import load_engine
print(load_engine({str(artifact)!r}, device='cpu').engine)
try:
    load_engine({str(artifact)!r}, engine='openvino')
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == 'onnx'
    assert second.startswith("engine 'openvino' is not installed: pip install openvino")


def test_openvino_tells_nobody(artifact, tmp_path):
    """Its import writes an id for Google Analytics into the home directory, and sends it."""
    import os
    import subprocess
    import sys

    code = f"""
import sys
from finetuner.inference import load_engine
load_engine({str(artifact)!r}, engine='openvino').warm_up()
print('openvino' in sys.modules, 'openvino_telemetry' in sys.modules)
"""
    environment = {**os.environ, 'HOME': str(tmp_path)}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ['True', 'False']
    assert not (tmp_path / 'intel').exists()
