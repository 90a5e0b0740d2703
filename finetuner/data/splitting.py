"""Set part of the training data aside, so that validation sees classes that training did not."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetuner.data.datasets import ClassDataset
from finetuner.data.labelled import AnyDataset
from finetuner.excepts import DataError


def split_dataset(dataset: AnyDataset, share: float, seed: int) -> tuple[AnyDataset, AnyDataset]:
    """Split a dataset so that nothing that belongs together is on both sides.

    What belongs together: all Documents of a class, a root and its matches, the two of a pair.

    Args:
        dataset: of any kind.
        share: of the classes (of the Documents, where they have none) that goes to the validation
            side, in 0..1; at least two go there.
        seed: of the draw.

    Returns:
        Training and validation side, each in the order of the dataset.

    Raises:
        DataError: fewer than two classes or Documents would be left to train on.
    """
    units: Any
    if isinstance(dataset, ClassDataset):
        units, num_units, name = dataset.label_values, len(dataset.classes), 'classes'
    else:
        num_units, name = dataset.num_documents, 'Documents'
        units = np.arange(num_units)
    num_held_out = max(2, round(share * num_units))
    if num_units - num_held_out < 2:
        raise DataError(
            f'val_split={share} of {num_units} {name} leaves '
            f'{max(0, num_units - num_held_out)} to train on, which needs at least two: use a '
            f'smaller val_split or data with more {name}'
        )
    held_out = np.zeros(num_units, dtype=bool)
    held_out[np.random.default_rng(seed).choice(num_units, num_held_out, replace=False)] = True
    validates = held_out[units]
    return dataset.subset(np.flatnonzero(~validates)), dataset.subset(np.flatnonzero(validates))
