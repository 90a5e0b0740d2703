"""What the frozen part of a model gives for each item, computed once for all epochs."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from docarray import Document
from numpy.typing import NDArray

from finetuner.data.collation import stack_contents
from finetuner.data.content_cache import VaryFn, find_rows
from finetuner.data.labelled import LabelledDataset, PreprocessFn
from finetuner.data.loading import LoadingError, load_in_order
from finetuner.data.memory import available_memory
from finetuner.training.division import DividedModel, DivisionError, TrainedPart, divide_model
from finetuner.training.ranks import Ranks
from finetuner.training.setup import Pipeline
from finetuner.training.step import to_device

logger = logging.getLogger('finetuner.run')

# of the memory there is, what the values may take
_SHARE_OF_MEMORY = 0.4
_BATCH_SIZE = 64


class FrozenFeatures:
    """Gives loaders what the frozen part of a model makes of each item, instead of its content.

    Attributes:
        trained: the part of the model that is left to train, on these values.
    """

    def __init__(self, divided: DividedModel, pipeline: Pipeline, device: str) -> None:
        """Compute nothing yet.

        Args:
            divided: the model in its two parts, on the device.
            pipeline: how contents are read and become batches.
            device: `cpu` or `cuda`.
        """
        self.trained: TrainedPart = divided.trained
        self._frozen = divided.frozen
        self._names = divided.names
        self._pipeline = pipeline
        self._device = torch.device(device)
        self._known: list[tuple[Sequence[Document], NDArray[np.int64], _Values]] = []

    def pipeline(self) -> Pipeline:
        """A pipeline whose loaders yield these values; there is nothing in it for processes."""
        return replace(
            self._pipeline,
            collate_fn=None if len(self._names) == 1 else self._collate,
            num_workers=0,
            contents=self,
        )

    def prepared(
        self,
        dataset: LabelledDataset[Any],
        preprocess_fn: PreprocessFn | None = None,
        vary_fn: VaryFn | None = None,
    ) -> LabelledDataset[Any]:
        """Return the dataset with these values for its contents, computed if they are not yet.

        Args:
            dataset: of any kind.
            preprocess_fn: not looked at: contents are read as the pipeline does.
            vary_fn: not looked at: what is frozen cannot be varied.
        """
        keys = dataset.item_keys()
        for source, known, values in self._known:
            if source is dataset.source:
                rows = find_rows(known, keys)
                if (rows >= 0).all():
                    return dataset.with_contents(functools.partial(_row_of, values, rows))
        values = self._compute(dataset)
        self._known.append((dataset.source, keys, values))
        return dataset.with_contents(values.row)

    def example_bytes(self, dataset: LabelledDataset[Any]) -> int:
        """Bytes that the values of one item take; 0 where none can be read.

        Raises:
            DivisionError: what goes from the frozen part to the other is not one row an item.
        """
        for indices, contents, _ in load_in_order(self._fresh(dataset), 2, 'skip'):
            if indices:
                rows = self._run(contents)
                if any(not isinstance(r, torch.Tensor) or len(r) != len(indices) for r in rows):
                    raise DivisionError('its frozen part does not give one row for each item')
                return sum(row[0].nbytes for row in rows)
        return 0

    def _fresh(self, dataset: LabelledDataset[Any]) -> LabelledDataset[Any]:
        return dataset.with_preprocess(self._pipeline.preprocess_fn)

    def _compute(self, dataset: LabelledDataset[Any]) -> _Values:
        values, began = _Values(self._names), time.perf_counter()
        fresh, on_broken = self._fresh(dataset), self._pipeline.on_broken
        ranks = self._pipeline.ranks
        part = ranks.part(whole_batches=True)
        for indices, contents, broken in load_in_order(fresh, _BATCH_SIZE, on_broken, part):
            values.broken.update(broken)
            if indices:
                values.fill(len(dataset), indices, self._run(contents))
        if ranks.size > 1:
            values.share(len(dataset), ranks, self._device)
        logger.info(
            'The frozen part of the model was computed for %d items, once for all epochs: %.1f s',
            len(dataset),
            time.perf_counter() - began,
        )
        return values

    def _run(self, contents: list[Any]) -> list[torch.Tensor]:
        collate = self._pipeline.collate_fn or stack_contents
        # not inference_mode: its tensors cannot be trained on
        with torch.no_grad():
            self._frozen.eval()
            return self._frozen(to_device(collate(contents), self._device))

    def _collate(self, rows: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        columns = zip(*rows, strict=True)
        return {n: torch.stack(column) for n, column in zip(self._names, columns, strict=True)}


def _row_of(values: _Values, rows: NDArray[np.int64], index: int) -> Any:
    return values.row(int(rows[index]))


class _Values:
    """The values of a dataset's items; and why those are missing that could not be loaded."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._tensors: list[torch.Tensor] = []
        self.broken: dict[int, str] = {}

    def fill(self, num_items: int, indices: list[int], rows: list[torch.Tensor]) -> None:
        if not self._tensors:
            self._tensors = [torch.zeros((num_items, *r.shape[1:]), dtype=r.dtype) for r in rows]
        for tensor, row in zip(self._tensors, rows, strict=True):
            tensor[indices] = row.cpu()

    def share(self, num_items: int, ranks: Ranks, device: torch.device) -> None:
        """Fill in what other processes have computed."""
        for broken in ranks.collect(self.broken):
            self.broken |= broken
        shapes = ranks.collect([(t.shape[1:], t.dtype) for t in self._tensors])
        if not self._tensors:
            found = max(shapes, key=len)
            self._tensors = [torch.zeros((num_items, *shape), dtype=kind) for shape, kind in found]
        for tensor in self._tensors:
            ranks.add_rows(tensor, device)

    def row(self, index: int) -> Any:
        """What the frozen part gave for an item: a tensor, or a tuple of several."""
        if index in self.broken:
            raise LoadingError(self.broken[index])
        if len(self._tensors) == 1:
            return self._tensors[0][index]
        return tuple(tensor[index] for tensor in self._tensors)


def build_frozen_features(
    model: torch.nn.Module,
    pipeline: Pipeline,
    datasets: Sequence[LabelledDataset[Any]],
    device: str,
    freeze_batch_norm: bool,
    limited: bool = True,
) -> FrozenFeatures:
    """Find what of a model is frozen, and whether its values for all items fit in memory.

    Args:
        model: some of its parameters are trainable.
        pipeline: how contents are read and become batches.
        datasets: all whose items the model will get, the first of them to train on.
        device: `cpu` or `cuda`, to which the model is moved.
        freeze_batch_norm: whether statistics of batch normalisation stay as they are.
        limited: whether values that take much of the memory there is are refused.

    Raises:
        DivisionError: the values cannot be computed once for all; says why.
    """
    divided = divide_model(model)
    norms = (torch.nn.modules.batchnorm._BatchNorm,)
    if not freeze_batch_norm and any(isinstance(m, norms) for m in divided.frozen.modules()):
        raise DivisionError('its batch normalisation is not frozen (freeze_batch_norm)')
    model.to(device)
    features = FrozenFeatures(divided, pipeline, device)
    item_bytes = features.example_bytes(datasets[0])
    needed = item_bytes * sum(len(dataset) for dataset in datasets)
    allowed = int(_SHARE_OF_MEMORY * available_memory())
    if limited and needed > allowed:
        raise DivisionError(
            f'the values would take {needed / 2**20:,.0f} MiB, more than the '
            f'{allowed / 2**20:,.0f} allowed for them'
        )
    return features
