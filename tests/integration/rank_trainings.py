"""Trainings of every kind, done by as many processes as the environment names: `python -m ... FOLDER`.

The first of the processes writes what came of each into the folder, for a comparison with what one
process alone makes of the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from docarray import Document, DocumentArray

import finetuner
from finetuner.callback import EvaluationCallback
from finetuner.data import ShardedBatches, ShardedDocuments
from finetuner.data.loading import build_dataset
from finetuner.data.stored.storing import save_documents
from finetuner.excepts import ConfigError
from finetuner.training.averaging import WeightAveraging
from finetuner.training.callbacks import EvaluationOptions, RetrievalEvaluation
from finetuner.training.losses import build_loss, build_miner
from finetuner.training.matryoshka import build_for_lengths
from finetuner.training.objectives import build_objective
from finetuner.training.optimization import build_optimizer, build_schedule
from finetuner.training.ranks import join_ranks, leave_ranks
from finetuner.training.setup import BatchShape, Pipeline
from finetuner.training.step import StepOptions, TrainingStep
from finetuner.training.trainer import BaseCallback, Trainer, seed_everything
from tests.unit.test_every_loss import CLASS_LOSSES, NEEDED
from tests.unit.test_overfit import LENGTH, class_data, scored_pairs, session_data

DIMENSION = 8


def text_image_data(seed: int) -> DocumentArray:
    random = np.random.default_rng(seed)

    def chunk(modality):
        return Document(tensor=random.normal(size=LENGTH).astype(np.float32), modality=modality)

    return DocumentArray(Document(chunks=[chunk('text'), chunk('image')]) for _ in range(24))


DATA = {
    'class': class_data,
    'session': session_data,
    'scored_pair': scored_pairs,
    'text_image_pair': text_image_data,
}


def tensor_of(doc: Document) -> torch.Tensor:
    if doc.tensor[0] > 1e6:
        raise OSError('a file that is damaged')
    return torch.from_numpy(np.array(doc.tensor))


@dataclass(frozen=True)
class Training:
    """One training: what is left out is plain."""

    loss: str = 'TripletMarginLoss'
    loss_options: dict[str, Any] = field(default_factory=dict)
    miner: str | None = None
    kind: str = 'class'
    batch_size: int = 16
    optimizer: str = 'SGD'
    rate: float = 0.05
    micro_batch_size: int | None = None
    lengths: tuple[int, ...] = ()
    ema: float | None = None
    num_broken: int = 0
    evaluates: bool = False
    validates: bool = False
    num_workers: int = 0
    epochs: int = 2


TRAININGS = {
    **{f'loss {name}': Training(name, NEEDED.get(name, {})) for name in CLASS_LOSSES},
    'miner': Training('TripletMarginLoss', miner='TripletMarginMiner'),
    'miner of hardest': Training('ContrastiveLoss', miner='BatchHardMiner'),
    'memory': Training('CrossBatchMemory', {'loss': 'ContrastiveLoss', 'memory_size': 64}),
    'drawn triplets': Training('TripletMarginLoss', {'triplets_per_anchor': 3}),
    'sessions': Training(kind='session', batch_size=15),
    'scored pairs': Training('CosineSimilarityLoss', kind='scored_pair', batch_size=14),
    'texts and pictures': Training('CLIPLoss', kind='text_image_pair', batch_size=10),
    'odd batches': Training('SupConLoss', batch_size=7),
    'batches of less than processes': Training('ContrastiveLoss', batch_size=2),
    'parts of parts': Training('NTXentLoss', micro_batch_size=3),
    'parts of parts and weights of the loss': Training('ProxyAnchorLoss', micro_batch_size=3),
    'lengths': Training('NTXentLoss', lengths=(2, 4)),
    'L-BFGS': Training('NTXentLoss', optimizer='LBFGS', rate=0.1),
    'Adam and an average': Training('SupConLoss', optimizer='Adam', rate=1e-2, ema=0.9),
    'broken Documents': Training('SupConLoss', num_broken=12, batch_size=6),
    'evaluation': Training('SupConLoss', evaluates=True, validates=True),
    'loader processes': Training('SupConLoss', num_workers=1),
}


def network() -> torch.nn.Module:
    """No dropout, which draws for each row; statistics of batch normalisation are frozen."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(LENGTH, 32),
        torch.nn.BatchNorm1d(32),
        torch.nn.Tanh(),
        torch.nn.Linear(32, DIMENSION),
    )


def documents(training: Training) -> DocumentArray:
    docs = DATA[training.kind](0)
    for doc in docs[: training.num_broken]:
        doc.tensor = np.full(LENGTH, 2e6, dtype=np.float32)
    return docs


class Losses(BaseCallback):
    """Writes down the loss of each batch, and how many items an epoch had."""

    def __init__(self):
        self.losses, self.seen = [], []

    def on_train_batch_end(self, trainer):
        self.losses.append(trainer.state.loss)

    def on_epoch_end(self, trainer):
        self.seen.append(trainer._sums.num_items)


def train(training: Training) -> dict[str, Any]:
    """Train, in this process or with the others there are; what came of it."""
    ranks = join_ranks('cpu')
    seed_everything(0)
    dataset, model = build_dataset(documents(training)), network()
    pipeline = Pipeline(tensor_of, num_workers=training.num_workers, on_broken='skip', ranks=ranks)
    with pipeline:
        shape = BatchShape(training.batch_size, 2 if training.kind == 'class' else None)
        if training.loss == 'SmoothAPLoss':
            shape = BatchShape(16, 4)
        loader = pipeline.training_loader(dataset, shape)
        val_loader = None
        if training.validates:
            val_loader = pipeline.training_loader(dataset, BatchShape(5, 1))

        def objective_of(dimension):
            loss = build_loss(training.loss, training.loss_options, dimension, dataset.num_classes)
            miner = build_miner(training.miner, {}) if training.miner else None
            return build_objective(training.kind, loss, miner, training.batch_size)

        torch.manual_seed(1)
        objective = build_for_lengths(objective_of, training.lengths, DIMENSION)
        optimizers = [build_optimizer(training.optimizer, model.parameters(), training.rate, {})]
        if weights := list(objective.parameters()):
            optimizers.append(build_optimizer('Adam', weights, 0.01))
        schedule = build_schedule('cosine', optimizers[0], {}, training.epochs, len(loader))
        noted, reports = Losses(), []
        callbacks = [WeightAveraging(training.ema)] if training.ema else []
        if training.evaluates:
            queries = pipeline.evaluation_set(dataset, 5, 0)
            told = (lambda stage, found: reports.append((stage, found))), (lambda *_: None)
            callbacks.append(RetrievalEvaluation('it', queries, None, EvaluationOptions(), *told))
        trainer = Trainer(
            model,
            objective,
            optimizers,
            schedule,
            [*callbacks, noted],
            freeze_batch_norm=True,
            step_options=StepOptions(training.micro_batch_size),
            ranks=ranks,
        )
        trainer.fit(loader, training.epochs, val_loader)
        loader.add_broken(ranks.collect(loader.broken))
    return {
        'weights': model.state_dict(),
        'loss weights': objective.state_dict(),
        'losses': noted.losses,
        'seen': noted.seen,
        'reports': reports,
        'broken': sorted(loader.broken),
        'metrics': trainer.state.metrics,
    }


def gradients(loss_name: str, num_rows: int) -> dict[str, torch.Tensor]:
    """Gradients of a network and a loss for one batch, in double precision."""
    ranks = join_ranks('cpu')
    torch.manual_seed(2)
    rows, labels = torch.randn(num_rows, LENGTH).double(), torch.arange(num_rows) // 2
    part = ranks.part().of(list(range(num_rows)))
    model = network().double().eval()
    objective = build_objective('class', build_loss(loss_name, {}, DIMENSION, 32).double())
    optimizers = [torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.0)]
    step = TrainingStep(
        model, objective, optimizers, torch.device('cpu'), StepOptions(), ranks=ranks
    )
    step(rows[part] if part else None, labels[part])
    named = [*model.named_parameters(), *objective.named_parameters()]
    return {name: parameter.grad for name, parameter in named}


def fit_own() -> dict[str, torch.Tensor]:
    """A model of one's own, by `finetuner.fit`, as a script that torchrun starts does it."""
    model = network()
    queries = EvaluationCallback(query_data=class_data(1))
    finetuner.fit(
        model,
        class_data(0),
        epochs=2,
        batch_size=16,
        loss='NTXentLoss',
        configure_optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.05),
        eval_data=class_data(1),
        callbacks=[queries],
        freeze_batch_norm=True,
        preprocess_fn=tensor_of,
    )
    return model.state_dict()


def shards_of(folder: Path, rank: int | None = None, num_ranks: int | None = None, **options: Any):
    """Batches of the shards that `write_shards` wrote, of this process where no rank is told."""
    documents = ShardedDocuments(f'{folder}/shards/*.docs', rank, num_ranks, 1, shuffle_buffer=32)
    return ShardedBatches(documents, 8, tensor_of, num_items_per_class=2, **options)


def write_shards(folder: Path) -> None:
    (folder / 'shards').mkdir()
    for number in range(6):
        save_documents(class_data(number), folder / 'shards' / f'{number}.docs')


def fit_streamed(folder: Path) -> dict[str, Any]:
    """The same of a stream; without `num_batches` it is refused."""
    model, refused = network(), ''
    options = {'epochs': 2, 'loss': 'NTXentLoss', 'freeze_batch_norm': True}
    options['configure_optimizer'] = lambda module: torch.optim.SGD(module.parameters(), lr=0.05)
    try:
        finetuner.fit(model, shards_of(folder), **options)
    except ConfigError as error:
        refused = str(error)
    finetuner.fit(model, shards_of(folder, num_batches=4), **options)
    return {'refused': refused, 'weights': model.state_dict()}


GRADIENTS = [
    (name, num_rows)
    for name in ('TripletMarginLoss', 'SupConLoss', 'NTXentLoss', 'ProxyAnchorLoss', 'ArcFaceLoss')
    for num_rows in (2, 13, 64)
]


if __name__ == '__main__':
    for name, num_rows in GRADIENTS:
        found = gradients(name, num_rows)
        if join_ranks('cpu').is_first:
            torch.save(found, Path(sys.argv[1]) / f'gradients {name} {num_rows}.pt')
    for name, training in TRAININGS.items():
        done = train(training)
        if join_ranks('cpu').is_first:
            torch.save(done, Path(sys.argv[1]) / f'{name}.pt')
    own = fit_own()
    if join_ranks('cpu').is_first:
        torch.save(own, Path(sys.argv[1]) / 'own.pt')
    streamed = fit_streamed(Path(sys.argv[1]))
    torch.save(streamed, Path(sys.argv[1]) / f'streamed {join_ranks("cpu").rank}.pt')
    leave_ranks()
