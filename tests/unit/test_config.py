"""RunConfig and Settings: what is taken, what is refused, and with which words."""

import json
import math

import pytest

from finetuner import callback
from finetuner.config import OPTIMIZERS, RunConfig, Settings, whole_numbers
from finetuner.excepts import ConfigError, unknown_name


def config(**parameters):
    return RunConfig.from_parameters({'train_data': 'sha256:0', **parameters})


def test_defaults_are_those_of_finetuner_but_for_what_recipes_choose():
    made = config()
    assert (made.loss, made.optimizer, made.epochs, made.batch_size) == (
        None,
        'Adam',
        5,
        None,
    )
    assert (made.device, made.num_workers, made.num_items_per_class) == ('cuda', 4, 4)
    assert made.experiment_name == 'default'
    assert made.learning_rate is None


def test_it_is_frozen_and_survives_json():
    made = config(
        epochs=2, callbacks=[{'name': 'EarlyStopping', 'options': {'patience': 3}}], loss='ArcFace'
    )
    with pytest.raises(TypeError):
        made.epochs = 3
    assert RunConfig.from_parameters(json.loads(json.dumps(made.dict()))) == made


@pytest.mark.parametrize(
    'name', ['epochs', 'batch_size', 'num_workers', 'num_items_per_class', 'output_dim', 'seed']
)
def test_whole_numbers_come_as_floats_too(name):
    made = getattr(config(**{name: 8.0}), name)
    assert made == 8
    assert type(made) is int
    with pytest.raises(ConfigError, match=rf'{name}: 8.5 is not a whole number'):
        config(**{name: 8.5})
    for value in (True, '8', math.inf, math.nan):
        with pytest.raises(ConfigError, match=name):
            config(**{name: value})


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('epochs', 0),
        ('epochs', None),
        ('batch_size', 1),
        ('num_workers', -1),
        ('num_items_per_class', 0),
        ('output_dim', 0),
        ('seed', -1),
        ('seed', 2**32),
        ('learning_rate', 0),
        ('learning_rate', -1e-4),
        ('learning_rate', math.nan),
        ('learning_rate', math.inf),
        ('val_split', 1.0),
        ('val_split', -0.1),
        ('freeze', 'maybe'),
        ('loss_options', 'margin'),
        ('callbacks', 'EarlyStopping'),
        ('train_data', None),
    ],
)
def test_out_of_range_names_the_argument(name, value):
    with pytest.raises(ConfigError, match=f'^{name}'):
        config(**{name: value})


@pytest.mark.parametrize(
    ('parameters', 'nearest'),
    [
        ({'epocs': 3}, "'epocs': did you mean 'epochs'"),
        ({'lerning_rate': 3}, "did you mean 'learning_rate'"),
        ({'optimizer': 'adamw'}, "did you mean 'AdamW'"),
        ({'loss_optimizer': 'SDG'}, "'SGD'"),
        ({'scheduler': 'cosin'}, "did you mean 'cosine'"),
        ({'device': 'gpu'}, 'device.*allowed: cuda, cpu'),
        ({'sampler': 'klass'}, 'sampler.*allowed: auto, class, random'),
    ],
)
def test_unknown_names_suggest_the_nearest(parameters, nearest):
    with pytest.raises(ConfigError, match=nearest):
        config(**parameters)


def test_several_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        config(epochs=0, batch_size=0)
    assert 'epochs' in str(caught.value)
    assert 'batch_size' in str(caught.value)


def test_none_stands_for_no_options():
    made = config(
        loss_options=None, scheduler_options=None, callbacks=None, description=None,
        experiment_name=None,
    )  # fmt: skip
    assert made.loss_options == {}
    assert made.callbacks == ()
    assert (made.description, made.experiment_name) == ('', 'default')


def test_options_get_their_whole_numbers_back():
    assert whole_numbers({'a': 4.0, 'b': [1.0, 0.5], 'c': {'d': 2.0}, 'e': True, 'f': 'x'}) == {
        'a': 4, 'b': [1, 0.5], 'c': {'d': 2}, 'e': True, 'f': 'x'
    }  # fmt: skip
    made = config(
        loss_options={'num_classes': 4.0},
        callbacks=[{'name': 'EvaluationCallback', 'options': {'limit': 3.0}}],
    )
    assert type(made.loss_options['num_classes']) is int
    assert type(made.callbacks[0].options['limit']) is int


def test_every_optimizer_is_there_in_torch():
    import torch

    of_torch = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and name not in ('Optimizer', 'SparseAdam')
    }
    assert set(OPTIMIZERS) == of_torch


def test_unknown_name_without_a_near_one_lists_all():
    message = unknown_name('loss', 'zzzz', ['b', 'a'])
    assert message == "unknown loss 'zzzz'. Known: a, b."


@pytest.mark.parametrize(
    ('class_', 'options', 'named'),
    [
        (callback.EvaluationCallback, {'limit': 0}, 'limit'),
        (callback.EvaluationCallback, {'limit': 2.5}, 'limit'),
        (callback.EvaluationCallback, {'limit': True}, 'limit'),
        (callback.EvaluationCallback, {'batch_size': -1}, 'batch_size'),
        (callback.EvaluationCallback, {'num_workers': -1}, 'num_workers'),
        (callback.EvaluationCallback, {'steps_per_interval': 0}, 'steps_per_interval'),
        (callback.EvaluationCallback, {'distance': 'manhattan'}, 'distance.*cosine'),
        (callback.EarlyStopping, {'patience': 0}, 'patience'),
        (callback.EarlyStopping, {'patience': 1.5}, 'patience'),
        (callback.EarlyStopping, {'min_delta': -1}, 'min_delta'),
        (callback.EarlyStopping, {'min_delta': math.nan}, 'min_delta'),
        (callback.EarlyStopping, {'baseline': 'x'}, 'baseline'),
        (callback.EarlyStopping, {'mode': 'up'}, 'mode.*auto, min, max'),
        (callback.BestModelCheckpoint, {'mode': 'up'}, 'mode.*auto, min, max'),
        (callback.TrainingCheckpoint, {'last_k_epochs': 0}, 'last_k_epochs'),
        (callback.TrainingCheckpoint, {'last_k_epochs': 1.5}, 'last_k_epochs'),
    ],
)
def test_callbacks_check_their_options(class_, options, named):
    data = {'query_data': 'name'} if class_ is callback.EvaluationCallback else {}
    with pytest.raises(ConfigError, match=named):
        class_(**data, **options)


def test_settings_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path))
    settings = Settings.from_environment()
    assert settings.home == tmp_path
    assert settings.database_url == f'sqlite:///{tmp_path}/finetuner.db'
    assert settings.artifacts_url == str(tmp_path / 'artifacts')
    monkeypatch.setenv('FINETUNER_DATABASE_URL', 'postgresql://there/db')
    monkeypatch.setenv('FINETUNER_ARTIFACTS_URL', 's3://bucket')
    settings = Settings.from_environment(tmp_path / 'other')
    assert settings.home == tmp_path / 'other'
    assert settings.database_url == 'postgresql://there/db'
    assert settings.artifacts_url == 's3://bucket'


def test_settings_expand_the_home_directory(monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    monkeypatch.delenv('FINETUNER_HOME')
    assert str(Settings.from_environment().home) == '/home/someone/.finetuner'
    # an empty variable is no answer
    monkeypatch.setenv('FINETUNER_HOME', '')
    assert str(Settings.from_environment().home) == '/home/someone/.finetuner'
