"""The trainer as Jina loads it from `config.yml`; the class is part of the library."""

from finetuner.server.trainer import TrainerExecutor

__all__ = ['TrainerExecutor']
