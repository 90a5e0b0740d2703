"""The classes of a collection that was given none: taken from its labels as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetuner.collections.labels.boxes import is_nested
from finetuner.collections.labels.masks import features_of, is_features


def grown_classes(mltype: str, classes: tuple[str, ...], label: Any) -> tuple[str, ...]:
    """The classes with those that a label brings; whether the label is right is not looked at.

    Labels that name their classes add what is new. Those that number them make `class1`, `class2` and
    so on, of which masks may add more, vectors and lists of boxes none: their length is the first's.

    Args:
        mltype: what the labels are.
        classes: that came so far.
        label: as it was fed.
    """
    names, num_numbered = _BRINGS[mltype](label)
    if names:
        return (*classes, *(name for name in dict.fromkeys(names) if name not in classes))
    numbered = tuple(f'class{i}' for i in range(1, num_numbered + 1))
    may_grow = mltype == 'segmentation' and classes == numbered[: len(classes)]
    return numbered if numbered and (not classes or may_grow) else classes


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
        named = [(feature.get('properties') or {}).get('label') for feature in features_of(label)]
        return [name for name in named if isinstance(name, str) and name], 1
    mask = np.asarray(label)
    if mask.dtype.kind not in 'bui' or not mask.size:
        return [], 1
    return [], len(mask) if mask.ndim == 3 else max(1, min(int(mask.max()), 255))


_BRINGS = {
    'classification': _of_vector,
    'object_detection': _of_boxes,
    'segmentation': _of_mask,
}
