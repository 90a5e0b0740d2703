"""The command `finetuner`: serve, and look at runs, models and training data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finetuner import data_cli
from finetuner.excepts import ConfigError, FinetunerError

app = typer.Typer(
    help='Fine-tune embedding models on your own labelled data and serve them.',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)

app.add_typer(data_cli.app, name='data')

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
    from finetuner.server.serve import serve_flow

    serve_flow(flow)


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
def resume(
    run: Annotated[str, typer.Argument(help='Name of the run.')],
    experiment: Annotated[str, typer.Option(help='The experiment it belongs to.')] = 'default',
) -> None:
    """Go on with a run that failed, from its last checkpoint."""
    from finetuner.client import get_client

    get_client().resume_run(experiment, run)
    print(f'{run} goes on: finetuner logs {run} --follow shows how')


@app.command('models', hidden=True)
@app.command('describe-models')
def describe_models(
    model: Annotated[str | None, typer.Argument(help='Only this one, with its options.')] = None,
    task: Annotated[str | None, typer.Option(help='Only those for it: image-to-image ...')] = None,
    as_json: Annotated[bool, typer.Option('--json', help='All of it, as JSON.')] = False,
) -> None:
    """List the pretrained models, or the model_options that one of them takes."""
    import json

    import finetuner
    from finetuner.console import print_model
    from finetuner.models.description import describe_backbone, describe_backbones
    from finetuner.models.zoo import get_backbone

    if model is None:
        if as_json:
            print(json.dumps(describe_backbones(task), indent=2))
        else:
            finetuner.describe_models(task)
        return
    if task is not None:
        raise ConfigError('a model has one task: leave out --task, or the name of the model')
    described = describe_backbone(get_backbone(model))
    if as_json:
        print(json.dumps(described, indent=2))
    else:
        print_model(described)


if __name__ == '__main__':
    main()
