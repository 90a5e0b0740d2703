"""The command `finetuner alias`: names for artifacts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from finetuner.console import tell

app = typer.Typer(help='Names for models, such as emoji@production.', no_args_is_help=True)

_Alias = Annotated[str, typer.Argument(help='name@label, such as emoji@production.')]
_Json = Annotated[bool, typer.Option('--json', help='As JSON, for programs.')]


@app.command('set')
def set_alias(
    alias: _Alias,
    model: Annotated[str, typer.Argument(help='An artifact id, another alias, or a run.')],
    experiment: Annotated[
        str | None,
        typer.Option(
            '--experiment', '-e', help='Of the run.', show_default='what stands before the @'
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Have an alias stand for a model; one that is there moves."""
    import finetuner
    from finetuner.names import ARTIFACT_ID, is_alias

    if experiment is None and (ARTIFACT_ID.fullmatch(model) or is_alias(model)):
        found = finetuner.set_alias(alias, model)
    else:
        run = finetuner.get_run(model, experiment or alias.rpartition('@')[0])
        found = finetuner.set_alias(alias, run)
    tell(found, as_json, f'{alias} is {found["artifact_id"]}, {_source(found)}')


@app.command('list')
def list_aliases(as_json: _Json = False) -> None:
    """List the aliases that were set; name@latest needs nobody to set it."""
    from rich import print as show_table
    from rich.markup import escape
    from rich.table import Table

    import finetuner

    found = finetuner.list_aliases()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table('alias', 'artifact id', 'run', 'experiment', 'set')
    for each in found:
        times = str(each['updated_at'])[:19].replace('T', ' ')
        place = escape(each['run'] or ''), escape(each['experiment'] or '')
        table.add_row(escape(each['alias']), each['artifact_id'], *place, times)
    show_table(table)


@app.command()
def delete(alias: _Alias, as_json: _Json = False) -> None:
    """Forget an alias; the model stays."""
    import finetuner

    finetuner.delete_alias(alias)
    tell({'alias': alias}, as_json, f'{alias} is forgotten')


def _source(found: dict) -> str:
    if found['run'] is None:
        return 'which no run made'
    return f'the model of run {found["run"]} of {found["experiment"]}'
