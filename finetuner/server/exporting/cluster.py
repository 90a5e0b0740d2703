"""What there is in a cluster of Kubernetes, and what all pods there have alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetuner.server.exporting.plan import Plan

PART_OF = 'app.kubernetes.io/part-of'
COMPONENT = 'app.kubernetes.io/component'
_USER = 1000


@dataclass(frozen=True)
class RayWishes:
    """What is asked of a Ray cluster beside the Flow; texts as they were typed.

    Attributes:
        workers: fewest and most, such as `1:4`.
        cpu: whole cores of a worker.
        memory: of a worker.
        gpus: of a worker, of NVIDIA; None for none.
        job: a command to run once on the cluster, such as `finetuner encode ...`; None for none.
    """

    workers: str = '1:4'
    cpu: str = '4'
    memory: str = '16Gi'
    gpus: str | None = None
    job: str | None = None


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster that KubeRay's operator keeps, its wishes checked.

    Attributes:
        name: of the cluster, and of the Secret that the operator puts its token into.
        address: of its jobs API.
        fewest: workers.
        most: workers; the cluster grows and shrinks where they are more than `fewest`.
        cpu: whole cores of a worker.
        memory: of a worker.
        gpus: of a worker.
        job: a command to run once; None for none.
    """

    name: str
    address: str
    fewest: int
    most: int
    cpu: int
    memory: str
    gpus: int
    job: str | None

    @property
    def per_worker(self) -> int:
        """Processes of runs that have room in a worker."""
        return max(1, self.gpus)


@dataclass(frozen=True)
class Cluster:
    """What there is in the cluster.

    Attributes:
        namespace: that everything goes to.
        secret: name of the Secret that holds FINETUNER_TOKEN and FINETUNER_GATEWAY_KEY.
        storage: size of the home, and of each volume of an Executor.
        storage_class: of both; None for the cluster's default.
        many_nodes: whether pods on several nodes share the home. It then has to be of a class
            that they can all write to, and runs are kept in a database outside of it.
        ray: that the trainer sends its runs to; None for runs in its own pod.
    """

    namespace: str
    secret: str
    storage: str = '10Gi'
    storage_class: str | None = None
    many_nodes: bool = False
    ray: RayCluster | None = None


def security_of_pod() -> dict[str, Any]:
    """The `securityContext` of every pod: nobody is root."""
    return {
        'runAsNonRoot': True,
        'runAsUser': _USER,
        'runAsGroup': _USER,
        'fsGroup': _USER,
        'fsGroupChangePolicy': 'OnRootMismatch',
        'seccompProfile': {'type': 'RuntimeDefault'},
    }


def security_of_container() -> dict[str, Any]:
    """The `securityContext` of every container: no capabilities, and none to gain."""
    return {'allowPrivilegeEscalation': False, 'capabilities': {'drop': ['ALL']}}


def resources(cpu: str, memory: str, gpus: int = 0) -> dict[str, Any]:
    """The `resources` of a container: what it asks for is what it may have."""
    amounts = {'cpu': cpu, 'memory': memory}
    limits: dict[str, Any] = {**amounts, 'nvidia.com/gpu': gpus} if gpus else amounts
    return {'requests': amounts, 'limits': limits}


def home_volume(plan: Plan) -> dict[str, Any]:
    """The volume of runs, artifacts and indexes."""
    return {'name': 'home', 'persistentVolumeClaim': {'claimName': f'{plan.name}-home'}}


def shared_memory(size: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A volume and its mount for `/dev/shm`, of which a container has 64 MB otherwise."""
    memory = {'medium': 'Memory', 'sizeLimit': size}
    return (
        {'name': 'shared-memory', 'emptyDir': memory},
        {'name': 'shared-memory', 'mountPath': '/dev/shm'},
    )


def from_secret(name: str, secret: str, key: str, required: bool = True) -> dict[str, Any]:
    """A variable of a container that a Secret fills."""
    reference = {'name': secret, 'key': key, **({} if required else {'optional': True})}
    return {'name': name, 'valueFrom': {'secretKeyRef': reference}}


def from_values(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Variables of a container, their text as it is: Kubernetes fills in $(NAME) otherwise."""
    return [
        {'name': name, 'value': str(value).replace('$', '$$')} for name, value in values.items()
    ]
