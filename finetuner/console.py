"""What is printed on the terminal: tables of metrics, example results and models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetuner.significance import change_text

console = Console()
# smaller files are there before a bar could be read
_LEAST_BYTES_OF_A_BAR = 4 << 20


@contextmanager
def transfer_progress(title: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on the terminal while a file travels; nothing where there is no terminal.

    Args:
        title: before the bar.
        num_bytes: in all.

    Yields:
        A function that takes the number of bytes that are there.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(escape(title)), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = num_bytes < _LEAST_BYTES_OF_A_BAR or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as progress:
        task = progress.add_task('', total=num_bytes)
        yield lambda there: progress.update(task, completed=there)


def print_metrics(stage: str, metrics: Mapping[str, float]) -> None:
    """Print retrieval metrics as a table.

    Args:
        stage: 'before' or 'after'.
        metrics: values by name.
    """
    table = _titled(f'Retrieval metrics {stage} fine-tuning:')
    table.add_column('Retrieval Metric', style='cyan', overflow='fold')
    table.add_column('Value', style='cyan', overflow='fold')
    for name, value in metrics.items():
        table.add_row(escape(name), str(value))
    console.print(table)


def print_changes(
    before: Mapping[str, float], after: Mapping[str, float], p_values: Mapping[str, float]
) -> None:
    """Print how far metrics changed, and how probable that would be by chance.

    Args:
        before: values by name.
        after: values by name.
        p_values: of the metrics to be shown, by name.
    """
    table = _titled('Change by fine-tuning (p: paired t-test over the queries):')
    table.add_column('Retrieval Metric', style='cyan', overflow='fold')
    table.add_column('Change', style='cyan', overflow='fold')
    for name, p_value in p_values.items():
        table.add_row(escape(name), change_text(before[name], after[name], p_value))
    console.print(table)


def print_examples(stage: str, results: Mapping[str, Sequence[Any]], k: int = 5) -> None:
    """Print example queries with their nearest matches.

    Args:
        stage: 'before' or 'after'.
        results: matches by query, nearest first.
        k: matches shown for each query, at most.
    """
    table = _titled(f'Results {stage} fine-tuning:')
    table.show_header = False
    table.add_column(style='cyan', overflow='fold')
    table.add_column(style='cyan', overflow='fold')
    for query, matches in results.items():
        table.add_row('Query', escape(str(query)), style='bold yellow')
        for rank, match in enumerate(matches[:k], start=1):
            table.add_row(f'Match {rank}', escape(str(match)))
    console.print(table)


def print_models(models: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of backbones for each task.

    Args:
        models: as `finetuner.models.description.describe_backbones` gives them.
    """
    for task in dict.fromkeys(model['task'] for model in models):
        rows = [_model_row(model) for model in models if model['task'] == task]
        print_model_table(rows, task)
    console.print('More of one, and the options it takes: finetuner describe-models NAME')


def _model_row(model: Mapping[str, Any]) -> dict[str, Any]:
    installed = model['weights'].startswith('the package')
    row = {'name': model['name'], 'dim': model['output_dim']}
    if model['input_size']:
        row['pixels'] = model['input_size']
    row['weights'] = 'installed' if installed else 'download'
    # on a narrow terminal it would push names and numbers into several lines
    return {**row, 'description': model['description']} if console.width >= 110 else row


def print_model_table(rows: Sequence[Mapping[str, Any]], task: str | None = None) -> None:
    """Print backbones, one a row; the columns are the keys of the first.

    Args:
        rows: what is to be shown of each backbone, by column title.
        task: shown in the title when only one task's backbones are listed.
    """
    table = _titled(f'Finetuner backbones: {task}' if task else 'Finetuner backbones')
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    columns = list(rows[0]) if rows else []
    for column in columns:
        numbers = all(isinstance(row.get(column), int) for row in rows)
        justify: Any = 'right' if numbers else 'left'
        # a name in two lines could not be copied
        longest = max(len(str(row.get(column, ''))) for row in rows)
        whole = column == 'name' and longest < console.width - 20
        table.add_column(column, style='cyan', overflow='fold', justify=justify, no_wrap=whole)
    for row in rows:
        table.add_row(*(escape(str(row.get(column, ''))) for column in columns))
    console.print(table)


def print_model(model: Mapping[str, Any]) -> None:
    """Print all there is to say of a backbone, and a table of the options it takes.

    Args:
        model: as `finetuner.models.description.describe_backbone` gives it.
    """
    console.print(f'[bold]{escape(model["name"])}[/bold]: {escape(model["description"])}')
    takes = f', takes {model["input_size"]} pixels' if model['input_size'] else ''
    facts = f'{model["task"]}, {model["architecture"]}, embeddings of {model["output_dim"]}{takes}'
    console.print(f'{facts}; weights: {escape(model["weights"])}\n')
    table = _titled('model_options')
    table.box = box.SIMPLE_HEAD
    for column, width in (('option', 18), ('value', 26), ('meaning', None)):
        table.add_column(column, min_width=width, overflow='fold')
    _add_options(table, model['options'])
    console.print(table)


def _add_options(table: Table, options: Sequence[Mapping[str, Any]], indent: str = '') -> None:
    for option in options:
        values = [option['type']]
        if option.get('options'):
            values.append(f'one of {", ".join(map(str, option["options"]))}')
        if option.get('range'):
            values.append(option['range'])
        values.append('required' if option['required'] else f'default {option["default"]}')
        table.add_row(
            f'[cyan]{indent}{escape(option["name"])}[/cyan]',
            escape('\n'.join(values)),
            escape(option['description']),
        )
        _add_options(table, option.get('fields', ()), f'{indent}  ')


def print_layers(layers: Sequence[Any]) -> None:
    """Print the layers of a model: trainable ones green, frozen ones cyan.

    Args:
        layers: as `finetuner.models.tailor.summary` gives them.
    """
    table = Table(title='Layers; * marks those whose output can be the embedding')
    for column in ('name', 'module', 'output shape', 'parameters', 'trainable'):
        table.add_column(column)
    for layer in layers:
        table.add_row(
            escape(f'{layer.name} *' if layer.is_embedding_layer else layer.name),
            escape(layer.module_name),
            str(list(layer.output_shape[1:])),
            f'{layer.num_parameters:,}',
            str(layer.trainable),
            style='green' if layer.trainable else 'cyan',
        )
    console.print(table)


def _titled(title: str) -> Table:
    # A title wider than its table would be broken into lines.
    return Table(title=title, title_justify='left', min_width=len(title))


def tell(found: dict[str, Any], as_json: bool, text: str) -> None:
    """Print what a command did: as JSON for programs, or in words.

    Args:
        found: what programs read.
        as_json: which of the two.
        text: what people read.
    """
    print(json.dumps(found, indent=2) if as_json else text)
