"""The graph of columns as a picture: as graphviz's source, and as an SVG that is drawn here."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from xml.sax.saxutils import escape, quoteattr

from finetuner.columns.declaring import Declaration
from finetuner.columns.layering import Box, Layout, lay_out
from finetuner.excepts import ConfigError, unknown_name

if TYPE_CHECKING:
    from finetuner.columns.batch_plans import Plan

Kind = Literal['field', 'derived', 'batch']


@dataclass(frozen=True)
class _Look:
    """How columns of a kind are drawn: by colour and by form, for those who see no colours."""

    words: str
    fill: str
    line: str
    radius: int
    # of graphviz
    shape: str
    style: str


_LOOKS: dict[Kind, _Look] = {
    'field': _Look('field', '#dcebf7', '#1f5f8b', 0, 'box', 'filled'),
    'derived': _Look('derived column', '#e3f3e6', '#1d7a46', 14, 'box', 'filled,rounded'),
    'batch': _Look('column of batches', '#fcefd2', '#8a5a00', 14, 'box3d', 'filled'),
}
_INK, _FAINT = '#15202b', '#46525f'
# seen on white and on black
_LINE = '#7d8794'
_FONT = 'ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace'
_NAME_SIZE, _TYPE_SIZE, _LEGEND_SIZE = 14, 12, 12
# of a monospaced letter, in parts of its size
_LETTER = 0.61
_MOST_OF_TYPE = 48
_MARGIN, _PADDING, _STACKED = 12, 14, 4
_ARROW = 7


@dataclass(frozen=True)
class ColumnNode:
    """A column in the picture.

    Attributes:
        name: of it.
        kind: `field`, `derived` or `batch`.
        type: of its values, as it is written; '' where none is said.
        inputs: keys of the columns that it is computed from.
        key: what other columns call it by; its name where that is left out.
    """

    name: str
    kind: Kind
    type: str = ''
    inputs: tuple[str, ...] = ()
    key: str = ''

    @property
    def id(self) -> str:
        """Its key, or its name."""
        return self.key or self.name


class ColumnGraph:
    """Columns and what they are computed from; a notebook shows it as a picture.

    Args:
        nodes: the columns, in any order.
        name: of the dataset or the batches.

    Raises:
        ConfigError: a name is there twice, an input is none of the columns, a kind is unknown, or columns
            are computed from each other in a circle.
    """

    def __init__(self, nodes: Iterable[ColumnNode], name: str = 'columns') -> None:
        self.nodes = tuple(nodes)
        self.name = name
        by_id = {node.id: node for node in self.nodes}
        if len(by_id) < len(self.nodes):
            twice = next(node.id for node in self.nodes if by_id[node.id] is not node)
            raise ConfigError(f'{name}: column {twice!r} is there twice')
        for node in self.nodes:
            if node.kind not in _LOOKS:
                raise ConfigError(unknown_name('kind of columns', node.kind, _LOOKS))
            for each in node.inputs:
                if each not in by_id:
                    raise ConfigError(f'{name}.{node.name}: {unknown_name("column", each, by_id)}')
        try:
            graphlib.TopologicalSorter({node.id: node.inputs for node in self.nodes}).prepare()
        except graphlib.CycleError as error:
            circle = ' -> '.join(error.args[1])
            raise ConfigError(f'{name}: columns are computed from themselves: {circle}') from error

    @property
    def edges(self) -> list[tuple[str, str]]:
        """From each input to what is computed from it, by key; each once."""
        return list(dict.fromkeys((each, node.id) for node in self.nodes for each in node.inputs))

    @cached_property
    def source(self) -> str:
        """The source of the picture for graphviz, as `dot` reads it."""
        lines = [
            f'digraph {_dot(self.name)} {{',
            '  rankdir=LR;',
            '  node [fontname="monospace" fontsize=11];',
            f'  edge [color="{_LINE}"];',
        ]
        for node in self.nodes:
            look = _LOOKS[node.kind]
            # labels know entities
            label = '\\n'.join(
                _dot(text.replace('&', '&amp;'))[1:-1] for text in (node.name, node.type) if text
            )
            lines.append(
                f'  {_dot(node.id)} [label="{label}" shape={look.shape} style="{look.style}" '
                f'fillcolor="{look.fill}" color="{look.line}" tooltip="{look.words}"];'
            )
        lines += [f'  {_dot(source)} -> {_dot(target)};' for source, target in self.edges]
        return '\n'.join([*lines, '}', ''])

    @cached_property
    def svg(self) -> str:
        """The picture as SVG, whole in itself: it is put into a page or a file as it is."""
        sizes = {node.id: _size(node) for node in self.nodes}
        return _Drawing(self, lay_out(sizes, self.edges)).text()

    def save(self, path: str | Path) -> Path:
        """Write the picture to a file.

        Args:
            path: ends in `.svg`, or in `.dot` or `.gv` for graphviz's source.

        Returns:
            The path.

        Raises:
            ConfigError: it ends otherwise.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in ('.svg', '.dot', '.gv'):
            raise ConfigError(
                f'{path}: pictures of columns are .svg, or .dot and .gv for graphviz, which makes any '
                'other: `dot -Tpng columns.dot -o columns.png`'
            )
        path.write_text(self.svg if ending == '.svg' else self.source, encoding='utf-8')
        return path

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        """How much there is."""
        return f'<graph of {len(self.nodes)} columns of {self.name}>'


def graph_of(declaration: Declaration) -> ColumnGraph:
    """The graph of a dataset."""
    return ColumnGraph(_nodes_of(declaration), declaration.name)


def graph_of_batches(name: str, plan: Plan) -> ColumnGraph:
    """The graph of batches: their columns, and those of the dataset that these are computed from.

    Args:
        name: of the class.
        plan: what it declares.
    """
    declaration = plan.dataset.declaration
    used = {each for function in plan.functions.values() for each in function.of_rows}
    order = declaration.ancestors(used)
    used |= {*order, *(each for column in order for each in declaration.derived[column].inputs)}
    # both may have a column of one name
    below = {
        each: f'{declaration.name}.{each}' if each in plan.functions else each for each in used
    }
    nodes = [
        ColumnNode(
            node.name,
            node.kind,
            node.type,
            tuple(below[each] for each in node.inputs),
            below[node.name],
        )
        for node in _nodes_of(declaration)
        if node.name in used
    ]
    for each in plan.functions.values():
        inputs = (*(below[column] for column in each.of_rows), *each.of_batch)
        nodes.append(ColumnNode(each.name, 'batch', each.returns, inputs))
    return ColumnGraph(nodes, name)


def _nodes_of(declaration: Declaration) -> list[ColumnNode]:
    fields = [
        ColumnNode(each.name, 'field', each.type.name) for each in declaration.fields.values()
    ]
    derived = [
        ColumnNode(each.name, 'derived', each.type.name, each.inputs)
        for each in declaration.derived.values()
    ]
    return [*fields, *derived]


def _dot(text: str) -> str:
    """A text between quotes, as graphviz reads it."""
    return '"' + _clean(text).replace('\\', '\\\\').replace('"', '\\"') + '"'


# ---- SVG


def _width(text: str, size: float) -> float:
    """Of a text in pixels; letters of East Asia are two wide."""
    from rich.cells import cell_len

    return cell_len(text) * size * _LETTER


def _short(type_name: str) -> str:
    return type_name if len(type_name) <= _MOST_OF_TYPE else f'{type_name[: _MOST_OF_TYPE - 1]}…'


def _size(node: ColumnNode) -> tuple[float, float]:
    wide = max(_width(node.name, _NAME_SIZE), _width(_short(node.type), _TYPE_SIZE))
    return wide + 2 * _PADDING, 2.0 * _PADDING + _NAME_SIZE + (_TYPE_SIZE + 6 if node.type else 0)


class _Drawing:
    """The text of an SVG. It has neither style sheets nor ids, which would reach out into a page."""

    def __init__(self, graph: ColumnGraph, layout: Layout) -> None:
        self._graph = graph
        self._layout = layout

    def text(self) -> str:
        """All of it."""
        kinds = [kind for kind in _LOOKS if any(node.kind == kind for node in self._graph.nodes)]
        legend, wide, high = self._legend(kinds) if len(kinds) > 1 else ([], 0.0, 0.0)
        width = max(self._layout.width + _STACKED, wide) + 2 * _MARGIN
        height = self._layout.height + _STACKED + high + 2 * _MARGIN
        title = _clean(f'Columns of {self._graph.name}')
        counts = ', '.join(
            f'{sum(node.kind == kind for node in self._graph.nodes)} of kind {_LOOKS[kind].words}'
            for kind in kinds
        )
        return '\n'.join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(width)}" height="{_n(height)}" '
                f'viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label={quoteattr(title)} '
                f'font-family={quoteattr(_FONT)}>',
                f'<title>{escape(title)}</title>',
                f'<desc>{_text(counts)}</desc>',
                f'<g transform="translate({_MARGIN} {_MARGIN})">',
                *map(self._edge, self._graph.edges),
                *map(self._node, self._graph.nodes),
                *legend,
                '</g>',
                '</svg>',
                '',
            ]
        )

    def _node(self, node: ColumnNode) -> str:
        box = self._layout.boxes[node.id]
        made_from = f', computed from {", ".join(node.inputs)}' if node.inputs else ''
        kind = f': {node.type}' if node.type else ''
        told = f'{node.name}{kind} ({_LOOKS[node.kind].words}{made_from})'
        middle = box.x + box.width / 2
        first = box.y + _PADDING + _NAME_SIZE * 0.8
        lines = [
            f'<g data-column={quoteattr(_clean(node.id))}>',
            f'<title>{_text(told)}</title>',
            *_frame(node.kind, box),
            _label(node.name, middle, first, _NAME_SIZE, f'fill="{_INK}" font-weight="600"'),
        ]
        if node.type:
            second = first + _TYPE_SIZE + 6
            lines.append(_label(_short(node.type), middle, second, _TYPE_SIZE, f'fill="{_FAINT}"'))
        return '\n'.join([*lines, '</g>'])

    def _edge(self, edge: tuple[str, str]) -> str:
        curves = self._layout.lines[edge]
        is_downwards = self._layout.is_downwards
        (x, y) = tip = curves[-1][1]
        # the line ends where its arrow begins
        curves = [
            *curves[:-1],
            (curves[-1][0], (x, y - _ARROW) if is_downwards else (x - _ARROW, y)),
        ]
        path: list[str] = []
        for (x1, y1), (x2, y2) in curves:
            if is_downwards:
                bend = (x1, (y1 + y2) / 2, x2, (y1 + y2) / 2)
            else:
                bend = ((x1 + x2) / 2, y1, (x1 + x2) / 2, y2)
            begin = 'L' if path else 'M'
            path.append(f'{begin}{_n(x1)} {_n(y1)}C{" ".join(map(_n, (*bend, x2, y2)))}')
        half = _ARROW * 0.55
        corners = [(x - half, y - _ARROW), (x + half, y - _ARROW)]
        if not is_downwards:
            corners = [(x - _ARROW, y - half), (x - _ARROW, y + half)]
        arrow = ' '.join(f'{_n(a)},{_n(b)}' for a, b in (tip, *corners))
        source, target = (quoteattr(_clean(each)) for each in edge)
        return (
            f'<g data-from={source} data-to={target}>'
            f'<path d="{"".join(path)}" fill="none" stroke="{_LINE}" stroke-width="1.6"/>'
            f'<polygon points="{arrow}" fill="{_LINE}"/></g>'
        )

    def _legend(self, kinds: list[Kind]) -> tuple[list[str], float, float]:
        """What the forms mean; its lines, and how wide and high it is."""
        lines, left, top = [], 0.0, self._layout.height + 26
        high = _LEGEND_SIZE + 12.0
        for kind in kinds:
            words = _LOOKS[kind].words
            box = Box(left, top, _width(words, _LEGEND_SIZE) + 2 * _PADDING, high)
            middle, base = box.x + box.width / 2, box.y + 6 + _LEGEND_SIZE * 0.85
            lines += _frame(kind, box)
            lines.append(_label(words, middle, base, _LEGEND_SIZE, f'fill="{_FAINT}"'))
            left += box.width + 14
        return lines, left - 14 + _STACKED, 26 + high


def _frame(kind: Kind, box: Box) -> list[str]:
    look = _LOOKS[kind]
    # batches are drawn as a stack
    shifts = (_STACKED, 0) if kind == 'batch' else (0,)
    radius = min(look.radius, box.height / 2)
    return [
        f'<rect x="{_n(box.x + shift)}" y="{_n(box.y + shift)}" width="{_n(box.width)}" '
        f'height="{_n(box.height)}" rx="{_n(radius)}" fill="{look.fill}" stroke="{look.line}" '
        'stroke-width="1.5"/>'
        for shift in shifts
    ]


def _label(text: str, middle: float, base: float, size: int, more: str) -> str:
    # whatever the font, it is as wide as its box was made for
    return (
        f'<text x="{_n(middle)}" y="{_n(base)}" font-size="{size}" text-anchor="middle" '
        f'textLength="{_n(_width(text, size))}" lengthAdjust="spacingAndGlyphs" {more}>'
        f'{_text(text)}</text>'
    )


def _n(number: float) -> str:
    return f'{number:.1f}'.removesuffix('.0')


def _clean(text: str) -> str:
    """Without what neither XML nor graphviz may hold."""
    return ''.join(each if each.isprintable() else '\N{REPLACEMENT CHARACTER}' for each in text)


def _text(text: str) -> str:
    return escape(_clean(text))
