"""The picture of columns: graphviz's source read back, and the SVG measured."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from itertools import combinations, permutations, product
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuner.columns import ColumnGraph, ColumnNode, File, batch, dataset
from finetuner.columns.layering import lay_out
from finetuner.excepts import ConfigError

torch = pytest.importorskip('torch')
SVG = '{http://www.w3.org/2000/svg}'
KINDS = ('field', 'derived', 'batch')
PNG, PICTURE = File['png'], File['png', 'webp']


def clean(text):
    """As pictures have it: neither XML nor graphviz takes control characters."""
    return ''.join(each if each.isprintable() else '\ufffd' for each in text)


@st.composite
def graphs(draw, most=18, most_inputs=3):
    """Any columns: names of all letters, each computed from some of those before it."""
    names = draw(
        st.lists(
            st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=30),
            min_size=1,
            max_size=most,
            unique_by=clean,
        )
    )
    nodes = []
    for place, name in enumerate(names):
        inputs = ()
        if place:
            chosen = st.lists(st.sampled_from(names[:place]), max_size=most_inputs, unique=True)
            inputs = tuple(draw(chosen))
        kind = draw(st.sampled_from(KINDS[1:])) if inputs else 'field'
        nodes.append(ColumnNode(name, kind, draw(st.text(max_size=70)), inputs))
    shuffled = draw(st.permutations(nodes))
    return ColumnGraph(shuffled, draw(st.text(max_size=10)))


# ---- graphviz

TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|->|[A-Za-z_]\w*|-?\d+(?:\.\d+)?|[{}\[\]=;])', re.DOTALL)


def tokens_of(source):
    found, place = [], 0
    while source[place:].strip():
        match = TOKEN.match(source, place)
        assert match, source[place : place + 40]
        found.append(match[1])
        place = match.end()
    return found


def unquoted(token):
    assert token[0] == token[-1] == '"'
    return re.sub(r'\\(.)', lambda found: {'n': '\n'}.get(found[1], found[1]), token[1:-1])


def read_dot(source):
    """Nodes with their attributes, and edges; only what `ColumnGraph` writes is known."""
    tokens = iter(tokens_of(source))
    assert next(tokens) == 'digraph'
    name = unquoted(next(tokens))
    assert next(tokens) == '{'
    nodes, edges = {}, []
    for token in tokens:
        if token == '}':
            assert next(tokens, None) is None
            return name, nodes, edges
        following = next(tokens)
        if token == 'rankdir':
            assert (following, next(tokens), next(tokens)) == ('=', 'LR', ';')
        elif following == '->':
            edges.append((unquoted(token), unquoted(next(tokens))))
            assert next(tokens) == ';'
        else:
            assert following == '['
            attributes = {}
            while (key := next(tokens)) != ']':
                assert next(tokens) == '='
                attributes[key] = next(tokens)
            assert next(tokens) == ';'
            if token not in ('node', 'edge'):
                nodes[unquoted(token)] = attributes
    raise AssertionError('the last brace is missing')


@given(graphs())
def test_the_source_for_graphviz_says_all_and_nothing_else(graph):
    name, nodes, edges = read_dot(graph.source)
    assert name == clean(graph.name)
    assert list(nodes) == [clean(node.id) for node in graph.nodes]
    wanted = {(clean(each), clean(node.id)) for node in graph.nodes for each in node.inputs}
    assert sorted(edges) == sorted(wanted)
    for node in graph.nodes:
        label = unquoted(nodes[clean(node.id)]['label']).replace('&amp;', '&')
        assert label == '\n'.join(filter(None, (clean(node.name), clean(node.type))))
    looks = {node.kind: nodes[clean(node.id)] for node in graph.nodes}
    forms = {kind: (look['shape'], look['style']) for kind, look in looks.items()}
    assert len(set(forms.values())) == len(forms)


@pytest.mark.skipif(not shutil.which('dot'), reason='graphviz is not installed')
@settings(max_examples=10, deadline=None)
@given(graphs())
def test_graphviz_draws_it(graph):
    drawn = subprocess.run(
        ['dot', '-Tplain'], input=graph.source, capture_output=True, text=True, check=True
    )
    kinds = [line.split(' ', 1)[0] for line in drawn.stdout.splitlines()]
    assert kinds.count('node') == len(graph.nodes)
    assert kinds.count('edge') == len(graph.edges)
    assert not drawn.stderr


# ---- SVG


@dataclass
class Rect:
    x: float
    y: float
    right: float
    bottom: float

    def overlaps(self, other):
        return (
            self.x < other.right
            and other.x < self.right
            and self.y < other.bottom
            and other.y < self.bottom
        )

    def holds(self, points, slack):
        """Which points lie in it, further than `slack` from its border."""
        inner = (self.x + slack, self.y + slack), (self.right - slack, self.bottom - slack)
        return ((points > inner[0]) & (points < inner[1])).all(axis=1)


def rect_of(element):
    x, y, width, height = (float(element.get(name)) for name in ('x', 'y', 'width', 'height'))
    return Rect(x, y, x + width, y + height)


def points_of(path):
    """Points on the curves and lines of a path, ends among them."""
    numbers = r'(-?[\d.]+) (-?[\d.]+)'
    assert re.fullmatch(rf'(?:[ML]{numbers}C{numbers} {numbers} {numbers})+', path)
    pieces = re.findall(rf'[ML]{numbers}C{numbers} {numbers} {numbers}', path)
    share = np.linspace(0, 1, 17)[:, None]
    found = []
    for piece in pieces:
        a, b, c, d = np.array(piece, float).reshape(4, 2)
        curve = (
            a * (1 - share) ** 3
            + 3 * b * share * (1 - share) ** 2
            + 3 * c * share**2 * (1 - share)
            + d * share**3
        )
        if found:
            before = found[-1][-1]
            found.append(before + (a - before) * share)
        found.append(curve)
    return np.concatenate(found)


class Picture:
    def __init__(self, graph):
        self.root = ElementTree.fromstring(graph.svg)
        _, _, self.width, self.height = map(float, self.root.get('viewBox').split())
        whole = self.root.find(f'{SVG}g')
        self.boxes, self.texts, self.lines = {}, {}, {}
        for group in whole.findall(f'{SVG}g'):
            if group.get('data-column') is not None:
                # the last one is on top of the stack
                self.boxes[group.get('data-column')] = rect_of(group.findall(f'{SVG}rect')[-1])
                self.texts[group.get('data-column')] = group.findall(f'{SVG}text')
            else:
                edge = group.get('data-from'), group.get('data-to')
                assert edge not in self.lines
                points = points_of(group.find(f'{SVG}path').get('d'))
                tip, *_ = group.find(f'{SVG}polygon').get('points').split()
                self.lines[edge] = np.vstack([points, [float(each) for each in tip.split(',')]])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_no_box_lies_on_another_or_on_a_line_and_every_line_is_there(graph):
    picture = Picture(graph)
    assert set(picture.boxes) == {clean(node.id) for node in graph.nodes}
    assert set(picture.lines) == {(clean(a), clean(b)) for a, b in graph.edges}
    for one, other in combinations(picture.boxes.values(), 2):
        assert not one.overlaps(other)
    for box in picture.boxes.values():
        assert box.x >= 0
        assert box.right <= picture.width - 20
        assert box.y >= 0
        assert box.bottom <= picture.height - 20
    for (source, target), points in picture.lines.items():
        for name, box in picture.boxes.items():
            assert not box.holds(points, 0.25).any(), f'{source} -> {target} crosses {name}'
        begin, end = picture.boxes[source], picture.boxes[target]
        # coordinates are rounded to a tenth
        is_downwards = points[0][1] == pytest.approx(begin.bottom, abs=0.21)
        assert is_downwards or points[0][0] == pytest.approx(begin.right, abs=0.21)
        if is_downwards:
            assert points[-1][1] == pytest.approx(end.y, abs=0.21)
            assert end.x < points[-1][0] < end.right
        else:
            assert points[-1][0] == pytest.approx(end.x, abs=0.21)
            assert end.y < points[-1][1] < end.bottom


@settings(deadline=None)
@given(graphs())
def test_labels_are_within_their_boxes(graph):
    picture = Picture(graph)
    for name, box in picture.boxes.items():
        bottom = box.y
        for text in picture.texts[name]:
            size, width = float(text.get('font-size')), float(text.get('textLength'))
            middle, base = float(text.get('x')), float(text.get('y'))
            assert box.x + 10 <= middle - width / 2
            assert middle + width / 2 <= box.right - 10
            assert bottom + 2 <= base - size * 0.8
            bottom = base + size * 0.25
        assert bottom <= box.bottom - 4
    shown = {clean(node.id): node for node in graph.nodes}
    for name, texts in picture.texts.items():
        if clean(shown[name].name) == clean(name):
            assert texts[0].text == clean(name)


def crossings(picture):
    """How often lines that neither begin nor end together cross."""
    count = 0
    for (edge, one), (other_edge, other) in combinations(picture.lines.items(), 2):
        if set(edge) & set(other_edge):
            continue
        a, b, c, d = one[:-1, None], one[1:, None], other[None, :-1], other[None, 1:]

        def side(p, q, r):
            return np.sign((q - p)[..., 0] * (r - p)[..., 1] - (q - p)[..., 1] * (r - p)[..., 0])

        across = (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
        count += int(across.any())
    return count


@settings(deadline=None, max_examples=50)
@given(graphs(most=14, most_inputs=1))
def test_trees_are_drawn_without_crossings(graph):
    assert crossings(Picture(graph)) == 0


def test_few_crossings_where_some_must_be():
    # all of three with all of three: one crossing at least, nine where the order is no matter
    nodes = [ColumnNode(f'f{number}', 'field', 'int') for number in range(3)]
    nodes += [ColumnNode(f'd{number}', 'derived', 'int', ('f0', 'f1', 'f2')) for number in range(3)]
    assert crossings(Picture(ColumnGraph(nodes))) == 9
    # crossed as they are declared, and none is needed
    nodes = [ColumnNode(f'f{number}', 'field', 'int') for number in range(8)]
    nodes += [ColumnNode(f'd{n}', 'derived', 'int', (f'f{7 - n}',)) for n in range(8)]
    nodes += [ColumnNode(f'e{n}', 'derived', 'int', (f'd{(n * 3) % 8}',)) for n in range(8)]
    assert crossings(Picture(ColumnGraph(nodes))) == 0


def test_hardly_more_crossings_than_the_best_of_all_orders():
    drawn = best = 0
    names = [f'{side}{number}' for side in 'fd' for number in range(4)]
    for seed in range(40):
        draws = random.Random(seed)
        edges = draws.sample(list(product(names[:4], names[4:])), 8)

        def count(place, edges=edges):
            pairs = combinations(edges, 2)
            return sum(
                (place[a] - place[c]) * (place[b] - place[d]) < 0 for (a, b), (c, d) in pairs
            )

        boxes = lay_out(dict.fromkeys(names, (80.0, 40.0)), edges).boxes
        drawn += count({name: box.y for name, box in boxes.items()})
        orders = list(permutations(range(4)))
        best += min(
            count(dict(zip(names, (*one, *other), strict=True)))
            for one, other in product(orders, orders)
        )
    assert best <= drawn <= 1.05 * best


@pytest.mark.parametrize('count', [2, 10, 60])
def test_long_chains_and_wide_ones_fit_a_page(count):
    chain = [ColumnNode('c0', 'field', 'File')]
    chain += [ColumnNode(f'c{n}', 'derived', 'File', (f'c{n - 1}',)) for n in range(1, count)]
    wide = [ColumnNode('c0', 'field', 'File')]
    wide += [ColumnNode(f'c{n}', 'derived', 'File', ('c0',)) for n in range(1, count)]
    alone = [ColumnNode(f'a_field_{n}', 'field', 'str') for n in range(count)]
    for nodes in (chain, wide, alone):
        assert Picture(ColumnGraph(nodes)).width <= 1200


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_it_is_read_on_white_and_on_black():
    graph = ColumnGraph(
        [
            ColumnNode('a', 'field', 'int'),
            ColumnNode('b', 'derived', 'int', ('a',)),
            ColumnNode('c', 'batch', 'int', ('b',)),
        ],
        'Three',
    )
    root = ElementTree.fromstring(graph.svg)
    fills = {each.get('fill') for each in root.iter(f'{SVG}rect')}
    assert len(fills) == 3
    assert len({each.get('rx') for each in root.iter(f'{SVG}rect')}) > 1, 'not by colour alone'
    for text in root.iter(f'{SVG}text'):
        assert min(contrast(text.get('fill'), fill) for fill in fills) >= 4.5
    for line in root.iter(f'{SVG}path'):
        assert contrast(line.get('stroke'), '#ffffff') >= 3
        assert contrast(line.get('stroke'), '#0d1117') >= 3
    # nothing that would reach out into a page, or collide with another picture in it
    assert root.get('role') == 'img'
    assert root.get('aria-label') == root.find(f'{SVG}title').text == 'Columns of Three'
    assert not [each for each in root.iter() if each.get('id') or each.tag == f'{SVG}style']
    told = [each.text for each in root.iter(f'{SVG}title')]
    assert 'b: int (derived column, computed from a)' in told
    assert [each.text for each in root.iter(f'{SVG}text')][-3:] == [
        'field',
        'derived column',
        'column of batches',
    ]


# ---- of datasets and batches


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    place = tmp_path_factory.mktemp('pictures')

    @dataset(sql_file=place / 'dataset.sql', data_dir=place / 'dataset')
    class Pictures:
        image: File
        mask: PICTURE
        split: str = 'train'

        def small(image: File) -> PNG:
            raise NotImplementedError

        def brightness(small: File) -> float:
            raise NotImplementedError

        def size(mask: File, image: File) -> dict:
            raise NotImplementedError

    return Pictures


def test_the_graph_of_a_dataset(pictures, tmp_path):
    graph = pictures.graph()
    assert [(node.name, node.kind, node.type, node.inputs) for node in graph.nodes] == [
        ('image', 'field', 'File', ()),
        ('mask', 'field', "File['png', 'webp']", ()),
        ('split', 'field', 'str', ()),
        ('small', 'derived', "File['png']", ('image',)),
        ('size', 'derived', 'dict', ('mask', 'image')),
        ('brightness', 'derived', 'float', ('small',)),
    ]
    assert graph._repr_svg_() == graph.svg
    assert graph.save(tmp_path / 'columns.svg').read_text(encoding='utf-8') == graph.svg
    for name in ('columns.dot', 'columns.GV'):
        assert graph.save(str(tmp_path / name)).read_text(encoding='utf-8') == graph.source
    with pytest.raises(ConfigError, match=r'\.svg, or \.dot and \.gv.*dot -Tpng'):
        graph.save(tmp_path / 'columns.png')
    assert not (tmp_path / 'columns.png').exists()


def test_the_graph_of_batches_has_what_they_use(pictures):
    @batch(pictures)
    class PictureBatch:
        def images(small: list[File], brightness: list[float]) -> torch.Tensor:
            raise NotImplementedError

        def noisy(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
            raise NotImplementedError

        def image(images, noisy):
            # called as a field is
            raise NotImplementedError

    graph = PictureBatch.graph()
    assert graph.name == 'PictureBatch'
    assert {(node.id, node.name, node.kind, node.type) for node in graph.nodes} == {
        ('Pictures.image', 'image', 'field', 'File'),
        ('small', 'small', 'derived', "File['png']"),
        ('brightness', 'brightness', 'derived', 'float'),
        ('images', 'images', 'batch', 'torch.Tensor'),
        ('noisy', 'noisy', 'batch', 'torch.Tensor'),
        ('image', 'image', 'batch', ''),
    }
    assert set(graph.edges) == {
        ('Pictures.image', 'small'),
        ('small', 'brightness'),
        ('small', 'images'),
        ('brightness', 'images'),
        ('images', 'noisy'),
        ('images', 'image'),
        ('noisy', 'image'),
    }
    assert len(Picture(graph).lines) == 7


def test_what_draws_is_no_column(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r'test_column_picturing\.py:\d+.*graph'):

        @batch(pictures)
        class Wrong:
            def graph(image: list[File]) -> int:
                return len(image)

    with pytest.raises(ConfigError, match="'graph'"):

        @dataset(sql_file=tmp_path / 'dataset.sql', data_dir=tmp_path / 'dataset')
        class AlsoWrong:
            graph: str


@pytest.mark.parametrize(
    ('nodes', 'words'),
    [
        ([('a', 'field', ()), ('a', 'field', ())], "column 'a' is there twice"),
        ([('a', 'feild', ())], "unknown kind of columns 'feild': did you mean 'field'"),
        ([('image', 'field', ()), ('b', 'derived', ('imge',))], "did you mean 'image'"),
        ([('a', 'derived', ('b',)), ('b', 'derived', ('a',))], 'from themselves: (a -> b|b -> a)'),
        ([('a', 'derived', ('a',))], 'from themselves: a -> a'),
    ],
)
def test_what_is_no_graph_is_told(nodes, words):
    with pytest.raises(ConfigError, match=words):
        ColumnGraph([ColumnNode(name, kind, 'int', inputs) for name, kind, inputs in nodes])
