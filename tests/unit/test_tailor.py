"""The tailor: heads off, layers frozen, projection on, and models it cannot cut refused."""

import copy

import numpy as np
import pytest
import torch

from finetuner.excepts import ConfigError
from finetuner.models.tailor import (
    build_embedding_model,
    build_projection_head,
    summary,
    to_embedding_model,
)
from finetuner.models.zoo import get_backbone

SIZE = (3, 16, 16)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch(number=4):
    return torch.rand(number, *SIZE, generator=torch.Generator().manual_seed(3))


class Residual(torch.nn.Module):
    """Blocks inside blocks, and a classifier at the end."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.ModuleDict(
            {'first': torch.nn.Linear(8, 8), 'second': torch.nn.Linear(8, 8)}
        )
        self.head = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))

    def forward(self, inputs):
        hidden = self.body['first'](inputs)
        return self.head(inputs + self.body['second'](hidden))


class Functional(torch.nn.Module):
    """Computes with a function where a module is expected."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(8, 6)
        self.classify = torch.nn.Linear(6, 3)

    def forward(self, inputs):
        return self.classify(torch.nn.functional.relu(self.embed(inputs)))


class SharedActivation(torch.nn.Module):
    """Runs one activation module before and after the embedding."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.activation = torch.nn.ReLU()
        self.second = torch.nn.Linear(8, 6)
        self.classify = torch.nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = self.activation(self.first(inputs))
        return self.classify(self.activation(self.second(hidden)))


def test_summary_lists_layers_in_order(tiny_classifier):
    layers = summary(tiny_classifier, SIZE)
    assert [layer.name for layer in layers] == [
        'conv2d_1', 'batchnorm2d_2', 'relu_3', 'adaptiveavgpool2d_4', 'flatten_5', 'linear_6',
        'tanh_7', 'linear_8',
    ]  # fmt: skip
    by_name = {layer.name: layer for layer in layers}
    assert by_name['conv2d_1'].output_shape == (2, 8, 14, 14)
    assert by_name['conv2d_1'].num_parameters == 3 * 3 * 3 * 8 + 8
    assert by_name['linear_6'].module_name == '5'
    assert [layer.name for layer in layers if layer.is_embedding_layer] == [
        'adaptiveavgpool2d_4', 'flatten_5', 'linear_6', 'tanh_7', 'linear_8',
    ]  # fmt: skip


def test_summary_leaves_the_model_as_it_was(tiny_classifier):
    tiny_classifier.train()
    before = copy.deepcopy(tiny_classifier.state_dict())
    summary(tiny_classifier, SIZE)
    assert tiny_classifier.training
    assert all(torch.equal(before[k], v) for k, v in tiny_classifier.state_dict().items())
    assert not any(module._forward_hooks for module in tiny_classifier.modules())


def test_cut_gives_what_the_layer_gave(tiny_classifier):
    tiny_classifier.eval()
    original = copy.deepcopy(tiny_classifier.state_dict())
    for layer, depth in (('linear_6', 6), ('tanh_7', 7), ('5', 6), ('flatten_5', 5)):
        cut = to_embedding_model(tiny_classifier, SIZE, layer_name=layer).eval()
        with torch.inference_mode():
            assert torch.equal(cut(batch()), tiny_classifier[:depth](batch()))
    # the user's own model is untouched
    assert isinstance(tiny_classifier[7], torch.nn.Linear)
    assert all(torch.equal(original[k], v) for k, v in tiny_classifier.state_dict().items())
    assert all(parameter.requires_grad for parameter in tiny_classifier.parameters())


def test_without_a_name_the_last_layer_is_kept(tiny_classifier):
    tiny_classifier.eval()
    cut = to_embedding_model(tiny_classifier, SIZE).eval()
    with torch.inference_mode():
        assert torch.equal(cut(batch()), tiny_classifier(batch()))


def test_cut_inside_nested_modules():
    model = Residual().eval()
    cut = to_embedding_model(model, (8,), layer_name='head.0')
    inputs = torch.rand(4, 8)
    with torch.inference_mode():
        hidden = inputs + model.body['second'](model.body['first'](inputs))
        assert torch.equal(cut(inputs), model.head[0](hidden))


def test_projection_and_freezing(tiny_classifier):
    frozen = to_embedding_model(
        tiny_classifier, SIZE, layer_name='linear_6', freeze=True, output_dim=5
    )
    assert frozen(batch()).shape == (4, 5)
    assert trainable(frozen) == {'projection_head.weight'}
    named = to_embedding_model(
        tiny_classifier, SIZE, layer_name='linear_6', freeze=['conv2d_1', '1']
    )
    assert trainable(named) == {'5.weight', '5.bias'}
    own = torch.nn.Sequential(torch.nn.Linear(12, 4), torch.nn.Tanh())
    headed = to_embedding_model(
        tiny_classifier, SIZE, layer_name='linear_6', freeze=True, projection_head=own
    )
    assert headed(batch()).abs().max() <= 1
    assert trainable(headed) == {'projection_head.0.weight', 'projection_head.0.bias'}


def test_only_unfrozen_parameters_get_gradients(tiny_classifier):
    model = to_embedding_model(tiny_classifier, SIZE, layer_name='linear_6', freeze=['0'])
    model(batch()).square().sum().backward()
    assert model[0].weight.grad is None
    assert model[5].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(('model', 'layer'), [(Functional, 'embed'), (SharedActivation, 'second')])
def test_a_model_that_cannot_be_cut_there_is_refused(model, layer):
    with pytest.raises(ConfigError, match=r'cannot be cut after layer.*Pass a model that ends'):
        to_embedding_model(model(), (8,), layer_name=layer)


def test_wrong_arguments(tiny_classifier):
    with pytest.raises(ConfigError, match='input_size is needed'):
        to_embedding_model(tiny_classifier)
    with pytest.raises(ConfigError, match=r"unknown layer 'linear_9'.*'linear_8'"):
        to_embedding_model(tiny_classifier, SIZE, layer_name='linear_9')
    with pytest.raises(ConfigError, match=r"unknown layer 'conv_1'.*'conv2d_1'"):
        to_embedding_model(tiny_classifier, SIZE, freeze=['conv_1'])
    with pytest.raises(ConfigError, match='exclude each other'):
        to_embedding_model(tiny_classifier, SIZE, output_dim=2, projection_head=torch.nn.Identity())
    with pytest.raises(ConfigError, match=r'shape \(2, 4\).*input_size=\(4,\)'):
        to_embedding_model(tiny_classifier, (4,))
    with pytest.raises(ConfigError, match="input_dtype 'nothing' is no torch dtype"):
        to_embedding_model(tiny_classifier, SIZE, input_dtype='nothing')
    with pytest.raises(ConfigError, match='no layer of this model'):
        to_embedding_model(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), SIZE)


def test_models_of_token_numbers():
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(10, 6), torch.nn.Linear(6, 2))
    cut = to_embedding_model(model, (5,), input_dtype='int64', layer_name='embeddingbag_1')
    tokens = torch.randint(0, 10, (3, 5))
    assert torch.equal(cut(tokens), model[0](tokens))


def test_projection_head_keeps_angles_nearly():
    torch.manual_seed(0)
    head = build_projection_head(1280, 256)
    assert head.bias is None
    # rows are orthonormal
    product = head.weight @ head.weight.T
    torch.testing.assert_close(product, torch.eye(256), atol=1e-4, rtol=0)
    vectors = torch.randn(40, 1280)
    before = torch.nn.functional.cosine_similarity(vectors[None], vectors[:, None], dim=-1)
    projected = head(vectors)
    after = torch.nn.functional.cosine_similarity(projected[None], projected[:, None], dim=-1)
    assert (before - after).abs().max() < 0.35


def test_backbone_with_output_dim_and_freeze():
    options = {'weights': 'none', 'input_size': 32}
    backbone = get_backbone('mobilenet_v3_small')
    model = build_embedding_model(backbone, options, output_dim=16, freeze=True).eval()
    assert trainable(model) == {'projection_head.weight'}
    pictures = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    )
    with torch.inference_mode():
        assert model(pictures).shape == (2, 16)
    without = build_embedding_model(backbone, options, freeze=True)
    left = trainable(without)
    assert left
    # the last convolution and the normalisation after it
    assert len({name.rpartition('.')[0] for name in left}) == 2
    assert len(trainable(build_embedding_model(backbone, options))) > 100
