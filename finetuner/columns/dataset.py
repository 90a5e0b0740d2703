"""Datasets declared as classes: the class is the collection of its rows, an instance is a row."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, overload

from finetuner.columns.computing import Planner, Values
from finetuner.columns.declaring import Declaration, declaration_of
from finetuner.columns.failures import Failure
from finetuner.columns.feeding import DatasetFeeding
from finetuner.columns.files import File
from finetuner.columns.inspecting import cache_of, noted_data_dir, resolved_data_dir
from finetuner.columns.picturing import ColumnGraph, graph_of
from finetuner.columns.pruning import Pruned, note_user, prune
from finetuner.columns.rows import Rows
from finetuner.columns.store import ColumnStore
from finetuner.columns.types import ColumnType
from finetuner.excepts import ConfigError
from finetuner.storage.database import make_private_directory
from finetuner.storage.files import FileStore

_INSTANCE_NAMES = ('id', 'files')


class Column:
    """A column of a dataset; of an instance, its value.

    Attributes:
        name: of it.
        type: of its values.
        function: that computes them; None for a field.
    """

    def __init__(self, name: str, kind: ColumnType, function: Callable[..., Any] | None) -> None:
        self.name = name
        self.type = kind
        self.function = function

    def __get__(self, row: Any, owner: type | None = None) -> Any:
        """The value of an instance; of the class, the column itself."""
        return self if row is None else row._value(self.name)

    def __set__(self, row: Any, value: Any) -> None:
        """Refuse: rows are what was added."""
        raise AttributeError(f'{self.name} of a row cannot be set: delete the row, and add another')

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function by itself, as in a test of it."""
        if self.function is None:
            raise TypeError(f'{self.name} is a field: it computes nothing')
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        """Name and type."""
        return f'<{"field" if self.function is None else "derived column"} {self.name}: {self.type.name}>'


class DatasetType(DatasetFeeding, type):
    """The type of datasets: what is called on the class itself."""

    _store: ColumnStore

    @property
    def declaration(cls) -> Declaration:
        """Fields and derived columns."""
        return cls._store.declaration

    @property
    def store(cls) -> ColumnStore:
        """Where its rows and values are kept."""
        return cls._store

    @property
    def rows(cls) -> Rows:
        """All rows as they are now, in the order in which they were added."""
        return Rows(cls, cls._store.ids())

    def add(cls, **values: Any) -> Any:
        """Add a row.

        Args:
            **values: of its fields by name; those with a default may be left out.

        Returns:
            The row.

        Raises:
            DataError: a value is missing, is none of its type, or is of no field.
        """
        return Rows(cls, [cls._store.add(values)])[0]

    def extend(cls, rows: Iterable[Mapping[str, Any]]) -> int:
        """Add rows, up to ten thousand in a transaction, or those of a second.

        Args:
            rows: values by name of field; read one after the other.

        Returns:
            How many were added.

        Raises:
            DataError: a row is none. It tells its position; those before it stay.
        """
        return cls._store.append(rows)

    def import_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        columns: Mapping[str, str] | None = None,
        delimiter: str | None = None,
        encoding: str = 'utf-8',
        base_dir: str | os.PathLike[str] | None = None,
    ) -> int:
        """Add the rows of a CSV file with a header, as `extend` does. Twice adds twice.

        Cells are read as the types of their fields: numbers with a decimal point, `true` or `false` (and
        yes, no, t, f, y, n, on, off, 1, 0), moments as in ISO 8601, dict and list as JSON, bytes in
        base64; a file by its path, absolute or relative to the folder of the CSV. Texts are taken as
        they stand, but spaces after a delimiter, where no quote follows them, are no part of a cell. An
        empty cell is the default of its field, or None of an Optional.

        Args:
            path: of the file.
            columns: what the header calls fields, by name of field. Fields that it does not name are
                found by their own; what the header has besides is then left out.
            delimiter: between cells; None finds out which of comma, tab, semicolon and `|` cuts the header
                into names of fields.
            encoding: of the file; `'utf-8'` reads a byte order mark too.
            base_dir: folder that paths of files are relative to, and may leave by `..`; None for that of
                the CSV, which they may not.

        Returns:
            How many were added.

        Raises:
            ConfigError: an argument is out of range, or a field is an array, which a cell cannot be.
            DataError: a row is none, or the header is none of this dataset. It names file, line and
                column; rows before stay, and it says how many these are.
        """
        from finetuner.columns.csv_import import import_csv

        return import_csv(cls, path, columns, delimiter, encoding, base_dir)

    def import_folder(
        cls,
        path: str | os.PathLike[str],
        *,
        folders: Mapping[str, str] | None = None,
        field: str | None = None,
        label: str | None = None,
        values: Mapping[str, Any] | Callable[[Path], Mapping[str, Any]] | None = None,
        on_other: Literal['stop', 'skip'] = 'stop',
    ) -> int:
        """Add a row for each file of a folder, or for the files of a name. Twice adds twice.

        | layout | call |
        |---|---|
        | `cats/0001.png`, `cats/more/0002.png` | `import_folder('cats')` |
        | `pets/cat/0001.png`, `pets/dog/0001.png` | `import_folder('pets', label='animal')` |
        | `scenes/image/0001.jpg`, `scenes/mask/0001.png` | `import_folder('scenes')`: one row |

        With one File field, or `field`, all files in the folder, at any depth, are of that field. With
        several, each has a folder of its name: files with the same path, but for the ending, are one
        row; other files beside those folders do not count. Rows are added in the natural order of
        paths (`2.png` before `10.png`). Hidden files and folders are skipped, links are followed, each
        folder once. All files are found, and their partners, before the first row is added.

        Args:
            path: of the folder.
            folders: paths of folders, relative to `path`, by File field, where they are called otherwise;
                other folders are then left out.
            field: the File field that all files are of.
            label: a field of type str, whose value is the name of the folder right below `path` (or
                below the folder of the field) that a file is in.
            values: those of other fields by name, or a function that returns them for the absolute
                path of a file; of several files, that of the first field.
            on_other: `'stop'` at files with an ending that their field does not take, at files without a
                folder for `label`, and at folders that are of no field; or `'skip'` them with a warning.

        Returns:
            How many were added.

        Raises:
            ConfigError: an argument is out of range, or a field without default gets no value.
            DataError: there is no such folder or no file in it, a file has no partner and its field is
                not Optional, or a row is none; it names the file, and rows before stay.
        """
        from finetuner.columns.folder_import import import_folder

        return import_folder(cls, path, folders, field, label, values, on_other)

    def where(cls, **conditions: Any) -> Rows:
        """Rows whose columns have these values; see `Rows.where`."""
        return cls.rows.where(**conditions)

    def materialize(
        cls, *columns: str, workers: int | None = None, retry: bool = False, progress: bool = True
    ) -> int:
        """Compute columns for all rows; see `Rows.materialize`."""
        return cls.rows.materialize(*columns, workers=workers, retry=retry, progress=progress)

    def errors(cls, column: str) -> list[Failure]:
        """What went wrong when a column was computed, as far as it still stands; see `Rows.errors`."""
        return cls.rows.errors(column)

    def graph(cls) -> ColumnGraph:
        """Its columns, and what they are computed from, as a picture."""
        return graph_of(cls.declaration)

    def delete(cls, **conditions: Any) -> int:
        """Delete the rows that `where` finds.

        Returns:
            How many there were.

        Raises:
            ConfigError: no conditions: `Dataset.rows.delete()` deletes all rows.
        """
        if not conditions:
            raise ConfigError(
                f'{cls.__name__}.delete() takes conditions, as where(): {cls.__name__}.rows.delete() '
                'deletes all rows'
            )
        return cls.where(**conditions).delete()

    def prune(cls) -> Pruned:
        """Delete what is needed no more: values of functions as they were before, what removed derived
        columns left, and files that nothing names. Fields that were removed stay.

        Returns:
            What was deleted.

        Raises:
            ConflictError: rows are being added or computed, here or in another process.
        """
        store = cls._store
        # functions count as they are now
        Planner(store, list(store.declaration.derived))
        return prune(store.database, store.sql_file, store.declaration.name, store.files)

    def _fed(cls) -> Rows:
        return cls.rows

    def __len__(cls) -> int:
        """How many rows there are."""
        return cls._store.count()

    def __bool__(cls) -> bool:
        """True: a dataset without rows is one, too."""
        return True

    def __iter__(cls) -> Iterator[Any]:
        """All rows."""
        return iter(cls.rows)

    @overload
    def __getitem__(cls, index: int) -> Any: ...

    @overload
    def __getitem__(cls, index: slice) -> Rows: ...

    def __getitem__(cls, index: int | slice) -> Any:
        """A row by its place, or several by a slice."""
        return cls.rows[index]

    def __repr__(cls) -> str:
        """Name and file."""
        store = vars(cls).get('_store')
        return f'<dataset {cls.__name__}{f" in {store.sql_file}" if store else ""}>'


class Dataset(metaclass=DatasetType):
    """A row: its fields and derived values are its attributes.

    Args:
        row_id: of it.
        kept: its fields as SQL keeps them; files as files.
    """

    def __init__(self, row_id: int, kept: Mapping[str, Any]) -> None:
        self.id = row_id
        self._kept = kept

    def _value(self, name: str) -> Any:
        store = type(self)._store
        if name in store.declaration.fields:
            return store.declaration.fields[name].type.decoded(self._kept[name])
        return Values(store, [name]).of([self.id])[name][0]

    def __eq__(self, other: object) -> bool:
        """The same row of the same dataset."""
        return type(other) is type(self) and other.id == self.id

    def __hash__(self) -> int:
        """By row."""
        return hash((type(self), self.id))

    def __repr__(self) -> str:
        """Its fields."""
        fields = type(self)._store.declaration.fields
        shown = ', '.join(f'{name}={self._kept[name]!r:.60}' for name in fields)
        return f'{type(self).__name__}(id={self.id}, {shown})'


RESERVED = frozenset(
    [name for name in dir(DatasetType) if not name.startswith('_')]
    + [name for name in dir(Dataset) if not name.startswith('_')]
    + list(_INSTANCE_NAMES)
)


def dataset(
    cls: type | None = None,
    *,
    sql_file: str | Path | None = None,
    data_dir: str | Path | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Any:
    """Make a class a dataset: annotations are its fields, functions its derived columns.

    The SQLite file and a folder for each column of files are made where they are not there.

    Args:
        cls: the class; left out where the decorator has arguments.
        sql_file: path of the SQLite file. Default: `<name of the class>.sql` beside the module.
        data_dir: where files are kept: a path, or an address that fsspec opens. Default: a folder of the
            class's name beside the module.
        renamed: old names of fields by their new ones, for a dataset that has rows already.

    Raises:
        ConfigError: a field, a function or a name is none of a dataset; it names file and line.
    """
    scope = dict(sys._getframe(1).f_locals)

    def make(made: type) -> type:
        beside = _directory_of(made)
        path = Path(sql_file) if sql_file is not None else beside / f'{made.__name__}.sql'
        path = path.absolute()
        folder = str(data_dir) if data_dir is not None else str(beside / made.__name__)
        declaration = declaration_of(made, scope, RESERVED)
        files = FileStore(folder, cache_of(path))
        kept = {
            name: value
            for name, value in vars(made).items()
            if name not in ('__dict__', '__weakref__') and name not in declaration.fields
        }
        for name in (*declaration.fields, *declaration.derived):
            derived = declaration.derived.get(name)
            kept[name] = Column(
                name, declaration.type_of(name), derived.function if derived else None
            )
        bases = tuple(base for base in made.__bases__ if base is not object)
        noted = noted_data_dir(folder, path, files.is_local)
        found = DatasetType(made.__name__, (*bases, Dataset), kept)
        found._store = ColumnStore(declaration, path, noted, files, renamed)
        _make_folders(declaration, Path(resolved_data_dir(noted, path)), files)
        note_user(files, path)
        return found

    return make if cls is None else make(cls)


def _make_folders(declaration: Declaration, data_dir: Path, files: FileStore) -> None:
    """Make a folder for each column of files, where there are folders."""
    for name in (*declaration.fields, *declaration.derived):
        if not files.is_local or not declaration.type_of(name).is_file:
            continue
        try:
            make_private_directory(data_dir)
            (data_dir / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data_dir='{data_dir}': the folder {name!r} cannot be made in it: {error}"
            ) from error


def _directory_of(cls: type) -> Path:
    """Where the module of a class is; what is typed at a prompt is where that runs."""
    path = getattr(sys.modules.get(cls.__module__), '__file__', None)
    return Path(path).absolute().parent if path else Path.cwd()


__all__ = ['Column', 'Dataset', 'DatasetType', 'File', 'dataset']
