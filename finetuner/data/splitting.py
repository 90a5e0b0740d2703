"""Set part of the training data aside, so that validation sees classes that training did not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from docarray import Document, DocumentArray

from finetuner.data.contents import read_label
from finetuner.excepts import DataError


def split_by_class(
    docs: Sequence[Document], share: float, seed: int
) -> tuple[DocumentArray, DocumentArray]:
    """Split class data so that no class is on both sides.

    Args:
        docs: class data.
        share: of the classes that go to the validation side, in 0..1; at least two go there.
        seed: of the draw.

    Returns:
        Training and validation Documents, each in their order.

    Raises:
        DataError: fewer than two classes would be left on one side.
    """
    labels = [read_label(doc, position) for position, doc in enumerate(docs)]
    classes = list(dict.fromkeys(labels))
    num_held_out = max(2, round(share * len(classes)))
    if len(classes) - num_held_out < 2:
        raise DataError(
            f'val_split={share} of {len(classes)} classes leaves '
            f'{max(0, len(classes) - num_held_out)} to train on, which needs at least two: use a '
            'smaller val_split or data with more classes'
        )
    drawn = np.random.default_rng(seed).choice(len(classes), num_held_out, replace=False)
    held_out = {classes[position] for position in drawn}
    sides: tuple[DocumentArray, DocumentArray] = (DocumentArray(), DocumentArray())
    for doc, label in zip(docs, labels, strict=True):
        sides[label in held_out].append(doc)
    return sides
