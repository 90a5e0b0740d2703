"""Rows of a dataset from folders of files: one a File field, one a class, or one with all of them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.columns.files import File, suffix_of
from finetuner.columns.ingesting import add_all, check_value, checked, no_field
from finetuner.data.folders import SPLITS, files_below, list_folder, split_folders
from finetuner.excepts import ConfigError, DataError, NotFoundError, unknown_name

if TYPE_CHECKING:
    from finetuner.columns.dataset import DatasetType

_LOGGER = logging.getLogger(__name__)
_DIGITS = re.compile(r'(\d+)')
_NAMES_SHOWN = 3
_NO_LABEL = 'in no folder whose name would be their {!r}'


def import_folder(
    dataset: DatasetType,
    path: str | os.PathLike[str],
    folders: Mapping[str, str] | None,
    field: str | None,
    label: str | None,
    values: Mapping[str, Any] | Callable[[Path], Mapping[str, Any]] | None,
    on_other: str,
) -> int:
    """Add files of a folder; see `Dataset.import_folder`."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f'import_folder takes the path of a folder, not {type(path).__name__}')
    if on_other not in ('stop', 'skip'):
        raise ConfigError(f"on_other={on_other!r}: it is 'stop' or 'skip'")
    found = _Import(dataset, os.path.abspath(os.path.expanduser(path)), label, on_other == 'skip')
    list_folder(path)
    chosen = found.choose(folders, field)
    given = found.values(values, chosen)
    files = found.of_one(chosen) if isinstance(chosen, str) else found.of_several(chosen)
    if not files:
        raise DataError(f'there is no file in the folder {found.root!r} to make a row of')
    return add_all(dataset, found.rows(files, given))


class _Import:
    """One import.

    Args:
        dataset: that rows are added to.
        root: the folder.
        label: field that names of folders are values of.
        may_skip: whether files are left out that no field takes.
    """

    def __init__(self, dataset: DatasetType, root: str, label: str | None, may_skip: bool) -> None:
        self.root = root
        self._dataset = dataset
        self._declaration = dataset.declaration
        self._file_fields = [
            name for name, each in self._declaration.fields.items() if each.type.is_file
        ]
        self._label = label
        self._may_skip = may_skip
        if label is not None:
            self._check_field('label', label)
            if self._declaration.fields[label].type.python is not str:
                raise ConfigError(f'label={label!r}: names of folders are str, and it is none')

    # ---- arguments

    def choose(self, folders: Any, field: Any) -> str | dict[str, str]:
        """The one field that all files are of, or folders by field."""
        if not self._file_fields:
            raise ConfigError(f'{self._dataset.__name__} has no File field that a file could be of')
        if folders is not None and field is not None:
            raise ConfigError('give folders or field: a folder for each of several, or one for one')
        if field is not None:
            self._check_field('field', field)
            if field not in self._file_fields:
                raise ConfigError(
                    f'field={field!r}: {unknown_name("File field", field, self._file_fields)}'
                )
            return field
        if folders is None:
            return self._file_fields[0] if len(self._file_fields) == 1 else self._folders_by_name()
        if not isinstance(folders, Mapping) or not folders:
            raise ConfigError(
                f"folders={folders!r:.200}: it takes folders by File field, such as {{'image': 'pictures'}}"
            )
        for name, folder in folders.items():
            self._check_field('folders', name)
            if name not in self._file_fields:
                raise ConfigError(f'folders: {unknown_name("File field", name, self._file_fields)}')
            if not isinstance(folder, str | os.PathLike):
                raise ConfigError(f'folders[{name!r}]={folder!r:.200}: it is the path of a folder')
        return {
            name: os.path.normpath(os.path.join(self.root, folders[name]))
            for name in self._file_fields
            if name in folders
        }

    def _folders_by_name(self) -> dict[str, str]:
        """Folders that are called as File fields are."""
        found = {os.path.basename(folder): folder for folder in list_folder(self.root)[0]}
        hint = "give folders={'field': 'folder'}, or field='...' where all files are of one field"
        for name in found:
            if name not in self._file_fields and not self._may_skip:
                unknown = unknown_name('File field', name, self._file_fields)
                raise DataError(f'a folder in {self.root!r} is of no field: {unknown} Or {hint}')
        for name in self._file_fields:
            if name not in found and self._declaration.fields[name].is_required:
                raise DataError(f'there is no folder {name!r} in {self.root!r}: make it, or {hint}')
        return {name: found[name] for name in self._file_fields if name in found}

    def values(
        self, values: Any, chosen: str | Mapping[str, str]
    ) -> Callable[[Path], Mapping[str, Any]]:
        """The function of a path that gives the other values."""
        filled = {chosen} if isinstance(chosen, str) else {*chosen}
        if self._label is not None:
            filled.add(self._label)

        def check_names(given: Any) -> Mapping[str, Any]:
            if not isinstance(given, Mapping):
                raise DataError(f'{type(given).__name__} is no values by name of field')
            both = filled & given.keys()
            if both:
                raise DataError(f'{min(both)!r} is what the folder says already')
            return given

        if callable(values):
            return lambda path: check_names(values(path))
        try:
            given = dict(check_names({} if values is None else values))
            for name, value in given.items():
                if name not in self._declaration.fields:
                    raise DataError(no_field(self._declaration, name))
                check_value(self._declaration, name, value)
        except DataError as error:
            raise ConfigError(f'values: {error}') from error
        for name, each in self._declaration.fields.items():
            if each.is_required and not each.type.is_file and name not in {*filled, *given}:
                raise ConfigError(
                    f'{name!r} has no default: give values={{{name!r}: ...}}, or a function of the path, '
                    'or label for names of folders'
                )
        return lambda path: given

    # ---- files

    def of_one(self, name: str) -> dict[str, dict[str, str]]:
        """All files, as values of one field, by what identifies a row."""
        self._refuse_itself(self.root)
        if self._label is None:
            return {file: {name: file} for file in self._taken(name, files_below(self.root))}
        kind = self._declaration.fields[name].type
        splits = split_folders(self.root, kind.suffixes or ('',))
        if splits:
            part = os.path.basename(splits[0])
            raise DataError(
                f'the folders in {self.root!r} are parts of a data set and not values of {self._label!r}: '
                f'give one after the other, such as {splits[0]!r} with '
                f"values={{'split': {SPLITS[part.lower()]!r}}}"
            )
        inner, outer = list_folder(self.root)
        self._leave_out(outer, _NO_LABEL.format(self._label))
        below = [file for folder in inner for file in files_below(folder, within=self.root)]
        return {file: {name: file} for file in self._taken(name, below)}

    def of_several(self, folders: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """Files by field, by what identifies a row: their path without its ending."""
        found: dict[str, dict[str, str]] = {}
        for name, folder in folders.items():
            self._refuse_itself(folder)
            files = files_below(folder)
            if self._label is not None:
                self._leave_out(list_folder(folder)[1], _NO_LABEL.format(self._label))
                files = [file for file in files if os.path.dirname(file) != folder]
            for file in self._taken(name, files):
                relative = os.path.relpath(file, folder)
                row = found.setdefault(relative[: len(relative) - len(suffix_of(file))], {})
                if name in row:
                    raise DataError(
                        f'{self._shown(row[name])} and {self._shown(file)} would be {name!r} of one row: '
                        'they differ in their endings alone'
                    )
                row[name] = file
        for name, folder in folders.items():
            if not self._declaration.fields[name].is_required:
                continue
            alone = [files for files in found.values() if name not in files]
            if alone:
                first = sorted((next(iter(files.values())) for files in alone), key=natural)
                raise DataError(
                    f'{len(alone):,} {"files have" if len(alone) > 1 else "file has"} no partner in '
                    f'{os.path.relpath(folder, self.root)!r}: {self._some(first)}. Partners have the '
                    f'same path but for the ending; where there need be none, say Optional for {name!r}'
                )
        return found

    def _taken(self, name: str, files: list[str]) -> list[str]:
        """Those that have an ending that a field takes."""
        kind = self._declaration.fields[name].type
        if not kind.suffixes:
            return files
        others = [file for file in files if suffix_of(file) not in kind.suffixes]
        self._leave_out(others, f'with an ending that {name!r} does not take, which is {kind.name}')
        return [file for file in files if suffix_of(file) in kind.suffixes]

    def _leave_out(self, files: list[str], problem: str) -> None:
        if not files:
            return
        many = '' if len(files) == 1 else 's'
        what = f'{len(files):,} file{many} in {self.root!r} {problem}: {self._some(files)}'
        if not self._may_skip:
            raise DataError(f"{what}. on_other='skip' leaves them out")
        _LOGGER.warning('%s. They were skipped', what)

    def _refuse_itself(self, folder: str) -> None:
        """Refuse what the dataset keeps: each import would add it again."""
        store = self._dataset.store
        kept = [store.sql_file]
        for name in self._file_fields if store.files.is_local else ():
            try:
                kept.append(store.files.local_path(name))
            except NotFoundError:
                continue
        for path in kept:
            if Path(path).resolve().is_relative_to(Path(folder).resolve()):
                raise DataError(
                    f'{str(path)!r}, where {self._dataset.__name__} keeps its own, is in the folder: move '
                    'what is to be added into another folder'
                )

    # ---- rows

    def rows(
        self, files: Mapping[str, Mapping[str, str]], given: Callable[[Path], Mapping[str, Any]]
    ) -> Iterator[Mapping[str, Any]]:
        """Rows in the natural order of their paths."""
        for key in sorted(files, key=natural):
            first = next(iter(files[key].values()))
            row: dict[str, Any] = {}
            try:
                if self._label is not None:
                    row[self._label] = self._folder_name(key)
                row.update((name, File(file)) for name, file in files[key].items())
                row.update(given(Path(first)))
                checked(self._declaration, row)
            except DataError as error:
                raise DataError(f'{self._shown(first)}: {error}') from error
            yield row

    def _folder_name(self, key: str) -> str:
        # of several, the key is relative to the folder of each
        return Path(os.path.relpath(key, self.root) if os.path.isabs(key) else key).parts[0]

    def _check_field(self, argument: str, name: Any) -> None:
        if not isinstance(name, str):
            raise ConfigError(f'{argument}={name!r:.200}: it is the name of a field')
        if name not in self._declaration.fields:
            raise ConfigError(f'{argument}={name!r}: {no_field(self._declaration, name)}')

    def _shown(self, file: str) -> str:
        return repr(os.path.relpath(file, self.root))

    def _some(self, files: list[str]) -> str:
        more = ', ...' if len(files) > _NAMES_SHOWN else ''
        return ', '.join(map(self._shown, files[:_NAMES_SHOWN])) + more


def natural(path: str) -> tuple[Any, ...]:
    """A key that sorts `2.png` before `10.png`, and a folder's files one after the other."""
    parts = []
    for part in path.split(os.sep):
        pieces = _DIGITS.split(part)
        # every other piece is digits, so that numbers meet numbers
        parts.append(tuple(int(each) if place % 2 else each for place, each in enumerate(pieces)))
    return tuple(parts), path
