"""Training data: opened, described, as datasets, drawn by samplers, in batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetuner.data.collation import TextCollate, pad_contents, text_lengths
    from finetuner.data.csv import CSVOptions
    from finetuner.data.datasets import (
        ClassDataset,
        InstanceDataset,
        ScoredPairDataset,
        SessionDataset,
        TextImageDataset,
    )
    from finetuner.data.length_sampler import LengthBucketSampler
    from finetuner.data.loading import build_dataset, build_loader, build_sampler
    from finetuner.data.pairs import join_pairs
    from finetuner.data.relation_samplers import InstanceSampler, PairSampler, SessionSampler
    from finetuner.data.report.contact_sheet import save_contact_sheet
    from finetuner.data.report.describing import describe
    from finetuner.data.samplers import ClassSampler
    from finetuner.data.sharded_batches import ShardedBatches
    from finetuner.data.shards import ShardedDocuments
    from finetuner.data.sources import open_documents
    from finetuner.data.stored.files import DocumentsView, StoredDocuments
    from finetuner.data.stored.sqlite import SQLiteDocuments
    from finetuner.data.stored.storing import load_documents, save_documents

# Imported when first asked for: some bring torch, and `import finetuner` brings this package.
_HOMES = {
    'CSVOptions': 'csv',
    'ClassDataset': 'datasets',
    'ClassSampler': 'samplers',
    'DocumentsView': 'stored.files',
    'InstanceDataset': 'datasets',
    'InstanceSampler': 'relation_samplers',
    'LengthBucketSampler': 'length_sampler',
    'PairSampler': 'relation_samplers',
    'SQLiteDocuments': 'stored.sqlite',
    'ScoredPairDataset': 'datasets',
    'SessionDataset': 'datasets',
    'SessionSampler': 'relation_samplers',
    'ShardedBatches': 'sharded_batches',
    'ShardedDocuments': 'shards',
    'StoredDocuments': 'stored.files',
    'TextCollate': 'collation',
    'TextImageDataset': 'datasets',
    'build_dataset': 'loading',
    'build_loader': 'loading',
    'build_sampler': 'loading',
    'describe': 'report.describing',
    'join_pairs': 'pairs',
    'load_documents': 'stored.storing',
    'open_documents': 'sources',
    'pad_contents': 'collation',
    'save_contact_sheet': 'report.contact_sheet',
    'save_documents': 'stored.storing',
    'text_lengths': 'collation',
}

__all__ = [
    'CSVOptions',
    'ClassDataset',
    'ClassSampler',
    'DocumentsView',
    'InstanceDataset',
    'InstanceSampler',
    'LengthBucketSampler',
    'PairSampler',
    'SQLiteDocuments',
    'ScoredPairDataset',
    'SessionDataset',
    'SessionSampler',
    'ShardedBatches',
    'ShardedDocuments',
    'StoredDocuments',
    'TextCollate',
    'TextImageDataset',
    'build_dataset',
    'build_loader',
    'build_sampler',
    'describe',
    'join_pairs',
    'load_documents',
    'open_documents',
    'pad_contents',
    'save_contact_sheet',
    'save_documents',
    'text_lengths',
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
