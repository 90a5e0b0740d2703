"""A Flow as files for Kubernetes or Docker Compose, around the exporters of Jina."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.server.exporting import values
from finetuner.server.exporting.cluster import RayWishes
from finetuner.server.exporting.plan import Plan, Wishes, make_plan

__all__ = ['RayWishes', 'Wishes', 'export_compose', 'export_kubernetes']


def export_kubernetes(
    flow: Path,
    output: Path,
    wishes: Wishes,
    namespace: str | None = None,
    secret: str | None = None,
    storage: str = '10Gi',
    storage_class: str | None = None,
    many_nodes: bool = False,
    ray: RayWishes | None = None,
) -> dict[str, Any]:
    """Write a Flow as Kubernetes objects.

    Args:
        flow: its YAML, or a folder with a `flow.yml`.
        output: folder to be made; it may be there when it is empty.
        wishes: images, replicas and sizes.
        namespace: that everything goes to; None for the name of the Flow.
        secret: name of the Secret with the tokens; None for the Flow's name and `-secrets`.
        storage: size of the volumes, such as `10Gi`.
        storage_class: of the volumes; None for the cluster's default.
        many_nodes: whether pods may run on several nodes; the Secret then has to hold
            FINETUNER_DATABASE_URL, and the class of the volumes to allow ReadWriteMany.
        ray: a Ray cluster for KubeRay's operator, which the trainer sends its runs to; None for
            runs in the trainer's own pod.

    Returns:
        `files`, `namespace`, `secret`, its `secret_keys`, and `ray`: the address of the jobs API.

    Raises:
        ConfigError: the Flow cannot run there, an argument is unusable, or `output` holds files.
    """
    from finetuner.server.exporting.cluster import Cluster
    from finetuner.server.exporting.kuberay import check_ray
    from finetuner.server.exporting.kubernetes import kubernetes_files

    _refuse_full(output)
    plan = _plan_of(flow, wishes)
    namespace = values.host_name('--namespace', namespace or plan.name)
    cluster = Cluster(
        namespace=namespace,
        secret=values.host_name('--secret', secret or f'{plan.name}-secrets'),
        storage=values.byte_quantity('--storage', storage),
        storage_class=storage_class and values.host_name('--storage-class', storage_class),
        many_nodes=many_nodes,
        ray=check_ray(plan, ray, namespace, many_nodes) if ray else None,
    )
    texts = {
        f'{name}.yml': _yaml_of(objects)
        for name, objects in kubernetes_files(plan, cluster).items()
    }
    _write_all(texts, output)
    keys = ['FINETUNER_TOKEN', 'FINETUNER_GATEWAY_KEY']
    return {
        'output': str(output),
        'files': sorted(texts),
        'namespace': cluster.namespace,
        'secret': cluster.secret,
        'secret_keys': [*keys, 'FINETUNER_DATABASE_URL'] if many_nodes else keys,
        'ray': cluster.ray and cluster.ray.address,
    }


def export_compose(
    flow: Path, output: Path, wishes: Wishes, address: str = '127.0.0.1'
) -> dict[str, Any]:
    """Write a Flow as a file for Docker Compose.

    Args:
        flow: its YAML, or a folder with a `flow.yml`.
        output: folder to be made; it may be there when it is empty.
        wishes: images, replicas and sizes.
        address: of the machine, at which the gateway's ports are published.

    Returns:
        `files` and the `variables` that have to be set.

    Raises:
        ConfigError: the Flow cannot run there, an argument is unusable, or `output` holds files.
    """
    import ipaddress

    from finetuner.server.exporting.compose import compose_file, variables

    _refuse_full(output)
    try:
        version = ipaddress.ip_address(address).version
    except ValueError as error:
        raise ConfigError(f'--address {address!r} is not one: 127.0.0.1 and 0.0.0.0 are') from error
    plan = _plan_of(flow, wishes)
    shown = f'[{address}]' if version == 6 else address
    texts = {
        'compose.yml': _yaml_of([compose_file(plan, shown)]),
        'env.example': variables(plan),
    }
    _write_all(texts, output)
    return {
        'output': str(output),
        'files': sorted(texts),
        'variables': ['FINETUNER_TOKEN', 'FINETUNER_GATEWAY_KEY'],
    }


def _plan_of(flow: Path, wishes: Wishes) -> Plan:
    from finetuner.server.serve import import_jina

    import_jina()
    return make_plan(flow, wishes)


def _yaml_of(documents: list[dict[str, Any]]) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    return yaml.dump_all(documents, Dumper=Plain, sort_keys=False, width=100)


def _refuse_full(output: Path) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(
            f'{str(output)!r} holds files already: give a folder that is new or empty'
        )


def _write_all(texts: dict[str, str], output: Path) -> None:
    """Write all files or none: they come under their name when the last one is whole."""
    target = output.absolute()
    unfinished = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f'.{target.name}-', dir=target.parent))
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding='utf-8')
        unfinished.chmod(0o755)
        os.replace(unfinished, target)
    except OSError as error:
        raise ConfigError(f'{str(output)!r} cannot be written: {error.strerror}') from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
