"""A contact sheet: one picture that shows a sample of training data, labels and scores with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from docarray import Document

from finetuner.data.contents import SCORE_TAG, match_label, nested_documents
from finetuner.data.documents import KIND_NAMES
from finetuner.data.report.inventory import Inventory, take_inventory
from finetuner.data.report.items import items_of
from finetuner.data.report.sheet_drawing import FRAME, GAP, NEGATIVE, POSITIVE, Cell, Row, Sheet
from finetuner.excepts import ConfigError, DataError

_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG'}
_LIMITS = {'columns': 64, 'rows': 256, 'size': 512}
_MOST_PIXELS = 100_000_000


def save_contact_sheet(
    docs: Sequence[Document],
    path: str | Path,
    columns: int = 8,
    rows: int = 8,
    size: int = 96,
    seed: int = 0,
) -> None:
    """Draw a sample of training data into one picture, the same for the same data and seed.

    Class data stands by class, a row each. Sessions are a row each, the root first, then matches
    framed green (1) or red (-1). Pairs stand side by side over their score, text-image pairs as
    the picture over its text, everything else as a grid. What cannot be opened is a grey tile
    with the reason; pictures at http(s) addresses are fetched, but only those drawn.

    Args:
        docs: of any kind, good or bad; read once, and then the sample.
        path: of the picture to be written, ending in `.png`, `.jpg` or `.jpeg`.
        columns: tiles side by side, at least 2.
        rows: of tiles.
        size: width and height of a tile in pixels, at least 32.
        seed: of the draw.

    Raises:
        ConfigError: the path or a number is unusable.
        DataError: there are no Documents, or one cannot be read.
    """
    path = Path(path)
    _check(path, columns, rows, size)
    inventory = take_inventory(docs)
    if not inventory.num_documents:
        raise DataError(f'there is nothing to draw: {inventory.reason}')
    layout = _LAYOUTS.get(inventory.kind or '', _grid_rows)
    chosen = layout(docs, inventory, columns, rows, np.random.default_rng(seed))
    sheet = Sheet(chosen, size, _title(inventory, chosen))
    try:
        sheet.draw().save(path, _FORMATS[path.suffix.lower()])
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f'the contact sheet {str(path)!r} cannot be written: {reason}') from error


def _check(path: Path, columns: int, rows: int, size: int) -> None:
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(
            f'the contact sheet {str(path)!r} has the ending {path.suffix!r}: use '
            f'{", ".join(_FORMATS)}'
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f'the contact sheet {str(path)!r} cannot be written: there is no folder '
            f'{str(path.parent)!r}'
        )
    least = {'columns': 2, 'rows': 1, 'size': 32}
    for name, value in (('columns', columns), ('rows', rows), ('size', size)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ConfigError(f'{name}={value!r} is not a whole number')
        if not least[name] <= value <= _LIMITS[name]:
            raise ConfigError(f'{name}={value} is not from {least[name]} to {_LIMITS[name]}')
    pixels = columns * rows * (size + GAP) ** 2
    if pixels > _MOST_PIXELS:
        raise ConfigError(
            f'columns={columns}, rows={rows} and size={size} make {pixels:,} pixels, more than '
            f'the {_MOST_PIXELS:,} allowed'
        )


def _draw_from(count: int, most: int, rng: np.random.Generator) -> list[int]:
    """Choose positions, in order."""
    return np.sort(rng.choice(count, min(count, most), replace=False)).tolist()


def _class_rows(
    docs: Sequence[Document],
    inventory: Inventory,
    columns: int,
    rows: int,
    rng: np.random.Generator,
) -> list[Row]:
    numbers = np.array(inventory.class_numbers, dtype=np.int64)
    labels = list(inventory.classes)
    if not labels:
        return _grid_rows(docs, inventory, columns, rows, rng)
    found = []
    for number in _draw_from(len(labels), rows, rng):
        positions = np.flatnonzero(numbers == number)
        chosen = positions[_draw_from(len(positions), columns, rng)].tolist()
        found.append(Row([Cell(docs[position]) for position in chosen], str(labels[number])))
    return found


def _session_rows(
    docs: Sequence[Document],
    inventory: Inventory,
    columns: int,
    rows: int,
    rng: np.random.Generator,
) -> list[Row]:
    colours: dict[int | None, str] = {1: POSITIVE, -1: NEGATIVE}
    found = []
    for position in _draw_from(inventory.num_documents, rows, rng):
        root = docs[position]
        matches = nested_documents(root, 'matches')
        cells = [Cell(root)]
        for number in _draw_from(len(matches), columns - 1, rng):
            colour = colours.get(match_label(matches[number]), FRAME)
            cells.append(Cell(matches[number], colour))
        found.append(Row(cells, f'session {position}', frozenset({0})))
    return found


def _pair_rows(
    docs: Sequence[Document],
    inventory: Inventory,
    columns: int,
    rows: int,
    rng: np.random.Generator,
) -> list[Row]:
    pairs = columns // 2
    found: list[Row] = []
    for count, position in enumerate(_draw_from(inventory.num_documents, pairs * rows, rng)):
        if count % pairs == 0:
            found.append(Row(gaps_after=frozenset(range(1, 2 * pairs - 1, 2))))
        doc = docs[position]
        items = list(items_of(doc))[:2]
        items += [Document()] * (2 - len(items))
        score = doc.tags.get(SCORE_TAG)
        caption = f'{score:.2f}' if isinstance(score, (int, float)) else repr(score)
        found[-1].cells += [Cell(items[0], caption=caption), Cell(items[1])]
    return found


def _text_image_rows(
    docs: Sequence[Document],
    inventory: Inventory,
    columns: int,
    rows: int,
    rng: np.random.Generator,
) -> list[Row]:
    cells = []
    for position in _draw_from(inventory.num_documents, columns * rows, rng):
        items = items_of(docs[position])
        texts = [item for item in items if item.modality == 'text']
        others = [item for item in items if item.modality != 'text']
        caption = texts[0].text if texts else ''
        cells.append(Cell(others[0] if others else Document(), caption=caption or '-'))
    return _in_rows(cells, columns)


def _grid_rows(
    docs: Sequence[Document],
    inventory: Inventory,
    columns: int,
    rows: int,
    rng: np.random.Generator,
) -> list[Row]:
    positions = _draw_from(inventory.num_documents, columns * rows, rng)
    return _in_rows([Cell(items_of(docs[position])[0]) for position in positions], columns)


def _in_rows(cells: list[Cell], columns: int) -> list[Row]:
    return [Row(cells[start : start + columns]) for start in range(0, len(cells), columns)]


_Layout = Callable[[Sequence[Document], Inventory, int, int, np.random.Generator], list[Row]]
_LAYOUTS: dict[str, _Layout] = {
    'class': _class_rows,
    'session': _session_rows,
    'scored_pair': _pair_rows,
    'text_image_pair': _text_image_rows,
}


def _title(inventory: Inventory, rows: list[Row]) -> str:
    name = KIND_NAMES[inventory.kind] if inventory.kind else 'mixed data'
    name = name.partition(' (')[0]
    shown = sum(len(row.cells) for row in rows)
    total = f'of {inventory.num_documents:,}'
    if inventory.kind == 'class' and inventory.classes:
        classes = f'{len(rows)} of {len(inventory.classes):,} classes'
        return f'{name}: {classes}, {shown} {total} Documents'
    if inventory.kind == 'session':
        return f'sessions: {len(rows)} {total}'
    if inventory.kind == 'scored_pair':
        return f'{name}: {shown // 2} {total}'
    return f'{name}: {shown} {total}'
