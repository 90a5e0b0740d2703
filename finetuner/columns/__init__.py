"""Datasets declared as classes: columns that are stored, and columns that are functions of others."""

from __future__ import annotations

from finetuner.columns.batches import BatchColumn, Batches, batch
from finetuner.columns.dataset import Column, Dataset, dataset
from finetuner.columns.declaring import version
from finetuner.columns.failures import Failure
from finetuner.columns.files import File
from finetuner.columns.ingesting import ingest
from finetuner.columns.picturing import ColumnGraph, ColumnNode
from finetuner.columns.rows import Rows

__all__ = [
    'BatchColumn',
    'Batches',
    'Column',
    'ColumnGraph',
    'ColumnNode',
    'Dataset',
    'Failure',
    'File',
    'Rows',
    'batch',
    'dataset',
    'ingest',
    'version',
]
