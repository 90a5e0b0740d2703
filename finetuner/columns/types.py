"""Types of columns: what a value may be, how SQL keeps it, and what it counts as in keys."""

from __future__ import annotations

import io
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Union

import numpy as np
from sqlalchemy import Boolean, Float, Integer, LargeBinary, Text
from sqlalchemy.types import TypeEngine

from finetuner.columns.files import File, FileType
from finetuner.excepts import ConfigError, DataError

ALLOWED = (
    "File, File['png'], str, int, float, bool, bytes, datetime.datetime, numpy.ndarray, torch.Tensor, "
    'dict and list (as JSON), and Optional of these'
)
# values of these are small, whatever they are
SMALL = (bool, int, float, datetime)
# what SQLite's integers hold
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class ColumnType:
    """What the values of a column are.

    Attributes:
        name: as it is shown.
        python: the class of the values.
        sql: how SQL keeps them.
        encode: a value as SQL keeps it; raises DataError for what is none.
        decode: the other way.
        is_optional: whether None is a value.
        suffixes: of files, which endings they may have; empty for any.
    """

    name: str
    python: type
    sql: type[TypeEngine[Any]]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    is_optional: bool = False
    suffixes: tuple[str, ...] = ()

    @property
    def is_as_kept(self) -> bool:
        """Whether values are what SQL keeps."""
        return self.decode is _same

    def encoded_alike(self, values: list[Any]) -> Sequence[Any] | None:
        """Many values at once as SQL keeps them, where they are all plain ones; else None."""
        if set(map(type, values)) != {self.python}:
            return None
        if self.python is int:
            return values if min(values) >= _LOWEST and max(values) <= _HIGHEST else None
        if self.python is float:
            return None if any(map(math.isnan, values)) else values
        if self.python is str:
            try:
                ''.join(values).encode()
            except UnicodeEncodeError:
                return None
            return values
        return values if self.python in (bool, bytes) else None

    def decoded_all(self, kept: Sequence[Any]) -> list[Any]:
        """Many values that SQL keeps so."""
        if self.python is float and set(map(type, kept)) == {float}:
            return list(kept)
        if None in kept:
            return [self.decoded(each) for each in kept]
        return list(kept) if self.is_as_kept else list(map(self.decode, kept))

    @property
    def is_file(self) -> bool:
        """Whether values are files."""
        return self.python is File

    def encoded(self, value: Any) -> Any:
        """A value as SQL keeps it; of a file, the file.

        Raises:
            DataError: it is no value of this type.
        """
        if value is None:
            if self.is_optional:
                return None
            raise DataError(
                f'it takes {self.name}, not None; say Optional[{self.name}] to allow that'
            )
        try:
            return self.encode(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f'it takes {self.name}, not {type(value).__name__} {_short(value)}'
                + (f': {error}' if str(error) else '')
            ) from error

    def decoded(self, kept: Any) -> Any:
        """The value that SQL keeps so."""
        if kept is None:
            # SQL has no number for what is none
            return math.nan if self.python is float and not self.is_optional else None
        return self.decode(kept)

    def takes(self, other: ColumnType) -> bool:
        """Whether every value of another type is one of this."""
        if other.is_optional and not self.is_optional:
            return False
        if self.suffixes:
            return bool(other.suffixes) and set(other.suffixes) <= set(self.suffixes)
        return self.python is other.python or (self.python is float and other.python is int)


def column_type(annotation: Any) -> ColumnType:
    """The type that an annotation says.

    Raises:
        ConfigError: there is no such type of columns.
    """
    if isinstance(annotation, FileType):
        return _file_type(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        endings = tuple(each for each in arguments[1:] if isinstance(each, str))
        # linters take the text in File['png'] for the name of a type
        is_some = arguments[0] is File and endings
        return _file_type(File.__class_getitem__(endings)) if is_some else column_type(arguments[0])
    if origin in (Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        plain = column_type(next(each for each in arguments if each is not type(None)))
        return _optional(plain)
    if origin in (dict, list):
        return _JSON[origin]
    if annotation is File:
        return _FILE
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if _is_tensor(annotation):
        return ColumnType('torch.Tensor', annotation, LargeBinary, _tensor_bytes, _bytes_tensor)
    raise ConfigError(f'{shown(annotation)} is no type of columns: these are {ALLOWED}')


def shown(annotation: Any) -> str:
    """An annotation as it is written."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _optional(plain: ColumnType) -> ColumnType:
    def encode(value: Any) -> Any:
        kept = plain.encode(value)
        if kept is None:
            raise ValueError('None stands for no value here: nan cannot be told from it')
        return kept

    return ColumnType(
        f'Optional[{plain.name}]',
        plain.python,
        plain.sql,
        encode,
        plain.decode,
        True,
        plain.suffixes,
    )


def _file_type(given: FileType) -> ColumnType:
    def encode(value: Any) -> File:
        file = _encode_file(value)
        if file.suffix not in given.suffixes:
            raise ValueError(f'its ending is {file.suffix!r}')
        return file

    return ColumnType(str(given), File, Integer, encode, _same, suffixes=given.suffixes)


def _encode_file(value: Any) -> File:
    if isinstance(value, File):
        return value
    if isinstance(value, str) or hasattr(value, '__fspath__'):
        return File(value)
    raise TypeError('give a File, or the path of one')


def _encode_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()
    return str(value)


def _encode_bool(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


def _encode_int(value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise TypeError
    number = operator.index(value)
    if not _LOWEST <= number <= _HIGHEST:
        raise ValueError('SQL keeps 64 bits')
    return number


def _encode_float(value: Any) -> float | None:
    if isinstance(value, bool | np.bool_ | str | bytes):
        raise TypeError
    number = float(value)
    return None if math.isnan(number) else number


def _encode_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError
    return bytes(value)


def _encode_datetime(value: Any) -> str:
    if not isinstance(value, datetime):
        raise TypeError
    return value.isoformat(sep=' ')


def _array_bytes(value: Any) -> bytes:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError
    file = io.BytesIO()
    np.save(file, np.asarray(value), allow_pickle=False)
    return file.getvalue()


def _bytes_array(kept: bytes) -> np.ndarray:
    return np.load(io.BytesIO(kept), allow_pickle=False)


def _tensor_bytes(value: Any) -> bytes:
    if not _is_tensor(type(value)):
        raise TypeError
    return _array_bytes(value.detach().cpu().numpy())


def _bytes_tensor(kept: bytes) -> Any:
    import torch

    return torch.from_numpy(_bytes_array(kept))


def _is_tensor(annotation: Any) -> bool:
    # known by name: torch is large, and need not be there
    module, name = getattr(annotation, '__module__', ''), getattr(annotation, '__name__', '')
    return (
        isinstance(annotation, type)
        and module.partition('.')[0] == 'torch'
        and name
        in (
            'Tensor',
            'Parameter',
        )
    )


def _json_encoder(kind: type) -> Callable[[Any], str]:
    def encode(value: Any) -> str:
        if not isinstance(value, kind):
            raise TypeError
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text

    return encode


def _same(value: Any) -> Any:
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


_FILE = ColumnType('File', File, Integer, _encode_file, _same)
_JSON = {
    kind: ColumnType(kind.__name__, kind, Text, _json_encoder(kind), json.loads)
    for kind in (dict, list)
}
_PLAIN: dict[Any, ColumnType] = {
    str: ColumnType('str', str, Text, _encode_str, _same),
    bool: ColumnType('bool', bool, Boolean, _encode_bool, bool),
    int: ColumnType('int', int, Integer, _encode_int, _same),
    float: ColumnType('float', float, Float, _encode_float, float),
    bytes: ColumnType('bytes', bytes, LargeBinary, _encode_bytes, _same),
    datetime: ColumnType('datetime', datetime, Text, _encode_datetime, datetime.fromisoformat),
    np.ndarray: ColumnType('numpy.ndarray', np.ndarray, LargeBinary, _array_bytes, _bytes_array),
    **_JSON,
}
