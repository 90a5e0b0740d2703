"""Time the training of a head alone: on what the frozen part gave once, and in the plain loop.

EfficientNet-Lite0 with freeze=True and output_dim=128 on the emoji pictures, the real path of a run:
plan, loaders, trainer. The peer is the same run with no memory for the frozen part's values, so that
it is computed in each epoch. What computing it once costs is printed beside.

    python benchmarks/linear_probe.py
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from docarray import Document, DocumentArray
from rounds import Contestant, epoch_by_epoch, print_head, print_speeds, take_turns
from train import emoji_files

from finetuner.config import RunConfig
from finetuner.models.tailor import build_embedding_model
from finetuner.runs.feeding import build_feed
from finetuner.runs.plan import Plan, make_plan
from finetuner.training import frozen_features
from finetuner.training.losses import build_loss
from finetuner.training.optimization import build_optimizer
from finetuner.training.trainer import Trainer

MODEL = 'efficientnet-lite0'
OURS = 'finetuner, frozen part computed once'
PEER = 'the same, computed in each epoch'


def head_training(plan: Plan) -> Contestant:
    """Put a run together up to its first epoch; the contestant trains one."""
    config = plan.config
    model = build_embedding_model(
        plan.backbone, config.model_options, config.output_dim, freeze=True
    )
    feed = build_feed(plan, model, 'cpu', freeze_batch_norm=True)
    loader, _ = feed.loaders(plan)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer('Adam', trained, config.learning_rate or 1e-3)
    loss = build_loss(str(config.loss), config.loss_options, plan.spec.dimension, 1)
    trainer = Trainer(feed.model, loss, [optimizer], freeze_batch_norm=True)
    train = epoch_by_epoch(trainer, loader)

    def train_an_epoch() -> int:
        train()
        return len(loader) * plan.batch.size

    return train_an_epoch


def without_memory(plan: Plan) -> Contestant:
    """The same where there is no room for the values."""
    available: Any = frozen_features.available_memory
    frozen_features.available_memory = lambda: 0
    try:
        return head_training(plan)
    finally:
        frozen_features.available_memory = available


def main() -> None:
    """Train in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pictures', type=int, default=256)
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    docs = DocumentArray(
        Document(uri=str(file), tags={'finetuner_label': label})
        for file, label in emoji_files(arguments.pictures)
    )
    config = RunConfig.from_parameters(
        {
            'model': MODEL,
            'model_options': {'input_size': arguments.size},
            'train_data': 'emoji',
            'freeze': True,
            'output_dim': 128,
            'whiten': False,
            'num_workers': 0,
        }
    )
    plan = make_plan(config, {'train_data': docs})
    began = time.perf_counter()
    ours = head_training(plan)
    seconds = time.perf_counter() - began
    contestants = {PEER: without_memory(plan), OURS: ours}
    print(
        f'EfficientNet-Lite0, freeze=True, output_dim=128, {len(docs)} emoji pictures at '
        f'{arguments.size} px, {torch.get_num_threads()} threads, median of {arguments.rounds} '
        'alternating rounds of an epoch'
    )
    speeds = take_turns(contestants, arguments.rounds)
    print_head('an epoch of training the head', PEER[:14])
    print_speeds(speeds, PEER)
    print(f'\nbefore the first epoch, the model included: {seconds:.1f} s')


if __name__ == '__main__':
    main()
