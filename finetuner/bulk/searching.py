"""Search, evaluation and mining over encoded data sets, of which no worker holds more than a shard."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from finetuner.bulk.output import finished_file, import_parquet
from finetuner.bulk.search_plan import Encoded, SearchPlan, check_whole, opened_encoded
from finetuner.bulk.shard_search import Queries
from finetuner.bulk.stored_columns import read_column, row_starts, take_column
from finetuner.evaluation import METRICS, all_metrics, count_relevant, mean_metrics, plain_labels
from finetuner.excepts import ConfigError

Engine = Literal['exact', 'faiss']


@dataclass(frozen=True)
class MinedSummary:
    """What `mine_negatives` did.

    Attributes:
        output: the file.
        num_anchors: rows in it.
        num_without: of them, those for which there is no negative.
    """

    output: Path
    num_anchors: int
    num_without: int


def search_shards(
    query: Encoded | NDArray[Any],
    index: Encoded,
    k: int = 20,
    distance: str = 'cosine',
    num_workers: int = 1,
    ray_address: str | None = None,
    engine: Engine = 'exact',
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each query's nearest neighbours in an encoded data set, shard by shard.

    Args:
        query: folder of an encoded data set, what `open_encoded` gives, or an array
            `[num_queries, dimension]`.
        index: folder of an encoded data set, or what `open_encoded` gives.
        k: how many neighbours; where the index has fewer, all of them.
        distance: `'cosine'`, `'euclidean'` or `'sqeuclidean'`.
        num_workers: processes that search; 1 is this one. With a Ray cluster, tasks at a time.
        ray_address: of a Ray cluster whose machines see the same folders: `auto`, `host:port` or
            `local`.
        engine: `'exact'` finds what `finetuner.search.search` finds over all of the index; `'faiss'`
            computes in float32 with a flat index of faiss, in whose last digits others may be nearest.

    Returns:
        Distances, `[num_queries, k]` float64, smallest first, and positions among the rows of the
        index that have an embedding, `[num_queries, k]` int64. `finetuner.bulk.take_column` says what
        stands there.

    Raises:
        ConfigError: an argument is wrong.
        DataError: a shard is damaged, an embedding not finite, or of another dimension.
        NotFoundError: there is no such data set.
        ServerError: no Ray cluster answers, or processes died.
    """
    plan = SearchPlan.of(
        query, opened_encoded(index), k, distance, engine, num_workers, ray_address
    )
    found = [(squared, positions) for _, squared, positions, _ in plan.run()]
    squared = np.concatenate([each for each, _ in found])
    positions = np.concatenate([each for _, each in found])
    return plan.distances(squared), torch.from_numpy(positions)


def evaluate_shards(
    query: Encoded,
    index: Encoded | None = None,
    label: str = 'label',
    k: int = 20,
    distance: str = 'cosine',
    num_workers: int = 1,
    ray_address: str | None = None,
    engine: Engine = 'exact',
    exclude_self: bool = True,
) -> dict[str, float]:
    """Search an encoded data set with another, and average the metrics over the queries.

    Args:
        query: folder of an encoded data set, or what `open_encoded` gives.
        index: the same; None searches the queries among each other.
        label: column of the labels of both, kept when they were encoded.
        k: how many neighbours are looked at.
        distance: as for `search_shards`.
        num_workers: the same.
        ray_address: the same.
        engine: the same.
        exclude_self: leave each query out of its own neighbours: without an index always, otherwise
            where a query and a row of the index have the same id.

    Returns:
        The metrics of `finetuner.evaluation.evaluate_embeddings`, with the same values.

    Raises:
        ConfigError: an argument is wrong, or there is no such column.
        DataError: the label of a query is not in the index, a label is missing, or as for
            `search_shards`.
    """
    queries = opened_encoded(query)
    items = queries if index is None else opened_encoded(index)
    counts: Counter[Any] = Counter()
    starts = row_starts(items)
    for place in range(items.num_shards):
        column = read_column(items, place, label)
        counts.update(plain_labels('index', column, int(starts[place])))
    plan = SearchPlan.of(queries, items, k, distance, engine, num_workers, ray_address)
    leave_out = 'position' if index is None else 'id' if exclude_self else None
    plan = plan.leaving_out(leave_out)
    values: dict[str, list[torch.Tensor]] = {name: [] for name in METRICS}
    for lot, _, positions, own in plan.run():
        wanted = plain_labels('query', lot.column(label), lot.first)
        own_labels = take_column(items, np.maximum(own, 0), label)
        is_own = [
            place >= 0 and own_label == mine
            for place, own_label, mine in zip(own, own_labels, wanted, strict=True)
        ]
        num_relevant = count_relevant(wanted, counts, is_own, lot.first)
        relevant = take_column(items, positions, label) == _column_of(wanted)
        relevant = torch.from_numpy(relevant.astype(bool))
        for name, value in all_metrics(relevant, num_relevant).items():
            values[name].append(value)
    return mean_metrics({name: torch.cat(parts) for name, parts in values.items()})


def _column_of(values: list[Any]) -> NDArray[Any]:
    """Values as objects, `[n, 1]`, whatever they are."""
    column = np.empty((len(values), 1), object)
    column[:, 0] = values
    return column


def mine_negatives(
    query: Encoded,
    index: Encoded | None,
    output: str | os.PathLike[str],
    label: str = 'label',
    k: int = 10,
    skip: int = 0,
    distance: str = 'cosine',
    num_workers: int = 1,
    ray_address: str | None = None,
) -> MinedSummary:
    """Write, for each anchor, the nearest items of other labels: those that a model confuses it with.

    Args:
        query: the anchors: folder of an encoded data set, or what `open_encoded` gives.
        index: where negatives are looked for; None: among the anchors.
        output: Parquet file to write: for each anchor, in order, `anchor_id`, and its `negative_ids`
            and their `distances` as lists, nearest first. It is there whole, or not at all.
        label: column of the labels of both, kept when they were encoded.
        k: how many negatives; where there are fewer, all.
        skip: how many of the nearest are left out: they may be wrongly labelled.
        distance: as for `search_shards`.
        num_workers: the same.
        ray_address: the same.

    Returns:
        How many there are.

    Raises:
        ConfigError: an argument is wrong, there is no such column, or the output cannot be written.
        DataError: a label is missing, or as for `search_shards`.
    """
    check_whole('k', k, 1)
    check_whole('skip', skip, 0)
    anchors = opened_encoded(query)
    items = anchors if index is None else opened_encoded(index)
    plan = SearchPlan.of(anchors, items, k + skip, distance, 'exact', num_workers, ray_address)
    plan = replace(plan, unlike=label)
    path = Path(output).expanduser().absolute()
    parquet = import_parquet('writing negatives')
    import pyarrow

    schema = pyarrow.schema(
        {
            'anchor_id': pyarrow.string(),
            'negative_ids': pyarrow.list_(pyarrow.string()),
            'distances': pyarrow.list_(pyarrow.float64()),
        }
    )
    num_anchors = num_without = 0
    try:
        with finished_file(path) as unfinished, parquet.ParquetWriter(unfinished, schema) as file:
            for lot, squared, positions, _ in plan.run():
                rows = _negatives(plan, lot, squared[:, skip:], positions[:, skip:])
                num_anchors += len(rows['anchor_id'])
                num_without += sum(not each for each in rows['negative_ids'])
                file.write_table(pyarrow.table(rows, schema=schema))
    except OSError as error:
        raise ConfigError(f'{str(path)!r} cannot be written: {error.strerror or error}') from error
    return MinedSummary(path, num_anchors, num_without)


def _negatives(
    plan: SearchPlan, lot: Queries, squared: NDArray[np.float64], positions: NDArray[np.int64]
) -> dict[str, list[Any]]:
    distances = plan.distances(squared).numpy()
    is_there = np.isfinite(distances)
    ids = take_column(plan.index, positions, 'id')
    rows = range(len(ids))
    return {
        'anchor_id': lot.column('id'),
        'negative_ids': [ids[row][is_there[row]].tolist() for row in rows],
        'distances': [distances[row][is_there[row]].tolist() for row in rows],
    }
