"""Losses by name, most of them pytorch-metric-learning's, and its miners, their options checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.utils.common_functions import (
    indices_tuple_not_supported,
    small_val,
)
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
from torch import Tensor

from finetuner.excepts import ConfigError, unknown_name
from finetuner.training.loss_options import (
    check_name,
    check_part,
    classes_of,
    construct,
    named_part,
    required_options,
)
from finetuner.training.pair_losses import CLIPLoss, CosineSimilarityLoss

_BASE = 'it is a base class or a mixin, which computes nothing by itself: name a class made of it'
# Classes of pytorch-metric-learning that a run cannot name, why, and what to take instead.
REFUSED = {
    'BaseLossWrapper': _BASE,
    'BaseMetricLossFunction': _BASE,
    'BaseMiner': _BASE,
    'EmbeddingRegularizerMixin': _BASE,
    'EmbeddingsAlreadyPackagedAsTriplets': (
        'no batch here is a row of triplets: give sessions, whose triplets are those of each root, '
        'or take TripletMarginMiner'
    ),
    'GenericPairLoss': _BASE,
    'InstanceLoss': (
        'it takes the number of a class for a place in the batch, so its value falls while nothing '
        'is learned of classes: take NormalizedSoftmaxLoss'
    ),
    'MultipleLosses': (
        'a run minimizes one loss: take one of them, or add them up in a module of your own and '
        'fit a model of your own with it'
    ),
    'SelfSupervisedLoss': (
        'views of one unlabelled Document have equal labels here, so no wrapper is needed: take '
        'the loss that it would wrap, such as NTXentLoss'
    ),
    'WeightRegularizerMixin': _BASE,
}
# names of Finetuner 0.4 and of 0.8.1's docstring
_LOSS_ALIASES = {
    'NTXLoss': 'NTXentLoss',
    'SiameseLoss': 'ContrastiveLoss',
    'TripletLoss': 'TripletMarginLoss',
}
# what some losses are told about the model, under the names they use for it
_DIMENSION_NAMES = ('embedding_size', 'descriptors_dim', 'l')
_MEMORY_OPTIONS = ('loss', 'loss_options', 'memory_size', 'miner')
_MOST_PROXIES = 50


class CrossBatchMemory(losses.CrossBatchMemory):
    """A loss between a batch and the embeddings of the batches before it.

    After Wang et al., Cross-Batch Memory for Embedding Learning (2020).
    """

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, and remember the batch.

        Without gradients, as on validation data, nothing is remembered and the batch is looked at
        alone: the labels of the memory are those of training data.
        """
        if not torch.is_grad_enabled():
            tuples = self.miner(embeddings, labels) if self.miner is not None else None
            return self.loss(embeddings, labels, tuples)
        if len(embeddings) > self.memory_size:
            raise ConfigError(
                f'CrossBatchMemory: memory_size={self.memory_size} does not hold a batch of '
                f'{len(embeddings)}'
            )
        return super().forward(embeddings, labels)


class DynamicSoftMarginLoss(losses.DynamicSoftMarginLoss):
    """The original keeps the graph of every batch in its histogram, and fails in the second.

    It fails, too, where a difference of distances falls beyond its last bin.
    """

    def update_histogram(self, data: Tensor) -> None:
        """Count differences of distances `[num_triplets]` into the histogram."""
        end = self.min_val + self.delta * (self.num_bins - 1 - 1e-4)
        super().update_histogram(data.detach().clamp(self.min_val, end))

    def weigh_loss(self, data: Tensor) -> Tensor:
        """Weigh each difference with the share of those below it."""
        bins = ((data.detach() - self.min_val) / self.delta).long().clamp(0, self.num_bins - 1)
        return torch.cumsum(self.hist_, 0)[bins] * data


class HistogramLoss(losses.HistogramLoss):
    """The original has no bin for a similarity of 1, such as that of an item drawn twice."""

    def compute_density(self, distances: Tensor) -> Tensor:
        """Compute the histogram of similarities `[num_pairs]`."""
        return super().compute_density(distances.clamp(-1, 1 - 1e-6))


class ManifoldLoss(losses.ManifoldLoss):
    """Items of one class share a proxy, as the authors have it; the original draws one for each.

    With fewer proxies than classes, several classes share one: the authors' meta-classes.
    """

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        """Compute the loss; what a miner picks is not supported."""
        indices_tuple_not_supported(indices_tuple)
        return super().forward(embeddings, indices_tuple=labels % self.K)


class NCALoss(losses.NCALoss):
    """The original gives nan for a batch without similar items."""

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, tuples: Any, others: Tensor, other_labels: Tensor
    ) -> dict[str, Any]:
        """Compute the loss of each item."""
        found = super().compute_loss(embeddings, labels, tuples, others, other_labels)
        values = found['loss']['losses']
        return self.zero_losses() if torch.is_tensor(values) and not len(values) else found


class NTXentLoss(losses.NTXentLoss):
    """The original compares each positive pair with the negatives of all anchors, not of its own.

    That takes memory with the cube of the batch, 34 GB for 2,048 items; this takes it with the
    square.
    """

    def _compute_loss(self, pos_pairs: Any, neg_pairs: Any, indices_tuple: Any) -> dict[str, Any]:
        anchors, positives, of_negatives, _ = indices_tuple
        if not len(anchors) or not len(of_negatives):
            return self.zero_losses()
        sign = 1 if self.distance.is_inverted else -1
        positive, negative = (
            sign * pos_pairs / self.temperature,
            sign * neg_pairs / self.temperature,
        )
        num_anchors = int(torch.maximum(anchors.max(), of_negatives.max())) + 1
        # of each anchor's negatives: the highest, and how much all are in terms of that
        lowest = negative.new_full((num_anchors,), -torch.inf)
        highest = lowest.scatter_reduce(0, of_negatives, negative.detach(), 'amax')
        relative = torch.exp(negative - highest[of_negatives])
        mass = torch.zeros_like(lowest).index_add(0, of_negatives, relative)
        top = torch.maximum(positive.detach(), highest[anchors])
        numerator = torch.exp(positive - top)
        denominator = numerator + mass[anchors] * torch.exp(highest[anchors] - top)
        values = -torch.log(numerator / denominator + small_val(numerator.dtype))
        pairs = (anchors, positives)
        return {'loss': {'losses': values, 'indices': pairs, 'reduction_type': 'pos_pair'}}


class SmoothAPLoss(losses.SmoothAPLoss):
    """The original is right for as many classes as items of each, standing together."""

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, tuples: Any, others: Tensor, other_labels: Tensor
    ) -> dict[str, Any]:
        """Compute 1 - the smooth average precision of each item among the batch."""
        similarity = self.distance(embeddings)
        same = (labels[:, None] == labels[None, :]).to(similarity.dtype)
        # [query, item, other]: how surely the other one comes before the item
        before = torch.sigmoid((similarity[:, None, :] - similarity[:, :, None]) / self.temperature)
        before = before * (1 - torch.eye(len(labels), dtype=before.dtype, device=before.device))
        ranks = before.sum(dim=2) + 1
        ranks_among_same = (before * same[:, None, :]).sum(dim=2) + 1
        precision = (ranks_among_same / ranks * same).sum(dim=1) / same.sum(dim=1)
        weights = convert_to_weights(tuples, labels, dtype=precision.dtype)
        items = torch.arange(len(labels), device=labels.device)
        values = {'losses': (1 - precision) * weights, 'indices': items}
        return {'loss': {**values, 'reduction_type': 'element'}}


class TupletMarginLoss(losses.TupletMarginLoss):
    """The original gives nan for a similarity of 1, such as that of an item drawn twice."""

    def _compute_loss(self, pos_pairs: Any, neg_pairs: Any, indices_tuple: Any) -> dict[str, Any]:
        if torch.is_tensor(pos_pairs):
            pos_pairs = pos_pairs.clamp(-1 + 1e-6, 1 - 1e-6)
        return super()._compute_loss(pos_pairs, neg_pairs, indices_tuple)


class VICRegLoss(losses.VICRegLoss):
    """Gets its pairs by label: each item of a class, or view of a Document, with the next one."""

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        """Compute the loss; 0 for less than two pairs, which have no variance."""
        indices_tuple_not_supported(indices_tuple)
        order = torch.argsort(labels, stable=True)
        similar = labels[order[:-1]] == labels[order[1:]]
        if int(similar.sum()) < 2:
            return embeddings.sum() * 0
        first, second = order[:-1][similar], order[1:][similar]
        return super().forward(embeddings[first], ref_emb=embeddings[second])


_MENDED = (
    DynamicSoftMarginLoss,
    HistogramLoss,
    ManifoldLoss,
    NCALoss,
    NTXentLoss,
    SmoothAPLoss,
    TupletMarginLoss,
    VICRegLoss,
)
# around other losses
WRAPPERS: dict[str, type] = {CrossBatchMemory.__name__: CrossBatchMemory}
LOSSES: dict[str, type] = {
    **classes_of(losses, {**REFUSED, **dict.fromkeys(WRAPPERS, 'a wrapper')}),
    **{class_.__name__: class_ for class_ in _MENDED},
    CosineSimilarityLoss.__name__: CosineSimilarityLoss,
    CLIPLoss.__name__: CLIPLoss,
}
MINERS = classes_of(miners, REFUSED)
# learn from pairs with a score
PAIR_LOSSES = (CosineSimilarityLoss.__name__,)
# learn from texts and their pictures
TEXT_IMAGE_LOSSES = (CLIPLoss.__name__,)
# Learn from exactly the pairs they are told, and look at no labels. Which these are was found by
# giving each loss the same pairs with other labels, and a test finds it again.
TUPLE_LOSSES = (
    'CircleLoss',
    'ContrastiveLoss',
    'DynamicSoftMarginLoss',
    'GeneralizedLiftedStructureLoss',
    'HistogramLoss',
    'IntraPairVarianceLoss',
    'LiftedStructureLoss',
    'MarginLoss',
    'MultiSimilarityLoss',
    'NTXentLoss',
    'SignalToNoiseRatioContrastiveLoss',
    'SupConLoss',
    'ThresholdConsistentMarginLoss',
    'TripletMarginLoss',
    'TupletMarginLoss',
)
# take all of a batch, and nothing that a miner picks
WHOLE_BATCH_LOSSES = ('ManifoldLoss', 'P2SGradLoss', 'PNPLoss', 'RankedListLoss', 'VICRegLoss')


def build_loss(
    name: str, options: Mapping[str, Any] | None, dimension: int, num_classes: int
) -> torch.nn.Module:
    """Construct a loss.

    Args:
        name: class name in pytorch-metric-learning, or a Finetuner name for one.
        options: its options; `distance`, `reducer` and regularizers by name, or as a mapping of
            `name` and `options`. Those of `CrossBatchMemory` are `loss` and `loss_options`,
            `memory_size`, and `miner`, by name or as such a mapping.
        dimension: length of the embeddings, for losses that learn weights.
        num_classes: classes in the training data, for the same.

    Returns:
        A module called with embeddings `[batch, dimension]`, labels `[batch]` and, optionally,
        what a miner gave.

    Raises:
        ConfigError: the name, an option or a value is not allowed.
    """
    name, given = _LOSS_ALIASES.get(name, name), dict(options or {})
    if name in WRAPPERS:
        return _build_memory(given, dimension, num_classes)
    check_name('loss', name, {**LOSSES, **WRAPPERS, **_LOSS_ALIASES}, REFUSED)
    class_ = LOSSES[name]
    for option in ('distance', 'reducer'):
        check_part(name, option, given.get(option))
    known: dict[str, Any] = dict.fromkeys(_DIMENSION_NAMES, dimension)
    known['num_classes'] = num_classes
    if class_ is ManifoldLoss:
        given.setdefault('K', min(num_classes, _MOST_PROXIES))
    loss = construct('loss', name, class_, given, known)
    for part in loss.modules():
        if isinstance(part, reducers.ClassWeightedReducer) and len(part.weights) != num_classes:
            raise ConfigError(
                f'loss {name} does not run with these options: ClassWeightedReducer has '
                f'{len(part.weights)} weights, and the training data {num_classes} classes'
            )
    return loss


def _build_memory(options: Mapping[str, Any], dimension: int, num_classes: int) -> torch.nn.Module:
    """A loss that compares with earlier batches, see `build_loss`."""
    kind = 'loss of CrossBatchMemory'
    for option in options:
        if option not in _MEMORY_OPTIONS:
            raise ConfigError(
                unknown_name('option of loss CrossBatchMemory', option, _MEMORY_OPTIONS)
            )
    supported = {name: LOSSES[name] for name in losses.CrossBatchMemory.supported_losses()}
    name, inner = options.get('loss'), options.get('loss_options')
    if name is None:
        raise ConfigError(
            f"unknown {kind}: name one in loss_options, such as {{'loss': 'ContrastiveLoss'}}. "
            f'Known: {", ".join(supported)}'
        )
    name = _LOSS_ALIASES.get(name, name) if isinstance(name, str) else name
    reason = f'it cannot compare a batch with a memory: take one of {", ".join(supported)}'
    check_name(kind, name, supported, {**dict.fromkeys(LOSSES, reason), **REFUSED})
    if not isinstance(inner, Mapping | None):
        raise ConfigError(f'loss_options of CrossBatchMemory: {inner!r} is no mapping of options')
    if inner and inner.get('swap'):
        raise ConfigError(
            f'{kind}: option swap of {name} compares items of the memory with one another, whose '
            'places it takes for those in the batch: leave it out'
        )
    size = options.get('memory_size', 1024)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f'memory_size={size!r} of CrossBatchMemory is no whole number above 0')
    miner = None
    if options.get('miner') is not None:
        miner = build_miner(*named_part('miner', options['miner']))
    if isinstance(miner, miners.BatchEasyHardMiner) and miner.pos_strategy == miner.EASY:
        raise ConfigError(
            'miner BatchEasyHardMiner finds each item itself in the memory, the easiest positive: '
            "give it the option pos_strategy, such as 'hard', or take BatchHardMiner"
        )
    loss = build_loss(name, inner, dimension, num_classes)
    return CrossBatchMemory(loss, dimension, size, miner)


def learns_class_weights(name: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a loss keeps weights for each class of the training data.

    Such a loss cannot judge validation data: its classes are others.

    Args:
        name: of the loss.
        options: of the loss.
    """
    name, given = _LOSS_ALIASES.get(name, name), options or {}
    if name in WRAPPERS:
        inner = given.get('loss_options')
        return learns_class_weights(
            str(given.get('loss')), inner if isinstance(inner, Mapping) else None
        )
    if name not in LOSSES:
        return False
    weights = bool({'num_classes', *_DIMENSION_NAMES} & set(required_options(LOSSES[name])))
    return weights or given.get('num_classes') is not None or _weighs_classes(given.get('reducer'))


def _weighs_classes(reducer: Any) -> bool:
    return reducer is not None and named_part('reducer', reducer)[0] == 'ClassWeightedReducer'


def build_miner(name: str | None, options: Mapping[str, Any] | None) -> torch.nn.Module | None:
    """Construct a miner, or None for none.

    Args:
        name: class name in pytorch-metric-learning.
        options: its options, written like a loss's.

    Raises:
        ConfigError: the name, an option or a value is not allowed; options without a miner.
    """
    if name is None:
        if options:
            raise ConfigError('miner_options are given but no miner: name one, or leave them out')
        return None
    check_name('miner', name, MINERS, REFUSED)
    return construct('miner', name, MINERS[name], options or {})
