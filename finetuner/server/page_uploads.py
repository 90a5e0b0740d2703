"""Data that comes by the form of a page: a file of Documents, or a zip of pictures in folders."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from docarray import Document

from finetuner.client import LocalClient
from finetuner.data.contents import portable_document
from finetuner.excepts import DataError
from finetuner.server.admission import refuse_uris
from finetuner.storage.archives import unzip_data

if TYPE_CHECKING:
    from collections.abc import Iterable

_ENDINGS = ('.csv', '.tsv', '.jsonl', '.ndjson', '.parquet', '.docs', '.zip')


def store_upload(
    client: LocalClient, name: str, file_name: str, file: BinaryIO, is_labeled: bool
) -> str:
    """Store what a file holds under a name.

    Args:
        client: of whoever sends it.
        name: of the data.
        file_name: as the browser tells it; only its ending counts.
        file: its content.
        is_labeled: of CSV files, whether the second column is a label.

    Returns:
        `sha256:<hex>`.

    Raises:
        DataError: the file cannot be read, or names files and addresses: those a server opens not.
    """
    from finetuner.data.csv import CSVOptions
    from finetuner.data.sources import open_documents

    ending = Path(file_name).suffix.lower()
    if ending not in _ENDINGS:
        raise DataError(f'{file_name!r} cannot be read: allowed are files {", ".join(_ENDINGS)}')
    home = client.settings.home
    with tempfile.TemporaryDirectory(prefix='.push-', dir=home) as folder:
        path = Path(folder) / f'upload{ending}'
        with path.open('wb') as target:
            shutil.copyfileobj(file, target)
        if ending == '.zip':
            pictures = Path(folder) / 'pictures'
            unzip_data(path, pictures)
            return client.push_data(list(_loaded(open_documents(pictures, None))), name)
        options: Any = None
        if ending in ('.csv', '.tsv'):
            options = CSVOptions(is_labeled=is_labeled, convert_to_blob=False)
        # whether a file that it names is there is nobody's business
        docs = open_documents(path, options, 'skip')
        refuse_uris(docs)
        return client.push_data(docs, name)


def _loaded(docs: Iterable[Document]) -> Iterator[Document]:
    """Pictures of the folder with their bytes: the folder is about to go."""
    for position, doc in enumerate(docs):
        twin = portable_document(doc, f'Document {position}', load_file=True)
        twin.tags.setdefault('file', Path(doc.uri).name)
        yield twin
