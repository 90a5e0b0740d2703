"""The commands about servers: serve, login, logout, and tokens of users."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuner.console import tell

if TYPE_CHECKING:
    from finetuner.storage.tokens import TokenStore

_DEFAULT_FLOW = Path('flows/train-and-encode.yml')

tokens_app = typer.Typer(
    help='Tokens that let users of a server on this machine in.', no_args_is_help=True
)


def add_commands(app: typer.Typer) -> None:
    """Put the commands into the app."""
    for command in (serve, login, logout):
        app.command()(command)
    app.add_typer(tokens_app, name='token')


def serve(
    flow: Annotated[Path, typer.Argument(help='Flow to start.')] = _DEFAULT_FLOW,
    host: Annotated[
        str | None,
        typer.Option(show_default="the Flow's", help='Address that the gateway binds.'),
    ] = None,
) -> None:
    """Start a Flow and serve it until Ctrl+C or SIGTERM."""
    from finetuner.server.serve import serve_flow

    serve_flow(flow, host)


def login(
    host: Annotated[str, typer.Argument(help='Such as http://127.0.0.1:51080.')],
    token: Annotated[
        str, typer.Option(help='Asked for when left out.', envvar='FINETUNER_TOKEN')
    ] = '',
) -> None:
    """Send runs to a server from now on, those of Python scripts too."""
    import finetuner

    # a token on the command line stays in the history of the shell
    given = token or typer.prompt('Token (empty for a server without)', '', hide_input=True)
    finetuner.login(host=host, token=given)


def logout() -> None:
    """Keep runs on this machine again."""
    import finetuner

    finetuner.logout()
    print('Runs go on this machine.')


@tokens_app.command()
def create(
    user: Annotated[str, typer.Argument(help='Whose runs and data it gives access to.')],
    scope: Annotated[str, typer.Option(help='read, write or admin.')] = 'write',
    days: Annotated[float | None, typer.Option(help='Until it ends.', show_default='never')] = None,
    description: Annotated[str, typer.Option(help='For people.')] = '',
    as_json: Annotated[bool, typer.Option('--json', help='As JSON, for programs.')] = False,
) -> None:
    """Make a token; it is shown this once."""
    secret, token = _tokens().create(user, scope, days, description)
    if as_json:
        print(json.dumps({**asdict(token), 'token': secret}, indent=2))
        return
    print(secret)
    typer.echo(
        f'Token {token.id} of {user}, scope {scope}: keep it, it is not shown again.', err=True
    )


@tokens_app.command('list')
def list_tokens(
    user: Annotated[str | None, typer.Option(help='Only of this one.')] = None,
    as_json: Annotated[bool, typer.Option('--json', help='As JSON, for programs.')] = False,
) -> None:
    """List tokens, without their secrets."""
    from rich import print as show_table
    from rich.markup import escape
    from rich.table import Table

    found = _tokens().list(user)
    if as_json:
        print(json.dumps([asdict(token) for token in found], indent=2))
        return
    table = Table('token', 'user', 'scope', 'created', 'ends', 'last used', 'description')
    for token in found:
        ends = f'revoked {_day(token.revoked_at)}' if token.revoked_at else _day(token.expires_at)
        times = _day(token.created_at), ends or 'never', _day(token.used_at) or 'never'
        table.add_row(token.id, token.user, token.scope, *times, escape(token.description))
    show_table(table)


@tokens_app.command()
def revoke(
    token: Annotated[str, typer.Argument(help='Its id, or the token itself.')],
    as_json: Annotated[bool, typer.Option('--json', help='As JSON, for programs.')] = False,
) -> None:
    """End a token, at once."""
    ended = _tokens().revoke(token)
    tell(asdict(ended), as_json, f'{ended.id} of {ended.user} lets nobody in any more')


def _tokens() -> TokenStore:
    from finetuner.config import Settings
    from finetuner.storage.database import open_database
    from finetuner.storage.tokens import TokenStore

    return TokenStore(open_database(Settings.from_environment().database_url))


def _day(time: str | None) -> str:
    return (time or '')[:16].replace('T', ' ')
