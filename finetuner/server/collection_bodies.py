"""What the routes of collections take, and how much of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from finetuner.collections.draft import DEFAULT_GROUP
from finetuner.collections.labels.growing import MOST_CLASSES
from finetuner.collections.spec import MOST_SENSORS
from finetuner.excepts import DataError, TooManyRequestsError
from finetuner.server.rest_images import MAX_PAGE
from finetuner.server.rest_schema import Body

# lists and objects within one another; collections of shapes in GeoJSON take some twenty
_DEEPEST = 40
_RETRY_SECONDS = 5.0

Number = StrictFloat | StrictInt


class Names(list[str]):
    """Names in JSON; of all that are none the first is told."""

    @classmethod
    def __get_validators__(cls) -> Iterator[Callable[[Any], list[str]]]:
        yield cls._checked

    @classmethod
    def __modify_schema__(cls, schema: dict[str, Any]) -> None:
        schema.update(type='array', items={'type': 'string'}, maxItems=MOST_CLASSES)

    @classmethod
    def _checked(cls, value: Any) -> list[str]:
        if not isinstance(value, list):
            raise TypeError('value is not a valid list')
        if len(value) > MOST_CLASSES:
            raise ValueError(f'{len(value):,} names: at most {MOST_CLASSES:,} are taken')
        if not all(isinstance(name, str) for name in value):
            raise TypeError('it takes a list of names')
        return value


class Pairs(Body):
    """Pairs as stored Documents: see the guide of collections for what they hold."""

    documents: StrictStr = Field(..., max_length=200)
    classes: Names | None = None
    sensors: list[StrictStr] = Field([], max_items=MOST_SENSORS)


class CollectionRequest(Body):
    """A new collection; without pairs it is empty."""

    name: StrictStr
    mltype: StrictStr = 'classification'
    tile_size: list[Number] = Field([256, 256], min_items=2, max_items=2)
    classes: Names | None = None
    partition: list[Number] | None = Field(None, min_items=3, max_items=3)
    description: StrictStr = ''
    public: StrictBool = False
    pairs: Pairs | None = None


class Datapoint(Body):
    """A pair: the file of a picture in base64, and its label."""

    image: StrictStr
    label: Any
    group: StrictStr = DEFAULT_GROUP


class DatapointsRequest(Body):
    """More pairs, one way or the other."""

    datapoints: list[Datapoint] | None = Field(None, max_items=MAX_PAGE)
    pairs: Pairs | None = None


class ChangeRequest(Body):
    """What is to be changed of a collection."""

    name: StrictStr | None = None
    description: StrictStr | None = None


class PublishRequest(Body):
    """Whether others may read a collection."""

    public: StrictBool = True


class LabelRequest(Body):
    """Another label for a pair."""

    label: Any


def check_depth(label: Any) -> None:
    """Refuse a label that nests deeper than any is.

    Raises:
        DataError: it does.
    """
    level = [label]
    for _ in range(_DEEPEST):
        level = [each for one in level for each in _members(one) if isinstance(each, list | dict)]
        if not level:
            return
    raise DataError(f'the label nests more than {_DEEPEST} deep')


class Turns:
    """How many of a kind of request each user has answered at the same time.

    Args:
        most: of each user.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, user: str) -> Iterator[None]:
        """Hold one.

        Raises:
            TooManyRequestsError: the user holds as many as anyone may.
        """
        with self._lock:
            if self._held[user] >= self._most:
                raise TooManyRequestsError(
                    f'pairs of {self._most} requests of yours are being saved, and no more at the '
                    'same time: send this one again when they are',
                    _RETRY_SECONDS,
                )
            self._held[user] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[user] -= 1
                if not self._held[user]:
                    del self._held[user]


def _members(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
