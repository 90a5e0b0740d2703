"""Jina's Compose file, finished: health, volumes, secrets, limits, and ports on this machine alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.server.exporting import values
from finetuner.server.exporting.jina_exporters import NETWORK, compose_services
from finetuner.server.exporting.kubernetes import with_code
from finetuner.server.exporting.leaks import DATABASE, KEY, TOKEN
from finetuner.server.exporting.plan import GATEWAY, HOME, Part, Plan

# Jina's own starts all of Jina every two seconds, which takes a core
_ASK_OVER_HTTP = (
    'import sys, urllib.request as r; r.urlopen("http://127.0.0.1:" + sys.argv[1] + '
    '"/health/ready", timeout=4)'
)
_ASK_OVER_GRPC = (
    'import sys, grpc; from grpc_health.v1 import health_pb2 as p, health_pb2_grpc as g; '
    'a = g.HealthStub(grpc.insecure_channel("127.0.0.1:" + sys.argv[1]))'
    '.Check(p.HealthCheckRequest(), timeout=4); sys.exit(a.status != p.HealthCheckResponse.SERVING)'
)
_PORT_OF_EXECUTORS = '8081'


def compose_file(plan: Plan, address: str) -> dict[str, Any]:
    """The Compose file of a Flow.

    Args:
        plan: the Flow, checked.
        address: of the machine, at which the gateway's ports are published.

    Returns:
        What is to be written as YAML.

    Raises:
        ConfigError: the plan holds what Compose cannot do.
    """
    for part in plan.parts.values():
        if part.autoscale:
            raise ConfigError('--autoscale is for Kubernetes: Compose starts no more of anything')
        if part.name == GATEWAY and part.replicas > 1:
            raise ConfigError(
                "--replicas names 'gateway', whose ports one container alone can have"
            )
        if part.gpus is not None and part.gpus != 'all' and not part.gpus.isdigit():
            raise ConfigError(
                f'Executor {part.name!r} wants the GPUs {part.gpus!r}: `all` or a number is what '
                'Compose takes'
            )
    written = compose_services(plan)
    services = {
        name: _finished(service, _part_of(name, service, plan), plan, address)
        for name, service in written.items()
    }
    services[GATEWAY]['depends_on'] = {
        name: {'condition': 'service_healthy'} for name in services if name != GATEWAY
    }
    return {
        'services': services,
        'networks': {NETWORK: {'driver': 'bridge'}},
        'volumes': {'home': {}, **_named_volumes(services)},
    }


def variables(plan: Plan) -> str:
    """What to fill in: the text of a `.env`, without a value."""
    given = sorted({name for said in _said(plan) for name in (said.get('env_from_secret') or {})})
    lines = [
        f'COMPOSE_PROJECT_NAME={plan.name}',
        '# Fill in, keep as .env beside compose.yml, and let nobody else read it (chmod 600 .env).',
        '# What clients send as `Authorization: Bearer ...`:',
        f'{TOKEN}=',
        '# What the gateway signs with that it tells Executors; 32 random bytes or more:',
        f'{KEY}=',
        '# A database outside of the volume, postgresql+psycopg://...; empty for SQLite in it:',
        f'{DATABASE}=',
        *(f'{name}=' for name in given),
    ]
    return '\n'.join(lines) + '\n'


def _said(plan: Plan) -> list[Mapping[str, Any]]:
    return [plan.flow[GATEWAY], *plan.flow['executors']]


def _part_of(name: str, service: Mapping[str, Any], plan: Plan) -> Part | None:
    """The part that a service runs; None for the head of shards."""
    if name == GATEWAY:
        return plan.parts[GATEWAY]
    command = service['command']
    if 'HEAD' in command:
        return None
    # encoder-1/rep-0 of two shards with replicas
    said = command[command.index('--name') + 1].partition('/')[0]
    found = plan.parts.get(said)
    return found or plan.parts[said.rpartition('-')[0]]


def _finished(
    service: dict[str, Any], part: Part | None, plan: Plan, address: str
) -> dict[str, Any]:
    command = service['command']
    service.pop('expose', None)
    service.pop('ports', None)  # those for metrics, which the network of the Flow reaches
    done = {
        **service,
        'healthcheck': _health(_ASK_OVER_GRPC, _PORT_OF_EXECUTORS),
        'restart': 'unless-stopped',
        'init': True,
        'security_opt': ['no-new-privileges:true'],
        'cap_drop': ['ALL'],
        'environment': _environment(service, part, plan),
    }
    if part is not None:
        command = with_code(command, part, part.arguments(part.cpu))
        done['volumes'] = [f'home:{HOME}', *service.get('volumes', ())]
        done['stop_grace_period'] = '90s' if part.is_trainer else '30s'
        _limit(done, part)
        if part.is_trainer:
            done['shm_size'] = '1gb'
        if part.name == GATEWAY:
            done['ports'] = [f'{address}:{port}:{port}' for port in plan.ports.values()]
            http = plan.ports.get('http')
            first = str(next(iter(plan.ports.values())))
            done['healthcheck'] = (
                _health(_ASK_OVER_HTTP, str(http)) if http else _health(_ASK_OVER_GRPC, first)
            )
    # Compose would put a variable in place of $NAME
    done['command'] = [argument.replace('$', '$$') for argument in command]
    return done


def _health(code: str, port: str) -> dict[str, Any]:
    return {
        'test': ['CMD', 'python', '-c', code, port],
        'interval': '10s',
        'timeout': '5s',
        'retries': 3,
        'start_period': '300s',
    }


def _environment(service: Mapping[str, Any], part: Part | None, plan: Plan) -> dict[str, str]:
    given = dict(each.split('=', 1) for each in service.get('environment', ()))
    given.pop('JINA_LOG_LEVEL', None)
    found = {name: value.replace('$', '$$') for name, value in given.items()}
    if part is None:
        return found
    for said in _said(plan):
        if said.get('name', GATEWAY) == part.name:
            for name in said.get('env_from_secret') or {}:
                found[name] = _asked_for(name)
    found.update({'FINETUNER_HOME': HOME, KEY: _asked_for(KEY), DATABASE: f'${{{DATABASE}:-}}'})
    if part.name == GATEWAY:
        found[TOKEN] = _asked_for(TOKEN)
    return found


def _asked_for(name: str) -> str:
    return f'${{{name}:?set it in .env}}'


def _limit(service: dict[str, Any], part: Part) -> None:
    limits = {}
    if part.cpu is not None:
        limits['cpus'] = f'{values.num_cores(part.cpu):g}'
    if part.memory is not None:
        limits['memory'] = str(values.num_bytes(part.memory))
    if limits:
        service.setdefault('deploy', {}).setdefault('resources', {})['limits'] = limits


def _named_volumes(services: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Volumes that a Flow names rather than a folder of the machine."""
    sources = (each.split(':')[0] for one in services.values() for each in one.get('volumes', ()))
    return {source: {} for source in sources if source != 'home' and source[:1] not in './~'}
