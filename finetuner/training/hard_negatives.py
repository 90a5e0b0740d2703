"""Before each epoch, look for the classes that the model confuses, to be trained on together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from finetuner.data.class_choice import choose_by_class
from finetuner.data.datasets import ClassDataset
from finetuner.data.neighbour_sampler import NeighbourClassSampler
from finetuner.search import search
from finetuner.training.callbacks import embed_all
from finetuner.training.trainer import BaseCallback, Trainer

logger = logging.getLogger('finetuner.training')

MAX_ITEMS = 20_000
# of data that is more than that: enough to know where a class lies
_MAX_ITEMS_PER_CLASS = 8


class ClosableLoader(Protocol):
    """Yields (inputs, labels), in processes that can be ended."""

    def __iter__(self) -> Any: ...

    def close(self) -> None:
        """End them."""


class HardNegatives(BaseCallback):
    """Tells a sampler which classes lie nearest to one another, before each epoch.

    All training items are embedded, up to `MAX_ITEMS` drawn anew for each epoch, and the mean
    embeddings of the classes compared by cosine. After Wu et al., Sampling Matters in Deep Embedding
    Learning (2017), and Xuan et al., Hard Negative Examples are Hard, but Useful (2020): the
    negatives of a batch drawn at random are mostly too easy to learn from.
    """

    def __init__(
        self,
        sampler: NeighbourClassSampler,
        dataset: ClassDataset,
        build_loader: Callable[[ClassDataset], ClosableLoader],
        seed: int,
    ) -> None:
        """Keep what to embed.

        Args:
            sampler: of the training data.
            dataset: the training data.
            build_loader: yields (inputs, labels) of some of it, as the model gets them; where
                several processes train, every so-manieth batch.
            seed: of the draw, where not all are looked at.
        """
        self._sampler = sampler
        self._dataset = dataset
        self._build_loader = build_loader
        self._seed = seed
        self._epoch = -1
        self._classes: NDArray[np.integer] = np.zeros(0, dtype=np.int64)
        self._neighbours: NDArray[np.integer] = np.zeros((0, 0), dtype=np.int64)

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """Look, unless this is an epoch that is gone on with."""
        if trainer.state.epoch == self._epoch:
            return
        self._epoch = trainer.state.epoch
        chosen = self._choose()
        loader = self._build_loader(self._dataset.subset(chosen))
        batches: list[NDArray[np.integer]] = []

        def noting_labels() -> Iterator[Any]:
            # broken Documents may be missing, so the order of the dataset does not tell
            for inputs, labels in loader:
                batches.append(np.asarray(labels))
                yield inputs, labels

        try:
            embeddings = embed_all(trainer.model, noting_labels(), trainer.device, trainer.ranks)
        finally:
            loader.close()
        labels = np.concatenate(trainer.ranks.interleave(batches))
        # a subset counts its classes from 0 in order of appearance
        _, first = np.unique(np.asarray(self._dataset.labels)[chosen], return_index=True)
        appeared = np.asarray(self._dataset.labels)[chosen][np.sort(first)]
        found, neighbours = nearest_classes(embeddings, labels, self._sampler.num_neighbours)
        self._classes, self._neighbours = appeared[found], appeared[neighbours]
        self._tell_sampler()
        logger.info(
            'Hard negatives: nearest classes found among %d, from %d of %d Documents',
            len(found),
            len(labels),
            len(self._dataset),
        )

    def state_dict(self) -> dict[str, Any]:
        """What the batches of the current epoch depend on."""
        return {
            'epoch': self._epoch,
            'classes': torch.from_numpy(self._classes.astype(np.int64)),
            'neighbours': torch.from_numpy(self._neighbours.astype(np.int64)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._epoch = int(state['epoch'])
        self._classes = state['classes'].numpy()
        self._neighbours = state['neighbours'].numpy()
        self._tell_sampler()

    def _choose(self) -> NDArray[np.int64]:
        if len(self._dataset) <= MAX_ITEMS:
            return np.arange(len(self._dataset))
        generator = np.random.default_rng([self._seed, self._epoch])
        labels = np.asarray(self._dataset.labels)
        return choose_by_class(labels, generator, MAX_ITEMS, _MAX_ITEMS_PER_CLASS)

    def _tell_sampler(self) -> None:
        self._sampler.set_neighbours(self._classes, self._neighbours)


def nearest_classes(
    embeddings: NDArray[np.floating], labels: NDArray[np.integer], k: int
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Compare classes by the cosine of their mean embeddings.

    Args:
        embeddings: `[n, dimension]`.
        labels: `[n]` int.
        k: nearest classes wanted of each; all others where there are fewer.

    Returns:
        The labels there are, `[num_classes]`, and those nearest to each, `[num_classes, k]`.
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    if k < 1 or len(classes) < 2:
        return classes, np.zeros((len(classes), 0), dtype=classes.dtype)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    # a sum has the direction of the mean
    sums = np.zeros((len(classes), embeddings.shape[1]))
    np.add.at(sums, numbers, embeddings / np.maximum(lengths, 1e-12))
    _, nearest = search(sums, sums, k, exclude=np.arange(len(classes)))
    return classes, classes[nearest.cpu().numpy()]
