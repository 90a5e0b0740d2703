"""Draw rows of tiles into one picture: pictures, wrapped texts, and what cannot be opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from docarray import Document

from finetuner.data.contents import content_of
from finetuner.data.report.items import shape_text
from finetuner.excepts import PictureError

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

GAP, _MARGIN = 8, 20
_INK = '#333333'
FRAME, POSITIVE, NEGATIVE = '#cccccc', '#1a9850', '#d73027'
_PAPER, _TEXT_TILE, _BROKEN_TILE, _CROSS = '#ffffff', '#f4f6f8', '#d9d9d9', '#bbbbbb'
_CAPTION_LINES = 3
_BIDI = frozenset('\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')


@dataclass
class Cell:
    """One tile: the Document drawn in it, its frame, and what stands beneath."""

    doc: Document
    colour: str = FRAME
    caption: str = ''


@dataclass
class Row:
    """Tiles side by side, with a label at the left and wider gaps behind some of them."""

    cells: list[Cell] = field(default_factory=list)
    label: str = ''
    gaps_after: frozenset[int] = frozenset()


class Sheet:
    """Measures and draws rows of tiles."""

    def __init__(self, rows: list[Row], size: int, title: str) -> None:
        self._rows = rows
        self._size = size
        self._title = title
        is_ascii = all(text.isascii() for text in (title, *_texts(rows)))
        self._font = _load_font(max(10, min(16, size // 8)), is_ascii)
        self._title_font = _load_font(16, is_ascii)
        bounds = self._font.getbbox('Ag|')
        self._line = round((bounds[3] - bounds[1]) * 1.25)
        labels = [self._font.getlength(row.label) for row in rows if row.label]
        self._label_width = min(round(max(labels)), max(size, 72)) + 12 if labels else 0
        self._wide_gap = GAP + size // 4

    def draw(self) -> Image:
        """Draw everything."""
        from PIL import Image, ImageDraw

        captions = [self._captions(row) for row in self._rows]
        heights = [
            self._size + GAP + (max(map(len, lines)) * self._line + 4 if any(lines) else 0)
            for lines in captions
        ]
        width = 2 * _MARGIN + self._label_width + max(map(self._row_width, self._rows))
        title_width = round(self._title_font.getlength(self._title)) + 2 * _MARGIN
        top = 2 * _MARGIN + 8
        sheet = Image.new('RGB', (max(width, title_width), top + sum(heights) + _MARGIN), _PAPER)
        pen = ImageDraw.Draw(sheet)
        pen.text((_MARGIN, _MARGIN - 6), self._title, _INK, self._title_font)
        for row, lines, height in zip(self._rows, captions, heights, strict=True):
            self._draw_row(sheet, pen, row, lines, top)
            top += height
        return sheet

    def _row_width(self, row: Row) -> int:
        wide = sum(number < len(row.cells) - 1 for number in row.gaps_after)
        normal = len(row.cells) - 1 - wide
        return len(row.cells) * self._size + normal * GAP + wide * self._wide_gap

    def _captions(self, row: Row) -> list[list[str]]:
        return [
            self._wrap(cell.caption, self._caption_width(row, number), _CAPTION_LINES)
            for number, cell in enumerate(row.cells)
        ]

    def _caption_width(self, row: Row, number: int) -> int:
        """A caption of a pair stands beneath both of its tiles."""
        return self._size * 2 + GAP if row.gaps_after and row.cells[number].caption else self._size

    def _draw_row(
        self,
        sheet: Image,
        pen: ImageDraw.ImageDraw,
        row: Row,
        captions: list[list[str]],
        top: int,
    ) -> None:
        lines = self._wrap(row.label, self._label_width - 12, self._size // self._line)
        y = top + (self._size - len(lines) * self._line) / 2
        for line in lines:
            right = _MARGIN + self._label_width - 12
            pen.text((right, y), line, _INK, self._font, anchor='ra')
            y += self._line
        x = _MARGIN + self._label_width
        for number, cell in enumerate(row.cells):
            sheet.paste(self._tile(cell.doc), (x, top))
            weight = 1 if cell.colour == FRAME else max(3, self._size // 32)
            box = (x, top, x + self._size - 1, top + self._size - 1)
            pen.rectangle(box, outline=cell.colour, width=weight)
            middle = x + self._caption_width(row, number) / 2
            for count, line in enumerate(captions[number]):
                y = top + self._size + 3 + count * self._line
                pen.text((middle, y), line, _INK, self._font, anchor='ma')
            x += self._size + (self._wide_gap if number in row.gaps_after else GAP)

    def _tile(self, doc: Document) -> Image:
        from PIL import Image

        from finetuner.images import load_picture

        content = content_of(doc)
        if content is None:
            return self._broken_tile('nothing in it')
        if isinstance(content, str) and content == doc.text:
            return self._text_tile(content)
        try:
            return Image.fromarray(load_picture(content, self._size))
        except PictureError as error:
            if not isinstance(content, (str, bytes, bytearray, memoryview)):
                return self._text_tile(f'tensor {shape_text(content)}')
            return self._broken_tile(_short_reason(str(error)))

    def _text_tile(self, text: str) -> Image:
        from PIL import Image, ImageDraw

        tile = Image.new('RGB', (self._size, self._size), _TEXT_TILE)
        self._write(ImageDraw.Draw(tile), text, _INK)
        return tile

    def _broken_tile(self, reason: str) -> Image:
        from PIL import Image, ImageDraw

        tile = Image.new('RGB', (self._size, self._size), _BROKEN_TILE)
        pen = ImageDraw.Draw(tile)
        end = self._size - 1
        for line in ((0, 0, end, end), (0, end, end, 0)):
            pen.line(line, _CROSS, 2)
        self._write(pen, reason, _INK)
        return tile

    def _write(self, pen: ImageDraw.ImageDraw, text: str, colour: str) -> None:
        """Write into the middle of a tile, as much as there is room for."""
        lines = self._wrap(text, self._size - 12, max(1, (self._size - 8) // self._line))
        y = (self._size - len(lines) * self._line) / 2
        for line in lines:
            pen.text((self._size / 2, y), line, colour, self._font, anchor='ma')
            y += self._line

    def _wrap(self, text: str, width: int, most: int) -> list[str]:
        """Break a text into lines that fit, within words where it must be; cut with dots."""
        # No more can be seen, and measuring a book would take long.
        words = _visible(text[: most * width]).split()
        cut = len(text) > most * width
        lines: list[str] = []
        while words and len(lines) <= most:
            word = words.pop(0)
            joined = f'{lines[-1]} {word}' if lines else word
            if lines and self._font.getlength(joined) <= width:
                lines[-1] = joined
                continue
            fits = self._fitting(word, width)
            lines.append(word[:fits])
            if word[fits:]:
                words.insert(0, word[fits:])
        if len(lines) <= most and not cut:
            return lines
        lines = lines[:most]
        while lines and lines[-1] and self._font.getlength(f'{lines[-1]}...') > width:
            lines[-1] = lines[-1][:-1]
        return [*lines[:-1], f'{lines[-1].rstrip()}...'] if lines else []

    def _fitting(self, word: str, width: int) -> int:
        """Count the characters of a word that fit in a line, if need be up to a hyphen."""
        fits = len(word)
        while fits > 1 and self._font.getlength(word[:fits]) > width:
            fits -= 1
        if fits == len(word):
            return fits
        return 1 + max((word.rfind(sign, 0, fits) for sign in '-_/.'), default=-1) or fits


def _texts(rows: list[Row]) -> list[str]:
    cells = [cell for row in rows for cell in row.cells]
    return [row.label for row in rows] + [
        text for cell in cells for text in (cell.caption, cell.doc.text or '')
    ]


def _load_font(size: int, is_ascii: bool) -> ImageFont | FreeTypeFont:
    """Load a font that comes with a library, so that it is the same on every machine.

    Pillow's own has English letters only; matplotlib's has most alphabets, but no Chinese.
    """
    from PIL import ImageFont

    if is_ascii:
        return ImageFont.load_default(size)
    import matplotlib

    file = Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
    return ImageFont.truetype(str(file), size)


def _visible(text: str) -> str:
    return ''.join(c if c.isprintable() and c not in _BIDI else ' ' for c in text)


def _short_reason(message: str) -> str:
    """Say in a few words why a picture cannot be opened."""
    reasons = {
        'there is no file': 'no such file',
        '0 bytes': 'empty (0 bytes)',
        'pixels, more than': 'too many pixels',
        'larger than': 'too many bytes',
        'not a picture': 'not a picture',
        'is not one of': 'format not allowed',
        'has the scheme': 'scheme not read',
        'fetched': 'cannot be fetched',
        'premature end': 'cut short',
        'truncated': 'cut short',
        'ends early': 'damaged or cut short',
    }
    known = (short for words, short in reasons.items() if words in message)
    return next(known, 'cannot be opened')
