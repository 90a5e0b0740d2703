"""What Kubernetes would refuse, or would not bring together, in objects about to be applied."""

import json

import kubernetes_validate

# what its own schemas leave to the server: the newest that ships, and one from when probes learnt gRPC
VERSIONS = (kubernetes_validate.latest_version(), '1.27')
_WORKLOADS = ('Deployment', 'StatefulSet')


def refuse_unknown(objects):
    """Validate strictly: a field that there is not is a mistake."""
    for each in objects:
        for version in VERSIONS:
            validate(each, version)


def validate(each, version):
    """Hold an object of Kubernetes' own against the schemas of a version."""
    kubernetes_validate.validate(each, version, strict=True)


def refuse_loose_ends(objects):
    """What one object says of another is true."""
    by_kind = {}
    for each in objects:
        by_kind.setdefault(each['kind'], []).append(each)
    names = [(each['kind'], each['metadata']['name']) for each in objects]
    assert len(names) == len(set(names)), 'two objects of one name'
    workloads = [each for kind in _WORKLOADS for each in by_kind.get(kind, ())]
    pods = {each['metadata']['name']: each['spec']['template'] for each in workloads}
    services = {each['metadata']['name']: each for each in by_kind['Service']}
    for workload in workloads:
        _refuse_loose_pod(workload, by_kind, services)
    for service in services.values():
        matched = _matching(service['spec']['selector'], pods)
        assert len(matched) == 1, service
        for port in service['spec']['ports']:
            assert port['targetPort'] in _ports(matched[0]), port
    _refuse_loose_addresses(workloads, services)
    for budget in by_kind.get('PodDisruptionBudget', ()):
        assert _matching(budget['spec']['selector']['matchLabels'], pods)
    for scaler in by_kind.get('HorizontalPodAutoscaler', ()):
        target = scaler['spec']['scaleTargetRef']
        (scaled,) = (w for w in workloads if w['metadata']['name'] == target['name'])
        assert scaled['kind'] == target['kind']
        assert 'replicas' not in scaled['spec'], 'an `apply` would undo what the autoscaler did'
        (container,) = scaled['spec']['template']['spec']['containers']
        assert 'cpu' in container['resources']['requests'], 'nothing to compare the use with'


def _refuse_loose_pod(workload, by_kind, services):
    template = workload['spec']['template']
    labels = template['metadata']['labels']
    assert workload['spec']['selector']['matchLabels'].items() <= labels.items()
    pod = template['spec']
    assert pod['securityContext']['runAsNonRoot'] is True
    (container,) = pod['containers']
    ports = _ports(template)
    for probe in ('startupProbe', 'readinessProbe', 'livenessProbe'):
        (way,) = {'grpc', 'httpGet'} & set(container[probe])
        port = container[probe][way]['port']
        assert port in ports or port in ports.values(), (probe, port)
    annotated = template['metadata']['annotations']['prometheus.io/port']
    assert int(annotated) == ports['metrics']
    listened = _numbers(container['args'], '--port') + _numbers(
        container['args'], '--port-monitoring'
    )
    assert sorted(ports.values()) == sorted(listened)
    claims = {each['metadata']['name'] for each in by_kind['PersistentVolumeClaim']}
    given = {each['name'] for each in pod.get('volumes', ())}
    for volume in pod.get('volumes', ()):
        if 'persistentVolumeClaim' in volume:
            assert volume['persistentVolumeClaim']['claimName'] in claims
    if workload['kind'] == 'StatefulSet':
        assert workload['spec']['serviceName'] in services
        given |= {
            each['metadata']['name'] for each in workload['spec'].get('volumeClaimTemplates', ())
        }
    mounts = container.get('volumeMounts', ())
    assert {each['name'] for each in mounts} == given
    assert len({each['mountPath'] for each in mounts}) == len(mounts)
    configs = {each['metadata']['name'] for each in by_kind.get('ConfigMap', ())}
    for source in container.get('envFrom', ()):
        assert source['configMapRef']['name'] in configs
    amounts = container['resources']
    assert {'cpu', 'memory'} <= set(amounts['requests']) <= set(amounts['limits'])


def _refuse_loose_addresses(workloads, services):
    """What the gateway and heads connect to are Services, on ports that those have."""
    namespaces = {workload['metadata']['namespace'] for workload in workloads}
    (namespace,) = namespaces
    for workload in workloads:
        (container,) = workload['spec']['template']['spec']['containers']
        for address in addresses_of(container['args']):
            host, _, port = address.removeprefix('grpc://').partition(':')
            name, _, rest = host.partition('.')
            if rest == f'{namespace}.svc':
                assert int(port) in [each['port'] for each in services[name]['spec']['ports']]


def addresses_of(arguments):
    """All that a gateway or a head connects to."""
    found = []
    for option in ('--deployments-addresses', '--connection-list'):
        if option in arguments:
            for given in json.loads(arguments[arguments.index(option) + 1]).values():
                found += given if isinstance(given, list) else [given]
    return found


def _ports(template):
    (container,) = template['spec']['containers']
    return {each['name']: each['containerPort'] for each in container['ports']}


def _numbers(arguments, option):
    found = []
    for each in arguments[arguments.index(option) + 1 :]:
        if not each.isdigit():
            break
        found.append(int(each))
    return found


def _matching(selector, pods):
    return [pod for pod in pods.values() if selector.items() <= pod['metadata']['labels'].items()]
