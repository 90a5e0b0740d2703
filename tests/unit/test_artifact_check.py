"""Artifacts whose hashes are right and whose files are not: refused before a library opens them."""

import json
import shutil
from functools import partial

import pytest
from docarray import Document, DocumentArray

from finetuner.artifact import load_artifact, save_model
from finetuner.artifact_files import hash_file
from finetuner.excepts import ArtifactError
from finetuner.inference import build_engine, load_engine
from finetuner.model_spec import MANIFEST
from tests.unit.tiny_encoder import write_tiny_encoder


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp('check')
    engine = build_engine(str(write_tiny_encoder(folder / 'encoder')), device='cpu')
    save_model(engine, folder / 'made')
    return folder / 'made'


@pytest.fixture
def directory(original, tmp_path):
    return shutil.copytree(original, tmp_path / 'copy')


def rehash(directory):
    """What whoever changes files does as well."""
    manifest = json.loads((directory / MANIFEST).read_text())
    files = [path for path in sorted(directory.rglob('*')) if path.is_file()]
    manifest['files'] = {
        path.relative_to(directory).as_posix(): hash_file(path)
        for path in files
        if path.name != MANIFEST
    }
    (directory / MANIFEST).write_text(json.dumps(manifest))


def changed(name, **values):
    def change(directory):
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def written(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def vocabulary_of(directory, number):
    path = directory / 'tokenizer.json'
    tokenizer = json.loads(path.read_text())
    tokenizer['model']['vocab']['dog'] = number
    path.write_text(json.dumps(tokenizer))


config, tokenizer = partial(changed, 'config.json'), partial(changed, 'tokenizer.json')
REFUSED = {
    'code': (written('evil.py', b'1'), "'evil.py'"),
    'pickled weights': (written('pytorch_model.bin', b''), "'pytorch_model.bin'"),
    'an adapter': (written('adapter_config.json', b'{}'), 'none of them adapters'),
    'code for attention': (config(attn_implementation='evil/kernel'), 'asks for code'),
    'quantisation': (config(quantization_config={'quant_method': 'gptq'}), 'asks for code'),
    'more layers than tensors': (config(num_hidden_layers=3000), 'num_hidden_layers=3000, which'),
    'no machine has room': (config(intermediate_size=10**9), 'its weights cannot fill'),
    'less than nothing': (config(hidden_size=-5), 'its weights cannot fill'),
    'no config': (written('config.json', b'[' * 200_000), 'cannot be read'),
    'a list': (written('config.json', b'[]'), 'no JSON object'),
    'no weights': (written('model.safetensors', b'\xff' * 20), 'cannot be read'),
    'a text before each text': (
        tokenizer(normalizer={'type': 'Prepend', 'prepend': 'a ' * 10**6}),
        'would put a long text into each text',
    ),
    'tokens of nobody': (lambda d: vocabulary_of(d, 10**6), 'does not know'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, directory):
    change, says = REFUSED[name]
    change(directory)
    rehash(directory)
    with pytest.raises(ArtifactError, match=says):
        load_artifact(directory)


def test_a_file_that_the_manifest_does_not_name(directory):
    (directory / '.DS_Store').write_bytes(b'of no interest')
    load_artifact(directory)
    (directory / '1_Pooling' / 'more.json').write_text('{}')
    with pytest.raises(ArtifactError, match=r"'1_Pooling/more.json' lies in the artifact"):
        load_artifact(directory)


@pytest.mark.parametrize('known', [True, False])
def test_code_named_in_a_config_is_not_run_nor_asked_about(known, directory, monkeypatch):
    names = {'AutoConfig': 'evil.Config', 'AutoModel': 'evil.Model'}
    config(auto_map=names, **({} if known else {'model_type': 'evil'}))(directory)
    changed('tokenizer_config.json', auto_map={'AutoTokenizer': ['evil.T', 'evil.T']})(directory)
    rehash(directory)
    monkeypatch.setattr('builtins.input', lambda *_: pytest.fail('nobody is there to answer'))
    if not known:
        with pytest.raises(ArtifactError, match='do not fit'):
            load_engine(directory, is_onnx=False, device='cpu')
        return
    docs = DocumentArray([Document(text='a red shoe')])
    assert load_engine(directory, is_onnx=False, device='cpu').encode_documents(docs) == []
    assert docs[0].embedding is not None


def test_a_config_of_a_wrong_type(directory):
    config(hidden_size='many')(directory)
    rehash(directory)
    with pytest.raises(ArtifactError, match='do not fit'):
        load_engine(directory, is_onnx=False, device='cpu')


@pytest.mark.parametrize('size', [0, -1, 1 << 17, 10**30])
@pytest.mark.parametrize('name', ['dimension', 'output_dim'])
def test_dimensions_without_room(directory, name, size):
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest['model'][name] = size
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match='out of range'):
        load_artifact(directory)


def test_one_name_twice_in_the_manifest(directory):
    path = directory / MANIFEST
    path.write_text(path.read_text().replace('{', '{"files": {}, ', 1))
    with pytest.raises(ArtifactError, match='stands twice'):
        load_artifact(directory)
