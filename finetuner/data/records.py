"""Training data as records, one a Document: JSON Lines and Parquet."""

from __future__ import annotations

import functools
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from docarray import Document

from finetuner.data.folders import picture_uri
from finetuner.data.pairs import join_pairs
from finetuner.data.record_forms import Pair, document_or_pair
from finetuner.excepts import ConfigError, DataError

_ROWS_READ_AT_ONCE = 64
_BUFFER_BYTES = 1024 * 1024

Chosen = Callable[[int], bool]


def read_json_lines(
    path: str | os.PathLike[str], on_broken: Literal['stop', 'skip'] = 'stop'
) -> Iterator[Document]:
    """Read training data from a JSON Lines file: an object on each line, a Document each.

    | keys | Documents |
    |---|---|
    | one of `text`, `uri`, `image`, `tensor`; `label` | class data |
    | the same with `matches`, a list of records with `label` 1 or -1 | sessions |
    | the same alone | instances |
    | `text` and `image` | text-image pairs |
    | `pair`, a list of two texts or records; `score` | scored pairs |
    | `pair` without a score | text-image pairs, or query-document pairs (see `join_pairs`) |
    | `chunks`, a list of two records; `score` or two of `modality` | pairs, as they are |

    `sentence1` and `sentence2`, `query` and `document`, or `anchor` and `positive` may stand for
    `pair`. Besides there are `id`, `tags`, and `finetuner_label` and `finetuner_score` for
    `label` and `score`. `uri` and `image` are absolute or relative to the file; `tensor` is a
    nested list. Null is as good as absent.

    Only query-document pairs are held in memory; everything else streams.

    Args:
        path: of the file, in UTF-8. Empty lines are skipped.
        on_broken: `'stop'` at a picture file that is not there, or leave it to whoever opens the
            picture to `'skip'` it.

    Yields:
        Documents, in order.

    Raises:
        DataError: no such file, a line that is no JSON object, or one that fits no form; the line
            is named.
    """
    return shard_documents([JsonLinesShard(existing_file(path), on_broken)])


def read_parquet(
    path: str | os.PathLike[str], on_broken: Literal['stop', 'skip'] = 'stop'
) -> Iterator[Document]:
    """Read training data from a Parquet file: a Document for each row, in batches.

    Args:
        path: of the file. Its columns are the keys of `read_json_lines`; `image` may also hold
            bytes, or bytes and path as Hugging Face's data sets do.
        on_broken: as for `read_json_lines`.

    Yields:
        Documents, in order.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: no such file, no Parquet, or a row that fits no form; the row is named, from 1.
    """
    return shard_documents([ParquetShard(existing_file(path), on_broken)])


def shard_documents(shards: Sequence[Shard]) -> Iterator[Document]:
    """Read the Documents of shards in order, as if they were one file.

    Only query-document pairs are held in memory, to be joined over all shards.

    Raises:
        DataError: there are no rows, or one is none; it is named.
    """
    made = ((where, shard.document(where, row)) for shard in shards for where, row in shard.rows())
    first = next(made, None)
    if first is None:
        more = f' and {len(shards) - 1} more' if len(shards) > 1 else ''
        hold = 'hold' if more else 'holds'
        raise DataError(f'{shards[0].path.name!r}{more} {hold} no records')
    are_pairs = isinstance(first[1], tuple)
    every = _alike(itertools.chain([first], made), are_pairs)
    yield from join_pairs(every) if are_pairs else every


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is there.

    Raises:
        DataError: there is none.
    """
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise DataError(f'there is no file {os.fspath(path)!r}')
    return file


class Shard(ABC):
    """A file of training data, read row by row; part of the rows can be left out unread.

    Attributes:
        path: of the file.
        num_groups: parts that can each be read without the others: row groups of Parquet, else 1.
    """

    num_groups = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def rows(
        self, group: int | None = None, chosen: Chosen | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Read rows in order, none of them longer held than it is used.

        Args:
            group: which of `num_groups`, from 0; None for all.
            chosen: takes the place of a row, from 0 in the group, and says whether it is read; None
                for all.

        Yields:
            What to call the row in a message, and what `document` makes a Document of.
        """

    @abstractmethod
    def num_rows(self, group: int | None = None) -> int:
        """Count the rows, as far as can be without reading them."""

    @abstractmethod
    def document(self, where: str, row: Any) -> Document | Pair:
        """Make a Document of a row, or two of a query-document pair without a score."""


class _RecordShard(Shard):
    """Rows that are records: mappings with the keys of `read_json_lines`."""

    def __init__(self, path: Path, on_broken: Literal['stop', 'skip'] = 'stop') -> None:
        super().__init__(path)
        self._locate = functools.partial(
            picture_uri, folder=path.parent, must_exist=on_broken == 'stop'
        )

    def document(self, where: str, row: Any) -> Document | Pair:
        return document_or_pair(row, self._locate, where)


class JsonLinesShard(_RecordShard):
    """A JSON Lines file."""

    def rows(
        self, group: int | None = None, chosen: Chosen | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Read lines; those not chosen are not parsed."""
        for number, (line_number, line) in enumerate(self._lines()):
            if chosen is None or chosen(number):
                where = f'line {line_number} of {self.path.name!r}'
                yield where, json_object(line, where)

    def num_rows(self, group: int | None = None) -> int:
        """Count the lines that are not empty."""
        return sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open('rb') as file:
                for number, line in enumerate(file, 1):
                    if number == 1:
                        line = line.removeprefix(b'\xef\xbb\xbf')
                    if line.strip():
                        yield number, line
        except OSError as error:
            raise DataError(
                f'{str(self.path)!r} cannot be read: {error.strerror or error}'
            ) from error


def json_object(line: bytes, where: str) -> Mapping[str, Any]:
    """Parse a line of JSON Lines.

    Args:
        line: in UTF-8.
        where: its place, for messages.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        record = json.loads(line.decode('utf-8'), parse_constant=_refuse_constant)
        if b'\\ud' in line.lower():
            # half a surrogate pair is JSON, but no text that could be stored
            json.dumps(record, ensure_ascii=False).encode('utf-8')
    except UnicodeError as error:
        raise DataError(f'{where} is not UTF-8: {error}') from error
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where} is not valid JSON: {error}') from error
    if not isinstance(record, dict):
        raise DataError(
            f'{where} is a {type(record).__name__}, not an object: JSON Lines have one object '
            '{...} on each line'
        )
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is no JSON number')


class ParquetShard(_RecordShard):
    """A Parquet file."""

    @functools.cached_property
    def num_groups(self) -> int:  # type: ignore[override]
        """Row groups of the file."""
        with self._opened() as file:
            return file.metadata.num_row_groups

    def rows(
        self, group: int | None = None, chosen: Chosen | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Read rows in batches; those not chosen are decoded and no more."""
        groups = None if group is None else [group]
        with self._opened() as file:
            first = sum(file.metadata.row_group(g).num_rows for g in range(group or 0))
            place = 0
            for batch in file.iter_batches(_ROWS_READ_AT_ONCE, row_groups=groups):
                places = list(range(place, place + batch.num_rows))
                place += batch.num_rows
                if chosen is not None:
                    wanted = [each for each in places if chosen(each)]
                    batch = batch.take([each - places[0] for each in wanted]) if wanted else None
                    places = wanted
                if batch is not None:
                    for each, row in zip(places, _rows_of(batch, self.path), strict=True):
                        yield f'row {first + each + 1} of {self.path.name!r}', row

    def num_rows(self, group: int | None = None) -> int:
        """Look the number up in the file's own account of itself."""
        with self._opened() as file:
            metadata = file.metadata
            return metadata.num_rows if group is None else metadata.row_group(group).num_rows

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigError(
                f"reading {self.path.name!r} needs pyarrow: pip install 'finetuner[parquet]'"
            ) from error
        try:
            # with a buffer, or pyarrow reads whole row groups, which may be the whole file
            with parquet.ParquetFile(
                self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False
            ) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            reason = ' '.join(str(error).split())
            raise DataError(f'{str(self.path)!r} cannot be read as Parquet: {reason}') from error


def _rows_of(batch: Any, path: Path) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except ValueError as error:
        # text that is no UTF-8, dates that Python does not have
        raise DataError(f'{str(path)!r} holds values that Python cannot read: {error}') from error


def _alike(
    made: Iterable[tuple[str, Document | Pair]], are_pairs: bool
) -> Iterator[Document | Pair]:
    for where, doc_or_pair in made:
        if isinstance(doc_or_pair, tuple) != are_pairs:
            raise DataError(
                f'{where}: query-document pairs, without a score, do not mix with other records: '
                f'this is {"none" if are_pairs else "one"}, unlike the first'
            )
        yield doc_or_pair
