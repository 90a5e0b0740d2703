"""What training minimizes: for each kind of data, how its labels become what a loss takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.reducers import ClassWeightedReducer
from torch import Tensor

from finetuner.data.documents import DataKind
from finetuner.data.labelling import NEGATIVE, POSITIVE, ROOT
from finetuner.excepts import ConfigError
from finetuner.training.losses import (
    LOSSES,
    PAIR_LOSSES,
    TEXT_IMAGE_LOSSES,
    TUPLE_LOSSES,
    WHOLE_BATCH_LOSSES,
    WRAPPERS,
    CrossBatchMemory,
)

PairTuple = tuple[Tensor, Tensor, Tensor, Tensor]


class Objective(torch.nn.Module):
    """Embeddings and labels of a batch to one number, for class and unlabelled data.

    Equal labels are similar. Two views of one Document have one label, so unlabelled data is no
    other case.

    Args:
        loss: called with embeddings, labels and, if there is a miner, its tuples.
        miner: picks the tuples of a batch that the loss looks at.
    """

    def __init__(self, loss: torch.nn.Module, miner: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.miner = miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            embeddings: `[batch, dimension]`.
            labels: as the dataset gives them.

        Returns:
            A scalar.
        """
        tuples = self.miner(embeddings, labels) if self.miner is not None else None
        return self.loss(embeddings, labels, tuples) if tuples else self.loss(embeddings, labels)


class SessionObjective(Objective):
    """For sessions: the loss gets the pairs of each root with its matches, and no others.

    Nothing is said of two matches, whatever their labels, or of two sessions.
    """

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; labels are `[batch, 2]`, (session, type)."""
        pairs = session_pairs(labels)
        # Some losses look at labels beside the tuples, but only for their number.
        numbers = torch.arange(len(embeddings), device=embeddings.device)
        return self.loss(embeddings, numbers, pairs)


class ScoredPairObjective(Objective):
    """For scored pairs: the loss gets the first and the second of each pair, and the scores."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; items 2i and 2i+1 of the batch are a pair, labels `[batch]` float."""
        return self.loss(embeddings[0::2], embeddings[1::2], labels[0::2])


class TextImageObjective(Objective):
    """For text-image pairs: the loss gets the texts, their pictures, and the numbers of the texts."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; items 2i and 2i+1 are a text and its picture, labels `[batch, 2]`."""
        return self.loss(embeddings[0::2], embeddings[1::2], labels[0::2, 0])


def session_pairs(labels: Tensor) -> PairTuple:
    """Find the pairs that sessions speak of, as pytorch-metric-learning's index tuple.

    Args:
        labels: `[batch, 2]` int, (session, type): type 0 is the root, 1 a match similar to it, -1
            one that is not.

    Returns:
        Anchors and positives, anchors and negatives: each anchor a root, in the order of the batch.
    """
    sessions, types = labels.unbind(dim=1)
    from_root = (sessions[:, None] == sessions[None, :]) & (types == ROOT)[:, None]
    positives = torch.nonzero(from_root & (types == POSITIVE)[None, :], as_tuple=True)
    negatives = torch.nonzero(from_root & (types == NEGATIVE)[None, :], as_tuple=True)
    return (*positives, *negatives)  # type: ignore[return-value]


def session_triplets(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the triplets that sessions speak of: a root, one positive and one negative of its matches.

    Args:
        labels: as `session_pairs` takes them.

    Returns:
        Anchors, positives and negatives.
    """
    anchors, positives, other_anchors, negatives = session_pairs(labels)
    one, other = torch.nonzero(anchors[:, None] == other_anchors[None, :], as_tuple=True)
    return anchors[one], positives[one], negatives[other]


def build_objective(
    kind: DataKind,
    loss: torch.nn.Module,
    miner: torch.nn.Module | None = None,
    batch_size: int | None = None,
) -> Objective:
    """Put a loss to work on a kind of data.

    Args:
        kind: of the training data.
        loss: as `build_loss` makes it, or one of the user's own.
        miner: of class or unlabelled data.
        batch_size: items in a batch, which a memory must hold; None leaves that unchecked.

    Raises:
        ConfigError: the loss or the miner cannot learn from this kind; names what can.
    """
    name = type(loss).__name__
    pairwise = name in PAIR_LOSSES
    if kind == 'text_image_pair' or name in TEXT_IMAGE_LOSSES:
        _check_text_image(loss, miner, kind)
        return TextImageObjective(loss)
    if kind == 'scored_pair':
        if _is_named(loss) and not pairwise:
            raise ConfigError(
                f'loss {name} cannot learn from scored pairs: use {", ".join(PAIR_LOSSES)}'
            )
        _refuse_miner(miner, kind)
        return ScoredPairObjective(loss)
    if pairwise:
        raise ConfigError(
            f'loss {name} learns from scored pairs only, and this is data of kind {kind}: use '
            'another, such as TripletMarginLoss; see docs/data.md'
        )
    if kind == 'session':
        if _is_named(loss) and name not in TUPLE_LOSSES:
            raise ConfigError(
                f'loss {name} cannot learn from sessions, which say of pairs whether they are '
                f'similar and give no classes: use {", ".join(TUPLE_LOSSES)}'
            )
        _refuse_miner(miner, kind)
    if kind != 'class' and any(isinstance(part, ClassWeightedReducer) for part in loss.modules()):
        raise ConfigError(
            f'reducer ClassWeightedReducer weighs classes, which data of kind {kind} does not have'
        )
    if kind == 'session':
        return SessionObjective(loss)
    _check_miner_and_memory(loss, miner, batch_size)
    return Objective(loss, miner)


def _is_named(loss: torch.nn.Module) -> bool:
    """Whether a loss is one of those that have a name here, and none of the user's own."""
    return type(loss) in (*LOSSES.values(), *WRAPPERS.values())


def _check_text_image(loss: torch.nn.Module, miner: torch.nn.Module | None, kind: DataKind) -> None:
    name = type(loss).__name__
    if kind != 'text_image_pair':
        raise ConfigError(
            f'loss {name} learns from text-image pairs only, and this is data of kind {kind}: use '
            'another, such as TripletMarginLoss; see docs/data.md'
        )
    if _is_named(loss) and name not in TEXT_IMAGE_LOSSES:
        raise ConfigError(
            f'loss {name} cannot learn from text-image pairs: use {", ".join(TEXT_IMAGE_LOSSES)}'
        )
    _refuse_miner(miner, kind)


def _refuse_miner(miner: torch.nn.Module | None, kind: DataKind) -> None:
    if miner is not None:
        raise ConfigError(
            f'miner {type(miner).__name__} mines by class labels, which data of kind {kind} does '
            'not have: leave it out'
        )


def _check_miner_and_memory(
    loss: torch.nn.Module, miner: torch.nn.Module | None, batch_size: int | None
) -> None:
    if miner is not None and _is_named(loss) and type(loss).__name__ in WHOLE_BATCH_LOSSES:
        raise ConfigError(
            f'loss {type(loss).__name__} takes the whole batch and nothing that a miner picks, and '
            f'so do {", ".join(n for n in WHOLE_BATCH_LOSSES if n != type(loss).__name__)}: leave '
            f'out {type(miner).__name__}, or take another loss'
        )
    if not isinstance(loss, CrossBatchMemory):
        return
    if miner is not None:
        raise ConfigError(
            f'miner {type(miner).__name__} would mine in the batch alone: name it among the '
            f"loss_options of CrossBatchMemory, {{'miner': {type(miner).__name__!r}}}, where it "
            'mines in the memory'
        )
    if batch_size is not None and batch_size > loss.memory_size:
        raise ConfigError(
            f'CrossBatchMemory: memory_size={loss.memory_size} does not hold a batch of '
            f'{batch_size}: use a memory_size of several batches'
        )


_PROBE_SIZE = 8
_PROBE_LABELS: dict[DataKind, Callable[[int], Any]] = {
    'class': lambda num_classes: torch.arange(_PROBE_SIZE) % min(num_classes, 4),
    'instance': lambda num_classes: torch.arange(_PROBE_SIZE) % min(num_classes, 4),
    'session': lambda _: torch.tensor([[i // 4, (0, 1, 1, -1)[i % 4]] for i in range(_PROBE_SIZE)]),
    'scored_pair': lambda _: torch.arange(_PROBE_SIZE) / _PROBE_SIZE,
    'text_image_pair': lambda _: torch.tensor([[i // 2, i % 2] for i in range(_PROBE_SIZE)]),
}


def check_objective_runs(
    objective: Objective, kind: DataKind, dimension: int, num_classes: int
) -> None:
    """Run an objective on a small random batch: some options fail only when used, or used again.

    A loss that remembers what it saw remembers this too: build another to train with.

    Args:
        objective: what training is to minimize.
        kind: of the training data.
        dimension: length of the embeddings.
        num_classes: of the training data.

    Raises:
        ConfigError: it does not run; says why.
    """
    generator = torch.Generator().manual_seed(0)
    miner = f' with {type(objective.miner).__name__}' if objective.miner else ''
    named = type(objective.loss).__name__ + miner
    for _ in range(2):
        embeddings = torch.randn(_PROBE_SIZE, dimension, generator=generator).requires_grad_()
        try:
            with torch.enable_grad():
                loss = objective(embeddings, _PROBE_LABELS[kind](num_classes))
                value = float(loss.detach())
                # a loss of no tuples at all may know nothing of the embeddings
                if loss.requires_grad:
                    loss.backward()
        except Exception as error:
            reason = f'it needs {error}' if isinstance(error, KeyError) else error
            raise ConfigError(f'{named} does not run with these options: {reason}') from error
        if not math.isfinite(value):
            raise ConfigError(f'{named} does not run with these options: it gives {value}')
