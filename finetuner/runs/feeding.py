"""What a run's training loop is fed with: which part of the model, on which contents, from where."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.augmentation import Augmentation, build_augmentation, build_text_augmentation
from finetuner.data.content_cache import KeptContents, VaryFn
from finetuner.data.labelled import PreprocessFn
from finetuner.data.loading import BatchLoader
from finetuner.data.neighbour_sampler import NeighbourClassSampler
from finetuner.inputs import PictureReader, TextImageReader, TextReader
from finetuner.models.backbones import TEXT_TOWER, VISION_TOWER
from finetuner.runs.findings import Findings, NoFindings
from finetuner.runs.plan import Plan
from finetuner.training.ranks import ALONE, Ranks
from finetuner.training.setup import Pipeline

if TYPE_CHECKING:
    import torch

logger = logging.getLogger('finetuner.run')

_FROZEN_PART = 'frozen_part'


@dataclass(frozen=True)
class Feed:
    """What the training loop gets.

    Attributes:
        model: the model, or the part of it that is left to train on what its frozen part gave.
        pipeline: how Documents become its inputs, in evaluations as well.
        read: how Documents become its inputs in training.
        vary_fn: what is done to those each time.
    """

    model: torch.nn.Module
    pipeline: Pipeline
    read: PreprocessFn
    vary_fn: VaryFn | None

    def loaders(self, plan: Plan) -> tuple[BatchLoader, BatchLoader | None]:
        """Batches of training, and of validation where there is data for it."""
        if plan.config.hard_negatives:
            sampler = NeighbourClassSampler(
                plan.train.labels, plan.batch.size, plan.batch.num_items_per_class, plan.config.seed
            )
            loader = self.pipeline.shared_loader(plan.train, sampler, self.read, self.vary_fn)
        else:
            loader = self.pipeline.training_loader(plan.train, plan.batch, self.read, self.vary_fn)
        if plan.validation is None:
            return loader, None
        # two views must differ there too
        views: Any = (self.read, self.vary_fn) if plan.validation.kind == 'instance' else ()
        return loader, self.pipeline.training_loader(plan.validation, plan.validation_batch, *views)


def build_feed(
    plan: Plan,
    model: torch.nn.Module,
    device: str,
    freeze_batch_norm: bool,
    choices: Findings | None = None,
    ranks: Ranks = ALONE,
) -> Feed:
    """Decide what is computed ahead, and how the rest is loaded.

    Args:
        plan: of the run.
        model: to be trained.
        device: `cpu` or `cuda`.
        freeze_batch_norm: whether statistics of batch normalisation stay as they are.
        choices: what was chosen before the checkpoint that the run goes on from, if there is one.
        ranks: the processes of the run.
    """
    config = plan.config
    pipeline = Pipeline(
        plan.reader.read,
        plan.reader.collate_fn,
        num_workers=config.num_workers,
        seed=config.seed,
        on_broken=config.on_broken,
        tower_reads=_tower_reads(plan),
        contents=KeptContents(),
        ranks=ranks,
    )
    if config.freeze:
        choices = choices or NoFindings()
        before = choices.recall(_FROZEN_PART)
        frozen = None
        if before is None or before['ahead']:
            limited = before is None
            frozen = _frozen_feed(plan, model, pipeline, device, freeze_batch_norm, limited)
        choices.remember(_FROZEN_PART, {'ahead': int(frozen is not None)})
        if frozen is not None:
            return frozen
    return Feed(model, pipeline, plan.train_reader.read, _augmentation(plan))


def _tower_reads(plan: Plan) -> dict[str, PreprocessFn]:
    reader = plan.reader
    if not isinstance(reader, TextImageReader):
        return {}
    return {TEXT_TOWER: reader.text.read, VISION_TOWER: reader.picture.read}


def _augmentation(plan: Plan) -> VaryFn | None:
    """How contents are varied in training; None where they are not."""
    reader = plan.train_reader
    if isinstance(reader, TextReader):
        return build_text_augmentation(plan.augmentation, reader.special_ids)
    if isinstance(reader, PictureReader):
        return build_augmentation(plan.augmentation, reader.size)
    if not isinstance(reader, TextImageReader):
        return None
    of_pictures = build_augmentation(plan.augmentation, reader.picture.size)
    if of_pictures is None:
        return None
    return functools.partial(_vary_pictures, augmentation=of_pictures)


def _vary_pictures(content: Any, augmentation: Augmentation) -> Any:
    """The content of one half of a pair, varied where it is a picture."""
    return augmentation(content) if isinstance(content, np.ndarray) else content


def _frozen_feed(
    plan: Plan,
    model: torch.nn.Module,
    pipeline: Pipeline,
    device: str,
    freeze_batch_norm: bool,
    limited: bool,
) -> Feed | None:
    """Training of what is not frozen alone; None, and why in the log, where that cannot be."""
    from finetuner.training.division import DivisionError
    from finetuner.training.frozen_features import build_frozen_features

    try:
        if plan.augmentation != 'none':
            raise DivisionError(f'augmentation {plan.augmentation!r} varies what it gets')
        if plan.train.kind == 'instance':
            raise DivisionError('two views of a Document must differ')
        if plan.train.kind == 'text_image_pair':
            raise DivisionError('texts and pictures go through models of their own')
        datasets = list(plan.datasets().values())
        features = build_frozen_features(
            model, pipeline, datasets, device, freeze_batch_norm, limited
        )
    except DivisionError as error:
        logger.info('The frozen part of the model is computed in each epoch: %s', error)
        return None
    sizes = [r.size for r in (plan.reader, plan.train_reader) if isinstance(r, PictureReader)]
    if len(set(sizes)) > 1:
        logger.info(
            'Training pictures are taken at %d pixels and not at %d, since nothing is saved by '
            'smaller ones',
            *sizes,
        )
    return Feed(features.trained, features.pipeline(), plan.reader.read, None)
