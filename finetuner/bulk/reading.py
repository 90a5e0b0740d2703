"""Read encoded data sets: ids and embeddings, shard by shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from finetuner.bulk.manifest import EMBEDDING, ID, MANIFEST, Manifest, from_json, shard_name
from finetuner.bulk.output import check_file, import_parquet
from finetuner.excepts import DataError, NotFoundError


class EncodedDataset:
    """What `finetuner.encode_dataset` wrote, in the order of the input.

    Attributes:
        folder: the output.
        manifest: what it says of itself.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Use `open_encoded`."""
        self.folder = folder
        self.manifest = manifest

    @property
    def dimension(self) -> int:
        """Of an embedding."""
        return self.manifest.dimension

    @property
    def num_shards(self) -> int:
        """How many times `shard` and iterating give something."""
        return len(self.manifest.shards)

    def __len__(self) -> int:
        """Return the number of embeddings; rows that failed have none."""
        return self.manifest.num_rows - self.manifest.num_failed

    def __iter__(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Read the shards, one after the other; see `shard`."""
        return (self.shard(place) for place in range(self.num_shards))

    def shard(self, place: int) -> tuple[list[str], np.ndarray]:
        """Read one shard.

        Args:
            place: from 0 to `num_shards` - 1.

        Returns:
            The ids of its rows, and their embeddings, float32 `[n, dimension]`. Rows that failed are
            left out, so there may be none at all.

        Raises:
            DataError: a file is missing or not what was written.
            IndexError: there is no such shard.
        """
        record = self.manifest.shards[place]
        for file in record.files:
            check_file(self.folder / file.name, file)
        name = shard_name(record.shard)
        if self.manifest.format == 'parquet':
            ids, embeddings = self._from_parquet(self.folder / f'{name}.parquet')
        else:
            ids, embeddings = self._from_numpy(name)
        if embeddings.shape != (record.num_rows - record.num_failed, self.dimension):
            raise DataError(
                f'{name} holds embeddings of shape {embeddings.shape}, unlike what its manifest says'
            )
        return ids, embeddings

    def _from_parquet(self, path: Path) -> tuple[list[str], np.ndarray]:
        parquet = import_parquet(f'reading {path.name!r}')
        import pyarrow.compute

        table = parquet.read_table(path, columns=[ID, EMBEDDING]).combine_chunks()
        table = table.filter(pyarrow.compute.is_valid(table[EMBEDDING]))
        chunks = [chunk.flatten().to_numpy() for chunk in table[EMBEDDING].chunks]
        numbers = np.concatenate(chunks) if chunks else np.empty(0, np.float32)
        return table[ID].to_pylist(), numbers.reshape(-1, self.dimension)

    def _from_numpy(self, name: str) -> tuple[list[str], np.ndarray]:
        embeddings = np.load(self.folder / f'{name}.npy', allow_pickle=False)
        with (self.folder / f'{name}.rows.jsonl').open(encoding='utf-8') as lines:
            rows = [json.loads(line) for line in lines]
        good = [not row['failed'] for row in rows]
        ids = [row[ID] for row, is_good in zip(rows, good, strict=True) if is_good]
        return ids, embeddings if all(good) else embeddings[np.array(good, bool)]


def open_encoded(output: str | os.PathLike[str], allow_missing: bool = False) -> EncodedDataset:
    """Open what `finetuner.encode_dataset` wrote.

    Args:
        output: its folder.
        allow_missing: open it although some of the input could not be read.

    Raises:
        NotFoundError: there is nothing of the kind, or it is not finished.
        DataError: its manifest is damaged, or some of the input is missing in it.
    """
    folder = Path(output).expanduser()
    if not (folder / MANIFEST).is_file():
        raise NotFoundError(
            f'there is no {MANIFEST} in {str(folder)!r}: no data set was encoded there, or it is not '
            'finished; give the same call, or command, again and it goes on'
        )
    manifest = from_json(Manifest, folder / MANIFEST)
    if manifest.missing and not allow_missing:
        first = manifest.missing[0]
        others = len(manifest.missing) - 1
        raise DataError(
            f'{str(folder)!r} is without {first.source!r} ({first.reason})'
            + (f' and {others} others' if others else '')
            + ': mend them and encode again, or open it with allow_missing=True'
        )
    return EncodedDataset(folder, manifest)
