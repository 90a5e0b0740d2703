# ruff: noqa: E402 - torchvision is mended before it is imported
"""open-metric-learning with Lightning, as its documentation's first example and its Lightning one.

From them: TripletLossWithMiner(margin=0.1) with AllTripletsMiner, Adam at 1e-4, BalanceSampler, the
transforms of its small ViTs (resize and normalise), ExtractorModule, a Lightning Trainer, and
`inference`, which embeds. Not from them: the backbone, its input size and the size of a batch (they
have 2 labels with 2 pictures each).

    python benchmarks/peers/oml_lightning.py FOLDER
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contestant import Clock, Task, begin, write_embeddings
from mending import mend_torchvision
from pictures import DIMENSION, Backbone

mend_torchvision()
import pandas as pd
import pytorch_lightning as pl
from oml.datasets import ImageBaseDataset, ImageLabeledDataset
from oml.inference import inference
from oml.interfaces.models import IExtractor
from oml.lightning.modules.extractor import ExtractorModule
from oml.losses import TripletLossWithMiner
from oml.miners import AllTripletsMiner
from oml.samplers import BalanceSampler
from oml.transforms.images.torchvision import get_normalisation_resize_torch
from torch.optim import Adam
from torch.utils.data import DataLoader


class Extractor(IExtractor):
    """The backbone behind the interface that the library asks for."""

    def __init__(self) -> None:
        """Load the weights."""
        super().__init__()
        self.backbone = Backbone()

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Embed `[batch, 3, size, size]`."""
        return self.backbone(pictures)

    @property
    def feat_dim(self) -> int:
        """Length of the embedding."""
        return DIMENSION


class Watch(pl.Callback):
    """Looks at the clock."""

    def __init__(self, clock: Clock) -> None:
        """Keep the clock."""
        self._clock = clock

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        self._clock.batch(len(batch['labels']), float(outputs['loss']))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Count the epoch."""
        self._clock.epoch()


def build_loader(task: Task) -> DataLoader:
    """Batches of so many labels with so many pictures each."""
    frame = pd.DataFrame(task.train, columns=['path', 'label'])
    frame['split'] = 'train'
    frame['is_query'] = frame['is_gallery'] = None
    dataset = ImageLabeledDataset(frame, transform=get_normalisation_resize_torch(task.train_size))
    sampler = BalanceSampler(
        dataset.get_labels(),
        n_labels=task.batch_size // task.items_per_class,
        n_instances=task.items_per_class,
    )
    return DataLoader(dataset, batch_sampler=sampler, num_workers=task.num_workers)


def embed(task: Task, folder: Path, extractor: Extractor) -> None:
    """Embed the test pictures with the library's `inference`, at each size."""
    # only quicker, and the clock has stopped
    extractor = extractor.eval().to(memory_format=torch.channels_last)
    for size in task.embed_sizes:
        transform = get_normalisation_resize_torch(size)
        query, index = (
            inference(
                extractor,
                ImageBaseDataset([Path(path) for path, _ in items], transform=transform),
                num_workers=task.num_workers,
                batch_size=32,
            ).numpy()
            for items in (task.query, task.index)
        )
        write_embeddings(folder, f'{size} px', query, index)


def main() -> None:
    """Train, save, embed."""
    folder, task = begin()
    pl.seed_everything(task.seed)
    extractor = Extractor().train()
    criterion = TripletLossWithMiner(0.1, AllTripletsMiner(), need_logs=True)
    optimizer = Adam(extractor.parameters(), lr=task.options['learning_rate'])
    module = ExtractorModule(extractor, criterion, optimizer)
    loader = build_loader(task)
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=task.epochs,
        num_sanity_val_steps=0,
        callbacks=[Watch(clock)],
        default_root_dir=folder,
        accelerator='cpu' if not torch.cuda.is_available() else 'auto',
        devices=1,
    )
    trainer.fit(module, train_dataloaders=loader)
    seconds = clock.seconds()
    torch.save(extractor.state_dict(), folder / 'extractor.pth')
    versions = {name: version(name) for name in ('open-metric-learning', 'pytorch-lightning')}
    result = clock.result(seconds, torch.get_num_threads(), versions)
    embed(task, folder, extractor)
    result.write(folder)


if __name__ == '__main__':
    main()
