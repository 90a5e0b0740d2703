"""A Ray cluster beside a Flow, for KubeRay's operator: its pods, who may reach them, and a job."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.server.exporting import values
from finetuner.server.exporting.cluster import (
    COMPONENT,
    PART_OF,
    Cluster,
    RayCluster,
    RayWishes,
    from_secret,
    from_values,
    home_volume,
    resources,
    security_of_container,
    security_of_pod,
    shared_memory,
)
from finetuner.server.exporting.leaks import DATABASE, refuse_secrets
from finetuner.server.exporting.plan import HOME, Part, Plan

# what `finetuner[ray]` installs; the operator asks for 2.52 or later where tokens are used
RAY_VERSION = '2.55.1'
_API = 'ray.io/v1'
# KubeRay cuts a name of a Service off at 50, and `-ray-head-svc` is appended
_LONGEST_NAME = 37
_CLUSTER_LABEL = 'ray.io/cluster'
_NODE_LABEL = 'ray.io/node-type'
_PORTS = {'gcs-server': 6379, 'dashboard': 8265, 'metrics': 8080}
_AGENT_PORT = 52365
_HEAD_CPU, _HEAD_MEMORY = '2', '4Gi'
_IDLE_SECONDS = 300
# of KubeRay's Helm chart and of its kustomization
_OPERATOR = {COMPONENT: 'kuberay-operator'}


def check_ray(plan: Plan, wishes: RayWishes, namespace: str, many_nodes: bool) -> RayCluster:
    """Check what is asked of a Ray cluster.

    Args:
        plan: the Flow that it stands beside.
        wishes: texts as they were typed.
        namespace: that everything goes to.
        many_nodes: whether pods on several nodes share the home.

    Raises:
        ConfigError: a wish is unusable, or the Flow has nothing that would use the cluster.
    """
    if not many_nodes:
        raise ConfigError(
            '--ray needs --many-nodes: its workers are on nodes of their own, with the home and '
            'the database of runs. Add --many-nodes, a class of volumes that is ReadWriteMany '
            '(--storage-class), and FINETUNER_DATABASE_URL to the Secret'
        )
    if not _trainers(plan) and wishes.job is None:
        raise ConfigError(
            '--ray would start a cluster that nothing uses: the Flow has no trainer. Export a Flow '
            'with one, or say with --ray-job what the cluster is to run'
        )
    if len(plan.name) > _LONGEST_NAME:
        raise ConfigError(
            f'the Flow is called {plan.name!r}, and with --ray a name has {_LONGEST_NAME} '
            'characters at most: KubeRay appends to it'
        )
    fewest, most = values.range_of('--ray-workers', wishes.workers)
    name = f'{plan.name}-ray'
    return RayCluster(
        name=name,
        address=f'http://{name}-head-svc.{namespace}.svc:{_PORTS["dashboard"]}',
        fewest=fewest,
        most=most,
        cpu=values.whole_number('--ray-cpu', wishes.cpu),
        memory=values.byte_quantity('--ray-memory', wishes.memory),
        gpus=values.whole_number('--ray-gpus', wishes.gpus) if wishes.gpus else 0,
        job=None if wishes.job is None else _command(wishes.job),
    )


def sending_trainer(part: Part, ray: RayCluster) -> Part:
    """A trainer that sends runs away: as many at a time as workers could have, on Ray's threads."""
    return replace(part, uses_with={'num_workers': ray.most * ray.per_worker, **part.uses_with})


def variables_of_launcher(plan: Plan, part: Part, cluster: Cluster) -> list[dict[str, Any]]:
    """What a trainer's container is told, so that its runs become jobs of the Ray cluster."""
    ray = cluster.ray
    if ray is None:
        return []
    found = {
        'FINETUNER_LAUNCHER': 'ray',
        'FINETUNER_RAY_ADDRESS': ray.address,
        # of each process of a run: a GPU with its share of the worker, or the whole worker
        'FINETUNER_RAY_CPUS': f'{ray.cpu / ray.per_worker:g}',
        'FINETUNER_RAY_GPUS': min(1, ray.gpus),
    }
    said = _said_of(plan, part).get('env') or {}
    return [
        *from_values({name: value for name, value in found.items() if name not in said}),
        {'name': 'RAY_AUTH_MODE', 'value': 'token'},
        # the operator makes this Secret; until it has, the pod waits
        from_secret('RAY_AUTH_TOKEN', ray.name, 'auth_token'),
    ]


def ray_files(plan: Plan, cluster: Cluster) -> dict[str, list[dict[str, Any]]]:
    """Objects by the name of their file; none where no Ray cluster was asked for."""
    ray = cluster.ray
    if ray is None:
        return {}
    files = {'ray': [_ray_cluster(plan, cluster, ray), *_policies(plan, cluster, ray)]}
    if ray.job is not None:
        files['ray-job'] = [_ray_job(plan, cluster, ray, ray.job)]
    return files


def _ray_cluster(plan: Plan, cluster: Cluster, ray: RayCluster) -> dict[str, Any]:
    grows = ray.most > ray.fewest
    # `ray start` finds cores, memory and GPUs of workers in the limits of their container
    head = {'num-cpus': '0', 'num-gpus': '0', 'dashboard-host': '0.0.0.0'}
    spec: dict[str, Any] = {
        'rayVersion': RAY_VERSION,
        'authOptions': {'mode': 'token'},
        'enableInTreeAutoscaling': grows,
        'headGroupSpec': {'rayStartParams': head, 'template': _head(plan, cluster, ray, grows)},
        'workerGroupSpecs': [
            {
                'groupName': 'workers',
                # the autoscaler's to say, also after the next `apply`
                **({} if grows else {'replicas': ray.fewest}),
                'minReplicas': ray.fewest,
                'maxReplicas': ray.most,
                'rayStartParams': {},
                'template': _worker(plan, cluster, ray),
            }
        ],
    }
    if grows:
        spec['autoscalerOptions'] = {
            'idleTimeoutSeconds': _IDLE_SECONDS,
            'securityContext': security_of_container(),
        }
    return _object(plan, cluster, _API, 'RayCluster', ray.name, spec)


def _head(plan: Plan, cluster: Cluster, ray: RayCluster, grows: bool) -> dict[str, Any]:
    amounts = resources(_HEAD_CPU, _HEAD_MEMORY)
    template = _template(plan, cluster, 'ray-head', amounts, _PORTS)
    # of the autoscaler beside it, which asks the cluster for pods
    template['spec']['automountServiceAccountToken'] = grows
    return template


def _worker(plan: Plan, cluster: Cluster, ray: RayCluster) -> dict[str, Any]:
    amounts = resources(str(ray.cpu), ray.memory, ray.gpus)
    ports = {'metrics': _PORTS['metrics']}
    return _template(plan, cluster, 'ray-worker', amounts, ports)


def _template(
    plan: Plan,
    cluster: Cluster,
    name: str,
    amounts: dict[str, Any],
    ports: Mapping[str, int],
) -> dict[str, Any]:
    memory, mount = shared_memory(amounts['limits']['memory'])
    container = {
        'name': name,
        'image': _image(plan),
        'env': _environment(plan, cluster),
        'ports': [{'name': key, 'containerPort': port} for key, port in ports.items()],
        'resources': amounts,
        'securityContext': security_of_container(),
        'volumeMounts': [{'name': 'home', 'mountPath': HOME}, mount],
        **_probes(),
    }
    return {
        'metadata': {
            # none that other pods of the Flow have, which may reach one another; the operator adds
            # its own, among them the name of the cluster
            'labels': {PART_OF: f'{plan.name}-ray', COMPONENT: name},
            'annotations': {
                'prometheus.io/scrape': 'true',
                'prometheus.io/port': str(_PORTS['metrics']),
                'prometheus.io/path': '/metrics',
            },
        },
        'spec': {
            'automountServiceAccountToken': False,
            'enableServiceLinks': False,
            'securityContext': security_of_pod(),
            'containers': [container],
            'volumes': [home_volume(plan), memory],
        },
    }


def _probes() -> dict[str, dict[str, Any]]:
    """As operators from 1.6 on write them; earlier ones start `wget`, which the image has not."""
    ask = {'httpGet': {'path': '/api/healthz', 'port': _AGENT_PORT}, 'timeoutSeconds': 5}
    every = {'initialDelaySeconds': 10, 'periodSeconds': 5}
    return {
        'readinessProbe': {**copy.deepcopy(ask), **every, 'failureThreshold': 10},
        'livenessProbe': {
            **copy.deepcopy(ask),
            **every,
            'initialDelaySeconds': 30,
            'failureThreshold': 120,
        },
    }


def _environment(plan: Plan, cluster: Cluster) -> list[dict[str, Any]]:
    """What the trainer has, and a job needs: the home, the database, and what the Flow gives."""
    trainers = _trainers(plan)
    said = _said_of(plan, trainers[0]) if trainers else plan.flow['with']
    taken = [
        from_secret(name, secret['name'], secret['key'])
        for name, secret in (said.get('env_from_secret') or {}).items()
    ]
    return [
        *from_values(said.get('env') or {}),
        *taken,
        {'name': 'FINETUNER_HOME', 'value': HOME},
        from_secret(DATABASE, cluster.secret, DATABASE),
        {'name': 'RAY_USAGE_STATS_ENABLED', 'value': '0'},
    ]


def _policies(plan: Plan, cluster: Cluster, ray: RayCluster) -> list[dict[str, Any]]:
    """Ray's ports hand out more than jobs: only its own pods, and for jobs the trainer, get there."""
    own = {_CLUSTER_LABEL: ray.name}
    among = {'from': [{'podSelector': {'matchLabels': dict(own)}}]}
    metrics = {'ports': [{'port': _PORTS['metrics'], 'protocol': 'TCP'}]}
    callers: list[dict[str, Any]] = []
    trainers = [values.host_name('Executor', part.name) for part in _trainers(plan)]
    if trainers:
        expression = {'key': COMPONENT, 'operator': 'In', 'values': trainers}
        selector = {'matchLabels': {PART_OF: plan.name}, 'matchExpressions': [expression]}
        callers.append({'podSelector': selector})
    if ray.job is not None:  # it submits the job, and asks how far it is
        callers.append(
            {'namespaceSelector': {}, 'podSelector': {'matchLabels': dict(_OPERATOR)}},
        )
    jobs = {'from': callers, 'ports': [{'port': _PORTS['dashboard'], 'protocol': 'TCP'}]}
    return [
        _policy(plan, cluster, ray.name, own, [among, metrics]),
        _policy(plan, cluster, f'{ray.name}-jobs', {**own, _NODE_LABEL: 'head'}, [jobs]),
    ]


def _policy(
    plan: Plan, cluster: Cluster, name: str, labels: Mapping[str, str], ingress: list[Any]
) -> dict[str, Any]:
    spec = {
        'podSelector': {'matchLabels': dict(labels)},
        'policyTypes': ['Ingress'],
        'ingress': ingress,
    }
    return _object(plan, cluster, 'networking.k8s.io/v1', 'NetworkPolicy', name, spec)


def _ray_job(plan: Plan, cluster: Cluster, ray: RayCluster, command: str) -> dict[str, Any]:
    spec = {
        'clusterSelector': {_CLUSTER_LABEL: ray.name},
        # one shell reads the command, that of the head; a pod that submits it would read it first,
        # and spread `data/*.parquet` over files of its own
        'submissionMode': 'HTTPMode',
        'entrypoint': command,
    }
    return _object(plan, cluster, _API, 'RayJob', f'{ray.name}-job', spec)


def _object(
    plan: Plan, cluster: Cluster, version: str, kind: str, name: str, spec: dict[str, Any]
) -> dict[str, Any]:
    labels = {'app.kubernetes.io/name': 'finetuner', PART_OF: plan.name}
    return {
        'apiVersion': version,
        'kind': kind,
        'metadata': {'name': name, 'namespace': cluster.namespace, 'labels': labels},
        'spec': spec,
    }


def _command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f'--ray-job {text!r} is no command of a shell: {error}') from error
    if not words:
        raise ConfigError('--ray-job is empty: give a command, such as `finetuner encode ...`')
    refuse_secrets('--ray-job', {'command': text})
    return text


def _trainers(plan: Plan) -> list[Part]:
    return [part for part in plan.parts.values() if part.is_trainer]


def _said_of(plan: Plan, part: Part) -> Mapping[str, Any]:
    """What the Flow says of an Executor, with what it says of all."""
    return next(each for each in plan.flow['executors'] if each['name'] == part.name)


def _image(plan: Plan) -> str:
    """The trainer's: a run is computed by the code that accepted it."""
    trainers = _trainers(plan)
    return trainers[0].image if trainers else plan.image
