"""Labelled Documents, datasets and samplers: what training reads."""

from finetuner.data.datasets import ClassDataset
from finetuner.data.samplers import ClassSampler

__all__ = ['ClassDataset', 'ClassSampler']
