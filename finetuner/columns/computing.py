"""Derived values: found by key, or computed once and kept.

The key of a value is a hash of what its function computes, of its type and version, and of the keys of
its inputs. So a function that is edited finds none of its old values, nor do those that depend on it;
one that is as it was finds those that it had then.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetuner.columns.declaring import Declaration, Derived, where
from finetuner.columns.files import File
from finetuner.columns.fingerprint import fingerprint
from finetuner.columns.store import ColumnStore, Failure, new_failure
from finetuner.columns.types import ColumnType
from finetuner.excepts import DataError


class Keys:
    """Keys of derived values, as the functions are now.

    Args:
        declaration: of the dataset.
        names: of the derived columns that are wanted.
    """

    def __init__(self, declaration: Declaration, names: Iterable[str]) -> None:
        self.order = declaration.ancestors(names)
        self._declaration = declaration
        self._begun = {name: _begun(declaration.derived[name]) for name in self.order}
        self._fields = {
            each
            for name in self.order
            for each in declaration.derived[name].inputs
            if each in declaration.fields
        }

    def of(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        """Keys of the values of a row by column, 32 bytes each.

        Args:
            row: its fields as SQL keeps them; files as files.
        """
        parts = {name: _part(row[name]) for name in self._fields}
        keys: dict[str, bytes] = {}
        for name in self.order:
            digest = self._begun[name].copy()
            for each in self._declaration.derived[name].inputs:
                digest.update(parts[each])
            keys[name] = parts[name] = digest.digest()
        return keys


@dataclass
class Computed:
    """What came of computing values of a row.

    Attributes:
        values: that were computed now: column, key, and value as SQL keeps it.
        failure: what went wrong, and the key of the value that it was of; None where nothing did.
        error: that was raised.
    """

    values: list[tuple[str, bytes, Any]]
    failure: tuple[bytes, Failure] | None = None
    error: Exception | None = None


def compute_row(
    declaration: Declaration,
    row: Mapping[str, Any],
    keys: Mapping[str, bytes],
    wanted: Sequence[str],
    known: Mapping[str, Any],
    put: Any,
) -> Computed:
    """Compute values of a row, each from what is known or was computed before.

    Args:
        declaration: of the dataset.
        row: its id and fields as SQL keeps them; files as files.
        keys: of its values by column.
        wanted: derived columns to compute, each after those that it is computed from.
        known: derived values as SQL keeps them; files as files.
        put: brings a file into the data directory: `ColumnStore.put`.
    """
    kept: dict[str, Any] = {**row, **known}
    computed = Computed([])
    for name in wanted:
        column = declaration.derived[name]
        inputs = {each: declaration.type_of(each).decoded(kept[each]) for each in column.inputs}
        try:
            value = column.type.encoded(column.function(**inputs))
            stored = put(name, value) if column.type.is_file else value
        except Exception as error:  # noqa: BLE001 - what a function raises is kept and told, not hidden
            text = ''.join(traceback.format_exception(error))
            message = f'{type(error).__name__}: {error}'
            computed.failure = keys[name], new_failure(row['id'], name, message, text)
            computed.error = error
            return computed
        kept[name] = value
        computed.values.append((name, keys[name], stored))
    return computed


class Values:
    """Values of columns of some rows; what is missing is computed and kept.

    Args:
        store: of the dataset.
    """

    def __init__(self, store: ColumnStore) -> None:
        self._store = store
        self._declaration = store.declaration

    def of(self, ids: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
        """Values by name of column, row by row.

        Args:
            ids: of the rows.
            names: of fields and derived columns.

        Raises:
            DataError: a row is not there, or a function raised an error, which is its cause.
        """
        rows = self._store.rows(ids)
        derived = [name for name in names if name in self._declaration.derived]
        keys_of = Keys(self._declaration, derived)
        keys = {each: keys_of.of(row) for each, row in rows.items()}
        found = {
            name: self._store.values(name, list({row[name] for row in keys.values()}))
            for name in derived
        }
        told = []
        for each in ids:
            if each not in rows:
                raise DataError(f'{self._declaration.name} has no row {each} any more')
            row, mine = rows[each], keys[each]
            kept = {name: found[name][mine[name]] for name in derived if mine[name] in found[name]}
            missing = [name for name in derived if name not in kept]
            if missing:
                self._compute(row, mine, missing)
                for name in missing:
                    value = self._store.values(name, [mine[name]])[mine[name]]
                    found[name][mine[name]] = kept[name] = value
            kept = {**row, **kept}
            told.append({name: self._type(name).decoded(kept[name]) for name in names})
        return told

    def of_row(self, row: Mapping[str, Any], name: str) -> Any:
        """The value of a derived column of a row.

        Args:
            row: its id and fields as SQL keeps them; files as files.
            name: of the column.

        Raises:
            DataError: a function raised an error, which is its cause.
        """
        keys = Keys(self._declaration, [name]).of(row)
        found = self._store.values(name, [keys[name]])
        if not found:
            self._compute(row, keys, [name])
            found = self._store.values(name, [keys[name]])
        return self._type(name).decoded(found[keys[name]])

    def _compute(
        self, row: Mapping[str, Any], keys: Mapping[str, bytes], missing: list[str]
    ) -> None:
        """Compute values of a row with all that they need, and keep them."""
        known: dict[str, Any] = {}
        wanted = []
        waiting = list(missing)
        while waiting:
            name = waiting.pop()
            if name in known or name in wanted:
                continue
            there = self._store.values(name, [keys[name]]) if name not in missing else {}
            if there:
                known[name] = there[keys[name]]
            else:
                wanted.append(name)
                inputs = self._declaration.derived[name].inputs
                waiting += [each for each in inputs if each in self._declaration.derived]
        ordered = [name for name in self._declaration.derived if name in wanted]
        put = self._store.put
        computed = compute_row(self._declaration, row, keys, ordered, known, put)
        failures = [] if computed.failure is None else [computed.failure]
        self._store.keep(computed.values, failures)
        if computed.failure is not None:
            failure = computed.failure[1]
            function = self._declaration.derived[failure.column].function
            raise DataError(
                f'{self._declaration.name}.{failure.column} of row {failure.row} cannot be computed: '
                f'{failure.message} ({where(function)})'
            ) from computed.error

    def _type(self, name: str) -> ColumnType:
        return self._declaration.type_of(name)


def _begun(column: Derived) -> Any:
    """A hash to which the keys of the inputs are added."""
    digest = hashlib.sha256()
    names = ','.join(column.inputs)
    for text in (fingerprint(column.function), column.type.name, column.version, names):
        digest.update(_framed(text.encode()))
    return digest


def _part(kept: Any) -> bytes:
    """What a field counts as."""
    if isinstance(kept, File):
        return _framed(f'file{kept.suffix}:{kept.hash}'.encode())
    if isinstance(kept, bytes):
        return _framed(b'bytes' + kept)
    # numbers of SQL: True is 1
    number = int(kept) if isinstance(kept, bool) else kept
    return _framed(f'{type(number).__name__}:{number}'.encode())


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, 'big') + data
