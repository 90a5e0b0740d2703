"""Embeddings for TensorBoard's projector, with labels and thumbnails."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from docarray import Document

from finetuner.data.datasets import ClassDataset
from finetuner.data.labelled import LabelledDataset
from finetuner.data.names import document_name
from finetuner.data.samplers import SequentialSampler
from finetuner.excepts import FinetunerError, PictureError
from finetuner.images import picture_of
from finetuner.training.callbacks import embed_all
from finetuner.training.setup import Pipeline
from finetuner.training.trainer import Trainer

logger = logging.getLogger('finetuner.training')

COLUMNS = ('label', 'side', 'name')
TAG = 'embeddings'
# 100 x 100 of them make the largest picture that TensorBoard shows
_THUMBNAIL_SIZE = 64
_BATCH_SIZE = 32


class Projection:
    """Documents whose embeddings are shown."""

    def __init__(
        self,
        pipeline: Pipeline,
        sides: Mapping[str, LabelledDataset[Any]],
        max_embeddings: int,
    ) -> None:
        """Draw the Documents.

        Args:
            pipeline: how they become inputs.
            sides: datasets by what they are: `query` and `index`, or `train`.
            max_embeddings: items at most, of all sides together.
        """
        self._pipeline = pipeline
        total = sum(len(dataset) for dataset in sides.values())
        share = min(1.0, max_embeddings / total)
        self._sides = {
            side: _part(dataset, share, pipeline.seed) for side, dataset in sides.items()
        }

    def write(self, writer: Any, trainer: Trainer) -> None:
        """Embed them with the model as it is now.

        Args:
            writer: a `SummaryWriter`.
            trainer: with the model.
        """
        try:
            embeddings = [
                embed_all(trainer.model, self._loader(dataset), trainer.device)
                for dataset in self._sides.values()
            ]
        except FinetunerError as error:
            logger.warning('TensorBoard gets no embeddings: %s', error)
            return
        docs = [
            dataset.document(index)
            for dataset in self._sides.values()
            for index in range(len(dataset))
        ]
        writer.add_embedding(
            torch.from_numpy(np.concatenate(embeddings)),
            metadata=self._rows(),
            metadata_header=list(COLUMNS),
            label_img=_thumbnails(docs),
            global_step=trainer.state.weights_epoch + 1,
            tag=TAG,
        )
        writer.flush()

    def _loader(self, dataset: LabelledDataset[Any]) -> Any:
        return self._pipeline.loader(dataset, SequentialSampler(len(dataset), _BATCH_SIZE))

    def _rows(self) -> list[list[str]]:
        rows = []
        for side, dataset in self._sides.items():
            classes = dataset.classes if isinstance(dataset, ClassDataset) else None
            for index, label in enumerate(dataset.labels):
                shown = str(label) if classes is None else str(classes[label])
                name = document_name(dataset.document(index), index)
                # tabs and line ends are what divides the table
                rows.append([' '.join(text.split()) for text in (shown, side, name)])
        return rows


def _part(dataset: LabelledDataset[Any], share: float, seed: int) -> LabelledDataset[Any]:
    count = max(1, int(share * dataset.num_documents))
    if count >= dataset.num_documents:
        return dataset
    drawn = np.random.default_rng(seed).choice(dataset.num_documents, count, replace=False)
    return dataset.subset(np.sort(drawn))


def _thumbnails(docs: list[Document]) -> torch.Tensor | None:
    """`[n, 3, size, size]` in 0..1, None where there are no pictures; black what cannot be read."""
    if any(doc.text for doc in docs):
        return None
    pictures, broken = [], 0
    for doc in docs:
        try:
            pictures.append(picture_of(doc, _THUMBNAIL_SIZE))
        except PictureError:
            broken += 1
            pictures.append(np.zeros((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE, 3), np.uint8))
    if broken == len(docs):
        return None
    if broken:
        logger.warning('%d thumbnails stay black: their pictures cannot be opened', broken)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
