"""The command `finetuner columns`: look at datasets declared as classes, without their classes."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuner.console import tell
from finetuner.excepts import ConfigError, NotFoundError

if TYPE_CHECKING:
    from rich.table import Table

    from finetuner.columns.inspecting import DatasetFile
    from finetuner.columns.looking import LookedRow
    from finetuner.columns.pruning import Pruned
    from finetuner.columns.states import ColumnState, DatasetState

app = typer.Typer(
    help='Look at datasets of finetuner.columns, and delete what they need no more.',
    no_args_is_help=True,
)

_Path = Annotated[Path, typer.Argument(help='The SQLite file: `sql_file` of @dataset.')]
_Dataset = Annotated[str | None, typer.Argument(help='Only this one.', show_default='all')]
_DatasetOption = Annotated[
    str | None, typer.Option('--dataset', '-d', help='Which, where the file has several.')
]
_Json = Annotated[bool, typer.Option('--json', help='As JSON, for programs.')]


@app.command()
def show(
    path: _Path,
    dataset: _Dataset = None,
    rows: Annotated[int, typer.Option(min=0, max=1000, help='First rows to show.')] = 0,
    as_json: _Json = False,
) -> None:
    """Show columns and types, rows, what is kept and what is stale, errors, sizes and places.

    Kept are values of functions as they were used last, stale those of functions as they were before.
    Nothing is computed or changed.
    """
    from finetuner.columns.inspecting import DatasetFile
    from finetuner.columns.looking import LONG, SHORT, look, plain_state, size_text
    from finetuner.console import console

    file = DatasetFile(path)
    states = file.states() if dataset is None else [file.state(dataset)]
    most = LONG if as_json else SHORT
    looked = {each.name: look(file, each.name, 0, rows, most) if rows else [] for each in states}
    if as_json:
        found = [
            plain_state(each)
            | ({'rows': [row.plain() for row in looked[each.name]]} if rows else {})
            for each in states
        ]
        shown = {'path': str(file.path), 'num_bytes': file.num_bytes, 'datasets': found}
        print(json.dumps(shown, indent=2))
        return
    print(f'{file.path}, {size_text(file.num_bytes)}')
    if not states:
        print('There is no dataset in it yet.')
    for state in states:
        print()
        print(f'{state.name}: {_counted(state.num_rows, "row")}')
        if state.num_files or any(each.is_file for each in state.columns):
            size = size_text(state.num_bytes - file.num_bytes)
            print(f'{_counted(state.num_files, "file")}, {size}, in {state.data_dir}')
        console.print(_table_of(state))
        _print_hints(path, state)
        for row in looked[state.name]:
            _print_row(row)


@app.command()
def errors(
    path: _Path,
    column: Annotated[str, typer.Argument(help='A derived column.')],
    dataset: _DatasetOption = None,
    traceback: Annotated[bool, typer.Option('--traceback', help='Where it was raised.')] = False,
    count: Annotated[int, typer.Option(min=1, help='Most that are shown.')] = 100,
    as_json: _Json = False,
) -> None:
    """List what went wrong when a column, or one that it is computed from, was computed."""
    from finetuner.columns.inspecting import DatasetFile

    file = DatasetFile(path)
    name = _dataset_of(file, dataset, column)
    found = file.errors(name, column, count=count + 1)
    if as_json:
        print(json.dumps([vars(each) for each in found[:count]], indent=2))
        return
    for failure in found[:count]:
        when = datetime.fromtimestamp(failure.at).strftime('%Y-%m-%d %H:%M')
        print(f'row {failure.row}, {failure.column}, {when}: {_harmless(failure.message).strip()}')
        if traceback:
            lines = _harmless(failure.traceback).splitlines()
            print('\n'.join(f'    {line}' for line in lines))
    if not found:
        print(f'Nothing went wrong with {column} of {name}.')
    elif len(found) > count:
        print(f'There are more: --count {10 * count} shows them.')


@app.command()
def graph(
    path: _Path,
    out: Annotated[Path, typer.Argument(help='To be written: .svg, or .dot for graphviz.')],
    dataset: _DatasetOption = None,
    as_json: _Json = False,
) -> None:
    """Draw the columns and what they are computed from."""
    from finetuner.columns.inspecting import DatasetFile

    file = DatasetFile(path)
    made = file.graph(_dataset_of(file, dataset))
    try:
        made.save(out)
    except OSError as error:
        raise ConfigError(f'{out} cannot be written: {error.strerror}') from error
    found = {'path': str(out), 'num_columns': len(made.nodes)}
    tell(found, as_json, f'{out}: {_counted(len(made.nodes), "column")} of {made.name}')


@app.command()
def prune(
    path: _Path,
    dataset: _Dataset = None,
    yes: Annotated[bool, typer.Option('--yes', '-y', help='Do not ask.')] = False,
    as_json: _Json = False,
) -> None:
    """Delete stale values, what removed derived columns left, and files that nothing names.

    Of each function the version stays that was asked for last: one that was edited since, and not used
    yet, counts as it was. `Dataset.prune()` takes functions as they are now. Rows stay, and so do fields
    that were removed.
    """
    from finetuner.columns.inspecting import DatasetFile
    from finetuner.columns.pruning import prune_file

    file = DatasetFile(path)
    states = file.states() if dataset is None else [file.state(dataset)]
    if not yes:
        names = ', '.join(each.name for each in states)
        values = _counted(sum(map(_num_doomed, states)), 'value')
        question = f'Delete {values} of {names}, and files that nothing names?'
        typer.confirm(question, abort=True, err=as_json)
    pruned = {each.name: prune_file(file, each.name) for each in states}
    if as_json:
        print(json.dumps({name: vars(each) for name, each in pruned.items()}, indent=2))
        return
    for name, each in pruned.items():
        print(f'{name}: {_told(each)}')


def _dataset_of(file: DatasetFile, dataset: str | None, column: str | None = None) -> str:
    """The dataset that is meant: the one of this name, or the only one, or that with the column."""
    if dataset is not None:
        return dataset
    names = file.names()
    having = [
        name
        for name in names
        if column is None
        or any(each.is_derived and each.name == column for each in file.columns(name))
    ]
    if len(having) > 1:
        raise ConfigError(f'{file.path} has several: say --dataset, one of {", ".join(having)}')
    if not names:
        raise NotFoundError(f'{file.path} has no dataset yet')
    # a column that none has is told by the first
    return having[0] if having else names[0]


def _table_of(state: DatasetState) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from finetuner.columns.looking import size_text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ('column', 'type', 'computed from'):
        table.add_column(name, overflow='fold')
    for name in ('kept', 'stale', 'errors', 'size'):
        table.add_column(name, justify='right', no_wrap=True)
    for each in state.columns:
        table.add_row(
            escape(each.name) + (' [dim](removed)[/dim]' if each.is_removed else ''),
            escape(each.type),
            escape(', '.join(each.inputs)) if each.is_derived else '[dim]field[/dim]',
            f'{each.num_kept:,}',
            _some(each.num_stale, 'yellow'),
            _some(each.num_errors, 'red'),
            size_text(each.num_bytes),
        )
    return table


def _some(count: int, style: str) -> str:
    return f'[{style}]{count:,}[/{style}]' if count else ''


def _print_hints(path: Path, state: DatasetState) -> None:
    failing = next((each.name for each in state.columns if each.num_errors), None)
    if failing is not None:
        print(f'What went wrong: finetuner columns errors {path} {failing}')
    if _num_doomed(state):
        print(f'What is stale, or removed, is deleted by: finetuner columns prune {path}')


def _num_doomed(state: DatasetState) -> int:
    """Values that prune deletes, those of rows that are gone aside."""

    def of(column: ColumnState) -> int:
        kept = column.num_kept if column.is_removed and column.is_derived else 0
        return kept + column.num_stale

    return sum(map(of, state.columns))


def _print_row(row: LookedRow) -> None:
    from rich.table import Table
    from rich.text import Text

    from finetuner.console import console

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, max_width=24, overflow='ellipsis')
    table.add_column(overflow='fold')
    styles = {'lost': 'red', 'failed': 'red', 'missing': 'dim'}
    for name, cell in row.cells.items():
        text = f'error: {cell.text}' if cell.kind == 'failed' else cell.text
        table.add_row(f'  {name}', Text(_harmless(text), styles.get(cell.kind, '')))
    print(f'row {row.id}')
    console.print(table)


def _told(pruned: Pruned) -> str:
    from finetuner.columns.looking import size_text

    text = (
        f'{_counted(pruned.num_values, "value")} and {_counted(pruned.num_files, "file")}, '
        f'{size_text(pruned.num_bytes)}, are deleted'
    )
    if pruned.shared_with:
        others = ', '.join(pruned.shared_with)
        text += f'; files stay, for datasets in other SQLite files are kept there too: {others}'
    return text


def _harmless(text: str) -> str:
    """Without what a terminal would obey: anything may stand in values and messages."""
    return ''.join(each if each.isprintable() or each == '\n' else '\ufffd' for each in text)


def _counted(count: int, what: str) -> str:
    return f'{count:,} {what}{"" if count == 1 else "s"}'
