"""Options within `model_options`, and what all of them say of themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, validator
from pydantic.fields import ModelField

from finetuner.config import whole_number_fields
from finetuner.excepts import ConfigError, unknown_name

PICTURE_POOLERS = ('mean', 'gem', 'max')
# MAC, the maximum activations of convolutions, is the name that Finetuner 0.8.1 had for `max`
_POOLER_ALIASES = {**{name: name for name in PICTURE_POOLERS}, 'mac': 'max'}


class PoolerOptions(BaseModel):
    """`pooler_options` of the pooler `gem`.

    Attributes:
        p: exponent that training begins with: 1 is the mean, and the larger it is, the nearer the
            result is to the maximum.
        eps: what smaller values count as, so that roots and logarithms of them exist.
        trainable: whether `p` is learned with the weights.
    """

    p: float = Field(3.0, gt=0.0, le=100.0)
    eps: float = Field(1e-6, gt=0.0, le=1.0)
    trainable: bool = True

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'


class LoraOptions(BaseModel):
    """`lora` of text encoders: low-rank adapters in the place of their weights are trained.

    Attributes:
        rank: of the matrices that are added to each adapted one.
        alpha: what is added is multiplied by this much over the rank.
        dropout: share of an adapter's inputs that training leaves out.
        target_modules: names, or last parts of names, of the layers that are adapted; None takes
            all linear layers of the encoder.
    """

    rank: int = Field(8, ge=1, le=1024)
    alpha: float = Field(16.0, gt=0.0, lt=float('inf'))
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: tuple[str, ...] | None = None

    _whole_numbers = whole_number_fields('rank')

    @validator('target_modules', pre=True)
    def _names_some(cls, value: Any) -> Any:
        if value is not None and (isinstance(value, str) or not value):
            raise ValueError("it takes a list of names, such as ['query', 'value']; None takes all")
        return value

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'


@dataclass(frozen=True)
class PicturePooler:
    """How the positions of a convolutional network's last layer become one embedding.

    Attributes:
        name: one of `PICTURE_POOLERS`.
        p: of `gem`, the exponent that it began with.
        eps: of `gem`, see `PoolerOptions`.
        trainable: of `gem`, see `PoolerOptions`.
    """

    name: str = 'mean'
    p: float = 3.0
    eps: float = 1e-6
    trainable: bool = True

    def as_options(self) -> dict[str, Any]:
        """The `model_options` that ask for it."""
        if self.name != 'gem':
            return {} if self.name == 'mean' else {'pooler': self.name}
        values = {'p': self.p, 'eps': self.eps, 'trainable': self.trainable}
        return {'pooler': self.name, 'pooler_options': values}


def pooler_field(name: str) -> Any:
    """Make a pydantic validator of a picture pooler, which takes Finetuner 0.8.1's spellings."""

    def canonical(value: Any) -> Any:
        return _POOLER_ALIASES.get(value.lower(), value) if isinstance(value, str) else value

    return validator(name, pre=True, allow_reuse=True)(canonical)


def check_option_names(what: str, given: Mapping[str, Any], known: type[BaseModel]) -> None:
    """Check the names of options, and of those within them.

    Args:
        what: whose options they are, for the message.
        given: values by name.
        known: has a field for each.

    Raises:
        ConfigError: a name is unknown; the nearest is suggested.
    """
    for name, value in given.items():
        if name not in known.__fields__:
            raise ConfigError(unknown_name(f'option of {what}', name, known.__fields__))
        inner = _inner_model(known.__fields__[name])
        if inner is not None and isinstance(value, Mapping):
            check_option_names(f'{name} of {what}', value, inner)


def describe_options(
    options: type[BaseModel], left_out: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """What a class of options takes, in plain values.

    Args:
        options: its docstring has an `Attributes` section.
        left_out: fields that are not to be described.

    Returns:
        For each field `name`, `type`, `required`, `default`, `description`; where there are such,
        `options` (a choice), `range`, and `fields` (the same again of options within an option).
    """
    meanings = _attributes(options)
    described = []
    for field in options.__fields__.values():
        if field.name in left_out:
            continue
        entry: dict[str, Any] = {
            'name': field.name,
            'type': _type_name(field.annotation),
            'required': bool(field.required),
            'default': field.default,
            'description': meanings.get(field.name, ''),
        }
        choices = _choices(field.annotation)
        if choices:
            entry['options'] = choices
        limits = _range(field)
        if limits:
            entry['range'] = limits
        inner = _inner_model(field)
        if inner is not None:
            entry['fields'] = describe_options(inner)
        described.append(entry)
    return described


def _attributes(options: type) -> dict[str, str]:
    """The meanings in the `Attributes` section of a docstring, each on one line."""
    _, _, section = (inspect.getdoc(options) or '').partition('Attributes:\n')
    found: dict[str, str] = {}
    name = ''
    for line in section.splitlines():
        start = re.fullmatch(r' {4}(\w+): (.*)', line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif name and line.startswith(' ' * 8):
            found[name] += f' {line.strip()}'
        else:
            name = ''
    return found


def _members(annotation: Any) -> list[Any]:
    """The members of a union, None aside; of anything else itself."""
    if get_origin(annotation) in (UnionType, Union):
        return [member for member in get_args(annotation) if member is not type(None)]
    return [annotation]


def _choices(annotation: Any) -> list[Any]:
    members = _members(annotation)
    return list(get_args(members[0])) if get_origin(members[0]) is Literal else []


def _type_name(annotation: Any) -> str:
    names = []
    for member in _members(annotation):
        origin = get_origin(member)
        if origin is Literal:
            names.append(type(get_args(member)[0]).__name__)
        elif origin is tuple:
            names.append(f'list of {get_args(member)[0].__name__}')
        elif isinstance(member, type) and issubclass(member, BaseModel):
            names.append('dict')
        else:
            # pydantic puts classes of its own in the place of numbers with limits
            plain = (t for t in (bool, int, float) if isinstance(member, type))
            names.append(next((t for t in plain if issubclass(member, t)), member).__name__)
    optional = get_origin(annotation) in (UnionType, Union) and type(None) in get_args(annotation)
    return ' or '.join([*names, 'None'] if optional else names)


def _range(field: ModelField) -> str:
    """What numbers may be, in words."""
    words = {'ge': 'at least', 'gt': 'more than', 'le': 'at most', 'lt': 'less than'}
    limits = {name: getattr(field.field_info, name) for name in words}
    return ', '.join(
        f'{words[name]} {value:g}'
        for name, value in limits.items()
        if value is not None and value != float('inf')
    )


def _inner_model(field: ModelField) -> type[BaseModel] | None:
    for member in _members(field.annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None
