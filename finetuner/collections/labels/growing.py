"""The classes of a collection that was given none: taken from its labels as they come."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from finetuner.collections.labels.boxes import is_nested
from finetuner.collections.labels.masks import class_of, features_of, is_features
from finetuner.excepts import DataError

MOST_CLASSES = 100_000
# that labels bring, one by one
MOST_GROWN = 10_000


def grown_classes(
    mltype: str, classes: tuple[str, ...], label: Any, known: Collection[str] = ()
) -> tuple[str, ...]:
    """The classes with those that a label brings; whether the label is right is not looked at.

    Labels that name their classes add what is new. Those that number them make `class1`, `class2` and
    so on, of which masks may add more, vectors and lists of boxes none: their length is the first's.

    Args:
        mltype: what the labels are.
        classes: that came so far.
        label: as it was fed.
        known: the classes once more, where a name is found in no time.

    Raises:
        DataError: there would be too many.
    """
    names, num_numbered = _BRINGS[mltype](label)
    if names:
        known = known or frozenset(classes)
        new = [name for name in dict.fromkeys(names) if name not in known]
        if new and len(classes) + len(new) > MOST_GROWN:
            raise DataError(
                f'the labels name more than {MOST_GROWN:,} classes: give the collection its '
                'classes=[...] when it is made'
            )
        return (*classes, *new) if new else classes
    if classes and (mltype != 'segmentation' or num_numbered <= len(classes)):
        return classes
    if num_numbered > MOST_CLASSES:
        raise DataError(
            f'the label is for {num_numbered:,} classes: at most {MOST_CLASSES:,} are taken'
        )
    numbered = tuple(f'class{i}' for i in range(1, num_numbered + 1))
    return numbered if classes == numbered[: len(classes)] else classes


def _of_vector(label: Any) -> tuple[list[str], int]:
    if isinstance(label, str):
        return [label], 0
    values = label.tolist() if isinstance(label, np.ndarray) else label
    if not isinstance(values, Sequence):
        return [], 0
    if values and all(isinstance(value, str) for value in values):
        return [value for value in values if value], 0
    return [], len(values)


def _of_boxes(label: Any) -> tuple[list[str], int]:
    if isinstance(label, Mapping):
        return [name for name in label if isinstance(name, str) and name], 0
    values = label.tolist() if isinstance(label, np.ndarray) else label
    if not isinstance(values, Sequence) or isinstance(values, str):
        return [], 0
    return [], len(values) if is_nested(values) else 1


def _of_mask(label: Any) -> tuple[list[str], int]:
    if isinstance(label, Mapping) or is_features(label):
        named = [class_of(feature) for feature in features_of(label)]
        return [name for name in named if isinstance(name, str) and name], 1
    try:
        mask = np.asarray(label)
    except (TypeError, ValueError):  # what it should be is told where it is read
        return [], 1
    if mask.dtype.kind not in 'bui' or not mask.size:
        return [], 1
    return [], len(mask) if mask.ndim == 3 else max(1, min(int(mask.max()), 255))


_BRINGS = {
    'classification': _of_vector,
    'object_detection': _of_boxes,
    'segmentation': _of_mask,
}
