"""What is encoded: which files, how many rows they have, and some rows of one."""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from docarray import Document

from finetuner.bulk.output import import_parquet
from finetuner.bulk.rows import CONTENT_COLUMNS, Columns, Row, row_of, text_of
from finetuner.data.csv import CSVOptions
from finetuner.data.csv_rows import RowReader, open_csv
from finetuner.data.folders import files_below
from finetuner.data.patterns import expand_pattern
from finetuner.data.records import json_object
from finetuner.data.sources import CSV_ENDINGS, JSON_LINES_ENDINGS, TAR_ENDING, open_documents
from finetuner.excepts import ConfigError, DataError, unknown_name

# files that make a folder one of data, and not of pictures
_DATA_ENDINGS = (*CSV_ENDINGS, *JSON_LINES_ENDINGS, '.parquet', TAR_ENDING, '.docs')
_ROWS_READ_AT_ONCE = 64
_BUFFER_BYTES = 1 << 20
_RECORDS_LOOKED_AT = 1000


class InputFile(abc.ABC):
    """A file, or a folder of pictures."""

    def __init__(self, path: Path) -> None:
        """Open nothing yet.

        Args:
            path: absolute.
        """
        self.path = path

    def fingerprint(self) -> str:
        """What changes when the file does: its size and when it was written.

        Raises:
            DataError: it is not there.
        """
        try:
            state = self.path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return f'{state.st_size} bytes of {state.st_mtime_ns}'

    @abc.abstractmethod
    def check_columns(self, columns: Columns) -> None:
        """Refuse columns that the file does not have, as far as it says so itself.

        Raises:
            ConfigError: one is not there; says which are.
            DataError: the file cannot be read.
        """

    @abc.abstractmethod
    def num_rows(self, columns: Columns) -> int:
        """How many rows there are.

        Raises:
            DataError: the file cannot be read.
        """

    @abc.abstractmethod
    def rows(self, start: int, stop: int, columns: Columns) -> Iterator[Row]:
        """Read some rows, holding few of them.

        Raises:
            DataError: the file cannot be read.
        """

    def kept_types(self, keep: Sequence[str]) -> list[Any]:
        """Arrow types of the columns that are copied: text, where the file does not say."""
        import pyarrow

        return [pyarrow.string() for _ in keep]

    def _unreadable(self, error: Exception) -> DataError:
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
        return DataError(f'{str(self.path)!r} cannot be read: {reason}')


class ParquetInput(InputFile):
    """A Parquet file: read by row groups, of which only the columns that are needed."""

    def check_columns(self, columns: Columns) -> None:
        """See `InputFile.check_columns`."""
        with self._opened() as file:
            names = file.schema_arrow.names
        named = [columns.content, columns.id, *columns.keep]
        for name in filter(None, named):
            if name not in names:
                raise ConfigError(f'{self.path.name}: {unknown_name("column", name, names)}')
        if columns.content is None and not set(names) & set(CONTENT_COLUMNS):
            raise ConfigError(
                f'{self.path.name} has no column {", ".join(CONTENT_COLUMNS)}: name that of the '
                f'contents as content. Known: {", ".join(names)}.'
            )

    def num_rows(self, columns: Columns) -> int:
        """See `InputFile.num_rows`."""
        with self._opened() as file:
            return file.metadata.num_rows

    def rows(self, start: int, stop: int, columns: Columns) -> Iterator[Row]:
        """See `InputFile.rows`."""
        import pyarrow

        wanted = [*columns.contents, columns.id_column, *columns.keep]
        try:
            with self._opened() as file:
                groups, first = _groups(file.metadata, start, stop)
                names = [name for name in file.schema_arrow.names if name in wanted]
                number = first
                for batch in file.iter_batches(_ROWS_READ_AT_ONCE, groups, names):
                    left, right = max(start - number, 0), min(stop - number, len(batch))
                    number += len(batch)
                    if left < right:
                        records = batch.slice(left, right - left).to_pylist()
                        for row, record in enumerate(records, number - len(batch) + left):
                            yield row_of(record, columns, row, self.path, as_text=False)
                    if number >= stop:
                        return
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise self._unreadable(error) from error

    def kept_types(self, keep: Sequence[str]) -> list[Any]:
        """See `InputFile.kept_types`."""
        with self._opened() as file:
            return [file.schema_arrow.field(name).type for name in keep]

    def _opened(self) -> Any:
        import_parquet(f'reading {self.path.name!r}')
        import pyarrow
        from pyarrow import parquet

        try:
            # with a buffer, or pyarrow reads whole row groups, which may be the whole file
            return parquet.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from error


def _groups(metadata: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold some of the rows, and the first row in them."""
    groups: list[int] = []
    first = begins = 0
    for group in range(metadata.num_row_groups):
        ends = begins + metadata.row_group(group).num_rows
        if begins < stop and ends > start:
            if not groups:
                first = begins
            groups.append(group)
        begins = ends
    return groups, first


class JsonLinesInput(InputFile):
    """A JSON Lines file: an object on each line that is not empty."""

    def check_columns(self, columns: Columns) -> None:
        """See `InputFile.check_columns`; of the first records, since each has its own keys."""
        names: set[str] = set()
        for line in islice(self._lines(), _RECORDS_LOOKED_AT):
            with suppress(DataError):
                names |= json_object(line, 'the line').keys()
        for name in filter(None, [columns.content, columns.id, *columns.keep]):
            if names and name not in names:
                raise ConfigError(f'{self.path.name}: {unknown_name("key", name, names)}')

    def num_rows(self, columns: Columns) -> int:
        """See `InputFile.num_rows`."""
        return sum(1 for _ in self._lines())

    def rows(self, start: int, stop: int, columns: Columns) -> Iterator[Row]:
        """See `InputFile.rows`."""
        for number, line in enumerate(islice(self._lines(), start, stop), start):
            try:
                record: Mapping[str, Any] = json_object(line, 'the line')
            except DataError as error:
                kept = (None,) * len(columns.keep)
                yield Row(f'{self.path.name}:{number}', Document(), kept, str(error))
            else:
                yield row_of(record, columns, number, self.path, as_text=True)

    def _lines(self) -> Iterator[bytes]:
        try:
            with self.path.open('rb') as file:
                for number, line in enumerate(file):
                    line = line.removeprefix(b'\xef\xbb\xbf') if number == 0 else line
                    if line.strip():
                        yield line
        except OSError as error:
            raise self._unreadable(error) from error


class CSVInput(InputFile):
    """A CSV file with a header."""

    def check_columns(self, columns: Columns) -> None:
        """See `InputFile.check_columns`."""
        with self._opened(columns) as (header, _):
            for name in filter(None, [columns.content, columns.id, *columns.keep]):
                if name not in header:
                    raise ConfigError(f'{self.path.name}: {unknown_name("column", name, header)}')

    def num_rows(self, columns: Columns) -> int:
        """See `InputFile.num_rows`."""
        with self._opened(columns) as (_, rows):
            return sum(1 for _ in rows)

    def rows(self, start: int, stop: int, columns: Columns) -> Iterator[Row]:
        """See `InputFile.rows`."""
        with self._opened(columns) as (header, rows):
            for number, row in enumerate(islice(rows, start, stop), start):
                record = {n: cell or None for n, cell in zip(header, row.cells, strict=True)}
                yield row_of(record, columns, number, self.path, as_text=True)

    @contextmanager
    def _opened(self, columns: Columns) -> Iterator[tuple[list[str], Iterator[Any]]]:
        names = [*columns.contents, columns.id_column, *columns.keep]
        with open_csv(self.path, 'utf-8') as text:
            rows = RowReader(text, self.path.name, 'auto', header=names).rows()
            header = next(rows, None)
            if header is None:
                raise DataError(f'{str(self.path)!r} holds no header, nor anything else')
            yield [cell.strip() for cell in header.cells], rows


class DocumentsInput(InputFile):
    """Whatever else `finetuner.data.open_documents` opens: rows are Documents, kept are their tags."""

    def __init__(self, path: Path) -> None:
        """See `InputFile`."""
        super().__init__(path)
        self._docs: Sequence[Document] | None = None
        self._is_folder = path.is_dir()
        # what is read row by row gets new ids at each reading
        self._has_ids = not self._is_folder and path.suffix.lower() not in CSV_ENDINGS

    def fingerprint(self) -> str:
        """See `InputFile.fingerprint`; of a folder, of all files in it."""
        if not self._is_folder:
            return super().fingerprint()
        digest = hashlib.sha256()
        try:
            for name in files_below(self.path):
                state = os.stat(name)
                known = (
                    f'{os.path.relpath(name, self.path)}\0{state.st_size}\0{state.st_mtime_ns}\n'
                )
                digest.update(known.encode(errors='surrogateescape'))
        except OSError as error:
            raise self._unreadable(error) from error
        return f'sha256 {digest.hexdigest()} of its files'

    def check_columns(self, columns: Columns) -> None:
        """See `InputFile.check_columns`."""
        named = {'content': columns.content, 'id': columns.id}
        for option, name in named.items():
            if name is not None:
                raise ConfigError(
                    f'{option}={name!r}: {self.path.name} has no columns: leave it out, or encode '
                    'Parquet, JSON Lines and CSV files with a header in a call of their own'
                )
        if columns.keep and not self._has_ids:
            raise ConfigError(
                f'keep={list(columns.keep)}: {self.path.name} has no columns, nor tags: leave it out'
            )

    def num_rows(self, columns: Columns) -> int:
        """See `InputFile.num_rows`."""
        return len(self._opened())

    def rows(self, start: int, stop: int, columns: Columns) -> Iterator[Row]:
        """See `InputFile.rows`."""
        for number, doc in enumerate(self._opened()[start:stop], start):
            kept = tuple(text_of(doc.tags.get(name)) for name in columns.keep)
            yield Row(self._id(doc, number), doc, kept)

    def _id(self, doc: Document, number: int) -> str:
        if self._has_ids:
            return doc.id
        if self._is_folder:
            return Path(os.path.relpath(doc.uri, self.path.parent)).as_posix()
        return f'{self.path.name}:{number}'

    def _opened(self) -> Sequence[Document]:
        if self._docs is None:
            is_csv = self.path.suffix.lower() in CSV_ENDINGS and not self._is_folder
            # pictures are read where they lie, when their turn comes
            options = CSVOptions(convert_to_blob=False) if is_csv else None
            self._docs = open_documents(self.path, options, on_broken='skip')
        return self._docs


def open_input(path: Path, columns: Columns) -> InputFile:
    """What reads a file or folder."""
    ending = path.suffix.lower()
    if not path.is_dir():
        if ending == '.parquet':
            return ParquetInput(path)
        if ending in JSON_LINES_ENDINGS:
            return JsonLinesInput(path)
        if ending == TAR_ENDING:
            from finetuner.bulk.tar_input import TarInput

            return TarInput(path)
        if ending in CSV_ENDINGS and columns.content is not None:
            return CSVInput(path)
    return DocumentsInput(path)


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files and folders that are meant.

    Args:
        patterns: paths, and patterns with `*`, `?`, `[...]`, `**`, `{000..099}` and `{a,b}`. A folder
            with data files right in it stands for these, any other for the pictures in it.

    Returns:
        Absolute paths; those of a pattern or folder in order of their names, each once.

    Raises:
        DataError: a pattern fits nothing, or there is no such file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        # one by one: braces may name a thousand million
        for path in expand_pattern(pattern):
            if not path.exists():
                raise DataError(f'there is no file or folder {str(path)!r}')
            found.update(dict.fromkeys(_data_files(Path(os.path.abspath(path)))))
    if not found:
        raise DataError('there is no input: give a file, a folder or a pattern')
    return list(found)


def _data_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = sorted(path.iterdir())
    files = [p for p in inside if p.suffix.lower() in _DATA_ENDINGS and p.is_file()]
    return [p for p in files if not p.name.startswith('.')] or [path]
