"""The zoo: every entry has its stated dimension without its head; weights by name, file or not."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from finetuner.excepts import ConfigError
from finetuner.models import vision
from finetuner.models.backbones import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PictureBackbone,
    PictureSpec,
    TextBackbone,
)
from finetuner.models.embedding_model import PictureNormalizer
from finetuner.models.tailor import build_embedding_model
from finetuner.models.torchvision_import import import_torchvision
from finetuner.models.zoo import (
    BACKBONES,
    get_backbone,
    input_spec,
    parse_options,
)

# the rest is built from the same code, only deeper
LARGE = {'resnet101', 'resnet152', 'efficientnet_b7', 'efficientnet_b4'}
ALIASES = {
    'resnet-base': 'resnet50',
    'resnet-large': 'resnet152',
    'efficientnet-base': 'efficientnet_b4',
    'efficientnet-large': 'efficientnet_b7',
}


PICTURE_BACKBONES = [name for name, b in BACKBONES.items() if isinstance(b, PictureBackbone)]


def pictures(number=2, size=32, seed=0):
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (number, size, size, 3), dtype=np.uint8))


def network(name, **options):
    backbone = get_backbone(name)
    return getattr(vision, backbone.builder)(backbone, parse_options(backbone, options))


def test_the_zoo_is_the_one_promised():
    assert PICTURE_BACKBONES == [
        'efficientnet-lite0', 'resnet18', 'resnet50', 'resnet101', 'resnet152', 'efficientnet_b0',
        'efficientnet_b4', 'efficientnet_b7', 'mobilenet_v3_small', 'mobilenet_v3_large',
        'convnext_tiny', 'vit_b_16',
    ]  # fmt: skip
    texts = {name: b.dimension for name, b in BACKBONES.items() if isinstance(b, TextBackbone)}
    assert texts == {
        'all-MiniLM-L6-v2': 384,
        'bert-base-cased': 768,
        'bert-base-multilingual-cased': 768,
        'sentence-transformers/msmarco-distilbert-base-v3': 768,
        'sentence-transformers/distiluse-base-multilingual-cased-v1': 512,
        'jinaai/jina-embedding-t-en-v1': 312,
        'jinaai/jina-embedding-s-en-v1': 512,
        'jinaai/jina-embedding-b-en-v1': 768,
        'jinaai/jina-embedding-l-en-v1': 1024,
    }


@pytest.mark.parametrize('name', [name for name in PICTURE_BACKBONES if name not in LARGE])
def test_dimension_is_as_stated_and_the_head_is_gone(name):
    backbone = get_backbone(name)
    model = build_embedding_model(backbone, {'weights': 'none', 'input_size': 32}).eval()
    with torch.inference_mode():
        embeddings = model(pictures())
    assert embeddings.shape == (2, backbone.dimension)
    assert embeddings.dtype == torch.float32
    for head in backbone.head:
        assert isinstance(model.backbone.get_submodule(head), torch.nn.Identity)
    # no linear layer to ImageNet's 1,000 classes is left
    assert not any(tensor.shape[0] == 1000 for tensor in model.state_dict().values() if tensor.ndim)


@pytest.mark.parametrize('name', sorted(LARGE))
def test_dimension_of_the_large_ones_is_the_width_of_their_head(name):
    backbone = get_backbone(name)
    with torch.device('meta'):  # shapes without memory
        model = import_torchvision().models.get_model(name, weights=None)
    head = model.get_submodule(backbone.head[0])
    linear = next(m for m in head.modules() if isinstance(m, torch.nn.Linear))
    assert linear.in_features == backbone.dimension
    assert linear.out_features == 1000


@pytest.mark.parametrize('name', [n for n in PICTURE_BACKBONES if n != 'efficientnet-lite0'])
def test_input_size_and_normalisation_are_those_of_the_weights(name):
    transforms = import_torchvision().models.get_model_weights(name).DEFAULT.transforms()
    backbone = get_backbone(name)
    assert list(backbone.mean) == transforms.mean
    assert list(backbone.std) == transforms.std
    assert [backbone.input_size] == transforms.crop_size


def test_normaliser_equals_hand_computation():
    given = pictures(3, 8)
    normalizer = PictureNormalizer(PictureSpec(8, IMAGENET_MEAN, IMAGENET_STD))
    found = normalizer(given)
    scaled = given.numpy().astype(np.float64) / 255
    expected = ((scaled - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not normalizer.state_dict()


def test_pretrained_efficientnet_lite_knows_pictures():
    trained = network('efficientnet-lite0').eval()
    untrained = network('efficientnet-lite0', weights='none')
    # batch normalisation that has seen ImageNet
    assert trained._bn0.running_mean.abs().sum() > 0.1
    assert untrained._bn0.running_mean.abs().sum() == 0


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.safetensors'])
def test_weights_by_file(tmp_path, suffix):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    donor = network('mobilenet_v3_small', weights='none')
    file = tmp_path / f'weights{suffix}'
    if suffix == '.safetensors':
        save_file(donor.state_dict(), file)
    else:
        torch.save(donor.state_dict(), file)
    found = network('mobilenet_v3_small', weights=str(file)).state_dict()
    for name, tensor in donor.state_dict().items():
        assert torch.equal(tensor, found[name]), name


def test_weights_of_another_architecture_are_refused(tmp_path):
    file = tmp_path / 'resnet.pth'
    torch.save(network('resnet18', weights='none').state_dict(), file)
    with pytest.raises(ConfigError, match=r'weights of mobilenet_v3_small from .* do not fit'):
        network('mobilenet_v3_small', weights=str(file))


def test_missing_weights_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no file '.*absent.pth'. Allowed: pretrained, none"):
        network('resnet18', weights=str(tmp_path / 'absent.pth'))
    with pytest.raises(ConfigError, match='no file'):
        network('resnet18', weights='')


class Evil:
    """Pickles to a call that would leave a file behind."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), 'w')


def test_a_pickle_is_not_run(tmp_path):
    file, trace = tmp_path / 'evil.pth', tmp_path / 'trace'
    torch.save({'fc.weight': Evil(trace)}, file)
    with pytest.raises(ConfigError, match=r'evil.pth is no state dict'):
        network('resnet18', weights=str(file))
    assert not trace.exists()


@pytest.mark.parametrize('name', ['noise.pth', 'noise.safetensors'])
def test_a_file_that_holds_no_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b'not weights at all')
    with pytest.raises(ConfigError, match=f'{name} is no state dict'):
        network('resnet18', weights=str(tmp_path / name))


def test_a_file_that_holds_something_else(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / 'list.pth')
    with pytest.raises(ConfigError, match=r'list.pth holds list, not a state dict'):
        network('resnet18', weights=str(tmp_path / 'list.pth'))


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    # the guard against the network in conftest stands for a machine without one
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be downloaded.*resnet18-\w+.pth.*'none'"):
        network('resnet18')


def test_vit_takes_other_sizes_from_weights_of_its_own_size(tmp_path):
    file = tmp_path / 'vit.pth'
    donor = network('vit_b_16', weights='none').state_dict()
    torch.save(donor, file)
    model = build_embedding_model(
        get_backbone('vit_b_16'), {'weights': str(file), 'input_size': 64}
    )
    with torch.inference_mode():
        assert model.eval()(pictures(2, 64)).shape == (2, 768)
    positions = model.backbone.encoder.pos_embedding
    assert positions.shape == (1, 1 + (64 // 16) ** 2, 768)
    # the class token's place is kept as it was, the others are interpolated
    assert torch.equal(positions[:, 0], donor['encoder.pos_embedding'][:, 0])
    assert torch.equal(model.backbone.conv_proj.weight, donor['conv_proj.weight'])


def test_unknown_model_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model 'resnet-18': did you mean 'resnet18'"):
        get_backbone('resnet-18')
    with pytest.raises(ConfigError, match='efficientnet-lite0'):
        get_backbone('efficientnet_lite0')


def test_names_of_published_scripts():
    for alias, name in ALIASES.items():
        assert get_backbone(alias).name == name


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'inputsize': 96}, "did you mean 'input_size'"),
        ({'input_size': 31}, 'input_size'),
        ({'input_size': 1025}, 'input_size'),
        ({'input_size': 96.5}, '96.5 is not a whole number'),
        ({'input_size': '96'}, "'96' is not a whole number"),
        ({'input_size': True}, 'True is not a whole number'),
        ({'weights': None}, 'weights'),
    ],
)
def test_model_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(get_backbone('resnet18'), options)


def test_vit_takes_whole_patches_only():
    with pytest.raises(ConfigError, match='input_size 100 is no multiple of 16'):
        parse_options(get_backbone('vit_b_16'), {'input_size': 100})
    assert parse_options(get_backbone('resnet18'), {'input_size': 100}).input_size == 100


def test_transformers_are_trained_at_their_one_size():
    with pytest.raises(ConfigError, match=r'train_input_size must be input_size \(64\)'):
        parse_options(get_backbone('vit_b_16'), {'input_size': 64, 'train_input_size': 32})
    assert parse_options(get_backbone('resnet18'), {'train_input_size': 64}).train_input_size == 64


def test_picture_spec_follows_the_options():
    backbone = get_backbone('efficientnet_b4')
    assert input_spec(backbone, parse_options(backbone, None)).input_size == 380
    assert input_spec(backbone, parse_options(backbone, {'input_size': 96.0})).input_size == 96


def test_every_builder_is_there():
    for name in PICTURE_BACKBONES:
        assert callable(getattr(vision, BACKBONES[name].builder))


@pytest.mark.parametrize('name', ['torchvision', 'transformers'])
def test_libraries_are_imported_by_many_threads_at_once(name):
    """As by the first requests of a server; in a process that has not imported them yet."""
    code = f"""
import threading
from finetuner.models.{name}_import import import_{name}
found, together = [], threading.Barrier(8)
def work():
    together.wait()
    found.append(import_{name}())
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 8 and len(set(map(id, found))) == 1, found
assert '{name}' != 'transformers' or found[0].AutoConfig
"""
    subprocess.run([sys.executable, '-c', code], check=True)
