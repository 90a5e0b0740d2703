"""Some rows of a dataset, in an order: looked at, chosen from, computed, deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from finetuner.columns.computing import Planner, Values
from finetuner.columns.failures import Failure
from finetuner.columns.feeding import Feeding
from finetuner.columns.materializing import materialize
from finetuner.columns.statements import one_or_several
from finetuner.columns.store import ColumnStore
from finetuner.excepts import ConfigError, NotFoundError, unknown_name

if TYPE_CHECKING:
    from finetuner.columns.dataset import DatasetType

_PAGE = 500
_BATCH = 64


class Rows(Feeding, Sequence[Any]):
    """Rows of a dataset, as they were found: what is added later is not among them.

    Args:
        dataset: that they are of.
        ids: of the rows, in their order.
    """

    def __init__(self, dataset: DatasetType, ids: Sequence[int]) -> None:
        self.dataset = dataset
        self.ids: Sequence[int] = ids if isinstance(ids, range) else list(ids)

    def __len__(self) -> int:
        """How many rows these are."""
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Any:
        """A row by its place, or several by a slice."""
        if isinstance(index, slice):
            return Rows(self.dataset, self.ids[index])
        row_id = self.ids[index]
        for row in self._made([row_id]):
            return row
        raise NotFoundError(f'{self.dataset.__name__} has no row {row_id} any more')

    def __iter__(self) -> Iterator[Any]:
        """The rows; those that were deleted meanwhile are left out."""
        for start in range(0, len(self.ids), _PAGE):
            yield from self._made(self.ids[start : start + _PAGE])

    def where(self, **conditions: Any) -> Rows:
        """Those rows whose columns have these values.

        Args:
            **conditions: by name of column: a value, a list of values, or a function that is called with
                the value and says whether the row is wanted.

        Raises:
            ConfigError: there is no such column.
            DataError: a value cannot be one of its column, or a derived one cannot be computed.
        """
        self._check_names(conditions)
        by_value, by_function = {}, {}
        for name, wanted in conditions.items():
            if name in self._store.declaration.fields and not callable(wanted):
                by_value[name] = wanted
            else:
                by_function[name] = wanted if callable(wanted) else _is_one_of(wanted)
        ids = self.ids
        if by_value:
            found = set(self._store.ids(by_value))
            ids = [row_id for row_id in ids if row_id in found]
        if by_function:
            chosen = []
            names = list(by_function)
            for page, columns in Rows(self.dataset, ids)._values(names):
                for place, row_id in enumerate(page):
                    if all(by_function[name](columns[name][place]) for name in names):
                        chosen.append(row_id)
            ids = chosen
        return Rows(self.dataset, ids)

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column, row by row; what is missing is computed and kept.

        Raises:
            ConfigError: there is no such column.
            DataError: a value cannot be computed.
        """
        self._check_names([name])
        return (value for _, columns in self._values([name]) for value in columns[name])

    def materialize(
        self, *columns: str, workers: int | None = None, retry: bool = False, progress: bool = True
    ) -> int:
        """Compute derived columns and keep their values. What is there already is not computed again.

        Rows whose function raises an error are passed over: `errors` tells them.

        Args:
            columns: names; all derived columns where none is given.
            workers: processes that compute; None takes one a core, 0 computes in this one.
            retry: compute again what raised an error before.
            progress: whether to show a bar.

        Returns:
            How many rows have an error.

        Raises:
            ConfigError: there is no such derived column, or a number is out of range.
        """
        derived = self._store.declaration.derived
        for name in columns:
            if name not in derived:
                raise ConfigError(unknown_name('derived column', name, derived))
        names = list(columns or derived)
        return materialize(self._store, self.ids, names, workers, retry, progress)

    def errors(self, column: str) -> list[Failure]:
        """What went wrong when a column was computed, or one that it is computed from.

        What its function, as it is now, was never computed with is not told.
        """
        declaration = self._store.declaration
        if column not in declaration.derived:
            raise ConfigError(unknown_name('derived column', column, declaration.derived))
        planner = Planner(self._store, [column])
        return self._store.failures(self.ids, planner.versions)

    def delete(self) -> int:
        """Delete these rows with their derived values, all at once; files stay until `prune`.

        Returns:
            How many there were.
        """
        return self._store.delete(self.ids)

    def __repr__(self) -> str:
        """How many, of what."""
        return f'<{len(self):,} rows of {self.dataset.__name__}>'

    # below

    def _fed(self) -> Rows:
        return self

    @property
    def _store(self) -> ColumnStore:
        return self.dataset.store

    def _made(self, ids: Sequence[int]) -> Iterator[Any]:
        names = list(self._store.declaration.fields)
        page = self._store.read(ids, names, {})
        for row_id, kept in zip(page.ids, zip(*page.columns.values(), strict=True), strict=True):
            yield self.dataset(row_id, dict(zip(names, kept, strict=True)))

    def _values(self, names: list[str]) -> Iterator[tuple[Sequence[int], dict[str, list[Any]]]]:
        """Columns, some rows at a time, with the ids of these."""
        start = 0
        for columns in Values(self._store, names).batches(self.ids, _BATCH):
            page = self.ids[start : start + _BATCH]
            start += _BATCH
            yield page, columns

    def _check_names(self, names: Iterable[str]) -> None:
        known = [*self._store.declaration.fields, *self._store.declaration.derived]
        for name in names:
            if name not in known:
                raise ConfigError(unknown_name('column', name, known))


def _is_one_of(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: any(value == each for each in one_or_several(wanted))
