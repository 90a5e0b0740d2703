"""What `finetuner export` refuses, in which words, and that it leaves nothing half done."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from finetuner.cli import app
from finetuner.excepts import ConfigError
from finetuner.server.exporting import Wishes, export_compose, export_kubernetes, values

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / 'flows' / 'train-and-encode.yml'
GATEWAY = {
    'uses': 'finetuner.server.gateway.Gateway',
    'protocol': ['grpc', 'http'],
    'port': [51000, 51080],
}
ENCODER = {'name': 'encoder', 'uses': 'finetuner.server.encoder.FinetunerExecutor'}
INDEXER = {'name': 'indexer', 'uses': 'finetuner.server.indexer.IndexExecutor'}
TRAINER = {'name': 'trainer', 'uses': 'finetuner.server.trainer.TrainerExecutor'}


@pytest.fixture
def write(tmp_path):
    """Write a Flow, its parts changed; YAML reads JSON."""

    def write(*executors, gateway=None, **common):
        path = tmp_path / 'flow.yml'
        flow = {'jtype': 'Flow', 'with': common, 'gateway': gateway or GATEWAY}
        path.write_text(json.dumps({**flow, 'executors': list(executors) or [ENCODER]}))
        return path

    return write


def refused(flow, tmp_path, message, **wishes):
    with pytest.raises(ConfigError, match=message):
        export_kubernetes(flow, tmp_path / 'out', Wishes(**wishes))
    assert not any(each.name.startswith(('out', '.out')) for each in tmp_path.iterdir())


@pytest.mark.parametrize(
    ('wishes', 'message'),
    [
        ({'replicas': ['encodr=2']}, "unknown Executor 'encodr': did you mean 'encoder'"),
        ({'replicas': ['encoder=2', 'encoder=3']}, "names 'encoder' twice"),
        ({'replicas': ['encoder']}, 'is not NAME=VALUE'),
        ({'replicas': ['encoder=0']}, 'not a whole number from 1 on'),
        ({'replicas': ['encoder=two']}, 'not a whole number from 1 on'),
        ({'replicas': ['trainer=2']}, "'trainer' must be one, in one shard: .* a second run"),
        ({'autoscale': ['trainer=1:2']}, 'must be one'),
        ({'autoscale': ['encoder=5']}, 'is not FEWEST:MOST'),
        ({'autoscale': ['encoder=5:2']}, 'must be larger'),
        ({'autoscale': ['encoder=1:2'], 'replicas': ['encoder=2']}, 'both speak of'),
        ({'gpus': ['encoder=0.5']}, 'not a whole number'),
        ({'gpus': ['gateway=1']}, 'computes nothing'),
        ({'cpus': ['encoder=two']}, '--cpu .* is not an amount of CPU'),
        ({'cpus': ['encoder=0']}, 'is not an amount of CPU'),
        ({'memory': ['encoder=4 GB']}, '--memory .* is not an amount of bytes'),
        ({'memory': ['encoder=0Gi']}, 'is not an amount of bytes'),
        ({'image': 'Fine Tuner'}, 'is not the name of an image'),
        ({'image': 'a;rm -rf'}, 'is not the name of an image'),
        ({'executor_images': ['encoder=x y']}, 'is not the name of an image'),
    ],
)
def test_wishes_that_cannot_be(wishes, message, tmp_path):
    refused(FLOW, tmp_path, message, **wishes)


@pytest.mark.parametrize('export', [export_kubernetes, export_compose])
@pytest.mark.parametrize(
    ('shards', 'wishes'),
    [
        (1, {'replicas': ['indexer=2']}),
        (1, {'autoscale': ['indexer=1:2']}),
        (2, {}),
    ],
)
def test_there_is_one_indexer(export, shards, wishes, write, tmp_path):
    flow = write(ENCODER, {**INDEXER, 'shards': shards})
    with pytest.raises(ConfigError, match=r"'indexer' must be one, in one shard: .* an index open"):
        export(flow, tmp_path / 'out', Wishes(**wishes))


def test_an_indexer_ends_before_the_next_one_starts(tmp_path):
    export_kubernetes(ROOT / 'flows/search.yml', tmp_path / 'out', Wishes())
    objects = list(yaml.safe_load_all((tmp_path / 'out/indexer.yml').read_text()))
    (workload,) = (each for each in objects if each['kind'] == 'Deployment')
    assert workload['spec']['replicas'] == 1
    assert workload['spec']['strategy'] == {'type': 'Recreate'}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'namespace': 'No Such'}, '--namespace'),
        ({'secret': '-x'}, '--secret'),
        ({'storage': 'much'}, '--storage'),
        ({'storage_class': 'a b'}, '--storage-class'),
    ],
)
def test_clusters_that_cannot_be(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_kubernetes(FLOW, tmp_path / 'out', Wishes(), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('executor', 'message'),
    [
        (
            {'uses': 'finetuner.server.encoder.FinetunerExecuter'},
            "did you mean 'FinetunerExecutor'",
        ),
        ({'uses': 'mine.Own'}, 'code of your own .* --executor-image encoder=NAME'),
        ({'uses': 'nowhere/config.yml'}, "there is no file '.*nowhere/config.yml'"),
        ({'uses': 'jinaai://jina-ai/CLIPEncoder'}, 'comes from a hub'),
        ({'uses': ''}, 'has no `uses`'),
        ({'uses': 'MyExecutor', 'py_modules': ['gone.py']}, 'there is no file .*gone.py'),
        ({'name': '1st'}, 'cannot be part of a host name'),
        ({'uses_before': 'docker://x'}, '`uses_before`'),
        ({'uses_with': {'token': 'ft_abc'}}, '`token` in `uses_with`'),
        ({'env': {'FINETUNER_GATEWAY_KEY': 'x'}}, 'takes it from a Secret'),
        ({'env': {'AWS_SECRET_ACCESS_KEY': 'x'}}, 'name a Secret instead'),
        ({'uses_with': 'x'}, '`uses_with` is no mapping'),
        ({'env': ['A=b']}, '`env` is no mapping'),
        ({'replicas': 'many'}, "replicas of 'encoder'"),
        ({'shards': 0.5}, "shards of 'encoder'"),
        ({'gpus': 'all'}, 'Kubernetes counts them'),
        ({'volumes': ['data']}, 'has the volume'),
        ({'volumes': ['cache:/data']}, "'/data', where the home is: give it another folder"),
        ({'volumes': '//data/'}, 'where the home is'),
        ({'volumes': ['a:/models', 'b:/models/:ro']}, 'where another of its volumes is'),
        ({**TRAINER, 'volumes': ['a:/dev/shm']}, 'where the shared memory of a trainer is'),
    ],
)
def test_executors_that_cannot_be(executor, message, write, tmp_path):
    flow = write({**ENCODER, **executor})
    with pytest.raises(ConfigError, match=message):
        export_kubernetes(flow, tmp_path / 'out', Wishes())
    assert [each.name for each in tmp_path.iterdir()] == ['flow.yml']


@pytest.mark.parametrize(
    ('first', 'second', 'message'),
    [
        ({}, {'name': 'Gateway'}, "'Gateway' would have the host name 'gateway'"),
        ({'name': 'my_one'}, {'name': 'My-One'}, "'My-One' .* 'my-one', which 'my_one' has"),
        ({'shards': 2}, {'name': 'encoder-1'}, "'encoder-1', which 'encoder' has already"),
        ({'shards': 2}, {'name': 'encoder-head'}, "'encoder-head', which 'encoder' has already"),
        ({'name': 'encoder-rep-0'}, {'replicas': 2}, "'encoder-rep-0', which 'encoder-rep-0' has"),
    ],
)
def test_no_executor_takes_the_place_of_another(first, second, message, write, tmp_path):
    flow = write({**ENCODER, **first}, {**ENCODER, **second})
    for export in (export_kubernetes, export_compose):
        with pytest.raises(ConfigError, match=message):
            export(flow, tmp_path / 'out', Wishes())


def test_no_executor_takes_the_place_of_what_all_share(write, tmp_path):
    flow = write({**ENCODER, 'name': 'Shared'})
    refused(flow, tmp_path, "an Executor is called 'shared'")
    export_compose(flow, tmp_path / 'out', Wishes())


@pytest.mark.parametrize(
    'said',
    [
        *({'env': {name: 'hunter2'}} for name in ('PASSWORD', 'PGPASSWORD', 'Token', 'API_KEY')),
        *(
            {'uses_with': {name: 'hunter2'}}
            for name in (
                'api_key',
                'apiKey',
                'key',
                'password',
                'clientSecret',
                'passwd',
                'hf-token',
            )
        ),
        {'uses_with': {'database': {'login': [{'password': 'hunter2'}]}}},
        {'uses_with': {'headers': {'Authorization': 'Bearer hunter2'}}},
        {'uses_with': {'urls': ['postgresql+psycopg://me:hunter2@db.example/x']}},
        {'env': {'CACHE': 'redis://:hunter2@cache.example'}},
        {'env': {'CACHE': 'redis://me:hun/ter2@cache.example'}},
        {'external': True, 'host': 'a.example', 'port': 1, 'grpc_metadata': {'a': 'hunter2'}},
        {'external': True, 'host': 'grpcs://me:hunter2@a.example', 'port': 1},
        {'external': True, 'host': 'a.example', 'port': 1, 'env': {'A_TOKEN': 'hunter2'}},
    ],
)
def test_secrets_are_refused_wherever_they_stand(said, write, tmp_path):
    flow = write({**ENCODER, **said}, {**ENCODER, 'name': 'other'})
    for export in (export_kubernetes, export_compose):
        with pytest.raises(ConfigError, match=r"^Executor 'encoder' .*(read|none)") as refusal:
            export(flow, tmp_path / 'out', Wishes())
        assert 'hunter2' not in str(refusal.value)
        assert 'ter2' not in str(refusal.value)


def test_secrets_of_the_flow_and_its_gateway_are_refused(write, tmp_path):
    refused(write(env={'PASSWORD': 'x'}), tmp_path, 'the Flow sets PASSWORD')
    gateway = {**GATEWAY, 'uses_with': {'url': 'http://a:b@c'}}
    refused(write(gateway=gateway), tmp_path, 'the gateway has an address with a password')


def test_what_only_looks_like_a_secret_is_exported(write, tmp_path):
    harmless = {
        'monkey': 'x', 'primary_key_column': 'x', 'primary_key': 'id', 'pad_token': '[PAD]',
        'max_tokens': 5, 'token': None, 'use_token': True, 'token_file': '/x', 'keys': ['a'],
        'url': 'http://host:8080/@scope/x',
    }  # fmt: skip
    flow = write({**ENCODER, 'uses_with': harmless, 'env': {'TURKEY': 'x', 'TOKENIZERS': '1'}})
    export_compose(flow, tmp_path / 'out', Wishes())
    text = (tmp_path / 'out/compose.yml').read_text()
    assert all(name in text for name in harmless)


@pytest.mark.parametrize(
    ('said', 'message'),
    [
        ({'gateway': {'protocol': 'http', 'port': 1}}, 'asks nobody for a token'),
        ({'gateway': {**GATEWAY, 'port': 51000}}, '2 protocols and 1 ports'),
        ({'gateway': {**GATEWAY, 'port': ['a', 'b']}}, 'the port'),
        ({'retries': 3}, '`retries: 3`: in a Flow with a trainer it must be 0'),
        ({'timeout_send': 1000}, 'leave it out'),
        ({'env': {'FINETUNER_TOKEN': 'x'}}, 'takes it from a Secret'),
        ({'name': 'näh'}, 'the name of the Flow'),
    ],
)
def test_flows_that_cannot_be(said, message, write, tmp_path):
    flow = write(TRAINER, ENCODER, **said)
    with pytest.raises(ConfigError, match=message):
        export_kubernetes(flow, tmp_path / 'out', Wishes())


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('jtype: Deployment', 'is no Flow'),
        ('- a list', 'holds no mapping'),
        ('a: [', 'not YAML that can be read'),
        ('jtype: Flow', 'has no Executors'),
        ('jtype: Flow\nexecutors: [{name: a, uses: x.Y}, {name: a, uses: x.Y}]', 'taken already'),
        ('jtype: Flow\nexecutors: [text]', 'is no Executor'),
        ('jtype: Flow\nwith: 3\nexecutors: [{name: a}]', 'is no mapping'),
    ],
)
def test_files_that_are_no_flows(text, message, tmp_path):
    path = tmp_path / 'flow.yml'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        export_compose(path, tmp_path / 'out', Wishes())


def test_a_flow_that_is_not_there(tmp_path):
    refused(tmp_path / 'no.yml', tmp_path, 'there is no Flow')
    refused(tmp_path, tmp_path, r'there is no Flow .*flow\.yml')


def test_what_is_there_already_stays(tmp_path):
    kept = tmp_path / 'kept.txt'
    kept.write_text('mine')
    for output in (tmp_path, kept):
        with pytest.raises(ConfigError, match='holds files already'):
            export_compose(FLOW, output, Wishes())
    assert [each.name for each in tmp_path.iterdir()] == ['kept.txt']
    assert kept.read_text() == 'mine'


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(Path, 'write_text', full)
        with pytest.raises(ConfigError, match='No space left'):
            export_compose(FLOW, tmp_path / 'out', Wishes())
    assert not list(tmp_path.iterdir())


def test_nothing_is_asked_of_other_machines(tmp_path, monkeypatch):
    """Tests have no network, and what Jina would ask it swallows: so count who tries."""
    import requests

    asked = []
    monkeypatch.setattr(requests, 'get', lambda *arguments, **_: asked.append(arguments))
    export_compose(FLOW, tmp_path / 'compose', Wishes())
    export_kubernetes(FLOW, tmp_path / 'kubernetes', Wishes())
    assert not asked


def test_a_folder_and_code_of_ones_own(tmp_path):
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own/code.py').write_text('raise RuntimeError("an export runs nobody\'s code")')
    (tmp_path / 'own/config.yml').write_text('jtype: Own\npy_modules: [code.py]\n')
    (tmp_path / 'ours.py').write_text(
        'from finetuner.server.encoder import FinetunerExecutor\n__all__ = ["FinetunerExecutor"]\n'
    )
    flow = {
        'jtype': 'Flow',
        'gateway': GATEWAY,
        'executors': [
            {'name': 'own', 'uses': 'own/config.yml'},
            {'name': 'dotted', 'uses': 'mine.package.Own'},
            {'name': 'encoder', 'uses': 'FinetunerExecutor', 'py_modules': ['ours.py']},
        ],
    }
    (tmp_path / 'flow.yml').write_text(json.dumps(flow))
    images = ('own=registry.example/own:1', 'dotted=registry.example/dotted@sha256:' + 'a' * 64)
    export_kubernetes(tmp_path, tmp_path / 'out', Wishes(executor_images=images))
    text = (tmp_path / 'out/own.yml').read_text()
    assert 'image: registry.example/own:1' in text
    assert '- config.yml' in text
    assert '- mine.package.Own' in (tmp_path / 'out/dotted.yml').read_text()
    encoder = (tmp_path / 'out/encoder.yml').read_text()
    assert '- finetuner.server.encoder.FinetunerExecutor' in encoder
    assert 'image: finetuner\n' in encoder


def test_in_words_and_as_json(tmp_path):
    run = CliRunner().invoke
    done = run(app, ['export', 'kubernetes', str(FLOW), '--output', str(tmp_path / 'a')])
    assert 'kubectl -n finetuner create secret generic finetuner-secrets' in done.output
    done = run(app, ['export', 'compose', str(FLOW), '--output', str(tmp_path / 'b'), '--json'])
    assert json.loads(done.output)['variables'] == ['FINETUNER_TOKEN', 'FINETUNER_GATEWAY_KEY']


@pytest.mark.parametrize(
    ('text', 'number'),
    [('1Ki', 1024), ('1.5k', 1500), ('2Gi', 2 << 30), ('3M', 3_000_000), ('7', 7)],
)
def test_bytes(text, number):
    assert values.num_bytes(text) == number
    assert values.byte_quantity('', text) == text


@pytest.mark.parametrize(('text', 'cores'), [('500m', 0.5), ('2', 2), ('0.5', 0.5)])
def test_cores(text, cores):
    assert values.num_cores(text) == cores
    assert values.cpu_quantity('', text) == text
