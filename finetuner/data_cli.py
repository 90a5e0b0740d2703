"""The command `finetuner data`: look at training data before training on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetuner.console import tell
from finetuner.excepts import ConfigError, DataError

if TYPE_CHECKING:
    from finetuner.data.csv import CSVOptions

app = typer.Typer(
    help='Look at training data, what it holds and what is wrong with it; keep it under a name.',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _existing(file: Path) -> Path:
    from finetuner.data.patterns import is_pattern

    if not file.exists() and not is_pattern(str(file)):
        raise typer.BadParameter(f"Path '{file}' does not exist.")
    return file


_File = Annotated[
    Path,
    typer.Argument(
        callback=_existing,
        help='.csv, .tsv, .jsonl, .ndjson, .parquet, .tar, .docs, .db, .sqlite, .sqlite3, a folder of '
        "pictures, or a pattern of shards such as 'train-*.parquet'.",
    ),
]
_Labeled = Annotated[
    bool | None,
    typer.Option(
        '--labeled/--pairs',
        help='CSV: the second of two columns is a label, or another content.',
        show_default='--pairs',
    ),
]
_Encoding = Annotated[str | None, typer.Option(help='CSV: of the file.', show_default='utf-8')]
_Dialect = Annotated[
    str | None,
    typer.Option(help='CSV: auto, excel, excel-tab or unix.', show_default='auto'),
]
_Json = Annotated[bool, typer.Option('--json', help='As JSON, for programs.')]
_Size = Annotated[int | None, typer.Option(help='CSV: most rows read.', show_default='all')]


@app.command()
def check(
    file: _File,
    labeled: _Labeled = None,
    encoding: _Encoding = None,
    dialect: _Dialect = None,
    size: _Size = None,
    strict: Annotated[
        bool, typer.Option('--strict', help='Count what is worth a look as a problem too.')
    ] = False,
) -> None:
    """Describe training data and list what is wrong with it.

    The exit code is 0 when it can be trained on, 1 when not, 2 when the arguments are unusable.
    """
    with _exit_codes():
        from finetuner.data.report.describing import describe

        options = _csv_options(file, labeled, encoding, dialect, size)
        description = describe(file, options)
    if description.problems or (strict and description.warnings):
        raise typer.Exit(1)


@app.command()
def sheet(
    file: _File,
    picture: Annotated[Path, typer.Argument(help='To be written: .png or .jpg.')],
    labeled: _Labeled = None,
    encoding: _Encoding = None,
    dialect: _Dialect = None,
    size: _Size = None,
    columns: Annotated[int, typer.Option(help='Tiles side by side.')] = 8,
    rows: Annotated[int, typer.Option(help='Rows of tiles.')] = 8,
    tile: Annotated[int, typer.Option(help='Width and height of a tile in pixels.')] = 96,
    seed: Annotated[int, typer.Option(min=0, help='Of the draw.')] = 0,
) -> None:
    """Draw a sample of training data into one picture."""
    with _exit_codes():
        from finetuner.data.report.contact_sheet import save_contact_sheet
        from finetuner.data.sources import open_documents

        options = _csv_options(file, labeled, encoding, dialect, size)
        save_contact_sheet(open_documents(file, options), picture, columns, rows, tile, seed)
    typer.echo(f'{picture} is written.')


@app.command()
def push(
    file: _File,
    name: Annotated[str, typer.Argument(help='What `fit` and `pull` then know it by.')],
    labeled: _Labeled = None,
    encoding: _Encoding = None,
    dialect: _Dialect = None,
    size: _Size = None,
    public: Annotated[bool, typer.Option('--public', help='For other users too.')] = False,
    as_json: _Json = False,
) -> None:
    """Keep training data under a name, here or on the server of the login."""
    with _exit_codes():
        from finetuner.client import get_client
        from finetuner.data.sources import open_documents

        options = _csv_options(file, labeled, encoding, dialect, size)
        reference = get_client().push_data(open_documents(file, options), name, public)
    tell({'name': name, 'data': reference}, as_json, f'{name}: {reference}')


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help='Of pushed data, or sha256:...')],
    file: Annotated[Path, typer.Argument(help='To be written: .docs')],
    as_json: _Json = False,
) -> None:
    """Write pushed data into a file, which `fit` and `check` read."""
    with _exit_codes():
        from finetuner.client import get_client
        from finetuner.data.stored.storing import save_documents

        docs = get_client().load_data(name)
        save_documents(docs, file)
    found = {'path': str(file), 'num_documents': len(docs)}
    tell(found, as_json, f'{file}: {len(docs)} Documents')


@app.command('list')
def list_data(as_json: _Json = False) -> None:
    """List pushed data, newest first."""
    import json

    from finetuner.client import get_client

    found = get_client().list_data()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for each in found:
        times = each['created_at'][:16].replace('T', ' ')
        typer.echo(
            f'{times}  {each["num_documents"]:>9,}  {each["num_bytes"]:>14,} B  {each["name"]}'
        )


@app.command()
def forget(
    name: Annotated[str, typer.Argument(help='Of pushed data.')], as_json: _Json = False
) -> None:
    """Forget a name; runs that were trained on the data keep it."""
    with _exit_codes():
        from finetuner.client import get_client

        get_client().forget_data(name)
    tell({'name': name}, as_json, f'{name} is forgotten')


@app.command()
def clean(
    hours: Annotated[float, typer.Option(min=0, help='What is newer stays.')] = 24.0,
    dry_run: Annotated[bool, typer.Option('--dry-run', help='Delete nothing.')] = False,
    as_json: _Json = False,
) -> None:
    """Delete data of this machine that no name and no run refers to any more.

    Of collections: images that no pair has, archives that no release names, caches of collections that
    are gone. Of all: what killed processes left.
    """
    with _exit_codes():
        from finetuner.collections.garbage import collect_collection_garbage
        from finetuner.collections.local import LocalCollections
        from finetuner.config import Settings
        from finetuner.runs.garbage import collect_garbage
        from finetuner.runs.workspace import Workspace

        settings = Settings.from_environment()
        workspace = Workspace(settings)
        place = LocalCollections(settings, database=workspace.database)
        found = collect_garbage(workspace, hours * 3600, dry_run)
        ours = collect_collection_garbage(place, hours * 3600, dry_run)
        workspace.close()
    num_bytes = found.num_bytes + ours.num_bytes
    unfinished = found.unfinished + ours.unfinished
    what = (
        f'{len(found.data)} data sets, {len(ours.packs)} files of images, {len(ours.releases)} of '
        f'releases, {len(ours.caches)} caches and {len(unfinished)} unfinished pieces'
    )
    done = 'would be deleted' if dry_run else 'are deleted'
    shown = {**vars(found), **vars(ours), 'unfinished': unfinished, 'num_bytes': num_bytes}
    tell(shown, as_json, f'{what}, {num_bytes:,} bytes, {done}')


def _csv_options(
    file: Path, labeled: bool | None, encoding: str | None, dialect: str | None, size: int | None
) -> CSVOptions | None:
    """Make the options of a CSV file; others have none, and are refused any."""
    from finetuner.data.csv import CSVOptions
    from finetuner.data.sources import is_csv

    named = {'is_labeled': labeled, 'encoding': encoding, 'dialect': dialect, 'size': size}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if not given and not is_csv(file):
        return None
    # Pictures are looked at where they lie, not copied.
    return CSVOptions(convert_to_blob=False, **given)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn what goes wrong on purpose into one line on stderr and an exit code."""
    try:
        yield
    except DataError as error:
        typer.echo(f'finetuner: {error}', err=True)
        raise typer.Exit(1) from error
    except ConfigError as error:
        typer.echo(f'finetuner: {error}', err=True)
        raise typer.Exit(2) from error
    except OSError as error:
        typer.echo(f'finetuner: {error.filename or ""}: {error.strerror or error}', err=True)
        raise typer.Exit(2) from error
