"""Training data as records, one a Document: JSON Lines and Parquet."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from docarray import Document

from finetuner.data.folders import picture_uri
from finetuner.data.pairs import join_pairs
from finetuner.data.record_forms import Pair, document_or_pair
from finetuner.excepts import ConfigError, DataError

_ROWS_READ_AT_ONCE = 64
_BUFFER_BYTES = 1024 * 1024


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
    file = _existing(path)
    return _documents(_json_records(file), file, on_broken == 'stop')


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
    file = _existing(path)
    return _documents(_parquet_records(file), file, on_broken == 'stop')


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise DataError(f'there is no file {os.fspath(path)!r}')
    return file


def _json_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open('rb') as file:
            for number, line in enumerate(file, 1):
                where = f'line {number} of {path.name!r}'
                if number == 1:
                    line = line.removeprefix(b'\xef\xbb\xbf')
                if line.strip():
                    yield where, json_object(line, where)
    except OSError as error:
        raise DataError(f'{str(path)!r} cannot be read: {error.strerror or error}') from error


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


def _parquet_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"reading {path.name!r} needs pyarrow: pip install 'finetuner[parquet]'"
        ) from error

    numbers = itertools.count(1)
    try:
        # with a buffer, or pyarrow reads whole row groups, which may be the whole file
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(_ROWS_READ_AT_ONCE):
                for record in _rows_of(batch, path):
                    yield f'row {next(numbers)} of {path.name!r}', record
    except (pyarrow.ArrowException, OSError) as error:
        reason = ' '.join(str(error).split())
        raise DataError(f'{str(path)!r} cannot be read as Parquet: {reason}') from error


def _rows_of(batch: Any, path: Path) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except ValueError as error:
        # text that is no UTF-8, dates that Python does not have
        raise DataError(f'{str(path)!r} holds values that Python cannot read: {error}') from error


def _documents(
    records: Iterable[tuple[str, Mapping[str, Any]]], path: Path, must_exist: bool
) -> Iterator[Document]:
    locate = functools.partial(picture_uri, folder=path.parent, must_exist=must_exist)
    made = ((where, document_or_pair(record, locate, where)) for where, record in records)
    first = next(made, None)
    if first is None:
        raise DataError(f'{path.name!r} holds no records')
    are_pairs = isinstance(first[1], tuple)
    every = _alike(itertools.chain([first], made), are_pairs)
    yield from join_pairs(every) if are_pairs else every


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
