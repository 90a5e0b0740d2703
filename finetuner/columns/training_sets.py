"""Rows as the pairs of a collection, and the pairs of a collection as rows."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.collections.datapoint import DataPoint
from finetuner.collections.documents import class_of_pair
from finetuner.collections.draft import DEFAULT_GROUP
from finetuner.collections.drawing import as_rgb
from finetuner.collections.labels import MLTYPES
from finetuner.collections.tiles import PICTURE
from finetuner.collections.training_set import TrainingSet
from finetuner.columns.declaring import Declaration
from finetuner.columns.documents import checked_content, type_of_column, values_of
from finetuner.columns.files import File, TemporaryFile
from finetuner.columns.types import ColumnType
from finetuner.excepts import ConfigError, DataError, unknown_name
from finetuner.images import open_picture, read_uri

if TYPE_CHECKING:
    from finetuner.columns.dataset import DatasetType
    from finetuner.columns.rows import Rows

# columns that labels come from, and those that they go into
_GIVEN: dict[str, tuple[type, ...]] = {
    'classification': (str, int, bool, list, np.ndarray),
    'object_detection': (dict, list, np.ndarray),
    'segmentation': (File, dict, list, np.ndarray),
}
_TAKEN: dict[str, tuple[type, ...]] = {
    'classification': (str, int, bool, list, np.ndarray),
    'object_detection': (str, dict, list),
    'segmentation': (str, File, list, np.ndarray),
}
# of Pillow's names of formats, endings of their files
_SUFFIXES = {
    'PNG': ('.png',),
    'JPEG': ('.jpg', '.jpeg'),
    'MPO': ('.jpg', '.jpeg'),
    'WEBP': ('.webp',),
    'GIF': ('.gif',),
    'BMP': ('.bmp',),
    'TIFF': ('.tif', '.tiff'),
}
_MASK_MODES = ('1', 'L', 'P', 'I', 'I;16')


def training_set_of(
    rows: Rows,
    name: str,
    content: str | None,
    label: str,
    group: str | None = None,
    mltype: str = 'classification',
    tile_size: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    partition: Sequence[float] | None = None,
    description: str = '',
) -> TrainingSet:
    """A collection of a pair a row, fed and not saved; see `Rows.to_training_set`."""
    declaration = rows.dataset.declaration
    content = checked_content(declaration, content, label)
    kind = declaration.type_of(content)
    if kind.python is str:
        raise ConfigError(f'content={content!r} is {kind.name}: the content of a pair is an image')
    if mltype not in MLTYPES:
        raise ConfigError(unknown_name('mltype', mltype, MLTYPES))
    _check_label(declaration, label, mltype, _GIVEN[mltype])
    _check_group(declaration, group)
    if group is not None and partition is not None:
        raise ConfigError(f'group={group!r} names the groups already: leave out partition=...')
    size = _first_size(rows, content) if tile_size is None else tile_size
    made = TrainingSet(name, mltype, size, classes, partition, description)
    by_number = None if classes is None or _are_numbers(classes) else list(classes)
    _Feeding(rows, made, by_number).feed(content, label, group)
    return made


class _Feeding:
    def __init__(self, rows: Rows, made: TrainingSet, by_number: list[str] | None) -> None:
        self._rows = rows
        self._made = made
        self._by_number = by_number
        # of the pair that is being fed; None while the next one is made
        self._row: int | None = None

    def feed(self, content: str, label: str, group: str | None) -> None:
        values = values_of(self._rows, [content, label, group])
        try:
            for name, part in itertools.groupby(values, lambda each: each[1][2] or DEFAULT_GROUP):
                self._made.feed(self._pairs(part), name)
        except (DataError, ConfigError) as error:
            if self._row is None:
                raise
            where = f'{self._rows.dataset.__name__}, row {self._row}'
            raise DataError(f'{where}: {error.__cause__ or error}') from error

    def _pairs(self, part: Iterator[tuple[int, tuple[Any, ...]]]) -> Iterator[tuple[Any, Any]]:
        for row, (content, label, _) in part:
            self._row = row
            if content is None or label is None:
                what = 'content' if content is None else 'label'
                raise DataError(f'its {what} is None: leave such rows out')
            yield _image(content), self._label(label)
            self._row = None

    def _label(self, label: Any) -> Any:
        if isinstance(label, File):
            return _read_mask(label, self._made.tile_size)
        if not isinstance(label, int):
            return label
        if self._by_number is None:
            return str(int(label))
        if not 0 <= label < len(self._by_number):
            raise DataError(f'label {label}: classes are counted 0 to {len(self._by_number) - 1}')
        return self._by_number[label]


def import_pairs(
    dataset: DatasetType,
    set_: TrainingSet,
    content: str,
    label: str,
    group: str | None = None,
    bands: Sequence[int] | None = None,
) -> int:
    """Rows of the pairs of a collection; see `Dataset.import_training_set`."""
    if not isinstance(set_, TrainingSet):
        raise ConfigError(
            f'it takes a TrainingSet, not {type(set_).__name__}: TrainingSet.from_name(...)'
        )
    declaration = dataset.declaration
    _check_fields(declaration, content=content, label=label, group=group)
    _check_label(declaration, label, set_.mltype, _TAKEN[set_.mltype])
    _check_group(declaration, group)
    # one that is not saved tells so here
    points = set_.iter_points()
    first = next(points, None)
    if first is None:
        return 0
    to_content = _content_of(content, declaration.fields[content].type, bands)
    to_label = _label_of(declaration.fields[label].type, first)

    def rows() -> Iterator[dict[str, Any]]:
        for point in itertools.chain([first], points):
            try:
                row = {content: to_content(point), label: to_label(point)}
            except (DataError, ConfigError) as error:
                raise DataError(f'pair {point.id}: {error}') from error
            yield row if group is None else {**row, group: point.group}

    return dataset.extend(rows())


# ---- from rows


def _first_size(rows: Rows, content: str) -> tuple[int, int]:
    """Height and width of the first picture."""
    first = next(rows[:1].column(content), None)
    if isinstance(first, bytes | File):
        data = first if isinstance(first, bytes) else read_uri(first.path)
        height, width = open_picture(data).shape[:2]
        return height, width
    raise ConfigError(
        'tile_size is missing: there is no picture to take it from; say tile_size=[height, width]'
    )


def _image(content: Any) -> Any:
    return content.path if isinstance(content, File) else content


def _read_mask(file: File, tile_size: Sequence[int]) -> np.ndarray:
    """A mask `[height, width]` of numbers of classes; those of a palette are its places."""
    from PIL import Image

    height, width = tile_size
    try:
        with Image.open(file.path) as picture:
            if picture.mode not in _MASK_MODES or picture.size != (width, height):
                raise DataError(
                    f'its mask is {picture.size[1]} x {picture.size[0]} pixels of {picture.mode}: it '
                    f'takes {height} x {width}, in grey or by a palette, the number of a class each'
                )
            return np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f'its mask cannot be opened: {error}') from error


# ---- into rows


def _content_of(
    name: str, kind: ColumnType, bands: Sequence[int] | None
) -> Callable[[DataPoint], Any]:
    if kind.python is File:
        return lambda point: _written(*_picture(point, kind.suffixes, bands))
    if kind.python is bytes:
        return lambda point: _picture(point, (), bands)[0]
    if kind.python is np.ndarray:
        return lambda point: point.read()
    if hasattr(kind.python, 'detach'):
        return _tensor
    raise ConfigError(
        f'content={name!r} is {kind.name}: an image becomes a File, bytes, numpy.ndarray or torch.Tensor'
    )


def _tensor(point: DataPoint) -> Any:
    import torch

    return torch.from_numpy(point.read())


def _picture(
    point: DataPoint, suffixes: Sequence[str], bands: Sequence[int] | None
) -> tuple[bytes, str]:
    """The file of a picture and its ending: the one that was fed where it may be, else a PNG."""
    data, encoding = point.kept
    if encoding == PICTURE and bands is None:
        for suffix in _endings_of(data):
            if not suffixes or suffix in suffixes:
                return data, suffix
    if suffixes and '.png' not in suffixes:
        raise DataError(
            f'its image would be a PNG, and the column takes {", ".join(suffixes)}: make it a File'
        )
    pixels = point.read()
    if bands is not None:
        return _png(as_rgb(pixels, bands)), '.png'
    if pixels.dtype != np.uint8 or len(pixels) not in (1, 3):
        raise DataError(
            f'its image is {list(pixels.shape)} of {pixels.dtype}, which no picture holds as it is: '
            'make the column numpy.ndarray, or choose bands=[...] for red, green and blue'
        )
    return _png(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)), '.png'


def _endings_of(data: bytes) -> tuple[str, ...]:
    from PIL import Image

    # it was opened when it was fed: its format is known
    with Image.open(io.BytesIO(data)) as picture:
        return _SUFFIXES.get(picture.format or '', ('',))


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, 'PNG', compress_level=1)
    return file.getvalue()


def _written(data: bytes, suffix: str) -> TemporaryFile:
    with File.make_tmp(suffix) as file:
        with file.open('wb') as opened:
            opened.write(data)
        return file


def _label_of(kind: ColumnType, first: DataPoint) -> Callable[[DataPoint], Any]:
    """What a label becomes; all pairs have the classes of the first."""
    if kind.python is str:
        return lambda point: (
            None if kind.is_optional and not point.present else class_of_pair(point)
        )
    if kind.python in (int, bool):
        classes = first.kind.classes
        numbers = list(map(int, classes)) if _are_numbers(classes) else range(len(classes))
        by_name = dict(zip(classes, numbers, strict=True))
        return lambda point: _number(point.present, by_name, kind)
    if kind.python is dict:
        return lambda point: {n: b for n, b in zip(point.kind.classes, point.y, strict=True) if b}
    if kind.python is list:
        if first.mltype == 'classification':
            return lambda point: point.present
        return lambda point: point.kind.as_json(point.y)
    if kind.python is File:
        return lambda point: _written(_png(point.y), '.png')
    return lambda point: np.asarray(point.y)


def _number(present: Sequence[str], by_name: Mapping[str, int], kind: ColumnType) -> int | None:
    if not present and kind.is_optional:
        return None
    if len(present) != 1:
        raise DataError(f'it shows {len(present)} classes, and {kind.name} holds the number of one')
    number = by_name[present[0]]
    if kind.python is bool and number not in (0, 1):
        raise DataError(f'the number of its class is {number}, and {kind.name} holds 0 and 1')
    return kind.python(number)


# ---- at the door


def _are_numbers(classes: Sequence[str]) -> bool:
    """Whether classes are called by whole numbers, as those of labels that were numbers are."""
    return all(name.removeprefix('-').isdecimal() and name == str(int(name)) for name in classes)


def _check_label(
    declaration: Declaration, label: str, mltype: str, allowed: Sequence[type]
) -> None:
    kind = type_of_column(declaration, 'label', label)
    if kind.python not in allowed:
        names = ', '.join(
            'numpy.ndarray' if each is np.ndarray else each.__name__ for each in allowed
        )
        raise ConfigError(f'label={label!r} is {kind.name}: a label of {mltype} is {names}')


def _check_group(declaration: Declaration, group: str | None) -> None:
    if group is not None and type_of_column(declaration, 'group', group).python is not str:
        kind = declaration.type_of(group)
        raise ConfigError(f'group={group!r} is {kind.name}: the name of a group is a str')


def _check_fields(declaration: Declaration, **given: str | None) -> None:
    """Columns that values go into are fields, and those that get none can do without."""
    for parameter, name in given.items():
        if name is not None:
            type_of_column(declaration, parameter, name)
            if name in declaration.derived:
                fields = ', '.join(declaration.fields)
                raise ConfigError(
                    f'{parameter}={name!r} is computed: name one of the fields, {fields}'
                )
    for name, field in declaration.fields.items():
        if field.is_required and name not in given.values():
            raise ConfigError(
                f'{declaration.name}.{name} would have no value: give the field a default'
            )
