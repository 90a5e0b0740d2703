"""Pairs as people look at them: pictures with boxes and masks drawn in, one by one and in sheets."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from docarray import Document

from finetuner.collections.labels import BoxLabels, LabelKind, MaskLabels
from finetuner.excepts import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetuner.collections.datapoint import DataPoint

_NUM_COLOURS = 3
# of the values of an image that is not uint8, those that become black and white
_DARKEST, _LIGHTEST = 2, 98
# values that are looked at to find these
_MOST_COUNTED = 4_000_000
_MASK_SHARE = 0.45
# a box in a small image is drawn in a larger one, or it would cover what is in it
_LEAST_SIDE = 256
_MOST_NAMES = 3


def as_rgb(pixels: np.ndarray, bands: Sequence[int] | None = None) -> np.ndarray:
    """An image of any bands and dtype as a picture.

    Args:
        pixels: `[bands, height, width]`.
        bands: the three that are shown as red, green and blue, counted from 0; None takes the first
            three, or the first alone where there are fewer.

    Returns:
        `[height, width, 3]` uint8. What is not uint8 is stretched so that 2 % of its values are black
        and 2 % white; what is no number is black.

    Raises:
        ConfigError: there are no such bands.
    """
    if bands is None:
        bands = (0, 1, 2) if len(pixels) >= _NUM_COLOURS else (0, 0, 0)
    if len(bands) != _NUM_COLOURS or not all(0 <= band < len(pixels) for band in bands):
        raise ConfigError(
            f'bands={list(bands)}: it takes three numbers from 0 to {len(pixels) - 1}, for red, green '
            'and blue'
        )
    chosen = pixels[list(bands)]
    if chosen.dtype != np.uint8:
        chosen = _stretched(chosen)
    return np.ascontiguousarray(chosen.transpose(1, 2, 0))


def _stretched(values: np.ndarray) -> np.ndarray:
    """What is not uint8 as uint8, a band at a time: float64 takes eight times as much."""
    # of large images some values say as much as all
    step = -(-values.size // _MOST_COUNTED)
    some = values.reshape(-1)[::step].astype(np.float64)
    good = some[np.isfinite(some)]
    low, high = np.percentile(good, (_DARKEST, _LIGHTEST)) if good.size else (0.0, 1.0)
    found = np.empty(values.shape, np.uint8)
    for band, target in zip(values, found, strict=True):
        # halved, since the difference of two floats may be larger than any
        plain = np.nan_to_num(band.astype(np.float64), posinf=high, neginf=low, nan=low) / 2
        shares = (plain - low / 2) / (high / 2 - low / 2 or 1.0)
        target[:] = (shares.clip(0, 1) * 255).round()
    return found


def draw_pair(
    pixels: np.ndarray,
    label: Any,
    kind: LabelKind,
    bands: Sequence[int] | None = None,
    most: int | None = None,
) -> Image:
    """A picture of a pair: its boxes or its mask drawn in, a colour a class.

    Args:
        pixels: `[bands, height, width]`.
        label: as the kind keeps it.
        kind: of the label.
        bands: see `as_rgb`.
        most: pixels of its longer side; of a larger image every n-th is shown.
    """
    from PIL import Image

    step = 1 if most is None else -(-max(pixels.shape[1:]) // most)
    rgb = as_rgb(pixels[:, ::step, ::step], bands)
    if isinstance(kind, MaskLabels):
        label = label[::step, ::step]
        colours = np.array([(0, 0, 0), *map(colour_of, range(len(kind.classes)))], np.float64)
        mixed = (1 - _MASK_SHARE) * rgb + _MASK_SHARE * colours[label]
        rgb = np.where((label > 0)[..., None], mixed, rgb).astype(np.uint8)
    scale = max(1, -(-_LEAST_SIDE // max(rgb.shape[:2])))
    height, width = rgb.shape[0] * scale, rgb.shape[1] * scale
    picture = Image.fromarray(rgb).resize((width, height), Image.Resampling.NEAREST)
    if isinstance(kind, BoxLabels):
        _draw_boxes(picture, label, kind.classes, scale / step)
    return picture


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour of a class: far from those of the classes before it.

    Args:
        number: of the class, from 0.
    """
    # the golden angle, so that neighbours in number are none in colour
    hue = (0.02 + number * 0.6180339887498949) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95 - 0.25 * (number // 8 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_sheet(
    points: Sequence[DataPoint],
    title: str,
    columns: int = 8,
    size: int = 128,
    bands: Sequence[int] | None = None,
    marked: Collection[int] = (),
) -> Image:
    """A sheet of pairs, each over its number and classes.

    Args:
        points: what is drawn, row by row.
        title: what stands above.
        columns: pairs side by side, 1 to 64.
        size: of a pair in pixels, 32 to 512.
        bands: see `as_rgb`.
        marked: ids of those that are framed in red.

    Raises:
        ConfigError: there is nothing to draw, or a number is out of range.
    """
    from finetuner.data.report.sheet_drawing import FRAME, NEGATIVE, Cell, Row, Sheet

    for name, value, least, most in (('columns', columns, 1, 64), ('size', size, 32, 512)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f'{name}={value!r}: it takes a whole number from {least} to {most}')
    if not points:
        raise ConfigError('there are no pairs to draw')
    cells = []
    for point in points:
        picture = point.draw(bands)
        names = point.present
        more = f' and {len(names) - _MOST_NAMES} more' if len(names) > _MOST_NAMES else ''
        caption = f'{point.id}: {", ".join(names[:_MOST_NAMES]) or "-"}{more}'
        colour = NEGATIVE if point.id in marked else FRAME
        cells.append(Cell(Document(tensor=np.asarray(picture)), colour, caption))
    rows = [Row(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return Sheet(rows, size, title).draw()


def _draw_boxes(
    picture: Image, label: Sequence[Sequence[Any]], classes: Sequence[str], scale: float
) -> None:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    weight = max(2, min(picture.size) // 128)
    for number, boxes in enumerate(label):
        colour = colour_of(number)
        for left, top, right, bottom in boxes:
            # one of less than a pixel, too
            box = (
                left * scale,
                top * scale,
                max(left * scale, right * scale - 1),
                max(top * scale, bottom * scale - 1),
            )
            pen.rectangle(box, outline=colour, width=weight)
            if len(classes) > 1:
                name = classes[number].encode('latin-1', 'replace').decode('latin-1')
                pen.text((box[0] + weight + 1, box[1] + weight), name, fill=colour)
