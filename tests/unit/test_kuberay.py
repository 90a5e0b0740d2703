"""A Ray cluster beside an exported Flow, as KubeRay's operator would take it."""

import copy
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import ValidationError
from typer.testing import CliRunner

from finetuner.cli import app
from finetuner.excepts import ConfigError
from finetuner.ray_cluster import import_ray
from finetuner.server.exporting import RayWishes, Wishes, export_kubernetes
from tests.kuberay_checks import (
    may_reach,
    refuse_loose_ends_of_ray,
    refuse_unknown_to_kuberay,
    templates_of,
)
from tests.kubernetes_checks import refuse_loose_ends, refuse_unknown

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / 'flows/train-and-encode.yml'
ENCODE = (
    'finetuner encode --input "/data/in/*.parquet" --output /data/out --artifact A --workers 8 '
    '--ray auto'
)
GATEWAY = {
    'uses': 'finetuner.server.gateway.Gateway',
    'protocol': ['grpc', 'http'],
    'port': [51000, 51080],
}
TRAINER = {'name': 'trainer', 'uses': 'finetuner.server.trainer.TrainerExecutor'}


def export(tmp_path, flow=FLOW, wishes=None, many_nodes=True, namespace=None, **ray):
    out = tmp_path / 'out'
    export_kubernetes(
        flow, out, wishes or Wishes(), namespace, many_nodes=many_nodes, ray=RayWishes(**ray)
    )
    return {path.stem: list(yaml.safe_load_all(path.read_text())) for path in out.glob('*.yml')}


def checked(files):
    objects = [each for file in files.values() for each in file]
    of_ray = [each for each in objects if each['apiVersion'].startswith('ray.io/')]
    others = [each for each in objects if each not in of_ray]
    refuse_unknown(others)
    refuse_loose_ends(others)
    for each in of_ray:
        refuse_unknown_to_kuberay(each)
    refuse_loose_ends_of_ray(objects)
    return objects


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp('exported'))


@pytest.mark.parametrize(
    'ray',
    [
        {},
        {'workers': '0:8', 'gpus': '1', 'job': ENCODE},
        {'workers': '2:2', 'cpu': '16', 'memory': '64Gi'},
    ],
)
def test_kuberay_takes_a_cluster(ray, tmp_path):
    files = export(tmp_path, namespace='research', **ray)
    checked(files)
    assert ('ray-job' in files) == ('job' in ray)
    (cluster,) = (each for each in files['ray'] if each['kind'] == 'RayCluster')
    (group,) = cluster['spec']['workerGroupSpecs']
    assert f'{group["minReplicas"]}:{group["maxReplicas"]}' == ray.get('workers', '1:4')
    (worker,) = group['template']['spec']['containers']
    limits = {'cpu': ray.get('cpu', '4'), 'memory': ray.get('memory', '16Gi')}
    if 'gpus' in ray:
        limits['nvidia.com/gpu'] = 1
    assert worker['resources']['limits'] == limits
    assert cluster['spec']['headGroupSpec']['rayStartParams']['num-cpus'] == '0'


@pytest.mark.parametrize(
    ('ray', 'said', 'cpus', 'gpus', 'num_workers'),
    [
        ({'workers': '1:4', 'cpu': '4'}, {}, '4', '0', 4),
        ({'workers': '0:2', 'cpu': '16', 'gpus': '4'}, {}, '4', '1', 8),
        ({'workers': '1:4'}, {'env': {'FINETUNER_RAY_CPUS': '2'}}, '2', '0', 4),
        ({'workers': '1:4'}, {'uses_with': {'num_workers': 9}}, '4', '0', 9),
    ],
)
def test_a_run_has_the_worker_it_is_sent_to(ray, said, cpus, gpus, num_workers, tmp_path):
    flow = {'jtype': 'Flow', 'gateway': GATEWAY, 'executors': [{**TRAINER, **said}]}
    (tmp_path / 'flow.yml').write_text(json.dumps(flow))
    files = export(tmp_path, tmp_path / 'flow.yml', **ray)
    checked(files)
    objects = {each['kind']: each for each in files['trainer']}
    (container,) = objects['Deployment']['spec']['template']['spec']['containers']
    given = {each['name']: each.get('value') for each in container['env']}
    if 'ConfigMap' in objects:
        given.update(objects['ConfigMap']['data'])
    assert (given['FINETUNER_RAY_CPUS'], given['FINETUNER_RAY_GPUS']) == (cpus, gpus)
    arguments = container['args']
    uses_with = json.loads(arguments[arguments.index('--uses-with') + 1])
    # no num_threads: those would be of the trainer's own pod, which computes nothing
    assert uses_with == {'num_workers': num_workers}


def test_pods_of_ray_are_given_what_the_trainer_has(tmp_path):
    given = {'HF_HUB_OFFLINE': '1', 'ODD': 'a $(POD) $$ b'}
    taken = {'AWS_SECRET_ACCESS_KEY': {'name': 'storage', 'key': 'secret'}}
    trainer = {**TRAINER, 'env': given, 'env_from_secret': taken}
    flow = {'jtype': 'Flow', 'gateway': GATEWAY, 'executors': [trainer]}
    (tmp_path / 'flow.yml').write_text(json.dumps(flow))
    images = Wishes(executor_images=('trainer=registry.example/finetuner:cuda',))
    files = export(tmp_path, tmp_path / 'flow.yml', images)
    checked(files)
    for template in templates_of(files['ray'][0]).values():
        (container,) = template['spec']['containers']
        assert container['image'] == 'registry.example/finetuner:cuda'
        found = {each['name']: each for each in container['env']}
        assert found['HF_HUB_OFFLINE']['value'] == '1'
        # as Kubernetes reads it: two $ are one, and no $(NAME) is left
        assert found['ODD']['value'].replace('$$', '$') == given['ODD']
        assert found['FINETUNER_HOME']['value'] == '/data'
        for name, secret, key in (
            ('AWS_SECRET_ACCESS_KEY', 'storage', 'secret'),
            ('FINETUNER_DATABASE_URL', 'finetuner-secrets', 'FINETUNER_DATABASE_URL'),
        ):
            assert found[name]['valueFrom']['secretKeyRef'] == {'name': secret, 'key': key}
        assert not {'FINETUNER_TOKEN', 'FINETUNER_GATEWAY_KEY'} & set(found), 'no job needs them'


def test_who_reaches_the_ports_of_ray(tmp_path):
    objects = checked(export(tmp_path, job=ENCODE))
    by_name = {
        each['metadata']['name']: each['spec']['template']['metadata']['labels']
        for each in objects
        if each['kind'] == 'Deployment'
    }
    (cluster,) = (each for each in objects if each['kind'] == 'RayCluster')
    for group, template in templates_of(cluster).items():
        kind = 'head' if group == 'head' else 'worker'
        # what the operator adds, and does not let a template change
        own = {'ray.io/cluster': cluster['metadata']['name'], 'ray.io/node-type': kind}
        by_name[kind] = {**template['metadata']['labels'], **own}
    by_name['operator'] = {
        'app.kubernetes.io/name': 'kuberay-operator',
        'app.kubernetes.io/component': 'kuberay-operator',
    }
    reached = {
        (caller, called, port)
        for caller, labels in by_name.items()
        for called in ('head', 'worker')
        for port in (6379, 8265, 10001, 52365)
        if may_reach(objects, labels, by_name[called], port)
    }
    among = {
        (caller, called, port)
        for caller in ('head', 'worker')
        for called in ('head', 'worker')
        for port in (6379, 8265, 10001, 52365)
    }
    assert reached == {*among, ('trainer', 'head', 8265), ('operator', 'head', 8265)}
    assert not may_reach(objects, by_name['worker'], by_name['encoder'], 8080)
    without = checked(export(tmp_path / 'without'))
    assert not may_reach(without, by_name['operator'], by_name['head'], 8265)


def test_ray_start_takes_its_parameters(tmp_path):
    # once and for all in this process, so with tokens, as the tests of a cluster need it
    import_ray()
    from ray.scripts.scripts import start

    options = {name.removeprefix('--') for each in start.params for name in each.opts}
    (cluster, *_) = export(tmp_path, gpus='1')['ray']
    assert cluster['spec']['rayVersion'] == version('ray'), 'which the image installs'
    groups = [cluster['spec']['headGroupSpec'], *cluster['spec']['workerGroupSpecs']]
    assert {name for group in groups for name in group['rayStartParams']} <= options


def test_the_extra_can_be_built_into_the_image():
    default = re.search(r'(?m)^ARG EXTRAS=(\S+)$', (ROOT / 'Dockerfile').read_text())[1]
    asked = re.search(r'EXTRAS=(\S+)', (ROOT / 'docs/deployment.md').read_text())[1]
    assert asked == f'{default},ray'


@pytest.mark.parametrize(
    ('ray', 'message'),
    [
        ({'many_nodes': False}, '--ray needs --many-nodes: .*ReadWriteMany.*DATABASE_URL'),
        ({'workers': '4:1'}, 'the second number must not be the smaller one'),
        ({'workers': '0:0'}, 'not a whole number from 1 on'),
        ({'workers': '4'}, 'is not FEWEST:MOST'),
        ({'cpu': '500m'}, "--ray-cpu '500m' is not a whole number"),
        ({'memory': 'much'}, '--ray-memory'),
        ({'gpus': 'all'}, '--ray-gpus'),
        ({'job': ' '}, '--ray-job is empty'),
        ({'job': 'finetuner encode "a'}, 'is no command of a shell: No closing quotation'),
        ({'job': 'x --output s3://me:hunter2@host/x'}, 'an address with a password in it'),
        ({'flow': ROOT / 'flows/encode.yml'}, 'has no trainer. .* --ray-job'),
    ],
)
def test_clusters_that_cannot_be(ray, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as refusal:
        export(tmp_path, **ray)
    assert 'hunter2' not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_names_that_kuberay_would_cut_off(tmp_path):
    (tmp_path / 'fits').mkdir()
    for length in (37, 38):
        common = {'name': 'n' * length}
        flow = {'jtype': 'Flow', 'with': common, 'gateway': GATEWAY, 'executors': [TRAINER]}
        (tmp_path / 'flow.yml').write_text(json.dumps(flow))
        if length == 37:
            checked(export(tmp_path / 'fits', tmp_path / 'flow.yml', job=ENCODE))
        else:
            with pytest.raises(ConfigError, match='37 characters at most'):
                export(tmp_path, tmp_path / 'flow.yml')


@pytest.mark.parametrize('name', ['ray', 'Ray_Job'])
def test_no_executor_takes_the_place_of_the_cluster(name, tmp_path):
    flow = {'jtype': 'Flow', 'gateway': GATEWAY, 'executors': [{**TRAINER, 'name': name}]}
    (tmp_path / 'flow.yml').write_text(json.dumps(flow))
    file = name.lower().replace('_', '-')
    with pytest.raises(ConfigError, match=f"an Executor is called '{file}'"):
        export(tmp_path, tmp_path / 'flow.yml', job=ENCODE)


def test_a_flow_that_only_encodes_has_a_cluster_for_a_job(tmp_path):
    files = export(tmp_path, ROOT / 'flows/encode.yml', job=ENCODE)
    checked(files)
    (job,) = files['ray-job']
    assert job['spec']['entrypoint'] == ENCODE


def test_in_words_and_as_json(tmp_path):
    def run(name, *options):
        command = ['export', 'kubernetes', str(FLOW), '--output', str(tmp_path / name), *options]
        return CliRunner().invoke(app, command)

    done = run('a', '--many-nodes', '--ray', '--ray-job', ENCODE, '--json')
    told = json.loads(done.stdout)
    assert told['ray'] == 'http://finetuner-ray-head-svc.finetuner.svc:8265'
    assert {'ray.yml', 'ray-job.yml'} <= set(told['files'])
    assert 'KubeRay 1.5.1 or later' in run('b', '--many-nodes', '--ray').output
    done = run('c', '--ray-gpus', '1')
    assert '--ray-gpus speaks of a Ray cluster: add --ray' in str(done.exception or done.output)
    assert not (tmp_path / 'c').exists()


def spoil_field(cluster):
    cluster['spec']['workerGroupSpecs'][0]['replica'] = 2


def spoil_type(cluster):
    cluster['spec']['headGroupSpec']['rayStartParams']['num-cpus'] = 0


def spoil_mode(cluster):
    cluster['spec']['authOptions']['mode'] = 'tokens'


def spoil_pod(cluster):
    templates_of(cluster)['workers']['spec']['containers'][0]['volumeMount'] = []


def spoil_claim(cluster):
    templates_of(cluster)['workers']['spec']['volumes'].pop(0)


def spoil_port(cluster):
    templates_of(cluster)['head']['spec']['containers'][0]['ports'].pop(1)


def spoil_name(cluster):
    cluster['metadata']['name'] = 'other'


@pytest.mark.parametrize(
    'spoil',
    [spoil_field, spoil_type, spoil_mode, spoil_pod, spoil_claim, spoil_port, spoil_name],
)
def test_the_checks_see_mistakes(spoil, exported):
    files = copy.deepcopy(exported)
    spoil(files['ray'][0])
    with pytest.raises((AssertionError, ValidationError)):
        checked(files)
