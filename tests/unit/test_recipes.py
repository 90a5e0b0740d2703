"""What a run does where its config leaves it open."""

from __future__ import annotations

import pytest
from docarray import Document, DocumentArray

from finetuner.artifact import load_artifact
from finetuner.config import RunConfig
from finetuner.excepts import ConfigError
from finetuner.models.whitening import Whitening
from finetuner.models.zoo import get_backbone
from finetuner.runs.recipes import apply_recipe, settled_values
from finetuner.runs.runner import validate_run
from tests.conftest import make_picture_docs
from tests.unit.test_runner import execute

SMALL = {'input_size': 32, 'weights': 'none'}


def filled(model='efficientnet-lite0', kind='class', can_whiten=True, **parameters):
    config = RunConfig.from_parameters({'model': model, 'train_data': 'some', **parameters})
    return apply_recipe(config, get_backbone(model), kind, can_whiten)


def test_class_data_of_pictures():
    config = filled()
    assert (config.loss, config.learning_rate) == ('MultiSimilarityLoss', 1e-3)
    assert config.loss_options == {'alpha': 2, 'beta': 50, 'base': 0.5}
    assert (config.scheduler, config.scheduler_options) == ('cosine', {'num_warmup_steps': 0.15})
    assert config.model_options == {'train_input_size': 128}
    assert config.whiten is True


@pytest.mark.parametrize(
    ('kind', 'loss', 'learning_rate'),
    [
        ('session', 'TripletMarginLoss', 2e-4),
        ('instance', 'NTXentLoss', 1e-4),
        ('scored_pair', 'CosineSimilarityLoss', 1e-4),
    ],
)
def test_other_kinds(kind, loss, learning_rate):
    config = filled(kind=kind)
    assert (config.loss, config.learning_rate, config.whiten) == (loss, learning_rate, False)


@pytest.mark.parametrize(
    'named',
    [
        {'loss': 'CircleLoss'},
        {'learning_rate': 0.5},
        {'scheduler': 'constant'},
        {'scheduler_options': {'num_warmup_steps': 3}},
        {'whiten': False},
        {'model_options': {'input_size': 96}},
        {'model_options': {'train_input_size': 64}},
        {'loss': 'MultiSimilarityLoss', 'loss_options': {'alpha': 1}},
    ],
)
def test_what_is_named_stays(named):
    config = filled(**named)
    assert {name: getattr(config, name) for name in named} == named


def test_another_loss_learns_at_a_safe_rate():
    assert filled(loss='TripletMarginLoss').learning_rate == 1e-4
    assert filled(loss='MultiSimilarityLoss').learning_rate == 1e-3


def test_other_backbones_learn_slower():
    assert filled(model='resnet50').learning_rate == pytest.approx(3e-4)


def test_adapters_learn_faster():
    model = 'all-MiniLM-L6-v2'
    assert filled(model).learning_rate == 2e-4
    assert filled(model, model_options={'lora': {}}).learning_rate == pytest.approx(2e-3)
    assert filled(model, model_options={'lora': {}}, learning_rate=2e-5).learning_rate == 2e-5


def test_untrained_weights_and_artifacts_are_not_whitened():
    untrained = filled(model_options={'weights': 'none'})
    assert (untrained.whiten, untrained.learning_rate) == (False, 1e-3)
    assert untrained.model_options == {'weights': 'none'}
    assert filled(model_artifact='some').whiten is False
    assert filled(can_whiten=False).whiten is False


def test_transformers_of_pictures_are_built_for_one_size():
    assert filled(model='vit_b_16').model_options == {}


@pytest.mark.parametrize('per_class', [2, 6])
def test_nothing_is_left_open_and_filling_in_twice_changes_nothing(per_class):
    docs = make_picture_docs(20, per_class)
    config = RunConfig.from_parameters(
        {'model': 'efficientnet-lite0', 'train_data': 'some', 'num_workers': 0}
    )
    settled = validate_run(config, {'train_data': docs})
    values = settled_values(settled)
    open_ones = {name for name, value in values.items() if value is None}
    assert not open_ones
    # a Document comes once where that is not against what was asked for
    assert settled.num_items_per_class == min(4, per_class)
    assert validate_run(config.copy(update=values), {'train_data': docs}) == settled


def test_texts_are_varied_so_that_one_may_come_twice():
    docs = DocumentArray(
        Document(text=f'{thing} number {number}', tags={'finetuner_label': thing})
        for thing in ('shoe', 'hat', 'coat', 'bag')
        for number in range(2)
    )
    for given, items in (({}, 4), ({'augmentation': 'none'}, 2)):
        config = RunConfig.from_parameters(
            {'model': 'all-MiniLM-L6-v2', 'train_data': 'some', 'num_workers': 0, **given}
        )
        settled = validate_run(config, {'train_data': docs})
        assert settled.augmentation == given.get('augmentation', 'light')
        assert settled.num_items_per_class == items


@pytest.mark.parametrize(
    ('num_classes', 'given', 'expected'),
    [
        (100, {}, 192),
        (10, {}, 20),
        (100, {'batch_size': 64}, 64),
        (100, {'loss': 'SupConLoss'}, 192),
    ],
)
def test_batches_of_texts_are_larger_where_there_are_as_many(num_classes, given, expected):
    docs = DocumentArray(
        Document(text=f'text {i} {j}', tags={'finetuner_label': i})
        for i in range(num_classes)
        for j in range(2)
    )
    config = RunConfig(model='all-MiniLM-L6-v2', train_data='x', **given)
    settled = validate_run(config, {'train_data': docs})
    assert settled.batch_size == expected


def test_a_whitening_is_fitted_kept_and_found_again(tmp_path):
    options = {'input_size': 32, 'weights': 'none', 'train_input_size': 32}
    for output_dim in (None, 8):
        directory = tmp_path / str(output_dim)
        execute(directory, whiten=True, model_options=options, output_dim=output_dim)
        artifact = load_artifact(directory)
        assert artifact.spec.whitening
        (module,) = (m for m in artifact.build_model().modules() if isinstance(m, Whitening))
        assert module.fitted
        assert module.dense.linear.out_features == artifact.spec.dimension


def test_the_metrics_are_those_after_the_last_fitting(tmp_path):
    evaluation = {'name': 'EvaluationCallback', 'options': {'query_data': 'query', 'limit': 3}}
    observer = execute(tmp_path / 'a', whiten=True, callbacks=[evaluation])
    (before, as_it_comes), (after, whitened), (last, _) = observer.evaluations
    plain = execute(tmp_path / 'b', whiten=False, callbacks=[evaluation])
    assert (before, after, last) == ('before', 'after', 'p_value')
    assert as_it_comes == plain.evaluations[0][1]
    assert whitened != plain.evaluations[1][1]


def test_whitening_is_refused_where_it_says_nothing():
    alone = DocumentArray(
        Document(blob=doc.blob, tags={'finetuner_label': min(number, 22)})
        for number, doc in enumerate(make_picture_docs())
    )
    config = RunConfig.from_parameters(
        {'train_data': 'some', 'model_options': SMALL, 'whiten': True, 'num_workers': 0}
    )
    with pytest.raises(
        ConfigError, match=r'whiten=True fits a map .* these class data do not tell'
    ):
        validate_run(config, {'train_data': alone})
    unlabelled = DocumentArray(Document(blob=doc.blob) for doc in make_picture_docs())
    with pytest.raises(ConfigError, match='these instance data do not tell'):
        validate_run(config, {'train_data': unlabelled})
