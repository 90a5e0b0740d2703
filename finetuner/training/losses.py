"""Losses by name, most of them pytorch-metric-learning's, and its miners, their options checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from torch import Tensor

from finetuner.excepts import ConfigError, unknown_name

# bases, mixins, wrappers around other losses, and losses that need more than embeddings and labels
_NOT_LOSSES = {
    'BaseLossWrapper',
    'BaseMetricLossFunction',
    'CrossBatchMemory',
    'EmbeddingRegularizerMixin',
    'GenericPairLoss',
    'ManifoldLoss',
    'MultipleLosses',
    'SelfSupervisedLoss',
    'VICRegLoss',
    'WeightRegularizerMixin',
}
_NOT_MINERS = {'BaseMiner', 'EmbeddingsAlreadyPackagedAsTriplets'}
# names of Finetuner 0.4 and of 0.8.1's docstring
_LOSS_ALIASES = {
    'NTXLoss': 'NTXentLoss',
    'SiameseLoss': 'ContrastiveLoss',
    'TripletLoss': 'TripletMarginLoss',
}
# what some losses are told about the model and the data, under the names they use for it
_DIMENSION_NAMES = ('embedding_size', 'descriptors_dim')


def _classes(module: ModuleType, excluded: set[str]) -> dict[str, type]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and name not in excluded
    }


class CosineSimilarityLoss(torch.nn.Module):
    """Mean squared difference between the cosine similarity of pairs and their scores.

    Takes the two embeddings of each pair `[num_pairs, dimension]` and scores `[num_pairs]` in
    0..1. After Reimers and Gurevych, Sentence-BERT (2019), section 3, regression objective.
    """

    def forward(self, first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
        """Compute the loss, a scalar; 0 for no pairs."""
        if not len(scores):
            return (first.sum() + second.sum()) * 0
        return torch.nn.functional.mse_loss(torch.cosine_similarity(first, second), scores)


LOSSES = {**_classes(losses, _NOT_LOSSES), CosineSimilarityLoss.__name__: CosineSimilarityLoss}
# learn from pairs with a score
PAIR_LOSSES = (CosineSimilarityLoss.__name__,)
# Learn from exactly the pairs they are told, and look at no labels. Which these are was found by
# giving each loss the same pairs with other labels, and a test finds it again.
TUPLE_LOSSES = (
    'CircleLoss',
    'ContrastiveLoss',
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
MINERS = _classes(miners, _NOT_MINERS)
# options that are objects themselves: written as a name or {'name': ..., option: value}
_PARTS = {
    'distance': _classes(distances, {'BaseDistance', 'BatchedDistance'}),
    'reducer': _classes(reducers, {'BaseReducer', 'DoNothingReducer', 'MultipleReducers'}),
    'embedding_regularizer': _classes(regularizers, {'BaseRegularizer'}),
    'weight_regularizer': _classes(regularizers, {'BaseRegularizer'}),
}


def accepted_options(class_: type) -> dict[str, inspect.Parameter]:
    """Options that a class and its bases take, since the bases' travel in keyword arguments."""
    options: dict[str, inspect.Parameter] = {}
    for base in class_.__mro__:
        if '__init__' not in vars(base) or base in (object, torch.nn.Module):
            continue
        for name, parameter in inspect.signature(vars(base)['__init__']).parameters.items():
            if name != 'self' and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                options.setdefault(name, parameter)
    return options


def build_loss(
    name: str, options: Mapping[str, Any] | None, dimension: int, num_classes: int
) -> torch.nn.Module:
    """Construct a loss.

    Args:
        name: class name in pytorch-metric-learning, or a Finetuner name for one.
        options: its options; `distance`, `reducer` and regularizers by name, or as a mapping of
            `name` and their own options.
        dimension: length of the embeddings, for losses that learn weights.
        num_classes: classes in the training data, for the same.

    Returns:
        A module called with embeddings `[batch, dimension]`, labels `[batch]` and, optionally,
        what a miner gave.

    Raises:
        ConfigError: the name, an option or a value is not allowed.
    """
    name = _LOSS_ALIASES.get(name, name)
    if name not in LOSSES:
        raise ConfigError(unknown_name('loss', name, [*LOSSES, *_LOSS_ALIASES]))
    class_ = LOSSES[name]
    taken = accepted_options(class_)
    known: dict[str, Any] = {}
    for parameter in _DIMENSION_NAMES:
        if parameter in taken:
            known[parameter] = dimension
    if 'num_classes' in taken and taken['num_classes'].default is inspect.Parameter.empty:
        known['num_classes'] = num_classes
    return _construct('loss', name, class_, {**known, **(options or {})})


def learns_class_weights(name: str) -> bool:
    """Whether a loss keeps weights for each class of the training data.

    Such a loss cannot judge validation data: its classes are others.
    """
    loss = LOSSES.get(_LOSS_ALIASES.get(name, name))
    return loss is not None and bool({'num_classes', *_DIMENSION_NAMES} & set(_required(loss)))


def _required(class_: type) -> list[str]:
    options = accepted_options(class_)
    return [name for name, option in options.items() if option.default is option.empty]


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
    if name not in MINERS:
        raise ConfigError(unknown_name('miner', name, MINERS))
    return _construct('miner', name, MINERS[name], options or {})


def _construct(kind: str, name: str, class_: type, options: Mapping[str, Any]) -> Any:
    taken = accepted_options(class_)
    arguments = {}
    for option, value in options.items():
        if option not in taken:
            raise ConfigError(unknown_name(f'option of {kind} {name}', option, taken))
        arguments[option] = _build_part(option, value) if option in _PARTS else value
    try:
        return class_(**arguments)
    except (TypeError, ValueError, AssertionError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f'{kind} {name} does not accept {dict(options)}: {error}') from error


def _build_part(option: str, value: Any) -> Any:
    """A distance, reducer or regularizer from its name, or from a mapping with `name` in it."""
    if value is None or isinstance(value, torch.nn.Module):
        return value
    arguments = dict(value) if isinstance(value, Mapping) else {'name': value}
    name = arguments.pop('name', None)
    if name not in _PARTS[option]:
        raise ConfigError(unknown_name(option, name, _PARTS[option]))
    return _construct(option, name, _PARTS[option][name], arguments)
