"""The rows of a CSV file: its encoding and dialect, and every row as long as the first.

Rows are numbered as an editor numbers lines: a row is at the line it begins on, which is not its
count where cells hold newlines or lines are empty.
"""

from __future__ import annotations

import codecs
import csv
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

from finetuner.excepts import DataError

MOST_COLUMNS = 3

_SAMPLE_LINES = 200
_SAMPLE_CHARACTERS = 1_000_000
# A picture as a `data:` URI may have 64 MB, which base64 makes 85; Python stops at 131,072.
_MOST_CHARACTERS = 128 * 1024 * 1024
_ANY_OTHER_DELIMITER = ':^~ '


class _Comma(csv.excel):
    # people put a space after a comma, and then a quote is no longer at the start of its cell
    skipinitialspace = True


class _Tab(_Comma):
    delimiter = '\t'


class _Semicolon(_Comma):
    delimiter = ';'


class _Bar(_Comma):
    delimiter = '|'


_GUESSES: tuple[type[csv.Dialect], ...] = (_Comma, _Tab, _Semicolon, _Bar)


class _Words(NamedTuple):
    """What mends a file, in the words of whoever reads it."""

    encoding: str
    delimiter: str
    quotes: str


_OF_OPTIONS = _Words(
    'Set CSVOptions(encoding=...)',
    "name the dialect in CSVOptions (for one column: 'excel-tab')",
    '; where quotes are plain characters, give CSVOptions a dialect with quoting=csv.QUOTE_NONE',
)
_OF_ARGUMENTS = _Words('Set encoding=...', "say what it is, such as delimiter=';'", '')


class Row(NamedTuple):
    """A row and the line it begins on, from 1."""

    line: int
    cells: list[str]


def open_csv(path: Path, encoding: str) -> TextIO:
    """Open a CSV file to be read by a `RowReader`.

    Args:
        path: of it.
        encoding: of it; `'utf-8'` reads a byte order mark too.

    Raises:
        DataError: it cannot be read.
    """
    is_utf8 = codecs.lookup(encoding).name == 'utf-8'
    try:
        return path.open(encoding='utf-8-sig' if is_utf8 else encoding, newline='')
    except OSError as error:
        raise DataError(f'{str(path)!r} cannot be read: {error.strerror or error}') from error


class RowReader:
    """Reads the rows of an open CSV file, once.

    Args:
        file: open in text mode; read from where it stands.
        name: what errors call it; with the ending `.tsv`, `'auto'` means tabs.
        dialect: as in `CSVOptions`.
        num_columns: how many are expected, where that is known: helps to find the dialect.
        header: names that the first row may have, where that is a header: helps to find the dialect.
            With one, cells may be empty.
    """

    def __init__(
        self,
        file: TextIO,
        name: str,
        dialect: Any,
        num_columns: int | None = None,
        header: Collection[str] | None = None,
    ) -> None:
        self._file = file
        self._header = header
        self._words = _OF_OPTIONS if header is None else _OF_ARGUMENTS
        self._name = name
        if dialect == 'auto' and PurePath(name).suffix.lower() == '.tsv':
            dialect = 'excel-tab'
        self._dialect = dialect
        self._num_columns = num_columns

    def rows(self) -> Iterator[Row]:
        """Read all rows that are not blank.

        Raises:
            DataError: the file is in another encoding, breaks the rules of its dialect, has an
                empty cell and no header, or a row with more or fewer cells than the first.
        """
        num_columns = 0
        for row in self._raw_rows():
            num_columns = num_columns or len(row.cells)
            if len(row.cells) != num_columns:
                if self._header is not None and not any(map(str.strip, row.cells)):
                    continue
                self.refuse(
                    row,
                    f'{num_cells(row)}, the first row has {num_columns}: quote cells that hold a '
                    f'delimiter or quotes, or {self._words.delimiter}',
                )
            if self._header is not None:
                yield row
                continue
            for column, cell in enumerate(row.cells, 1):
                if not cell or cell.isspace():
                    self.refuse(row, f'column {column} is empty')
            yield row

    def where(self, row: Row) -> str:
        """Name a row by its line."""
        return f'row at line {row.line} of {self._name!r}'

    def refuse(self, row: Row, problem: str, cause: Exception | None = None) -> NoReturn:
        """Raise a `DataError` that names the row."""
        raise DataError(f'{self.where(row)}: {problem}') from cause

    def _raw_rows(self) -> Iterator[Row]:
        reader = self._build_reader()
        line = 1
        # below a header, a row of empty cells is one
        is_first = True
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                self.refuse(
                    Row(line, []),
                    f'{error}. A cell that holds quotes, delimiters or newlines is quoted as a '
                    f'whole, quotes in it are doubled{self._words.quotes}',
                    error,
                )
            if cells is None:
                return
            if not (_is_blank(cells, reader.dialect.delimiter) if is_first else not cells):
                is_first = is_first and self._header is None
                yield Row(line, cells)
            line = reader.line_num + 1

    def _build_reader(self) -> Any:
        csv.field_size_limit(max(csv.field_size_limit(), _MOST_CHARACTERS))
        lines, dialect = self._lines(), self._dialect
        if not isinstance(dialect, str):
            return csv.reader(lines, dialect)
        if dialect == 'auto':
            head = _head(lines)
            lines = itertools.chain(head, lines)
            dialect = _dialect_of_header(head, self._header or ()) or _guess_dialect(
                head, self._num_columns
            )
        # Strict, for those who gave no rules of their own: otherwise a quote that is never closed
        # swallows the rest of the file into one cell, without a word.
        return csv.reader(lines, dialect, strict=True)

    def _lines(self) -> Iterator[str]:
        lines: Iterator[str] | None = None
        for number in itertools.count(1):
            try:
                lines = iter(self._file) if lines is None else lines
                line = next(lines, None)
            except UnicodeError as error:
                raise DataError(self._undecodable(error)) from error
            except (OSError, ValueError) as error:
                # a ValueError where the file was closed
                raise DataError(f'{self._name!r} cannot be read: {error}') from error
            if line is None:
                return
            if not isinstance(line, str):
                raise DataError(f"{self._name!r} is open in binary mode: open it with mode 'r'")
            if '\0' in line:
                raise DataError(
                    f'line {number} of {self._name!r} holds a zero byte: it is no CSV, or in '
                    f"another encoding. {self._words.encoding}, such as 'utf-16'"
                )
            yield line.removeprefix('\ufeff') if number == 1 else line

    def _undecodable(self, error: UnicodeError) -> str:
        encoding = getattr(self._file, 'encoding', 'text')
        reason = str(error)
        file = getattr(self._file, 'buffer', None)
        if isinstance(error, UnicodeDecodeError) and file is not None and file.seekable():
            reason = f'{_bad_byte(file, encoding)} ({error.reason})'
        return (
            f'{self._name!r} is not {encoding.removesuffix("-sig")}: {reason}. '
            f"{self._words.encoding} to what it is in, such as 'latin-1' or 'utf-16'"
        )


def num_cells(row: Row) -> str:
    """Say how many columns a row has."""
    return f'{len(row.cells)} column{"s" if len(row.cells) > 1 else ""}'


def _is_blank(cells: list[str], delimiter: str) -> bool:
    """Say whether the line was empty or all spaces, which is no row; a comma would make it one."""
    return not any(map(str.strip, cells)) and (len(cells) < 2 or delimiter.isspace())


def _bad_byte(file: BinaryIO, encoding: str) -> str:
    """Name the first byte that is not of the encoding.

    The position in the decoder's own error counts from some block of the file.
    """
    file.seek(0)
    decoder = codecs.getincrementaldecoder(encoding)()
    end = 0
    while True:
        block = file.read(65536)
        end += len(block)
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            position = end - len(error.object) + error.start
            return f'byte 0x{error.object[error.start]:02x} at position {position}'
        if not block:
            return 'it changed while it was read'


def _head(lines: Iterator[str]) -> list[str]:
    head: list[str] = []
    num_characters = 0
    for line in itertools.islice(lines, _SAMPLE_LINES):
        head.append(line)
        num_characters += len(line)
        if num_characters > _SAMPLE_CHARACTERS:
            break
    return head


def _guess_dialect(head: Sequence[str], num_columns: int | None) -> Any:
    """Find the dialect in which the first lines make a table.

    `csv.Sniffer` alone is often wrong on prose, where it takes letters for delimiters. So the
    four usual delimiters are tried. The best cuts all rows into equally many cells; the next best
    at least half of them, and the others are short or long rows to be refused as such, not
    reasons to read the file as one column. The tab goes first, because prose is cut evenly by
    commas sooner or later, by tabs never.

    Args:
        head: whole lines; the last row may be cut off.
        num_columns: how many are expected, where that is known.
    """
    found = {guess: _row_lengths(head, guess) for guess in _GUESSES}
    best: tuple[tuple[bool, bool, bool, int], type[csv.Dialect]] | None = None
    for guess, lengths in found.items():
        length, count = max(lengths.items(), key=lambda item: item[::-1], default=(0, 0))
        if length < 2 or 2 * count < lengths.total():
            continue
        fits = length == num_columns if num_columns else length <= MOST_COLUMNS
        merit = (len(lengths) == 1, fits, guess is _Tab, length)
        if best is None or merit > best[0]:
            best = merit, guess
    if best is not None:
        return best[1]
    for guess, lengths in found.items():
        if set(lengths) == {1}:
            return guess
    try:
        return csv.Sniffer().sniff(''.join(head), delimiters=_ANY_OTHER_DELIMITER)
    except csv.Error:
        return 'excel'


def _dialect_of_header(head: Sequence[str], names: Collection[str]) -> type[csv.Dialect] | None:
    """Find the dialect that cuts the first row into most of these names; None where none does.

    Where several do, as for a single column, it is one that cuts all rows into equally many cells.
    """
    best: tuple[tuple[int, bool], type[csv.Dialect]] | None = None
    for guess in _GUESSES:
        try:
            first = next((row for row in csv.reader(head, guess) if any(row)), [])
        except csv.Error:
            continue
        num_found = len({cell.strip() for cell in first} & {*names})
        merit = (num_found, len(_row_lengths(head, guess)) == 1)
        if num_found and (best is None or merit > best[0]):
            best = merit, guess
    return None if best is None else best[1]


def _row_lengths(head: Sequence[str], dialect: type[csv.Dialect]) -> Counter[int]:
    """Count the rows of each number of cells; 0 stands for rows that break the dialect's rules."""
    lengths: Counter[int] = Counter()
    reader = csv.reader(head, dialect, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            # at the end of the sample it is a row cut off, which says nothing
            if reader.line_num < len(head):
                lengths[0] += 1
            continue
        if cells is None:
            return lengths
        if not _is_blank(cells, dialect.delimiter):
            lengths[len(cells)] += 1
