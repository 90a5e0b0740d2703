"""Jina's Kubernetes objects, finished: probes, volumes, resources, secrets, and who may reach what."""

from __future__ import annotations

import copy
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.server.exporting import values
from finetuner.server.exporting.cluster import (
    COMPONENT,
    PART_OF,
    Cluster,
    from_secret,
    home_volume,
    resources,
    security_of_container,
    security_of_pod,
    shared_memory,
)
from finetuner.server.exporting.jina_exporters import kubernetes_objects
from finetuner.server.exporting.kuberay import (
    ray_files,
    sending_trainer,
    variables_of_launcher,
)
from finetuner.server.exporting.leaks import DATABASE, KEY, TOKEN
from finetuner.server.exporting.plan import GATEWAY, HOME, PORT_OF_METRICS, Part, Plan

_WORKLOADS = ('Deployment', 'StatefulSet')
_SHARED = 'shared'
_HEAD = Part('head', '', '', default_cpu='500m', default_memory='512Mi')
_PERIOD_SECONDS = 5
# for a worker to write its checkpoint, and for requests to end
_GRACE_SECONDS = {True: 90, False: 30}


def kubernetes_files(plan: Plan, cluster: Cluster) -> dict[str, list[dict[str, Any]]]:
    """Everything to apply: lists of objects by the name of their file."""
    for part in plan.parts.values():
        if part.gpus is not None and not part.gpus.isdigit():
            raise ConfigError(
                f'Executor {part.name!r} wants the GPUs {part.gpus!r}, and Kubernetes counts them: '
                f'say --gpus {part.name}=1'
            )
    files = {
        name: _Finisher(plan, cluster).finished(objects)
        for name, objects in kubernetes_objects(plan, cluster.namespace).items()
    }
    shared = [_home_claim(plan, cluster), _executors_policy(plan, cluster)]
    ours = {_SHARED: shared, **ray_files(plan, cluster)}
    for taken in sorted(set(ours) & set(files)):
        raise ConfigError(
            f'an Executor is called {taken!r}, as is a file of what all of them share: give it '
            'another name'
        )
    return {**ours, **files}


class _Finisher:
    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self._plan = plan
        self._cluster = cluster

    def finished(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Finish what one of Jina's files holds: one workload and what belongs to it."""
        workload = next(each for each in objects if each['kind'] in _WORKLOADS)
        name = workload['metadata']['name']
        is_head = _labels_of_pods(workload)['pod_type'] == 'HEAD'
        executor = _labels_of_pods(workload)['jina_deployment_name']
        part = _HEAD if is_head else self._plan.parts[executor]
        config = self._config_map(objects)
        done = [self._service(name, objects, part), self._workload(workload, part, config)]
        if config is not None:
            done.insert(0, config)
        if not is_head:
            done += self._hints(workload, part)
        for each in done:
            each['metadata']['labels'] = {
                **each['metadata'].get('labels', {}),
                **self._labels(executor),
            }
        return done

    def _labels(self, executor: str) -> dict[str, str]:
        return {
            'app.kubernetes.io/name': 'finetuner',
            COMPONENT: values.host_name('Executor', executor),
            PART_OF: self._plan.name,
        }

    def _config_map(self, objects: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What the Flow says as `env`; Jina's own two entries are no environment variables."""
        found = next(each for each in objects if each['kind'] == 'ConfigMap')
        data = {
            key: value
            for key, value in found['data'].items()
            if key not in ('pythonunbuffered', 'worker_class')
        }
        return {**found, 'data': data} if data else None

    def _service(self, name: str, objects: list[dict[str, Any]], part: Part) -> dict[str, Any]:
        service = next(
            each
            for each in objects
            if each['kind'] == 'Service' and each['metadata']['name'] == name
        )
        metrics = {'name': 'metrics', 'port': PORT_OF_METRICS, 'targetPort': 'metrics'}
        ports = [metrics]
        if part.name == GATEWAY:
            ports[:0] = [
                {'name': protocol, 'port': port, 'targetPort': protocol}
                for protocol, port in self._plan.ports.items()
            ]
        else:
            port = service['spec']['ports'][0]['port']
            ports.insert(0, {'name': 'grpc', 'port': port, 'targetPort': 'grpc'})
            # its name then leads to every replica, and the gateway takes turns
            service['spec']['clusterIP'] = 'None'
        service['spec']['ports'] = [{**each, 'protocol': 'TCP'} for each in ports]
        return service

    def _workload(
        self, workload: dict[str, Any], part: Part, config: dict[str, Any] | None
    ) -> dict[str, Any]:
        spec = workload['spec']
        spec['revisionHistoryLimit'] = 5
        if part.name == GATEWAY:
            spec['replicas'] = part.replicas
        if part.autoscale:
            del spec['replicas']  # the autoscaler's to say, also after the next `apply`
        if workload['kind'] == 'StatefulSet':
            self._mend_stateful_set(workload, part)
        elif part.alone:
            spec['strategy'] = {'type': 'Recreate'}  # never two of them, not even for a moment
        self._finish_pod(spec['template'], part, config)
        return workload

    def _mend_stateful_set(self, workload: dict[str, Any], part: Part) -> None:
        """Jina takes a StatefulSet for volumes, but writes it as if it were a Deployment."""
        spec, name = workload['spec'], workload['metadata']['name']
        del spec['strategy']
        spec['serviceName'] = name
        spec['volumeClaimTemplates'] = [
            {'metadata': {'name': f'volume-{i}'}, 'spec': _claim_spec(self._cluster, many=False)}
            for i, _ in enumerate(part.volumes)
        ]

    def _finish_pod(
        self, template: dict[str, Any], part: Part, config: dict[str, Any] | None
    ) -> None:
        metadata, pod = template['metadata'], template['spec']
        metadata['labels'].update(self._labels(metadata['labels']['jina_deployment_name']))
        metadata['annotations'] = {
            'prometheus.io/scrape': 'true',
            'prometheus.io/port': str(PORT_OF_METRICS),
            'prometheus.io/path': '/metrics',
        }
        (container,) = pod['containers']
        self._finish_container(container, part, config)
        pod.update(
            automountServiceAccountToken=False,
            enableServiceLinks=False,
            terminationGracePeriodSeconds=_GRACE_SECONDS[part.is_trainer],
            securityContext=security_of_pod(),
        )
        if part is _HEAD:
            return
        pod['volumes'] = [home_volume(self._plan)]
        if part.is_trainer:
            # workers that load data hand it over there
            volume, mount = shared_memory('1Gi')
            pod['volumes'].append(volume)
            container['volumeMounts'].append(mount)
        if not self._cluster.many_nodes:
            pod['affinity'] = {'podAffinity': self._one_node()}

    def _one_node(self) -> dict[str, Any]:
        """All pods where the home is, which one node may write to at a time."""
        return {
            'requiredDuringSchedulingIgnoredDuringExecution': [
                {
                    'labelSelector': {'matchLabels': {PART_OF: self._plan.name}},
                    'topologyKey': 'kubernetes.io/hostname',
                }
            ]
        }

    def _finish_container(
        self, container: dict[str, Any], part: Part, config: dict[str, Any] | None
    ) -> None:
        cpu, memory = part.cpu or part.default_cpu, part.memory or part.default_memory
        own = part.arguments(cpu)
        if part.is_trainer and self._cluster.ray is not None:
            own = sending_trainer(part, self._cluster.ray).arguments(None)
        # Kubernetes would put a variable in place of $(NAME), and one $ in place of two
        container['args'] = [
            argument.replace('$', '$$') for argument in with_code(container['args'], part, own)
        ]
        container['ports'] = [
            {'name': name, 'containerPort': each['containerPort']}
            for name, each in zip(
                self._plan.ports if part.name == GATEWAY else ('grpc',),
                container['ports'],
                strict=True,
            )
        ]
        failures = container['startupProbe']['failureThreshold']
        container.update(self._probes(part, container['ports'], failures))
        container['ports'].append({'name': 'metrics', 'containerPort': PORT_OF_METRICS})
        container['resources'] = resources(cpu, memory, int(part.gpus or 0))
        container['securityContext'] = security_of_container()
        container.pop('envFrom')
        if config is not None:
            container['envFrom'] = [{'configMapRef': {'name': config['metadata']['name']}}]
        if part is _HEAD:
            container.pop('volumeMounts', None)
            return
        container['env'] += self._environment(part)
        container['volumeMounts'] = [
            {'name': 'home', 'mountPath': HOME},
            *(
                {'name': f'volume-{i}', 'mountPath': folder}
                for i, folder in enumerate(part.volumes)
            ),
        ]

    def _environment(self, part: Part) -> list[dict[str, Any]]:
        # without a database of its own the home holds one, which pods on other nodes would break
        names = {KEY: True, DATABASE: self._cluster.many_nodes}
        if part.name == GATEWAY:
            names = {TOKEN: True, **names}
        taken = [
            from_secret(name, self._cluster.secret, name, required)
            for name, required in names.items()
        ]
        launcher = []
        if part.is_trainer:
            launcher = variables_of_launcher(self._plan, part, self._cluster)
        return [{'name': 'FINETUNER_HOME', 'value': HOME}, *taken, *launcher]

    def _probes(
        self, part: Part, ports: list[dict[str, Any]], failures: int
    ) -> dict[str, dict[str, Any]]:
        """Jina's start a Python with all of Jina in it every five seconds; these start nothing."""
        ready: dict[str, Any]
        alive: dict[str, Any]
        if part.name == GATEWAY and 'http' in self._plan.ports:
            ready = {'httpGet': {'path': '/health/ready', 'port': 'http'}}
            alive = {'httpGet': {'path': '/health/live', 'port': 'http'}}
        else:
            ready = alive = {'grpc': {'port': ports[0]['containerPort']}}
        every = {'periodSeconds': _PERIOD_SECONDS, 'timeoutSeconds': _PERIOD_SECONDS}
        return {
            # a model may load for minutes; until it has, nobody asks whether the pod is alive
            'startupProbe': copy.deepcopy({**alive, **every, 'failureThreshold': failures}),
            'readinessProbe': copy.deepcopy({**ready, **every, 'failureThreshold': 2}),
            'livenessProbe': copy.deepcopy(
                {**alive, 'periodSeconds': 10, 'timeoutSeconds': 10, 'failureThreshold': 6}
            ),
        }

    def _hints(self, workload: dict[str, Any], part: Part) -> list[dict[str, Any]]:
        """An autoscaler, and that a node may be emptied one pod at a time."""
        name = workload['metadata']['name']
        metadata = {'name': name, 'namespace': self._cluster.namespace}
        found: list[dict[str, Any]] = []
        fewest, most = part.autoscale or (part.replicas, part.replicas)
        if fewest > 1:
            selector = copy.deepcopy(workload['spec']['selector'])
            found.append(
                {
                    'apiVersion': 'policy/v1',
                    'kind': 'PodDisruptionBudget',
                    'metadata': dict(metadata),
                    'spec': {'maxUnavailable': 1, 'selector': selector},
                }
            )
        if part.autoscale:
            target = {'apiVersion': 'apps/v1', 'kind': workload['kind'], 'name': name}
            usage = {'type': 'Utilization', 'averageUtilization': 70}
            found.append(
                {
                    'apiVersion': 'autoscaling/v2',
                    'kind': 'HorizontalPodAutoscaler',
                    'metadata': dict(metadata),
                    'spec': {
                        'scaleTargetRef': target,
                        'minReplicas': fewest,
                        'maxReplicas': most,
                        'metrics': [
                            {'type': 'Resource', 'resource': {'name': 'cpu', 'target': usage}}
                        ],
                    },
                }
            )
        return found


def with_code(arguments: list[str], part: Part, own: list[str]) -> list[str]:
    """Jina's arguments of a container, with what it starts and its arguments put in.

    Args:
        arguments: as Jina's exporter writes them; it starts everything from `config.yml`.
        part: whose container.
        own: arguments of its class.
    """
    found = list(arguments)
    if '--uses' in found:
        found[found.index('--uses') + 1] = part.uses
    if not own:
        return found
    if '--uses-metas' in found and '--uses-metas' in own:
        at = found.index('--uses-metas')
        del found[at : at + 2]
    # --native is a switch: what follows it is read as well
    return [*found, *own]


def _labels_of_pods(workload: dict[str, Any]) -> dict[str, str]:
    return workload['spec']['template']['metadata']['labels']


def _claim_spec(cluster: Cluster, many: bool) -> dict[str, Any]:
    named = {'storageClassName': cluster.storage_class} if cluster.storage_class else {}
    return {
        'accessModes': ['ReadWriteMany' if many else 'ReadWriteOnce'],
        **named,
        'resources': {'requests': {'storage': cluster.storage}},
    }


def _home_claim(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """Where runs, artifacts and indexes are kept."""
    return {
        'apiVersion': 'v1',
        'kind': 'PersistentVolumeClaim',
        'metadata': {
            'name': f'{plan.name}-home',
            'namespace': cluster.namespace,
            'labels': {'app.kubernetes.io/name': 'finetuner', PART_OF: plan.name},
        },
        'spec': _claim_spec(cluster, cluster.many_nodes),
    }


def _executors_policy(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """Executors trust whoever reaches them: pods of this Flow, and for metrics all others."""
    of_flow = {PART_OF: plan.name}
    from_flow = {'from': [{'podSelector': {'matchLabels': dict(of_flow)}}]}
    return {
        'apiVersion': 'networking.k8s.io/v1',
        'kind': 'NetworkPolicy',
        'metadata': {
            'name': f'{plan.name}-executors',
            'namespace': cluster.namespace,
            'labels': {'app.kubernetes.io/name': 'finetuner', **of_flow},
        },
        'spec': {
            'podSelector': {
                'matchLabels': dict(of_flow),
                'matchExpressions': [{'key': 'app', 'operator': 'NotIn', 'values': [GATEWAY]}],
            },
            'policyTypes': ['Ingress'],
            'ingress': [from_flow, {'ports': [{'port': PORT_OF_METRICS, 'protocol': 'TCP'}]}],
        },
    }
