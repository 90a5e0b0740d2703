"""Exact nearest neighbour search, in blocks, so that no matrix of all distances is ever made."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetuner.excepts import ConfigError, DataError, unknown_name

DISTANCES = ('cosine', 'euclidean', 'sqeuclidean')

# Distances are rounded to 2^-40 of the vectors' scale: far below what float32 embeddings mean,
# and far above the noise of a matrix product, whose last bits depend on a block's shape.
_KEPT_BITS = 40


def search(
    query_embeddings: Any,
    index_embeddings: Any,
    k: int,
    distance: str = 'cosine',
    exclude: Any = None,
    block_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Find each query's nearest neighbours, exactly, in blocks over both sides.

    Distances are computed in float64. Equal distances are ordered by position in the index,
    whatever the block size; so are those that differ by less than 2^-40 of the vectors' scale.
    The cosine distance of a zero vector to any vector is 1.

    Args:
        query_embeddings: `[num_queries, dimension]`, NumPy or torch, any float type.
        index_embeddings: `[num_index, dimension]`.
        k: how many neighbours; where the index has fewer, all of them.
        distance: `'cosine'`, `'euclidean'` or `'sqeuclidean'`.
        exclude: `[num_queries]` int, the position in the index that a query must not find, which
            is usually its own; -1 for none. When given, at most `num_index - 1` are found.
        block_size: rows compared at a time on either side; memory grows with its square.

    Returns:
        Distances, `[num_queries, k]` float64, smallest first, and positions in the index,
        `[num_queries, k]` int64.

    Raises:
        ConfigError: unknown distance, or k or block_size less than 1.
        DataError: an embedding holds nan or infinity, or the shapes do not go together.
    """
    nearest = Nearest(query_embeddings, k, distance, block_size)
    index = _embeddings('index', index_embeddings)
    nearest.k = min(k, len(index) - (exclude is not None))
    if nearest.k < 1:
        raise DataError('the index holds nothing but the query itself')
    nearest.add(index, exclude)
    return nearest.found()


class Nearest:
    """Nearest neighbours among rows that come part by part; see `search`.

    What is found does not depend on how the rows are parted.

    Attributes:
        k: how many neighbours are kept.
        num_rows: that came.
        squared: `[num_queries, up to k]` float64, the distances before the root is taken of euclidean
            ones: those that the neighbours are ordered by.
        positions: `[num_queries, up to k]` int64, among all rows that came.
    """

    def __init__(
        self, query_embeddings: Any, k: int, distance: str = 'cosine', block_size: int = 1024
    ) -> None:
        """Take the queries.

        Args:
            query_embeddings: `[num_queries, dimension]`.
            k: how many neighbours.
            distance: as for `search`.
            block_size: the same.

        Raises:
            ConfigError: unknown distance, or k or block_size less than 1.
            DataError: an embedding holds nan or infinity.
        """
        if distance not in DISTANCES:
            raise ConfigError(unknown_name('distance', distance, DISTANCES))
        if k < 1 or block_size < 1:
            raise ConfigError(f'k={k} and block_size={block_size} must both be 1 or more')
        self.k = k
        self.num_rows = 0
        self._queries = _embeddings('query', query_embeddings)
        self._distance, self._block_size = distance, block_size
        empty = torch.empty(len(self._queries), 0, dtype=torch.float64, device=self._queries.device)
        self.squared, self.positions = empty, empty.long()

    def add(self, embeddings: Any, exclude: Any = None, unlike: Any = None) -> None:
        """Look through more rows.

        Args:
            embeddings: `[num_rows, dimension]`.
            exclude: `[num_queries]` int, the position, among all rows, that a query must not find;
                -1 for none.
            unlike: labels of the queries `[num_queries]` and of the rows `[num_rows]`, both int: a
                query finds no row of its own label.

        Raises:
            DataError: an embedding holds nan or infinity, or is of another dimension.
        """
        queries, index = self._queries, _embeddings('index', embeddings)
        if queries.shape[1] != index.shape[1]:
            raise DataError(
                f'query embeddings have {queries.shape[1]} dimensions, index embeddings '
                f'{index.shape[1]}: both must come from the same model'
            )
        index = index.to(queries.device)
        if exclude is not None:
            exclude = torch.as_tensor(exclude, dtype=torch.int64, device=queries.device)
        if unlike is not None:
            unlike = [torch.as_tensor(each, device=queries.device) for each in unlike]
        found = []
        for start in range(0, len(queries), self._block_size):
            part = slice(start, start + self._block_size)
            found.append(
                self._searched(
                    part,
                    index,
                    None if exclude is None else exclude[part],
                    None if unlike is None else (unlike[0][part], unlike[1]),
                )
            )
        self.squared = torch.cat([each[0] for each in found])
        self.positions = torch.cat([each[1] for each in found])
        self.num_rows += len(index)

    def found(self) -> tuple[Tensor, Tensor]:
        """Distances and positions, as `search` returns them.

        Where fewer than k rows could be found, what is missing has the distance infinity.
        """
        is_root = self._distance == 'euclidean'
        return self.squared.sqrt() if is_root else self.squared, self.positions

    def _searched(
        self, part: slice, index: Tensor, exclude: Tensor | None, unlike: Any
    ) -> tuple[Tensor, Tensor]:
        distances, positions = self.squared[part], self.positions[part]
        prepared = _prepare(self._queries[part], self._distance)
        for start in range(0, len(index), self._block_size):
            rows = slice(start, start + self._block_size)
            block = _distances(prepared, _prepare(index[rows], self._distance))
            first = self.num_rows + start
            if exclude is not None:
                own = ((exclude >= first) & (exclude < first + block.shape[1])).nonzero()[:, 0]
                block[own, exclude[own] - first] = torch.inf
            if unlike is not None:
                block.masked_fill_(unlike[0][:, None] == unlike[1][rows][None, :], torch.inf)
            here = torch.arange(first, first + block.shape[1], device=block.device)
            distances, positions = k_smallest(
                torch.cat([distances, block], dim=1),
                torch.cat([positions, here.expand(len(block), -1)], dim=1),
                self.k,
            )
        return distances, positions


def _embeddings(side: str, values: Any) -> Tensor:
    if isinstance(values, np.ndarray):
        # Embeddings that came through protobuf are read-only, which torch warns about.
        values = np.require(values, requirements=['C', 'W'])
    embeddings = torch.as_tensor(values).detach()
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise DataError(
            f'{side} embeddings have the shape {list(embeddings.shape)}: [n, dimension] is '
            'needed, both 1 or more'
        )
    if embeddings.device.type == 'mps':
        embeddings = embeddings.cpu()  # where there is float64
    # Summing finds nan and infinity without a copy or a mask of the whole.
    bad = (~torch.isfinite(embeddings.sum(dim=1, dtype=torch.float64))).nonzero()
    if len(bad):
        raise DataError(f'the embedding of {side} Document {int(bad[0])} holds nan or infinity')
    return embeddings


def _prepare(block: Tensor, distance: str) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (of length 1 for cosine), squared lengths, and what rounds their distances."""
    vectors = block.double()
    squares = vectors.square().sum(dim=1)
    if distance == 'cosine':
        vectors = vectors * torch.where(squares > 0, squares.rsqrt(), 0.0)[:, None]
        # Half of |a|^2 + |b|^2 - 2ab is 1 - ab for unit vectors, and for zero vectors too when
        # they are said to have length 1.
        vectors, squares = vectors * 0.5**0.5, torch.full_like(squares, 0.5)
    # Adding and subtracting 1.5 * 2^(e + 52 - bits) rounds a float64 to 2^(e - bits).
    exponents = torch.frexp(squares).exponent + (52 - _KEPT_BITS)
    rounder = torch.ldexp(torch.full_like(squares, 1.5), exponents)
    return vectors, squares, torch.where(squares > 0, rounder, 0.0)


def _distances(queries: tuple[Tensor, Tensor, Tensor], index: tuple[Tensor, ...]) -> Tensor:
    """Squared euclidean distances of prepared vectors, `[num_queries, num_index]`, rounded."""
    distances = torch.addmm(index[1][None, :], queries[0], index[0].T, alpha=-2.0)
    distances += queries[1][:, None]
    rounder = torch.maximum(queries[2][:, None], index[2][None, :])
    return distances.add_(rounder).sub_(rounder).clamp_(min=0.0)


def k_smallest(distances: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` smallest of each row in order, equal ones by position.

    Args:
        distances: `[n, m]` float64.
        positions: `[n, m]` int64.
        k: how many; where `m` is less, all.

    Returns:
        Both, `[n, up to k]`.
    """
    if distances.shape[1] > k:
        smallest = distances.topk(k, largest=False)
        chosen, last = smallest.indices, smallest.values.amax(dim=1, keepdim=True)
        # topk takes any of those that equal the last one: there, choose again by position.
        tied = ((distances <= last).sum(dim=1) > k).nonzero()[:, 0]
        if len(tied):
            value, limit = distances[tied], last[tied]
            by_position = torch.where(value == limit, positions[tied], torch.iinfo(torch.int64).max)
            chosen[tied] = by_position.masked_fill(value < limit, -1).topk(k, largest=False).indices
        distances, positions = distances.gather(1, chosen), positions.gather(1, chosen)
    order = positions.argsort(dim=1)
    distances, positions = distances.gather(1, order), positions.gather(1, order)
    order = distances.argsort(dim=1, stable=True)
    return distances.gather(1, order), positions.gather(1, order)
