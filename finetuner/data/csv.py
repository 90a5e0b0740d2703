"""Training data in CSV files: labelled rows, pairs, scored pairs, text-image rows, or one column.

Rows are numbered as an editor numbers lines: a row is at the line it begins on, which is not its
count where cells hold newlines or lines are empty.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO
from urllib.parse import urlsplit

from docarray import Document

from finetuner.data.contents import LABEL_TAG, SCORE_TAG, is_local_file
from finetuner.data.csv_rows import MOST_COLUMNS, Row, RowReader, num_cells, open_csv
from finetuner.data.folders import PICTURE_SUFFIXES, picture_uri
from finetuner.data.pairs import join_pairs
from finetuner.excepts import ConfigError, DataError, PictureError, unknown_name
from finetuner.uris import read_uri

_MESH_SUFFIXES = ('.obj', '.ply', '.stl', '.off', '.glb', '.gltf', '.fbx', '.3ds', '.dae')
_FILE_NAME = re.compile(r'[^\n]+\.[a-zA-Z0-9]{2,5}')
# What people call columns. A row made of nothing else is taken for a header, and refused: read as
# data it would be one wrong Document among thousands, which nobody would ever notice.
_HEADER_WORDS = {
    'text', 'texts', 'sentence', 'sentence1', 'sentence2', 'sentence_1', 'sentence_2', 'content',
    'caption', 'title', 'image', 'images', 'image_path', 'path', 'file', 'filename', 'file_name',
    'uri', 'url', 'query', 'document', 'anchor', 'positive', 'label', 'labels', 'class',
    'category', 'target', 'finetuner_label', 'score', 'scores', 'similarity', 'finetuner_score',
}  # fmt: skip
_SEED = 0
# what `csv.get_dialect` returns is of a class of its own
_DIALECTS = (csv.Dialect, type(csv.get_dialect('excel')))


@dataclass
class CSVOptions:
    """How a CSV file is read; a `ConfigError` names an option that is out of range.

    Attributes:
        size: most rows taken; None for all.
        sampling_rate: chance of each row to be taken, from 0 to 1; None for all. The same rows
            are drawn each time.
        dialect: `'auto'`, a name from `csv.list_dialects()`, or a `csv.Dialect`.
        encoding: of the file; `'utf-8'` reads a byte order mark too.
        is_labeled: whether the second of two columns is a label, or another content.
        convert_to_blob: whether local picture files are read into the Documents; otherwise
            these hold the absolute path.
        create_point_clouds: accepted for Finetuner's scripts; meshes are not supported.
        point_cloud_size: accepted for Finetuner's scripts.
    """

    size: int | None = None
    sampling_rate: float | None = None
    dialect: str | csv.Dialect | type[csv.Dialect] = 'auto'
    encoding: str = 'utf-8'
    is_labeled: bool = False
    convert_to_blob: bool = True
    create_point_clouds: bool = True
    point_cloud_size: int = 2048

    def __post_init__(self) -> None:
        """Refuse what cannot be right, as `check` does."""
        self.check()

    def check(self) -> None:
        """Check all options, which may have been set since they were made.

        Raises:
            ConfigError: an option is out of range.
        """
        if self.size is not None:
            _require_count('size', self.size)
        _require_count('point_cloud_size', self.point_cloud_size)
        rate = self.sampling_rate
        is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 <= rate <= 1):
            raise ConfigError(f'sampling_rate={rate!r} is not a number from 0 to 1, nor None')
        for name in ('is_labeled', 'convert_to_blob', 'create_point_clouds'):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f'{name}={getattr(self, name)!r} is neither True nor False')
        self._check_dialect()
        try:
            ''.encode(self.encoding)
        except (LookupError, ValueError, TypeError) as error:
            raise ConfigError(
                f"encoding={self.encoding!r} is no text encoding Python knows, such as 'utf-8', "
                "'utf-16' or 'latin-1'"
            ) from error

    def _check_dialect(self) -> None:
        dialect = self.dialect
        if isinstance(dialect, str):
            if dialect != 'auto' and dialect not in csv.list_dialects():
                raise ConfigError(
                    unknown_name('CSV dialect', dialect, ['auto', *csv.list_dialects()])
                )
            return
        is_class = isinstance(dialect, type) and issubclass(dialect, csv.Dialect)
        if not is_class and not isinstance(dialect, _DIALECTS):
            raise ConfigError(
                f'dialect={dialect!r} is neither a name ({", ".join(csv.list_dialects())}, auto) '
                'nor a csv.Dialect'
            )
        try:
            csv.reader([], dialect)
        except (TypeError, csv.Error) as error:
            raise ConfigError(f'dialect={dialect!r} is incomplete: {error}') from error


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f'{name}={value!r} is not a whole number of at least 1')


def read_csv(
    file: str | os.PathLike[str] | TextIO,
    options: CSVOptions | None = None,
    on_broken: Literal['stop', 'skip'] = 'stop',
) -> Iterator[Document]:
    """Read training data from a CSV file without a header, row by row.

    A cell that names a picture (see `is_picture_cell`) is one, any other is a text.

    | columns | Documents |
    |---|---|
    | content, label (`is_labeled=True`) | class data; labels are str |
    | content | instances |
    | picture and text, in either order | text-image pairs: two chunks, the text first |
    | two contents of one kind | query-document pairs, joined into classes (`join_pairs`) |
    | content, content, score | scored pairs: two chunks, the score from 0 to 1 |

    Only query-document pairs are held in memory, each distinct content once and pictures by
    their paths; everything else streams.

    Args:
        file: a path, or an open text file. Paths of pictures are relative to the file's folder,
            or to the working directory for an open file.
        options: None for the defaults.
        on_broken: `'stop'` at a picture file that is not there or cannot be read, or leave it to
            whoever opens the picture to `'skip'` it: its Document has the path as `uri`.

    Yields:
        Documents. Pictures read into a blob have what the cell said in `tags['file']`.

    Raises:
        ConfigError: an option is out of range.
        DataError: no such file, or a row that does not fit; its line is named.
    """
    options = CSVOptions() if options is None else options
    if not isinstance(options, CSVOptions):
        raise ConfigError(f'csv options are {type(options).__name__}, not CSVOptions')
    options.check()
    if not isinstance(file, (str, os.PathLike)):
        name = getattr(file, 'name', None)
        name = name if isinstance(name, str) else 'the CSV'
        return _CSVReader(file, name, Path.cwd(), options, on_broken == 'skip').documents()
    path = Path(os.path.expanduser(file))
    if not os.path.isfile(path):
        raise DataError(f'there is no CSV file {str(file)!r}')
    return _read_path(path, options, on_broken == 'skip')


def is_picture_cell(cell: str) -> bool:
    """Say whether a cell names a picture.

    It does when it ends in a picture's suffix, in upper or lower case: a path, or an http(s)
    address, whose query does not count. A `data:image/` URI is a picture as well.
    """
    start = cell[:11].lower()
    if start.startswith('data:image/'):
        return True
    if '\n' in cell.strip() or '\r' in cell.strip():
        return False
    if start.startswith(('http://', 'https://')):
        try:
            cell = urlsplit(cell).path
        except ValueError:
            return False
    return cell.strip().lower().endswith(PICTURE_SUFFIXES)


def _read_path(path: Path, options: CSVOptions, skips: bool) -> Iterator[Document]:
    with open_csv(path, options.encoding) as file:
        yield from _CSVReader(file, path.name, path.parent, options, skips).documents()


class _CSVReader:
    """Makes Documents of the rows of one file, once."""

    def __init__(
        self, file: TextIO, name: str, folder: Path, options: CSVOptions, skips: bool
    ) -> None:
        self._skips = skips
        self._name = name
        self._folder = folder
        self._options = options
        self._reader = RowReader(file, name, options.dialect, 2 if options.is_labeled else None)
        self._num_columns = self._first_line = 0
        self._kinds: list[str] = []

    def documents(self) -> Iterator[Document]:
        rows = self._reader.rows()
        first = next(rows, None)
        if first is None:
            raise DataError(f'{self._name!r} holds no rows')
        self._check_first(first)
        rows = self._sampled(itertools.chain([first], rows))
        drawn = next(rows, None)
        if drawn is None:
            raise DataError(f'sampling_rate leaves no row of {self._name!r}: use a higher one')
        self._kinds = [self._kind_of(drawn, column) for column in range(self._num_contents)]
        self._refuse_other_files(drawn)
        rows = itertools.chain([drawn], rows)
        if self._num_contents == 1:
            yield from map(self._single, rows)
        elif self._num_columns == MOST_COLUMNS or len(set(self._kinds)) == 2:
            yield from map(self._pair, rows)
        else:
            contents = (tuple(self._contents(row, load=False)) for row in rows)
            for doc in join_pairs((query, relevant) for query, relevant in contents):
                self._load(doc, f'a pair of {self._name!r}')
                yield doc

    @property
    def _num_contents(self) -> int:
        return 1 if self._options.is_labeled or self._num_columns == 1 else 2

    def _single(self, row: Row) -> Document:
        (doc,) = self._contents(row)
        if self._options.is_labeled:
            # 'cat' and 'cat ' would be two classes, and nobody would see why
            doc.tags[LABEL_TAG] = row.cells[1].strip()
        return doc

    def _pair(self, row: Row) -> Document:
        chunks = list(self._contents(row))
        for chunk, kind in zip(chunks, self._kinds, strict=True):
            chunk.modality = kind
        if self._num_columns == MOST_COLUMNS:
            return Document(chunks=chunks, tags={SCORE_TAG: self._score(row)})
        return Document(chunks=sorted(chunks, key=lambda chunk: chunk.modality != 'text'))

    def _contents(self, row: Row, load: bool = True) -> Iterator[Document]:
        for column, kind in enumerate(self._kinds):
            if self._kind_of(row, column) != kind:
                self._reader.refuse(
                    row,
                    f'column {column + 1} ({_shown(row.cells[column])}) is '
                    f'{"a picture" if kind == "text" else "no picture"}, unlike that of the first '
                    f'row: a column holds texts, or pictures ({" ".join(PICTURE_SUFFIXES)}). If '
                    'the first row is a header, remove it',
                )
            doc = self._content(row, column, kind)
            if load:
                self._load(doc, self._reader.where(row))
            yield doc

    def _content(self, row: Row, column: int, kind: str) -> Document:
        cell = row.cells[column]
        if kind == 'text':
            return Document(text=cell)
        try:
            uri = picture_uri(cell.strip(), self._folder, must_exist=not self._skips)
        except DataError as error:
            self._reader.refuse(row, str(error), error)
        if self._options.convert_to_blob and is_local_file(uri):
            return Document(uri=uri, tags={'file': cell})
        return Document(uri=uri)

    def _load(self, doc: Document, where: str) -> None:
        if not self._options.convert_to_blob or not doc.uri or not is_local_file(doc.uri):
            return
        try:
            doc.blob = read_uri(Path(doc.uri))
        except PictureError as error:
            if self._skips:
                return
            raise DataError(f'{where}: {error}') from error
        doc.uri = None

    def _score(self, row: Row) -> float:
        cell = row.cells[2]
        try:
            score = float(cell)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 1:
            header = '. If it is a header, remove it' if row.line == self._first_line else ''
            self._reader.refuse(row, f'score {_shown(cell)} is not a number from 0 to 1{header}')
        return score

    def _kind_of(self, row: Row, column: int) -> str:
        cell = row.cells[column]
        if is_picture_cell(cell):
            return 'image'
        if '\n' not in cell and cell.strip().lower().endswith(_MESH_SUFFIXES):
            self._reader.refuse(
                row,
                f'{_shown(cell)} is a 3D mesh, which is not supported: content is text or pictures',
            )
        return 'text'

    def _check_first(self, row: Row) -> None:
        self._num_columns = len(row.cells)
        self._first_line = row.line
        if {cell.strip().lower() for cell in row.cells} <= _HEADER_WORDS:
            columns = ', '.join(row.cells)
            self._reader.refuse(row, f'it looks like a header ({columns}): remove it')
        if self._options.is_labeled and self._num_columns != 2:
            allowed = 'a labelled file (is_labeled=True) has two, content and label'
        elif self._num_columns > MOST_COLUMNS:
            allowed = 'a file has one to three: content; two contents; or two and a score'
        else:
            return
        self._reader.refuse(
            row,
            f'{num_cells(row)}: {allowed}. Quote cells that hold a delimiter, or name the dialect '
            'in CSVOptions',
        )

    def _refuse_other_files(self, row: Row) -> None:
        """Say so where a file of another format, named by its path, would be trained on as text."""
        for column, kind in enumerate(self._kinds):
            cell = row.cells[column].strip()
            if (
                kind == 'text'
                and _FILE_NAME.fullmatch(cell)
                and os.path.isfile(self._folder / cell)
            ):
                self._reader.refuse(
                    row,
                    f'{_shown(cell)} is a file, but no picture that is read: these end in '
                    f'{" ".join(PICTURE_SUFFIXES)}. To train on texts, put them into the cells',
                )

    def _sampled(self, rows: Iterable[Row]) -> Iterator[Row]:
        rate = self._options.sampling_rate
        generator = random.Random(_SEED)
        drawn = (row for row in rows if rate is None or generator.random() < rate)
        return itertools.islice(drawn, self._options.size)


def _shown(cell: str) -> str:
    return repr(cell if len(cell) <= 60 else f'{cell[:60]}...')
