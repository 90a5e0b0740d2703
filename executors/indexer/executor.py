"""The indexer as Jina loads it from `config.yml`; the class is part of the library."""

from finetuner.server.indexer import IndexExecutor

__all__ = ['IndexExecutor']
