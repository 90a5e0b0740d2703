"""How rows come into a dataset: functions of its class that yield them, and what imports share."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, ParamSpec

from finetuner.columns.files import File
from finetuner.excepts import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    from finetuner.columns.dataset import DatasetType
    from finetuner.columns.declaring import Declaration

Parameters = ParamSpec('Parameters')
RowFunction = Callable[Parameters, Iterable[Mapping[str, Any]]]


class Ingest(Generic[Parameters]):
    """A function that brings rows in; of a dataset, the function that adds them.

    Attributes:
        function: that yields rows.
    """

    def __init__(self, function: RowFunction[Parameters]) -> None:
        self.function: Any = function
        functools.update_wrapper(self, function)

    def __get__(self, row: Any, owner: type) -> Callable[Parameters, int]:
        """The function that adds its rows to a dataset, and returns how many these were."""
        from finetuner.columns.dataset import DatasetType

        if not isinstance(owner, DatasetType):
            return self

        @functools.wraps(self.function)
        def add_rows(*args: Parameters.args, **kwargs: Parameters.kwargs) -> int:
            name = f'{owner.__name__}.{self.function.__name__}'
            return owner.extend(_rows_of(name, self.function(*args, **kwargs)))

        return add_rows

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> int:
        """Refuse: it is of no dataset."""
        raise ConfigError(
            f'{self.function.__name__} is of no dataset: write it into a class that is one, and call '
            'it on that class'
        )


def ingest(function: RowFunction[Parameters]) -> Ingest[Parameters]:
    """Make a function of a dataset's class one that adds rows.

    @dataset
    class Segmentation:
        image: File
        split: str = 'train'

        @ingest
        def from_archive(folder: str, limit: int = 10):
            for path in sorted(Path(folder).glob('*.png'))[:limit]:
                yield {'image': path}

    num_added = Segmentation.from_archive('pictures')

    What it yields is added as `Dataset.extend` adds it, thousands in a transaction. Calling it twice
    adds twice. Where it raises an error itself, the rows that it yielded before stay.
    The function as it was written is its `__wrapped__`.

    Args:
        function: that takes what it likes, and returns an iterable of rows: values by name of field.

    Raises:
        ConfigError: it is no function.
    """
    if not isinstance(function, types.FunctionType):
        raise ConfigError(
            f'@ingest takes a function, not {type(function).__name__}: it stands right above `def`'
        )
    return Ingest(function)


def add_all(dataset: DatasetType, rows: Iterable[Mapping[str, Any]]) -> int:
    """Add rows up to the first that is none.

    Args:
        dataset: that they are of.
        rows: checked by `checked`; their DataError ends them.

    Returns:
        How many were added.

    Raises:
        DataError: a row is none. It tells how many were added, which are all that came before.
    """
    found: list[DataError] = []

    def until_error() -> Iterator[Mapping[str, Any]]:
        try:
            yield from rows
        except DataError as error:
            found.append(error)

    num_added = dataset.extend(until_error())
    if found:
        were = 'row was' if num_added == 1 else 'rows were'
        raise DataError(f'{found[0]}; {num_added:,} {were} added before it') from found[0]
    return num_added


def checked(declaration: Declaration, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row, every value of which is one of its field.

    Raises:
        DataError: one is not, is missing, or is of no field.
    """
    for name, value in row.items():
        if name not in declaration.fields:
            raise DataError(no_field(declaration, name))
        check_value(declaration, name, value)
    for name, field in declaration.fields.items():
        if field.is_required and name not in row:
            raise DataError(f'{name!r} is missing')
    return row


def check_value(declaration: Declaration, name: str, value: Any) -> None:
    """Refuse what is no value of a field, with a DataError that names it."""
    try:
        kept = declaration.fields[name].type.encoded(value)
    except (DataError, RecursionError) as error:
        raise DataError(f'{name}: {error}') from error
    if isinstance(kept, File) and not os.access(kept.path, os.R_OK):
        raise DataError(f'{name}: {kept.path} cannot be read: permission denied')


def no_field(declaration: Declaration, name: object) -> str:
    """Say that a name is of no field."""
    if name in declaration.derived:
        return f'{name!r} is a derived column, which is computed. Fields: {", ".join(declaration.fields)}.'
    return unknown_name('field', name, declaration.fields)


def _rows_of(name: str, given: Any) -> Iterable[Mapping[str, Any]]:
    """What a function returned, where it can be rows."""
    if isinstance(given, Mapping | str | bytes) or not isinstance(given, Iterable):
        raise DataError(
            f'{name}() returned {type(given).__name__}, and not rows: it yields each of them, or returns '
            'a list: values by name of field'
        )
    return given
