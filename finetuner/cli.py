"""The command `finetuner`: serve, and look at runs and models."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from finetuner.excepts import ConfigError, FinetunerError

if TYPE_CHECKING:
    from jina import Flow

app = typer.Typer(
    help='Fine-tune embedding models on your own labelled data and serve them.',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)

_DEFAULT_FLOW = 'flows/train-and-encode.yml'


def main() -> None:
    """Run the command line; what went wrong on purpose is one line on stderr and exit code 2."""
    try:
        app()
    except FinetunerError as error:
        print(f'finetuner: {error}', file=sys.stderr)
        sys.exit(2)


@app.command()
def serve(
    flow: Annotated[Path, typer.Argument(help='Flow to start.')] = Path(_DEFAULT_FLOW),
) -> None:
    """Start a Flow and serve it until Ctrl+C or SIGTERM."""
    if not flow.is_file():
        raise ConfigError(f'there is no Flow {str(flow)!r}: give the path of a Flow YAML')
    os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')
    loaded = _load_flow(flow)
    _refuse_open_flow(loaded)

    def interrupt(*_: object) -> NoReturn:
        # Jina ends its children after Ctrl+C only: SIGTERM orphans them, their ports bound
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    from jina.excepts import RuntimeFailToStart

    try:
        with loaded:
            loaded.block()
    except KeyboardInterrupt:
        pass  # while it was starting; block() ends by itself
    except RuntimeFailToStart as error:
        raise FinetunerError('the server did not start; the reason is logged above') from error


@app.command()
def runs(
    experiment: Annotated[str | None, typer.Option(help='Only its runs.')] = None,
    page: Annotated[int, typer.Option(min=1, help='1 is the newest.')] = 1,
) -> None:
    """List runs, newest first."""
    from rich import print as show
    from rich.table import Table

    from finetuner.client import get_client

    table = Table('run', 'experiment', 'status', 'created', 'artifact id')
    for run in get_client().list_runs(experiment, page):
        times = str(run['created_at'])[:19].replace('T', ' ')
        table.add_row(run['name'], run['experiment_name'], run['status'], times, run['artifact_id'])
    show(table)


@app.command()
def logs(
    run: Annotated[str, typer.Argument(help='Name of the run.')],
    experiment: Annotated[str, typer.Option(help='The experiment it belongs to.')] = 'default',
    follow: Annotated[bool, typer.Option('--follow', '-f', help='Until the run ends.')] = False,
) -> None:
    """Print the log of a run."""
    from finetuner.client import get_client

    client = get_client()
    if not follow:
        print(client.get_run_logs(experiment, run))
        return
    try:
        for line in client.stream_run_logs(experiment, run):
            print(line, flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def models() -> None:
    """List the pretrained models."""
    import finetuner

    finetuner.describe_models()


def _load_flow(path: Path) -> Flow:
    import_jina()
    from jina import Flow

    # a bare file name makes Jina look for its modules in the root folder
    return Flow.load_config(str(path.resolve()))


def import_jina() -> None:
    """Import Jina without its warning about pkg_resources, or say how to install it.

    Raises:
        ConfigError: Jina is not installed.
    """
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)
            import jina  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'serving needs the module {error.name!r}: pip install "finetuner[serve]"'
        ) from error


def _refuse_open_flow(flow: Flow) -> None:
    """Check before anything starts that nobody else reaches the gateway or an Executor."""
    from finetuner.server.security import TokenCheck, refuse_open_server

    token = TokenCheck.from_environment()
    for _, deployment in flow:
        hosts = deployment.args.host
        for host in hosts if isinstance(hosts, list) else [hosts]:
            refuse_open_server(host, token)


if __name__ == '__main__':
    main()
