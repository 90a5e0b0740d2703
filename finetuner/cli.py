"""The command `finetuner`: serve, and look at runs, models and training data."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from finetuner import (
    alias_cli,
    columns_cli,
    data_cli,
    encode_cli,
    export_cli,
    runs_cli,
    search_cli,
    server_cli,
)
from finetuner.excepts import ConfigError, FinetunerError

app = typer.Typer(
    help='Fine-tune embedding models on your own labelled data and serve them.',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)

runs_cli.add_commands(app)
app.command()(encode_cli.encode)
search_cli.add_commands(app)
server_cli.add_commands(app)
app.add_typer(data_cli.app, name='data')
app.add_typer(columns_cli.app, name='columns')
app.add_typer(alias_cli.app, name='alias')
app.add_typer(export_cli.app, name='export')


def main() -> None:
    """Run the command line; what went wrong on purpose is one line on stderr and exit code 2."""
    try:
        app()
    except FinetunerError as error:
        print(f'finetuner: {error}', file=sys.stderr)
        sys.exit(2)


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
