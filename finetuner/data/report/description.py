"""What training data was found to hold, and how that is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from finetuner.console import console
from finetuner.data.documents import KIND_NAMES, DataKind

SCORE_BINS = 10

_MOST_SHOWN = 5
_BAR = 30


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some sizes."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True)
class ClassSizes:
    """How many Documents the classes have.

    Attributes:
        num_classes: different labels.
        sizes: Documents in a class.
        num_single: classes with one Document.
        biggest: label and Documents of the largest classes, largest first.
        histogram: (fewest Documents, most Documents, number of such classes), ascending.
    """

    num_classes: int
    sizes: Spread
    num_single: int
    biggest: tuple[tuple[int | str, int], ...]
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class DataDescription:
    """What training data holds, as `describe` found it.

    Attributes:
        kind: of the data; None when it is mixed, empty or cannot be read.
        reason: why it cannot be trained on as it is; empty when it can.
        num_documents: Documents.
        num_items: what batches are made of: Documents, roots and matches, or both of each pair.
        num_positives: matches labelled 1.
        num_negatives: matches labelled -1.
        num_pairs: Documents that are pairs.
        classes: of class data.
        scores: of scored pairs: number of pairs in each tenth of 0..1; empty for other kinds.
        contents: items by what they hold: text, tensor, blob, uri, nothing.
        shapes: tensors by shape and dtype.
        schemes: uris by scheme; `path` where there is none.
        formats: blobs by the picture format they begin like, or `unknown`.
        text_lengths: in characters.
        blob_sizes: in bytes.
        num_missing: uris whose file is not there.
        num_opened: tensors, blobs and files that were looked into, of `num_openable`.
        num_openable: how many there are.
        picture_formats: pictures among them by format.
        picture_sizes: widths and heights of these pictures in pixels.
        num_duplicate_ids: Documents whose id an earlier one has.
        problems: what stops training, the first of each sort.
        warnings: what does not, and is worth a look.
    """

    kind: DataKind | None
    reason: str
    num_documents: int
    num_items: int
    num_positives: int
    num_negatives: int
    num_pairs: int
    classes: ClassSizes | None
    scores: tuple[int, ...]
    contents: dict[str, int]
    shapes: dict[str, int]
    schemes: dict[str, int]
    formats: dict[str, int]
    text_lengths: Spread | None
    blob_sizes: Spread | None
    num_missing: int
    num_opened: int
    num_openable: int
    picture_formats: dict[str, int]
    picture_sizes: tuple[Spread, Spread] | None
    num_duplicate_ids: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def print_description(description: DataDescription, name: str = 'Training data') -> None:
    """Print a description.

    Args:
        description: what `describe` returned.
        name: of the data.
    """
    kind = KIND_NAMES[description.kind] if description.kind else 'no one kind of training data'
    console.print(f'[bold]{escape(name)}[/]: {escape(kind)}', soft_wrap=True, highlight=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(justify='right', style='cyan', no_wrap=True)
    facts.add_column(overflow='fold')
    for fact, value in _facts(description):
        facts.add_row(fact, escape(value))
    console.print(facts)
    classes = description.classes
    if classes:
        _print_bars(
            'Documents in a class',
            [
                (f'{low:,}' if low == high else f'{low:,} to {high:,}', number)
                for low, high, number in classes.histogram
            ],
            'classes',
        )
        biggest = [(repr(label)[:40], number) for label, number in classes.biggest]
        _print_bars('Largest classes', biggest, 'Documents')
    if description.scores:
        bounds = [f'{n / SCORE_BINS:.1f} to {(n + 1) / SCORE_BINS:.1f}' for n in range(SCORE_BINS)]
        _print_bars('Scores', list(zip(bounds, description.scores, strict=True)), 'pairs')
    for style, title, lines in (
        ('bold red', 'Problems', description.problems),
        ('bold yellow', 'Worth a look', description.warnings),
    ):
        if lines:
            console.print(f'[{style}]{title}[/]')
        for line in lines:
            console.print(f'- {escape(line)}', soft_wrap=True, highlight=False)
    if not description.problems:
        console.print('[green]No problems found.[/]')


def _facts(found: DataDescription) -> list[tuple[str, str]]:
    facts = [('Documents', f'{found.num_documents:,}'), ('items', f'{found.num_items:,}')]
    if found.num_positives or found.num_negatives:
        facts.append(
            (
                'matches',
                f'{found.num_positives:,} positive (1), {found.num_negatives:,} negative (-1)',
            )
        )
    if found.classes:
        facts.append(
            ('classes', f'{found.classes.num_classes:,}, of {_range(found.classes.sizes)}')
        )
    facts.append(('contents', _counts(found.contents) or 'none'))
    if found.shapes:
        facts.append(('tensors', _counts(found.shapes)))
    if found.text_lengths:
        facts.append(('text length', f'{_range(found.text_lengths)} characters'))
    if found.blob_sizes:
        facts.append(('blobs', f'{_counts(found.formats)}; {_range(found.blob_sizes)} bytes'))
    if found.schemes:
        missing = f'; {found.num_missing:,} missing' if found.num_missing else ''
        facts.append(('uris', f'{_counts(found.schemes)}{missing}'))
    if found.picture_sizes:
        width, height = found.picture_sizes
        facts.append(('pictures', _counts(found.picture_formats)))
        facts.append(('width', f'{_range(width)} pixels'))
        facts.append(('height', f'{_range(height)} pixels'))
    if found.num_openable:
        facts.append(('opened', sample_text(found.num_opened, found.num_openable)))
    if found.num_duplicate_ids:
        facts.append(('repeated ids', f'{found.num_duplicate_ids:,}'))
    return facts


def _range(spread: Spread) -> str:
    if spread.smallest == spread.largest:
        return f'{spread.smallest:,}'
    return f'{spread.smallest:,} to {spread.largest:,} (median {spread.median:,.0f})'


def _counts(counts: dict[str, int]) -> str:
    shown = list(counts.items())[:_MOST_SHOWN]
    more = f', {len(counts) - len(shown)} others' if len(counts) > len(shown) else ''
    return ', '.join(f'{name} {count:,}' for name, count in shown) + more


def _print_bars(title: str, rows: Sequence[tuple[str, int]], unit: str) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify='right', style='cyan')
    table.add_column(justify='right')
    table.add_column(style='green', no_wrap=True)
    largest = max(number for _, number in rows) or 1
    for name, number in rows:
        table.add_row(escape(name), f'{number:,}', '█' * round(_BAR * number / largest))
    console.print(f'[bold]{title}[/] [dim]({unit})[/]')
    console.print(table)


def sample_text(num_opened: int, num_all: int) -> str:
    """Name what was opened: `'1,000 contents of 20,000'`."""
    return f'{num_opened:,} contents' + (f' of {num_all:,}' if num_opened < num_all else '')
