"""Every optimizer and schedule trains a tiny model as it should, and every option of a loss."""

import functools
import math

import pytest
import torch

from finetuner.config import OPTIMIZERS, SCHEDULERS
from finetuner.excepts import ConfigError
from finetuner.models.tailor import build_embedding_model
from finetuner.models.transformers_import import import_transformers
from finetuner.models.zoo import get_backbone
from finetuner.training.loss_options import PARTS, REFUSED_PARTS, accepted_options, allowed_parts
from finetuner.training.losses import LOSSES, MINERS, build_miner, learns_class_weights
from finetuner.training.objectives import build_objective, check_objective_runs
from finetuner.training.optimization import (
    build_model_optimizer,
    build_optimizer,
    build_schedule,
    layer_groups,
)
from finetuner.training.trainer import BaseCallback, Trainer, seed_everything
from tests.unit.test_every_loss import (
    CLASS_LOSSES,
    DIMENSION,
    NUM_CLASSES,
    assert_learns,
    build,
    train,
)
from tests.unit.tiny_encoder import write_tiny_encoder

pytestmark = pytest.mark.filterwarnings('ignore')

# where 0.03 is not of the optimizer's own scale
RATES = {'Adadelta': 3, 'ASGD': 0.3, 'LBFGS': 0.3, 'RAdam': 0.1, 'SGD': 0.3}
REDUCER_OPTIONS = {
    'ClassWeightedReducer': {'weights': [1, 2, 3, 4, 5]},
    'ThresholdReducer': {'low': 0.01},
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_learns(name):
    # Muon takes matrices only
    rate, bias = RATES.get(name, 0.03), name != 'Muon'
    assert_learns(*train(lambda: build('NCALoss'), optimizer=name, rate=rate, bias=bias))


# the runner refuses LBFGS for the weights of a loss: it cannot step beside another optimizer
@pytest.mark.parametrize('name', sorted(set(OPTIMIZERS) - {'LBFGS'}))
def test_every_optimizer_learns_the_weights_of_a_loss(name):
    rate, bias = RATES.get(name, 0.03), name != 'Muon'
    seed_everything(0)
    loss = build('ProxyNCALoss')
    proxies = loss.proxies.detach().clone()
    assert_learns(*train(lambda: loss, optimizer=name, rate=rate, bias=bias))
    assert float((loss.proxies - proxies).abs().min()) > 0


def test_optimizers_that_are_refused():
    there = {name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    # sparse gradients are of embedding tables that ask for them, and no model here has one
    assert there - set(OPTIMIZERS) == {'Optimizer', 'SparseAdam'}
    with pytest.raises(ConfigError, match="unknown optimizer 'SparseAdam'"):
        build_optimizer('SparseAdam', [torch.nn.Parameter(torch.ones(2, 2))], 0.1)
    with pytest.raises(ConfigError, match=r'Muon does not accept.*2D'):
        build_model_optimizer('Muon', torch.nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize('step', ['batch', 'epoch'])
@pytest.mark.parametrize('name', SCHEDULERS)
def test_every_schedule_learns(name, step):
    options = {'scheduler_step': step, 'num_warmup_steps': 2}
    make_loss = functools.partial(build, 'NCALoss')
    assert_learns(*train(make_loss, scheduler=name, scheduler_options=options))


class Rates(BaseCallback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer):
        self.values.append(trainer.state.learning_rate)


def known_rates(name, num_warmup, num_total, options):
    """The schedule of transformers, without its first step when that is one of warming up from 0."""
    transformers = import_transformers()
    specific = dict(options)
    if name == 'polynomial':
        specific['lr_end'] = 0.0
    shift = 1 if num_warmup else 0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup + shift, num_total + shift, specific
    )
    rates = []
    for _ in range(num_total + shift):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates[shift:]


SHAPES = [
    *((name, {}) for name in SCHEDULERS),
    ('cosine', {'num_cycles': 1.25}),
    ('cosine_with_restarts', {'num_cycles': 3}),
    ('polynomial', {'power': 2.5}),
]


@pytest.mark.parametrize(('name', 'options'), SHAPES)
@pytest.mark.parametrize('step', ['batch', 'epoch'])
@pytest.mark.parametrize('warmup', [0, 2, 0.3])
def test_every_schedule_is_that_of_transformers(name, options, step, warmup):
    num_epochs, num_batches = 6, 3
    batches = [(torch.randn(8, 6), torch.arange(8) // 2) for _ in range(num_batches)]
    model, recorded = torch.nn.Linear(6, DIMENSION), Rates()
    optimizer = build_optimizer('SGD', model.parameters(), 0.5)
    given = {'num_warmup_steps': warmup, 'scheduler_step': step, **options}
    schedule = build_schedule(name, optimizer, given, num_epochs, num_batches)
    objective = build_objective('class', build('NTXentLoss'))
    Trainer(model, objective, [optimizer], schedule, [recorded]).fit(batches, num_epochs)
    each = 1 if step == 'batch' else num_batches
    total = num_epochs * num_batches // each
    num_warmup = round(warmup * total) if warmup < 1 else warmup
    expected = known_rates(name, 0 if name == 'constant' else num_warmup, total, options)
    rates = [0.5 * rate for rate in expected for _ in range(each)]
    assert recorded.values == pytest.approx(rates, abs=1e-9)


def depths(model, decay=0.5):
    """How far from the end each trained parameter is, by its learning rate."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter].removeprefix('backbone.'): round(math.log(group['lr'], decay))
        for group in layer_groups(model, 1.0, decay)
        for parameter in group['params']
    }


def test_layers_of_resnet18():
    model = build_embedding_model(get_backbone('resnet18'), {'weights': 'none'}, output_dim=8)
    found = depths(model)
    assert len(found) == len(list(model.parameters()))
    expected = {'conv1': 4, 'bn1': 4, 'layer1': 3, 'layer2': 2, 'layer3': 1, 'layer4': 0}
    expected['projection_head'] = 0
    assert {(name.split('.')[0], depth) for name, depth in found.items()} == set(expected.items())


def test_layers_of_efficientnet_lite0():
    model = build_embedding_model(get_backbone('efficientnet-lite0'), {'weights': 'none'})
    found = depths(model)
    assert len(found) == len(list(model.parameters()))
    for name, depth in found.items():
        first, second = name.split('.')[:2]
        outside = {'_conv_stem': 16, '_bn0': 16, '_conv_head': 0, '_bn1': 0}
        assert depth == (15 - int(second) if first == '_blocks' else outside[first]), name


def test_layers_of_a_text_encoder(tmp_path):
    backbone = get_backbone(str(write_tiny_encoder(tmp_path / 'encoder')))
    found = depths(build_embedding_model(backbone, {'weights': 'none'}, output_dim=8))
    by_part = {(name.partition('.layer.')[2][:1] or name.split('.')[-2], depth)
               for name, depth in found.items()}  # fmt: skip
    embeddings = ('word_embeddings', 'position_embeddings', 'token_type_embeddings', 'LayerNorm')
    assert by_part == {*((name, 2) for name in embeddings), ('0', 1), ('1', 0), ('linear', 0)}


def test_layers_of_other_models():
    block = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(12)), torch.nn.Tanh())
    assert depths(model)['2.weight'] == 9  # in the order of numbers, not of letters
    model[:11].requires_grad_(False)
    assert depths(model) == {'11.weight': 0, '11.bias': 0}
    branches = torch.nn.ModuleDict({'trunk': torch.nn.Linear(9, 9), 'a1': block, 'a2': block})
    for other in (block, branches):
        with pytest.raises(ConfigError, match='needs a model made of a row of numbered blocks'):
            layer_groups(other, 1.0, 0.5)


def test_layers_learn_at_their_rates():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, DIMENSION))
    optimizer = build_model_optimizer(
        'SGD', model, 0.5, {'layer_wise_lr_decay': 0.1, 'momentum': 0.5}
    )
    assert [group['momentum'] for group in optimizer.param_groups] == [0.5, 0.5]
    before = [layer.weight.detach().clone() for layer in model]
    objective = build_objective('class', build('NTXentLoss'))
    recorded = Rates()
    schedule = build_schedule('linear', optimizer, None, 2, 1)
    trainer = Trainer(model, objective, [optimizer], schedule, [recorded])
    batches = [(torch.randn(8, 6), torch.arange(8) // 2)]
    trainer.fit(batches, 1)
    for layer, weight, rate in zip(model, before, (0.05, 0.5), strict=True):
        assert torch.allclose(layer.weight, weight - rate * layer.weight.grad, atol=1e-6)
    assert recorded.values == [0.5]
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([0.25, 0.025])


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        *(
            ('AdamW', {'layer_wise_lr_decay': decay}, 'no number above 0 and at most 1')
            for decay in (0, -0.5, 1.5, 'x', True, math.nan)
        ),
        ('AdamW', {'layer_wise_decay': 0.5}, "did you mean 'layer_wise_lr_decay'"),
        ('LBFGS', {'layer_wise_lr_decay': 0.5}, 'LBFGS has one learning rate'),
        ('Adamm', {'layer_wise_lr_decay': 0.5}, "did you mean 'Adam'"),
    ],
)
def test_wrong_layer_decays(name, options, message):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=message):
        build_model_optimizer(name, model, 0.1, options)


def test_layer_decay_is_not_for_the_optimizer_of_a_loss():
    with pytest.raises(ConfigError, match='is for the model'):
        build_optimizer('SGD', build('ArcFaceLoss').parameters(), 0.1, {'layer_wise_lr_decay': 0.5})


def test_without_layer_decay_all_that_is_trainable_is_one_group():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = build_model_optimizer('AdamW', model, 0.1, {'weight_decay': 0.5}).param_groups
    assert (len(group['params']), group['lr'], group['weight_decay']) == (2, 0.1, 0.5)
    with pytest.raises(ConfigError, match='nothing is left to train'):
        build_model_optimizer('AdamW', model.requires_grad_(False), 0.1)


@pytest.mark.parametrize('reducer', sorted(PARTS['reducer']))
def test_every_reducer_runs_or_is_refused(reducer):
    options = REDUCER_OPTIONS.get(reducer)
    for name in CLASS_LOSSES:
        part = {'reducer': {'name': reducer, 'options': options}}
        if reducer not in allowed_parts(name, 'reducer'):
            with pytest.raises(ConfigError, match=r'does not go with reducer|no use for a reducer'):
                build(name, part)
            continue
        objective = build_objective('class', build(name, part))
        check_objective_runs(objective, 'class', DIMENSION, NUM_CLASSES)


@pytest.mark.parametrize('option', ['embedding_regularizer', 'weight_regularizer'])
def test_every_regularizer_runs(option):
    for name in CLASS_LOSSES:
        if option not in accepted_options(LOSSES[name]) or name == 'VICRegLoss':
            continue
        for regularizer in PARTS[option]:
            given = {'name': regularizer}
            if regularizer == 'SparseCentersRegularizer':
                if name != 'SoftTripleLoss':
                    continue
                given['options'] = {'centers_per_class': 10}
            objective = build_objective('class', build(name, {option: given}))
            check_objective_runs(objective, 'class', DIMENSION, NUM_CLASSES)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('AngularLoss', {'distance': 'CosineSimilarity'}, 'LpDistance; distances.*: LpDistance$'),
        (
            'AngularLoss',
            {'distance': {'name': 'LpDistance', 'options': {'power': 2}}},
            'distance.power to be 1; distances that can be used.*: LpDistance',
        ),
        ('SoftTripleLoss', {'distance': 'LpDistance'}, 'go together; .*: CosineSim.*, DotProduct'),
        ('RankedListLoss', {'distance': 'CosineSimilarity'}, 'use LpDistance, SNRDistance'),
        ('P2SGradLoss', {'distance': 'LpDistance'}, 'no use for a distance: leave it out'),
        ('NCALoss', {'distance': 3}, 'distance 3 is neither a class name nor'),
        ('NCALoss', {'distance': {'name': 'LpDistance', 'options': {}, 'p': 1}}, "into .*'options'"),
        ('NCALoss', {'distance': {'name': ['LpDistance']}}, 'unknown distance'),
        ('NCALoss', {'weight_init_func': 'normal_'}, 'unknown option'),
        ('NCALoss', {'reducer': {'name': 'ClassWeightedReducer', 'weights': 'x'}}, 'no list of num'),
        ('NCALoss', {'reducer': {'name': 'ClassWeightedReducer', 'weights': 1}}, 'one number a cla'),
        ('NCALoss', {'reducer': {'name': 'ClassWeightedReducer', 'weights': [1]}}, '1 weights, and.*5'),
        ('NCALoss', {'reducer': 'ThresholdReducer'}, 'At least one of low or high'),
        ('NCALoss', {'embedding_regularizer': 'SparseCentersRegularizer'}, 'unknown embedding_reg'),
    ],
)  # fmt: skip
def test_wrong_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, options)


def test_refused_parts_and_distances_of_miners():
    for option in PARTS:
        for name in REFUSED_PARTS:
            with pytest.raises(ConfigError, match=f"unknown {option} '{name}': .* has it, but it"):
                build('ArcFaceLoss', {option: name})
    with pytest.raises(ConfigError, match=r'LpDistance; distances.*: LpDistance$'):
        build_miner('AngularMiner', {'distance': 'SNRDistance'})
    for name in MINERS:
        options = {'distance': {'name': 'LpDistance', 'options': {'p': 2}}}
        assert build_miner(name, options).distance.p == 2


def test_weights_of_classes_are_for_classes():
    loss = build('NTXentLoss', {'reducer': {'name': 'ClassWeightedReducer', 'weights': [1] * 5}})
    for kind in ('session', 'instance'):
        with pytest.raises(ConfigError, match=f'weighs classes, which data of kind {kind}'):
            build_objective(kind, loss)


def test_which_losses_know_the_classes():
    knowing = [name for name in CLASS_LOSSES if learns_class_weights(name)]
    assert knowing == [name for name in CLASS_LOSSES if list(build(name).parameters())]
    by_class = {'learn_beta': True, 'num_classes': 5}
    assert learns_class_weights('MarginLoss', by_class)
    assert learns_class_weights(
        'CrossBatchMemory', {'loss': 'MarginLoss', 'loss_options': by_class}
    )
    assert not learns_class_weights('CrossBatchMemory', {'loss': 'NTXLoss'})
    assert learns_class_weights('NCALoss', {'reducer': {'name': 'ClassWeightedReducer'}})


def test_values_that_are_no_numbers_are_found_before():
    loss = build('RankedListLoss', {'margin': 0.4, 'Tn': 1000})
    with pytest.raises(
        ConfigError, match='RankedListLoss does not run with these options: it give'
    ):
        check_objective_runs(build_objective('class', loss), 'class', DIMENSION, NUM_CLASSES)
