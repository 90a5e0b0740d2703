"""Folders of pictures: one folder a class, or one folder of pictures without labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from docarray import Document

from finetuner.data.contents import LABEL_TAG, is_local_file
from finetuner.excepts import DataError

PICTURE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff')

_LOGGER = logging.getLogger(__name__)
_NO_DATA = {'thumbs.db', 'desktop.ini'}
# folders that are parts of a data set, and what each part is called here
SPLITS = {
    **dict.fromkeys(('train', 'training'), 'train'),
    **dict.fromkeys(('val', 'valid', 'validate', 'validation', 'dev', 'eval'), 'validate'),
    **dict.fromkeys(('test', 'testing'), 'test'),
}
_NAMES_SHOWN = 3
# what every name ends in
_ANY = ('',)


def picture_uri(name: str, folder: Path, must_exist: bool = True) -> str:
    """Turn the way a data file names a picture into a uri that holds wherever one stands.

    Args:
        name: a path, absolute or relative to `folder`, or a uri with the scheme `file`, `http`,
            `https` or `data`.
        folder: that of the data file.
        must_exist: whether a file that is not there is an error.

    Returns:
        The absolute path of a local file; other uris as they are.

    Raises:
        DataError: there is no such file, or the scheme is none that is read.
    """
    if not is_local_file(name):
        if not name.lower().startswith(('http:', 'https:', 'data:')):
            raise DataError(
                f'{name!r} has a scheme that is not read: a picture is a path, or a uri with one '
                'of file, http, https, data'
            )
        return name
    path = name
    if name[:5].lower() == 'file:':
        try:
            parts = urlsplit(name)
        except ValueError as error:
            raise DataError(f'{name!r} is not a valid uri: {error}') from error
        if parts.netloc.lower() not in ('', 'localhost'):
            raise DataError(f'{name!r} names the host {parts.netloc!r}: files are local')
        path = unquote(parts.path)
    path = os.path.abspath(folder / os.path.expanduser(path))
    if must_exist and not os.path.isfile(path):
        raise DataError(
            f'there is no file {name!r} in the folder {str(folder)!r}: paths are absolute or '
            'relative to that folder'
        )
    return path


def read_folder(
    path: str | os.PathLike[str], suffixes: tuple[str, ...] = PICTURE_SUFFIXES
) -> Iterator[Document]:
    """Read a folder of pictures, in order of their names; no picture is opened yet.

    A folder of folders is class data: the name of a folder right below `path` is the label of
    all pictures in it, at any depth. A folder of pictures is instances, without labels. Hidden
    files are skipped; other files that are no pictures are skipped too, and a warning counts
    them. Links are followed, each folder once.

    Args:
        path: of the folder.
        suffixes: of pictures, in lower case.

    Returns:
        Documents with the absolute path as `uri`, one for each file that ends in one of the
        suffixes, in upper or lower case.

    Raises:
        DataError: there is no such folder, it or a folder in it cannot be read, it holds no
            picture, or pictures beside folders of pictures.
    """
    return _Walk(_folder(path), suffixes).documents()


def split_folders(
    path: str | os.PathLike[str], suffixes: tuple[str, ...] = PICTURE_SUFFIXES
) -> list[str]:
    """The folders in a folder, where they are parts of a data set and not classes; else none.

    Args:
        path: of the folder.
        suffixes: of pictures, in lower case.

    Returns:
        Absolute paths by name; `SPLITS` says which part each is.

    Raises:
        DataError: there is no such folder, or it cannot be read.
    """
    root = _folder(path)
    folders, pictures = _Walk(root, suffixes).listing(root)
    return [] if pictures else _Walk(root, suffixes).splits(folders)


def list_folder(path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """The folders and the files in a folder, hidden ones aside, each in order of names.

    Returns:
        Absolute paths.

    Raises:
        DataError: there is no such folder, or it cannot be read.
    """
    root = _folder(path)
    return _Walk(root, _ANY).listing(root)


def files_below(
    path: str | os.PathLike[str], within: str | os.PathLike[str] | None = None
) -> list[str]:
    """All files in a folder and the folders in it, but for hidden ones.

    Links are followed, each folder once; what is neither file nor folder, such as a link to nothing,
    is left out with a warning.

    Args:
        path: of the folder.
        within: a folder above it, which links do not lead back to either.

    Returns:
        Absolute paths, each folder's in order of names.

    Raises:
        DataError: there is no such folder, or it or one in it cannot be read.
    """
    root = _folder(path)
    walk = _Walk(root, _ANY)
    if within is None:
        seen = walk.above() - {_identity(root)}
    else:
        seen = _Walk(_folder(within), _ANY).above()
    files = list(walk.pictures_below(root, seen))
    walk.warn('are no files')
    return files


def _folder(path: str | os.PathLike[str]) -> str:
    name = os.path.expanduser(path)
    if not os.path.isdir(name):
        raise DataError(f'there is no folder {os.fspath(path)!r}')
    return os.path.abspath(name)


class _Walk:
    def __init__(self, root: str, suffixes: tuple[str, ...]) -> None:
        self._root = root
        self._suffixes = suffixes
        self._num_others = 0
        self._others: list[str] = []

    def documents(self) -> Iterator[Document]:
        folders, pictures = self.listing(self._root)
        if pictures:
            self._refuse_folders_of_pictures(folders, pictures[0])
            yield from (Document(uri=picture) for picture in pictures)
        else:
            yield from self._classes(folders)
        self.warn(f'are no pictures ({" ".join(self._suffixes)})')

    def warn(self, what: str) -> None:
        if self._num_others:
            more = ', ...' if self._num_others > len(self._others) else ''
            _LOGGER.warning(
                '%d files in %r %s and were skipped: %s%s',
                self._num_others,
                self._root,
                what,
                ', '.join(self._others),
                more,
            )

    def _classes(self, folders: list[str]) -> Iterator[Document]:
        self._refuse_splits(folders)
        without = []
        for folder in folders:
            label = os.path.basename(folder)
            found = False
            for picture in self.pictures_below(folder, self.above()):
                found = True
                yield Document(uri=picture, tags={LABEL_TAG: label})
            if not found:
                without.append(label)
        if len(without) == len(folders):
            raise DataError(
                f'there is no picture in the folder {self._root!r}, nor in the folders in it: '
                f'pictures end in {" ".join(self._suffixes)}'
            )
        if without:
            _LOGGER.warning(
                '%d folders in %r hold no pictures and are no classes: %s',
                len(without),
                self._root,
                _some(without),
            )

    def above(self) -> set[tuple[int, int]]:
        """Return the folder and those it lies in: a link back up to them would never end."""
        real = Path(os.path.realpath(self._root))
        return {_identity(str(folder)) for folder in (real, *real.parents)}

    def pictures_below(self, folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            identity = _identity(folder)
            if identity in seen:
                continue
            seen.add(identity)
            folders, pictures = self.listing(folder)
            yield from pictures
            waiting.extend(reversed(folders))

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the folders and the pictures in a folder, each sorted by name."""
        folders, pictures = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith('.') or entry.name.lower() in _NO_DATA:
                        continue
                    if entry.is_dir():
                        folders.append(_readable_name(entry.path))
                    elif entry.name.lower().endswith(self._suffixes) and entry.is_file():
                        pictures.append(_readable_name(entry.path))
                    else:
                        self._skip(entry.path)
        except OSError as error:
            raise DataError(
                f'folder {folder!r} cannot be read: {error.strerror or error}'
            ) from error
        return sorted(folders), sorted(pictures)

    def _skip(self, path: str) -> None:
        self._num_others += 1
        if len(self._others) < _NAMES_SHOWN:
            self._others.append(repr(os.path.relpath(path, self._root)))

    def _refuse_folders_of_pictures(self, folders: list[str], picture: str) -> None:
        for folder in folders:
            inner = next(self.pictures_below(folder, self.above()), None)
            if inner is not None:
                raise DataError(
                    f'the folder {self._root!r} holds pictures ({os.path.basename(picture)!r}) '
                    f'beside folders of pictures ({os.path.relpath(inner, self._root)!r}): for '
                    'class data put each picture into the folder of its class, for instances put '
                    'all of them into one folder'
                )

    def splits(self, folders: list[str]) -> list[str]:
        """Those folders, where they are parts of a data set: one of them holds folders alone."""
        if not folders or not {os.path.basename(folder).lower() for folder in folders} <= {*SPLITS}:
            return []
        for folder in folders:
            # a walk of its own: what it skips is counted when the classes are read
            inner, pictures = _Walk(folder, self._suffixes).listing(folder)
            if inner and not pictures:
                return folders
        return []

    def _refuse_splits(self, folders: list[str]) -> None:
        splits = self.splits(folders)
        if splits:
            first = next(
                folder for folder in splits if _Walk(folder, self._suffixes).listing(folder)[0]
            )
            raise DataError(
                f'the folders in {self._root!r} ({_some(map(os.path.basename, splits))}) are parts '
                f'of a data set and not classes: give one of them, such as {first!r}'
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = ', ...' if len(names) > _NAMES_SHOWN else ''
    return ', '.join(repr(name) for name in names[:_NAMES_SHOWN]) + more


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f'folder {folder!r} cannot be read: {error.strerror or error}') from error
    return status.st_dev, status.st_ino


def _readable_name(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'the name of {path!r} is not UTF-8, so nothing can hold it: rename it'
        ) from error
    return path
