"""The commands about runs: fit, runs, show, logs, metrics, cancel, resume, delete, artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from finetuner.console import tell
from finetuner.excepts import ConfigError

Run = Annotated[str, typer.Argument(help='Name of the run.')]
ExperimentName = Annotated[
    str, typer.Option('--experiment', '-e', help='The experiment it belongs to.')
]
Json = Annotated[bool, typer.Option('--json', help='As JSON, for programs.')]


def add_commands(app: typer.Typer) -> None:
    """Put the commands into the app, in this order."""
    for command in (fit, runs, show, logs, metrics, cancel, resume, delete, artifact):
        app.command()(command)


def fit(
    model: Annotated[str, typer.Argument(help='See `finetuner describe-models`.')],
    data: Annotated[str, typer.Argument(help='A file or folder, or the name of pushed data.')],
    eval_data: Annotated[str | None, typer.Option(help='For the validation loss.')] = None,
    query_data: Annotated[str | None, typer.Option(help='To evaluate with.')] = None,
    index_data: Annotated[str | None, typer.Option(help='To evaluate with.')] = None,
    name: Annotated[str | None, typer.Option(help='Of the run; made up if left out.')] = None,
    experiment: ExperimentName = 'default',
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=2)] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    loss: Annotated[str | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    public: Annotated[bool, typer.Option('--public', help='Show it to other users.')] = False,
    option: Annotated[
        list[str] | None,
        typer.Option('--set', help='Any argument of fit: --set optimizer=AdamW, values as JSON.'),
    ] = None,
    follow: Annotated[bool, typer.Option('--follow', '-f', help='Print the log.')] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on labelled data: a run on this machine, or on the server of the login.

    With --follow the exit code is 1 when the run fails.
    """
    import finetuner
    from finetuner.callback import EvaluationCallback

    given: dict[str, Any] = {
        'eval_data': eval_data,
        'run_name': name,
        'experiment_name': experiment,
        'batch_size': batch_size,
        'learning_rate': learning_rate,
        'loss': loss,
        'seed': seed,
        'public': public,
        **({'epochs': epochs} if epochs is not None else {}),
        **_options(option or ()),
    }
    if query_data is not None:
        given['callbacks'] = [EvaluationCallback(query_data, index_data)]
    elif index_data is not None:
        raise ConfigError('--index-data is what --query-data is looked for in: give both')
    run = finetuner.fit(model, data, **given)
    if not follow:
        tell(
            {'run': run.name, 'experiment': run.experiment_name},
            as_json,
            f'{run.name} is on its way: finetuner logs {run.name} -f -e {run.experiment_name}',
        )
        return
    for line in run.stream_logs():
        print(line, flush=True)
    if run.status()['status'] != 'FINISHED':
        raise typer.Exit(1)


def runs(
    experiment: Annotated[str | None, typer.Option('--experiment', '-e', help='Only its.')] = None,
    page: Annotated[int, typer.Option(min=1, help='1 is the newest.')] = 1,
    as_json: Json = False,
) -> None:
    """List runs, newest first."""
    from rich import print as show_table
    from rich.markup import escape
    from rich.table import Table

    from finetuner.client import get_client

    found = get_client().list_runs(experiment, page)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table('run', 'experiment', 'status', 'created', 'artifact id')
    for run in found:
        times = str(run['created_at'])[:19].replace('T', ' ')
        names = escape(run['name']), escape(run['experiment_name'])
        table.add_row(*names, run['status'], times, run['artifact_id'])
    show_table(table)


def show(run: Run, experiment: ExperimentName = 'default', as_json: Json = False) -> None:
    """Show a run: its status, what it was told and how far it is."""
    from finetuner.client import get_client

    found = get_client().get_run(experiment, run)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(f'{name}:')
            for key, item in value.items():
                print(f'  {key}: {json.dumps(item)}')
        else:
            print(f'{name}: {"" if value is None else value}')


def logs(
    run: Run,
    experiment: ExperimentName = 'default',
    follow: Annotated[bool, typer.Option('--follow', '-f', help='Until the run ends.')] = False,
    as_json: Annotated[bool, typer.Option('--json', help='Each line as a JSON text.')] = False,
) -> None:
    """Print the log of a run."""
    from finetuner.client import get_client

    client = get_client()
    write = json.dumps if as_json else str
    try:
        if follow:
            lines = client.stream_run_logs(experiment, run)
        else:
            lines = iter(client.get_run_logs(experiment, run).splitlines())
        for line in lines:
            print(write(line), flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def metrics(run: Run, experiment: ExperimentName = 'default', as_json: Json = False) -> None:
    """Print how well a run's model finds things, before and after, and whether that is chance."""
    import finetuner
    from finetuner.client import get_client

    if as_json:
        print(json.dumps(get_client().get_run_metrics(experiment, run), indent=2))
        return
    finetuner.get_run(run, experiment).display_metrics()


def cancel(run: Run, experiment: ExperimentName = 'default', as_json: Json = False) -> None:
    """End a run that is going, or waits."""
    from finetuner.client import get_client

    found = get_client().cancel_run(experiment, run)
    tell(found, as_json, f'{run} is {found["status"]}: {found["details"]}')


def resume(run: Run, experiment: ExperimentName = 'default', as_json: Json = False) -> None:
    """Go on with a run that failed, from its last checkpoint."""
    from finetuner.client import get_client

    found = get_client().resume_run(experiment, run)
    tell(found, as_json, f'{run} goes on: finetuner logs {run} --follow shows how')


def delete(
    run: Run,
    experiment: ExperimentName = 'default',
    yes: Annotated[bool, typer.Option('--yes', '-y', help='Do not ask.')] = False,
    as_json: Json = False,
) -> None:
    """Delete an ended run with its log, metrics and artifact."""
    from finetuner.client import get_client

    if not yes:
        typer.confirm(f'Delete {run} of {experiment}, its log, metrics and model?', abort=True)
    get_client().delete_run(experiment, run)
    tell({'run': run, 'experiment': experiment}, as_json, f'{run} is deleted')


def artifact(
    run: Run,
    directory: Annotated[Path, typer.Argument(help='Where to; made if missing.')] = Path(
        'artifacts'
    ),
    experiment: ExperimentName = 'default',
    as_json: Json = False,
) -> None:
    """Write a run's model as a zip."""
    import finetuner

    handle = finetuner.get_run(run, experiment)
    path = handle.save_artifact(str(directory))
    tell({'path': path, 'artifact_id': handle.artifact_id}, as_json, path)


def _options(given: list[str] | tuple[()]) -> dict[str, Any]:
    """`name=value` pairs, values as JSON where they are such."""
    options = {}
    for pair in given:
        name, equals, value = pair.partition('=')
        if not equals:
            raise ConfigError(f'--set {pair}: it takes name=value, such as --set epochs=3')
        try:
            options[name.replace('-', '_')] = json.loads(value)
        except ValueError:
            options[name.replace('-', '_')] = value
    return options
