"""What a collection is made with, checked before the first pair comes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetuner.collections.labels import MLTYPES, build_label_kind, shown
from finetuner.collections.labels.growing import MOST_CLASSES
from finetuner.collections.tiles import check_tile_size
from finetuner.excepts import ConfigError, DataError, unknown_name

MAX_NAME = 200
_NO_TEXT = re.compile('[\0\ud800-\udfff]')
MAX_DESCRIPTION = 100_000
# of all classes together: each answer that describes the collection tells them
MOST_LETTERS = 2_000_000
MOST_GROUPS = 1000
MOST_SENSORS = 100
# the groups that a partition divides pairs among, in its order
PARTITIONED = ('train', 'validate', 'test')


@dataclass(frozen=True)
class CollectionSpec:
    """A collection before its first pair.

    Attributes:
        name: unique among its owner's.
        mltype: what its labels are, one of `MLTYPES`.
        tile_size: height and width of its images, in pixels.
        classes: names, in order; None takes them from the labels as they come.
        partition: percentages of the pairs that go to `train`, `validate` and `test`; None leaves them
            in the groups that they are fed to.
        description: of any length up to 100,000 characters.
        public: whether others may read it.
    """

    name: str
    mltype: str = 'classification'
    tile_size: tuple[int, int] = (256, 256)
    classes: tuple[str, ...] | None = None
    partition: tuple[float, float, float] | None = None
    description: str = ''
    public: bool = False

    @classmethod
    def checked(
        cls,
        name: Any,
        mltype: Any = 'classification',
        tile_size: Any = (256, 256),
        classes: Any = None,
        partition: Any = None,
        description: Any = '',
        public: Any = False,
    ) -> CollectionSpec:
        """Take what people give.

        Raises:
            ConfigError: one of them is not what it may be.
        """
        if mltype not in MLTYPES:
            raise ConfigError(unknown_name('mltype', mltype, MLTYPES))
        if not isinstance(public, bool):
            raise ConfigError(f'public={public!r}: it is True or False')
        return cls(
            check_text('name', name, MAX_NAME, may_be_empty=False),
            mltype,
            check_tile_size(tile_size),
            None if classes is None else check_classes(mltype, classes),
            _check_partition(partition),
            check_text('description', description, MAX_DESCRIPTION),
            public,
        )


def check_classes(mltype: str, classes: Any) -> tuple[str, ...]:
    """Names of classes; ConfigError for what is none."""
    kind = build_label_kind(mltype, classes)
    if len(kind.classes) > MOST_CLASSES:
        raise ConfigError(f'{len(kind.classes):,} classes: at most {MOST_CLASSES:,} are taken')
    for name in kind.classes:
        check_text('the name of a class', name, MAX_NAME)
    num_letters = sum(map(len, kind.classes))
    if num_letters > MOST_LETTERS:
        raise ConfigError(
            f'the names of the classes have {num_letters:,} characters together: at most '
            f'{MOST_LETTERS:,} are taken'
        )
    return kind.classes


def check_text(what: str, text: Any, most: int, may_be_empty: bool = True) -> str:
    """A text that can be kept; ConfigError for what is none."""
    if not isinstance(text, str) or (not may_be_empty and not text.strip()):
        raise ConfigError(f'{what}={shown(text)}: it takes a text')
    if len(text) > most:
        raise ConfigError(f'{what} has {len(text):,} characters: at most {most:,} are taken')
    if not is_text(text):
        raise ConfigError(f'{what}={text[:60]!r} holds characters that are no text')
    return text


def check_sensors(names: Sequence[Any]) -> list[str]:
    """Names of sensors; DataError for what is none."""
    if len(names) > MOST_SENSORS:
        raise DataError(f'{len(names):,} sensors: at most {MOST_SENSORS} are taken')
    try:
        return [check_text('sensor', name, MAX_NAME, may_be_empty=False) for name in names]
    except ConfigError as error:
        raise DataError(str(error)) from error


def is_text(text: str) -> bool:
    """Whether it can be kept: PostgreSQL takes no NUL, and no database half of a surrogate pair."""
    return _NO_TEXT.search(text) is None


def check_group(group: Any) -> str:
    """The name of a group; ConfigError for what is none."""
    return check_text('group', group, MAX_NAME, may_be_empty=False)


def _check_partition(partition: Any) -> tuple[float, float, float] | None:
    if partition is None:
        return None
    expected = (
        f'partition={shown(partition)}: it takes the percentages of {", ".join(PARTITIONED)}, which '
        'make 100, such as [70, 20, 10]'
    )
    if not isinstance(partition, Sequence) or len(partition) != len(PARTITIONED):
        raise ConfigError(expected)
    if any(isinstance(p, bool) or not isinstance(p, int | float) for p in partition):
        raise ConfigError(expected)
    if any(not 0 <= p <= 100 for p in partition) or not math.isclose(sum(partition), 100):
        raise ConfigError(expected)
    train, validate, test = map(float, partition)
    return train, validate, test


def partitioned_group(partition: Sequence[float], position: int) -> str:
    """The group of the pair that came as the n-th; shares are right over any stretch of pairs.

    Args:
        partition: percentages of the groups of `PARTITIONED`.
        position: from 0.
    """
    # where the fractional part of multiples of the golden ratio falls: spread as evenly as can be
    spot = (0.5 + position * 0.6180339887498949) % 1.0 * 100
    for group, share in zip(PARTITIONED, partition, strict=True):
        if spot < share:
            return group
        spot -= share
    return max(zip(partition, PARTITIONED, strict=True))[1]
