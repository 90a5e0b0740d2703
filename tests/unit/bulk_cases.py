"""Models and data for tests of bulk encoding."""

from __future__ import annotations

import numpy as np
import pyarrow
from pyarrow import parquet

import finetuner
from finetuner.artifact import save_artifact
from finetuner.inference import build_engine
from tests.unit.tiny_artifacts import make_model, make_spec, pictures
from tests.unit.tiny_encoder import WORDS, write_tiny_encoder


def write_text_artifact(folder):
    """An artifact of the tiny transformer, with its ONNX graph."""
    engine = build_engine(str(write_tiny_encoder(folder / 'encoder')), device='cpu')
    directory = folder / 'texts'
    save_artifact(directory, engine.model, engine.spec, onnx_inputs=engine.reader.example())
    return directory


def write_picture_artifact(folder):
    """An artifact of a small network, with its ONNX graph."""
    directory = folder / 'pictures'
    save_artifact(directory, make_model(), make_spec(), onnx_inputs=pictures())
    return directory


def some_texts(number, seed=0):
    """Texts of 1 to 24 words."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 25, number)
    return [' '.join(random.choice(WORDS, length)) for length in lengths]


def write_parquet(path, row_group_size=64, **columns):
    """Write columns into a Parquet file."""
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def encode(source, output, artifact, **options):
    """`finetuner.encode_dataset` with small shards."""
    options = {'rows_per_shard': 40, **options}
    return finetuner.encode_dataset(source, output, artifact, **options)


def files_of(output):
    """Bytes of all files, those aside that hold seconds."""
    return {
        path.name: path.read_bytes()
        for path in sorted(output.iterdir())
        if path.name not in ('manifest.json', '.lock')
    }
