"""What a SQLite file of datasets says: as it was declared, and how much there is of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DeclaredColumn:
    """What was declared of a column.

    Attributes:
        name: of it.
        kind: `field` or `derived`, after `removed ` where it is declared no more.
        type: of its values, as it is shown.
        inputs: columns that it is computed from.
    """

    name: str
    kind: str
    type: str
    inputs: tuple[str, ...]

    @property
    def is_file(self) -> bool:
        """Whether its values are files."""
        return is_file_type(self.type)

    @property
    def is_derived(self) -> bool:
        """Whether a function computes it."""
        return 'derived' in self.kind

    @property
    def is_removed(self) -> bool:
        """Whether it is declared no more."""
        return self.kind.startswith('removed')


@dataclass(frozen=True)
class ColumnState(DeclaredColumn):
    """What there is of a column.

    Attributes:
        num_kept: rows that have a value; of a derived column, one of its function as it was used last.
        num_stale: values of functions as they were before.
        num_errors: rows whose function raised an error.
        num_bytes: of all of its values, and of the files that they are.
    """

    num_kept: int = 0
    num_stale: int = 0
    num_errors: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class DatasetSummary:
    """What is found out quickly of a dataset.

    Attributes:
        name: of it.
        num_rows: how many.
        num_columns: that are declared.
        num_errors: values that could not be computed.
        num_bytes: of its files.
    """

    name: str
    num_rows: int
    num_columns: int
    num_errors: int
    num_bytes: int


@dataclass(frozen=True)
class Long:
    """A value that was cut.

    Attributes:
        start: of it.
        length: of all of it, in characters or bytes.
    """

    start: str | bytes
    length: int


@dataclass(frozen=True)
class DatasetState:
    """What there is of a dataset.

    Attributes:
        name: of it.
        sql_file: that it is in.
        data_dir: where its files are: a path, or an address.
        num_rows: how many.
        num_files: how many different files.
        num_bytes: of the SQLite file and of these.
        columns: fields first, then derived ones.
    """

    name: str
    sql_file: Path
    data_dir: str
    num_rows: int
    num_files: int
    num_bytes: int
    columns: tuple[ColumnState, ...]


def is_file_type(shown: str) -> bool:
    """Whether a type, as it is shown, is one of files."""
    return plain_type(shown).startswith('File')


def is_optional_type(shown: str) -> bool:
    """Whether a type, as it is shown, has None among its values."""
    return shown.startswith('Optional[')


def plain_type(shown: str) -> str:
    """A type, as it is shown, without None."""
    return shown.removeprefix('Optional[').removesuffix(']') if is_optional_type(shown) else shown


def with_ancestors(column: str, derived: Mapping[str, DeclaredColumn]) -> list[str]:
    """A derived column and those that it is computed from, by name."""
    found: list[str] = []
    waiting = [column]
    while waiting:
        name = waiting.pop()
        if name in derived and name not in found:
            found.append(name)
            waiting += derived[name].inputs
    return found
