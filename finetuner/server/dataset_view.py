"""Datasets declared as classes as a server shows them: those whose SQLite files its operator names."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Response
from fastapi.responses import StreamingResponse

from finetuner.columns.files import suffix_of
from finetuner.columns.inspecting import DatasetFile
from finetuner.columns.states import DatasetSummary
from finetuner.excepts import FinetunerError, NotFoundError, PictureError, unknown_name
from finetuner.storage.files import FileStore
from finetuner.uris import PicturePolicy

PICTURES = frozenset(('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff'))
_PICTURE_SIZE = 192
# its bytes are given, no address is followed
_POLICY = PicturePolicy(uri_allow=())
# what is in files comes from anywhere: no browser shall show it as a page of this server
_UNTRUSTED = {
    'x-content-type-options': 'nosniff',
    'content-security-policy': "sandbox; default-src 'none'",
    'cache-control': 'private, no-cache',
    'vary': 'authorization, cookie',
}


@dataclass(frozen=True)
class ShownFile:
    """A SQLite file that is shown.

    Attributes:
        name: of it, here.
        num_bytes: of it.
        datasets: in it.
        problem: why it cannot be read; '' where it can.
    """

    name: str
    num_bytes: int
    datasets: Sequence[DatasetSummary]
    problem: str = ''


class DatasetView:
    """The datasets that are shown.

    Args:
        paths: of SQLite files; nothing else is opened.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = _named(paths)

    def shown(self) -> list[ShownFile]:
        """All files, in the order in which they were named; also those that cannot be read now."""
        return [self._shown(name) for name in self._paths]

    @contextmanager
    def file(self, name: str) -> Iterator[DatasetFile]:
        """A file, in whose errors its path does not stand.

        Raises:
            NotFoundError: none of this name is shown, or it is gone.
            DataError: it cannot be read.
            ConflictError: it is locked.
        """
        path = self._paths.get(name)
        if path is None:
            raise NotFoundError(unknown_name('file of datasets', name, self._paths))
        try:
            yield DatasetFile(path)
        except FinetunerError as error:
            message = str(error)
            if str(path) not in message:
                raise
            raise type(error)(message.replace(str(path), name)) from error

    def _shown(self, name: str) -> ShownFile:
        try:
            with self.file(name) as file:
                return ShownFile(name, file.num_bytes, file.summaries())
        except FinetunerError as error:
            return ShownFile(name, 0, (), str(error))


def untrusted_file(store: FileStore, key: str, name: str) -> Response:
    """A file of a dataset to take along, never to be shown by a browser.

    Args:
        store: of the dataset.
        key: of the file.
        name: that it is saved as.

    Raises:
        NotFoundError: it is gone.
        ConfigError: the key leads out of the store.
    """
    pieces = store.read(key)
    try:
        # opened before the answer begins: until here it may be gone
        first, second = next(pieces, b''), next(pieces, b'')
    except OSError as error:
        raise NotFoundError(f'{name} cannot be read: {error.strerror}') from error
    headers = {**_UNTRUSTED, 'content-disposition': f"attachment; filename*=utf-8''{quote(name)}"}
    kind = 'application/octet-stream'
    if not second:
        return Response(first, media_type=kind, headers=headers)
    content = itertools.chain((first, second), pieces)
    return StreamingResponse(content, media_type=kind, headers=headers)


def is_picture(key: str) -> bool:
    """Whether a file is shown as a picture, as far as its ending says."""
    return suffix_of(key) in PICTURES


def thumbnail(store: FileStore, key: str) -> bytes:
    """A small PNG of a picture.

    Args:
        store: of the dataset.
        key: of the file.

    Raises:
        NotFoundError: it is gone, or no picture.
        ConfigError: the key leads out of the store.
    """
    from PIL import Image

    from finetuner.images import fit_picture

    data = bytearray()
    try:
        for piece in store.read(key):
            data += piece
            if len(data) > _POLICY.max_bytes:
                raise NotFoundError(f'the file is larger than {_POLICY.max_bytes >> 20} MiB')
        pixels = fit_picture(bytes(data), _PICTURE_SIZE, _POLICY)
    except (PictureError, OSError) as error:
        raise NotFoundError(f'this is no picture: {error}') from error
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by the shortest of their ends that no other path has."""
    found: dict[str, Path] = {}
    every = list(dict.fromkeys(paths))
    for path in every:
        ends = [_end(path, count) for count in range(1, len(path.parts) + 1)]
        others = [each for each in every if each != path]
        name = next(
            end for end in ends if all(_end(each, end.count('/') + 1) != end for each in others)
        )
        found[name] = path
    return found


def _end(path: Path, count: int) -> str:
    return '/'.join(path.parts[-count:])


def plain_dataset(name: str, told: dict[str, Any]) -> dict[str, Any]:
    """What programs are told of a dataset: where it lies on this machine is in nobody's way."""
    hidden = ('sql_file', 'data_dir')
    return {'file': name, **{key: value for key, value in told.items() if key not in hidden}}
