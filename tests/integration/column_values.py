"""Values of columns of each kind, made from a number and turned into it again; and calls that are noted."""

from __future__ import annotations

import os
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.columns import File

CALLS = 'COLUMN_CALLS'
START = datetime(2000, 1, 1)
# how each kind is written as a type
ANNOTATIONS = {
    'int': 'int',
    'float': 'float',
    'str': 'str',
    'bool': 'bool',
    'bytes': 'bytes',
    'datetime': 'datetime',
    'array': 'np.ndarray',
    'dict': 'dict',
    'list': 'list[int]',
    'optional': 'Optional[int]',
    'optional text': 'str | None',
    'optional file': 'Optional[File]',
    'file': 'File',
    'text file': "File['txt', 'text']",
}
FILES = ('file', 'text file', 'optional file')


def made(kind: str, number: int) -> Any:
    """A value."""
    if 'optional' in kind and number % 3 == 0:
        return None
    if kind in FILES:
        with File.make_tmp('.txt') as file:
            Path(file.path).write_text(str(number))
            return file
    return {
        'int': lambda: number,
        'float': lambda: number / 2,
        'str': lambda: f'é\x00{number}',
        'bool': lambda: number % 2 == 1,
        'bytes': lambda: b'\xff' + str(number).encode(),
        'datetime': lambda: START + timedelta(seconds=number),
        'array': lambda: np.array([[number], [1]], np.int32),
        'dict': lambda: {'number': [number]},
        'list': lambda: [number],
        'optional': lambda: number,
        'optional text': lambda: str(number),
    }[kind]()


def number_of(value: Any) -> int:
    """What it was made from, as far as it says."""
    if value is None:
        return 0
    if isinstance(value, File):
        return int(value.read())
    if isinstance(value, float):
        return round(2 * value)
    if isinstance(value, str):
        return int(value.removeprefix('é\x00'))
    if isinstance(value, bytes):
        return int(value[1:])
    if isinstance(value, datetime):
        return int((value - START).total_seconds())
    if isinstance(value, np.ndarray):
        return int(value[0, 0])
    if isinstance(value, dict):
        return number_of(value['number'])
    return int(value[0]) if isinstance(value, list) else int(value)


def plain(value: Any) -> Any:
    """What can be compared: with its type, files by their content."""
    if isinstance(value, File):
        return 'file', value.suffix, value.read()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tolist()
    return type(value), value


def called(name: str) -> None:
    """Note a call of a function in a file, whatever process it is in."""
    path = os.environ.get(CALLS)
    if path:
        with open(path, 'ab', buffering=0) as file:
            file.write(f'{name}\n'.encode())


def calls(path: Path) -> Counter[str]:
    """Calls since they were last asked for."""
    found = Counter(path.read_text().split()) if path.exists() else Counter()
    path.write_text('')
    return found
