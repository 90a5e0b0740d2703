# ruff: noqa: E402 - torchvision is mended before it is imported
"""pytorch-metric-learning's own trainer, as its example notebook MetricLossOnly sets it up.

From the notebook: TripletMarginLoss(margin=0.1) with MultiSimilarityMiner(epsilon=0.1), Adam with
weight decay 1e-4, MPerClassSampler with m=4, a GlobalEmbeddingSpaceTester that embeds. Not from it:
the batch size (it has 32), the input size (64), the untrained head of 64 dimensions, which five
epochs on so little data could not train, and what `benchmarks/README.md` says of the learning rate
and the augmentation.

    python benchmarks/peers/pml_trainer.py FOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from contestant import Clock, Task, write_embeddings
from mending import mend_torchvision
from pictures import MEAN, STD, Backbone, PictureFiles, compete

mend_torchvision()
import pytorch_metric_learning
from pytorch_metric_learning import losses, miners, samplers, testers, trainers
from torchvision import transforms


def train_transform(size: int, augmentation: str) -> transforms.Compose:
    """The notebook's, at our size."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if augmentation == 'none':
        return transforms.Compose([transforms.Resize((size, size)), *to_tensor])
    crop = transforms.RandomResizedCrop(scale=(0.16, 1), ratio=(0.75, 1.33), size=size)
    flip = transforms.RandomHorizontalFlip(0.5)
    return transforms.Compose([transforms.Resize((size, size)), crop, flip, *to_tensor])


def build_trainer(task: Task, trunk: torch.nn.Module, clock: Clock) -> trainers.MetricLossOnly:
    """Put the trainer together; the hooks do nothing but look at the clock."""
    options = task.options
    dataset = PictureFiles(task.train, train_transform(task.train_size, options['augmentation']))
    sampler = samplers.MPerClassSampler(
        dataset.targets, m=task.items_per_class, length_before_new_iter=len(dataset)
    )
    optimizer = torch.optim.Adam(
        trunk.parameters(), lr=options['learning_rate'], weight_decay=0.0001
    )

    def end_of_iteration(trainer: Any) -> None:
        clock.batch(task.batch_size, float(trainer.losses['total_loss']))

    def end_of_epoch(_: Any) -> None:
        clock.epoch()

    return trainers.MetricLossOnly(
        models={'trunk': trunk},
        optimizers={'trunk_optimizer': optimizer},
        batch_size=task.batch_size,
        loss_funcs={'metric_loss': losses.TripletMarginLoss(margin=0.1)},
        mining_funcs={'tuple_miner': miners.MultiSimilarityMiner(epsilon=0.1)},
        dataset=dataset,
        sampler=sampler,
        dataloader_num_workers=task.num_workers,
        end_of_iteration_hook=end_of_iteration,
        end_of_epoch_hook=end_of_epoch,
    )


def embed(task: Task, folder: Path, trunk: torch.nn.Module) -> None:
    """Embed the test pictures with the library's tester, at each size."""
    trunk = trunk.to(memory_format=torch.channels_last)  # only quicker, and the clock has stopped
    tester = testers.GlobalEmbeddingSpaceTester(dataloader_num_workers=task.num_workers)
    for size in task.embed_sizes:
        transform = train_transform(size, 'none')
        query, index = (
            tester.get_all_embeddings(PictureFiles(items, transform), trunk, return_as_numpy=True)[
                0
            ]
            for items in (task.query, task.index)
        )
        write_embeddings(folder, f'{size} px', query, index)


def train(task: Task, trunk: Backbone, clock: Clock) -> None:
    """Let the library's trainer do it."""
    build_trainer(task, trunk, clock).train(num_epochs=task.epochs)


def main() -> None:
    """Train, save, embed."""
    versions = {'pytorch-metric-learning': pytorch_metric_learning.__version__}
    compete(Backbone, train, embed, versions)


if __name__ == '__main__':
    main()
