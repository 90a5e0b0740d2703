"""Say in the log what a run is about to do."""

from __future__ import annotations

import logging

from finetuner.inputs import PictureReader
from finetuner.models.backbones import PictureSpec, TextSpec
from finetuner.runs.plan import Plan

logger = logging.getLogger('finetuner.run')


def log_plan(plan: Plan, device: str) -> None:
    """Log the model, the data and how the one is trained on the other, on `device`."""
    config = plan.config
    inputs, takes = plan.spec.inputs, ''
    if isinstance(inputs, PictureSpec) and isinstance(plan.train_reader, PictureReader):
        takes = f'at {inputs.input_size} pixels ({plan.train_reader.size} in training)'
    elif isinstance(inputs, TextSpec):
        takes = f'of texts of up to {inputs.max_length} tokens'
    logger.info(
        'Model %s %s, embeddings of length %d, on %s',
        plan.backbone.name,
        takes,
        plan.spec.dimension,
        device,
    )
    logger.info(
        'Training on %d Documents (%s): %s, %s, learning rate %g%s, batches of %d%s, %d epochs, '
        'seed %d',
        plan.train.num_documents,
        plan.train.kind,
        config.loss,
        config.optimizer,
        config.learning_rate,
        f' ({config.scheduler})' if config.scheduler else '',
        plan.batch.size,
        ''.join(
            [
                '' if plan.augmentation == 'none' else f', augmentation {plan.augmentation}',
                ', whitening' if config.whiten else '',
            ]
        ),
        config.epochs,
        config.seed,
    )
