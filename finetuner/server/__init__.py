"""Serving with Jina: the Executors, the gateway before them, and what clients send to both.

The names load when first asked for, since Jina takes seconds to import.
"""

import os
from importlib import import_module
from typing import Any

# Jina reports each start to its makers unless told otherwise; it looks when a Flow starts
os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')

_HOMES = {
    'FinetunerExecutor': 'finetuner.server.encoder',
    'IndexExecutor': 'finetuner.server.indexer',
    'TrainerExecutor': 'finetuner.server.trainer',
    'Gateway': 'finetuner.server.gateway',
    'data_request': 'finetuner.server.requests',
    'fit_request': 'finetuner.server.requests',
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_HOMES[name]), name)
