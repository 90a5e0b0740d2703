"""What a run writes at the top of its log: model, data, and how it trains."""

from __future__ import annotations

import logging

from finetuner.config import RunConfig
from finetuner.inputs import InputReader, PictureReader, TextImageReader
from finetuner.models.backbones import InputSpec, PictureSpec, TextImageSpec, TextSpec
from finetuner.runs.plan import Plan

logger = logging.getLogger('finetuner.run')


def _taken(inputs: InputSpec, reader: InputReader) -> list[str]:
    if isinstance(inputs, TextImageSpec) and isinstance(reader, TextImageReader):
        return [*_taken(inputs.text, reader.text), *_taken(inputs.picture, reader.picture)]
    if isinstance(inputs, PictureSpec) and isinstance(reader, PictureReader):
        return [f'of pictures at {inputs.input_size} pixels ({reader.size} in training)']
    return [f'of texts of up to {inputs.max_length} tokens'] if isinstance(inputs, TextSpec) else []


def log_plan(plan: Plan, device: str) -> None:
    """Say what is about to be trained, on what and how.

    Args:
        plan: of the run.
        device: where it trains.
    """
    config = plan.config
    takes = ' and '.join(_taken(plan.spec.inputs, plan.train_reader))
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
                *_extras(config),
            ]
        ),
        config.epochs,
        config.seed,
    )


def _extras(config: RunConfig) -> list[str]:
    """What a step does beyond the plain one."""
    lengths = ', '.join(map(str, config.matryoshka_dims))
    said = {
        f'{config.micro_batch_size} at a time': config.micro_batch_size,
        f'also cut to {lengths}': lengths,
        'hard negatives': config.hard_negatives,
        f'averaged weights ({config.ema_decay})': config.ema_decay,
        'compiled': config.compile_model,
    }
    return [f', {what}' for what, asked in said.items() if asked]


def log_ranks(plan: Plan, num_processes: int, freeze_batch_norm: bool) -> None:
    """Say in the log that several processes train together, and what differs then.

    Args:
        plan: of the run.
        num_processes: how many.
        freeze_batch_norm: whether statistics of batch normalisation stay as they are.
    """
    logger.info(
        '%d processes train together: each embeds its part of every batch of %d',
        num_processes,
        plan.batch.size,
    )
    if not freeze_batch_norm:
        logger.warning(
            'Batch normalisation, if the model has any, takes the statistics of the part of a batch '
            'that a process embeds: freeze_batch_norm=True trains as one process does'
        )
