"""Artifacts: what goes in comes out, and whatever is not as it was written is refused."""

import hashlib
import json
import tempfile
import zipfile

import numpy as np
import pytest
import torch

from finetuner import artifact as artifacts
from finetuner.artifact import (
    CARD,
    ONNX,
    WEIGHTS,
    ModelSpec,
    TrainingRecord,
    export_onnx,
    load_artifact,
    save_artifact,
    save_model,
    zip_artifact,
)
from finetuner.excepts import ArtifactError
from finetuner.inference import build_engine, load_engine
from finetuner.model_spec import MANIFEST
from finetuner.models.zoo import PictureSpec
from tests.unit.tiny_artifacts import (
    NAME,
    SIZE,
    assert_same_vectors,
    cosine,
    make_model,
    make_spec,
    pictures,
)

RECORD = TrainingRecord(
    config={'loss': 'TripletMarginLoss', 'epochs': 2},
    metrics={'before': {'x_recall_at_k': 0.25}, 'after': {'x_recall_at_k': 0.75}},
    parent='0' * 24,
    num_documents=24,
)


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """A complete artifact with its model."""
    model = make_model()
    directory = tmp_path_factory.mktemp('artifact') / 'made'
    save_artifact(directory, model, make_spec(), RECORD, onnx_inputs=pictures())
    return directory, model


@pytest.fixture
def directory(original, tmp_path):
    """A copy to spoil."""
    target = tmp_path / 'copy'
    target.mkdir()
    for path in original[0].iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit_manifest(directory, **values):
    path = directory / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rehash(directory, name):
    """Make the manifest agree with a file again, as an attacker would."""
    files = json.loads((directory / MANIFEST).read_text())['files']
    files[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    edit_manifest(directory, files=files)


def test_round_trip_is_bit_identical(original):
    directory, model = original
    found = load_artifact(directory).build_model()
    inputs = torch.from_numpy(pictures(5, seed=2))
    with torch.inference_mode():
        assert torch.equal(found(inputs), model(inputs))
    assert not found.training


def test_what_is_in_it(original):
    directory, _ = original
    assert {path.name for path in directory.iterdir()} == {MANIFEST, WEIGHTS, ONNX, CARD}
    manifest = json.loads((directory / MANIFEST).read_text())
    assert manifest['schema_version'] == 1
    assert manifest['model']['backbone'] == NAME
    assert manifest['model']['dimension'] == 16
    assert manifest['model']['picture']['input_size'] == SIZE
    assert manifest['metrics'] == RECORD.metrics
    assert manifest['config'] == RECORD.config
    assert manifest['parent'] == RECORD.parent
    assert manifest['versions']['torch'] == torch.__version__
    for name, expected in manifest['files'].items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == expected
    card = (directory / CARD).read_text()
    assert '| x_recall_at_k | 0.2500 | 0.7500 |' in card
    assert NAME in card


def test_loaded_artifact_says_what_it_is(original):
    found = load_artifact(original[0])
    assert found.spec == make_spec()
    assert found.metrics == RECORD.metrics
    assert found.onnx_path == original[0] / ONNX
    assert found.backbone.name == NAME


def test_no_pickle_in_it(original):
    import onnx
    from safetensors import safe_open

    directory, model = original
    # each file is of a format that holds data only
    with safe_open(directory / WEIGHTS, 'pt') as tensors:
        assert set(tensors.keys()) == set(model.state_dict())
    onnx.checker.check_model(str(directory / ONNX))
    json.loads((directory / MANIFEST).read_text())
    assert (directory / CARD).read_text().startswith('# Embedding model')


@pytest.mark.parametrize('number', [1, 7])
def test_onnx_equals_torch_for_any_batch(original, number):
    directory, model = original
    engine = load_engine(directory, is_onnx=True, device='cpu')
    given = pictures(number, seed=3)
    with torch.inference_mode():
        expected = model(torch.from_numpy(given)).numpy()
    found = engine.embed(given)
    assert found.shape == (number, 16)
    assert found.dtype == np.float32
    assert cosine(found, expected).min() >= 0.9999
    assert_same_vectors(found, expected)


def test_without_projection_and_without_onnx(tmp_path):
    model = make_model(output_dim=None)
    save_artifact(tmp_path / 'a', model, make_spec(None))
    found = load_artifact(tmp_path / 'a')
    assert found.onnx_path is None
    inputs = torch.from_numpy(pictures())
    with torch.inference_mode():
        assert torch.equal(found.build_model()(inputs), model(inputs))
    with pytest.raises(ArtifactError, match='has no ONNX graph'):
        load_engine(tmp_path / 'a', is_onnx=True)
    assert not load_engine(tmp_path / 'a').is_onnx


def test_normalisation_is_the_artifacts_own(tmp_path):
    model = make_model()
    model.normalizer.mean += 40  # a zoo that normalised otherwise when this was trained
    mean = tuple(float(value) / 255 for value in model.normalizer.mean.flatten())
    spec = ModelSpec(NAME, 16, PictureSpec(SIZE, mean=mean), 16)
    save_artifact(tmp_path / 'a', model, spec)
    inputs = torch.from_numpy(pictures())
    with torch.inference_mode():
        torch.testing.assert_close(
            load_artifact(tmp_path / 'a').build_model()(inputs), model(inputs)
        )


def test_an_artifact_takes_a_new_directory(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'mine.txt').write_text('keep me')
    with pytest.raises(ArtifactError, match='a is not empty'):
        save_artifact(tmp_path / 'a', make_model(), make_spec())
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['mine.txt']


class Drifting(torch.nn.Module):
    """Gives something else when it is traced."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, inputs):
        pooled = inputs.float().mean((1, 2))
        return self.linear(-pooled if torch.jit.is_tracing() else pooled)


def test_an_export_that_differs_fails(tmp_path):
    with pytest.raises(ArtifactError, match=r'ONNX export differs from torch: cosine -?0?\.\d+|-1'):
        export_onnx(Drifting().eval(), tmp_path / ONNX, pictures())
    assert not (tmp_path / ONNX).exists()


def test_a_failed_export_fails_the_artifact_only_when_asked_for(tmp_path, caplog):
    model = Drifting().eval()
    with caplog.at_level('WARNING', logger='finetuner'):
        save_artifact(tmp_path / 'a', model, make_spec(), onnx_inputs=pictures())
    assert 'no ONNX graph' in caplog.text
    assert ONNX not in json.loads((tmp_path / 'a' / MANIFEST).read_text())['files']
    with pytest.raises(ArtifactError, match='differs from torch'):
        save_artifact(
            tmp_path / 'b', model, make_spec(), onnx_inputs=pictures(), onnx_required=True
        )
    with pytest.raises(ArtifactError, match=r'it has no artifact.json'):
        load_artifact(tmp_path / 'b')


@pytest.mark.parametrize('name', [WEIGHTS, ONNX, CARD])
def test_a_tampered_file(directory, name):
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / name).write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=f'{name} was changed after the artifact was written'):
        load_artifact(directory)


@pytest.mark.parametrize('name', [WEIGHTS, ONNX, CARD])
def test_a_missing_file(directory, name):
    (directory / name).unlink()
    with pytest.raises(ArtifactError, match=f'incomplete: {name} is missing'):
        load_artifact(directory)


def test_a_half_written_artifact(directory):
    (directory / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"'copy' is no artifact: it has no artifact.json"):
        load_artifact(directory)


@pytest.mark.parametrize('name', [WEIGHTS, MANIFEST])
def test_a_link_in_place_of_a_file(directory, tmp_path, name):
    elsewhere = tmp_path / 'elsewhere'
    (directory / name).rename(elsewhere)
    (directory / name).symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match=name):
        load_artifact(directory)


@pytest.mark.parametrize('name', ['../outside', '/etc/hostname', 'a/b', '..', '', 'a\0b'])
def test_a_manifest_that_points_elsewhere(directory, name):
    (directory.parent / 'outside').write_text('x')
    manifest = json.loads((directory / MANIFEST).read_text())
    edit_manifest(directory, files={**manifest['files'], name: '0'})
    with pytest.raises(ArtifactError, match=r'not a plain file|is missing'):
        load_artifact(directory)


@pytest.mark.parametrize('version', [2, 0, None, '1'])
def test_another_schema(directory, version):
    edit_manifest(directory, schema_version=version)
    with pytest.raises(ArtifactError, match=f'schema version {version!r}, this library reads 1'):
        load_artifact(directory)


@pytest.mark.parametrize(
    'text',
    ['', '{', '[]', '3', 'null', '{}', '{"files": {}}', '{"schema_version": 1, "files": 3}',
     '{"schema_version": 1, "files": ["a"]}', '[' * 200_000, '\x00\x01', '{"schema_version": 1}'],
)  # fmt: skip
def test_a_manifest_that_is_none(directory, text):
    (directory / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r'artifact.json'):
        load_artifact(directory)


def test_a_manifest_that_is_no_text(directory):
    (directory / MANIFEST).write_bytes(b'\xff\xfe\xff')
    with pytest.raises(ArtifactError, match=r'artifact.json'):
        load_artifact(directory)


GOOD = {
    'backbone': NAME,
    'dimension': 16,
    'output_dim': 16,
    'picture': {'input_size': SIZE, 'mean': [0.5] * 3, 'std': [0.2] * 3},
}


@pytest.mark.parametrize(
    'model',
    [
        None,
        [],
        'text',
        {'backbone': NAME},
        {**GOOD, 'dimension': 'many'},
        {**GOOD, 'dimension': 0},
        {**GOOD, 'picture': 32},
        {**GOOD, 'picture': {**GOOD['picture'], 'input_size': 10**9}},
        {**GOOD, 'picture': {**GOOD['picture'], 'mean': [0.5]}},
        {**GOOD, 'picture': {**GOOD['picture'], 'mean': ['a', 'b', 'c']}},
    ],
)
def test_a_description_that_is_none(directory, model):
    edit_manifest(directory, model=model)
    with pytest.raises(ArtifactError, match=r'artifact.json does not describe its model'):
        load_artifact(directory)


def test_weights_that_do_not_fit_the_description(directory):
    edit_manifest(directory, model={**GOOD, 'output_dim': 8, 'dimension': 8})
    with pytest.raises(ArtifactError, match=r'weights in model.safetensors do not fit'):
        load_artifact(directory).build_model()
    edit_manifest(directory, model={**GOOD, 'backbone': 'resnet-of-tomorrow'})
    with pytest.raises(ArtifactError, match=r'another backbone.*resnet'):
        load_artifact(directory).build_model()


@pytest.mark.parametrize('name', [WEIGHTS, ONNX])
def test_files_that_are_no_models_though_their_hash_is_right(directory, name):
    (directory / name).write_bytes(b'nothing of the kind')
    rehash(directory, name)
    with pytest.raises(ArtifactError, match=r'cannot be read|model.onnx is refused'):
        load_engine(directory, is_onnx=name == ONNX, device='cpu')


def test_no_artifact_there(tmp_path):
    with pytest.raises(ArtifactError, match=r'no artifact at .*give the artifact_id'):
        load_artifact(tmp_path / 'absent')
    with pytest.raises(ArtifactError, match=r'is no artifact'):
        load_artifact(tmp_path)
    (tmp_path / 'text.zip').write_text('no zip')
    with pytest.raises(ArtifactError, match=r'text.zip cannot be unzipped'):
        load_artifact(tmp_path / 'text.zip')


def test_zip_round_trip(original, tmp_path):
    directory, model = original
    path = zip_artifact(directory, tmp_path / 'deep' / 'mine.zip')
    assert [p.name for p in path.parent.iterdir()] == ['mine.zip']
    with zipfile.ZipFile(path) as archive:
        assert {name.partition('/')[0] for name in archive.namelist()} == {'mine'}
    found = load_artifact(path)
    inputs = torch.from_numpy(pictures())
    with torch.inference_mode():
        assert torch.equal(found.build_model()(inputs), model(inputs))
    # the graph is there for as long as the artifact is
    assert load_engine(path, is_onnx=True, device='cpu').embed(pictures()).shape == (4, 16)


def test_a_refused_zip_leaves_nothing_behind(original, tmp_path, monkeypatch):
    place = tmp_path / 'temporary'
    place.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(place))
    path = zip_artifact(original[0], tmp_path / 'mine.zip')
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('mine/../evil', b'x')
    with pytest.raises(ArtifactError, match='leaves it') as caught:
        load_artifact(path)
    assert not list(place.iterdir())
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('mine/artifact.json', '{}')
    with pytest.raises(ArtifactError, match='cannot be read') as also:
        load_artifact(path)
    assert not list(place.iterdir())
    assert caught
    assert also


def test_only_an_intact_artifact_is_zipped(directory, tmp_path):
    (directory / CARD).write_text('other')
    with pytest.raises(ArtifactError, match=f'{CARD} was changed'):
        zip_artifact(directory, tmp_path / 'out.zip')
    assert not (tmp_path / 'out.zip').exists()


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    def broken(*_args):
        raise OSError('disk full')

    monkeypatch.setattr(artifacts, 'model_card', broken)
    with pytest.raises(OSError, match='disk full'):
        save_artifact(tmp_path / 'a', make_model(), make_spec())
    assert (tmp_path / 'a' / WEIGHTS).exists()
    with pytest.raises(ArtifactError, match=r'has no artifact.json'):
        load_artifact(tmp_path / 'a')


def test_saving_ones_own_module(tmp_path, tiny_network):
    from safetensors.torch import load_file

    save_model(tiny_network, tmp_path / 'deep' / 'net.safetensors')
    found = load_file(tmp_path / 'deep' / 'net.safetensors')
    assert set(found) == set(tiny_network.state_dict())
    assert torch.equal(found['0.weight'], tiny_network[0].weight)
    assert [p.name for p in (tmp_path / 'deep').iterdir()] == ['net.safetensors']


def test_saving_an_engine(original, tmp_path):
    engine = build_engine(NAME, {'weights': 'none', 'input_size': SIZE}, device='cpu')
    save_model(engine, tmp_path / 'kept')
    again = load_engine(tmp_path / 'kept', device='cpu')
    np.testing.assert_array_equal(engine.embed(pictures()), again.embed(pictures()))
    onnx = load_engine(original[0], is_onnx=True, device='cpu')
    with pytest.raises(ArtifactError, match='copy its artifact'):
        save_model(onnx, tmp_path / 'no')
