"""Decide what a run's config leaves open, and check all of it against the data, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from docarray import DocumentArray

from finetuner.artifact import Artifact, ModelSpec, load_artifact
from finetuner.config import RunConfig
from finetuner.data.documents import check_class_data, read_label, require_class_data
from finetuner.data.splitting import split_by_class
from finetuner.excepts import ConfigError, DataError, PictureError
from finetuner.images import picture_of
from finetuner.models.zoo import Backbone, get_backbone, parse_options, picture_spec
from finetuner.training.setup import (
    Description,
    check_callbacks,
    evaluation_batch,
    parse_callback,
    resolve_batch_size,
)

DEFAULT_LEARNING_RATE = 1e-4
# opening every picture of a large set would keep the caller waiting; training opens the others
MAX_PICTURES_CHECKED = 10_000


@dataclass(frozen=True)
class Plan:
    """A config with everything it leaves open decided, and its data at hand."""

    backbone: Backbone
    spec: ModelSpec
    train_input_size: int
    train_docs: DocumentArray
    eval_docs: DocumentArray | None
    callbacks: list[Description]
    batch_size: int
    eval_batch: tuple[int, int]  # Documents in a batch, and of each class
    learning_rate: float
    parent: Artifact | None

    @property
    def num_items(self) -> int:
        """Training Documents."""
        return len(self.train_docs)

    @property
    def num_classes(self) -> int:
        """Classes among them."""
        return len({read_label(doc) for doc in self.train_docs})


def make_plan(config: RunConfig, data: Mapping[str, DocumentArray]) -> Plan:
    """Decide what the config leaves open, and check it against the data.

    Args:
        config: its `model_artifact`, if any, being a path.
        data: Documents under 'train_data', 'eval_data', 'callbacks.<i>.query_data' and
            'callbacks.<i>.index_data'.

    Raises:
        ConfigError: a name, option or combination in the config is wrong.
        DataError: the Documents cannot be trained or evaluated on.
        ArtifactError: the artifact to continue from is damaged.
    """
    parent = load_artifact(config.model_artifact) if config.model_artifact else None
    backbone = get_backbone(config.model)
    if parent is not None:
        _check_parent(config, parent, backbone)
    options = parse_options(backbone, config.model_options)
    spec = (
        parent.spec
        if parent
        else ModelSpec(
            backbone.name,
            config.output_dim or backbone.dimension,
            picture_spec(backbone, options),
            config.output_dim,
        )
    )
    train_docs, eval_docs = data['train_data'], data.get('eval_data')
    _check_docs('train_data', train_docs)
    if eval_docs is None and config.val_split:
        train_docs, eval_docs = split_by_class(train_docs, config.val_split, config.seed)
    items = config.num_items_per_class
    random = config.sampler == 'random'
    batch_size = resolve_batch_size(config.batch_size, items, train_docs)
    _check_docs('train_data', train_docs, None if random else batch_size, items)
    eval_batch = (batch_size, items)
    if eval_docs is not None:
        _check_docs('eval_data', eval_docs)
        eval_batch = evaluation_batch(eval_docs, batch_size, items)
        _check_docs('eval_data', eval_docs, None if random else eval_batch[0], eval_batch[1])
    callbacks = _callbacks(config, data)
    check_callbacks(callbacks, eval_docs is not None)
    return Plan(
        backbone=backbone,
        spec=spec,
        train_input_size=options.train_input_size or spec.picture.input_size,
        train_docs=train_docs,
        eval_docs=eval_docs,
        callbacks=callbacks,
        batch_size=batch_size,
        eval_batch=eval_batch,
        learning_rate=config.learning_rate or DEFAULT_LEARNING_RATE,
        parent=parent,
    )


def _check_parent(config: RunConfig, parent: Artifact, backbone: Backbone) -> None:
    if parent.backbone.name != backbone.name:
        raise ConfigError(
            f'model {config.model!r} is not that of the artifact to go on from: pass '
            f'model={parent.backbone.name!r}'
        )
    if set(config.model_options) - {'train_input_size'} or config.output_dim is not None:
        raise ConfigError(
            'model_options (but for train_input_size) and output_dim are those of the artifact '
            'that training goes on from: leave them out together with model_artifact'
        )


def _check_docs(
    name: str, docs: DocumentArray, batch_size: int | None = None, num_items: int | None = None
) -> None:
    try:
        if num_items is None:
            require_class_data(docs)
        else:
            check_class_data(docs, batch_size, num_items)
    except DataError as error:
        raise DataError(f'{name}: {error}') from error


def _callbacks(config: RunConfig, data: Mapping[str, DocumentArray]) -> list[Description]:
    """The callbacks' descriptions, Documents in the place of references."""
    return [
        parse_callback(
            callback.name,
            dict(callback.options),
            {
                option: data.get(f'callbacks.{position}.{option}')
                for option in ('query_data', 'index_data')
                if callback.options.get(option) is not None
            },
        )
        for position, callback in enumerate(config.callbacks)
    ]


def check_pictures(docs: DocumentArray, size: int, name: str) -> None:
    """Open the pictures of Documents, up to 10,000 spread over all of them.

    Raises:
        PictureError: one cannot be opened; says which and why.
    """
    chosen = np.linspace(0, len(docs) - 1, min(len(docs), MAX_PICTURES_CHECKED)).astype(int)

    def check(position: int) -> None:
        picture_of(docs[position], size, position)

    with ThreadPoolExecutor() as pool:
        try:
            for _ in pool.map(check, chosen.tolist()):
                pass
        except PictureError as error:
            pool.shutdown(cancel_futures=True)
            raise PictureError(f'{name}: {error}') from error
