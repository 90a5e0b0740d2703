"""Embed whole data sets: files in, shards of embeddings out, resumed where a process was killed."""

from finetuner.bulk.reading import EncodedDataset, open_encoded

__all__ = ['EncodedDataset', 'open_encoded']
