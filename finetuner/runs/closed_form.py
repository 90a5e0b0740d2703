"""The projection heads of a run's model that are found in closed form, and what fits them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetuner.data.datasets import ClassDataset, TextImageDataset
from finetuner.data.loading import BatchLoader
from finetuner.data.samplers import SequentialSampler
from finetuner.inputs import InputReader
from finetuner.models.alignment import Alignment
from finetuner.models.whitening import Whitening
from finetuner.runs.plan import Plan
from finetuner.training.alignment import MAX_PAIRS, AlignmentFit, AlignmentRefit, alignment_sample
from finetuner.training.setup import Pipeline
from finetuner.training.trainer import BaseCallback
from finetuner.training.whitening import WhiteningFit, whitening_sample

if TYPE_CHECKING:
    import torch

_EMBED_BATCH_SIZE = 64


def fit_alignment(plan: Plan, model: torch.nn.Module, pipeline: Pipeline) -> list[BaseCallback]:
    """What brings pictures to their texts before training, where a new head is to do so."""
    found = [module for module in model.modules() if isinstance(module, Alignment)]
    if not found or plan.parent is not None or not isinstance(plan.train, TextImageDataset):
        return []
    pairs = _pairs(plan, plan.train, plan.train_reader, pipeline)
    return [AlignmentFit(found[0], pairs)]


def refit_alignment(plan: Plan, model: torch.nn.Module, pipeline: Pipeline) -> list[BaseCallback]:
    """What does so again after training, where few pairs were trained on in smaller pictures."""
    found = [module for module in model.modules() if isinstance(module, Alignment)]
    smaller = plan.train_reader is not plan.reader
    if not found or not isinstance(plan.train, TextImageDataset) or not smaller:
        return []
    if plan.train.num_documents > MAX_PAIRS:
        return []
    return [AlignmentRefit(found[0], _pairs(plan, plan.train, plan.reader, pipeline))]


def _pairs(
    plan: Plan, dataset: TextImageDataset, reader: InputReader, pipeline: Pipeline
) -> BatchLoader:
    sampled = alignment_sample(dataset, plan.config.seed)
    sampler = SequentialSampler(len(sampled), _EMBED_BATCH_SIZE)
    return pipeline.loader(
        sampled, sampler, on_broken=plan.config.on_broken, preprocess_fn=reader.read
    )


def fit_whitening(plan: Plan, model: torch.nn.Module, pipeline: Pipeline) -> list[BaseCallback]:
    """What fits the model's whitening, if it has one that is not fitted yet."""
    found = [m for m in model.modules() if isinstance(m, Whitening) and not m.fitted]
    if not found or not isinstance(plan.train, ClassDataset):
        return []
    # embeddings that will be cut must begin with what tells most
    found[0].ordered = bool(plan.spec.matryoshka_dims)
    sampled = whitening_sample(plan.train, plan.config.seed)
    sampler = SequentialSampler(len(sampled), _EMBED_BATCH_SIZE)
    first, last = (
        pipeline.loader(sampled, sampler, preprocess_fn=reader.read)
        for reader in (plan.train_reader, plan.reader)
    )
    return [WhiteningFit(found[0], first, last, np.asarray(sampled.labels))]
