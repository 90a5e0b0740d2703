"""Options of losses and miners in plain values, checked against signatures; distances by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from pytorch_metric_learning import distances, reducers, regularizers

from finetuner.excepts import ConfigError, unknown_name

_BASE = 'it is a base class, which computes nothing by itself'
# Classes of pytorch-metric-learning that an option cannot name, and why.
REFUSED_PARTS = {
    'BaseDistance': _BASE,
    'BaseReducer': _BASE,
    'BaseRegularizer': _BASE,
    'BatchedDistance': 'it hands its distances out in pieces, where losses want them all',
    'DoNothingReducer': 'it leaves several numbers, of which training cannot minimize one',
    'MultipleReducers': (
        'it nests reducers under the names of the parts of a loss: name one reducer, which all '
        'parts get'
    ),
}
# what only Python can say, or what a class has settled for good
_NOT_OPTIONS = {
    'aggregation_func',
    'collect_stats',
    'is_inverted',
    'mat_based_loss',
    'weight_init_func',
}
_CONSTRUCTION_ERRORS = (
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
    NotImplementedError,
)


def classes_of(module: ModuleType, excluded: Mapping[str, str]) -> dict[str, type]:
    """The classes of a module by name.

    Args:
        module: where to look.
        excluded: names to leave out, with the reasons.
    """
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and name not in excluded
    }


_REGULARIZERS = classes_of(regularizers, REFUSED_PARTS)
# options that are objects themselves: written as a name, or as a mapping, see `named_part`
PARTS: dict[str, dict[str, type]] = {
    'distance': classes_of(distances, REFUSED_PARTS),
    'reducer': classes_of(reducers, REFUSED_PARTS),
    # that of sparse centers is about the weights of a loss with several centers for each class
    'embedding_regularizer': {
        name: class_ for name, class_ in _REGULARIZERS.items() if name != 'SparseCentersRegularizer'
    },
    'weight_regularizer': _REGULARIZERS,
}
# Distances that go with a loss, where pytorch-metric-learning does not see to it itself.
_DISTANCES: dict[str, tuple[str, ...]] = {
    'HistogramLoss': ('CosineSimilarity',),
    'ManifoldLoss': ('CosineSimilarity',),
    'P2SGradLoss': (),
    'RankedListLoss': ('LpDistance', 'SNRDistance'),
    'VICRegLoss': (),
}
# Losses that have their values reduced to one before a reducer sees them; a reducer that needs
# what other losses have to offer; and one that takes the values of items and pairs only.
_REDUCED = {
    'DynamicSoftMarginLoss',
    'HistogramLoss',
    'ManifoldLoss',
    'P2SGradLoss',
    'PNPLoss',
    'ThresholdConsistentMarginLoss',
}
_WITH_DIVISOR = {'MarginLoss', 'ProxyAnchorLoss'}
_OF_TRIPLETS = {
    'AngularLoss',
    'LiftedStructureLoss',
    'MarginLoss',
    'TripletMarginLoss',
    'TupletMarginLoss',
}
_WITHOUT_CLASSES = {'ProxyAnchorLoss', 'VICRegLoss'}


def accepted_options(class_: type) -> dict[str, inspect.Parameter]:
    """Options that a class and its bases take, since the bases' travel in keyword arguments."""
    options: dict[str, inspect.Parameter] = {}
    for base in class_.__mro__:
        if '__init__' not in vars(base) or base in (object, torch.nn.Module):
            continue
        for name, parameter in inspect.signature(vars(base)['__init__']).parameters.items():
            plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if name != 'self' and plain and name not in _NOT_OPTIONS:
                options.setdefault(name, parameter)
    return options


def required_options(class_: type) -> list[str]:
    """Those without a default."""
    options = accepted_options(class_)
    return [name for name, option in options.items() if option.default is option.empty]


def check_name(kind: str, name: Any, known: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Check that a class can be had by this name.

    Args:
        kind: what the name stands for, such as `'loss'`.
        name: what came.
        known: names that are allowed.
        refused: names that are not, although the class exists, and why.

    Raises:
        ConfigError: it cannot.
    """
    if isinstance(name, str) and name in known:
        return
    if isinstance(name, str) and name in refused:
        raise ConfigError(
            f'unknown {kind} {name!r}: pytorch-metric-learning has it, but {refused[name]}'
        )
    raise ConfigError(unknown_name(kind, name, known))


def named_part(option: str, value: Any) -> tuple[Any, dict[str, Any]]:
    """Take apart how an object is written among options.

    Args:
        option: what it is given for.
        value: a class name, `{'name': ..., 'options': {...}}`, or `{'name': ..., option: value}`.

    Returns:
        The name, which may be none of a class, and its options.

    Raises:
        ConfigError: it is written in another way.
    """
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{option} {value!r} is neither a class name nor {{'name': ..., 'options': {{...}}}}"
        )
    arguments = dict(value)
    name = arguments.pop('name', None)
    if 'options' not in arguments:
        return name, arguments
    options = arguments.pop('options')
    if arguments or not isinstance(options, Mapping | None):
        raise ConfigError(f"{option} {name}: put all its options into the mapping 'options'")
    return name, dict(options or {})


def construct(
    kind: str,
    name: str,
    class_: type,
    options: Mapping[str, Any],
    known: Mapping[str, Any] | None = None,
) -> Any:
    """Make an object of a class of pytorch-metric-learning.

    Args:
        kind: what errors call it, such as `'loss'`.
        name: its name.
        class_: its class.
        options: arguments of the class, objects among them written as `named_part` reads them.
        known: arguments that are filled in where a class needs them and no option says other.

    Raises:
        ConfigError: an option is unknown, or its value is not accepted.
    """
    taken = accepted_options(class_)
    needed = required_options(class_)
    arguments = {option: value for option, value in (known or {}).items() if option in needed}
    for option, value in options.items():
        if option not in taken:
            raise ConfigError(unknown_name(f'option of {kind} {name}', option, taken))
        arguments[option] = _build_part(option, value, known) if option in PARTS else value
    if class_ is reducers.ClassWeightedReducer and 'weights' in arguments:
        arguments['weights'] = _class_weights(arguments['weights'])
    try:
        return class_(**arguments)
    except _CONSTRUCTION_ERRORS as error:
        # assertions there may come without a word
        reason = str(error) or 'they do not go together'
        if isinstance(error, AssertionError) and arguments.get('distance') is not None:
            reason += f'; {_usable_distances(class_, arguments)}'
        raise ConfigError(f'{kind} {name} does not accept {dict(options)}: {reason}') from error


def _build_part(option: str, value: Any, known: Mapping[str, Any] | None) -> Any:
    """A distance, reducer or regularizer; those that are objects already stay."""
    if value is None or isinstance(value, torch.nn.Module):
        return value
    name, options = named_part(option, value)
    check_name(option, name, PARTS[option], REFUSED_PARTS)
    return construct(option, name, PARTS[option][name], options, known)


def _class_weights(value: Any) -> torch.Tensor:
    """Weights of classes as a tensor, which JSON does not have."""
    try:
        weights = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f'weights of reducer ClassWeightedReducer: {value!r} is no list of numbers'
        ) from error
    if weights.ndim != 1:
        raise ConfigError(
            f'weights of reducer ClassWeightedReducer: {value!r} is no list of one number a class'
        )
    return weights


def _usable_distances(class_: type, arguments: Mapping[str, Any]) -> str:
    """Say which distances a class accepts in the place of one that it did not."""
    usable = []
    for name, distance in PARTS['distance'].items():
        try:
            class_(**{**arguments, 'distance': distance()})
        except _CONSTRUCTION_ERRORS:
            continue
        usable.append(name)
    if not usable:
        return 'it takes no distance with these options'
    return f'distances that can be used, without options of their own: {", ".join(usable)}'


def allowed_parts(loss: str, option: str) -> tuple[str, ...]:
    """Names that go with a loss as its `distance` or `reducer`, as far as this module knows.

    Args:
        loss: class name.
        option: `distance` or `reducer`.
    """
    if option == 'distance':
        return _DISTANCES.get(loss, tuple(PARTS[option]))
    if loss in _REDUCED:
        return ()
    unfit = {
        'DivisorReducer': loss not in _WITH_DIVISOR,
        'PerAnchorReducer': loss in _OF_TRIPLETS,
        'ClassWeightedReducer': loss in _WITHOUT_CLASSES,
    }
    return tuple(name for name in PARTS[option] if not unfit.get(name))


def check_part(loss: str, option: str, value: Any) -> None:
    """Check that a distance or reducer goes with a loss; names of none are let through.

    Args:
        loss: class name.
        option: `distance` or `reducer`.
        value: as it stands among the loss's options.

    Raises:
        ConfigError: it does not; names those that do.
    """
    if value is None:
        return
    part = type(value).__name__
    if not isinstance(value, torch.nn.Module):
        part = named_part(option, value)[0]
    allowed = allowed_parts(loss, option)
    if part in allowed or not isinstance(part, str) or part not in PARTS[option]:
        return
    if allowed:
        raise ConfigError(f'loss {loss} does not go with {option} {part}: use {", ".join(allowed)}')
    raise ConfigError(f'loss {loss} has no use for a {option}: leave it out')
