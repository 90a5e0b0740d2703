"""Columns of encoded data sets, beside the embeddings: read shard by shard, and single rows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetuner.bulk.manifest import EMBEDDING, ID, shard_name
from finetuner.bulk.output import import_parquet
from finetuner.bulk.reading import EncodedDataset
from finetuner.excepts import ConfigError, unknown_name

_FAILED = 'failed'


def row_starts(dataset: EncodedDataset) -> NDArray[np.int64]:
    """Where each shard begins among the rows that have an embedding.

    Returns:
        `[num_shards + 1]`: the last is the number of rows.
    """
    sizes = [shard.num_rows - shard.num_failed for shard in dataset.manifest.shards]
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def read_column(dataset: EncodedDataset, place: int, name: str) -> list[Any]:
    """Read a column of a shard, of the rows that have an embedding.

    Args:
        dataset: whose.
        place: which shard, from 0.
        name: of a column that was kept, or `id`.

    Raises:
        ConfigError: it has no such column.
    """
    stem = dataset.folder / shard_name(dataset.manifest.shards[place].shard)
    if dataset.manifest.format == 'parquet':
        return _from_parquet(stem.with_suffix('.parquet'), name)
    with stem.with_name(f'{stem.name}.rows.jsonl').open(encoding='utf-8') as lines:
        rows = [json.loads(line) for line in lines]
    if rows and name not in rows[0]:
        raise _no_column(dataset.folder, name, set(rows[0]) - {_FAILED})
    return [row[name] for row in rows if not row[_FAILED]]


def take_column(dataset: EncodedDataset, positions: Any, name: str) -> NDArray[Any]:
    """Read a column at some rows; only shards that hold some of them are read.

    Args:
        dataset: whose.
        positions: ints of any shape, among the rows that have an embedding.
        name: of the column.

    Returns:
        Objects of the same shape.
    """
    wanted, inverse = np.unique(np.asarray(positions, np.int64), return_inverse=True)
    starts = row_starts(dataset)
    places = np.searchsorted(starts, wanted, 'right') - 1
    taken = np.empty(len(wanted), object)
    for place in np.unique(places).tolist():
        column = read_column(dataset, place, name)
        for number in np.flatnonzero(places == place).tolist():
            taken[number] = column[wanted[number] - starts[place]]
    return taken[inverse.reshape(np.shape(positions))]


def _from_parquet(path: Path, name: str) -> list[Any]:
    parquet = import_parquet(f'reading {path.name!r}')
    import pyarrow.compute

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if name not in names or name == EMBEDDING:
            raise _no_column(path.parent, name, set(names) - {EMBEDDING})
        # which rows failed shows in their embeddings alone
        table = file.read(columns=[name, EMBEDDING])
    return table.filter(pyarrow.compute.is_valid(table[EMBEDDING]))[name].to_pylist()


def _no_column(folder: Path, name: str, known: set[str]) -> ConfigError:
    return ConfigError(
        f'{str(folder)!r}: {unknown_name("column", name, known or {ID})} Encode with keep=[{name!r}] '
        'for its values to be there'
    )
