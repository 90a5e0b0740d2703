"""Where the boxes and lines of a picture of columns go: in layers, each after those it is computed from.

As graphviz does it (Gansner et al., A Technique for Drawing Directed Graphs, 1993): layers and places
are linear programs, which scipy solves; the order in a layer is swept back and forth for few crossings.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# pixels between layers, between boxes of one, and of a line that passes one
_LAYER_GAP, _BOX_GAP, _LANE_GAP = 56.0, 16.0, 12.0
# what is wider is drawn downwards instead, if that is narrower
_COMFORTABLE_WIDTH = 1100.0
_NUM_SWEEPS = 24
_MOST_SWAPPED = 1500
_LEAST_SPREAD = 8.0

Point = tuple[float, float]
Item = Hashable


@dataclass(frozen=True)
class Box:
    """A rectangle: its upper left corner and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """Where everything goes.

    Attributes:
        width: of all, in pixels.
        height: of all.
        boxes: by name.
        lines: of each edge its curves, each from a point to another, with straight lines between them.
        is_downwards: whether layers lie below each other, not side by side.
    """

    width: float
    height: float
    boxes: Mapping[str, Box]
    lines: Mapping[tuple[str, str], Sequence[tuple[Point, Point]]]
    is_downwards: bool


@dataclass(frozen=True)
class _Lane:
    """Where lines from a box pass a layer."""

    source: str
    layer: int


def lay_out(sizes: Mapping[str, tuple[float, float]], edges: Sequence[tuple[str, str]]) -> Layout:
    """Place boxes and lines so that no box lies on another one or on a line.

    Args:
        sizes: width and height of each box, in pixels; those that share a layer are made alike.
        edges: from box to box, without circles.
    """
    sideways = _laid_out(sizes, edges, False)
    if sideways.width <= _COMFORTABLE_WIDTH:
        return sideways
    downwards = _laid_out(sizes, edges, True)
    return downwards if downwards.width < sideways.width else sideways


def _laid_out(
    sizes: Mapping[str, tuple[float, float]], edges: Sequence[tuple[str, str]], is_downwards: bool
) -> Layout:
    joined = {name for edge in edges for name in edge}
    turned = {
        name: (height, width) if is_downwards else (width, height)
        for name, (width, height) in sizes.items()
        if name in joined
    }
    layers, segments = _layers(list(turned), edges)
    layers = _ordered(layers, segments)
    across = _places(layers, segments, {name: size[1] for name, size in turned.items()})
    starts, lengths, along = [], [], 0.0
    for layer in layers:
        starts.append(along)
        lengths.append(max(turned[item][0] for item in layer if isinstance(item, str)))
        # lines need room to turn
        num_lines = sum(source in layer for source, _ in segments)
        along += lengths[-1] + _LAYER_GAP + min(_LAYER_GAP, 2.0 * num_lines)
    boxes, ends = {}, {}
    for number, layer in enumerate(layers):
        for item in layer:
            ends[item] = (starts[number], starts[number] + lengths[number])
            if isinstance(item, str):
                height = turned[item][1]
                boxes[item] = Box(
                    starts[number], across[item] - height / 2, lengths[number], height
                )
    lines = _lines(edges, layers, boxes, ends, across)
    if is_downwards:
        boxes = {name: Box(box.y, box.x, box.height, box.width) for name, box in boxes.items()}
        lines = {
            edge: [(start[::-1], end[::-1]) for start, end in curves]
            for edge, curves in lines.items()
        }
    width, height = _extent(boxes)
    alone = {name: size for name, size in sizes.items() if name not in joined}
    boxes.update(_grid(alone, width, height + _LAYER_GAP if boxes else 0.0))
    return Layout(*_extent(boxes), boxes, lines, is_downwards)


def _extent(boxes: Mapping[str, Box]) -> tuple[float, float]:
    return (
        max((box.x + box.width for box in boxes.values()), default=0.0),
        max((box.y + box.height for box in boxes.values()), default=0.0),
    )


def _grid(sizes: Mapping[str, tuple[float, float]], width: float, top: float) -> dict[str, Box]:
    """Boxes that have no lines, in rows."""
    if not sizes:
        return {}
    wide = max(each for each, _ in sizes.values())
    high = max(each for _, each in sizes.values())
    room = max(width, min(_COMFORTABLE_WIDTH, (wide + _BOX_GAP) * len(sizes) ** 0.5 * 1.5))
    num_columns = max(1, int((room + _BOX_GAP) // (wide + _BOX_GAP)))
    boxes = {}
    for place, name in enumerate(sizes):
        row, column = divmod(place, num_columns)
        boxes[name] = Box(column * (wide + _BOX_GAP), top + row * (high + _BOX_GAP), wide, high)
    return boxes


# ---- layers


def _layers(
    names: Sequence[str], edges: Sequence[tuple[str, str]]
) -> tuple[list[list[Item]], list[tuple[Item, Item]]]:
    """Layers that make the lines short, with a lane where one passes; and the pieces of the lines."""
    if not names:
        return [], []
    depth = _depths(names, edges)
    layers: list[list[Item]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in names:
        layers[depth[name]].append(name)
    segments: dict[tuple[Item, Item], None] = {}
    for source, target in edges:
        # lines from one box pass a layer together
        chain = _chain(source, target, depth[source], depth[target])
        for item, after in pairwise(chain):
            segments[(item, after)] = None
            if isinstance(after, _Lane) and after not in layers[after.layer]:
                layers[after.layer].append(after)
    return layers, list(segments)


def _chain(source: str, target: str, start: int, end: int) -> list[Item]:
    return [source, *(_Lane(source, layer) for layer in range(start + 1, end)), target]


def _depths(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    import numpy as np
    from scipy.optimize import linprog

    number = {name: place for place, name in enumerate(names)}
    bounds = np.zeros((len(edges), len(names)))
    for row, (source, target) in enumerate(edges):
        bounds[row, number[source]], bounds[row, number[target]] = 1, -1
    # each is one after the other at least; the sum of all distances is least
    found = linprog(-bounds.sum(axis=0), A_ub=bounds, b_ub=-np.ones(len(edges)), method='highs-ds')
    return {name: round(found.x[place]) for name, place in number.items()}


# ---- order


class _Neighbours:
    """What is joined to an item in the layer before it, and in the one after it."""

    def __init__(self, segments: Sequence[tuple[Item, Item]]) -> None:
        self.before: dict[Item, list[Item]] = {}
        self.after: dict[Item, list[Item]] = {}
        for source, target in segments:
            self.after.setdefault(source, []).append(target)
            self.before.setdefault(target, []).append(source)


def _ordered(layers: list[list[Item]], segments: Sequence[tuple[Item, Item]]) -> list[list[Item]]:
    near = _Neighbours(segments)
    best = _begun(layers, near)
    fewest = _num_crossings(best, near)
    for start in (best, layers):
        swept = start
        for turn in range(_NUM_SWEEPS if fewest else 0):
            swept = _swept(swept, near, turn)
            count = _num_crossings(swept, near)
            if count < fewest:
                best, fewest = swept, count
    return best


def _swept(layers: Sequence[Sequence[Item]], near: _Neighbours, turn: int) -> list[list[Item]]:
    """Order each layer by the one before it, or every other time by the one after it."""
    swept = [list(layer) for layer in layers]
    if turn % 2 == 0:
        for number in range(1, len(swept)):
            _sort(swept[number], swept[number - 1], near.before, turn % 4 > 1)
    else:
        for number in range(len(swept) - 2, -1, -1):
            _sort(swept[number], swept[number + 1], near.after, turn % 4 > 1)
    if sum(map(len, swept)) <= _MOST_SWAPPED:
        _swap(swept, near)
    return swept


def _begun(layers: Sequence[Sequence[Item]], near: _Neighbours) -> list[list[Item]]:
    """What hangs together lies together."""
    number: dict[Item, int] = {}
    for first in (item for layer in layers for item in layer):
        waiting = [first]
        while waiting:
            item = waiting.pop()
            if item not in number:
                number[item] = len(number)
                waiting += reversed([*near.after.get(item, []), *near.before.get(item, [])])
    return [sorted(layer, key=number.__getitem__) for layer in layers]


def _sort(
    layer: list[Item], fixed: Sequence[Item], near: Mapping[Item, list[Item]], turns: bool
) -> None:
    """Order a layer by where its neighbours are; what has none there keeps its place.

    What is equal keeps its order, or is turned about, so that something else is tried.
    """
    place = {item: number for number, item in enumerate(fixed)}
    mean = {
        item: sum(place[each] for each in near[item]) / len(near[item])
        for item in (reversed(layer) if turns else layer)
        if item in near
    }
    moved = iter(sorted(mean, key=mean.__getitem__))
    layer[:] = [next(moved) if item in mean else item for item in layer]


def _swap(layers: Sequence[list[Item]], near: _Neighbours) -> None:
    """Exchange neighbours as long as that saves crossings."""
    place = {item: number for layer in layers for number, item in enumerate(layer)}
    is_better = True
    while is_better:
        is_better = False
        for layer in layers:
            for number, (one, other) in enumerate(pairwise(list(layer))):
                one, other = layer[number], layer[number + 1]
                saved = 0
                for beside in (near.before, near.after):
                    mine = sorted(place[each] for each in beside.get(one, []))
                    theirs = sorted(place[each] for each in beside.get(other, []))
                    saved += _inversions(mine, theirs) - _inversions(theirs, mine)
                if saved > 0:
                    layer[number], layer[number + 1] = other, one
                    place[one], place[other] = number + 1, number
                    is_better = True


def _inversions(first: Sequence[int], second: Sequence[int]) -> int:
    """Crossings of lines to these places from two items, the first of which lies before the second."""
    return sum(len(first) - bisect_right(first, each) for each in second)


def _num_crossings(layers: Sequence[Sequence[Item]], near: _Neighbours) -> int:
    count = 0
    for layer, following in pairwise(layers):
        place = {item: number for number, item in enumerate(following)}
        seen: list[int] = []
        for item in layer:
            mine = [place[each] for each in near.after.get(item, [])]
            count += sum(len(seen) - bisect_right(seen, each) for each in mine)
            for each in mine:
                insort(seen, each)
    return count


# ---- places


def _places(
    layers: Sequence[Sequence[Item]],
    segments: Sequence[tuple[Item, Item]],
    heights: Mapping[str, float],
) -> dict[Item, float]:
    """The middle of each item across the layers: lines are as straight as the order allows."""
    if not layers:
        return {}
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    number = {item: place for place, item in enumerate(each for layer in layers for each in layer)}
    rows: list[tuple[list[tuple[int, float]], float]] = []
    half = {item: heights[item] / 2 if isinstance(item, str) else 0.0 for item in number}
    for layer in layers:
        for one, other in pairwise(layer):
            are_boxes = isinstance(one, str) and isinstance(other, str)
            gap = _BOX_GAP if are_boxes else _LANE_GAP
            least = half[one] + half[other] + gap
            rows.append(([(number[one], 1), (number[other], -1)], -least))
    weights = []
    for place, (source, target) in enumerate(segments, start=len(number)):
        # what is long is to be straight
        weights.append((1.0, 2.0, 8.0)[isinstance(source, _Lane) + isinstance(target, _Lane)])
        for sign in (1.0, -1.0):
            difference = [(number[source], sign), (number[target], -sign), (place, -1.0)]
            rows.append((difference, 0.0))
    cells = [(row, column, value) for row, (pairs, _) in enumerate(rows) for column, value in pairs]
    at_row, at_column, values = zip(*cells, strict=True)
    found = linprog(
        np.concatenate([np.zeros(len(number)), weights]),
        A_ub=csr_array((values, (at_row, at_column))),
        b_ub=[bound for _, bound in rows],
        method='highs',
    )
    middle = {item: float(found.x[place]) for item, place in number.items()}
    top = min(middle[item] - half[item] for item in number)
    return {item: place - top for item, place in middle.items()}


def _lines(
    edges: Sequence[tuple[str, str]],
    layers: Sequence[Sequence[Item]],
    boxes: Mapping[str, Box],
    ends: Mapping[Item, tuple[float, float]],
    across: Mapping[Item, float],
) -> dict[tuple[str, str], list[tuple[Point, Point]]]:
    depth = {item: number for number, layer in enumerate(layers) for item in layer}
    chains = {
        (source, target): _chain(source, target, depth[source], depth[target])
        for source, target in edges
    }
    arrivals: dict[str, list[tuple[str, str]]] = {}
    for edge in sorted(chains, key=lambda edge: across[chains[edge][-2]]):
        arrivals.setdefault(edge[1], []).append(edge)
    lines = {}
    for edge, chain in chains.items():
        points = [(ends[item], across[item]) for item in chain]
        mine = arrivals[edge[1]]
        # lines that arrive at a box arrive beside each other
        spread = min(_LEAST_SPREAD, boxes[edge[1]].height * 0.7 / len(mine))
        shift = (mine.index(edge) - (len(mine) - 1) / 2) * spread
        points[-1] = (points[-1][0], points[-1][1] + shift)
        lines[edge] = [
            ((out, one), (into, other)) for ((_, out), one), ((into, _), other) in pairwise(points)
        ]
    return lines
