"""The table of what means harm, and the healthy pictures among which it is tried."""

from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.artifact import save_artifact
from tests.conftest import make_picture_docs
from tests.integration.hostile_pictures import hostile
from tests.integration.serving import REPOSITORY
from tests.unit.tiny_artifacts import make_model, make_spec, pictures

MEGABYTE = 1 << 20
# what Pillow says of damaged notes, and numpy of embeddings that are none
NO_WARNINGS = pytest.mark.filterwarnings(
    'ignore::UserWarning', 'ignore:invalid value:RuntimeWarning'
)
GOOD = make_picture_docs(5, 2, size=24)


class Table:
    """What was tried, how often, how much of it was refused or survived, and how the process is."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, int, int, str]] = []

    def add(self, what: str, tried: int, refused: int, survived: int, process: str) -> None:
        """One kind of what means harm; all of it was refused or survived."""
        assert tried == refused + survived, (what, tried, refused, survived)
        self.rows.append((what, tried, refused, survived, process))

    def show(self, name: str, capsys) -> None:
        """Print the table, and keep it as `build/<name>.txt`."""
        width = max(len(row[0]) for row in self.rows)
        rows = [('what', 'tried', 'refused', 'survived', 'and'), *self.rows]
        table = '\n'.join(
            f'{what:<{width}}  {tried:>7}  {refused:>7}  {survived:>8}  {process}'
            for what, tried, refused, survived, process in rows
        )
        with capsys.disabled():
            print(f'\n{table}')
        kept = REPOSITORY / 'build' / f'{name}.txt'
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(f'{table}\n', encoding='utf-8')


def write_artifact(folder: Path) -> Path:
    """An artifact of pictures, with its graph."""
    directory = folder / 'pictures'
    save_artifact(directory, make_model(), make_spec(), onnx_inputs=pictures())
    return directory


def among_healthy(batch):
    """Hostile pictures with healthy ones between them, and where these are."""
    docs, places = DocumentArray(), []
    for number, data in enumerate(batch):
        docs.append(Document(blob=data))
        if number % 5 == 4:
            places.append(len(docs))
            docs.append(Document(blob=GOOD[len(places) % len(GOOD)].blob))
    return docs, places


def batches(count, size=50):
    batch = []
    for data in hostile(7, count, bombs=False):
        batch.append(data)
        if len(batch) == size:
            yield batch
            batch = []


def healthy_vectors(encode):
    docs = DocumentArray([Document(blob=doc.blob) for doc in GOOD])
    return encode(docs).embeddings


def check_neighbours(docs, places, expected):
    for number, place in enumerate(places, 1):
        found = docs[place].embedding
        np.testing.assert_allclose(found, expected[number % len(GOOD)], atol=1e-5)
