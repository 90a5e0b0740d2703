"""Choose some items of class data, class by class, where all of them are too many to look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def choose_by_class(
    labels: NDArray[np.integer],
    generator: np.random.Generator,
    max_items: int,
    max_items_per_class: int,
    least_items_per_class: int = 1,
) -> NDArray[np.int64]:
    """Draw items such that those of a class come together.

    Args:
        labels: `[num_items]` int, from 0 without gaps.
        generator: of the draw.
        max_items: chosen at most; where there are more, whole classes are left out.
        max_items_per_class: chosen of a class at most.
        least_items_per_class: classes of fewer are left out.

    Returns:
        Indices of items, in their order.
    """
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]
    grouped = labels[order]
    starts = np.searchsorted(grouped, grouped)
    counts = np.bincount(labels)
    within = np.arange(len(order)) - starts < max_items_per_class
    chosen = order[within & (counts[grouped] >= least_items_per_class)]
    if len(chosen) > max_items:
        rank = generator.permutation(len(counts))[labels[chosen]]
        chosen = chosen[np.argsort(rank, kind='stable')][:max_items]
    return np.sort(chosen)
