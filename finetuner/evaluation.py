"""Retrieval metrics: how well queries find what has their label.

The metrics are those of Finetuner's tables: the definitions of `docarray.math.evaluation` 0.21,
which see of each query only the neighbours that were found. docs/evaluation.md has them in words,
and says where they differ from those of `ranx` and of textbooks.

A `relevant` below is `[num_queries, num_found]` bool, each query's neighbours in order of
distance; every metric returns `[num_queries]` float64. `k` cuts the neighbours off; `None` takes
all that were found.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetuner.excepts import DataError
from finetuner.search import search

__all__ = [
    'METRICS',
    'average_precision',
    'dcg_at_k',
    'evaluate_embeddings',
    'evaluate_queries',
    'f1_score_at_k',
    'hit_at_k',
    'mean_metrics',
    'ndcg_at_k',
    'precision_at_k',
    'r_precision',
    'recall_at_k',
    'reciprocal_rank',
    'search',
]

# in the order of Finetuner's tables
METRICS = (
    'precision_at_k',
    'recall_at_k',
    'f1_score_at_k',
    'hit_at_k',
    'average_precision',
    'reciprocal_rank',
    'dcg_at_k',
    'ndcg_at_k',
    'r_precision',
)


def precision_at_k(relevant: Tensor, k: int | None = None) -> Tensor:
    """Share of the `k` nearest neighbours that are relevant.

    Args:
        relevant: `[num_queries, num_found]` bool.
        k: cut-off.

    Returns:
        `[num_queries]` in 0..1.

    Raises:
        ValueError: k is less than 1 or more than was found.
    """
    return _nearest(relevant, k).mean(dim=1)


def recall_at_k(relevant: Tensor, num_relevant: Tensor, k: int | None = None) -> Tensor:
    """Share of each query's relevant items that is among its `k` nearest neighbours.

    Args:
        relevant: `[num_queries, num_found]` bool.
        num_relevant: `[num_queries]` int, relevant items in the whole index.
        k: cut-off.

    Returns:
        `[num_queries]` in 0..1; 0 where a query has no relevant item.

    Raises:
        ValueError: k is less than 1 or more than was found, or more relevant items were found
            than there are.
    """
    found = _nearest(relevant, k).sum(dim=1)
    if bool((found > num_relevant).any()):
        query = int((found > num_relevant).nonzero()[0])
        raise ValueError(
            f'query {query} found {int(found[query])} relevant items, but num_relevant says that '
            f'there are {int(num_relevant[query])}'
        )
    return found / num_relevant.clamp(min=1)


def f1_score_at_k(relevant: Tensor, num_relevant: Tensor, k: int | None = None) -> Tensor:
    """Harmonic mean of precision and recall at `k`.

    Args:
        relevant: `[num_queries, num_found]` bool.
        num_relevant: `[num_queries]` int, relevant items in the whole index.
        k: cut-off.

    Returns:
        `[num_queries]` in 0..1; 0 where nothing relevant was found.

    Raises:
        ValueError: as `recall_at_k`.
    """
    precision = precision_at_k(relevant, k)
    recall = recall_at_k(relevant, num_relevant, k)
    return _ratio(2 * precision * recall, precision + recall)


def hit_at_k(relevant: Tensor, k: int | None = None) -> Tensor:
    """1 where anything relevant is among the `k` nearest neighbours, else 0.

    Args:
        relevant: `[num_queries, num_found]` bool.
        k: cut-off.

    Returns:
        `[num_queries]`, 0 or 1.

    Raises:
        ValueError: k is less than 1 or more than was found.
    """
    return _nearest(relevant, k).amax(dim=1)


def average_precision(relevant: Tensor) -> Tensor:
    """Mean of the precisions at the ranks of the relevant items that were found.

    Relevant items that were not found do not count, as in docarray (and unlike `ranx`).

    Args:
        relevant: `[num_queries, num_found]` bool.

    Returns:
        `[num_queries]` in 0..1; 0 where nothing relevant was found.
    """
    hits = _nearest(relevant, None)
    precisions = hits.cumsum(dim=1) / _ranks(hits)
    return _ratio((precisions * hits).sum(dim=1), hits.sum(dim=1))


def reciprocal_rank(relevant: Tensor) -> Tensor:
    """One over the rank, from 1, of the first relevant neighbour.

    Args:
        relevant: `[num_queries, num_found]` bool.

    Returns:
        `[num_queries]` in 0..1; 0 where nothing relevant was found.
    """
    hits = _nearest(relevant, None)
    return (hits / _ranks(hits)).amax(dim=1)


def dcg_at_k(relevant: Tensor, k: int | None = None) -> Tensor:
    """Discounted cumulative gain: a hit at rank r counts `1 / max(1, log2(r))`.

    Rank 1 and rank 2 both count 1, rank 3 counts 0.63, as in docarray's default method (`ranx`
    takes `log2(r + 1)`).

    Args:
        relevant: `[num_queries, num_found]` bool.
        k: cut-off.

    Returns:
        `[num_queries]`, 0 or more, not bounded by 1.

    Raises:
        ValueError: k is less than 1 or more than was found.
    """
    hits = _nearest(relevant, k)
    return (hits / _ranks(hits).log2().clamp(min=1)).sum(dim=1)


def ndcg_at_k(relevant: Tensor, k: int | None = None) -> Tensor:
    """Discounted cumulative gain, over that of the same neighbours with the relevant ones first.

    Args:
        relevant: `[num_queries, num_found]` bool.
        k: cut-off.

    Returns:
        `[num_queries]` in 0..1; 0 where nothing relevant was found.

    Raises:
        ValueError: k is less than 1 or more than was found.
    """
    best = _nearest(relevant, None).sort(dim=1, descending=True).values > 0
    return _ratio(dcg_at_k(relevant, k), dcg_at_k(best, k))


def r_precision(relevant: Tensor) -> Tensor:
    """Precision among the R nearest neighbours, R being how many relevant ones were found.

    Args:
        relevant: `[num_queries, num_found]` bool.

    Returns:
        `[num_queries]` in 0..1; 0 where nothing relevant was found.
    """
    hits = _nearest(relevant, None)
    found = hits.sum(dim=1)
    return _ratio((hits * (_ranks(hits) <= found[:, None])).sum(dim=1), found)


def _nearest(relevant: Tensor, k: int | None) -> Tensor:
    num_found = relevant.shape[1]
    if k is not None and not 1 <= k <= num_found:
        raise ValueError(f'k={k} is not in 1..{num_found}, the neighbours that were found')
    return relevant[:, :k].double()


def _ranks(hits: Tensor) -> Tensor:
    return torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def evaluate_embeddings(
    query_embeddings: Any,
    query_labels: Sequence[int | str],
    index_embeddings: Any = None,
    index_labels: Sequence[int | str] | None = None,
    limit: int = 20,
    distance: str = 'cosine',
    exclude_self: bool = True,
    query_ids: Sequence[str] | None = None,
    index_ids: Sequence[str] | None = None,
) -> dict[str, float]:
    """Search the index with each query and average the metrics over the queries.

    Returns:
        The means of what `evaluate_queries` gives, whose arguments and errors these are.
    """
    values = evaluate_queries(
        query_embeddings,
        query_labels,
        index_embeddings,
        index_labels,
        limit,
        distance,
        exclude_self,
        query_ids,
        index_ids,
    )
    return mean_metrics(values)


def mean_metrics(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Average what `evaluate_queries` gives over the queries."""
    return {name: value.mean().item() for name, value in values.items()}


def evaluate_queries(
    query_embeddings: Any,
    query_labels: Sequence[int | str],
    index_embeddings: Any = None,
    index_labels: Sequence[int | str] | None = None,
    limit: int = 20,
    distance: str = 'cosine',
    exclude_self: bool = True,
    query_ids: Sequence[str] | None = None,
    index_ids: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Search the index with each query and measure what each finds.

    Args:
        query_embeddings: `[num_queries, dimension]`, NumPy or torch.
        query_labels: a label for each query; what has the same label is relevant.
        index_embeddings: `[num_index, dimension]`; None: the queries are searched among each
            other.
        index_labels: a label for each item of the index; None only without an index.
        limit: how many neighbours are looked at; where there are fewer, all.
        distance: `'cosine'`, `'euclidean'` or `'sqeuclidean'`.
        exclude_self: leave each query out of its own neighbours: without an index always,
            otherwise where a query and an item of the index have the same id.
        query_ids: an id for each query; None leaves nothing out.
        index_ids: an id for each item of the index.

    Returns:
        `precision_at_k`, `recall_at_k`, `f1_score_at_k`, `hit_at_k`, `average_precision`,
        `reciprocal_rank`, `dcg_at_k`, `ndcg_at_k`, `r_precision`, in this order; k is `limit`.
        Each is `[num_queries]` float64.

    Raises:
        ConfigError: unknown distance, or limit less than 1.
        DataError: the label of a query is not in the index (or only the query itself has it),
            labels or ids are not as many as the embeddings, or an embedding is not finite.
    """
    if index_embeddings is None:
        index_embeddings, index_labels = query_embeddings, query_labels
        query_ids = index_ids = [str(position) for position in range(len(query_embeddings))]
    wanted = plain_labels('query', query_labels)
    there = plain_labels('index', () if index_labels is None else index_labels)
    _check_count('query labels', wanted, query_embeddings)
    _check_count('index labels', there, index_embeddings)
    own: list[int] | None = None
    if exclude_self and query_ids is not None and index_ids is not None:
        _check_count('query ids', query_ids, query_embeddings)
        _check_count('index ids', index_ids, index_embeddings)
        own = own_positions(query_ids, index_ids)
    num_relevant = _count_relevant(wanted, there, own)
    _, positions = search(query_embeddings, index_embeddings, limit, distance, own)
    codes = {label: code for code, label in enumerate(dict.fromkeys(there))}
    index_codes = torch.tensor([codes[label] for label in there])
    query_codes = torch.tensor([codes[label] for label in wanted])
    relevant = index_codes[positions.cpu()] == query_codes[:, None]
    return all_metrics(relevant, num_relevant)


def all_metrics(relevant: Tensor, num_relevant: Tensor) -> dict[str, Tensor]:
    """What `evaluate_queries` returns, of what was found.

    Args:
        relevant: `[num_queries, num_found]` bool.
        num_relevant: `[num_queries]` int, in the whole index.
    """
    return {
        'precision_at_k': precision_at_k(relevant),
        'recall_at_k': recall_at_k(relevant, num_relevant),
        'f1_score_at_k': f1_score_at_k(relevant, num_relevant),
        'hit_at_k': hit_at_k(relevant),
        'average_precision': average_precision(relevant),
        'reciprocal_rank': reciprocal_rank(relevant),
        'dcg_at_k': dcg_at_k(relevant),
        'ndcg_at_k': ndcg_at_k(relevant),
        'r_precision': r_precision(relevant),
    }


def plain_labels(side: str, labels: Any, first: int = 0) -> list[Hashable]:
    """Labels as Python values, so that 1, 1.0 and a NumPy 1 are one label and '1' another.

    One that is None is a DataError, which names the side and the position, counted from `first`.
    """
    found = labels.tolist() if hasattr(labels, 'tolist') else list(labels)
    for position, label in enumerate(found, first):
        if label is None:
            raise DataError(f'{side} Document {position} has no label: evaluation needs one')
    return found


def _check_count(what: str, values: Sequence[Any], embeddings: Any) -> None:
    if len(values) != len(embeddings):
        raise DataError(f'there are {len(values)} {what} for {len(embeddings)} embeddings')


def own_positions(query_ids: Sequence[str], index_ids: Sequence[str]) -> list[int] | None:
    """Position of each query in the index, -1 where it is not there; None if none is."""
    places = {id_: position for position, id_ in enumerate(index_ids)}
    if len(places) < len(index_ids):
        twice = [id_ for id_, count in Counter(index_ids).items() if count > 1]
        if not set(query_ids).isdisjoint(twice):
            raise DataError(
                f'{len(twice)} ids, such as {twice[0]!r}, are held by several index Documents, so '
                'a query cannot be left out of its own results: give each Document its own id'
            )
    own = [places.get(id_, -1) for id_ in query_ids]
    return own if max(own, default=-1) >= 0 else None


def _count_relevant(
    wanted: Sequence[Hashable], there: Sequence[Hashable], own: Sequence[int] | None
) -> Tensor:
    pairs = zip(wanted, own or [-1] * len(wanted), strict=True)
    is_own = [position >= 0 and there[position] == label for label, position in pairs]
    return count_relevant(wanted, Counter(there), is_own)


def count_relevant(
    wanted: Sequence[Hashable], count: Mapping[Any, int], is_own: Sequence[bool], first: int = 0
) -> Tensor:
    """Count what each query could find, `[num_queries]` int64.

    Args:
        wanted: labels of the queries.
        count: how many items of the index have each label; 0 where a label is not in it.
        is_own: of each query, whether one of those that have its label is itself.
        first: position of the first query, for messages.

    Raises:
        DataError: a query has nothing to find.
    """
    left = [count[label] - own for label, own in zip(wanted, is_own, strict=True)]
    if 0 in left:
        query = left.index(0)
        besides = ' besides the query itself' if count[wanted[query]] else ''
        raise DataError(
            f'label {wanted[query]!r} of query Document {first + query} is not in the index{besides} '
            f'({left.count(0)} of {len(left)} queries have nothing to find): add such Documents '
            'to the index data or leave these queries out'
        )
    return torch.tensor(left)
