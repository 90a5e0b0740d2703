# ruff: noqa: E402 - torchvision is mended before it is imported
"""A loop written by hand around pytorch-metric-learning's loss, by someone who knows what pays.

Pictures are opened once and stay in memory, weights lie channels last, BatchNorm keeps its
statistics, every batch holds all four pictures of its concepts; MultiSimilarityLoss, AdamW, one
cycle. What is left to ours are the recipe beyond that, and the whitening.

    python benchmarks/peers/plain_loop.py FOLDER
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from contestant import Clock, Task, write_embeddings
from mending import mend_torchvision
from pictures import MEAN, STD, Backbone, PictureFiles, compete

mend_torchvision()
import pytorch_metric_learning
from pytorch_metric_learning import losses
from torchvision import transforms

_EMBEDDED_AT_A_TIME = 64


def load(items: list[tuple[str, int]], size: int) -> torch.Tensor:
    """All pictures, `[n, 3, size, size]` uint8, channels last."""
    resize = transforms.Resize((size, size))
    files = PictureFiles(items, lambda picture: np.asarray(resize(picture)))
    pictures = torch.from_numpy(np.stack([files[i][0] for i in range(len(files))]))
    return pictures.permute(0, 3, 1, 2)


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """What the backbone takes."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (MEAN, STD))
    return ((pictures.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def train(task: Task, trunk: torch.nn.Module, clock: Clock) -> None:
    """The loop."""
    pictures = load(task.train, task.train_size)
    labels = torch.tensor([label for _, label in task.train])
    by_class = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    groups = task.batch_size // task.items_per_class
    num_batches = -(-len(by_class) // groups)
    rate = task.options['learning_rate']
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, task.epochs * num_batches, pct_start=0.15
    )
    loss_fn = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    for _ in range(task.epochs):
        trunk.train()
        for module in trunk.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        for chosen in torch.randperm(len(by_class)).split(groups):
            items = torch.cat([by_class[i][: task.items_per_class] for i in chosen])
            embeddings = torch.nn.functional.normalize(trunk(scaled(pictures[items])))
            loss = loss_fn(embeddings, labels[items])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            clock.batch(len(items), float(loss.detach()))
        clock.epoch()


def embed(task: Task, folder: Path, trunk: torch.nn.Module) -> None:
    """Embed the test pictures at each size."""
    trunk.eval()
    for size in task.embed_sizes:
        found = []
        for items in (task.query, task.index):
            parts = load(items, size).split(_EMBEDDED_AT_A_TIME)
            with torch.inference_mode():
                found.append(torch.cat([trunk(scaled(part)) for part in parts]).numpy())
        write_embeddings(folder, f'{size} px', *found)


def build_trunk() -> Backbone:
    """The backbone, its weights channels last."""
    return Backbone().to(memory_format=torch.channels_last)


def main() -> None:
    """Train, save, embed."""
    versions = {'pytorch-metric-learning': pytorch_metric_learning.__version__}
    compete(build_trunk, train, embed, versions)


if __name__ == '__main__':
    main()
