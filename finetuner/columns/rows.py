"""Some rows of a dataset, in an order: looked at, chosen from, computed, deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from finetuner.columns.computing import Planner, Values
from finetuner.columns.materializing import materialize
from finetuner.columns.store import ColumnStore, Failure
from finetuner.excepts import ConfigError, NotFoundError, unknown_name

if TYPE_CHECKING:
    from docarray import Document, DocumentArray

    from finetuner.collections import TrainingSet
    from finetuner.columns.dataset import DatasetType

_PAGE = 500
_BATCH = 64


class Rows(Sequence[Any]):
    """Rows of a dataset, as they were found: what is added later is not among them.

    Args:
        dataset: that they are of.
        ids: of the rows, in their order.
    """

    def __init__(self, dataset: DatasetType, ids: Sequence[int]) -> None:
        self.dataset = dataset
        self.ids = list(ids)

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
        declaration = self._store.declaration
        by_value, by_function = {}, {}
        for name, wanted in conditions.items():
            if name not in declaration.fields and name not in declaration.derived:
                known = [*declaration.fields, *declaration.derived]
                raise ConfigError(unknown_name('column', name, known))
            if name in declaration.fields and not callable(wanted):
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
        """Delete these rows, all at once; derived values stay until `prune`.

        Returns:
            How many there were.
        """
        return self._store.delete(self.ids)

    def iter_documents(
        self,
        content: str | None = None,
        label: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> Iterator[Document]:
        """The rows as labelled Documents, one by one; see `to_documents`."""
        from finetuner.columns.documents import documents_of

        return documents_of(self, content, label, tags)

    def to_documents(
        self,
        content: str | None = None,
        label: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> DocumentArray:
        """The rows as labelled Documents, which `finetuner.fit` and everybody else takes.

        A file becomes the `uri` of its copy on this machine, or the `text` that it holds where its ending
        says that it is one; a str `text`, bytes `blob`, an array or a tensor `tensor`. The tag `row` is
        the id of the row, the Document's id that of the dataset and the row. What is missing is computed
        and kept; `materialize` before does it in several processes.

        Args:
            content: column of the contents; None where only one can be meant.
            label: column of the labels, of str, int or bool; None for none.
            tags: columns that become tags; None takes the fields that JSON holds, content and label aside.
                What is None is left out.

        Raises:
            ConfigError: there is no such column, or it is of a type that cannot be this.
            DataError: a value cannot be computed, is None where a content must be, or no label.
        """
        from docarray import DocumentArray

        return DocumentArray(self.iter_documents(content, label, tags))

    def row_documents(
        self, content: str | None, label: str | None, on_broken: Literal['stop', 'skip'] = 'stop'
    ) -> Iterator[Document]:
        """What `finetuner.fit(train_data=..., content=..., label=...)` trains on.

        Args:
            content: column of the contents; None where only one can be meant.
            label: column of the labels; None for none.
            on_broken: `'stop'` at a row of which no Document can be made, or `'skip'` it.
        """
        from finetuner.columns.documents import row_documents_of

        return row_documents_of(self, content, label, on_broken)

    def to_training_set(
        self,
        name: str,
        content: str | None = None,
        *,
        label: str,
        group: str | None = None,
        mltype: str = 'classification',
        tile_size: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        partition: Sequence[float] | None = None,
        description: str = '',
    ) -> TrainingSet:
        """The rows as a collection of image/label pairs, fed and not saved.

        Args:
            name: of the collection.
            content: column of the images: File, bytes, an array or a tensor; None where only one column
                can be meant.
            label: column of the labels. For `classification` str, int, bool, a list of classes or a
                vector; for `object_detection` a dict or list of boxes; for `segmentation` a mask as an
                array or as a picture in grey or of a palette, or GeoJSON. An int is the place of a class
                in `classes` where these are given and are not called by numbers, else its name.
            group: column of the names of groups, such as `split`; None puts all into `train`.
            mltype: what the labels are.
            tile_size: height and width of all images; None takes those of the first picture.
            classes: names, in the order in which labels count them; None takes them from the labels.
            partition: percentages for `train`, `validate` and `test`; not with `group`.
            description: of the collection.

        Raises:
            ConfigError: there is no such column, it is of another type, or an argument is not what it
                may be.
            DataError: a row makes no pair of this collection; it is told.
        """
        from finetuner.columns.training_sets import training_set_of

        made_with = (group, mltype, tile_size, classes, partition, description)
        return training_set_of(self, name, content, label, *made_with)

    def __repr__(self) -> str:
        """How many, of what."""
        return f'<{len(self):,} rows of {self.dataset.__name__}>'

    # below

    @property
    def _store(self) -> ColumnStore:
        return self.dataset.store

    def _made(self, ids: list[int]) -> Iterator[Any]:
        names = list(self._store.declaration.fields)
        page = self._store.read(ids, names, {})
        for row_id, kept in zip(page.ids, zip(*page.columns.values(), strict=True), strict=True):
            yield self.dataset(row_id, dict(zip(names, kept, strict=True)))

    def _values(self, names: list[str]) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
        """Columns, some rows at a time, with the ids of these."""
        start = 0
        for columns in Values(self._store, names).batches(self.ids, _BATCH):
            page = self.ids[start : start + _BATCH]
            start += _BATCH
            yield page, columns

    def _check_names(self, names: Sequence[str]) -> None:
        known = [*self._store.declaration.fields, *self._store.declaration.derived]
        for name in names:
            if name not in known:
                raise ConfigError(unknown_name('column', name, known))


def _is_one_of(wanted: Any) -> Callable[[Any], bool]:
    several = wanted if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
    return lambda value: any(value == each for each in several)
