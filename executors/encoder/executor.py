"""The encoder as Jina loads it from `config.yml`; the class is part of the library."""

from finetuner.server.encoder import FinetunerExecutor

__all__ = ['FinetunerExecutor']
