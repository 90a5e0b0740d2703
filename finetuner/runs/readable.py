"""Which contents of a dataset a model can read."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from finetuner.data.labelled import LabelledDataset
from finetuner.excepts import ContentError
from finetuner.inputs import InputReader

logger = logging.getLogger('finetuner.run')

Dataset = LabelledDataset[Any]
_NUM_LOGGED = 20


def openable(dataset: Dataset, reader: InputReader, limit: int, name: str) -> Dataset:
    """Leave out the Documents whose contents cannot be read, and name them in the log.

    Args:
        dataset: of any kind.
        reader: of the model.
        limit: items that are looked at.
        name: what messages call the data.

    Raises:
        ContentError: nothing is left.
    """
    broken = find_broken(dataset, reader, limit)
    if not broken:
        return dataset
    lost = np.array(sorted(dataset.lost_documents(broken)), dtype=np.int64)
    logger.warning(
        '%s: %d %s, and with them %d of %d Documents are left out',
        name,
        len(broken),
        reader.failure,
        len(lost),
        dataset.num_documents,
    )
    for index in sorted(broken)[:_NUM_LOGGED]:
        logger.warning('Left out: %s', broken[index])
    if len(lost) == dataset.num_documents:
        raise reader.error(
            f'{name}: none of the {len(lost)} Documents is left: {reader.failure}, such as '
            f'{next(iter(broken.values()))}'
        )
    return dataset.subset(np.setdiff1d(np.arange(dataset.num_documents), lost))


def find_broken(dataset: Dataset, reader: InputReader, limit: int) -> dict[int, str]:
    """Items whose contents cannot be read, with the reasons.

    Args:
        dataset: of any kind.
        reader: of the model.
        limit: items that are looked at, spread over all.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), limit)).astype(int)

    def reason(index: int) -> str:
        try:
            reader.read(dataset.document(index), dataset.position_of(index))
        except ContentError as error:
            return str(error)
        return ''

    with ThreadPoolExecutor() as pool:
        reasons = pool.map(reason, chosen.tolist())
        return {index: why for index, why in zip(chosen.tolist(), reasons, strict=True) if why}
