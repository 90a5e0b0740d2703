"""Encoded data sets for tests, without a model."""

from __future__ import annotations

import numpy as np
import pyarrow

from finetuner.bulk.manifest import MANIFEST, Manifest, ShardRecord, as_json, shard_name
from finetuner.bulk.output import described, write_file
from finetuner.bulk.rows import Row
from finetuner.bulk.writing import file_names, open_writer


def write_encoded(
    folder, embeddings, labels=None, ids=None, rows_per_shard=40, failed=(), format_name='parquet'
):
    """What `finetuner.encode_dataset` writes of such embeddings; rows of `failed` have none."""
    folder.mkdir(parents=True, exist_ok=True)
    count, dimension = np.shape(embeddings)
    ids = [f'row {number}' for number in range(count)] if ids is None else ids
    keep = [] if labels is None else ['label']
    types = [] if labels is None else [pyarrow.array(list(labels)).type]
    shards = []
    for number, start in enumerate(range(0, count, rows_per_shard)):
        stop = min(count, start + rows_per_shard)
        paths = [folder / name for name in file_names(shard_name(number), format_name)]
        with open_writer(paths, dimension, stop - start, keep, types) as writer:
            for row in range(start, stop):
                kept = () if labels is None else (labels[row],)
                made = Row(doc=None, id=ids[row], kept=kept, error='')
                writer.add(made, None if row in failed else np.float32(embeddings[row]))
        lost = sum(row in failed for row in range(start, stop))
        files = tuple(map(described, paths))
        shards.append(ShardRecord(number, 'x', start, stop, files, stop - start, lost))
    manifest = Manifest(
        'm', 's', dimension, 'onnx', 'fp32', format_name, {}, tuple(shards), (), count,
        len(failed), 0.0,
    )  # fmt: skip
    write_file(folder / MANIFEST, as_json(manifest))
    return folder
