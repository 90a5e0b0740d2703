"""Time our training against a loop written by hand around pytorch-metric-learning.

Every contestant trains EfficientNet-Lite0 on the emoji pictures at 96 px with TripletMarginLoss and
Adam, four pictures a concept in a batch, opening the files anew in each epoch. The peer is the loop
its documentation leads to: a Dataset that opens with Pillow, torchvision's transforms,
`MPerClassSampler`, the model in training mode. Ours is the real path of a run: Documents, dataset,
sampler, loader, trainer. All start from the same weights; only ratios travel between machines.

    python benchmarks/train.py
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from docarray import Document, DocumentArray
from PIL import Image
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from rounds import (
    NAME_WIDTH,
    Contestant,
    epoch_by_epoch,
    peak_resident_mb,
    print_head,
    print_speeds,
    take_turns,
)
from torch.nn.modules.batchnorm import BatchNorm2d
from torch.utils.data import DataLoader, Dataset

from finetuner.data.loading import build_dataset
from finetuner.images import picture_of
from finetuner.models.tailor import build_embedding_model
from finetuner.models.torchvision_import import import_torchvision
from finetuner.models.zoo import get_backbone
from finetuner.training.setup import BatchShape, Pipeline
from finetuner.training.trainer import Trainer

import_torchvision()
from torchvision import transforms  # noqa: E402

EMOJI = Path(__file__).parents[1] / 'examples' / 'emoji' / 'train'
MODEL = 'efficientnet-lite0'
SIZE = 96
ITEMS_PER_CLASS = 4
LEARNING_RATE = 1e-5
PEER = 'plain loop'
OURS = 'finetuner'


def emoji_files(num_pictures: int) -> list[tuple[Path, int]]:
    """The first so many pictures with the number of their concept."""
    concepts = sorted(EMOJI.iterdir())
    files = [(f, label) for label, c in enumerate(concepts) for f in sorted(c.glob('*.webp'))]
    return files[:num_pictures]


class EmojiDataset(Dataset):
    """What a tutorial would write."""

    def __init__(self, files: list[tuple[Path, int]]) -> None:
        """Keep the files, and what is done to each."""
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.Resize((SIZE, SIZE)),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Open and transform a picture."""
        file, label = self.files[index]
        return self.transform(Image.open(file).convert('RGB')), label


def plain_loop(
    files: list[tuple[Path, int]],
    batch_size: int,
    num_workers: int,
    channels_last: bool = False,
    frozen_batch_norm: bool = False,
) -> Contestant:
    """Write the loop by hand, if asked to with what makes ours quick."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # the same network and weights as ours, as it is before we change anything
    network = build_embedding_model(get_backbone(MODEL)).backbone.to(memory_format=layout)
    loss_fn = TripletMarginLoss()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    labels_of_files = [label for _, label in files]
    sampler = MPerClassSampler(labels_of_files, ITEMS_PER_CLASS, batch_size, len(files))
    loader = DataLoader(
        EmojiDataset(files),
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        drop_last=True,
    )

    def train_an_epoch() -> int:
        network.train()
        if frozen_batch_norm:
            for module in network.modules():
                if isinstance(module, BatchNorm2d):
                    module.eval()
        num_pictures = 0
        for pictures, labels in loader:
            optimizer.zero_grad()
            loss = loss_fn(network(pictures.contiguous(memory_format=layout)), labels)
            loss.backward()
            optimizer.step()
            loss.item()  # a loop that shows its loss
            num_pictures += len(labels)
        return num_pictures

    return train_an_epoch


def finetuner_loop(
    files: list[tuple[Path, int]], batch_size: int, num_workers: int
) -> tuple[Contestant, Callable[[], None]]:
    """Put our parts together as a run does; the second function ends the loader."""
    docs = DocumentArray(
        Document(uri=str(file), tags={'finetuner_label': label}) for file, label in files
    )
    model = build_embedding_model(get_backbone(MODEL), {'input_size': SIZE})
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    pipeline = Pipeline(functools.partial(picture_of, size=SIZE), num_workers=num_workers)
    loader = pipeline.training_loader(build_dataset(docs), BatchShape(batch_size, ITEMS_PER_CLASS))
    trainer = Trainer(model, TripletMarginLoss(), [optimizer], freeze_batch_norm=True)
    train = epoch_by_epoch(trainer, loader)

    def train_an_epoch() -> int:
        train()
        return len(loader) * batch_size

    return train_an_epoch, functools.partial(pipeline.__exit__, None, None, None)


def peak_memory(name: str, num_pictures: int, batch_size: int) -> float:
    """Largest resident size in MB of a fresh process that trains on so many pictures; Linux only."""
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        return pool.apply(_measure_memory, (name, num_pictures, batch_size))


def _measure_memory(name: str, num_pictures: int, batch_size: int) -> float:
    files = emoji_files(num_pictures)
    if name == OURS:
        train_an_epoch, _ = finetuner_loop(files, batch_size, 0)
    else:
        train_an_epoch = plain_loop(files, batch_size, 0)
    train_an_epoch()
    return peak_resident_mb()


def main() -> None:
    """Train in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--steps', type=int, default=2, help='of each contestant in a round')
    parser.add_argument('--rounds', type=int, default=4)
    parser.add_argument('--num-workers', type=int, default=0, help='loader processes')
    arguments = parser.parse_args()
    torch.manual_seed(0)
    batch_size, num_workers = arguments.batch_size, arguments.num_workers
    files = emoji_files(batch_size * arguments.steps)
    loop = functools.partial(plain_loop, files, batch_size, num_workers)
    ours, close = finetuner_loop(files, batch_size, num_workers)
    contestants = {
        PEER: loop(),
        f'{PEER}, channels_last': loop(channels_last=True),
        f'{PEER}, channels_last, frozen BatchNorm': loop(True, True),
        OURS: ours,
    }
    print(
        f'EfficientNet-Lite0, {SIZE} px, batches of {batch_size}, {torch.get_num_threads()} '
        f'threads, {num_workers} loader processes, '
        f'median of {arguments.rounds} alternating rounds of {arguments.steps} steps'
    )
    speeds = take_turns(contestants, arguments.rounds)
    close()
    print_head('training on the emoji pictures', PEER)
    print_speeds(speeds, PEER)
    print(f'\n{"peak memory of a fresh process":<{NAME_WIDTH}} {"MB":>9}')
    for name in (PEER, OURS):
        print(f'{name:<{NAME_WIDTH}} {peak_memory(name, batch_size * 2, batch_size):>9,.0f}')


if __name__ == '__main__':
    main()
