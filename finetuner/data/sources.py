"""Training data in whatever form it is held: opened as a sequence of Documents, read when needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, TypeGuard, runtime_checkable

from docarray import Document, DocumentArray

from finetuner.data.contents import shown_value, wrong_field
from finetuner.data.csv import CSVOptions, read_csv
from finetuner.data.folders import read_folder
from finetuner.data.patterns import expand_patterns, is_pattern, names_files
from finetuner.excepts import ConfigError, DataError, FinetunerError

CSV_ENDINGS = ('.csv', '.tsv')
JSON_LINES_ENDINGS = ('.jsonl', '.ndjson')
SQLITE_ENDINGS = ('.db', '.sqlite', '.sqlite3')
TAR_ENDING = '.tar'
ENDINGS = (
    *CSV_ENDINGS,
    *JSON_LINES_ENDINGS,
    '.parquet',
    TAR_ENDING,
    '.docs',
    *SQLITE_ENDINGS,
)

# of docarray's protobuf stream: a byte 1 and the number of Documents
_HEADER_BYTES = 9


@runtime_checkable
class HasTrainingDocuments(Protocol):
    """What gives Documents to train on when asked, such as a collection of pairs."""

    def training_documents(self) -> Iterator[Document]:
        """The Documents, one by one."""
        ...


@runtime_checkable
class HasRowDocuments(Protocol):
    """What gives Documents when told which columns they are made of: a declared dataset, or rows of it."""

    def row_documents(
        self, content: str | None, label: str | None, on_broken: Literal['stop', 'skip'] = 'stop'
    ) -> Iterator[Document]:
        """The Documents, one by one."""
        ...


def open_documents(
    source: Iterable[Document]
    | HasTrainingDocuments
    | HasRowDocuments
    | Sequence[str | os.PathLike[str]]
    | str
    | os.PathLike[str]
    | TextIO,
    csv_options: CSVOptions | None = None,
    on_broken: Literal['stop', 'skip'] = 'stop',
    content: str | None = None,
    label: str | None = None,
) -> Sequence[Document]:
    """Open training data of any form as a sequence of Documents.

    | source | what comes back |
    |---|---|
    | DocumentArray | itself; one in SQLite storage as `SQLiteDocuments`, read in place |
    | list or tuple of Documents | a DocumentArray |
    | `.csv`, `.tsv`, an open text file | see `read_csv` |
    | `.jsonl`, `.ndjson`; `.parquet` | see `read_json_lines`, `read_parquet` |
    | `.tar` | WebDataset: see `finetuner.data.webdataset.sample_document` |
    | `'train-*.parquet'`, `'train-{000..099}.tar'`, a list of paths | these shards, one after another |
    | a folder | see `read_folder` |
    | `.docs`, or any file written by `save_documents` | `StoredDocuments`, read in place |
    | `.db`, `.sqlite`, `.sqlite3` | `SQLiteDocuments`, read in place |
    | a `TrainingSet` | the Documents of its group `train` |
    | a class made by `@dataset`, or rows of it | a Document a row; see `Rows.to_documents` |
    | any other iterable of Documents | |

    Whatever is not read in place is written to a temporary file first, one Document at a time, so
    that it need not fit into memory; the file goes with the sequence.

    Args:
        source: as above.
        csv_options: how a CSV file is read; only for those.
        on_broken: `'stop'` at a picture that a CSV, JSON Lines or Parquet file names and that is
            not there, or leave it to whoever opens the picture to `'skip'` it; of a dataset, `'stop'`
            at a row whose content or label cannot be computed, or `'skip'` it here.
        content: of a dataset, the column of the contents; of WebDataset shards `'image'`, `'text'` or
            `'pair'`; None where only one can be meant.
        label: of a dataset, the column of the labels, None for none; of WebDataset shards the ending
            of a file or a key of the json, None for `cls`.

    Raises:
        ConfigError: `csv_options`, `content` or `label` with another source, or no such column.
        DataError: there is no such file, its ending is unknown, or it holds what cannot be read.
    """
    from finetuner.data.records import shard_documents
    from finetuner.data.shard_files import open_shards
    from finetuner.data.stored.files import LazyDocuments, spool_documents

    _check_options(source, csv_options)
    check_columns(content, label, [source])
    if isinstance(source, HasRowDocuments):
        return spool_documents(source.row_documents(content, label, on_broken))
    if isinstance(source, DocumentArray):
        return _opened_array(source)
    if isinstance(source, LazyDocuments):
        return source
    if are_shards(source):
        paths = expand_patterns(source)
        if len(paths) > 1:
            return spool_documents(shard_documents(open_shards(paths, on_broken, content, label)))
        # may be of any form
        source = paths[0]
    if isinstance(source, (list, tuple)):
        return DocumentArray(_checked(source))
    if isinstance(source, (str, os.PathLike)):
        return _open_path(source, csv_options, on_broken, content, label)
    if isinstance(source, HasTrainingDocuments):
        return spool_documents(_checked(source.training_documents()))
    if _is_open_file(source):
        return spool_documents(read_csv(source, csv_options, on_broken))
    if isinstance(source, Iterable) and not isinstance(source, (Document, bytes, bytearray, dict)):
        return spool_documents(_checked(source))
    hint = ': put it into a DocumentArray' if isinstance(source, Document) else ''
    raise DataError(
        f'data is a {type(source).__name__}{hint}; allowed are Documents (a DocumentArray, a list, '
        f'an iterator), a folder, and the paths of files that end in {" ".join(ENDINGS)}'
    )


def check_columns(content: str | None, label: str | None, sources: Iterable[Any]) -> None:
    """Refuse names of columns where no data has any.

    Args:
        content: column of the contents, if it was given.
        label: column of the labels, if it was given.
        sources: the data.

    Raises:
        ConfigError: none of it is a declared dataset, or WebDataset shards.
    """
    given = {'content': content, 'label': label}
    named = [f'{name}={value!r}' for name, value in given.items() if value is not None]
    if named and not any(map(has_columns, sources)):
        raise ConfigError(
            f'{" and ".join(named)}: columns of a dataset (finetuner.columns), of rows of one, or of '
            f'WebDataset shards ({TAR_ENDING}), and the data is none: leave them out'
        )


def has_columns(source: Any) -> bool:
    """Say whether `open_documents` takes `content` and `label` for the source."""
    if isinstance(source, HasRowDocuments):
        return True
    if are_shards(source):
        source = source if isinstance(source, (str, os.PathLike)) else source[0]
    elif not isinstance(source, (str, os.PathLike)):
        return False
    return _ending(source) == TAR_ENDING and not os.path.isdir(source)


def are_shards(source: Any) -> bool:
    """Say whether `open_documents` would read the source as shards: a list of paths, or a pattern."""
    if isinstance(source, (str, os.PathLike)):
        return is_pattern(os.fspath(source))
    if not isinstance(source, (list, tuple)) or not source:
        return False
    # a list of other texts is one of texts that should be Documents
    return all(
        isinstance(each, os.PathLike) or (isinstance(each, str) and is_source_path(each))
        for each in source
    )


def is_source_path(text: str) -> bool:
    """Say whether a text given as data means a file or folder.

    Anything else is the name of data that was pushed, or a `sha256:` reference.
    """
    if not text or text.startswith('sha256:'):
        return False
    # no name of pushed data begins like this, and a mistyped path should be called a path
    if text.startswith(('~', './', '../', os.sep)) or _ending(text) in ENDINGS:
        return True
    # data may be pushed under such a name as well
    return os.path.exists(text) or names_files(text)


def is_csv(source: Any) -> bool:
    """Say whether `open_documents` would read the source as CSV, and so with `CSVOptions`."""
    if isinstance(source, (str, os.PathLike)):
        return _ending(source) in CSV_ENDINGS and not os.path.isdir(source)
    return _is_open_file(source)


def _is_open_file(source: Any) -> TypeGuard[TextIO]:
    return hasattr(source, 'read')


def _ending(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(os.fspath(path))[1].lower()


def _check_options(source: Any, csv_options: CSVOptions | None) -> None:
    if csv_options is None:
        return
    if not isinstance(csv_options, CSVOptions):
        raise ConfigError(f'csv_options is a {type(csv_options).__name__}, not CSVOptions')
    if not is_csv(source):
        what = (
            repr(str(source)) if isinstance(source, (str, os.PathLike)) else type(source).__name__
        )
        raise ConfigError(
            f'csv_options are for CSV files ({" ".join(CSV_ENDINGS)}), and the data is {what}: '
            'leave them out'
        )


def _opened_array(docs: DocumentArray) -> Sequence[Document]:
    from docarray.array.sqlite import DocumentArraySqlite

    from finetuner.data.stored.files import SQLiteDocuments

    return SQLiteDocuments.of(docs) if isinstance(docs, DocumentArraySqlite) else docs


def _checked(elements: Iterable[Any]) -> Iterator[Document]:
    for position, element in enumerate(_named_failures(elements)):
        if not isinstance(element, Document):
            raise DataError(
                f'element {position} is a {type(element).__name__}, not a Document: wrap it, such '
                'as Document(text=...) or Document(uri=...), with its label in the tag '
                "'finetuner_label'"
            )
        fault = wrong_field(element)
        if fault:
            raise DataError(f'Document {position}: {fault}')
        yield element


def _named_failures(elements: Iterable[Any]) -> Iterator[Any]:
    count = 0
    iterator = iter(elements)
    while True:
        try:
            element = next(iterator)
        except StopIteration:
            return
        except FinetunerError:
            raise
        except Exception as error:
            # it is the user's own code, which may raise anything
            raise DataError(
                f'the iterator of the data failed after {count} Documents: '
                f'{type(error).__name__}: {error}'
            ) from error
        count += 1
        yield element


def _open_path(
    source: str | os.PathLike[str],
    options: CSVOptions | None,
    on_broken: Literal['stop', 'skip'],
    content: str | None,
    label: str | None,
) -> Sequence[Document]:
    from finetuner.data.records import shard_documents
    from finetuner.data.shard_files import SHARD_ENDINGS, open_shards
    from finetuner.data.stored.files import SQLiteDocuments, StoredDocuments, spool_documents

    name = os.path.expanduser(source)
    # not of a Path: that of an empty name is the folder one stands in
    if os.path.isdir(name):
        return spool_documents(read_folder(name))
    if not os.path.isfile(name):
        raise DataError(f'there is no file or folder {shown_value(str(source))}')
    path = Path(name)
    ending = path.suffix.lower()
    try:
        if ending in SQLITE_ENDINGS:
            return SQLiteDocuments(path)
        if ending == '.docs' or (ending not in ENDINGS and _begins_like_documents(path)):
            return StoredDocuments(path)
    except OSError as error:
        raise DataError(f'{str(source)!r} cannot be read: {error.strerror or error}') from error
    if ending in CSV_ENDINGS:
        return spool_documents(read_csv(path, options, on_broken))
    if ending in SHARD_ENDINGS:
        return spool_documents(shard_documents(open_shards(path, on_broken, content, label)))
    raise DataError(
        f'the ending {ending!r} of {path.name!r} is none that is known: allowed are '
        f'{" ".join(ENDINGS)}, folders, and files written with `save_documents` or '
        "`docs.save_binary(path, protocol='protobuf')`"
    )


def _begins_like_documents(path: Path) -> bool:
    """Look at the first bytes: docarray writes such files under any name.

    Pickle counts too: opening it as Documents refuses it, and says how to write it instead.
    """
    with path.open('rb') as file:
        header = file.read(_HEADER_BYTES)
    if header[:1] == b'\x80':
        return True
    num_docs = int.from_bytes(header[1:], 'big')
    is_whole = len(header) == _HEADER_BYTES and header[:1] == b'\x01'
    return is_whole and num_docs <= path.stat().st_size
