"""Names of many files in one: `train-*.parquet`, `train-{000..099}.tar`."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetuner.data.contents import shown_value
from finetuner.excepts import DataError

_BRACES = re.compile(r'\{([^{}]*)\}')
_RANGE = re.compile(r'([0-9]{1,9})\.\.([0-9]{1,9})')
_MOST_FILES = 100_000
_NAMES_SHOWN = 3


def is_pattern(text: str) -> bool:
    """Say whether a text names files by `*`, `?`, `[...]` or `{...}`, and is not itself a file's."""
    return (glob.has_magic(text) or bool(_BRACES.search(text))) and not os.path.exists(
        os.path.expanduser(text)
    )


def names_files(text: str) -> bool:
    """Say whether a text is a pattern of files that are there."""
    if not is_pattern(text):
        return False
    try:
        return next(expand_pattern(text), Path()).exists()
    except DataError:
        return False


def expand_patterns(source: Any) -> list[Path]:
    """Find the files that patterns stand for.

    `{000..099}` stands for these numbers, as many digits as they are written with, and `{a,b}` for each
    of the two; all of these files must be there. `*`, `?`, `[...]` and `**` stand for those that are.

    Args:
        source: a path or pattern, or several.

    Returns:
        Paths: those of each pattern in order of their names, or as the braces say.

    Raises:
        DataError: there are no such files, one is there twice, or braces hold something else.
    """
    given = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    paths: dict[Path, None] = {}
    found = itertools.chain.from_iterable(map(expand_pattern, given))
    for path in itertools.islice(found, _MOST_FILES + 1):
        if path in paths:
            raise DataError(f'{str(path)!r} is given twice: name each file once')
        paths[path] = None
    if len(paths) > _MOST_FILES:
        raise DataError(f'these are more than {_MOST_FILES:,} files')
    if not paths:
        raise DataError('the list of files is empty: give at least one')
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = ', '.join(repr(str(path)) for path in missing[:_NAMES_SHOWN])
        more = f' and {len(missing) - _NAMES_SHOWN} more' if len(missing) > _NAMES_SHOWN else ''
        raise DataError(f'there is no file {names}{more}')
    return list(paths)


def expand_pattern(pattern: Any) -> Iterator[Path]:
    """Find the files and folders that one pattern stands for, as `expand_patterns` does.

    Args:
        pattern: a path, or a pattern.

    Yields:
        Paths; those that braces or the path itself name may not be there.

    Raises:
        DataError: it is no path, there is nothing of such a name, or braces hold something else.
    """
    if not isinstance(pattern, (str, os.PathLike)):
        raise DataError(f'{shown_value(pattern)} is no path')
    text = os.path.expanduser(os.fspath(pattern))
    if '\0' in text or not is_pattern(text):
        yield Path(text)
        return
    for name in _without_braces(text):
        if not glob.has_magic(name):
            yield Path(name)
            continue
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise DataError(f'no file is called {shown_value(name)}')
        yield from map(Path, found)


def _without_braces(text: str) -> Iterator[str]:
    match = _BRACES.search(text)
    if match is None:
        if '{' in text or '}' in text:
            raise DataError(f'{shown_value(text)}: a brace stands alone')
        yield text
        return
    for choice in _choices(match.group(1), text):
        # what follows may hold braces of its own
        for rest in _without_braces(text[match.end() :]):
            yield f'{text[: match.start()]}{choice}{rest}'


def _choices(inner: str, text: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(inner)
    if numbers and int(numbers[1]) <= int(numbers[2]):
        first, last = numbers.groups()
        # as shells do it
        is_padded = any(len(each) > 1 and each[0] == '0' for each in (first, last))
        width = max(len(first), len(last)) if is_padded else 1
        yield from (f'{number:0{width}}' for number in range(int(first), int(last) + 1))
    elif ',' in inner:
        yield from inner.split(',')
    else:
        raise DataError(
            f'{shown_value(text)}: {{{inner}}} is neither a range of numbers such as {{000..099}} nor '
            'a list such as {a,b}'
        )
