"""Flows as files for Kubernetes, Docker Compose and jcloud: what would take them, takes them."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from kubernetes_validate import ValidationError
from typer.testing import CliRunner

from finetuner.cli import app
from tests.integration.serving import REPOSITORY, end, flow_on_free_ports, free_ports
from tests.kubernetes_checks import addresses_of, refuse_loose_ends, refuse_unknown

FLOWS = sorted((REPOSITORY / 'flows').glob('*.yml'))
EACH_FLOW = pytest.mark.parametrize('path', FLOWS, ids=lambda path: path.stem)
SECRETS = {'FINETUNER_TOKEN': 'let me in', 'FINETUNER_GATEWAY_KEY': 'sealed with this'}
# no word of JSON, YAML, a shell, Compose, Kubernetes or a template of Jina's stays as it was
ODD = 'it\'s "so": {port} {name} $UNSET ${UNSET} $(POD_UID) $$ \\n # é'
LARGE_FLOW = """
jtype: Flow
with:
  name: large
  env: {STAGE: trial}
gateway:
  uses: finetuner.server.gateway.Gateway
  protocol: [grpc, http]
  port: [51000, 51080]
  env_from_secret:
    LICENCE_KEY: {name: licence, key: value}
executors:
  - name: Trainer_1
    uses: finetuner.server.trainer.TrainerExecutor
  - name: encoder
    uses: finetuner.server.encoder.FinetunerExecutor
    uses_with: {artifact: efficientnet-lite0, odd: ODD}
    shards: 2
    replicas: 2
    polling: any
    volumes: ['indexes:/indexes', './more:/more']
  - name: own
    uses: docker://registry.example/own:1.2
    gpus: 1
  - name: elsewhere
    uses: nothing
    external: true
    host: elsewhere.example
    port: 12345
"""


def export(kind, flow, output, *options):
    done = CliRunner().invoke(
        app, ['export', kind, str(flow), '--output', str(output), *options, '--json']
    )
    assert done.exit_code == 0, done.exception or done.output
    assert json.loads(done.stdout)['files'] == sorted(each.name for each in output.iterdir())
    return output


def objects_in(folder):
    return [
        each
        for path in sorted(folder.glob('*.yml'))
        for each in yaml.safe_load_all(path.read_text())
    ]


def of_kind(objects, kind):
    return {each['metadata']['name']: each for each in objects if each['kind'] == kind}


def container_of(workload):
    return workload['spec']['template']['spec']['containers'][0]


def value_of(arguments, option):
    return arguments[arguments.index(option) + 1]


@pytest.fixture
def large_flow(tmp_path):
    path = tmp_path / 'flow.yml'
    path.write_text(LARGE_FLOW.replace('ODD', json.dumps(ODD)))
    return path


@EACH_FLOW
@pytest.mark.parametrize('options', [(), ('--many-nodes', '--storage-class', 'shared')])
def test_kubernetes_takes_every_flow(path, options, tmp_path):
    objects = objects_in(export('kubernetes', path, tmp_path / 'out', *options))
    refuse_unknown(objects)
    refuse_loose_ends(objects)
    gateway = of_kind(objects, 'Deployment')['gateway']
    container = container_of(gateway)
    assert container['readinessProbe']['httpGet']['path'] == '/health/ready'
    assert container['livenessProbe']['httpGet']['path'] == '/health/live'
    taken = {each['name']: each for each in container['env']}
    secret = taken['FINETUNER_TOKEN']['valueFrom']['secretKeyRef']
    assert secret == {'name': 'finetuner-secrets', 'key': 'FINETUNER_TOKEN'}
    needs_database = 'optional' not in taken['FINETUNER_DATABASE_URL']['valueFrom']['secretKeyRef']
    assert needs_database == bool(options), 'pods on several nodes cannot share SQLite'
    together = 'affinity' in gateway['spec']['template']['spec']
    assert together != bool(options)
    (claim,) = of_kind(objects, 'PersistentVolumeClaim').values()
    mode = 'ReadWriteMany' if options else 'ReadWriteOnce'
    assert claim['spec']['accessModes'] == [mode]


def test_a_large_flow_for_kubernetes(large_flow, tmp_path):
    sizes = ['--replicas', 'gateway=2', '--autoscale', 'own=1:5', '--cpu', 'encoder=1500m']
    objects = objects_in(export('kubernetes', large_flow, tmp_path / 'out', *sizes))
    refuse_unknown(objects)
    refuse_loose_ends(objects)
    deployments = of_kind(objects, 'Deployment')
    trainer = deployments['trainer-1']
    assert trainer['spec']['replicas'] == 1
    assert trainer['spec']['strategy'] == {'type': 'Recreate'}
    assert deployments['gateway']['spec']['replicas'] == 2
    gateway = container_of(deployments['gateway'])
    assert value_of(gateway['args'], '--retries') == '0'
    assert '--replicas' not in gateway['args']
    assert 'elsewhere.example:12345' in ' '.join(addresses_of(gateway['args']))
    assert {'name': 'LICENCE_KEY', 'valueFrom': {'secretKeyRef': {'name': 'licence', 'key': 'value'}}} in gateway['env']  # fmt: skip
    own = container_of(deployments['own'])
    assert own['image'] == 'registry.example/own:1.2'
    assert value_of(own['args'], '--uses') == 'config.yml'
    assert own['resources']['limits']['nvidia.com/gpu'] == 1
    shards = of_kind(objects, 'StatefulSet')
    assert {name for name in shards if 'head' not in name} == {'encoder-0', 'encoder-1'}
    for name in ('encoder-0', 'encoder-1'):
        container = container_of(shards[name])
        assert shards[name]['spec']['replicas'] == 2
        assert [each['mountPath'] for each in container['volumeMounts']] == [
            '/data', '/indexes', '/more',
        ]  # fmt: skip
        # as Kubernetes reads them: two $ are one, and no $(NAME) is left
        assert '$(' not in value_of(container['args'], '--uses-with').replace('$$', '')
        said = value_of(container['args'], '--uses-with').replace('$$', '$')
        assert json.loads(said)['odd'] == ODD
        assert json.loads(said)['num_threads'] == 1, 'not one for each core of the node'
    assert set(of_kind(objects, 'PodDisruptionBudget')) == {'encoder-0', 'encoder-1', 'gateway'}
    assert set(of_kind(objects, 'HorizontalPodAutoscaler')) == {'own'}
    assert of_kind(objects, 'ConfigMap')['own-configmap']['data'] == {'STAGE': 'trial'}


def add_field(gateway):
    gateway['spec']['replica'] = 2


def change_selector(gateway):
    gateway['spec']['selector']['matchLabels']['app'] = 'other'


def change_probe(gateway):
    container_of(gateway)['readinessProbe']['httpGet']['port'] = 'web'


def drop_volume(gateway):
    gateway['spec']['template']['spec'].pop('volumes')


def change_address(gateway):
    arguments = container_of(gateway)['args']
    at = arguments.index('--deployments-addresses') + 1
    arguments[at] = arguments[at].replace('encoder.', 'encode.')


@pytest.mark.parametrize(
    ('spoil', 'check', 'mistake'),
    [
        (add_field, refuse_unknown, ValidationError),
        (change_selector, refuse_loose_ends, AssertionError),
        (change_probe, refuse_loose_ends, AssertionError),
        (drop_volume, refuse_loose_ends, AssertionError),
        (change_address, refuse_loose_ends, KeyError),
    ],
)
def test_the_checks_see_mistakes(spoil, check, mistake, tmp_path):
    objects = objects_in(export('kubernetes', FLOWS[0], tmp_path / 'out'))
    spoil(of_kind(objects, 'Deployment')['gateway'])
    with pytest.raises(mistake):
        check(objects)


def compose_client():
    """Docker's own client, whichever of the two there is; it needs no daemon to read a file."""
    for command in (['docker', 'compose'], ['docker-compose']):
        if shutil.which(command[0]):
            done = subprocess.run([*command, 'version'], capture_output=True)
            if done.returncode == 0:
                return command
    return None


def read_by_client(folder, environment=None):
    client = compose_client()
    if client is None:
        pytest.skip('no client of Docker Compose here: apt-get install docker-compose')
    given = {**os.environ, **(SECRETS if environment is None else environment)}
    command = [*client, '--project-directory', str(folder), '-f', str(folder / 'compose.yml')]
    return subprocess.run([*command, 'config'], capture_output=True, text=True, env=given)


@EACH_FLOW
def test_dockers_client_takes_every_flow(path, tmp_path):
    out = export('compose', path, tmp_path / 'out')
    done = read_by_client(out)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)['services']
    assert services['gateway']['environment']['FINETUNER_TOKEN'] == 'let me in'
    assert set(services['gateway']['depends_on']) == set(services) - {'gateway'}
    without = read_by_client(out, {})
    assert without.returncode != 0, 'it would start without a token'
    assert 'set it in .env' in without.stderr


def test_a_large_flow_for_compose(large_flow, tmp_path):
    sizes = ['--cpu', 'encoder=1500m', '--memory', 'encoder=2Gi', '--address', '0.0.0.0']
    out = export('compose', large_flow, tmp_path / 'out', *sizes)
    assert 'LICENCE_KEY=\n' in (out / 'env.example').read_text()
    written = yaml.safe_load((out / 'compose.yml').read_text())
    assert set(written['services']) == {
        'trainer-1', 'encoder-head', 'encoder-0-rep-0', 'encoder-0-rep-1', 'encoder-1-rep-0',
        'encoder-1-rep-1', 'own', 'gateway',
    }  # fmt: skip
    assert set(written['volumes']) == {'home', 'indexes'}
    for name, service in written['services'].items():
        assert ('ports' in service) == (name == 'gateway'), "Executors are nobody else's"
    done = read_by_client(out, {**SECRETS, 'LICENCE_KEY': 'x'})
    assert done.returncode == 0, done.stderr
    encoder = yaml.safe_load(done.stdout)['services']['encoder-1-rep-0']
    said = json.loads(value_of(encoder['command'], '--uses-with').replace('$$', '$'))
    assert said['odd'] == ODD
    assert encoder['environment']['STAGE'] == 'trial'


@EACH_FLOW
def test_jcloud_normalises_every_flow(path, tmp_path, monkeypatch):
    """All but the push itself, whose place an id takes as the registry would give one."""
    import jcloud.normalize
    from jcloud.helper import load_flow_data, normalized

    pushed = []

    def push(executor, *_):
        assert (executor.src_dir / 'config.yml').is_file(), executor
        pushed.append(executor.name)
        executor.id = f'id-of-{executor.name}'.lower()

    monkeypatch.setattr(jcloud.normalize, 'hubble_push', push)
    assert not normalized(path)
    done = Path(jcloud.normalize.flow_normalize(path, output_path=tmp_path / path.name))
    assert normalized(done)
    before, after = load_flow_data(path), load_flow_data(done)
    assert len(pushed) == len(before['executors'])
    assert all(each['uses'].startswith('jinahub+docker://') for each in after['executors'])
    for key in ('gateway', 'with'):
        assert after[key] == before[key]


class Containers:
    """The services of a Compose file as processes of this machine, each at an address of its own."""

    def __init__(self, folder, environment):
        services = yaml.safe_load((folder / 'compose.yml').read_text())['services']
        self.services = services
        # 127.0.0.0/8 is all this machine: as many hosts as it takes
        self.hosts = {
            name: f'127.83.{os.getpid() % 250}.{i + 2}' for i, name in enumerate(services)
        }
        self.metrics = dict(zip(services, free_ports(len(services)), strict=True))
        self._folder, self._environment, self._processes = folder, environment, {}

    def start(self, name):
        service = self.services[name]
        arguments = [each.replace('$$', '$') for each in service['command']]
        if '--host' in arguments:
            arguments[arguments.index('--host') + 1] = self.hosts[name]
        else:  # 0.0.0.0 is the default
            arguments += ['--host', self.hosts[name]]
        # the port for metrics ignores the host
        arguments[arguments.index('--port-monitoring') + 1] = str(self.metrics[name])
        for other, host in self.hosts.items():
            arguments = [re.sub(rf'"{other}:(\d+)"', rf'"{host}:\1"', each) for each in arguments]
        given = {key: self._filled(text) for key, text in service['environment'].items()}
        command = [str(Path(sys.executable).parent / service['entrypoint'][0]), *arguments]
        with (self._folder / f'{name}.log').open('w') as log:
            self._processes[name] = subprocess.Popen(
                command, env={**os.environ, **given}, stdout=log, stderr=subprocess.STDOUT
            )

    def is_healthy(self, name):
        """What its healthcheck says."""
        kind, program, *arguments = self.services[name]['healthcheck']['test']
        assert (kind, program) == ('CMD', 'python')
        arguments = [each.replace('127.0.0.1', self.hosts[name]) for each in arguments]
        return subprocess.run([sys.executable, *arguments], capture_output=True).returncode == 0

    def wait_for(self, name, is_there, seconds=90):
        until = time.monotonic() + seconds
        while not is_there():
            log = (self._folder / f'{name}.log').read_text()
            assert self._processes[name].poll() is None, log
            assert time.monotonic() < until, log
            time.sleep(0.3)

    def _filled(self, text):
        filled = re.sub(r'\$\{(\w+):[?-][^}]*\}', lambda m: self._environment.get(m[1], ''), text)
        return filled.replace('/data', str(self._folder / 'home')).replace('$$', '$')

    def end(self):
        for process in reversed(self._processes.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)


def test_what_compose_would_start_works_together(tmp_path):
    """Commands, ports, addresses and secrets, with two replicas and no container around them."""
    flow = REPOSITORY / 'flows' / 'encode.yml'
    out = export('compose', flow, tmp_path / 'out', '--replicas', 'encoder=2', '--cpu', 'encoder=1')
    containers = Containers(out, SECRETS)
    picture = (REPOSITORY / 'examples/emoji/test/airplane/noto.webp').read_bytes()
    import base64

    body = {'data': [{'blob': base64.b64encode(picture).decode()}]}
    url = f'http://{containers.hosts["gateway"]}:51080'
    try:
        assert not containers.is_healthy('encoder-rep-0'), 'nothing is there yet'
        for name in ('encoder-rep-0', 'encoder-rep-1', 'gateway'):
            containers.start(name)
        for name in ('encoder-rep-0', 'encoder-rep-1'):
            containers.wait_for(name, lambda name=name: containers.is_healthy(name))
        containers.wait_for('gateway', lambda: containers.is_healthy('gateway'))
        for path in ('/health/live', '/health/ready'):
            assert _answers(f'{url}{path}'), 'what probes in Kubernetes ask, without a token'
        assert httpx.post(f'{url}/encode', json=body).status_code == 401
        headers = {'Authorization': 'Bearer let me in'}
        for _ in range(4):
            answer = httpx.post(f'{url}/encode', json=body, headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()['data'][0]['embedding']) == 1280
        for name in ('encoder-rep-0', 'encoder-rep-1'):
            metrics = httpx.get(f'http://127.0.0.1:{containers.metrics[name]}/metrics').text
            assert re.search(r'jina_receiving_request_seconds_count\{.*\} [1-9]', metrics), name
    finally:
        containers.end()


def _answers(url):
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def serve_command(*arguments):
    return [sys.executable, '-m', 'finetuner.cli', 'serve', *map(str, arguments)]


def test_serve_binds_what_it_is_told(tmp_path):
    """As the image's entry point does, but for an address that only this machine has."""
    flow, _, http_port = flow_on_free_ports((REPOSITORY / 'flows/encode.yml').read_text(), tmp_path)
    given = {**os.environ, 'FINETUNER_HOME': str(tmp_path / 'home'), 'PYTHONPATH': str(REPOSITORY)}
    given.pop('FINETUNER_TOKEN', None)
    done = subprocess.run(
        serve_command(flow, '--host', '0.0.0.0'), env=given, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert 'would bind 0.0.0.0 without a token' in done.stderr
    log = tmp_path / 'server.log'
    with log.open('w') as output:
        process = subprocess.Popen(
            serve_command(flow, '--host', '127.83.0.1'), env=given, stdout=output, stderr=output
        )
    try:
        until = time.monotonic() + 90
        while not _answers(f'http://127.83.0.1:{http_port}/dry_run'):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.3)
        assert not _answers(f'http://127.0.0.1:{http_port}/dry_run')
    finally:
        end(process)
