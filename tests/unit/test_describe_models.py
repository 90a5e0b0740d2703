"""Models and their options in plain values, on the terminal and as JSON."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import finetuner
from finetuner import cli
from finetuner.console import console
from finetuner.excepts import ConfigError
from finetuner.models.options import describe_options
from finetuner.models.zoo import BACKBONES, get_backbone, parse_options
from tests.unit.tiny_encoder import write_tiny_encoder

KEYS = {'name', 'type', 'required', 'default', 'description'}


def options_of(model):
    return {option['name']: option for option in finetuner.list_model_options()[model]}


def run(*arguments):
    done = CliRunner().invoke(cli.app, list(arguments))
    if done.exception is not None:
        raise done.exception
    return done.stdout


def printed(*arguments, width):
    before = console.width
    console.width = width
    try:
        with console.capture() as shown:
            run(*arguments)
    finally:
        console.width = before
    return shown.get()


def flat(options):
    for option in options:
        yield option
        yield from flat(option.get('fields', ()))


def test_every_option_of_every_model_is_there_and_plain():
    listed = finetuner.list_model_options()
    assert list(listed) == finetuner.list_models()
    assert json.loads(json.dumps(listed)) == listed
    for name, options in listed.items():
        backbone = BACKBONES[name]
        expected = set(backbone.options.__fields__) - set(backbone.left_out_options)
        assert {option['name'] for option in options} == expected
        for option in flat(options):
            assert set(option) >= KEYS
            assert option['description'], f'{name}: {option["name"]} has no description'


def test_defaults_and_choices_are_accepted_and_others_not():
    for name, options in finetuner.list_model_options().items():
        for option in options:
            assert parse_options(get_backbone(name), {option['name']: option['default']})
            for choice in option.get('options', ()):
                assert parse_options(get_backbone(name), {option['name']: choice})
            if 'options' in option:
                with pytest.raises(ConfigError):
                    parse_options(get_backbone(name), {option['name']: 'no such choice'})


def test_what_an_option_says():
    picture, text = options_of('resnet18'), options_of('bert-base-cased')
    assert picture['input_size'] == {
        'name': 'input_size',
        'type': 'int or None',
        'required': False,
        'default': None,
        'description': "side in pixels that pictures are resized to; None takes the backbone's own.",
        'range': 'at least 32, at most 1024',
    }
    assert picture['pooler']['options'] == ['mean', 'gem', 'max']
    inner = {option['name']: option for option in picture['pooler_options']['fields']}
    assert (inner['p']['type'], inner['p']['default'], inner['p']['range']) == (
        'float', 3.0, 'more than 0, at most 100',
    )  # fmt: skip
    assert inner['trainable']['type'] == 'bool'
    targets = next(o for o in text['lora']['fields'] if o['name'] == 'target_modules')
    assert targets['type'] == 'list of str or None'
    assert 'pooler' not in options_of('vit_b_16')


def test_descriptions_come_from_docstrings():
    class Options(BaseModel):
        """Some.

        Attributes:
            first: what it is,
                in two lines.
            second: another: with a colon.

        A last paragraph, which is of none.
        """

        first: int
        second: str = 'x'

    assert [(o['description'], o['required']) for o in describe_options(Options)] == [
        ('what it is, in two lines.', True), ('another: with a colon.', False),
    ]  # fmt: skip
    assert [o['name'] for o in describe_options(Options, ('first',))] == ['second']


@pytest.mark.parametrize('width', [80, 120])
def test_names_stand_whole_in_the_table(width):
    shown = printed('describe-models', width=width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    for name, backbone in BACKBONES.items():
        row = next(line for line in lines if line.split()[:1] == [name])
        assert str(backbone.dimension) in row.split()
    for task in {backbone.task for backbone in BACKBONES.values()}:
        assert f'Finetuner backbones: {task}' in shown
    assert ('trained on a billion' in shown) == (width == 120)


@pytest.mark.parametrize('width', [80, 120])
def test_a_model_is_shown_with_its_options(width):
    shown = printed('describe-models', 'efficientnet-base', width=width)
    assert max(map(len, shown.splitlines())) <= width
    assert 'efficientnet_b4: ' in shown
    for name in ('pooler_options', '    trainable', 'at least 32, at most 1024', 'default 3.0'):
        assert name in shown
    assert 'one of mean, gem, max' in shown


def test_a_task_chooses():
    shown = printed('describe-models', '--task', 'text-to-text', width=100)
    assert 'all-MiniLM-L6-v2' in shown
    assert 'resnet18' not in shown
    with pytest.raises(
        ConfigError, match="unknown task 'text-to-txt': did you mean 'text-to-text'"
    ):
        run('describe-models', '--task', 'text-to-txt')
    with pytest.raises(ConfigError, match='a model has one task'):
        run('describe-models', 'resnet18', '--task', 'text-to-text')


def test_json():
    everything = json.loads(run('describe-models', '--json'))
    assert [model['name'] for model in everything] == finetuner.list_models()
    assert {m['name']: m['options'] for m in everything} == finetuner.list_model_options()
    one = json.loads(run('describe-models', 'resnet-base', '--json'))
    assert one in everything
    assert (one['name'], one['output_dim'], one['input_size']) == ('resnet50', 2048, 224)
    pictures = json.loads(run('describe-models', '--task', 'image-to-image', '--json'))
    assert {model['task'] for model in pictures} == {'image-to-image'}


def test_a_folder_and_a_wrong_name(tmp_path):
    folder = write_tiny_encoder(tmp_path / 'mine')
    assert 'mine: text encoder of transformers' in printed(
        'describe-models', str(folder), width=100
    )
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        run('describe-models', 'resnet-18')


def test_the_old_name_of_the_command_still_works():
    assert printed('models', width=100) == printed('describe-models', width=100)
    assert 'describe-models' in run('--help')
