"""The command `finetuner data`: look at training data before training on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetuner.excepts import ConfigError, DataError

if TYPE_CHECKING:
    from finetuner.data.csv import CSVOptions

app = typer.Typer(
    help='Look at training data: what it holds, and what is wrong with it.',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_File = Annotated[
    Path,
    typer.Argument(
        exists=True,
        help='.csv, .tsv, .jsonl, .ndjson, .parquet, .docs, .db, .sqlite, .sqlite3, or a folder '
        'of pictures.',
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
