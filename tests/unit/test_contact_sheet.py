"""The contact sheet: which tiles it shows, in which frames."""

from __future__ import annotations

import numpy as np
import pytest
from docarray import Document, DocumentArray
from PIL import Image

from finetuner.data.report.contact_sheet import save_contact_sheet
from finetuner.excepts import ConfigError, DataError

GREEN, RED, GREY = (26, 152, 80), (215, 48, 39), (217, 217, 217)
SIZE, GAP = 48, 8


def picture(colour, height=40):
    return np.full((height, 40, 3), colour, np.uint8)


def colours(path):
    """The pixels of the picture, `[height, width, 3]`, and how often each colour is there."""
    pixels = np.asarray(Image.open(path).convert('RGB'))
    values, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return pixels, {tuple(v.tolist()): int(n) for v, n in zip(values, counts, strict=True)}


def tiles_of(path, colour):
    """How many tiles of a plain colour there are: all but their frames of one pixel."""
    return colours(path)[1].get(colour, 0) / (SIZE - 2) ** 2


def class_data(num_classes=3, num_items=2):
    return DocumentArray(
        Document(tensor=picture((40 * label, 200, 255)), tags={'finetuner_label': f'name {label}'})
        for label in range(num_classes)
        for _ in range(num_items)
    )


def test_classes_stand_in_rows(tmp_path):
    path = tmp_path / 'sheet.png'
    save_contact_sheet(class_data(), path, size=SIZE)
    pixels, _ = colours(path)
    for label in range(3):
        assert tiles_of(path, (40 * label, 200, 255)) == 2
        rows = np.flatnonzero((pixels == (40 * label, 200, 255)).all(-1).any(1))
        assert rows.max() - rows.min() == SIZE - 3


def test_only_as_many_rows_and_columns_as_asked_for(tmp_path):
    path = tmp_path / 'sheet.png'
    save_contact_sheet(class_data(5, 9), path, columns=3, rows=2, size=SIZE)
    shown = [tiles_of(path, (40 * label, 200, 255)) for label in range(5)]
    assert sorted(shown) == [0, 0, 0, 3, 3]


def test_matches_are_framed_by_their_label(tmp_path):
    path = tmp_path / 'sheet.png'
    root = Document(tensor=picture((1, 2, 3)))
    for label, colour in ((1, (4, 5, 6)), (-1, (7, 8, 9)), (1, (4, 5, 6))):
        root.matches.append(
            Document(tensor=picture(colour), tags={'finetuner_label': float(label)})
        )
    save_contact_sheet([root], path, size=SIZE)
    pixels, count = colours(path)
    frame = SIZE**2 - (SIZE - 6) ** 2
    assert (count[GREEN], count[RED]) == (2 * frame, frame)
    # the root is leftmost, and framed in neither
    first = np.flatnonzero((pixels == (1, 2, 3)).all(-1).any(0)).min()
    assert first < np.flatnonzero((pixels == GREEN).all(-1).any(0)).min()
    assert count[1, 2, 3] == (SIZE - 2) ** 2


def test_pairs_stand_side_by_side(tmp_path):
    path = tmp_path / 'sheet.png'
    docs = [
        Document(
            chunks=[Document(tensor=picture((1, 2, 3))), Document(tensor=picture((4, 5, 6)))],
            tags={'finetuner_score': 0.5},
        )
        for _ in range(5)
    ]
    save_contact_sheet(docs, path, columns=4, size=SIZE)
    assert (tiles_of(path, (1, 2, 3)), tiles_of(path, (4, 5, 6))) == (5, 5)
    pixels, _ = colours(path)
    left = np.flatnonzero((pixels == (1, 2, 3)).all(-1).any(0))
    right = np.flatnonzero((pixels == (4, 5, 6)).all(-1).any(0))
    assert right[0] - left[0] == SIZE + GAP


def test_text_image_pairs_show_the_text_beneath(tmp_path):
    def draw(text, name):
        chunks = [Document(text=text, modality='text')]
        chunks.append(Document(tensor=picture((1, 2, 3)), modality='image'))
        path = tmp_path / name
        save_contact_sheet([Document(chunks=chunks)], path, size=SIZE)
        return path

    short = draw('i', 'a.png')
    assert tiles_of(short, (1, 2, 3)) == 1
    long = draw('many words that take more than one line', 'b.png')
    assert Image.open(long).height > Image.open(short).height


def test_what_cannot_be_opened_is_a_grey_tile(tmp_path):
    (tmp_path / 'empty.png').touch()
    docs = DocumentArray(
        [
            Document(uri=str(tmp_path / 'empty.png')),
            Document(uri=str(tmp_path / 'missing.png')),
            Document(uri='s3://bucket/key.png'),
            Document(blob=b'no picture'),
            Document(),
        ]
    )
    path = tmp_path / 'sheet.png'
    save_contact_sheet(docs, path, size=SIZE)
    assert 2.5 < tiles_of(path, GREY) < 5


@pytest.mark.parametrize(
    'doc',
    [
        Document(text='word ' * 100_000),
        Document(text='x' * 100_000),
        Document(text='\x00\x1b[31m\u202eabc\n\n\t'),
        Document(text=' \n '),
        Document(text='Grüße, Привет, 日本語 🎉'),
        Document(tensor=np.zeros(384)),
        Document(tensor=np.random.default_rng(0).random((3, 20, 30))),
        Document(tensor=[[1, 2], [3, 4]]),
        Document(text='t', tags={'finetuner_label': 'label ' * 500}),
        Document(text='t', tags={'finetuner_label': [1]}),
        Document(chunks=[Document(text='one')], tags={'finetuner_score': 'high'}),
        Document(chunks=[Document(text='a', modality='text')]),
        Document(
            text='root', matches=[Document(), Document(text='m', tags={'finetuner_label': 7})]
        ),
    ],
)
def test_anything_can_be_drawn(tmp_path, doc):
    path = tmp_path / 'sheet.jpg'
    save_contact_sheet([doc], path, size=SIZE)
    with Image.open(path) as image:
        assert image.format == 'JPEG'
        assert max(image.size) < 2000


def test_mixed_data_is_a_grid(tmp_path):
    path = tmp_path / 'sheet.png'
    docs = [Document(tensor=picture((1, 2, 3))), *class_data(1, 2)]
    save_contact_sheet(docs, path, size=SIZE)
    assert (tiles_of(path, (1, 2, 3)), tiles_of(path, (0, 200, 255))) == (1, 2)


def test_the_same_seed_draws_the_same(tmp_path):
    docs = class_data(6, 20)
    docs = DocumentArray(
        Document(tensor=np.full((9, 9, 3), n, np.uint8), tags={'finetuner_label': n % 6})
        for n in range(120)
    )
    for name, seed in (('a.png', 3), ('b.png', 3), ('c.png', 4)):
        save_contact_sheet(docs, tmp_path / name, 3, 2, SIZE, seed)
    first, again, other = ((tmp_path / f'{name}.png').read_bytes() for name in 'abc')
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ('path', 'says'),
    [
        ('sheet.gif', r"ending '.gif': use .png, .jpg, .jpeg"),
        ('sheet', "ending ''"),
        ('no/such/sheet.png', 'there is no folder'),
        ('folder.png', 'cannot be written'),
    ],
)
def test_bad_paths(tmp_path, path, says):
    (tmp_path / 'folder.png').mkdir()
    with pytest.raises(ConfigError, match=says):
        save_contact_sheet(class_data(), tmp_path / path)


@pytest.mark.parametrize(
    'options',
    [
        {'columns': 1},
        {'columns': 65},
        {'rows': 0},
        {'rows': 2.5},
        {'size': 31},
        {'size': True},
        {'columns': 64, 'rows': 256, 'size': 512},
    ],
)
def test_bad_numbers(tmp_path, options):
    with pytest.raises(ConfigError, match='|'.join(options)):
        save_contact_sheet(class_data(), tmp_path / 'sheet.png', **options)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(DataError, match='there is nothing to draw: there are no Documents'):
        save_contact_sheet(DocumentArray(), tmp_path / 'sheet.png')
    assert not list(tmp_path.iterdir())
