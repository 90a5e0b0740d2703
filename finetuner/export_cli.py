"""The command `finetuner export`: a Flow as files for Kubernetes or Docker Compose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuner.console import tell

if TYPE_CHECKING:
    from finetuner.server.exporting import RayWishes, Wishes

app = typer.Typer(
    help='Write a Flow as files for Kubernetes or Docker Compose.', no_args_is_help=True
)

_Flow = Annotated[Path, typer.Argument(help='YAML of a Flow, or a folder with a flow.yml.')]
_Output = Annotated[Path, typer.Option(help='Folder to be made; empty when it is there.')]
_Image = Annotated[str, typer.Option(help="Of the gateway and of this library's Executors.")]
_Images = Annotated[
    list[str] | None, typer.Option('--executor-image', help='Of one: encoder=finetuner:cuda.')
]
_Replicas = Annotated[list[str] | None, typer.Option(help='encoder=3; again for another one.')]
_Gpus = Annotated[list[str] | None, typer.Option(help='encoder=1, of NVIDIA.')]
_Cpus = Annotated[list[str] | None, typer.Option('--cpu', help='encoder=2 or encoder=500m.')]
_Memory = Annotated[list[str] | None, typer.Option(help='encoder=4Gi.')]
_Json = Annotated[bool, typer.Option('--json', help='As JSON, for programs.')]


@app.command()
def kubernetes(
    flow: _Flow,
    output: _Output,
    image: _Image = 'finetuner',
    executor_image: _Images = None,
    replicas: _Replicas = None,
    autoscale: Annotated[
        list[str] | None, typer.Option(help='encoder=1:5, fewest and most, by use of CPU.')
    ] = None,
    gpus: _Gpus = None,
    cpu: _Cpus = None,
    memory: _Memory = None,
    namespace: Annotated[
        str | None, typer.Option(show_default='name of the Flow', help='It goes to.')
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option(show_default='NAME-secrets', help='Holds FINETUNER_TOKEN and the others.'),
    ] = None,
    storage: Annotated[str, typer.Option(help='Size of volumes.')] = '10Gi',
    storage_class: Annotated[
        str | None, typer.Option(show_default="the cluster's", help='Of volumes.')
    ] = None,
    many_nodes: Annotated[
        bool,
        typer.Option(
            '--many-nodes',
            help='Spread pods; needs a class of volumes that is ReadWriteMany, and a database.',
        ),
    ] = False,
    ray: Annotated[
        bool,
        typer.Option('--ray', help='With a Ray cluster for runs, of KubeRay; needs --many-nodes.'),
    ] = False,
    ray_workers: Annotated[
        str | None, typer.Option(show_default='1:4', help='Fewest and most workers.')
    ] = None,
    ray_cpu: Annotated[
        str | None, typer.Option(show_default='4', help='Cores of a worker.')
    ] = None,
    ray_memory: Annotated[
        str | None, typer.Option(show_default='16Gi', help='Memory of a worker.')
    ] = None,
    ray_gpus: Annotated[
        str | None, typer.Option(show_default='none', help='GPUs of a worker, of NVIDIA.')
    ] = None,
    ray_job: Annotated[
        str | None,
        typer.Option(show_default='none', help="To run once on it: 'finetuner encode ...'."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write a Flow as Kubernetes objects, for `kubectl apply -f`."""
    from finetuner.server.exporting import export_kubernetes

    wishes = _wishes(image, executor_image, replicas, autoscale, gpus, cpu, memory)
    asked = {
        'workers': ray_workers,
        'cpu': ray_cpu,
        'memory': ray_memory,
        'gpus': ray_gpus,
        'job': ray_job,
    }
    told = export_kubernetes(
        flow,
        output,
        wishes,
        namespace,
        secret,
        storage,
        storage_class,
        many_nodes,
        _ray_wishes(ray, asked),
    )
    place, name = told['namespace'], told['secret']
    words = (
        f'{output}: {", ".join(told["files"])}\n'
        f'Next, with {" and ".join(f"{key}=..." for key in told["secret_keys"])} in secrets.env:\n'
        f'  kubectl create namespace {place}\n'
        f'  kubectl -n {place} create secret generic {name} --from-env-file=secrets.env\n'
        f'  kubectl apply -f {output}'
    )
    if ray:
        words += (
            f'\nKubeRay 1.5.1 or later has to run there, and the image needs the extra `ray`. '
            f'Jobs: {told["ray"]}'
        )
    tell(told, as_json, words)


@app.command()
def compose(
    flow: _Flow,
    output: _Output,
    image: _Image = 'finetuner',
    executor_image: _Images = None,
    replicas: _Replicas = None,
    gpus: _Gpus = None,
    cpu: _Cpus = None,
    memory: _Memory = None,
    address: Annotated[
        str, typer.Option(help='Of this machine, at which the ports are published.')
    ] = '127.0.0.1',
    as_json: _Json = False,
) -> None:
    """Write a Flow as a Compose file, for `docker compose up`."""
    from finetuner.server.exporting import export_compose

    wishes = _wishes(image, executor_image, replicas, None, gpus, cpu, memory)
    told = export_compose(flow, output, wishes, address)
    words = (
        f'{output}: {", ".join(told["files"])}\n'
        f'Next, with {" and ".join(f"{name}=..." for name in told["variables"])} in '
        f'{output / ".env"}:\n'
        f'  docker compose --project-directory {output} up --detach'
    )
    tell(told, as_json, words)


def _ray_wishes(ray: bool, asked: dict[str, str | None]) -> RayWishes | None:
    from finetuner.excepts import ConfigError
    from finetuner.server.exporting import RayWishes

    given = {name: value for name, value in asked.items() if value is not None}
    if not ray and given:
        raise ConfigError(f'--ray-{next(iter(given))} speaks of a Ray cluster: add --ray')
    return RayWishes(**given) if ray else None


def _wishes(
    image: str,
    executor_images: list[str] | None,
    replicas: list[str] | None,
    autoscale: list[str] | None,
    gpus: list[str] | None,
    cpus: list[str] | None,
    memory: list[str] | None,
) -> Wishes:
    from finetuner.server.exporting import Wishes

    lists = (executor_images, replicas, autoscale, gpus, cpus, memory)
    return Wishes(image, *(each or () for each in lists))
