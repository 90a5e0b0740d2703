"""Labels of image/label pairs: what people give, what is kept, and what becomes of it in a flip.

A collection has labels of one kind. Whatever form a label comes in, it is checked against the image
it belongs to and made into the one form that is kept: a vector of zeros and ones a class, boxes a
class, or a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetuner.collections.labels.base import LabelKind, shown
from finetuner.collections.labels.boxes import BoxLabels
from finetuner.collections.labels.classes import ClassLabels
from finetuner.collections.labels.masks import MOST_MASK_CLASSES, MaskLabels
from finetuner.excepts import ConfigError, unknown_name

__all__ = [
    'MLTYPES',
    'MOST_MASK_CLASSES',
    'BoxLabels',
    'ClassLabels',
    'LabelKind',
    'MaskLabels',
    'build_label_kind',
    'shown',
]

MLTYPES = ('classification', 'object_detection', 'segmentation')
_KINDS: dict[str, type[LabelKind]] = {
    kind.mltype: kind for kind in (ClassLabels, BoxLabels, MaskLabels)
}


def build_label_kind(mltype: str, classes: Sequence[str]) -> LabelKind:
    """The labels of a collection.

    Args:
        mltype: one of `MLTYPES`.
        classes: names, each once.

    Raises:
        ConfigError: there is no such kind, or the names are none or not distinct.
    """
    if mltype not in MLTYPES:
        raise ConfigError(unknown_name('mltype', mltype, MLTYPES))
    if isinstance(classes, str) or not all(isinstance(name, str) and name for name in classes):
        raise ConfigError(f'classes={shown(classes)}: it takes a list of names')
    if not classes or len(set(classes)) != len(classes):
        raise ConfigError(f'classes={shown(classes)}: it takes one name or more, each once')
    return _KINDS[mltype](tuple(classes))
