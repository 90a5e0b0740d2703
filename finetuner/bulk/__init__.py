"""Embed whole data sets: files in, shards of embeddings out, resumed where a process was killed.

And search them, evaluate on them and mine them for negatives, shard by shard.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetuner.bulk.reading import EncodedDataset, open_encoded

if TYPE_CHECKING:
    from finetuner.bulk.searching import (
        MinedSummary,
        evaluate_shards,
        mine_negatives,
        search_shards,
    )
    from finetuner.bulk.stored_columns import take_column

# Imported when first asked for: they bring torch.
_HOMES = {
    'MinedSummary': 'searching',
    'evaluate_shards': 'searching',
    'mine_negatives': 'searching',
    'search_shards': 'searching',
    'take_column': 'stored_columns',
}

__all__ = [
    'EncodedDataset',
    'MinedSummary',
    'evaluate_shards',
    'mine_negatives',
    'open_encoded',
    'search_shards',
    'take_column',
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
