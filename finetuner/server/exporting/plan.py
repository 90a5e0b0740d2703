"""A Flow and how it is to run elsewhere, all of it checked: what both exporters write from."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.server.exporting import values
from finetuner.server.exporting.executors import (
    GATEWAY_CLASS,
    ONE_REPLICA,
    TRAINER_CLASS,
    Code,
    find_code,
    read_yaml,
    takes_argument,
)
from finetuner.server.exporting.leaks import refuse_secrets

GATEWAY = 'gateway'
HOME = '/data'
PORT_OF_METRICS = 9090
_SIZES = {GATEWAY: ('1', '1Gi'), TRAINER_CLASS: ('2', '8Gi'), '': ('2', '4Gi')}
# of the Flow's own places, which mean nothing elsewhere, and what the export decides itself
_LOCAL = ('jcloud', 'uses', 'uses_with', 'uses_metas', 'py_modules', 'host', 'port_monitoring')


@dataclass(frozen=True)
class Wishes:
    """What is asked of an export beside its Flow; texts such as `encoder=2` as they were typed.

    Attributes:
        image: of the gateway and of the library's Executors.
        executor_images: of single ones.
        replicas: of single ones, in place of the Flow's.
        autoscale: fewest and most replicas.
        gpus: of single ones, in place of the Flow's.
        cpus: of single ones.
        memory: of single ones.
    """

    image: str = 'finetuner'
    executor_images: Sequence[str] = ()
    replicas: Sequence[str] = ()
    autoscale: Sequence[str] = ()
    gpus: Sequence[str] = ()
    cpus: Sequence[str] = ()
    memory: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """The gateway, or an Executor of the Flow.

    Attributes:
        name: as the Flow writes it.
        uses: what Jina is given inside the container.
        image: what the container is made from.
        uses_with: arguments of the class.
        uses_metas: its name, for messages.
        replicas: how many, of each shard.
        autoscale: fewest and most, or None.
        gpus: how many each replica gets, as the Flow says it; None for none.
        cpu: cores, None where nobody said.
        memory: bytes, None where nobody said.
        default_cpu: where somebody must say.
        default_memory: where somebody must say.
        volumes: folders in the container that outlive it.
        is_trainer: whether it starts runs.
        alone: why there may be one of it only; empty where there may be several.
        takes_num_threads: whether its class can be told how many threads to use.
    """

    name: str
    uses: str
    image: str
    uses_with: dict[str, Any] = field(default_factory=dict)
    uses_metas: dict[str, Any] = field(default_factory=dict)
    replicas: int = 1
    autoscale: tuple[int, int] | None = None
    gpus: str | None = None
    cpu: str | None = None
    memory: str | None = None
    default_cpu: str = '2'
    default_memory: str = '4Gi'
    volumes: tuple[str, ...] = ()
    is_trainer: bool = False
    alone: str = ''
    takes_num_threads: bool = False

    def arguments(self, cpu: str | None) -> list[str]:
        """What `jina executor` or `jina gateway` is given besides what Jina's exporters write.

        Theirs pass through a template as text, where a brace or a quote would change them.

        Args:
            cpu: that the container may use; None for the machine's.
        """
        import json

        uses_with = dict(self.uses_with)
        if cpu is not None and self.takes_num_threads and uses_with.get('num_threads') is None:
            # a container sees all cores of its machine and would start a thread for each
            uses_with['num_threads'] = max(1, math.floor(values.num_cores(cpu)))
        found = ['--uses-metas', json.dumps(self.uses_metas)] if self.uses_metas else []
        return [*found, '--uses-with', json.dumps(uses_with)] if uses_with else found


@dataclass(frozen=True)
class Plan:
    """A Flow to export.

    Attributes:
        name: of the Flow, as part of a host name.
        flow: what Jina's exporters are given: every Executor an image.
        parts: by their names; external Executors are none of them.
        ports: of the gateway, by protocol, as the Flow says.
        image: of heads, and of what has none of its own.
    """

    name: str
    flow: dict[str, Any]
    parts: dict[str, Part]
    ports: dict[str, int]
    image: str


def make_plan(flow_file: Path, wishes: Wishes) -> Plan:
    """Read a Flow and check all that is asked of its export.

    Args:
        flow_file: its YAML, or a folder with a `flow.yml`.
        wishes: what else was said.

    Returns:
        What the exporters need.

    Raises:
        ConfigError: the Flow is missing, cannot run elsewhere as it is, or a wish is unusable.
    """
    path = flow_file / 'flow.yml' if flow_file.is_dir() else flow_file
    if not path.is_file():
        raise ConfigError(f'there is no Flow {str(path)!r}: give the path of a Flow YAML')
    flow = read_yaml(path)
    executors = _executors_of(flow, path)
    ours = {name: each for name, each in executors.items() if not each.get('external')}
    for name, each in executors.items():
        refuse_secrets(f'Executor {name!r}', each)
    read = _Reader(path.parent, wishes, [GATEWAY, *ours])
    gateway = dict(flow.get(GATEWAY) or {})
    refuse_secrets('the gateway', gateway)
    parts = {name: read.part(name, each) for name, each in ours.items()}
    parts[GATEWAY] = read.gateway(gateway)
    _refuse_same_hosts(parts, ours)
    common = dict(flow.get('with') or {})
    refuse_secrets('the Flow', common)
    name = values.host_name('the name of the Flow', str(common.get('name') or 'finetuner'))
    if any(part.is_trainer for part in parts.values()):
        _keep_requests_single(common, gateway, executors)
    common.update(
        name=name,
        host='0.0.0.0',
        monitoring=True,
        port_monitoring=PORT_OF_METRICS,
        # a name that stands for several replicas: Jina's channels stay with the first otherwise
        grpc_channel_options={
            'grpc.lb_policy_name': 'round_robin',
            **(common.get('grpc_channel_options') or {}),
        },
    )
    exported = {
        'jtype': 'Flow',
        'with': common,
        GATEWAY: _for_jina(gateway, parts[GATEWAY], common),
        'executors': [
            _for_jina(each, parts[name], common) if name in parts else each
            for name, each in executors.items()
        ],
    }
    return Plan(name, exported, parts, _ports_of(gateway), read.image)


class _Reader:
    """Reads parts of a Flow, and what was said about each."""

    def __init__(self, folder: Path, wishes: Wishes, names: Sequence[str]) -> None:
        self._folder = folder
        self.image = values.image_name('--image', wishes.image)
        self._images = {
            name: values.image_name('--executor-image', text)
            for name, text in values.by_executor(
                '--executor-image', wishes.executor_images, names
            ).items()
        }
        self._replicas = {
            name: values.whole_number('--replicas', text)
            for name, text in values.by_executor('--replicas', wishes.replicas, names).items()
        }
        self._autoscale = {
            name: values.span('--autoscale', text)
            for name, text in values.by_executor('--autoscale', wishes.autoscale, names).items()
        }
        self._gpus = {
            name: str(values.whole_number('--gpus', text))
            for name, text in values.by_executor('--gpus', wishes.gpus, names).items()
        }
        self._cpus = {
            name: values.cpu_quantity('--cpu', text)
            for name, text in values.by_executor('--cpu', wishes.cpus, names).items()
        }
        self._memory = {
            name: values.byte_quantity('--memory', text)
            for name, text in values.by_executor('--memory', wishes.memory, names).items()
        }
        both = sorted(set(self._replicas) & set(self._autoscale))
        if both:
            raise ConfigError(f'--replicas and --autoscale both speak of {both[0]!r}: choose one')

    def gateway(self, gateway: dict[str, Any]) -> Part:
        uses = gateway.get('uses')
        if uses != GATEWAY_CLASS:
            raise ConfigError(
                f'the gateway of the Flow is {uses or "that of Jina"!r}, which asks nobody for a '
                f'token, and others could reach it: write `gateway: {{uses: {GATEWAY_CLASS}}}`'
            )
        if GATEWAY in self._gpus:
            raise ConfigError("--gpus names 'gateway', which computes nothing")
        return self._part(GATEWAY, gateway, Code(GATEWAY_CLASS, self._images.get(GATEWAY)))

    def part(self, name: str, executor: dict[str, Any]) -> Part:
        values.host_name('Executor', name)
        for key in ('uses_before', 'uses_after'):
            if executor.get(key):
                raise ConfigError(
                    f'Executor {name!r} has `{key}`, which an export does not carry: make it an '
                    'Executor of the Flow'
                )
        code = find_code(name, executor, self._folder, self._images.get(name))
        return self._part(name, executor, code)

    def _part(self, name: str, said: dict[str, Any], code: Code) -> Part:
        uses_with = {**code.uses_with, **(said.get('uses_with') or {})}
        refuse_secrets(f'Executor {name!r}', {'uses_with': uses_with})
        cpu, memory = _SIZES.get(name if name == GATEWAY else code.uses, _SIZES[''])
        part = Part(
            name=name,
            uses=code.uses,
            image=code.image or self.image,
            uses_with=uses_with,
            uses_metas={'name': code.name} if code.name else {},
            replicas=self._replicas.get(name) or _count(name, said, 'replicas'),
            autoscale=self._autoscale.get(name),
            gpus=self._gpus.get(name) or (str(said['gpus']) if said.get('gpus') else None),
            cpu=self._cpus.get(name),
            memory=self._memory.get(name),
            default_cpu=cpu,
            default_memory=memory,
            volumes=_mount_points(name, said, code.uses == TRAINER_CLASS),
            is_trainer=code.uses == TRAINER_CLASS,
            alone=ONE_REPLICA.get(code.uses, ''),
            takes_num_threads=name != GATEWAY and takes_argument(code, 'num_threads'),
        )
        several = part.replicas > 1 or part.autoscale or _count(name, said, 'shards') > 1
        if part.alone and several:
            raise ConfigError(f'Executor {name!r} must be one, in one shard: {part.alone}')
        return part


def _for_jina(said: dict[str, Any], part: Part, common: Mapping[str, Any]) -> dict[str, Any]:
    # a Flow sets its own for the processes that it starts, and there are none
    merged = {
        key: {**(common.get(key) or {}), **(said.get(key) or {})}
        for key in ('env', 'env_from_secret')
    }
    said = {**said, **{key: value for key, value in merged.items() if value}}
    kept = {key: value for key, value in said.items() if key not in (*_LOCAL, 'gpus')}
    if part.gpus:
        kept['gpus'] = part.gpus
    if part.name == GATEWAY:
        kept.pop('replicas', None)  # no argument of a gateway
    else:
        kept['replicas'] = part.replicas
        # its own default is a folder of whoever exports
        kept['disable_auto_volume'] = True
        kept['port_monitoring'] = PORT_OF_METRICS
    return {**kept, 'uses': f'docker://{part.image}'}


def _executors_of(flow: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    if flow.get('jtype') != 'Flow':
        raise ConfigError(f'{str(path)!r} is no Flow: its `jtype` is {flow.get("jtype")!r}')
    for key in ('with', GATEWAY):
        if not isinstance(flow.get(key) or {}, dict):
            raise ConfigError(f'{str(path)!r}: `{key}` is no mapping, it is {flow[key]!r}')
    listed = flow.get('executors')
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f'{str(path)!r} has no Executors')
    found: dict[str, dict[str, Any]] = {}
    for i, each in enumerate(listed):
        if not isinstance(each, dict):
            raise ConfigError(f'{str(path)!r}: {each!r} is no Executor: write `- name: ...`')
        name = str(each.get('name') or f'executor{i}')
        if name in found or name == GATEWAY:
            raise ConfigError(f'{str(path)!r}: the name {name!r} is taken already')
        found[name] = {**each, 'name': name}
    return found


def _refuse_same_hosts(parts: Mapping[str, Part], executors: Mapping[str, dict[str, Any]]) -> None:
    """See to it that no two parts come to one host, of which one would replace the other."""
    taken = {GATEWAY: GATEWAY}
    for name, said in executors.items():
        hosts = [values.host_name('Executor', name)]
        shards, replicas = _count(name, said, 'shards'), parts[name].replicas
        if shards > 1:
            hosts = [f'{hosts[0]}-{each}' for each in ('head', *range(shards))]
        if replicas > 1:
            hosts += [f'{host}-rep-{i}' for host in hosts for i in range(replicas)]
        for host in hosts:
            if host in taken:
                raise ConfigError(
                    f'Executor {name!r} would have the host name {host!r}, which {taken[host]!r} '
                    'has already: give it another name (capital letters and underscores make no '
                    'difference)'
                )
            taken[host] = name


def _ports_of(gateway: Mapping[str, Any]) -> dict[str, int]:
    protocols = [str(each).lower() for each in _listed(gateway.get('protocol') or 'grpc')]
    ports = _listed(gateway.get('port') or [])
    if len(ports) != len(protocols):
        raise ConfigError(
            f'the gateway has {len(protocols)} protocols and {len(ports)} ports: write one each'
        )
    numbers = [values.whole_number('the port', str(port)) for port in ports]
    return dict(zip(protocols, numbers, strict=True))


def _count(name: str, said: Mapping[str, Any], key: str) -> int:
    return values.whole_number(f'{key} of {name!r}', str(said.get(key) or 1))


def _keep_requests_single(
    common: dict[str, Any], gateway: dict[str, Any], executors: Mapping[str, dict[str, Any]]
) -> None:
    """See to it that nothing sends a request a second time, which would start a second run."""
    for where, said in (('with', common), (GATEWAY, gateway), *executors.items()):
        if said.get('retries') not in (None, 0):
            raise ConfigError(
                f'{where} has `retries: {said["retries"]}`: in a Flow with a trainer it must be 0, '
                'or a request that fails starts a second run'
            )
        if said.get('timeout_send') is not None:
            raise ConfigError(
                f'{where} has `timeout_send`, after which Jina sends a request again, and the '
                'trainer starts a second run: leave it out'
            )
    common['retries'] = 0


def _mount_points(name: str, said: Mapping[str, Any], is_trainer: bool) -> tuple[str, ...]:
    folders = tuple(_mount_point(name, each) for each in _listed(said.get('volumes')))
    taken = {HOME: 'the home is'}
    if is_trainer:
        taken['/dev/shm'] = 'the shared memory of a trainer is'
    for folder in folders:
        place = posixpath.normpath('/' + folder.lstrip('/'))
        if place in taken:
            raise ConfigError(
                f'Executor {name!r} has a volume at {folder!r}, where {taken[place]}: give it '
                'another folder in the container'
            )
        taken[place] = 'another of its volumes is'
    return folders


def _mount_point(name: str, volume: str) -> str:
    """The folder in the container of `source:folder` or `folder`."""
    parts = str(volume).split(':')
    folder = parts[1] if len(parts) > 1 else parts[0]
    if not folder.startswith('/'):
        raise ConfigError(
            f'Executor {name!r} has the volume {volume!r}: write SOURCE:/FOLDER/IN/THE/CONTAINER'
        )
    return folder


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
