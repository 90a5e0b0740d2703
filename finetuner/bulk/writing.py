"""The files of a shard, written as embeddings come."""

from __future__ import annotations

import abc
import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.bulk.manifest import EMBEDDING, ID
from finetuner.bulk.output import finished_file, import_parquet
from finetuner.bulk.rows import Row

# rows of a row group: few enough to be held, many enough to be read fast
_ROWS_AT_ONCE = 2048


class ShardWriter(abc.ABC):
    """Writes rows in order."""

    def __init__(self, dimension: int, keep: Sequence[str]) -> None:
        """Take what all rows have.

        Args:
            dimension: of the embeddings.
            keep: columns that are copied.
        """
        self._dimension = dimension
        self._keep = tuple(keep)
        self._rows: list[Row] = []
        self._embeddings: list[np.ndarray | None] = []

    def add(self, row: Row, embedding: np.ndarray | None) -> None:
        """Add a row; None where it failed."""
        self._rows.append(row)
        self._embeddings.append(embedding)
        if len(self._rows) >= _ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._rows:
            return
        is_good = np.array([embedding is not None for embedding in self._embeddings])
        values = np.full((len(self._rows), self._dimension), np.nan, np.float32)
        if is_good.any():
            values[is_good] = [e for e in self._embeddings if e is not None]
        self._write(self._rows, values, is_good)
        self._rows, self._embeddings = [], []

    @abc.abstractmethod
    def _write(self, rows: list[Row], values: np.ndarray, is_good: np.ndarray) -> None:
        """Write rows with their embeddings, `[n, dimension]`, and which of them there are, `[n]`."""


class _ParquetShard(ShardWriter):
    def __init__(self, path: Path, dimension: int, keep: Sequence[str], types: list[Any]) -> None:
        super().__init__(dimension, keep)
        import pyarrow

        parquet = import_parquet("format='parquet'")
        embedding = pyarrow.list_(pyarrow.float32(), dimension)
        kept = list(zip(keep, types, strict=True))
        fields = [(ID, pyarrow.string()), *kept, (EMBEDDING, embedding)]
        self._schema = pyarrow.schema(fields)
        others = [ID, *keep]
        self.file = parquet.ParquetWriter(
            path,
            self._schema,
            # numbers of embeddings neither repeat nor compress
            use_dictionary=False,
            compression=dict.fromkeys(others, 'zstd'),
            write_statistics=others,
        )

    def _write(self, rows: list[Row], values: np.ndarray, is_good: np.ndarray) -> None:
        import pyarrow

        numbers = pyarrow.array(np.where(is_good[:, None], values, 0).ravel(), pyarrow.float32())
        embeddings = pyarrow.FixedSizeListArray.from_arrays(
            numbers, type=self._schema.field(EMBEDDING).type, mask=pyarrow.array(~is_good)
        )
        columns = [pyarrow.array([row.id for row in rows], pyarrow.string())]
        for place, name in enumerate(self._keep):
            kept = [row.kept[place] for row in rows]
            columns.append(pyarrow.array(kept, self._schema.field(name).type))
        table = pyarrow.Table.from_arrays([*columns, embeddings], schema=self._schema)
        self.file.write_table(table, row_group_size=len(rows))


class _NumpyShard(ShardWriter):
    def __init__(
        self, arrays: Any, lines: Any, dimension: int, keep: Sequence[str], num_rows: int
    ) -> None:
        super().__init__(dimension, keep)
        self._arrays = arrays
        self._lines = lines
        header = {'descr': '<f4', 'fortran_order': False, 'shape': (num_rows, dimension)}
        np.lib.format.write_array_header_1_0(arrays, header)

    def _write(self, rows: list[Row], values: np.ndarray, is_good: np.ndarray) -> None:
        self._arrays.write(values.astype('<f4').tobytes())
        for row, good in zip(rows, is_good, strict=True):
            kept = dict(zip(self._keep, row.kept, strict=True))
            record = {ID: row.id, 'failed': not good, **kept}
            self._lines.write(json.dumps(record, ensure_ascii=False, default=_plain) + '\n')


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def file_names(name: str, format_name: str) -> tuple[str, ...]:
    """What the files of a shard are called."""
    return (
        (f'{name}.parquet',) if format_name == 'parquet' else (f'{name}.npy', f'{name}.rows.jsonl')
    )


@contextmanager
def open_writer(
    paths: Sequence[Path], dimension: int, num_rows: int, keep: Sequence[str], types: list[Any]
) -> Iterator[ShardWriter]:
    """Write a shard: its files are there when the block ends well, and only then.

    Args:
        paths: of its files, as `file_names` gives them.
        dimension: of the embeddings.
        num_rows: how many will be added.
        keep: columns that are copied.
        types: their Arrow types, for Parquet.
    """
    with ExitStack() as stack:
        unfinished = [stack.enter_context(finished_file(path)) for path in paths]
        if len(paths) == 1:
            writer = _ParquetShard(unfinished[0], dimension, keep, types)
            with writer.file:
                yield writer
                writer.flush()
            return
        with unfinished[0].open('wb') as arrays, unfinished[1].open('w', encoding='utf-8') as lines:
            numpy_writer = _NumpyShard(arrays, lines, dimension, keep, num_rows)
            yield numpy_writer
            numpy_writer.flush()
