"""What KubeRay's operator would refuse, or would not bring together, in its objects.

No package carries its schemas. The fields below are those of the reference of KubeRay 1.6.2, which
its maintainers generate from the types that the CRDs are generated from; the rules are those that
the operator applies when it has an object. Templates of pods are Kubernetes' own.
"""

from tests.kubernetes_checks import VERSIONS, validate

VERSION_OF_FIELDS = '1.6.2'
# a set is an enumeration, a list a list of what it holds, `object` is anything
FIELDS = {
    'RayCluster': {
        'upgradeStrategy': {'type': {'Recreate', 'None'}},
        'authOptions': {
            'enableK8sTokenAuth': bool,
            'secretName': str,
            'mode': {'disabled', 'token'},
        },
        'suspend': bool,
        'managedBy': str,
        'autoscalerOptions': {
            'resources': object,
            'image': str,
            'imagePullPolicy': str,
            'securityContext': object,
            'idleTimeoutSeconds': int,
            'upscalingMode': {'Default', 'Aggressive', 'Conservative'},
            'version': {'v1', 'v2'},
            'env': object,
            'envFrom': object,
            'volumeMounts': object,
        },
        'headServiceAnnotations': object,
        'enableInTreeAutoscaling': bool,
        'gcsFaultToleranceOptions': object,
        'headGroupSpec': {
            'template': object,
            'headService': object,
            'enableIngress': bool,
            'resources': object,
            'labels': object,
            'rayStartParams': {str: str},
            'serviceType': str,
        },
        'rayVersion': str,
        'workerGroupSpecs': [
            {
                'suspend': bool,
                'groupName': str,
                'replicas': int,
                'minReplicas': int,
                'maxReplicas': int,
                'idleTimeoutSeconds': int,
                'resources': object,
                'labels': object,
                'rayStartParams': {str: str},
                'template': object,
                'scaleStrategy': {'workersToDelete': [str]},
                'numOfHosts': int,
            }
        ],
    },
    'RayJob': {
        'activeDeadlineSeconds': int,
        'backoffLimit': int,
        'rayClusterSpec': object,
        'submitterPodTemplate': object,
        'metadata': {str: str},
        'clusterSelector': {str: str},
        'submitterConfig': {'backoffLimit': int},
        'managedBy': str,
        'deletionStrategy': object,
        'entrypoint': str,
        'runtimeEnvYAML': str,
        'jobId': str,
        'submissionMode': {'K8sJobMode', 'HTTPMode', 'InteractiveMode', 'SidecarMode'},
        'entrypointResources': str,
        'entrypointNumCpus': float,
        'entrypointNumGpus': float,
        'ttlSecondsAfterFinished': int,
        'preRunningDeadlineSeconds': int,
        'shutdownAfterJobFinishes': bool,
        'suspend': bool,
    },
}
LONGEST_NAMES = {'RayCluster': 53, 'RayJob': 47}
LONGEST_SERVICE = 50


def refuse_unknown_to_kuberay(each):
    """Check the fields of a RayCluster or RayJob, and strictly the pods it asks for."""
    assert set(each) == {'apiVersion', 'kind', 'metadata', 'spec'}
    assert each['apiVersion'] == 'ray.io/v1'
    assert len(each['metadata']['name']) <= LONGEST_NAMES[each['kind']]
    _refuse_unknown_fields(each['kind'], each['spec'], FIELDS[each['kind']])
    for template in templates_of(each).values():
        for version in VERSIONS:
            pod = {'apiVersion': 'v1', 'kind': 'PodTemplate', 'template': template}
            validate({**pod, 'metadata': {'name': 'pod'}}, version)


def _refuse_unknown_fields(path, value, known):
    if known is object:
        return
    if isinstance(known, set):
        assert value in known, path
    elif isinstance(known, list):
        for number, each in enumerate(value):
            _refuse_unknown_fields(f'{path}[{number}]', each, known[0])
    elif isinstance(known, dict):
        for name, each in value.items():
            assert name in known or str in known, f'{path}.{name} is no field'
            _refuse_unknown_fields(f'{path}.{name}', each, known.get(name, known.get(str)))
    else:
        assert type(value) is known, f'{path} is {value!r}'


def templates_of(cluster):
    """Templates of pods by the name of their group."""
    spec = cluster['spec']
    if cluster['kind'] != 'RayCluster':
        return {}
    workers = {each['groupName']: each['template'] for each in spec['workerGroupSpecs']}
    return {'head': spec['headGroupSpec']['template'], **workers}


def refuse_loose_ends_of_ray(objects):
    """What a Ray cluster, its policies, its jobs and the trainer say of each other is true."""
    by_kind = {}
    for each in objects:
        by_kind.setdefault(each['kind'], {})[each['metadata']['name']] = each
    (cluster,) = by_kind['RayCluster'].values()
    name, spec = cluster['metadata']['name'], cluster['spec']
    assert tuple(map(int, spec['rayVersion'].split('.'))) >= (2, 52), 'tokens need it'
    for group in spec['workerGroupSpecs']:
        assert 0 <= group['minReplicas'] <= group['maxReplicas'] > 0
        grows = group['maxReplicas'] > group['minReplicas']
        assert spec['enableInTreeAutoscaling'] == grows == ('replicas' not in group)
    for template in templates_of(cluster).values():
        _refuse_loose_pod(template, by_kind)
    head = templates_of(cluster)['head']['spec']
    # the operator looks for the port of the jobs API by its name
    ports = {each['name']: each['containerPort'] for each in head['containers'][0]['ports']}
    assert ports.items() >= {'gcs-server': 6379, 'dashboard': 8265}.items()
    assert head['automountServiceAccountToken'] or not spec['enableInTreeAutoscaling']
    for job in by_kind.get('RayJob', {}).values():
        assert job['spec']['clusterSelector'] == {'ray.io/cluster': name}
        assert not job['spec'].get('backoffLimit'), 'refused beside a selector'
        assert not job['spec'].get('shutdownAfterJobFinishes')
    service = f'{name}-head-svc'
    assert len(service) <= LONGEST_SERVICE, 'KubeRay would cut it off'
    for workload in [*by_kind['Deployment'].values(), *by_kind.get('StatefulSet', {}).values()]:
        (container,) = workload['spec']['template']['spec']['containers']
        given = {each['name']: each for each in container.get('env', ())}
        if 'FINETUNER_RAY_ADDRESS' in given:
            place = cluster['metadata']['namespace']
            address = f'http://{service}.{place}.svc:{ports["dashboard"]}'
            assert given['FINETUNER_RAY_ADDRESS']['value'] == address
            assert given['FINETUNER_LAUNCHER']['value'] == 'ray'
            assert given['RAY_AUTH_MODE']['value'] == spec['authOptions']['mode'] == 'token'
            token = given['RAY_AUTH_TOKEN']['valueFrom']['secretKeyRef']
            assert token == {'name': name, 'key': 'auth_token'}, 'the Secret of the operator'


def _refuse_loose_pod(template, by_kind):
    pod = template['spec']
    (container,) = pod['containers']
    assert pod['securityContext']['runAsNonRoot'] is True
    assert container['securityContext']['allowPrivilegeEscalation'] is False
    volumes = {each['name']: each for each in pod['volumes']}
    mounts = {each['mountPath']: each['name'] for each in container['volumeMounts']}
    assert set(mounts.values()) == set(volumes)
    claim = by_kind['PersistentVolumeClaim'][
        volumes[mounts['/data']]['persistentVolumeClaim']['claimName']
    ]
    assert claim['spec']['accessModes'] == ['ReadWriteMany'], 'workers are on other nodes'
    assert volumes[mounts['/dev/shm']]['emptyDir']['medium'] == 'Memory'
    names = [each['name'] for each in container['env']]
    assert len(names) == len(set(names))
    amounts = container['resources']
    assert amounts['requests'].items() <= amounts['limits'].items()


def may_reach(objects, caller, called, port):
    """Whether policies let a pod reach a port of a pod of the same namespace, labels given."""
    policies = [each['spec'] for each in objects if each['kind'] == 'NetworkPolicy']
    concerned = [each for each in policies if _selects(each['podSelector'], called)]
    return not concerned or any(
        _lets_in(rule, caller, port) for policy in concerned for rule in policy['ingress']
    )


def _lets_in(rule, caller, port):
    ports = [each['port'] for each in rule.get('ports', ())]
    callers = rule.get('from')
    return (not ports or port in ports) and (
        callers is None or any(_selects(each['podSelector'], caller) for each in callers)
    )


def _selects(selector, labels):
    def holds(expression):
        found = labels.get(expression['key']) in expression['values']
        return found == {'In': True, 'NotIn': False}[expression['operator']]

    return selector.get('matchLabels', {}).items() <= labels.items() and all(
        map(holds, selector.get('matchExpressions', ()))
    )
