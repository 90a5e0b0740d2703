"""Pooling of convolutional networks: right by hand, learned, kept in artifacts and ONNX graphs."""

import json

import numpy as np
import pytest
import torch

from finetuner.artifact import ModelSpec, load_artifact, save_artifact
from finetuner.excepts import ArtifactError, ConfigError
from finetuner.inference import load_engine
from finetuner.models.backbones import PictureBackbone, PictureSpec
from finetuner.models.options import PicturePooler
from finetuner.models.pooling import GeneralizedMean, build_picture_pooler
from finetuner.models.tailor import build_embedding_model, freeze_backbone
from finetuner.models.whitening import Whitening
from finetuner.models.zoo import BACKBONES, get_backbone, input_spec, parse_options
from tests.unit.test_runner import execute
from tests.unit.tiny_artifacts import cosine

NETWORKS = [n for n, b in BACKBONES.items() if isinstance(b, PictureBackbone) and b.pooling]
# the rest of their families is built from the same code, only deeper
SMALL = [
    'efficientnet-lite0', 'resnet18', 'efficientnet_b0', 'mobilenet_v3_small', 'convnext_tiny',
]  # fmt: skip
UNTRAINED = {'weights': 'none', 'input_size': 32}


def positions(seed=0, smallest=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, 5, 4, 6, generator=generator) * 6 + smallest


def pictures(number=4, size=64, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def build(name='efficientnet-lite0', output_dim=None, **options):
    torch.manual_seed(0)
    return build_embedding_model(get_backbone(name), {**UNTRAINED, **options}, output_dim).eval()


def settled(model, batch):
    """The model with statistics of real activations: without, all it gives is next to nothing."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    embed(model, batch)
    return model.eval()


def embed(model, batch):
    with torch.inference_mode():
        return model(torch.from_numpy(batch)).numpy()


@pytest.mark.parametrize('p', [1.0, 2.5, 3.0, 7.0])
def test_the_generalised_mean_is_that_of_the_paper(p):
    given = positions().double()
    found = GeneralizedMean(p)(given)
    assert found.shape == (3, 5, 1, 1)
    for row in range(3):
        for channel in range(5):
            values = np.maximum(given[row, channel].numpy(), 1e-6)
            expected = np.mean(values**p) ** (1 / p)
            assert found[row, channel].item() == pytest.approx(expected, rel=1e-6)


def test_it_goes_from_the_mean_to_the_maximum():
    given = positions()
    flat = given.flatten(2)
    assert torch.allclose(GeneralizedMean(1.0)(given).flatten(1), flat.mean(-1), rtol=1e-5)
    distances = [
        (flat.amax(-1) - GeneralizedMean(p)(given).flatten(1)).max().item()
        for p in (1, 3, 10, 1000)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.02
    assert torch.equal(build_picture_pooler(PicturePooler('max'))(given).flatten(1), flat.amax(-1))


def test_what_is_below_eps_counts_as_eps():
    given = -positions()
    pooler = GeneralizedMean(3.0, eps=0.5)
    assert torch.allclose(pooler(given), torch.full((3, 5, 1, 1), 0.5))


@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e6])
@pytest.mark.parametrize('p', [0.5, 3.0, 60.0])
def test_gradients_are_right_and_finite(scale, p):
    given = (positions()[:1, :2] * scale).double().requires_grad_()
    pooler = GeneralizedMean(p, eps=1e-12).double()
    assert torch.autograd.gradcheck(
        lambda values: pooler(values) / scale, (given,), eps=1e-6 * scale, atol=1e-3 / scale
    )
    # a channel in which nothing is active, in single precision
    dead = torch.zeros(1, 1, 4, 4, requires_grad=True)
    single = GeneralizedMean(p)
    single(dead).sum().backward()
    assert torch.isfinite(dead.grad).all()
    assert torch.isfinite(single.p.grad)


def test_the_exponent_is_learned_unless_told_otherwise():
    pooler, given = GeneralizedMean(3.0), positions()
    step = 1e-3
    pooler(given).sum().backward()
    more, less = (GeneralizedMean(3.0 + s)(given).sum().item() for s in (step, -step))
    assert pooler.p.grad.item() == pytest.approx((more - less) / (2 * step), rel=1e-2)
    assert not list(GeneralizedMean(3.0, trainable=False).parameters())
    assert GeneralizedMean(2.0, trainable=False).state_dict() == {'p': torch.tensor(2.0)}


def test_half_precision_goes_no_further():
    given = positions()
    found = GeneralizedMean(3.0)(given.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, GeneralizedMean(3.0)(given), rtol=1e-2, atol=0)
    with torch.autocast('cpu', torch.bfloat16):
        again = GeneralizedMean(3.0)(given.bfloat16())
    torch.testing.assert_close(again.float(), found)


@pytest.mark.parametrize('name', SMALL)
def test_every_family_is_pooled_where_it_averages(name):
    backbone, batch = get_backbone(name), pictures(4)
    seen = []
    own = settled(build(name), batch)
    place = own.backbone.get_submodule(backbone.pooling)
    assert isinstance(place, torch.nn.AdaptiveAvgPool2d)
    place.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    averaged = embed(own, batch)
    assert seen[0][0].shape[2:] == (2, 2)
    for pooler in ('gem', 'max'):
        model = build(name, pooler=pooler)
        pooled = model.backbone.get_submodule(backbone.pooling)
        model.load_state_dict(own.state_dict(), strict=False)
        found = embed(model, batch)
        assert found.shape == (4, backbone.dimension)
        if name != 'convnext_tiny':  # which normalises after pooling
            expected = pooled(seen[0][0]).flatten(1).detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        assert np.abs(found - averaged).max() > 1e-4


def test_gem_of_exponent_one_is_the_backbone_itself():
    options = {'weights': 'pretrained', 'input_size': 64}
    plain = build(**options)
    gem = build(**options, pooler='gem', pooler_options={'p': 1.0})
    np.testing.assert_allclose(embed(gem, pictures()), embed(plain, pictures()), atol=1e-5)


@pytest.mark.parametrize(
    ('given', 'name'),
    [
        ('GeM', 'gem'),
        ('gem', 'gem'),
        ('MAC', 'max'),
        ('max', 'max'),
        ('Mean', 'mean'),
        (None, 'mean'),
    ],
)
def test_spellings_of_finetuner_are_taken(given, name):
    backbone = get_backbone('resnet18')
    options = parse_options(backbone, {'pooler': given})
    assert input_spec(backbone, options).pooler == PicturePooler(name)


@pytest.mark.parametrize(
    ('model', 'options', 'message'),
    [
        ('vit_b_16', {'pooler': 'gem'}, "pooler 'gem' is for convolutional networks.*leave it out"),
        ('vit_b_16', {'pooler': 'mean'}, "pooler 'mean' is for convolutional networks"),
        ('resnet18', {'pooler': 'median'}, r'pooler: unexpected value \(allowed: mean, gem, max\)'),
        ('resnet18', {'pooler': 'cls'}, r'allowed: mean, gem, max'),
        ('resnet18', {'pooler_options': {'p': 4}}, 'only the pooler gem takes options'),
        ('resnet18', {'pooler': 'max', 'pooler_options': {}}, 'only the pooler gem takes options'),
        (
            'resnet18',
            {'pooler': 'gem', 'pooler_options': {'p': 0}},
            r'pooler_options\.p: .*greater',
        ),
        ('resnet18', {'pooler': 'gem', 'pooler_options': {'p': 'x'}}, r'pooler_options\.p: '),
        ('resnet18', {'pooler': 'gem', 'pooler_options': {'epsilon': 1}}, "did you mean 'eps'"),
        ('resnet18', {'poolr': 'gem'}, "did you mean 'pooler'"),
    ],
)
def test_wrong_options_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(get_backbone(model), options)


def test_freezing_leaves_the_head_alone_and_the_exponent_with_the_last_layer():
    def trained(model):
        freeze_backbone(model)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    assert trained(build(output_dim=8, pooler='gem')) == {'projection_head.weight'}
    assert 'backbone._avg_pooling.p' in trained(build(pooler='gem'))


def save(directory, pooler, model, output_dim=None, whitening=False):
    spec = ModelSpec('efficientnet-lite0', output_dim or 1280, PictureSpec(64, pooler=pooler))
    save_artifact(directory, model, spec, onnx_inputs=pictures(), onnx_required=True)
    return spec


@pytest.mark.parametrize(
    'pooler',
    [PicturePooler('gem', 4.0, 1e-3, False), PicturePooler('gem'), PicturePooler('max')],
    ids=['fixed', 'learned', 'max'],
)
def test_an_artifact_is_built_again_with_its_pooler(tmp_path, pooler):
    options = {'weights': 'pretrained', 'input_size': 64, **pooler.as_options()}
    model = build(**options)
    if pooler == PicturePooler('gem'):
        with torch.no_grad():
            model.backbone._avg_pooling.p.fill_(5.25)
    expected = embed(model, pictures())
    spec = save(tmp_path / 'a', pooler, model)
    found = load_artifact(tmp_path / 'a')
    assert found.spec == spec
    again = found.build_model()
    np.testing.assert_array_equal(embed(again, pictures()), expected)
    named = dict(model.named_parameters())
    assert set(dict(again.named_parameters())) == set(named)
    graph = load_engine(tmp_path / 'a', is_onnx=True, device='cpu').embed(pictures())
    assert cosine(graph, expected).min() > 0.99999


def test_a_run_learns_the_exponent_and_keeps_it(tmp_path):
    options = {'weights': 'none', 'input_size': 64, 'pooler': 'GeM'}
    execute(tmp_path / 'a', model_options=options, to_onnx=True)
    found = load_artifact(tmp_path / 'a')
    assert found.spec.inputs.pooler == PicturePooler('gem')
    learned = found.build_model().backbone.avgpool.p.item()
    assert learned != 3.0
    assert learned == pytest.approx(3.0, abs=0.1)
    # and training goes on from there
    going_on = {'model_options': {}, 'model_artifact': str(tmp_path / 'a'), 'learning_rate': 1e-9}
    execute(tmp_path / 'b', **going_on)
    again = load_artifact(tmp_path / 'b')
    assert again.spec == found.spec
    assert again.build_model().backbone.avgpool.p.item() == pytest.approx(learned, abs=1e-6)


def test_artifacts_that_name_no_pooler_have_the_mean():
    spec = ModelSpec('resnet18', 512, PictureSpec(64))
    values = json.loads(json.dumps(spec.to_json()))
    del values['picture']['pooler']
    assert ModelSpec.from_json(values) == spec
    gem = ModelSpec('resnet18', 512, PictureSpec(64, pooler=PicturePooler('gem', 2.0)))
    assert ModelSpec.from_json(json.loads(json.dumps(gem.to_json()))) == gem


@pytest.mark.parametrize('wrong', [{'name': 'median'}, {'p': 0}, {'eps': -1}, {'p': float('nan')}])
def test_a_damaged_description_is_refused(wrong):
    values = ModelSpec('resnet18', 512, PictureSpec(64)).to_json()
    values['picture']['pooler'].update(wrong)
    with pytest.raises(ArtifactError, match='pooler is out of range'):
        ModelSpec.from_json(values)


def test_whitening_takes_roots_of_what_is_pooled():
    torch.manual_seed(0)
    options = {'input_size': 32, 'pooler': 'gem'}
    model = build_embedding_model(get_backbone('efficientnet-lite0'), options, 8, whitening=True)
    whitening = next(m for m in model.modules() if isinstance(m, Whitening))
    assert whitening.takes_roots
    given = []
    whitening.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    batch = pictures(12, 32)
    embed(model.eval(), batch)
    assert given[0].min() >= 0
    whitening.fit(given[0], np.arange(12) // 2)
    assert np.isfinite(embed(model, batch)).all()
