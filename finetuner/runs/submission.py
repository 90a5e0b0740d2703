"""From the arguments of `fit` to a config and its data: every piece of data has a key.

The keys are 'train_data', 'eval_data', and for the callback at position i 'callbacks.<i>.query_data'
and 'callbacks.<i>.index_data'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from docarray import Document

from finetuner.config import RunConfig
from finetuner.excepts import ConfigError

if TYPE_CHECKING:
    from finetuner.data.csv import CSVOptions

REFERENCE = re.compile(r'sha256:([0-9a-f]{64})')
# Stands for data that is validated but not stored yet.
NOT_STORED_YET = 'sha256:' + '0' * 64


Documents = Sequence[Document]


def opened(
    data: Any,
    csv_options: CSVOptions | None,
    on_broken: Any = 'stop',
    content: str | None = None,
    label: str | None = None,
) -> Documents | str:
    """Open whatever was given as data; what names pushed data is left to the client.

    Args:
        data: a path, Documents, an iterator of them, a dataset, or the name of pushed data.
        csv_options: how CSV files are read; not looked at for anything else.
        on_broken: see `open_documents`.
        content: column of a dataset or of WebDataset shards; not looked at for anything else.
        label: the same.

    Returns:
        Documents, or the name.

    Raises:
        DataError: there is nothing to be read, or it is no data.
    """
    from finetuner.data.sources import has_columns, is_csv, is_source_path, open_documents

    if has_columns(data):
        return open_documents(data, None, on_broken, content, label)
    if isinstance(data, str) and not is_source_path(data):
        return data
    return open_documents(data, csv_options if is_csv(data) else None, on_broken)


def callback_parameters(
    callbacks: Iterable[Any] | None,
    csv_options: CSVOptions | None = None,
    on_broken: Any = 'stop',
    content: str | None = None,
    label: str | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Documents | str]]:
    """Split callbacks into plain JSON values and their Documents, as `Client.fit` takes them.

    Args:
        callbacks: instances of the dataclasses in `finetuner.callback`.
        csv_options: how CSV files among their data are read.
        on_broken: see `open_documents`.
        content: column of the datasets among their data.
        label: the same.

    Returns:
        `[{'name': ..., 'options': {...}}]`, and Documents or their names by
        'callbacks.<position>.<option>'.

    Raises:
        ConfigError: something else stands among the callbacks.
    """
    configs: list[dict[str, Any]] = []
    data: dict[str, Documents | str] = {}
    for position, callback in enumerate(callbacks or ()):
        if not is_dataclass(callback) or isinstance(callback, type):
            raise ConfigError(
                f'callback {position} is {callback!r}: give an instance of a class of '
                'finetuner.callback, such as EvaluationCallback(query_data=...)'
            )
        options = {}
        for field in fields(callback):
            value = getattr(callback, field.name)
            if field.name in ('query_data', 'index_data') and value is not None:
                value = opened(value, csv_options, on_broken, content, label)
            if isinstance(value, Sequence) and not isinstance(value, str):
                data[f'callbacks.{position}.{field.name}'] = value
            else:
                options[field.name] = value
        configs.append({'name': type(callback).__name__, 'options': options})
    return configs, data


def collect_data(
    parameters: Mapping[str, Any], data: Mapping[str, Documents | str]
) -> dict[str, Documents | str]:
    """All Documents and references of a run by key, those written into the parameters too."""
    everything: dict[str, Documents | str] = {}
    for name in ('train_data', 'eval_data'):
        if parameters.get(name) is not None:
            everything[name] = parameters[name]
    for position, callback in enumerate(_callback_list(parameters)):
        options = callback.get('options') or {}
        for name in ('query_data', 'index_data'):
            if options.get(name) is not None:
                everything[f'callbacks.{position}.{name}'] = options[name]
    everything.update(data)
    for key, value in everything.items():
        if not isinstance(value, Sequence) or isinstance(value, bytes):
            raise ConfigError(
                f'{key} is a {type(value).__name__}: give a DocumentArray, or the reference or '
                'name of one that was pushed'
            )
    if 'train_data' not in everything:
        raise ConfigError('train_data is missing: give the labelled Documents to train on')
    return everything


def build_config(parameters: Mapping[str, Any], references: Mapping[str, str]) -> RunConfig:
    """Validate the parameters with each piece of data in its place as a reference."""
    filled = dict(parameters)
    callbacks = [dict(callback) for callback in _callback_list(parameters)]
    for key, reference in references.items():
        if key in ('train_data', 'eval_data'):
            filled[key] = reference
            continue
        place = re.fullmatch(r'callbacks\.(\d+)\.(\w+)', key)
        if place is None or int(place[1]) >= len(callbacks):
            raise ConfigError(
                f"data under {key!r} belongs nowhere: allowed are 'train_data', 'eval_data' and "
                f"'callbacks.<i>.query_data', '.index_data' for the {len(callbacks)} callbacks given"
            )
        callback = callbacks[int(place[1])]
        callback['options'] = {**(callback.get('options') or {}), place[2]: reference}
    if callbacks:
        filled['callbacks'] = callbacks
    return RunConfig.from_parameters(filled)


def _callback_list(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    callbacks = parameters.get('callbacks') or []
    if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        raise ConfigError(f'callbacks: {callbacks!r} is not a list of callbacks')
    for position, callback in enumerate(callbacks):
        if not isinstance(callback, Mapping) or not isinstance(
            callback.get('options') or {}, Mapping
        ):
            raise ConfigError(
                f"callback {position} is {callback!r}: allowed is {{'name': ..., 'options': {{...}}}}"
            )
    return list(callbacks)
